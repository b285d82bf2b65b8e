//! `bsap demo evaluate`: how well a model ranks drawn catalogues.

use std::fmt::Write as _;

use clap::Args;

use crate::clip::Encoders;
use crate::commands::shared::error::CommandResult;
use crate::commands::shared::models::load_demo_model;
use crate::commands::shared::printing::print_line;
use crate::commands::shared::progress::progress_bar;
use crate::demo::catalogue::PhotoStyle;
use crate::demo::judge::{DrawnImages, RankingSetting, SettingResult};
use crate::demo::queries::{
    AttributeQuery, QueryDifficulty, generate_combinations, generate_queries,
};
use crate::evaluate::{ConfidenceInterval, Cutoffs, MeasureComparison};
use crate::prompts::{EmbeddedPromptSet, PromptSet};

/// `bsap demo evaluate`.
#[derive(Debug, Args)]
pub struct DemoEvaluateArgs {
    /// Pictures of each style
    #[arg(long, default_value_t = 5_000, value_parser = clap::value_parser!(u64).range(1..=1_000_000))]
    pub count: u64,
    /// Queries of each difficulty, where there are as many
    #[arg(long, default_value_t = 150)]
    pub queries: usize,
    /// Decides pictures and queries
    #[arg(long, default_value_t = 2)]
    pub seed: u64,
    /// Another checkpoint than the demo's own: a folder, or a model of the hub
    #[arg(long, value_name = "FOLDER|ID")]
    pub checkpoint: Option<String>,
    /// Print JSON, a line a style, instead of Markdown
    #[arg(long)]
    pub json: bool,
}

/// Side of the drawn pictures in pixels, as in the demo.
const IMAGE_SIDE_PIXELS: u32 = 256;

/// Measures that the tables leave out: with many right pictures a query they say little besides.
const HIDDEN_MEASURES: [&str; 3] = ["recall", "nDCG", "MRR"];

/// Judges a model on drawn catalogues of every style and prints the tables.
pub fn run(args: &DemoEvaluateArgs) -> CommandResult {
    let clip = load_demo_model(args.checkpoint.as_deref())?;
    let sets = ["demo", "photographs"]
        .map(|name| PromptSet::load(name)?.embed(&clip, 8))
        .into_iter()
        .collect::<Result<Vec<EmbeddedPromptSet>, _>>()?;
    let judged_queries = generate_queries(args.seed, args.queries);
    let combined = generate_combinations(args.seed);
    for style in PhotoStyle::ALL {
        let bar = progress_bar(style.name(), args.count)?;
        let judged =
            DrawnImages::draw(&clip, *style, args.seed, args.count, IMAGE_SIDE_PIXELS, |n| {
                bar.inc(n)
            })?;
        bar.finish_and_clear();
        let by_difficulty =
            judged.measure_settings(&clip, &judged_queries, &sets, |q| q.difficulty.name())?;
        let training_group = |q: &AttributeQuery| if q.is_held_out() { "unseen" } else { "seen" };
        let combined = judged.measure_settings(&clip, &combined, &sets, training_group)?;
        if args.json {
            let line = serde_json::json!({
                "style": style, "seed": args.seed, "images": args.count,
                "model": clip.card().fingerprint, "verdicts": by_difficulty, "combinations": combined,
            });
            print_line!("{line}");
        } else {
            print_line!("{}", render_tables(*style, args, &by_difficulty, &combined));
        }
    }
    Ok(())
}

/// One style's verdicts in Markdown, with 95 % intervals.
fn render_tables(
    style: PhotoStyle,
    args: &DemoEvaluateArgs,
    mixed: &[SettingResult],
    combined: &[SettingResult],
) -> String {
    let asked = mixed.first().map_or(0, |v| v.overall.queries);
    let mut text = format!(
        "## {}\n\n{} pictures, {asked} queries, seed {}.\n\n",
        style.name(),
        args.count,
        args.seed
    );
    let names = Cutoffs::default().measure_names();
    let shown = |name: &&String| !HIDDEN_MEASURES.iter().any(|hidden| name.starts_with(hidden));
    let measures: Vec<String> = names.iter().filter(shown).cloned().collect();
    let cells =
        |verdict: &SettingResult, cell: &dyn Fn(&MeasureComparison) -> String| -> Vec<String> {
            let all = names.iter().zip(&verdict.overall.measures);
            all.filter(|(name, _)| shown(name)).map(|(_, column)| cell(column)).collect()
        };
    render_table(&mut text, &measures, mixed, |v| {
        cells(v, &|column| format_interval(&column.value))
    });
    text.push_str("\nGain over plain CLIP, query by query:\n\n");
    render_table(&mut text, &measures, mixed, |v| cells(v, &|column| format_gain(&column.gain)));
    let difficulties = QueryDifficulty::ALL.map(QueryDifficulty::name);
    for (title, names, verdicts) in [
        ("hit@1 by what the query asks for", difficulties.as_slice(), mixed),
        ("hit@1 on combinations that training showed and left out", &["seen", "unseen"], combined),
    ] {
        let groups = verdicts.first().map(|v| &v.groups);
        let count = |name: &str| groups.and_then(|g| g.get(name)).map_or(0, |s| s.queries);
        let columns: Vec<String> =
            names.iter().map(|name| format!("{name} ({})", count(name))).collect();
        let _ = write!(text, "\n{title} (how many queries):\n\n");
        render_table(&mut text, &columns, verdicts, |verdict| {
            let first = |name: &&str| verdict.groups.get(*name).and_then(|s| s.measures.first());
            names
                .iter()
                .map(|name| first(name).map_or("–".into(), |c| format_interval(&c.value)))
                .collect()
        });
    }
    text
}

/// A row a verdict; `cells` gives what stands under `columns`. Writing to a string cannot fail.
fn render_table(
    text: &mut String,
    columns: &[String],
    verdicts: &[SettingResult],
    cells: impl Fn(&SettingResult) -> Vec<String>,
) {
    let _ = writeln!(text, "| prompts | normaliser | weight | {} |", columns.join(" | "));
    let _ = writeln!(text, "| --- | --- | --- |{}", " --- |".repeat(columns.len()));
    for verdict in verdicts {
        let RankingSetting { prompt_set, normaliser, weight } = &verdict.setting;
        let (set, normaliser) = (prompt_set.as_deref().unwrap_or("–"), normaliser.name());
        let _ =
            writeln!(text, "| {set} | {normaliser} | {weight} | {} |", cells(verdict).join(" | "));
    }
}

fn format_interval(m: &ConfidenceInterval) -> String {
    format!("{:.3} ({:.3}–{:.3})", m.mean, m.low, m.high)
}

/// As a gain: bold where the interval does not hold 0.
fn format_gain(m: &ConfidenceInterval) -> String {
    let mark = if m.low > 0.0 || m.high < 0.0 { "**" } else { "" };
    format!("{mark}{:+.3}{mark} ({:+.3} to {:+.3})", m.mean, m.low, m.high)
}
