//! Arguments of `bsap prompts`.

use clap::{Args, Subcommand};

use super::measure::PromptsMeasureArgs;
use super::suggest_shared::PromptsSuggestArgs;

/// `bsap prompts`.
#[derive(Debug, Args)]
#[command(after_long_help = "\
Examples:
  bsap prompts list
  bsap prompts show photographs > mine.toml     a template for a set of your own
  bsap prompts measure mine.toml                its effect on the stored images
  bsap prompts suggest --query-log last-week.log --name recent --out recent.toml --candidate recent
  bsap prompts suggest --queries judged.jsonl --query-log queries.jsonl --attribute title --name mine --out mine.toml
  bsap reindex statistics --prompt-set mine.toml   its statistics for every stored image
  bsap prompts retire mine                      remove it from the catalogue")]
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
    /// Print a set as a TOML file
    Show {
        /// Name of a shipped set, or path of a TOML file
        set: String,
    },
    /// Measure sets on the stored images: distribution of scores, near-duplicate and dominating
    /// prompts, penalised images. Changes nothing
    Measure(PromptsMeasureArgs),
    /// Choose prompts and a weight from your own texts, by judged queries if there are any, and write the
    /// set; optionally make it the candidate
    Suggest(PromptsSuggestArgs),
    /// Remove a stored set: new rows no longer have its statistics, and backfilled ones are dropped.
    /// An error if the live configuration or the candidate uses it
    Retire {
        /// Its name, name@version or key
        set: String,
    },
}
