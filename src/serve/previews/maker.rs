//! Makes previews within the limits of decoding.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::cache::{PreviewCache, PreviewKey};
use super::encode::{Preview, PreviewSide};
use crate::ingest::decode::{DecodeOptions, DecodePermits, ImageDecodeError, decode_image};
use crate::ingest::fetch::FetchedBytes;

/// Why there is no preview of a picture.
#[derive(Debug, thiserror::Error)]
pub enum PreviewError {
    /// The original cannot be decoded.
    #[error(transparent)]
    Undecodable(#[from] ImageDecodeError),
    /// The preview could not be scaled or encoded.
    #[error("the preview cannot be made: {0}")]
    Internal(String),
}

/// Makes previews and keeps the ones that were requested last.
pub struct PreviewMaker {
    decode_options: DecodeOptions,
    /// For as many pictures as there are cores.
    decode_permits: DecodePermits,
    cache: Arc<Mutex<PreviewCache>>,
}

impl PreviewMaker {
    /// Creates a maker whose cache takes at most `cache_mib` MiB.
    pub fn new(decode_options: &DecodeOptions, cache_mib: usize) -> Self {
        let cores = std::thread::available_parallelism().map_or(1, usize::from);
        Self {
            decode_permits: DecodePermits::new(decode_options, cores),
            cache: Arc::new(Mutex::new(PreviewCache::new(cache_mib << 20))),
            decode_options: decode_options.clone(),
        }
    }

    /// Returns the preview of the picture with this hash if it is kept.
    pub fn find_cached(&self, content_hash: &str, side: PreviewSide) -> Option<Preview> {
        lock(&self.cache).get(&PreviewKey { content_hash: content_hash.to_owned(), side })
    }

    /// Makes a preview of an original and keeps it, unless `content_hash` is empty. `request_permit` is
    /// held until the picture is decoded, even if nobody waits for the result any more.
    pub async fn make(
        &self,
        original: FetchedBytes,
        content_hash: &str,
        side: PreviewSide,
        request_permit: impl Send + 'static,
    ) -> Result<Preview, PreviewError> {
        let options = self.decode_options.clone();
        let decode_permit = self.decode_permits.acquire(&original.bytes, &options).await?;
        let cache = self.cache.clone();
        let key = (!content_hash.is_empty())
            .then(|| PreviewKey { content_hash: content_hash.to_owned(), side });
        let work = move || {
            let _permit = request_permit;
            let picture = decode_image(&original.bytes, &options)?;
            // Releases its share of the budget for downloads.
            drop(original);
            let preview = Preview::from_picture(&picture, side).map_err(PreviewError::Internal)?;
            if let Some(key) = key {
                lock(&cache).insert(key, preview.clone());
            }
            Ok(preview)
        };
        let made = decode_permit.run(work).await?;
        made.map_err(|error| PreviewError::Internal(error.to_string()))?
    }
}

fn lock(cache: &Mutex<PreviewCache>) -> MutexGuard<'_, PreviewCache> {
    cache.lock().unwrap_or_else(PoisonError::into_inner)
}
