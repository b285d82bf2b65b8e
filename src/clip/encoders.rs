//! What the pipeline and the query worker need of a model.

use image::RgbImage;

use super::error::ClipError;
use super::model_card::ModelCard;
use super::preprocess::Pixels;
use super::unread_text::UnreadText;

/// Texts per batch in [`Encoders::embed_texts_in_batches`]: it bounds the memory for activations.
const MAX_TEXT_BATCH: usize = 64;

/// Embeds images and texts. [`super::ClipModel`] is the implementation; tests and benches have
/// deterministic ones without a checkpoint.
pub trait Encoders: Send + Sync {
    /// Name, sizes and fingerprint of the model.
    fn card(&self) -> &ModelCard;

    /// Resizes and crops a picture to the square that the image encoder reads.
    fn preprocess_image(&self, image: &RgbImage) -> Result<Pixels, ClipError>;

    /// Returns one unit-length embedding of `card().dimension` values per picture, in order.
    fn embed_images(&self, batch: &[Pixels]) -> Result<Vec<Vec<f32>>, ClipError>;

    /// Returns one unit-length embedding of `card().dimension` values per text, in order.
    fn embed_texts(&self, texts: &[&str]) -> Result<Vec<Vec<f32>>, ClipError>;

    /// Does the same for any number of texts, in batches of bounded size.
    fn embed_texts_in_batches(&self, texts: &[&str]) -> Result<Vec<Vec<f32>>, ClipError> {
        let mut embeddings = Vec::with_capacity(texts.len());
        for batch in texts.chunks(MAX_TEXT_BATCH) {
            embeddings.extend(self.embed_texts(batch)?);
        }
        Ok(embeddings)
    }

    /// How many batches of pictures are worth computing at the same time, each on its own thread.
    fn concurrent_batches(&self) -> usize {
        1
    }

    /// Number of computations that have failed since the last one that succeeded. On a lost device
    /// every computation fails.
    fn consecutive_failures(&self) -> u32 {
        0
    }

    /// Whether the vocabulary of the text encoder has the script of `text`. If it has not, the
    /// embedding of the text is noise.
    fn supports_script(&self, text: &str) -> bool {
        let _ = text;
        true
    }

    /// Returns what the text encoder does not read of `text`: what comes after the context length, and
    /// characters that its vocabulary does not have.
    fn find_unread(&self, text: &str) -> UnreadText {
        let _ = text;
        UnreadText::default()
    }
}
