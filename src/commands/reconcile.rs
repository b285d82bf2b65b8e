//! `bsap reconcile`: compares the table with a listing, and repairs differences.

use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::Context;
use chrono::{DateTime, TimeDelta, Utc};
use clap::Args;
use indicatif::{ProgressBar, ProgressStyle};
use serde_json::json;
use tokio::io::{AsyncBufRead, BufReader};
use tokio_util::sync::CancellationToken;

use super::shared::attributes::{parse_attributes, parse_name_value};
use super::shared::catalogue::open_catalogue;
use super::shared::configuration::load_config_without_model;
use super::shared::error::{CommandError, CommandResult};
use super::shared::printing::{escape_line_breaks, print_line, print_note};
use super::shared::runtime::run_with_logging;
use crate::catalogue::CatalogueState;
use crate::config::Config;
use crate::ingest::source::Decoder;
use crate::publish::{EventTemplate, PublishInput, PublishSummary, Publisher};
use crate::reconcile::{
    CompareRules, Comparison, DifferenceKind, Finding, ListingSource, ReconcileReport,
    compare_with_listing, default_temp_folder,
};
use crate::record::VersionOrdering;
use crate::store::{self, ImageStore, Store};

/// `bsap reconcile`.
#[derive(Debug, Args)]
#[command(after_long_help = "\
Examples:
  bsap reconcile s3://shop/images                show what differs; send nothing
  bsap reconcile s3://shop/images --repair       also send the events that were lost
  bsap reconcile --ids all.jsonl --as-of 2026-03-01T04:00:00Z --repair

Without --repair the exit code is 1 if something differs, with --repair if a difference could not \
be repaired. docs/reconcile.md says what counts as new, changed and removed.")]
pub struct ReconcileArgs {
    /// Folders or bucket prefixes (s3://, gs://, az://), each compared separately
    #[arg(value_name = "TARGET")]
    pub targets: Vec<String>,
    /// Compare with a list of all existing images, one per line: an id, or an event as for
    /// `bsap publish --jsonl`. `-` reads standard input
    #[arg(long, value_name = "FILE", conflicts_with = "targets")]
    pub ids: Option<PathBuf>,
    /// When the list of --ids was started: images that it lacks are deleted as of this time
    #[arg(long, value_name = "TIME", requires = "ids")]
    pub as_of: Option<DateTime<Utc>>,
    /// Send an event for each difference
    #[arg(long)]
    pub repair: bool,
    /// Prefix of the key of each object that makes the id of a new image, as for `bsap publish`; of a
    /// list, only ids with this prefix are compared
    #[arg(long, default_value = "", value_name = "TEXT")]
    pub id_prefix: String,
    /// An attribute for every new image, for example --attribute shop=berlin
    #[arg(long = "attribute", value_name = "NAME=VALUE", value_parser = parse_name_value)]
    pub attributes: Vec<(String, String)>,
    /// Ignore objects that changed less than so many seconds ago: their events may not be stored yet.
    /// Set it above the usual lag of ingestion
    #[arg(long, default_value_t = 900, value_name = "SECONDS", value_parser = clap::value_parser!(u32))]
    pub grace: u32,
    /// By how many seconds an object may be newer than the event that announced it: for producers
    /// that set the time of an event before they upload
    #[arg(long, default_value_t = 0, value_name = "SECONDS")]
    pub tolerance: u32,
    /// Send nothing if more than this share of the stored images would be deleted
    #[arg(long, default_value_t = 0.1, value_name = "SHARE", value_parser = parse_share)]
    pub max_deletes: f64,
    /// If source.ordering is `sequence`: sequences are times in microseconds since 1970, as
    /// `bsap publish` sets them
    #[arg(long)]
    pub sequence_is_time: bool,
    /// Folder for sorting, some hundred bytes per image; by default the system's temporary folder
    #[arg(long, value_name = "FOLDER")]
    pub temp_dir: Option<PathBuf>,
    /// Print at most so many differences; with --json all of them are printed
    #[arg(long, default_value_t = 20)]
    pub limit: u64,
    /// Print JSON lines: each difference with its event, then one report per target
    #[arg(long)]
    pub json: bool,
}

/// Compares each target with the table, and with `--repair` sends the events that were lost.
pub fn run(args: &ReconcileArgs, config_file: Option<&Path>) -> CommandResult {
    let config = load_config_without_model(config_file)?;
    run_with_logging(config, |config, token| reconcile_listings(args, config, token))
}

