//! Arguments of the commands that change what a catalogue is measured with and how it is served.

use clap::{Args, Subcommand};

/// `bsap reindex`.
#[derive(Debug, Args)]
#[command(after_long_help = "\
Examples:
  bsap reindex statistics --prompt-set mine.toml --dry-run    what it would do
  bsap reindex statistics --prompt-set mine.toml              do it, beside running workers
  bsap reindex model --checkpoint openai/clip-vit-large-patch14   another model, beside the live one

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
    /// Fill a generation by another model beside the live one: live events feed it from the start on,
    /// stored images are embedded again by workers of that model
    Model(ReindexModelArgs),
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

/// `bsap reindex model`.
#[derive(Debug, Args)]
#[command(after_long_help = "\
Sets the generation up, then asks for every stored image that it lacks to be embedded again, on \
source.reindex_topic. Workers with this checkpoint as model.checkpoint do it: start some. Run it again \
once they are done: it asks for what is still missing, and says what cannot be had.

Ends with code 1 where stored images cannot be embedded again.")]
pub struct ReindexModelArgs {
    /// The new model: a folder in the Hugging Face layout, or a model of the hub
    #[arg(long, value_name = "FOLDER|ID", required_unless_present = "withdraw")]
    pub checkpoint: Option<String>,
    /// Images asked for a second, at most
    #[arg(long, default_value_t = 500, value_parser = clap::value_parser!(u32).range(1..=100_000))]
    pub rate: u32,
    /// Say what is missing, and change and send nothing
    #[arg(long)]
    pub dry_run: bool,
    /// Fill the generation beside the live one no longer; its table stays
    #[arg(long, conflicts_with_all = ["checkpoint", "dry_run"])]
    pub withdraw: bool,
    /// Folder for sorting, some hundred bytes an image; the system's temporary folder, unless given
    #[arg(long, value_name = "FOLDER")]
    pub temp: Option<std::path::PathBuf>,
}
