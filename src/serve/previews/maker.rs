//! Makes previews within the limits of decoding.

use std::any::Any;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::sync::Semaphore;

use super::cache::{PreviewCache, PreviewKey};
use super::encode::{Preview, PreviewSide};
use crate::ingest::decode::{
    DecodeOptions, ImageDecodeError, decode_image, estimate_decode_memory_bytes,
};
use crate::ingest::fetch::FetchedBytes;

/// Why there is no preview of a picture.
#[derive(Debug, thiserror::Error)]
pub enum PreviewError {
    /// The original cannot be decoded.
    #[error(transparent)]
    Undecodable(#[from] ImageDecodeError),
    /// The decoder panicked, as it would again: a bug in it that this picture triggers.
    #[error("the decoder panicked: {0}")]
    DecoderPanicked(String),
    /// The preview could not be scaled or encoded.
    #[error("the preview cannot be made: {0}")]
    Internal(String),
}

/// Makes previews and keeps the ones that were requested last.
pub struct PreviewMaker {
    decode_options: DecodeOptions,
    /// One permit per picture that is decoded: as many as there are cores.
    decode_permits: Arc<Semaphore>,
    /// Memory for decoding, one permit per MiB.
    decode_memory_budget: Arc<Semaphore>,
    cache: Arc<Mutex<PreviewCache>>,
}

impl PreviewMaker {
    /// Creates a maker whose cache takes at most `cache_mib` MiB.
    pub fn new(decode_options: &DecodeOptions, cache_mib: usize) -> Self {
        let cores = std::thread::available_parallelism().map_or(1, usize::from);
        Self {
            decode_permits: Arc::new(Semaphore::new(cores)),
            decode_memory_budget: Arc::new(Semaphore::new(decode_options.budget_mib as usize)),
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
        let estimate = || estimate_decode_memory_bytes(&original.bytes, &options);
        let memory_bytes = catch_unwind(AssertUnwindSafe(estimate))
            .map_err(|panic| decoder_panicked(panic.as_ref()))??;
        let mib = u32::try_from(memory_bytes.div_ceil(1 << 20)).unwrap_or(u32::MAX);
        let memory_permit = self.decode_memory_budget.clone();
        let memory_permit =
            memory_permit.acquire_many_owned(mib.clamp(1, self.decode_options.budget_mib)).await;
        let decode_permit = self.decode_permits.clone().acquire_owned().await;
        let cache = self.cache.clone();
        let key = (!content_hash.is_empty())
            .then(|| PreviewKey { content_hash: content_hash.to_owned(), side });
        let work = move || {
            let _permits = (memory_permit, decode_permit, request_permit);
            let picture = decode_image(&original.bytes, &options)?;
            // Releases its share of the budget for downloads.
            drop(original);
            let preview = Preview::from_picture(&picture, side).map_err(PreviewError::Internal)?;
            if let Some(key) = key {
                lock(&cache).insert(key, preview.clone());
            }
            Ok(preview)
        };
        match tokio::task::spawn_blocking(work).await {
            Ok(result) => result,
            Err(error) if error.is_panic() => Err(decoder_panicked(error.into_panic().as_ref())),
            Err(error) => Err(PreviewError::Internal(error.to_string())),
        }
    }
}

fn lock(cache: &Mutex<PreviewCache>) -> MutexGuard<'_, PreviewCache> {
    cache.lock().unwrap_or_else(PoisonError::into_inner)
}

fn decoder_panicked(panic: &(dyn Any + Send)) -> PreviewError {
    let text = panic
        .downcast_ref::<String>()
        .map(String::as_str)
        .or_else(|| panic.downcast_ref::<&str>().copied())
        .unwrap_or("unknown");
    PreviewError::DecoderPanicked(text.to_owned())
}
