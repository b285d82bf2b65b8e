//! Arguments of `bsap reconcile`.

use std::path::PathBuf;

use chrono::{DateTime, Utc};
use clap::Args;

/// `bsap reconcile`.
#[derive(Debug, Args)]
#[command(after_long_help = "\
Examples:
  bsap reconcile s3://shop/images                what differs; sends nothing
  bsap reconcile s3://shop/images --repair       and sends the events that were lost
  bsap reconcile --ids all.jsonl --as-of 2026-03-01T04:00:00Z --repair

Without --repair it ends with code 1 where something differs, with --repair where something could \
not be mended. docs/reconcile.md says what counts as new, changed and gone.")]
pub struct ReconcileArgs {
    /// Folders or bucket prefixes (s3://, gs://, az://), each compared on its own
    #[arg(value_name = "TARGET")]
    pub targets: Vec<String>,
    /// Compare with a list of all images that there are, a line each: an id, or an event as
    /// `bsap publish --jsonl` takes it. `-` reads standard input
    #[arg(long, value_name = "FILE", conflicts_with = "targets")]
    pub ids: Option<PathBuf>,
    /// When the list of --ids was begun: images that it lacks are deleted as of then
    #[arg(long, value_name = "TIME", requires = "ids")]
    pub as_of: Option<DateTime<Utc>>,
    /// Send events for everything that differs
    #[arg(long)]
    pub repair: bool,
    /// Put before each object's key to make the image id of a new one, as for `bsap publish`; of a
    /// list, only ids that begin so are compared
    #[arg(long, default_value = "", value_name = "TEXT")]
    pub id_prefix: String,
    /// An attribute for every new image, for example --attribute shop=berlin
    #[arg(long = "attribute", value_name = "NAME=VALUE", value_parser = super::parse_name_value)]
    pub attributes: Vec<(String, String)>,
    /// What changed less than so many seconds ago may still be on its way and is left alone. Longer
    /// than ingestion usually lags
    #[arg(long, default_value_t = 900, value_name = "SECONDS", value_parser = clap::value_parser!(u32))]
    pub grace: u32,
    /// By how many seconds an object may be younger than the event that brought it: for producers
    /// that date events before they upload
    #[arg(long, default_value_t = 0, value_name = "SECONDS")]
    pub tolerance: u32,
    /// Send nothing where more than this share of the stored images would be deleted
    #[arg(long, default_value_t = 0.1, value_name = "SHARE", value_parser = parse_share)]
    pub max_deletes: f64,
    /// Where source.ordering is `sequence`: sequences are times in microseconds since 1970, as
    /// `bsap publish` sets them
    #[arg(long)]
    pub sequence_is_time: bool,
    /// Folder for sorting, some hundred bytes an image; the system's temporary folder, unless given
    #[arg(long, value_name = "FOLDER")]
    pub temp_dir: Option<PathBuf>,
    /// Differences shown; all of them with --json
    #[arg(long, default_value_t = 20)]
    pub limit: u64,
    /// Print JSON lines: each difference with its event, then a report for each target
    #[arg(long)]
    pub json: bool,
}

fn parse_share(text: &str) -> Result<f64, String> {
    let share: f64 = text.parse().map_err(|_| format!("{text:?} is not a number"))?;
    if (0.0..=1.0).contains(&share) {
        Ok(share)
    } else {
        Err(format!("{share} is not between 0 and 1"))
    }
}
