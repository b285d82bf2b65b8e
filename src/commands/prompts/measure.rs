//! `bsap prompts measure`: the effect of prompt sets on the stored images.

use std::fmt::Write as _;
use std::path::PathBuf;
use std::sync::Arc;

use anyhow::Context;
use clap::Args;
use tokio_util::sync::CancellationToken;

use crate::balance::bank::{BankReport, QueriedImages};
use crate::balance::fit::MIN_FIT_QUERIES;
use crate::balance::normalise::{BalanceParameters, Normaliser, ScaleConstants};
use crate::clip::Encoders;
use crate::commands::shared::error::{CommandError, CommandResult};
use crate::commands::shared::models::load_configured_model;
use crate::commands::shared::printing::print_line;
use crate::commands::shared::query_files::read_query_logs;
use crate::commands::shared::query_worker::load_live_engine;
use crate::config::Config;
use crate::prompts::{
    self, EmbeddedPromptSet, NEAR_DUPLICATE_COSINE, PromptSet, PromptSetReport, UnreadPrompt,
};
use crate::record::Embedding;
use crate::search::{Engine, ImageMetadata};

/// Rows of a histogram, and characters of its longest bar.
const HISTOGRAM_ROWS: usize = 16;
const HISTOGRAM_COLUMNS: f64 = 48.0;
/// Maximum number of queries that the fit is measured with: random ones of a longer log.
const MAX_MEASURED_QUERIES: usize = 1_024;
/// A prompt that is the strongest one for a larger share of the images dominates the set.
const DOMINATING_SHARE: f64 = 0.2;

/// `bsap prompts measure`.
#[derive(Debug, Args)]
pub struct PromptsMeasureArgs {
    /// Names of stored or shipped sets, or paths of TOML files; without any, all stored sets
    pub sets: Vec<String>,
    /// Length of the lists of prompts and images in the report
    #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u16).range(1..=1_000))]
    pub limit: u16,
    /// Normaliser whose penalty is shown; by default the one that is served
    #[arg(long)]
    pub normaliser: Option<Normaliser>,
    /// Its weight, 0 to 1; by default the one that is served
    #[arg(long)]
    pub weight: Option<f32>,
    /// Queries that nobody has to judge, as for `bsap prompts suggest`: how well each set fits them, and
    /// which weight is proposed for it
    #[arg(long, value_name = "FILE")]
    pub query_log: Vec<PathBuf>,
    /// Print one line of JSON per set
    #[arg(long)]
    pub json: bool,
}

/// Measures sets on all images of the live generation, and prints a report per set.
pub async fn measure_sets(
    args: &PromptsMeasureArgs,
    config: Config,
    token: CancellationToken,
) -> CommandResult {
    if let Some(weight) = args.weight.filter(|w| !(0.0..=1.0).contains(w)) {
        return Err(CommandError::usage(format!("--weight: {weight} is not between 0 and 1")));
    }
    let encoders = load_configured_model(&config)?;
    let Some(engine) = load_live_engine(&config, encoders, &token).await? else {
        return Ok(());
    };
    let sets = selected_sets(args, &config, &engine)?;
    let served = engine.serving_snapshot();
    let serving = &served.serving;
    let balance = BalanceParameters {
        normaliser: args.normaliser.unwrap_or(serving.normaliser),
        weight: args.weight.unwrap_or(serving.weight),
        lambda: serving.lambda,
        scale: ScaleConstants::default(),
    };
    let snapshot = engine.snapshots().newest();
    let (entries, embeddings): (Vec<ImageMetadata>, Vec<Embedding>) =
        snapshot.images_with_embeddings().unzip();
    let embeddings: Vec<&Embedding> = embeddings.iter().collect();
    let queried_images = match &args.query_log[..] {
        [] => None,
        paths => Some(query_images(paths, engine.encoders(), &embeddings)?),
    };
    for set in sets {
        let report = prompts::measure_prompt_set(&set, &embeddings, &balance, args.limit.into());
        let report = report.context("table.url: the catalogue has no images to measure on")?;
        let bank = queried_images.as_ref().map(|q| q.measure_bank(&set.prompt_embeddings));
        let warning = set.prompt_set.script_warning(engine.encoders());
        let unread = set.prompt_set.find_unread(engine.encoders());
        if args.json {
            let id = |image: usize| entries[image].image_id.as_str();
            let ids: Vec<&str> =
                report.penalised_images.iter().map(|p| id(p.image_index)).collect();
            let histogram = report.histogram_rows(HISTOGRAM_ROWS);
            print_line!(
                "{}",
                serde_json::json!({
                    "prompt_set": set.statistics_key, "normaliser": balance.normaliser,
                    "weight": balance.weight, "warning": warning, "unread": unread,
                    "report": report, "penalised_image_ids": ids, "histogram": histogram,
                    "bank": bank,
                })
            );
        } else {
            let text = render_report(&set, &report, &balance, &entries, warning.as_deref());
            print_line!("{}", text + &render_unread(&unread, args.limit.into()));
            if let Some(bank) = bank {
                print_line!("{}", render_bank(&bank));
            }
        }
    }
    Ok(())
}

