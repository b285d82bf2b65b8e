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
use super::{CommandError, CommandResult};
use crate::config::Config;
use crate::ingest::dead_letter::{
    self, DeadLetter, DeadLetterFilter, DeadLetterReadError, DeadLetterWriter,
};
use crate::record::VersionOrdering;

/// Letters read ahead of what is done with them.
const PREFETCH: usize = 16;

/// Lists, shows or sends again.
pub async fn run(
    args: &DeadLettersArgs,
    config: Config,
    token: CancellationToken,
) -> CommandResult {
    match &args.action {
        DeadLettersAction::List { filter, limit, json } => {
            list_letters(&config, filter.to_filter(), *limit as usize, *json, &token).await
        }
        DeadLettersAction::Show { origin, value } => {
            let filter =
                DeadLetterFilter { origins: vec![origin.clone()], ..DeadLetterFilter::default() };
            show_letter(&config, filter, origin, *value, &token).await
        }
        DeadLettersAction::Replay { filter, all, dry_run } => {
            let filter = filter.to_filter();
            if filter == DeadLetterFilter::default() && !all {
                return Err(CommandError::usage(
                    "name what to replay (--origin, --stage, --code, --since, --until), or say --all",
                ));
            }
            if config.source.ordering == VersionOrdering::Offset {
                return Err(CommandError::usage(
                    "source.ordering is `offset`: a message that is sent again would be newer than all \
                     that came since; publish the images anew instead (`bsap publish`)",
                ));
            }
            replay_letters(&config, filter, *dry_run, &token).await
        }
    }
}

/// Letters as they are read, each origin once, and the reading itself.
struct DeadLetterReader {
    letters: mpsc::Receiver<DeadLetter>,
    task: JoinHandle<Result<u64, DeadLetterReadError>>,
    seen_origins: HashSet<String>,
}

impl DeadLetterReader {
    fn start(config: &Config, filter: DeadLetterFilter, token: &CancellationToken) -> Self {
        let (sender, letters) = mpsc::channel(PREFETCH);
        let (kafka, options) = (config.kafka.clone(), config.dead_letter.clone());
        let token = token.clone();
        let task = tokio::task::spawn_blocking(move || {
            dead_letter::read_dead_letters(&kafka, &options, &filter, &token, |letter| {
                sender.blocking_send(letter).is_ok()
            })
        });
        Self { letters, task, seen_origins: HashSet::new() }
    }

    /// The next letter. One that lies there twice, because a worker ended between putting it aside
    /// and storing its position, comes once.
    async fn next(&mut self) -> Option<DeadLetter> {
        loop {
            let letter = self.letters.recv().await?;
            if self.seen_origins.insert(letter.origin()) {
                return Some(letter);
            }
        }
    }

    async fn finish(self) -> anyhow::Result<()> {
        drop(self.letters);
        let not_dead_letters = self.task.await??;
        if not_dead_letters > 0 {
            remark!(
                "{not_dead_letters} messages of the topic are no dead letters and were passed over"
            );
        }
        Ok(())
    }
}

async fn list_letters(
    config: &Config,
    filter: DeadLetterFilter,
    limit: usize,
    json: bool,
    token: &CancellationToken,
) -> CommandResult {
    let mut reader = DeadLetterReader::start(config, filter, token);
    let mut counts: BTreeMap<(String, String), u64> = BTreeMap::new();
    let mut newest = VecDeque::new();
    while let Some(letter) = reader.next().await {
        *counts.entry((letter.stage.clone(), letter.code.clone())).or_default() += 1;
        if newest.len() == limit {
            newest.pop_front();
        }
        newest.push_back(summary_json(&letter));
    }
    reader.finish().await?;
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
        table.add_row(["origin", "dead_lettered_at", "stage", "code", "reason"].map(field));
    }
    say!("{table}");
    for ((stage, code), count) in counts {
        say!("{count:>8}  {stage}  {code}");
    }
    say!("{total:>8}  in all, {shown} shown");
    Ok(())
}

fn summary_json(letter: &DeadLetter) -> Value {
    json!({
        "origin": letter.origin(),
        "dead_letter_position": letter.position(),
        "dead_lettered_at": letter.dead_lettered_at.map(|at| at.to_rfc3339_opts(chrono::SecondsFormat::Secs, true)),
        "stage": letter.stage,
        "code": letter.code,
        "reason": letter.reason,
        "record_index": letter.record,
        "key": letter.message.key.as_deref().map(String::from_utf8_lossy),
        "bytes": letter.message.payload.as_ref().map(|payload| payload.len()),
    })
}

async fn show_letter(
    config: &Config,
    filter: DeadLetterFilter,
    origin: &str,
    value_alone: bool,
    token: &CancellationToken,
) -> CommandResult {
    let mut reader = DeadLetterReader::start(config, filter, token);
    let letter = reader.next().await;
    reader.finish().await?;
    let letter = letter.with_context(|| {
        format!("{origin}: no such dead letter; `bsap dead-letters list` shows what there is")
    })?;
    let payload = letter.message.payload.as_deref();
    if value_alone {
        std::io::stdout().write_all(payload.unwrap_or_default())?;
        return Ok(());
    }
    say!("origin     {}", letter.origin());
    say!("place      {}", letter.position());
    if let Some(at) = letter.dead_lettered_at {
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
    say!("key        {}", text_or_base64(letter.message.key.as_deref()));
    for (name, value) in &letter.message.headers {
        say!("header     {name}: {}", text_or_base64(value.as_deref()));
    }
    say!("value      {}", text_or_base64(payload));
    Ok(())
}

/// Bytes for a terminal: text where it is some, else base64.
fn text_or_base64(bytes: Option<&[u8]>) -> String {
    let Some(bytes) = bytes else { return "(null)".into() };
    match std::str::from_utf8(bytes) {
        Ok(text) if !text.chars().any(|c| c.is_control() && !c.is_whitespace()) => text.to_owned(),
        _ => format!("(base64) {}", base64::engine::general_purpose::STANDARD.encode(bytes)),
    }
}

async fn replay_letters(
    config: &Config,
    filter: DeadLetterFilter,
    dry_run: bool,
    token: &CancellationToken,
) -> CommandResult {
    let letters = DeadLetterWriter::new(&config.kafka, &config.dead_letter)?;
    let mut reader = DeadLetterReader::start(config, filter, token);
    let spinner = ProgressBar::new_spinner();
    let mut replayed: BTreeMap<String, u64> = BTreeMap::new();
    while let Some(letter) = reader.next().await {
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
    reader.finish().await?;
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
