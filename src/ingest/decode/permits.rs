//! Limits of how many images are decoded at one time, and of the memory for it.

use std::sync::Arc;

use tokio::sync::{AcquireError, OwnedSemaphorePermit, Semaphore};

use super::decoder::estimate_decode_memory_bytes;
use super::error::ImageDecodeError;
use super::options::DecodeOptions;

/// Gives permits to decode images.
#[derive(Debug)]
pub struct DecodePermits {
    /// One permit per image.
    images: Arc<Semaphore>,
    /// One permit per MiB.
    memory: Arc<Semaphore>,
    budget_mib: u32,
}

/// Allows to decode one image; must be held until it is decoded.
#[derive(Debug)]
pub struct DecodePermit {
    // The semaphores are never closed.
    _memory: Result<OwnedSemaphorePermit, AcquireError>,
    _image: Result<OwnedSemaphorePermit, AcquireError>,
}

impl DecodePermits {
    /// Allows `max_images` at one time, in the memory of `decode.budget_mib`.
    pub fn new(options: &DecodeOptions, max_images: usize) -> Self {
        Self {
            images: Arc::new(Semaphore::new(max_images)),
            memory: Arc::new(Semaphore::new(options.budget_mib as usize)),
            budget_mib: options.budget_mib,
        }
    }

    /// Waits until an image may be decoded. Fails if its header says that it cannot be.
    pub async fn acquire(
        &self,
        bytes: &[u8],
        options: &DecodeOptions,
    ) -> Result<DecodePermit, ImageDecodeError> {
        let memory_bytes = estimate_decode_memory_bytes(bytes, options)?;
        let mib = u32::try_from(memory_bytes.div_ceil(1 << 20)).unwrap_or(u32::MAX);
        let mib = mib.clamp(1, self.budget_mib);
        Ok(DecodePermit {
            _memory: self.memory.clone().acquire_many_owned(mib).await,
            _image: self.images.clone().acquire_owned().await,
        })
    }
}
