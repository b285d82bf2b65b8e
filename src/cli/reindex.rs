//! Arguments of the commands that change what a catalogue is measured with and how it is served.

use clap::{Args, Subcommand};

/// `bsap reindex`.
#[derive(Debug, Args)]
#[command(after_long_help = "\
Examples:
  bsap reindex statistics --prompt-set mine.toml --dry-run    what it would do
  bsap reindex statistics --prompt-set mine.toml              do it, beside running workers

Safe to stop at any time and to start again, on several machines at once: what is committed stays.")]
pub struct ReindexArgs {
    /// What to do.
    #[command(subcommand)]
    pub action: ReindexAction,
}

/// What `bsap reindex` does.
#[derive(Debug, Subcommand)]
pub enum ReindexAction {
    /// Compute the statistics of every stored row for a prompt set, from stored embeddings; no image
    /// is fetched. Workers carry the set for new rows from the start on
    Statistics(StatisticsArgs),
}

/// `bsap reindex statistics`.
#[derive(Debug, Args)]
pub struct StatisticsArgs {
    /// Shipped name or path of a TOML file
    #[arg(long, value_name = "NAME|FILE")]
    pub prompt_set: String,
    /// How many of an image's largest scores `nnn` averages; prompts.top_k unless given
    #[arg(long, value_parser = clap::value_parser!(u16).range(1..=4096))]
    pub top_k: Option<u16>,
    /// Say what would be done, and change nothing
    #[arg(long)]
    pub dry_run: bool,
}
