//! `bsap dead-letters`: lists, shows and replays dead letters, the messages that could not be used.

use std::collections::{BTreeMap, HashSet, VecDeque};
use std::io::Write as _;
use std::path::Path;
use std::time::Duration;

use anyhow::Context;
use base64::Engine as _;
use chrono::{DateTime, TimeDelta, Utc};
use clap::{Args, Subcommand};
use comfy_table::presets::UTF8_HORIZONTAL_ONLY;
use comfy_table::{ContentArrangement, Table};
use indicatif::ProgressBar;
use serde_json::{Value, json};
use tokio::sync::mpsc;
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

use super::shared::configuration::{load_config_without_model, with_quiet_logging};
use super::shared::error::{CommandError, CommandResult};
use super::shared::printing::{print_line, print_note};
use super::shared::runtime::run_with_logging;
use crate::config::Config;
use crate::diagnosis::redact::{HIDDEN, is_secret_name, redact};
use crate::ingest::dead_letter::{
    self, DeadLetter, DeadLetterFilter, DeadLetterReadError, DeadLetterWriter, OmittedValue,
};
use crate::record::VersionOrdering;

/// Dead letters that are read ahead.
const PREFETCHED_LETTERS: usize = 16;

/// `bsap dead-letters`.
#[derive(Debug, Args)]
#[command(after_long_help = "\
Examples:
  bsap dead-letters list --since 24h                 failures of the last day
  bsap dead-letters show 'images[0]@1742'            one message with its headers
  bsap dead-letters replay --stage fetch --dry-run   show what would be sent again
  bsap dead-letters replay --stage fetch             send it again

Replaying is safe to repeat: an event that is older than what is stored changes nothing.")]
pub struct DeadLettersArgs {
    /// What to do.
    #[command(subcommand)]
    pub action: DeadLettersAction,
}

/// What `bsap dead-letters` does.
#[derive(Debug, Subcommand)]
pub enum DeadLettersAction {
    /// List dead letters with their reasons, and count them
    List {
        /// Selects dead letters.
        #[command(flatten)]
        filter: DeadLetterFilterArgs,
        /// Print at most so many, the newest ones; all are counted
        #[arg(long, default_value_t = 50, value_parser = clap::value_parser!(u32).range(1..=100_000))]
        limit: u32,
        /// Print one line of JSON per message
        #[arg(long)]
        json: bool,
    },
    /// Print one message: reason, headers, key and value
    Show {
        /// Origin of the message, for example images[0]@1742
        origin: String,
        /// Print only the value, byte for byte and with its secrets
        #[arg(long)]
        value: bool,
    },
    /// Send messages again to the topic and partition that they came from
    Replay {
        /// Selects dead letters.
        #[command(flatten)]
        filter: DeadLetterFilterArgs,
        /// Replay everything; required if no filter is given
        #[arg(long)]
        all: bool,
        /// Print what would be sent, and send nothing
        #[arg(long)]
        dry_run: bool,
    },
}

/// Selects dead letters; without any of these, all.
#[derive(Debug, Args)]
pub struct DeadLetterFilterArgs {
    /// Origin of the message, for example images[0]@1742; may be repeated
    #[arg(long, value_name = "TOPIC[PARTITION]@OFFSET")]
    pub origin: Vec<String>,
    /// Stage that failed: decode_event, fetch, decode_image; may be repeated
    #[arg(long)]
    pub stage: Vec<String>,
    /// Code of the error, for example image_damaged; may be repeated
    #[arg(long)]
    pub code: Vec<String>,
    /// Dead-lettered since: an RFC 3339 time, or an age such as 90s, 30m, 24h, 7d
    #[arg(long, value_parser = parse_time_or_age)]
    pub since: Option<DateTime<Utc>>,
    /// Dead-lettered before: an RFC 3339 time, or an age
    #[arg(long, value_parser = parse_time_or_age)]
    pub until: Option<DateTime<Utc>>,
}

impl DeadLetterFilterArgs {
    /// Returns the filter for reading the topic.
    pub fn to_filter(&self) -> DeadLetterFilter {
        DeadLetterFilter {
            origins: self.origin.clone(),
            stages: self.stage.clone(),
            codes: self.code.clone(),
            since: self.since,
            until: self.until,
        }
    }
}

/// Lists, shows or replays dead letters.
pub fn run(args: &DeadLettersArgs, config_file: Option<&Path>) -> CommandResult {
    let config = with_quiet_logging(load_config_without_model(config_file)?);
    run_with_logging(config, |config, token| handle_action(args, config, token))
}

