//! `bsap dead-letters`.

use std::collections::{BTreeMap, HashSet, VecDeque};
use std::io::Write as _;
use std::time::Duration;

use anyhow::Context;
use base64::Engine as _;
use comfy_table::presets::UTF8_HORIZONTAL_ONLY;
use comfy_table::{ContentArrangement, Table};
use indicatif::ProgressBar;
use serde_json::{Value, json};
use tokio::sync::mpsc;
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

use super::cli::dead_letters::{DeadLettersAction, DeadLettersArgs};
use super::{Done, Failure};
use crate::config::Config;
use crate::ingest::dead_letter::{self, DeadLetter, DeadLetters, Filter, ReadError};
use crate::record::Ordering;

/// Letters read ahead of what is done with them.
const AHEAD: usize = 16;

/// Lists, shows or sends again.
pub async fn run(args: &DeadLettersArgs, config: Config, token: CancellationToken) -> Done {
    match &args.action {
        DeadLettersAction::List { filter, limit, json } => {
            list(&config, filter.filter(), *limit as usize, *json, &token).await
        }
        DeadLettersAction::Show { origin, value } => {
            let filter = Filter { origins: vec![origin.clone()], ..Filter::default() };
            show(&config, filter, origin, *value, &token).await
        }
        DeadLettersAction::Replay { filter, all, dry_run } => {
            let filter = filter.filter();
            if filter == Filter::default() && !all {
                return Err(Failure::usage(
                    "name what to replay (--origin, --stage, --code, --since, --until), or say --all",
                ));
            }
            if config.source.ordering == Ordering::Offset {
                return Err(Failure::usage(
                    "source.ordering is `offset`: a message that is sent again would be newer than all \
                     that came since; publish the images anew instead (`bsap publish`)",
                ));
            }
            replay(&config, filter, *dry_run, &token).await
        }
    }
}

/// Letters as they are read, each origin once, and the reading itself.
struct Reading {
    letters: mpsc::Receiver<DeadLetter>,
    task: JoinHandle<Result<u64, ReadError>>,
    seen: HashSet<String>,
}

impl Reading {
    fn start(config: &Config, filter: Filter, token: &CancellationToken) -> Self {
        let (sender, letters) = mpsc::channel(AHEAD);
        let (kafka, options) = (config.kafka.clone(), config.dead_letter.clone());
        let token = token.clone();
        let task = tokio::task::spawn_blocking(move || {
            dead_letter::read(&kafka, &options, &filter, &token, |letter| {
                sender.blocking_send(letter).is_ok()
            })
        });
        Self { letters, task, seen: HashSet::new() }
    }

    /// The next letter. One that lies there twice, because a worker ended between putting it aside
    /// and storing its position, comes once.
    async fn next(&mut self) -> Option<DeadLetter> {
        loop {
            let letter = self.letters.recv().await?;
            if self.seen.insert(letter.origin()) {
                return Some(letter);
            }
        }
    }

    async fn end(self) -> anyhow::Result<()> {
        drop(self.letters);
        let strange = self.task.await??;
        if strange > 0 {
            remark!("{strange} messages of the topic are no dead letters and were passed over");
        }
        Ok(())
    }
}

async fn list(
    config: &Config,
    filter: Filter,
    limit: usize,
    json: bool,
    token: &CancellationToken,
) -> Done {
    let mut reading = Reading::start(config, filter, token);
    let mut counts: BTreeMap<(String, String), u64> = BTreeMap::new();
    let mut newest = VecDeque::new();
    while let Some(letter) = reading.next().await {
        *counts.entry((letter.stage.clone(), letter.code.clone())).or_default() += 1;
        if newest.len() == limit {
            newest.pop_front();
        }
        newest.push_back(summary(&letter));
    }
    reading.end().await?;
    if json {
        for letter in newest {
            say!("{letter}");
        }
        return Ok(());
    }
    let total: u64 = counts.values().sum();
    if total == 0 {
        say!("no dead letters in {}", config.dead_letter.topic);
        return Ok(());
    }
    let mut table = Table::new();
    table
        .load_style(UTF8_HORIZONTAL_ONLY)
        .set_content_arrangement(ContentArrangement::Dynamic)
        .set_header(["origin", "put aside", "stage", "code", "reason"]);
    let shown = newest.len();
    for letter in newest {
        let field = |name: &str| letter[name].as_str().unwrap_or_default().to_owned();
        table.add_row(["origin", "at", "stage", "code", "reason"].map(field));
    }
    say!("{table}");
    for ((stage, code), count) in counts {
        say!("{count:>8}  {stage}  {code}");
    }
    say!("{total:>8}  in all, {shown} shown");
    Ok(())
}

