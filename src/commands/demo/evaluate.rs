//! `bsap demo evaluate`: how well a model ranks synthetic catalogues.

use std::fmt::Write as _;

use clap::Args;

use crate::clip::Encoders;
use crate::commands::shared::error::CommandResult;
use crate::commands::shared::models::load_demo_model;
use crate::commands::shared::printing::print_line;
use crate::commands::shared::progress::progress_bar;
use crate::demo::DEMO_STATISTICS;
use crate::demo::catalogue::PhotoStyle;
use crate::demo::judge::{DrawnImages, RankingSetting, SettingResult};
use crate::demo::queries::{
    AttributeQuery, QueryDifficulty, generate_combination_queries, generate_queries,
};
use crate::evaluate::{ConfidenceInterval, Cutoffs, MeasureComparison};
use crate::prompts::{EmbeddedPromptSet, PromptSet};

/// Side of the pictures in pixels, as in the demo.
const IMAGE_SIDE_PIXELS: u32 = 256;
/// Measures that the tables leave out: with many relevant pictures per query they add little.
const HIDDEN_MEASURES: [&str; 3] = ["recall", "nDCG", "MRR"];

/// `bsap demo evaluate`.
#[derive(Debug, Args)]
pub struct DemoEvaluateArgs {
    /// Pictures per style
    #[arg(long, default_value_t = 5_000, value_parser = clap::value_parser!(u64).range(1..=1_000_000))]
    pub count: u64,
    /// Queries per difficulty, if there are as many
    #[arg(long, default_value_t = 150)]
    pub queries: usize,
    /// Seed of pictures and queries
    #[arg(long, default_value_t = 2)]
    pub seed: u64,
    /// Another checkpoint than that of the demo: a folder, or a model of the hub
    #[arg(long, value_name = "FOLDER|ID")]
    pub checkpoint: Option<String>,
    /// Print one line of JSON per style instead of Markdown
    #[arg(long)]
    pub json: bool,
}

/// Evaluates a model on synthetic catalogues of every style, and prints the results.
pub fn run(args: &DemoEvaluateArgs) -> CommandResult {
    let clip = load_demo_model(args.checkpoint.as_deref())?;
    let sets = ["demo", "photographs"]
        .map(|name| PromptSet::load_builtin_or_file(name)?.embed(&clip, DEMO_STATISTICS))
        .into_iter()
        .collect::<Result<Vec<EmbeddedPromptSet>, _>>()?;
    let judged_queries = generate_queries(args.seed, args.queries);
    let combination_queries = generate_combination_queries(args.seed);
    for style in PhotoStyle::ALL {
        let bar = progress_bar(style.name(), args.count)?;
        let images = DrawnImages::draw_and_embed(
            &clip,
            *style,
            args.seed,
            args.count,
            IMAGE_SIDE_PIXELS,
            |n| {
                bar.inc(n);
            },
        )?;
        bar.finish_and_clear();
        let by_difficulty =
            images.measure_settings(&clip, &judged_queries, &sets, |q| q.difficulty.name())?;
        let training_group = |q: &AttributeQuery| if q.is_held_out() { "unseen" } else { "seen" };
        let combinations =
            images.measure_settings(&clip, &combination_queries, &sets, training_group)?;
        if args.json {
            let line = serde_json::json!({
                "style": style, "seed": args.seed, "images": args.count,
                "model": clip.card().fingerprint, "verdicts": by_difficulty, "combinations": combinations,
            });
            print_line!("{line}");
        } else {
            print_line!("{}", render_tables(*style, args, &by_difficulty, &combinations));
        }
    }
    Ok(())
}

/// Renders the results of one style in Markdown, with 95 % confidence intervals.
fn render_tables(
    style: PhotoStyle,
    args: &DemoEvaluateArgs,
    by_difficulty: &[SettingResult],
    combinations: &[SettingResult],
) -> String {
    let queries = by_difficulty.first().map_or(0, |result| result.overall.queries);
    let mut text = format!(
        "## {}\n\n{} pictures, {queries} queries, seed {}.\n\n",
        style.name(),
        args.count,
        args.seed
    );
    let names = Cutoffs::default().measure_names();
    let is_shown = |name: &&String| !HIDDEN_MEASURES.iter().any(|hidden| name.starts_with(hidden));
    let measures: Vec<String> = names.iter().filter(is_shown).cloned().collect();
    let cells =
        |result: &SettingResult, cell: &dyn Fn(&MeasureComparison) -> String| -> Vec<String> {
            let all = names.iter().zip(&result.overall.measures);
            all.filter(|(name, _)| is_shown(name)).map(|(_, measure)| cell(measure)).collect()
        };
    render_table(&mut text, &measures, by_difficulty, |result| {
        cells(result, &|measure| format_interval(&measure.value))
    });
    text.push_str("\nMean gain over plain CLIP, paired by query (95 % intervals):\n\n");
    render_table(&mut text, &measures, by_difficulty, |result| {
        cells(result, &|measure| format_gain(&measure.gain))
    });
    let difficulties = QueryDifficulty::ALL.map(QueryDifficulty::name);
    for (title, names, results) in [
        ("hit@1 by what the query asks for", difficulties.as_slice(), by_difficulty),
        (
            "hit@1 on combinations that training showed and left out",
            &["seen", "unseen"],
            combinations,
        ),
    ] {
        let groups = results.first().map(|result| &result.groups);
        let count = |name: &str| groups.and_then(|g| g.get(name)).map_or(0, |s| s.queries);
        let columns: Vec<String> =
            names.iter().map(|name| format!("{name} ({})", count(name))).collect();
        let _ = write!(text, "\n{title} (how many queries):\n\n");
        render_table(&mut text, &columns, results, |result| {
            let first = |name: &&str| result.groups.get(*name).and_then(|s| s.measures.first());
            names
                .iter()
                .map(|name| first(name).map_or("–".into(), |c| format_interval(&c.value)))
                .collect()
        });
    }
    text
}

/// Appends a table with one row per result; `cells` returns the values for `columns`. Writing to a
/// string cannot fail.
fn render_table(
    text: &mut String,
    columns: &[String],
    results: &[SettingResult],
    cells: impl Fn(&SettingResult) -> Vec<String>,
) {
    let _ = writeln!(text, "| prompts | normaliser | weight | {} |", columns.join(" | "));
    let _ = writeln!(text, "| --- | --- | --- |{}", " --- |".repeat(columns.len()));
    for result in results {
        let RankingSetting { prompt_set, normaliser, weight } = &result.setting;
        let (set, normaliser) = (prompt_set.as_deref().unwrap_or("–"), normaliser.name());
        let _ =
            writeln!(text, "| {set} | {normaliser} | {weight} | {} |", cells(result).join(" | "));
    }
}

fn format_interval(interval: &ConfidenceInterval) -> String {
    format!("{:.3} ({:.3}–{:.3})", interval.mean, interval.low, interval.high)
}

/// Formats a gain: bold if the interval does not contain 0.
fn format_gain(gain: &ConfidenceInterval) -> String {
    let mark = if gain.low > 0.0 || gain.high < 0.0 { "**" } else { "" };
    format!("{mark}{:+.3}{mark} ({:+.3} to {:+.3})", gain.mean, gain.low, gain.high)
}
