//! Arguments of `bsap dead-letters`.

use chrono::{DateTime, TimeDelta, Utc};
use clap::{Args, Subcommand};

use crate::ingest::dead_letter::DeadLetterFilter;

/// `bsap dead-letters`.
#[derive(Debug, Args)]
#[command(after_long_help = "\
Examples:
  bsap dead-letters list --since 24h                 what went wrong today
  bsap dead-letters show 'images[0]@1742'            one message with its headers
  bsap dead-letters replay --stage fetch --dry-run   what would be sent again
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
    /// List messages that were put aside, with the reason, and count them
    List {
        /// Which.
        #[command(flatten)]
        filter: DeadLetterFilterArgs,
        /// Print at most so many, the newest; all are counted
        #[arg(long, default_value_t = 50, value_parser = clap::value_parser!(u32).range(1..=100_000))]
        limit: u32,
        /// Print JSON, a line a message
        #[arg(long)]
        json: bool,
    },
    /// Print one message: reason, headers, key and value
    Show {
        /// Where it came from, for example images[0]@1742
        origin: String,
        /// Print the value alone, byte for byte
        #[arg(long)]
        value: bool,
    },
    /// Send messages again to the topic and partition that they came from
    Replay {
        /// Which.
        #[command(flatten)]
        filter: DeadLetterFilterArgs,
        /// Replay everything, where no filter is given
        #[arg(long)]
        all: bool,
        /// Say what would be sent, and send nothing
        #[arg(long)]
        dry_run: bool,
    },
}

/// Which dead letters are meant.
#[derive(Debug, Args)]
pub struct DeadLetterFilterArgs {
    /// Where it came from, for example images[0]@1742; may be repeated
    #[arg(long, value_name = "TOPIC[PARTITION]@OFFSET")]
    pub origin: Vec<String>,
    /// Stage that gave up: decode_event, fetch, decode_image; may be repeated
    #[arg(long)]
    pub stage: Vec<String>,
    /// Code of the fault, for example image_damaged; may be repeated
    #[arg(long)]
    pub code: Vec<String>,
    /// Put aside since: an RFC 3339 time, or an age such as 90s, 30m, 24h, 7d
    #[arg(long, value_parser = parse_time_or_age)]
    pub since: Option<DateTime<Utc>>,
    /// Put aside before: an RFC 3339 time, or an age
    #[arg(long, value_parser = parse_time_or_age)]
    pub until: Option<DateTime<Utc>>,
}

impl DeadLetterFilterArgs {
    /// As the reader wants it.
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
    fn times_are_given_as_such_or_as_an_age() {
        let ago = Utc::now() - parse_time_or_age("36h").unwrap();
        assert!((129_599..129_700).contains(&ago.num_seconds()));
        assert_eq!(
            parse_time_or_age("2026-01-02T03:04:05+01:00").unwrap().timestamp(),
            1_767_319_445
        );
        for wrong in ["", "h", "-3h", "3w", "yesterday", "99999999999d", "é"] {
            assert!(parse_time_or_age(wrong).is_err(), "{wrong}");
        }
    }
}
