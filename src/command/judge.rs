//! `bsap demo evaluate`.

use std::fmt::Write as _;

use super::{Done, bar};
use crate::cli::EvaluateArgs;
use crate::clip::{Clip, Options, Towers};
use crate::demo::catalogue::Style;
use crate::demo::judge::{Judged, Verdict};
use crate::demo::queries::queries;
use crate::demo::write_model;
use crate::evaluate::Measures;
use crate::prompts::{EmbeddedSet, PromptSet};

/// Side of the drawn pictures in pixels, as in the demo.
const SIDE: u32 = 256;

/// Judges a model on drawn catalogues of every style and prints the tables.
pub fn run(args: &EvaluateArgs) -> Done {
    let scratch = std::env::temp_dir().join(format!("bsap-evaluate-{}", std::process::id()));
    let checkpoint = match &args.checkpoint {
        Some(folder) => folder.clone(),
        None => {
            write_model(&scratch)?;
            scratch.clone()
        }
    };
    let clip = Clip::load(&Options { checkpoint, ..Options::default() });
    // Only what this command made itself; where there is nothing, nothing is left to do.
    let _ = std::fs::remove_dir_all(&scratch);
    let clip = clip?;
    let sets = ["demo", "photographs"]
        .map(|name| PromptSet::load(name)?.embed(&clip, 8))
        .into_iter()
        .collect::<Result<Vec<EmbeddedSet>, _>>()?;
    let asked = queries(args.seed, args.queries);
    for style in Style::ALL {
        let bar = bar(style.name(), args.count)?;
        let judged = Judged::draw(&clip, *style, args.seed, args.count, SIDE, |n| bar.inc(n))?;
        bar.finish_and_clear();
        let verdicts = judged.judge(&clip, &asked, &sets)?;
        if args.json {
            let line = serde_json::json!({
                "style": style, "seed": args.seed, "images": args.count,
                "model": clip.card().fingerprint, "verdicts": verdicts,
            });
            say!("{line}");
        } else {
            say!("{}", table(*style, args, &verdicts));
        }
    }
    Ok(())
}

/// One style's verdicts in Markdown: means with 95 % intervals.
fn table(style: Style, args: &EvaluateArgs, verdicts: &[Verdict]) -> String {
    let asked = verdicts.first().map_or(0, |v| v.queries);
    let mut text = format!(
        "### {}: {} pictures, {asked} queries, seed {}\n\n| prompts | normaliser | weight |",
        style.name(),
        args.count,
        args.seed
    );
    // Writing to a string cannot fail.
    for name in Measures::NAMES {
        let _ = write!(text, " {name} |");
    }
    text.push_str("\n| --- | --- | --- |");
    text.push_str(&" --- |".repeat(Measures::NAMES.len()));
    for verdict in verdicts {
        let setting = &verdict.setting;
        let set = setting.prompt_set.as_deref().unwrap_or("–");
        let _ = write!(text, "\n| {set} | {} | {} |", setting.normaliser.name(), setting.weight);
        for m in &verdict.measures {
            let _ = write!(text, " {:.3} ({:.3}–{:.3}) |", m.mean, m.low, m.high);
        }
    }
    text.push('\n');
    text
}