fn summary(letter: &DeadLetter) -> Value {
    json!({
        "origin": letter.origin(),
        "place": letter.place(),
        "at": letter.at.map(|at| at.to_rfc3339_opts(chrono::SecondsFormat::Secs, true)),
        "stage": letter.stage,
        "code": letter.code,
        "reason": letter.reason,
        "record": letter.record,
        "key": letter.message.key.as_deref().map(String::from_utf8_lossy),
        "bytes": letter.message.payload.as_ref().map(|payload| payload.len()),
    })
}

async fn show(
    config: &Config,
    filter: Filter,
    origin: &str,
    value_alone: bool,
    token: &CancellationToken,
) -> Done {
    let mut reading = Reading::start(config, filter, token);
    let letter = reading.next().await;
    reading.end().await?;
    let letter = letter.with_context(|| {
        format!("{origin}: no such dead letter; `bsap dead-letters list` shows what there is")
    })?;
    let payload = letter.message.payload.as_deref();
    if value_alone {
        std::io::stdout().write_all(payload.unwrap_or_default())?;
        return Ok(());
    }
    say!("origin     {}", letter.origin());
    say!("place      {}", letter.place());
    if let Some(at) = letter.at {
        say!("put aside  {at}");
    }
    say!("stage      {}", letter.stage);
    say!("code       {}", letter.code);
    say!("reason     {}", letter.reason);
    if let Some(record) = letter.record {
        say!("record     {record}, counted from 0");
    }
    if let Some(time) =
        letter.message.timestamp_ms.and_then(chrono::DateTime::from_timestamp_millis)
    {
        say!("timestamp  {time}");
    }
    say!("key        {}", readable(letter.message.key.as_deref()));
    for (name, value) in &letter.message.headers {
        say!("header     {name}: {}", readable(value.as_deref()));
    }
    say!("value      {}", readable(payload));
    Ok(())
}

/// Bytes for a terminal: text where it is some, else base64.
fn readable(bytes: Option<&[u8]>) -> String {
    let Some(bytes) = bytes else { return "(null)".into() };
    match std::str::from_utf8(bytes) {
        Ok(text) if !text.chars().any(|c| c.is_control() && !c.is_whitespace()) => text.to_owned(),
        _ => format!("(base64) {}", base64::engine::general_purpose::STANDARD.encode(bytes)),
    }
}

async fn replay(config: &Config, filter: Filter, dry_run: bool, token: &CancellationToken) -> Done {
    let letters = DeadLetters::new(&config.kafka, &config.dead_letter)?;
    let mut reading = Reading::start(config, filter, token);
    let spinner = ProgressBar::new_spinner();
    let mut replayed: BTreeMap<String, u64> = BTreeMap::new();
    while let Some(letter) = reading.next().await {
        if dry_run {
            say!("{}  {}  {}", letter.origin(), letter.code, letter.reason);
        } else {
            letters.replay(&letter).await.with_context(|| letter.origin())?;
        }
        *replayed.entry(letter.message.partition.topic.to_string()).or_default() += 1;
        spinner.inc(1);
        spinner.set_message(format!("{} messages", spinner.position()));
    }
    spinner.finish_and_clear();
    reading.end().await?;
    letters.flush(Duration::from_secs(30))?;
    if replayed.is_empty() {
        say!("nothing to replay");
    }
    for (topic, count) in replayed {
        let done = if dry_run { "would be sent" } else { "sent" };
        say!("{count} messages {done} again to {topic}");
    }
    Ok(())
}
