//! `bsap prompts`.

use std::collections::BTreeSet;
use std::fmt::Write as _;
use std::sync::Arc;

use anyhow::Context;
use comfy_table::Table;
use comfy_table::presets::UTF8_BORDERS_ONLY;
use tokio_util::sync::CancellationToken;

use super::cli::prompts::PromptsMeasureArgs;
use super::{CommandError, CommandResult, setup};
use crate::backfill;
use crate::balance::normalise::{BalanceParameters, ScaleConstants};
use crate::config::Config;
use crate::prompts::{self, EmbeddedPromptSet, NEAR_DUPLICATE_COSINE, PromptSet, PromptSetReport};
use crate::record::Embedding;
use crate::search::{Engine, ImageMetadata};

/// Rows of a histogram, and columns of its longest bar.
const HISTOGRAM_ROWS: usize = 16;
const HISTOGRAM_COLUMNS: f64 = 48.0;
/// A prompt that is the strongest one of so many images outweighs all others.
const DOMINATING_SHARE: f64 = 0.2;

/// Prints the shipped sets and those that the configuration names.
pub fn list_sets(config: &Config) -> CommandResult {
    let configured = &config.prompts.sets;
    let names: BTreeSet<&str> = PromptSet::builtin_names()
        .into_iter()
        .chain(configured.iter().map(String::as_str))
        .collect();
    let mut table = Table::new();
    table.load_style(UTF8_BORDERS_ONLY).set_header([
        "set",
        "version",
        "language",
        "prompts",
        "fingerprint",
        "used",
        "for",
    ]);
    for name in names {
        let set = PromptSet::load(name).map_err(CommandError::usage)?;
        let used = configured
            .iter()
            .position(|c| c == name)
            .map_or("", |place| if place == 0 { "served first" } else { "yes" });
        table.add_row([
            name.to_owned(),
            set.version.to_string(),
            set.language.clone(),
            set.texts.len().to_string(),
            format!("{:.12}", set.fingerprint()),
            used.to_owned(),
            set.notes.lines().next().unwrap_or_default().to_owned(),
        ]);
    }
    table.set_content_arrangement(comfy_table::ContentArrangement::Dynamic);
    say!("{table}");
    Ok(())
}

/// Prints a set as its file has it.
pub fn show_set(name: &str) -> CommandResult {
    let set = PromptSet::load(name).map_err(CommandError::usage)?;
    say!("{}", toml::to_string_pretty(&set)?.trim_end());
    Ok(())
}

/// Measures sets on the live images of the table.
pub async fn measure_sets(
    args: &PromptsMeasureArgs,
    config: Config,
    token: CancellationToken,
) -> CommandResult {
    if let Some(weight) = args.weight.filter(|w| !(0.0..=1.0).contains(w)) {
        return Err(CommandError::usage(format!("--weight: {weight} is not between 0 and 1")));
    }
    let encoders = setup::load_encoders(&config)?;
    let Some(engine) = setup::load_table_engine(&config, encoders, &token).await? else {
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
    let (entries, embeddings): (Vec<ImageMetadata>, Vec<Embedding>) = snapshot.images().unzip();
    let embeddings: Vec<&Embedding> = embeddings.iter().collect();
    for set in sets {
        let report = prompts::measure_prompt_set(&set, &embeddings, &balance, args.limit.into());
        let report = report.context("table.url: the catalogue has no images to measure on")?;
        let warning = set.prompt_set.script_warning(engine.encoders());
        if args.json {
            let id = |image: usize| entries[image].image_id.as_str();
            let ids: Vec<&str> =
                report.penalised_images.iter().map(|p| id(p.image_index)).collect();
            let histogram = report.histogram_rows(HISTOGRAM_ROWS);
            say!(
                "{}",
                serde_json::json!({
                    "prompt_set": set.statistics_key, "normaliser": balance.normaliser,
                    "weight": balance.weight, "warning": warning, "report": report,
                    "penalised_image_ids": ids, "histogram": histogram,
                })
            );
        } else {
            say!("{}", render_report(&set, &report, &balance, &entries, warning.as_deref()));
        }
    }
    Ok(())
}

/// Forgets a stored set.
pub async fn retire_set(name: &str, config: Config, token: CancellationToken) -> CommandResult {
    let (store, _) = setup::open_catalogue(&config).await?;
    let by = setup::actor("bsap prompts retire");
    let attempts = config.table.max_commit_attempts;
    let (key, dropped) = backfill::retire_prompt_set(&store, name, attempts, &by, &token).await?;
    say!("{key} is retired; {dropped} files of backfilled statistics are dropped");
    let configured = config.prompts.sets.iter().filter_map(|name| PromptSet::load(name).ok());
    if configured.into_iter().any(|set| key.starts_with(&format!("{}@{}:", set.name, set.version)))
    {
        say!("Take it out of prompts.sets too: a worker that starts with it makes it known again.");
    }
    Ok(())
}

/// The sets that were asked for: stored ones by key, name or name@version, others from their files.
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
        if let Some(stored) = EmbeddedPromptSet::find(&served.prompt_sets, name) {
            return Ok(stored.clone());
        }
        let set = PromptSet::load(name).map_err(CommandError::usage)?;
        Ok(Arc::new(set.embed(engine.encoders(), config.prompts.top_k)?))
    };
    args.sets.iter().map(find).collect()
}

/// The report for people. Writing to a string cannot fail.
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
        |[low, middle, high]: [f32; 3]| format!("{middle:.3} ({low:.3} to {high:.3})");
    let _ = writeln!(
        text,
        "\nScores of all prompts on all images, median (5 % to 95 %): {}\nmean of an image: {}, its spread σ: {}\n",
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
        let mark = if prompt.share > DOMINATING_SHARE {
            "  dominates: take it out or say it otherwise"
        } else {
            ""
        };
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
        "\nPrompts that are nearly the same to the model (cosine above {NEAR_DUPLICATE_COSINE})"
    );
    if report.near_duplicates.is_empty() {
        let _ = writeln!(text, "  none");
    }
    for pair in &report.near_duplicates {
        let _ = writeln!(text, "  {:.3}  {} | {}", pair.cosine, pair.first, pair.second);
    }

    let _ = writeln!(
        text,
        "\nImages that lose most beside the median image ({}, weight {})",
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
