//! `bsap publish`: events for images that are named.

use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::Context;
use clap::Args;
use futures::StreamExt;
use futures::stream::{BoxStream, iter};
use indicatif::{ProgressBar, ProgressStyle};
use tokio::io::BufReader;
use tokio_util::sync::CancellationToken;

use super::shared::attributes::{parse_attributes, parse_name_value};
use super::shared::configuration::load_config_without_model;
use super::shared::error::{CommandError, CommandResult};
use super::shared::printing::{print_line, print_note};
use super::shared::runtime::run_with_logging;
use crate::config::Config;
use crate::ingest::source::Decoder;
use crate::publish::{self, EventTemplate, PublishError, PublishInput, Publisher};
use crate::record::VersionOrdering;

/// `bsap publish`.
#[derive(Debug, Args)]
#[command(after_long_help = "\
Examples:
  bsap publish photos/                       every picture in a folder and its subfolders
  bsap publish s3://shop/images --id-prefix shop/
  bsap publish --jsonl events.jsonl          events as described by schemas/image-event.schema.json
  bsap publish --delete shop/a.jpg           an event that deletes an image")]
pub struct PublishArgs {
    /// Files, folders, bucket prefixes (s3://, gs://, az://) or http(s) addresses
    #[arg(value_name = "TARGET")]
    pub targets: Vec<String>,
    /// JSON lines, one event per line; `-` reads standard input
    #[arg(long, value_name = "FILE")]
    pub jsonl: Option<PathBuf>,
    /// Ids of images to delete
    #[arg(long, value_name = "ID", num_args = 1..)]
    pub delete: Vec<String>,
    /// Prefix of each image id
    #[arg(long, default_value = "", value_name = "TEXT")]
    pub id_prefix: String,
    /// An attribute for every listed image, for example --attribute shop=berlin
    #[arg(long = "attribute", value_name = "NAME=VALUE", value_parser = parse_name_value)]
    pub attributes: Vec<(String, String)>,
    /// Use the current time in the events instead of the last change of each object
    #[arg(long)]
    pub now: bool,
    /// Print the events as JSON lines instead of sending them
    #[arg(long)]
    pub dry_run: bool,
}

/// Publishes events for everything that is named, or prints them with `--dry-run`.
pub fn run(args: &PublishArgs, config_file: Option<&Path>) -> CommandResult {
    let config = load_config_without_model(config_file)?;
    run_with_logging(config, |config, token| publish_events(args, config, token))
}

/// Collects the inputs of all arguments, and sends or prints their events.
async fn publish_events(
    args: &PublishArgs,
    config: Config,
    token: CancellationToken,
) -> CommandResult {
    if args.targets.is_empty() && args.jsonl.is_none() && args.delete.is_empty() {
        return Err(CommandError::usage(
            "nothing to publish: name files, folders or bucket prefixes, --jsonl FILE or --delete ID",
        ));
    }
    if config.source.ordering == VersionOrdering::Sequencer {
        return Err(CommandError::usage(
            "source.ordering is `sequencer`: only the notifications of the bucket itself have one; let the \
             bucket announce its images",
        ));
    }
    let event_template = EventTemplate {
        id_prefix: args.id_prefix.clone(),
        attributes: parse_attributes(&args.attributes, &config)?,
        use_current_time: args.now,
        ordering: config.source.ordering,
    };
    let mut inputs: Vec<BoxStream<'static, Result<PublishInput, PublishError>>> = Vec::new();
    for target in &args.targets {
        let discovered =
            publish::discover_events(target, &config.fetch.store_options, event_template.clone())
                .await;
        inputs.push(discovered.map_err(CommandError::usage)?);
    }
    if let Some(file) = &args.jsonl {
        inputs.push(open_event_stream(file, &config).await.map_err(CommandError::Usage)?);
    }
    let deletes: Vec<_> =
        args.delete.iter().map(|id| Ok(Ok(event_template.delete_event(id)))).collect();
    inputs.push(iter(deletes).boxed());
    let inputs = iter(inputs).flatten();

    if args.dry_run {
        return print_events(inputs).await;
    }
    let bar = ProgressBar::new_spinner();
    bar.set_style(ProgressStyle::with_template(
        "{spinner} {pos} events published, {per_sec}, {elapsed}",
    )?);
    let publisher = Publisher::new(&config.kafka, &config.source.topic)?;
    let sending = publisher.send_all(inputs, &token, |input| match input {
        Ok(_) => bar.inc(1),
        Err(reason) => bar.suspend(|| print_note!("skipped: {reason}")),
    });
    let summary = sending.await?;
    tokio::task::spawn_blocking(move || publisher.flush(Duration::from_secs(30))).await??;
    bar.finish_and_clear();
    print_line!(
        "{} events published to {}, {} skipped",
        summary.published_events,
        config.source.topic,
        summary.skipped_inputs
    );
    if token.is_cancelled() {
        return Err(anyhow::anyhow!("interrupted; it is safe to publish the same again").into());
    }
    fail_if_skipped(summary.skipped_inputs)
}

fn fail_if_skipped(count: u64) -> CommandResult {
    match count {
        0 => Ok(()),
        1 => Err(anyhow::anyhow!("one input was skipped; the line above says why").into()),
        n => Err(anyhow::anyhow!("{n} inputs were skipped; the lines above say why").into()),
    }
}

/// Returns the events of a file of JSON lines, or of standard input for `-`.
async fn open_event_stream(
    file: &Path,
    config: &Config,
) -> anyhow::Result<BoxStream<'static, Result<PublishInput, PublishError>>> {
    let decoder = Decoder::new(&config.source, &config.attributes);
    if file == Path::new("-") {
        return Ok(publish::parse_event_lines(
            "standard input",
            BufReader::new(tokio::io::stdin()),
            decoder,
        ));
    }
    let name = file.display().to_string();
    let opened_file = tokio::fs::File::open(file).await.with_context(|| name.clone())?;
    Ok(publish::parse_event_lines(&name, BufReader::new(opened_file), decoder))
}

async fn print_events(
    inputs: impl StreamExt<Item = Result<PublishInput, PublishError>>,
) -> CommandResult {
    let mut inputs = std::pin::pin!(inputs);
    let mut skipped = 0;
    while let Some(input) = inputs.next().await {
        match input? {
            Ok(event) => print_line!("{}", serde_json::to_string(&event)?),
            Err(reason) => {
                skipped += 1;
                print_note!("skipped: {reason}");
            }
        }
    }
    fail_if_skipped(skipped)
}
