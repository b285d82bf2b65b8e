//! Embeds each text once: worker and query worker of one process need the same auxiliary prompts.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use image::RgbImage;
use indicatif::ProgressBar;
use tokio_util::sync::CancellationToken;

use crate::clip::{ClipError, Encoders, ModelCard, Pixels, UnreadText};
use crate::commands::shared::printing::Output;
use crate::commands::shared::progress::progress_bar;
use crate::prompts::{PromptOptions, PromptSet};

/// Most texts that are kept: eight prompt sets of the largest size that is built in.
const MAX_CACHED_TEXTS: usize = 8_192;
/// Texts that are embedded between two steps of the bar.
const TEXTS_PER_STEP: usize = 16;

/// A model that remembers the embeddings of texts.
pub struct TextCachingEncoders {
    model: Arc<dyn Encoders>,
    embeddings: Mutex<HashMap<String, Vec<f32>>>,
}

impl TextCachingEncoders {
    /// Wraps a model; nothing is remembered yet.
    pub fn new(model: Arc<dyn Encoders>) -> Self {
        Self { model, embeddings: Mutex::default() }
    }

    /// Embeds the texts of the configured prompt sets, with a progress bar. Returns false if `token` was
    /// cancelled before.
    pub async fn embed_prompts(
        self: &Arc<Self>,
        options: &PromptOptions,
        output: Output,
        token: &CancellationToken,
    ) -> anyhow::Result<bool> {
        let sets = options.sets.iter().map(|name| PromptSet::load_builtin_or_file(name));
        let sets = sets.collect::<Result<Vec<_>, _>>()?;
        let texts: Vec<String> = sets.into_iter().flat_map(|set| set.texts).collect();
        output.line(format_args!(
            "Auxiliary prompts: {} of {}",
            texts.len(),
            options.sets.join(", ")
        ));
        let bar = progress_bar("prompts", texts.len() as u64)?;
        let (encoders, shown_bar, step_token) = (self.clone(), bar.clone(), token.clone());
        let embedding = tokio::task::spawn_blocking(move || {
            encoders.embed_steps(&texts, &shown_bar, &step_token)
        });
        embedding.await??;
        bar.finish_and_clear();
        Ok(!token.is_cancelled())
    }

    fn embed_steps(
        &self,
        texts: &[String],
        bar: &ProgressBar,
        token: &CancellationToken,
    ) -> Result<(), ClipError> {
        for step in texts.chunks(TEXTS_PER_STEP) {
            if token.is_cancelled() {
                break;
            }
            self.embed_texts(&step.iter().map(String::as_str).collect::<Vec<_>>())?;
            bar.inc(step.len() as u64);
        }
        Ok(())
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<String, Vec<f32>>> {
        self.embeddings.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Encoders for TextCachingEncoders {
    fn card(&self) -> &ModelCard {
        self.model.card()
    }

    fn preprocess_image(&self, image: &RgbImage) -> Result<Pixels, ClipError> {
        self.model.preprocess_image(image)
    }

    fn embed_images(&self, batch: &[Pixels]) -> Result<Vec<Vec<f32>>, ClipError> {
        self.model.embed_images(batch)
    }

    fn embed_texts(&self, texts: &[&str]) -> Result<Vec<Vec<f32>>, ClipError> {
        let mut found: Vec<Option<Vec<f32>>> = {
            let known = self.lock();
            texts.iter().map(|text| known.get(*text).cloned()).collect()
        };
        let missing: Vec<&str> = texts
            .iter()
            .zip(&found)
            .filter(|(_, known)| known.is_none())
            .map(|(t, _)| *t)
            .collect();
        if !missing.is_empty() {
            let embedded = self.model.embed_texts(&missing)?;
            let mut known = self.lock();
            let empty_places = found.iter_mut().filter(|place| place.is_none());
            for ((place, text), embedding) in empty_places.zip(missing).zip(embedded) {
                if known.len() < MAX_CACHED_TEXTS {
                    known.insert(text.to_owned(), embedding.clone());
                }
                *place = Some(embedding);
            }
        }
        Ok(found.into_iter().flatten().collect())
    }

    fn concurrent_batches(&self) -> usize {
        self.model.concurrent_batches()
    }

    fn consecutive_failures(&self) -> u32 {
        self.model.consecutive_failures()
    }

    fn supports_script(&self, text: &str) -> bool {
        self.model.supports_script(text)
    }

    fn find_unread(&self, text: &str) -> UnreadText {
        self.model.find_unread(text)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::search::testing::HashEncoders;

    #[test]
    fn a_text_is_embedded_once_and_keeps_its_place() {
        let model = HashEncoders::new(8);
        let cached = TextCachingEncoders::new(model.clone());
        let expected = model.embed_texts(&["a", "b", "c", "a"]).unwrap();
        cached.embed_texts(&["b"]).unwrap();
        assert_eq!(cached.embed_texts(&["a", "b", "c", "a"]).unwrap(), expected);
        assert_eq!(cached.lock().len(), 3);
        assert_eq!(
            cached.embed_texts(&["c", "a"]).unwrap(),
            [&expected[2..3], &expected[..1]].concat()
        );
    }
}
