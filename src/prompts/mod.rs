//! Auxiliary prompt sets. A [`PromptSet`] is a list of texts, built in or from a TOML file of the
//! owner; a model embeds it once into an [`EmbeddedPromptSet`], which computes the statistics of
//! images.
//! [`ActivePromptSets`] are those that the catalogue's state names now, and [`measure_prompt_set`] reports
//! how a set suits a catalogue.

mod active;
mod embedded;
mod options;
mod prompt_set;
pub(crate) mod report;

pub use active::ActivePromptSets;
pub use embedded::{EmbeddedPromptSet, compute_all_statistics};
pub use options::{PromptOptions, load_configured_sets};
pub use prompt_set::{MAX_PROMPT_CHARS, MAX_PROMPTS, PromptError, PromptSet, UnreadPrompt};
pub use report::{NEAR_DUPLICATE_COSINE, PromptSetReport, measure_prompt_set};
