//! Arguments of the commands that change what a catalogue is measured with and how it is served.

use clap::{Args, Subcommand};

use crate::balance::normalise::Normaliser;

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
    Statistics(ReindexStatisticsArgs),
    /// Fill a generation by another model beside the live one: live events feed it from the start on,
    /// stored images are embedded again by workers of that model
    Model(ReindexModelArgs),
}

/// `bsap reindex statistics`.
#[derive(Debug, Args)]
#[command(after_long_help = "\
The model says whose rows: model.checkpoint is the live generation's, or that of the one beside it \
(`bsap reindex model`), which has prompt sets of its own.")]
pub struct ReindexStatisticsArgs {
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
once they are done: it asks for what is still missing, and says what cannot be had. Images that only \
the other generation has are counted and left alone.

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
    pub temp_dir: Option<std::path::PathBuf>,
}

/// `bsap candidate`.
#[derive(Debug, Args)]
#[command(after_long_help = "\
Examples:
  bsap candidate set mine --prompt-set mine --normaliser nnn --weight 0.5 --shadow 0.05
  bsap candidate set mine --prompt-set mine --weight 0.5 --share 0.1
  bsap candidate set large --beside --share 0.1 --only category=shoes
  bsap candidate show
  bsap candidate withdraw

A candidate is in the memory of every query worker. Requests may ask for it by name; it may answer a
share of the others, or be computed unseen beside the live one (log event `shadow`). `bsap promote`
makes it live.")]
pub struct CandidateArgs {
    /// What to do.
    #[command(subcommand)]
    pub action: CandidateAction,
}

/// What `bsap candidate` does.
#[derive(Debug, Subcommand)]
pub enum CandidateAction {
    /// Set the candidate, in the place of an earlier one
    Set(CandidateSetArgs),
    /// Print the candidate, how far its statistics are and what stands against promoting it
    Show {
        /// Print JSON
        #[arg(long)]
        json: bool,
    },
    /// Withdraw the candidate
    Withdraw,
}

/// `bsap candidate set`. How it answers is, where it is left out, as the candidate of that name has it, or
/// as it is served; `--share`, `--shadow` and `--only` are given anew each time.
#[derive(Debug, Args)]
pub struct CandidateSetArgs {
    /// Its name, for people and for requests that ask for it
    pub name: String,
    /// Read the generation beside the live one, another model's (`bsap reindex model`)
    #[arg(long)]
    pub standby: bool,
    /// Stored prompt set, by name, name@version or key
    #[arg(long, value_name = "SET")]
    pub prompt_set: Option<String>,
    /// Formula
    #[arg(long)]
    pub normaliser: Option<Normaliser>,
    /// Weight of the balanced score, 0 (plain CLIP) to 1
    #[arg(long, value_parser = parse_share)]
    pub weight: Option<f32>,
    /// λ of `nnn`, 0 to 10
    #[arg(long, value_parser = parse_lambda)]
    pub lambda: Option<f32>,
    /// Share of the queries that it answers, 0 to 1, by the key that the caller gives
    #[arg(long, default_value = "0", value_parser = parse_share)]
    pub traffic_share: f32,
    /// Share of the queries that it answers unseen, differences being logged, 0 to 1
    #[arg(long, default_value = "0", value_parser = parse_share)]
    pub shadow: f32,
    /// Of the share, only queries whose filter asks for this attribute's value: one category first
    #[arg(long, value_name = "NAME=VALUE", value_parser = validate_name_value)]
    pub traffic_filter: Option<String>,
    /// Fingerprint of the evaluation that speaks for it
    #[arg(long, value_name = "FINGERPRINT")]
    pub evaluation: Option<String>,
}

/// `bsap promote`.
#[derive(Debug, Args)]
#[command(after_long_help = "\
Checks that the candidate is complete, waits until every query worker has it in memory, and makes it
live in one write. No query fails meanwhile and no answer mixes the two. `bsap rollback` goes back.

Who did it is BSAP_ACTOR, or the user of this process; `bsap history` prints it.")]
pub struct PromoteArgs {
    /// Do not ask
    #[arg(long)]
    pub yes: bool,
    /// Longest wait for the query workers, in seconds; nothing is changed when it is over
    #[arg(long, default_value_t = 60, value_parser = clap::value_parser!(u64).range(1..=86_400))]
    pub timeout: u64,
    /// Print what stands against it and what would change, and change nothing
    #[arg(long)]
    pub dry_run: bool,
    /// Live images that the candidate's generation may lack, for example because their addresses are
    /// dead
    #[arg(long, value_name = "IMAGES", default_value_t = 0)]
    pub allow_missing: u64,
    /// Folder for sorting, some hundred bytes an image; the system's temporary folder, unless given
    #[arg(long, value_name = "FOLDER")]
    pub temp_dir: Option<std::path::PathBuf>,
}

/// `bsap rollback`.
#[derive(Debug, Args)]
#[command(after_long_help = "\
Within a generation it goes back at once. To another model's it first looks whether the workers of that \
model have kept up: images that it lacks would no longer be found, deleted ones would come back. \
Where there are any, it says so and asks.")]
pub struct RollbackArgs {
    /// Do not look and do not ask: go back at once, and say afterwards what is lacking
    #[arg(long)]
    pub yes: bool,
    /// Folder for sorting, some hundred bytes an image; the system's temporary folder, unless given
    #[arg(long, value_name = "FOLDER")]
    pub temp_dir: Option<std::path::PathBuf>,
}

/// `bsap history`.
#[derive(Debug, Args)]
pub struct HistoryArgs {
    /// Print at most so many changes, the newest first
    #[arg(long, default_value_t = 50, value_parser = clap::value_parser!(u32).range(1..=100_000))]
    pub limit: u32,
    /// Print JSON, a line a change
    #[arg(long)]
    pub json: bool,
}

fn parse_number_up_to(text: &str, max: f32) -> Result<f32, String> {
    let value: f32 = text.parse().map_err(|_| "is not a number".to_owned())?;
    if (0.0..=max).contains(&value) {
        Ok(value)
    } else {
        Err(format!("is not between 0 and {max}"))
    }
}

fn validate_name_value(text: &str) -> Result<String, String> {
    match text.split_once('=') {
        Some((name, value)) if !name.is_empty() && !value.is_empty() => Ok(text.to_owned()),
        _ => Err("is not an attribute's name, =, and a value".into()),
    }
}

fn parse_share(text: &str) -> Result<f32, String> {
    parse_number_up_to(text, 1.0)
}

fn parse_lambda(text: &str) -> Result<f32, String> {
    parse_number_up_to(text, 10.0)
}
