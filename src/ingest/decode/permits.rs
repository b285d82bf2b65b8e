//! Limits of how many images are decoded at one time, of the memory for it, and of the time for each.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use tokio::sync::{AcquireError, OwnedSemaphorePermit, Semaphore};
use tokio::task::JoinError;

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

/// Allows to decode one image.
#[derive(Debug)]
pub struct DecodePermit {
    // The semaphores are never closed.
    memory: Result<OwnedSemaphorePermit, AcquireError>,
    image: Result<OwnedSemaphorePermit, AcquireError>,
    timeout_ms: u64,
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
            memory: self.memory.clone().acquire_many_owned(mib).await,
            image: self.images.clone().acquire_owned().await,
            timeout_ms: options.timeout_ms,
        })
    }
}

impl DecodePermit {
    /// Runs `work`, which decodes the image, on a blocking thread for at most `decode.timeout_ms`.
    ///
    /// A thread cannot be ended from outside. One that runs longer keeps its share of the memory until it ends, but
    /// no longer counts as one of the images that are decoded at one time: others take its place.
    pub async fn run<T: Send + 'static>(
        self,
        work: impl FnOnce() -> T + Send + 'static,
    ) -> Result<Result<T, JoinError>, ImageDecodeError> {
        let Self { memory, image, timeout_ms } = self;
        // The thread holds both: whoever waits for it may be dropped at any time.
        let image = Arc::new(Mutex::new(Some(image)));
        let image_of_thread = image.clone();
        let running = tokio::task::spawn_blocking(move || {
            let _permits = (memory, image_of_thread);
            work()
        });
        let ended = tokio::time::timeout(Duration::from_millis(timeout_ms), running).await;
        ended.map_err(|_| {
            drop(image.lock().unwrap_or_else(PoisonError::into_inner).take());
            ImageDecodeError::TimedOut { timeout_ms }
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::mpsc;

    async fn run<T: Send + 'static>(
        permits: &DecodePermits,
        options: &DecodeOptions,
        work: impl FnOnce() -> T + Send + 'static,
    ) -> Result<T, ImageDecodeError> {
        let png = std::fs::read("tests/fuzz/corpus/picture/9x7.png").unwrap();
        let permit = permits.acquire(&png, options).await?;
        Ok(permit.run(work).await?.unwrap())
    }

    #[tokio::test]
    async fn a_decoder_that_does_not_end_is_given_up_and_the_next_image_takes_its_place() {
        let options = DecodeOptions { timeout_ms: 50, budget_mib: 64, ..DecodeOptions::default() };
        let permits = DecodePermits::new(&options, 1);
        let (end, ended) = mpsc::channel::<()>();
        let error = run(&permits, &options, move || ended.recv()).await.unwrap_err();
        assert_eq!(error.code(), "decode_timed_out");
        assert_eq!(permits.memory.available_permits(), 63, "its memory is still in use");

        let patient = DecodeOptions { timeout_ms: 60_000, ..options };
        assert_eq!(run(&permits, &patient, || 5).await, Ok(5));

        drop(end);
        let all_memory = permits.memory.acquire_many(64);
        drop(tokio::time::timeout(Duration::from_secs(60), all_memory).await.unwrap().unwrap());
        assert_eq!(permits.images.available_permits(), 1);
    }

    #[tokio::test]
    async fn a_thread_counts_until_it_ends_though_nobody_waits_for_it() {
        let options = DecodeOptions::default();
        let permits = DecodePermits::new(&options, 1);
        let (end, ended) = mpsc::channel::<()>();
        let abandoned = run(&permits, &options, move || ended.recv());
        assert!(tokio::time::timeout(Duration::from_millis(100), abandoned).await.is_err());
        assert_eq!(permits.images.available_permits(), 0);
        drop(end);
        let image = permits.images.acquire();
        drop(tokio::time::timeout(Duration::from_secs(60), image).await.unwrap().unwrap());
    }
}
