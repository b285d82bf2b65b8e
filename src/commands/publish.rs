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
use super::{Done, Failure};
use crate::config::Config;
use crate::ingest::source::{Decoder, canonical};
use crate::publish::{self, Candidate, Naming, PublishError, Publisher};
use crate::record::{AttributeType, Ordering};

/// Sends, or prints, the events for everything that is named.
pub async fn run(args: &PublishArgs, config: Config, token: CancellationToken) -> Done {
    if args.targets.is_empty() && args.jsonl.is_none() && args.delete.is_empty() {
        return Err(Failure::usage(
            "nothing to publish: name files, folders or bucket prefixes, --jsonl FILE or --delete ID",
        ));
    }
    if config.source.ordering == Ordering::Sequencer {
        return Err(Failure::usage(
            "source.ordering is `sequencer`: only the bucket's own notifications have one; let the \
             bucket announce its images",
        ));
    }
    let naming = Naming {
        id_prefix: args.id_prefix.clone(),
        attributes: attributes(&args.attributes, &config)?,
        now: args.now,
        ordering: config.source.ordering,
    };
    let mut candidates: Vec<BoxStream<'static, Result<Candidate, PublishError>>> = Vec::new();
    for target in &args.targets {
        let found = publish::discover(target, &config.fetch.store_options, naming.clone()).await;
        candidates.push(found.map_err(Failure::usage)?);
    }
    if let Some(file) = &args.jsonl {
        candidates.push(lines(file, &config).await.map_err(Failure::Usage)?);
    }
    let deletes: Vec<_> = args.delete.iter().map(|id| Ok(Ok(naming.delete(id)))).collect();
    candidates.push(iter(deletes).boxed());
    let candidates = iter(candidates).flatten();

    if args.dry_run {
        return print(candidates).await;
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
    skipped(done.skipped)
}

fn skipped(count: u64) -> Done {
    match count {
        0 => Ok(()),
        n => Err(anyhow::anyhow!("{n} inputs were skipped; the lines above say why").into()),
    }
}

/// Attributes are read as their declared types; others would be ignored by every worker.
pub fn attributes(
    given: &[(String, String)],
    config: &Config,
) -> Result<BTreeMap<String, Value>, Failure> {
    let mut attributes = BTreeMap::new();
    for (name, text) in given {
        let kind = config.attributes.get(name).ok_or_else(|| {
            Failure::usage(format!(
                "--attribute {name}: is not declared; add it to [attributes] in the configuration"
            ))
        })?;
        let value = match kind {
            AttributeType::Text | AttributeType::Time => Some(Value::String(text.clone())),
            _ => serde_json::from_str(text).ok(),
        };
        let value = value.filter(|value| canonical(*kind, value).is_some()).ok_or_else(|| {
            let described = kind.described();
            Failure::usage(format!("--attribute {name}: {text:?} is not {described}, as declared"))
        })?;
        attributes.insert(name.clone(), value);
    }
    Ok(attributes)
}

async fn lines(
    file: &Path,
    config: &Config,
) -> anyhow::Result<BoxStream<'static, Result<Candidate, PublishError>>> {
    let rules = Decoder::new(&config.source, &config.attributes);
    if file == Path::new("-") {
        return Ok(publish::lines("standard input", BufReader::new(tokio::io::stdin()), rules));
    }
    let name = file.display().to_string();
    let opened = tokio::fs::File::open(file).await.with_context(|| name.clone())?;
    Ok(publish::lines(&name, BufReader::new(opened), rules))
}

async fn print(candidates: impl StreamExt<Item = Result<Candidate, PublishError>>) -> Done {
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
    skipped(count)
}
