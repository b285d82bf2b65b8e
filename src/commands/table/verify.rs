//! `bsap verify`: integrity checks of the stored table.

use std::path::Path;

use chrono::Utc;
use clap::Args;
use serde_json::json;
use tokio_util::sync::CancellationToken;

use super::formatting::{format_mebibytes, merge_objects, print_generation};
use crate::commands::shared::catalogue::open_catalogue;
use crate::commands::shared::configuration::{load_config_without_model, with_quiet_logging};
use crate::commands::shared::error::CommandResult;
use crate::commands::shared::printing::print_line;
use crate::commands::shared::progress::{progress_bar, progress_callback};
use crate::commands::shared::runtime::run_with_logging;
use crate::config::Config;
use crate::ingest::source::ImageEvent;
use crate::publish::attributes_to_json;
use crate::record::{AttributeTypes, Operation, VersionOrdering};
use crate::table::{self, OtherwiseDecodedImage, Severity, VerificationReport, VerificationRules};

/// `bsap verify`.
#[derive(Debug, Args)]
#[command(after_long_help = "\
Every file is read and compared with its checksum and its entry in the log; every row is checked. The \
standby generation is verified too. The exit code is 1 if there is an error; warnings alone do not change it.

Whether the table has the same images as the bucket is another question, which `bsap reconcile` answers.")]
pub struct VerifyArgs {
    /// Print one line of JSON per generation
    #[arg(long)]
    pub json: bool,
    /// Print instead the images that were decoded under another rule than workers decode now: before decoders or
    /// `decode.damaged` changed. Each is a line of JSON, an event for `bsap publish --jsonl`, which has the
    /// image embedded again
    #[arg(long, conflicts_with = "json")]
    pub decoded_otherwise: bool,
}

/// Verifies the tables of the live generation and of the standby generation.
pub fn run(args: &VerifyArgs, config_file: Option<&Path>) -> CommandResult {
    let config = with_quiet_logging(load_config_without_model(config_file)?);
    run_with_logging(config, |config, token| verify_tables(args, config, token))
}

/// Reads the tables of all generations that are in use, and prints what is wrong with them.
async fn verify_tables(
    args: &VerifyArgs,
    config: Config,
    token: CancellationToken,
) -> CommandResult {
    let (store, state) = open_catalogue(&config).await?;
    let mut is_sound = true;
    for generation in state.generations() {
        // The standby generation's workers read the same events.
        if args.decoded_otherwise && generation.id != state.live.id {
            continue;
        }
        let records = state.prompt_sets_of_generation(&generation.id).unwrap_or_default();
        let prompt_sets: Vec<_> = records.iter().map(|set| set.key.clone()).collect();
        let bar = progress_bar("reading", 0)?;
        let decode_rule = config.decode.rule();
        let rules = VerificationRules {
            prompt_sets: &prompt_sets,
            decode_rule: &decode_rule,
            options: &config.maintenance,
            now: Utc::now(),
        };
        let progress = progress_callback(&bar);
        let report = table::verify_table(&store, generation, &rules, &progress, &token).await?;
        bar.finish_and_clear();
        let Some(report) = report else {
            return Err(anyhow::anyhow!("interrupted before everything was read").into());
        };
        if args.decoded_otherwise {
            for image in &report.decoded_otherwise {
                let event = repeated_event(image, generation.ordering, &config.attributes);
                let how = json!({
                    "decode_rule": image.decode_rule, "decoded_share": image.decoded_share,
                    "embedded_at": image.embedded_at,
                });
                print_line!("{}", merge_objects(serde_json::to_value(event)?, how));
            }
        } else if args.json {
            print_line!("{}", serde_json::to_string(&report)?);
        } else {
            print_generation(&state, generation);
            print_report(&report);
        }
        is_sound &= report.is_sound();
    }
    if is_sound { Ok(()) } else { Err(anyhow::anyhow!("the table is not sound").into()) }
}

/// Returns the event that has an image embedded again: its version is the stored one, so that a newer event that is
/// still to come is not superseded.
fn repeated_event(
    image: &OtherwiseDecodedImage,
    ordering: VersionOrdering,
    types: &AttributeTypes,
) -> ImageEvent {
    let sequence = image.sequence.as_str().parse().ok();
    ImageEvent {
        image_id: image.image_id.clone(),
        operation: Operation::Upsert,
        uri: image.uri.clone(),
        data: None,
        embedding: None,
        model: None,
        sequence: sequence.filter(|_| ordering == VersionOrdering::Sequence),
        event_time: image.event_time,
        attributes: attributes_to_json(&image.attributes, types),
    }
}

fn print_report(report: &VerificationReport) {
    print_line!(
        "version {}: {} files of {}, {} rows: {} images, {} deleted, {} rows superseded",
        report.version,
        report.files,
        format_mebibytes(report.bytes),
        report.rows,
        report.images,
        report.deleted,
        report.superseded
    );
    for finding in &report.findings {
        let severity = match finding.severity {
            Severity::Error => "ERROR  ",
            Severity::Warning => "warning",
        };
        let more = match finding.count {
            1 => String::new(),
            n => format!(" (and {} more)", n - 1),
        };
        print_line!(
            "{severity} {}: {}{more} {}",
            finding.code,
            finding.example,
            finding.description
        );
    }
    if report.findings.is_empty() {
        print_line!("nothing is wrong");
    }
}
