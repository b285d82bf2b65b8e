//! `bsap prompts`.

use std::collections::BTreeSet;
use std::fmt::Write as _;
use std::sync::Arc;

use anyhow::Context;
use comfy_table::Table;
use comfy_table::presets::UTF8_BORDERS_ONLY;
use tokio_util::sync::CancellationToken;

use super::cli::prompts::MeasureArgs;
use super::{Done, Failure, parts};
use crate::backfill;
use crate::balance::normalise::{Balance, Scale};
use crate::config::Config;
use crate::prompts::{self, EmbeddedSet, NEAR, PromptSet, Report};
use crate::record::Embedding;
use crate::search::{Engine, Entry};

/// Rows of a histogram, and columns of its longest bar.
const ROWS: usize = 16;
const COLUMNS: f64 = 48.0;
/// A prompt that is the strongest one of so many images outweighs all others.
const DOMINATES: f64 = 0.2;

/// Prints the shipped sets and those that the configuration names.
pub fn list(config: &Config) -> Done {
    let configured = &config.prompts.sets;
    let names: BTreeSet<&str> =
        PromptSet::shipped().into_iter().chain(configured.iter().map(String::as_str)).collect();
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
        let set = PromptSet::load(name).map_err(Failure::usage)?;
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
pub fn show(name: &str) -> Done {
    let set = PromptSet::load(name).map_err(Failure::usage)?;
    say!("{}", toml::to_string_pretty(&set)?.trim_end());
    Ok(())
}

/// Measures sets on the live images of the table.
pub async fn measure(args: &MeasureArgs, config: Config, token: CancellationToken) -> Done {
    if let Some(weight) = args.weight.filter(|w| !(0.0..=1.0).contains(w)) {
        return Err(Failure::usage(format!("--weight: {weight} is not between 0 and 1")));
    }
    let towers = parts::towers(&config)?;
    let Some(engine) = parts::whole_table(&config, towers, &token).await? else {
        return Ok(());
    };
    let sets = chosen(args, &config, &engine)?;
    let served = engine.served();
    let serving = &served.serving;
    let balance = Balance {
        normaliser: args.normaliser.unwrap_or(serving.normaliser),
        weight: args.weight.unwrap_or(serving.weight),
        lambda: serving.lambda,
        scale: Scale::default(),
    };
    let snapshot = engine.snapshots().newest();
    let (entries, embeddings): (Vec<Entry>, Vec<Embedding>) = snapshot.images().unzip();
    let embeddings: Vec<&Embedding> = embeddings.iter().collect();
    for set in sets {
        let report = prompts::report(&set, &embeddings, &balance, args.limit.into());
        let report = report.context("table.url: the catalogue has no images to measure on")?;
        let warning = set.set.warning(engine.towers());
        if args.json {
            let id = |image: usize| entries[image].image_id.as_str();
            let ids: Vec<&str> = report.penalised.iter().map(|p| id(p.image)).collect();
            let histogram = report.rows(ROWS);
            say!(
                "{}",
                serde_json::json!({
                    "prompt_set": set.key, "normaliser": balance.normaliser,
                    "weight": balance.weight, "warning": warning, "report": report,
                    "penalised_ids": ids, "histogram": histogram,
                })
            );
        } else {
            say!("{}", page(&set, &report, &balance, &entries, warning.as_deref()));
        }
    }
    Ok(())
}

/// Forgets a stored set.
pub async fn retire(name: &str, config: Config) -> Done {
    let (store, _) = parts::catalogue(&config).await?;
    let by = parts::actor("bsap prompts retire");
    let attempts = config.table.commit_attempts;
    let (key, dropped) = backfill::retire(&store, name, attempts, &by).await?;
    say!("{key} is retired; {dropped} files of backfilled statistics are dropped");
    let configured = config.prompts.sets.iter().filter_map(|name| PromptSet::load(name).ok());
    if configured.into_iter().any(|set| key.starts_with(&format!("{}@{}:", set.name, set.version)))
    {
        say!("Take it out of prompts.sets too: a worker that starts with it makes it known again.");
    }
    Ok(())
}

/// The sets that were asked for: stored ones by key, name or name@version, others from their files.
fn chosen(
    args: &MeasureArgs,
    config: &Config,
    engine: &Engine,
) -> Result<Vec<Arc<EmbeddedSet>>, Failure> {
    if args.sets.is_empty() {
        return Ok(engine.served().sets.clone());
    }
    let served = engine.served();
    let find = |name: &String| {
        if let Some(stored) = EmbeddedSet::find(&served.sets, name) {
            return Ok(stored.clone());
        }
        let set = PromptSet::load(name).map_err(Failure::usage)?;
        Ok(Arc::new(set.embed(engine.towers(), config.prompts.top_k)?))
    };
    args.sets.iter().map(find).collect()
}

/// The report for people. Writing to a string cannot fail.
fn page(
    set: &EmbeddedSet,
    report: &Report,
    balance: &Balance,
    entries: &[Entry],
    warning: Option<&str>,
) -> String {
    let mut text =
        format!("{}: {} prompts on {} images\n", set.key, set.set.texts.len(), report.images);
    if let Some(warning) = warning {
        let _ = writeln!(text, "WARNING: {warning}");
    }
    let three = |[low, middle, high]: [f32; 3]| format!("{middle:.3} ({low:.3} to {high:.3})");
    let _ = writeln!(
        text,
        "\nScores of all prompts on all images, median (5 % to 95 %): {}\nmean of an image: {}, its spread σ: {}\n",
        three(report.scores),
        three(report.means),
        three(report.spread),
    );
    let rows = report.rows(ROWS);
    let most = rows.iter().map(|r| r.1).fold(f64::MIN_POSITIVE, f64::max);
    for (edge, share) in rows {
        let bar = "█".repeat((share / most * COLUMNS).round() as usize);
        let _ = writeln!(text, "  {edge:>7.3} {bar} {:.1} %", share * 100.0);
    }

    let _ = writeln!(text, "\nStrongest prompt of most images");
    for prompt in &report.dominating {
        let mark = if prompt.share > DOMINATES {
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
        set.set.texts.len()
    );

    let _ = writeln!(text, "\nPrompts that are nearly the same to the model (cosine above {NEAR})");
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
    for image in &report.penalised {
        let entry = &entries[image.image];
        let title = entry.attributes.get("title").map_or("", String::as_str);
        let _ = writeln!(
            text,
            "  −{:.4}  {}  {title}  by “{}” ({:.3})",
            image.loss, entry.image_id, image.strongest, image.score
        );
    }
    text
}