/// Computes what the queries of a file, each different text once, say about the images.
fn query_images<'a>(
    paths: &[PathBuf],
    encoders: &dyn Encoders,
    images: &[&'a Embedding],
) -> Result<QueriedImages<'a>, CommandError> {
    let texts = read_query_logs(paths)?.into_texts(1);
    let distinct: Vec<&str> = texts.iter().map(String::as_str).take(MAX_MEASURED_QUERIES).collect();
    let units = encoders.embed_texts_in_batches(&distinct)?;
    let images = images.iter().map(|image| image.values()).collect();
    Ok(QueriedImages::new(images, &units))
}

/// Renders how well a set fits the queries.
fn render_bank(bank: &BankReport) -> String {
    let fit = bank.fit.map_or_else(
        || format!("not known: it needs {MIN_FIT_QUERIES} different queries"),
        |fit| format!("{fit} with {} queries", fit.queries),
    );
    let concentration = bank.concentration.map_or("not known".into(), |c| format!("{c:.2}"));
    let (weight, reason) = (bank.proposed_weight, &bank.reason);
    format!(
        "Fit to the queries: {fit}\nConcentration on their first results: {concentration}\nProposed: nnn at weight {weight}, because {reason}\n"
    )
}

/// Returns the sets that the arguments name: stored ones by key, name or name@version, others from their
/// files.
fn selected_sets(
    args: &PromptsMeasureArgs,
    config: &Config,
    engine: &Engine,
) -> Result<Vec<Arc<EmbeddedPromptSet>>, CommandError> {
    if args.sets.is_empty() {
        return Ok(engine.serving_snapshot().prompt_sets.clone());
    }
    let served = engine.serving_snapshot();
    let find = |name: &String| {
        if let Some(stored) = EmbeddedPromptSet::find_by_name(&served.prompt_sets, name) {
            return Ok(stored.clone());
        }
        let set = PromptSet::load_builtin_or_file(name).map_err(CommandError::usage)?;
        Ok(Arc::new(set.embed(engine.encoders(), config.prompts.statistics_settings())?))
    };
    args.sets.iter().map(find).collect()
}

/// Renders the report as text. Writing to a string cannot fail.
fn render_report(
    set: &EmbeddedPromptSet,
    report: &PromptSetReport,
    balance: &BalanceParameters,
    entries: &[ImageMetadata],
    warning: Option<&str>,
) -> String {
    let mut text = format!(
        "{}: {} prompts on {} images\n",
        set.statistics_key,
        set.prompt_set.texts.len(),
        report.images
    );
    if let Some(warning) = warning {
        let _ = writeln!(text, "WARNING: {warning}");
    }
    let format_range =
        |[low, median, high]: [f32; 3]| format!("{median:.3} ({low:.3} to {high:.3})");
    let _ = writeln!(
        text,
        "\nScores of all prompts on all images, median (5 % to 95 %): {}\nmean per image: {}, standard deviation σ per image: {}\n",
        format_range(report.score_percentiles),
        format_range(report.mean_percentiles),
        format_range(report.std_percentiles),
    );
    let rows = report.histogram_rows(HISTOGRAM_ROWS);
    let max_share = rows.iter().map(|r| r.1).fold(f64::MIN_POSITIVE, f64::max);
    for (edge, share) in rows {
        let bar = "█".repeat((share / max_share * HISTOGRAM_COLUMNS).round() as usize);
        let _ = writeln!(text, "  {edge:>7.3} {bar} {:.1} %", share * 100.0);
    }

    let _ = writeln!(text, "\nStrongest prompt of most images");
    for prompt in &report.dominant_prompts {
        let mark =
            if prompt.share > DOMINATING_SHARE { "  dominates: remove or reword it" } else { "" };
        let _ = writeln!(text, "  {:>5.1} %  {}{mark}", prompt.share * 100.0, prompt.text);
    }
    let _ = writeln!(
        text,
        "  {} of {} prompts are the strongest of no image",
        report.never_strongest,
        set.prompt_set.texts.len()
    );

    let _ = writeln!(
        text,
        "\nPrompts that are nearly the same for the model (cosine above {NEAR_DUPLICATE_COSINE})"
    );
    if report.near_duplicates.is_empty() {
        let _ = writeln!(text, "  none");
    }
    for pair in &report.near_duplicates {
        let _ = writeln!(text, "  {:.3}  {} | {}", pair.cosine, pair.first, pair.second);
    }

    let _ = writeln!(
        text,
        "\nImages that lose most compared with the median image ({}, weight {})",
        balance.normaliser.name(),
        balance.weight
    );
    for image in &report.penalised_images {
        let entry = &entries[image.image_index];
        let title = entry.attributes.get("title").map_or("", String::as_str);
        let _ = writeln!(
            text,
            "  −{:.4}  {}  {title}  by “{}” ({:.3})",
            image.score_loss, entry.image_id, image.strongest_prompt, image.strongest_prompt_score
        );
    }
    text
}

/// Renders what the text encoder does not read of the prompts, at most `limit` of them.
fn render_unread(unread: &[UnreadPrompt], limit: usize) -> String {
    if unread.is_empty() {
        return String::new();
    }
    let mut text = format!("\n{} prompts that are not read in full\n", unread.len());
    for prompt in unread.iter().take(limit) {
        let _ = writeln!(text, "  {}: {}", prompt.text, prompt.reason);
    }
    text
}