/// Compares the targets one after another.
async fn reconcile_listings(
    args: &ReconcileArgs,
    config: Config,
    token: CancellationToken,
) -> CommandResult {
    let started = Utc::now();
    validate_arguments(args, &config, started)?;
    let event_template = EventTemplate {
        id_prefix: args.id_prefix.clone(),
        attributes: parse_attributes(&args.attributes, &config)?,
        use_current_time: false,
        ordering: config.source.ordering,
    };
    let days = TimeDelta::days(config.maintenance.tombstone_retention_days.into());
    let rules = CompareRules {
        listing_started_at: args.as_of.unwrap_or(started),
        grace_period: TimeDelta::seconds(args.grace.into()),
        time_tolerance: TimeDelta::seconds(args.tolerance.into()),
        tombstone_retention: Some(days).filter(|days| !days.is_zero()),
        sequence_is_time: args.sequence_is_time,
        event_template,
        attribute_types: config.attributes.clone(),
    };
    let (catalogue, state) = open_catalogue(&config).await?;
    check_ordering(&config, &state)?;
    let publisher = Publisher::new(&config.kafka, &config.source.topic)?;
    let mut is_consistent = true;
    if let Some(file) = &args.ids {
        let decoder = Decoder::new(&config.source, &config.attributes);
        let (name, lines) = open_image_list(file).await?;
        let listing = ListingSource::List { name, lines, decoder: Box::new(decoder) };
        is_consistent &=
            reconcile_listing(args, (&catalogue, &state), listing, rules, &publisher, &token)
                .await?;
    } else {
        for target in &args.targets {
            let listing = open_listing_store(target, &config)?;
            let rules = CompareRules { listing_started_at: Utc::now(), ..rules.clone() };
            is_consistent &=
                reconcile_listing(args, (&catalogue, &state), listing, rules, &publisher, &token)
                    .await?;
        }
    }
    match (is_consistent, args.repair) {
        (true, _) => Ok(()),
        (false, false) => {
            Err(anyhow::anyhow!("the table differs; --repair sends the events that repair it")
                .into())
        }
        (false, true) => {
            Err(anyhow::anyhow!("some differences could not be repaired; the lines above say why")
                .into())
        }
    }
}

/// Rejects combinations of arguments and configuration that cannot work, before anything is read.
fn validate_arguments(args: &ReconcileArgs, config: &Config, now: DateTime<Utc>) -> CommandResult {
    if args.targets.is_empty() && args.ids.is_none() {
        return Err(CommandError::usage(
            "nothing to compare with: name a folder, a bucket prefix or --ids",
        ));
    }
    if args.as_of.is_some_and(|time| time > now) {
        return Err(CommandError::usage("--as-of: lies in the future"));
    }
    if !args.repair {
        return Ok(());
    }
    if args.ids.is_some() && args.as_of.is_none() {
        return Err(CommandError::usage(
            "--ids with --repair needs --as-of TIME, when the list was started: images that it lacks are \
             deleted as of this time",
        ));
    }
    match config.source.ordering {
        VersionOrdering::Sequencer => Err(CommandError::usage(
            "source.ordering is `sequencer`: only the notifications of the bucket itself have one, so \
             nothing can be sent; without --repair the differences are shown",
        )),
        VersionOrdering::Sequence if args.ids.is_none() && !args.sequence_is_time => {
            Err(CommandError::usage(
                "source.ordering is `sequence`, which a listing does not have; give --sequence-is-time if it \
                 is the time in microseconds, as `bsap publish` sets it, or use --ids with events",
            ))
        }
        _ => Ok(()),
    }
}

/// Fails if the configured ordering of versions is not that of the table: the comparison would be
/// wrong.
fn check_ordering(config: &Config, state: &CatalogueState) -> CommandResult {
    let (stored, configured) = (state.live.ordering, config.source.ordering);
    if stored == configured {
        return Ok(());
    }
    Err(CommandError::usage(format!(
        "source.ordering: is `{}`, the catalogue was created with `{}`",
        configured.as_str(),
        stored.as_str()
    )))
}

/// Opens a folder or bucket prefix. A missing folder is an error: as an empty listing it would delete
/// everything.
fn open_listing_store(target: &str, config: &Config) -> Result<ListingSource, CommandError> {
    let url = store::parse_url(target).map_err(CommandError::usage)?;
    match url.scheme() {
        "http" | "https" => {
            return Err(CommandError::usage(format!(
                "{target}: cannot be listed; name a folder or a bucket prefix"
            )));
        }
        "file" => {
            let path = url.to_file_path().unwrap_or_default();
            if !path.is_dir() {
                return Err(CommandError::usage(format!("{target}: is not a folder")));
            }
        }
        _ => {}
    }
    let store =
        ImageStore::open(target, &config.fetch.store_options).map_err(CommandError::usage)?;
    Ok(ListingSource::Store(store))
}

/// Opens a list of images; returns its name and its lines.
async fn open_image_list(
    file: &Path,
) -> Result<(String, Box<dyn AsyncBufRead + Send + Unpin>), CommandError> {
    if file == Path::new("-") {
        return Ok(("standard input".into(), Box::new(BufReader::new(tokio::io::stdin()))));
    }
    let name = file.display().to_string();
    let opened = tokio::fs::File::open(file).await.with_context(|| name.clone());
    Ok((name, Box::new(BufReader::new(opened.map_err(CommandError::Usage)?))))
}

