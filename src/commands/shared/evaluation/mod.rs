//! What commands that compute rankings of a stored table have in common.

use std::sync::Arc;

use tokio_util::sync::CancellationToken;

use super::error::CommandError;
use super::progress::{progress_bar, progress_callback};
use crate::catalogue::CatalogueState;
use crate::clip::Encoders;
use crate::evaluate::{Corpus, LoadedGeneration};
use crate::prompts::EmbeddedPromptSet;
use crate::store::Store;

pub mod thumbnails;

/// Embeds the prompt sets of a catalogue.
pub fn embed_prompt_sets(
    state: &CatalogueState,
    encoders: &dyn Encoders,
) -> Result<Vec<Arc<EmbeddedPromptSet>>, CommandError> {
    let embed = |record| EmbeddedPromptSet::from_record(record, encoders).map(Arc::new);
    Ok(state.prompt_sets.iter().map(embed).collect::<Result<Vec<_>, _>>()?)
}

/// Reads the images of the live table, with a progress bar.
pub async fn load_live_corpus(
    store: &Store,
    state: &CatalogueState,
    encoders: Arc<dyn Encoders>,
    token: &CancellationToken,
) -> Result<Corpus, CommandError> {
    let bar = progress_bar("read", 0)?;
    let on_read = progress_callback(&bar);
    let loaded =
        LoadedGeneration::load(store, "live", &state.live, encoders, token, &on_read).await?;
    bar.finish_and_clear();
    Ok(Corpus::from_generations(vec![loaded]))
}
