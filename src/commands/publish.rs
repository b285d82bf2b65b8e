//! `bsap publish`.

use std::collections::BTreeMap;
use std::path::Path;
use std::time::Duration;

use anyhow::Context;
use futures::StreamExt;
use futures::stream::{BoxStream, iter};
use indicatif::{ProgressBar, ProgressStyle};
use serde_json::Value;
use tokio::io::BufReader;
use tokio_util::sync::CancellationToken;

use super::cli::PublishArgs;
use super::{CommandError, CommandResult};
use crate::config::Config;
use crate::ingest::source::{Decoder, canonical_text};
use crate::publish::{self, EventTemplate, PublishError, PublishInput, Publisher};
use crate::record::{AttributeType, VersionOrdering};

/// Sends, or prints, the events for everything that is named.
pub async fn run(args: &PublishArgs, config: Config, token: CancellationToken) -> CommandResult {
    if args.targets.is_empty() && args.jsonl.is_none() && args.delete.is_empty() {
        return Err(CommandError::usage(
            "nothing to publish: name files, folders or bucket prefixes, --jsonl FILE or --delete ID",
        ));
    }
    if config.source.ordering == VersionOrdering::Sequencer {
        return Err(CommandError::usage(
            "source.ordering is `sequencer`: only the bucket's own notifications have one; let the \
             bucket announce its images",
        ));
    }
    let naming = EventTemplate {
        id_prefix: args.id_prefix.clone(),
        attributes: parse_attributes(&args.attributes, &config)?,
        use_current_time: args.now,
        ordering: config.source.ordering,
    };
    let mut candidates: Vec<BoxStream<'static, Result<PublishInput, PublishError>>> = Vec::new();
    for target in &args.targets {
        let found = publish::discover(target, &config.fetch.store_options, naming.clone()).await;
        candidates.push(found.map_err(CommandError::usage)?);
    }
    if let Some(file) = &args.jsonl {
        candidates.push(read_events(file, &config).await.map_err(CommandError::Usage)?);
    }
    let deletes: Vec<_> = args.delete.iter().map(|id| Ok(Ok(naming.delete_event(id)))).collect();
    candidates.push(iter(deletes).boxed());
    let candidates = iter(candidates).flatten();

    if args.dry_run {
        return print_events(candidates).await;
    }
    let bar = ProgressBar::new_spinner();
    bar.set_style(ProgressStyle::with_template(
        "{spinner} {pos} events published, {per_sec}, {elapsed}",
    )?);
    let publisher = Publisher::new(&config.kafka, &config.source.topic)?;
    let done = publisher.send_all(candidates, &token, |candidate| match candidate {
        Ok(_) => bar.inc(1),
        Err(reason) => bar.suspend(|| remark!("skipped: {reason}")),
    });
    let done = done.await?;
    tokio::task::spawn_blocking(move || publisher.flush(Duration::from_secs(30))).await??;
    bar.finish_and_clear();
    say!(
        "{} events published to {}, {} skipped",
        done.published,
        config.source.topic,
        done.skipped
    );
    if token.is_cancelled() {
        return Err(
            anyhow::anyhow!("interrupted; publishing the same again brings nothing twice").into()
        );
    }
    fail_if_skipped(done.skipped)
}

fn fail_if_skipped(count: u64) -> CommandResult {
    match count {
        0 => Ok(()),
        n => Err(anyhow::anyhow!("{n} inputs were skipped; the lines above say why").into()),
    }
}

/// Attributes are read as their declared types; others would be ignored by every worker.
pub fn parse_attributes(
    given: &[(String, String)],
    config: &Config,
) -> Result<BTreeMap<String, Value>, CommandError> {
    let mut attributes = BTreeMap::new();
    for (name, text) in given {
        let kind = config.attributes.get(name).ok_or_else(|| {
            CommandError::usage(format!(
                "--attribute {name}: is not declared; add it to [attributes] in the configuration"
            ))
        })?;
        let value = match kind {
            AttributeType::Text | AttributeType::Time => Some(Value::String(text.clone())),
            _ => serde_json::from_str(text).ok(),
        };
        let value =
            value.filter(|value| canonical_text(*kind, value).is_some()).ok_or_else(|| {
                let described = kind.description();
                CommandError::usage(format!(
                    "--attribute {name}: {text:?} is not {described}, as declared"
                ))
            })?;
        attributes.insert(name.clone(), value);
    }
    Ok(attributes)
}

async fn read_events(
    file: &Path,
    config: &Config,
) -> anyhow::Result<BoxStream<'static, Result<PublishInput, PublishError>>> {
    let rules = Decoder::new(&config.source, &config.attributes);
    if file == Path::new("-") {
        return Ok(publish::parse_lines(
            "standard input",
            BufReader::new(tokio::io::stdin()),
            rules,
        ));
    }
    let name = file.display().to_string();
    let opened = tokio::fs::File::open(file).await.with_context(|| name.clone())?;
    Ok(publish::parse_lines(&name, BufReader::new(opened), rules))
}

async fn print_events(
    candidates: impl StreamExt<Item = Result<PublishInput, PublishError>>,
) -> CommandResult {
    let mut candidates = std::pin::pin!(candidates);
    let mut count = 0;
    while let Some(candidate) = candidates.next().await {
        match candidate? {
            Ok(event) => say!("{}", serde_json::to_string(&event)?),
            Err(reason) => {
                count += 1;
                remark!("skipped: {reason}");
            }
        }
    }
    fail_if_skipped(count)
}