/// Carries out the action that the arguments name.
pub async fn handle_action(
    args: &DeadLettersArgs,
    config: Config,
    token: CancellationToken,
) -> CommandResult {
    match &args.action {
        DeadLettersAction::List { filter, limit, json } => {
            print_letters(&config, filter.to_filter(), *limit as usize, *json, &token).await
        }
        DeadLettersAction::Show { origin, value } => {
            let filter =
                DeadLetterFilter { origins: vec![origin.clone()], ..DeadLetterFilter::default() };
            print_letter(&config, filter, origin, *value, &token).await
        }
        DeadLettersAction::Replay { filter, all, dry_run } => {
            let filter = filter.to_filter();
            if filter == DeadLetterFilter::default() && !all {
                return Err(CommandError::usage(
                    "name what to replay (--origin, --stage, --code, --since, --until), or give --all",
                ));
            }
            if config.source.ordering == VersionOrdering::Offset {
                return Err(CommandError::usage(
                    "source.ordering is `offset`: a message that is sent again would count as newer than \
                     all later ones; publish the images again instead (`bsap publish`)",
                ));
            }
            replay_letters(&config, filter, *dry_run, &token).await
        }
    }
}

/// Reads the topic of dead letters in the background, and returns each origin once.
struct DeadLetterReader {
    letters: mpsc::Receiver<DeadLetter>,
    task: JoinHandle<Result<u64, DeadLetterReadError>>,
    seen_origins: HashSet<String>,
}

impl DeadLetterReader {
    fn start(config: &Config, filter: DeadLetterFilter, token: &CancellationToken) -> Self {
        let (sender, letters) = mpsc::channel(PREFETCHED_LETTERS);
        let (kafka, options) = (config.kafka.clone(), config.dead_letter.clone());
        let token = token.clone();
        let task = tokio::task::spawn_blocking(move || {
            dead_letter::read_dead_letters(&kafka, &options, &filter, &token, |letter| {
                sender.blocking_send(letter).is_ok()
            })
        });
        Self { letters, task, seen_origins: HashSet::new() }
    }

    /// Returns the next dead letter. A message may be in the topic twice, because a worker ended after
    /// dead-lettering it and before storing its position; it is returned once.
    async fn next_unseen(&mut self) -> Option<DeadLetter> {
        loop {
            let letter = self.letters.recv().await?;
            if self.seen_origins.insert(letter.origin()) {
                return Some(letter);
            }
        }
    }

    /// Waits for the end of the topic, and reports messages that are no dead letters.
    async fn wait_for_topic_end(self) -> anyhow::Result<()> {
        drop(self.letters);
        let not_dead_letters = self.task.await??;
        if not_dead_letters > 0 {
            print_note!(
                "{not_dead_letters} messages of the topic are no dead letters and were skipped"
            );
        }
        Ok(())
    }
}

async fn print_letters(
    config: &Config,
    filter: DeadLetterFilter,
    limit: usize,
    json: bool,
    token: &CancellationToken,
) -> CommandResult {
    let mut reader = DeadLetterReader::start(config, filter, token);
    let mut counts: BTreeMap<(String, String), u64> = BTreeMap::new();
    let mut newest = VecDeque::new();
    while let Some(letter) = reader.next_unseen().await {
        *counts.entry((letter.stage.clone(), letter.code.clone())).or_default() += 1;
        if newest.len() == limit {
            newest.pop_front();
        }
        newest.push_back(letter_summary_json(&letter));
    }
    reader.wait_for_topic_end().await?;
    if json {
        for letter in newest {
            print_line!("{letter}");
        }
        return Ok(());
    }
    let total: u64 = counts.values().sum();
    if total == 0 {
        print_line!("no dead letters in {}", config.dead_letter.topic);
        return Ok(());
    }
    let mut table = Table::new();
    table
        .load_style(UTF8_HORIZONTAL_ONLY)
        .set_content_arrangement(ContentArrangement::Dynamic)
        .set_header(["origin", "dead-lettered", "stage", "code", "reason"]);
    let shown = newest.len();
    for letter in newest {
        let field = |name: &str| letter[name].as_str().unwrap_or_default().to_owned();
        table.add_row(["origin", "dead_lettered_at", "stage", "code", "reason"].map(field));
    }
    print_line!("{table}");
    for ((stage, code), count) in counts {
        print_line!("{count:>8}  {stage}  {code}");
    }
    print_line!("{total:>8}  in total, {shown} shown");
    Ok(())
}

fn letter_summary_json(letter: &DeadLetter) -> Value {
    json!({
        "origin": letter.origin(),
        "dead_letter_position": letter.dead_letter_position(),
        "dead_lettered_at": letter.dead_lettered_at.map(|at| at.to_rfc3339_opts(chrono::SecondsFormat::Secs, true)),
        "stage": letter.stage,
        "code": letter.code,
        "reason": letter.reason,
        "record_index": letter.record_index,
        "key": letter.original_message.key.as_deref().map(|key| redact(&String::from_utf8_lossy(key)).into_owned()),
        "bytes": letter.omitted_value.as_ref().map(|omitted| omitted.bytes)
            .or(letter.original_message.payload.as_ref().map(|payload| payload.len() as u64)),
        "omitted_sha256": letter.omitted_value.as_ref().map(|omitted| &omitted.sha256),
    })
}