/// Compares one target with the table, and with `--repair` sends events. Returns whether no difference
/// remains.
async fn reconcile_listing(
    args: &ReconcileArgs,
    (catalogue, state): (&Store, &CatalogueState),
    listing: ListingSource,
    rules: CompareRules,
    publisher: &Publisher,
    token: &CancellationToken,
) -> Result<bool, CommandError> {
    let folder = args.temp_dir.clone().unwrap_or_else(default_temp_folder);
    let (json, limit) = (args.json, args.limit);
    let mut shown = 0;
    let show = move |finding: &Finding| {
        if json {
            print_line!("{}", json!(finding));
        } else if shown < limit {
            print_finding(finding);
        }
        shown += 1;
    };
    let comparison =
        compare_with_listing(catalogue, &state.live, listing, rules, &folder, show, token).await?;
    let mut report = comparison.report.clone();
    if !args.repair {
        print_report(&report, args);
        return Ok(report.difference_count() == 0);
    }
    let sent = send_repairs(comparison, args, publisher, token).await;
    if let Ok(summary) = &sent {
        (report.published, report.skipped_deletes) =
            (summary.published_events, summary.skipped_inputs);
    }
    print_report(&report, args);
    sent?;
    Ok(report.unrepairable == 0 && report.skipped_deletes == 0)
}

async fn send_repairs(
    comparison: Comparison,
    args: &ReconcileArgs,
    publisher: &Publisher,
    token: &CancellationToken,
) -> anyhow::Result<PublishSummary> {
    comparison.check_repair_is_safe(args.max_deletes)?;
    let expected_events = comparison.report.difference_count() - comparison.report.unrepairable;
    let bar = ProgressBar::new(expected_events);
    bar.set_style(ProgressStyle::with_template("{spinner} {pos}/{len} events sent, {per_sec}")?);
    let on_event = |input: &PublishInput| {
        if let Err(key) = input {
            bar.suspend(|| {
                print_note!("{key} exists although the listing lacked it; it is not deleted");
            });
        }
        bar.inc(1);
    };
    let summary = comparison.send_repair_events(publisher, token, on_event).await?;
    bar.finish_and_clear();
    publisher.flush(Duration::from_secs(30))?;
    if summary.published_events + summary.skipped_inputs < expected_events {
        anyhow::bail!(
            "interrupted after {} of {expected_events} events; run it again for the rest",
            summary.published_events
        );
    }
    Ok(summary)
}

fn print_finding(finding: &Finding) {
    let difference = match finding.difference {
        DifferenceKind::New => "new",
        DifferenceKind::Changed => "changed",
        DifferenceKind::Removed => "removed",
    };
    let image_id = escape_line_breaks(&finding.image_id);
    print_line!("{difference:<8} {image_id}  {}", finding.reason);
    if let Some(reason) = &finding.unrepairable_reason {
        print_line!("         cannot be repaired: {reason}");
    }
}

fn print_report(report: &ReconcileReport, args: &ReconcileArgs) {
    if args.json {
        print_line!("{}", json!({ "report": report }));
        return;
    }
    if report.difference_count() > args.limit {
        print_line!("… {} differences, {} shown", report.difference_count(), args.limit);
    }
    print_line!("{}", report.target);
    for (count, label) in [
        (report.listed, "listed"),
        (report.stored, "stored"),
        (report.unchanged, "unchanged"),
        (report.new, "new: listed, not stored"),
        (report.changed, "changed since they were stored"),
        (report.removed, "removed: stored, not listed"),
        (report.too_recent, "changed too recently to be compared (--grace)"),
        (report.deleted, "listed, but deleted by an event after their last change"),
        (report.id_conflicts, "listed, but their id belongs to an image from elsewhere"),
        (report.ignored, "listed, but not named like pictures"),
        (report.unaddressable, "of the new ones cannot be announced because of their keys"),
        (report.unrepairable, "differences that cannot be repaired"),
        (
            report.skipped_deletes,
            "deletes not sent: the object exists although the listing lacked it",
        ),
        (report.published, "events sent"),
    ] {
        let is_always_shown = ["listed", "stored", "unchanged"].contains(&label);
        if count > 0 || is_always_shown {
            print_line!("{count:>10}  {label}");
        }
    }
}

fn parse_share(text: &str) -> Result<f64, String> {
    let share: f64 = text.parse().map_err(|_| format!("{text:?} is not a number"))?;
    if (0.0..=1.0).contains(&share) {
        Ok(share)
    } else {
        Err(format!("{share} is not between 0 and 1"))
    }
}
