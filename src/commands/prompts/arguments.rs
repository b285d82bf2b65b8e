//! Arguments of `bsap prompts`.

use clap::{Args, Subcommand};

use super::measure::PromptsMeasureArgs;
use super::suggest::PromptsSuggestArgs;

/// `bsap prompts`.
#[derive(Debug, Args)]
#[command(after_long_help = "\
Examples:
  bsap prompts list
  bsap prompts show photographs > mine.toml     a start for a set of your own
  bsap prompts measure mine.toml                what it would do on the stored images
  bsap prompts suggest --queries judged.jsonl --log queries.jsonl --attribute title --name mine --out mine.toml
  bsap reindex statistics --prompt-set mine.toml   have it for every stored image
  bsap prompts retire mine                      and be rid of it again")]
pub struct PromptsArgs {
    /// What to do.
    #[command(subcommand)]
    pub action: PromptsAction,
}

/// What `bsap prompts` does.
#[derive(Debug, Subcommand)]
pub enum PromptsAction {
    /// List the shipped and the configured sets with their fingerprints
    List,
    /// Print a set as its TOML file has it
    Show {
        /// Shipped name or path of a TOML file
        set: String,
    },
    /// Measure sets on the stored images: how scores spread, near-duplicate and dominating
    /// prompts, penalised images. Changes nothing
    Measure(PromptsMeasureArgs),
    /// Choose prompts, formula and weight by judged queries, from your own texts, and write the set
    Suggest(PromptsSuggestArgs),
    /// Forget a stored set: new rows no longer carry it, backfilled statistics of it are dropped.
    /// Refused while it is served or a candidate's
    Retire {
        /// Its name, name@version or key
        set: String,
    },
}