async fn print_letter(
    config: &Config,
    filter: DeadLetterFilter,
    origin: &str,
    value_only: bool,
    token: &CancellationToken,
) -> CommandResult {
    let mut reader = DeadLetterReader::start(config, filter, token);
    let letter = reader.next_unseen().await;
    reader.wait_for_topic_end().await?;
    let letter = letter.with_context(|| {
        format!("{origin}: no such dead letter; `bsap dead-letters list` lists them")
    })?;
    let payload = letter.original_message.payload.as_deref();
    let omitted = letter.omitted_value.as_ref().map(|OmittedValue { bytes, sha256 }| {
        format!(
            "{bytes} bytes with SHA-256 {sha256}, too large for the dead-letter topic; the topic of the origin has it, as long as it keeps it"
        )
    });
    if value_only {
        if let Some(omitted) = omitted {
            return Err(anyhow::anyhow!("{origin}: the value is not there: {omitted}").into());
        }
        std::io::stdout().write_all(payload.unwrap_or_default())?;
        return Ok(());
    }
    print_line!("origin     {}", letter.origin());
    print_line!("position   {}", letter.dead_letter_position());
    if let Some(at) = letter.dead_lettered_at {
        print_line!("set aside  {at}");
    }
    print_line!("stage      {}", letter.stage);
    print_line!("code       {}", letter.code);
    print_line!("reason     {}", letter.reason);
    if let Some(record) = letter.record_index {
        print_line!("record     {record}, counted from 0");
    }
    if let Some(time) =
        letter.original_message.timestamp_ms.and_then(chrono::DateTime::from_timestamp_millis)
    {
        print_line!("timestamp  {time}");
    }
    let shown = |bytes| redact(&text_or_base64(bytes)).into_owned();
    print_line!("key        {}", shown(letter.original_message.key.as_deref()));
    for (name, value) in &letter.original_message.headers {
        let is_secret = is_secret_name(name) && value.is_some();
        let value = if is_secret { HIDDEN.into() } else { shown(value.as_deref()) };
        print_line!("header     {name}: {value}");
    }
    print_line!("value      {}", omitted.unwrap_or_else(|| shown(payload)));
    Ok(())
}

/// Formats bytes for a terminal: as text if they are printable UTF-8, otherwise as base64.
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
    let writer = DeadLetterWriter::new(&config.kafka, &config.dead_letter)?;
    let mut reader = DeadLetterReader::start(config, filter, token);
    let spinner = ProgressBar::new_spinner();
    let mut replayed: BTreeMap<String, u64> = BTreeMap::new();
    while let Some(letter) = reader.next_unseen().await {
        if letter.omitted_value.is_some() {
            spinner.suspend(|| {
                print_note!(
                    "{}: not sent again, because its value was too large for the dead-letter topic; publish the image again",
                    letter.origin()
                );
            });
            continue;
        }
        if dry_run {
            print_line!("{}  {}  {}", letter.origin(), letter.code, letter.reason);
        } else {
            writer.replay(&letter).await.with_context(|| letter.origin())?;
        }
        *replayed.entry(letter.original_message.partition.topic.to_string()).or_default() += 1;
        spinner.inc(1);
        spinner.set_message(format!("{} messages", spinner.position()));
    }
    spinner.finish_and_clear();
    reader.wait_for_topic_end().await?;
    writer.flush(Duration::from_secs(30))?;
    if replayed.is_empty() {
        print_line!("nothing to replay");
    }
    for (topic, count) in replayed {
        let action = if dry_run { "would be sent" } else { "sent" };
        print_line!("{count} messages {action} again to {topic}");
    }
    Ok(())
}

/// Parses an RFC 3339 time, or an age before now.
fn parse_time_or_age(text: &str) -> Result<DateTime<Utc>, String> {
    if let Ok(time) = DateTime::parse_from_rfc3339(text) {
        return Ok(time.to_utc());
    }
    let age = || {
        let (number, unit) = text.split_at_checked(text.len().checked_sub(1)?)?;
        let seconds = match unit {
            "s" => 1,
            "m" => 60,
            "h" => 3_600,
            "d" => 86_400,
            _ => return None,
        };
        let age = TimeDelta::try_seconds(number.parse::<u32>().ok()?.into())?;
        Utc::now().checked_sub_signed(age.checked_mul(seconds)?)
    };
    age().ok_or_else(|| "is neither an RFC 3339 time nor an age such as 90s, 30m, 24h, 7d".into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_time_is_given_as_rfc_3339_or_as_an_age() {
        let age = Utc::now() - parse_time_or_age("36h").unwrap();
        assert!((129_599..129_700).contains(&age.num_seconds()));
        assert_eq!(
            parse_time_or_age("2026-01-02T03:04:05+01:00").unwrap().timestamp(),
            1_767_319_445
        );
        for invalid in ["", "h", "-3h", "3w", "yesterday", "99999999999d", "é"] {
            assert!(parse_time_or_age(invalid).is_err(), "{invalid}");
        }
    }
}
