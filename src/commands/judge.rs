//! `bsap demo evaluate`.

use std::fmt::Write as _;

use super::cli::demo::JudgeArgs;
use super::{Done, bar, drawn};
use crate::clip::Towers;
use crate::demo::catalogue::Style;
use crate::demo::judge::{Drawn, Setting, Verdict};
use crate::demo::queries::{AttributeQuery, Difficulty, combinations, queries};
use crate::evaluate::{Column, Cutoffs, Interval};
use crate::prompts::{EmbeddedSet, PromptSet};

/// Side of the drawn pictures in pixels, as in the demo.
const SIDE: u32 = 256;
/// Measures that the tables leave out: with many right pictures a query they say little besides.
const HIDDEN: [&str; 3] = ["recall", "nDCG", "MRR"];

/// Judges a model on drawn catalogues of every style and prints the tables.
pub fn run(args: &JudgeArgs) -> Done {
    let clip = drawn::model(args.checkpoint.as_deref())?;
    let sets = ["demo", "photographs"]
        .map(|name| PromptSet::load(name)?.embed(&clip, 8))
        .into_iter()
        .collect::<Result<Vec<EmbeddedSet>, _>>()?;
    let asked = queries(args.seed, args.queries);
    let combined = combinations(args.seed);
    for style in Style::ALL {
        let bar = bar(style.name(), args.count)?;
        let judged = Drawn::draw(&clip, *style, args.seed, args.count, SIDE, |n| bar.inc(n))?;
        bar.finish_and_clear();
        let mixed = judged.judge(&clip, &asked, &sets, |q| q.difficulty.name())?;
        let of_training = |q: &AttributeQuery| if q.held_out() { "unseen" } else { "seen" };
        let combined = judged.judge(&clip, &combined, &sets, of_training)?;
        if args.json {
            let line = serde_json::json!({
                "style": style, "seed": args.seed, "images": args.count,
                "model": clip.card().fingerprint, "verdicts": mixed, "combinations": combined,
            });
            say!("{line}");
        } else {
            say!("{}", tables(*style, args, &mixed, &combined));
        }
    }
    Ok(())
}

/// One style's verdicts in Markdown, with 95 % intervals.
fn tables(style: Style, args: &JudgeArgs, mixed: &[Verdict], combined: &[Verdict]) -> String {
    let asked = mixed.first().map_or(0, |v| v.all.queries);
    let mut text = format!(
        "## {}\n\n{} pictures, {asked} queries, seed {}.\n\n",
        style.name(),
        args.count,
        args.seed
    );
    let names = Cutoffs::default().names();
    let shown = |name: &&String| !HIDDEN.iter().any(|hidden| name.starts_with(hidden));
    let measures: Vec<String> = names.iter().filter(shown).cloned().collect();
    let cells = |verdict: &Verdict, cell: &dyn Fn(&Column) -> String| -> Vec<String> {
        let all = names.iter().zip(&verdict.all.columns);
        all.filter(|(name, _)| shown(name)).map(|(_, column)| cell(column)).collect()
    };
    table(&mut text, &measures, mixed, |v| cells(v, &|column| interval(&column.value)));
    text.push_str("\nGain over plain CLIP, query by query:\n\n");
    table(&mut text, &measures, mixed, |v| cells(v, &|column| signed(&column.gain)));
    let difficulties = Difficulty::ALL.map(Difficulty::name);
    for (title, names, verdicts) in [
        ("hit@1 by what the query asks for", difficulties.as_slice(), mixed),
        ("hit@1 on combinations that training showed and left out", &["seen", "unseen"], combined),
    ] {
        let groups = verdicts.first().map(|v| &v.groups);
        let count = |name: &str| groups.and_then(|g| g.get(name)).map_or(0, |s| s.queries);
        let columns: Vec<String> =
            names.iter().map(|name| format!("{name} ({})", count(name))).collect();
        let _ = write!(text, "\n{title} (how many queries):\n\n");
        table(&mut text, &columns, verdicts, |verdict| {
            let first = |name: &&str| verdict.groups.get(*name).and_then(|s| s.columns.first());
            names
                .iter()
                .map(|name| first(name).map_or("–".into(), |c| interval(&c.value)))
                .collect()
        });
    }
    text
}

/// A row a verdict; `cells` gives what stands under `columns`. Writing to a string cannot fail.
fn table(
    text: &mut String,
    columns: &[String],
    verdicts: &[Verdict],
    cells: impl Fn(&Verdict) -> Vec<String>,
) {
    let _ = writeln!(text, "| prompts | normaliser | weight | {} |", columns.join(" | "));
    let _ = writeln!(text, "| --- | --- | --- |{}", " --- |".repeat(columns.len()));
    for verdict in verdicts {
        let Setting { prompt_set, normaliser, weight } = &verdict.setting;
        let (set, normaliser) = (prompt_set.as_deref().unwrap_or("–"), normaliser.name());
        let _ =
            writeln!(text, "| {set} | {normaliser} | {weight} | {} |", cells(verdict).join(" | "));
    }
}

fn interval(m: &Interval) -> String {
    format!("{:.3} ({:.3}–{:.3})", m.mean, m.low, m.high)
}

/// As a gain: bold where the interval does not hold 0.
fn signed(m: &Interval) -> String {
    let mark = if m.low > 0.0 || m.high < 0.0 { "**" } else { "" };
    format!("{mark}{:+.3}{mark} ({:+.3} to {:+.3})", m.mean, m.low, m.high)
}
