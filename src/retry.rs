//! How a caller reacts to an error, and how it waits before it tries again.

use std::time::Duration;

use rand::RngExt;
use tokio_util::sync::CancellationToken;

/// What the caller of a failed operation does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Disposition {
    /// The error may pass: try again after a pause.
    Retry,
    /// This input always fails: set it aside as a dead letter and continue with the next one.
    DeadLetter,
    /// Nothing works until somebody changes something: stop.
    Fatal,
}

/// An error that says what its caller should do.
pub trait Classify {
    /// Returns what to do about this error.
    fn disposition(&self) -> Disposition;

    /// Returns how long the other side asks to wait before the next attempt; `None` if it says nothing.
    fn retry_after(&self) -> Option<Duration> {
        None
    }
}

/// Exponential backoff with full jitter: the pause before attempt *n* is uniform in
/// `0..=min(cap, base·2ⁿ)`, as in "Exponential Backoff And Jitter" (AWS architecture blog, 2015).
#[derive(Debug, Clone, Copy)]
pub struct Backoff {
    /// Upper bound of the first pause.
    pub base: Duration,
    /// Upper bound of every pause.
    pub cap: Duration,
    /// Number of attempts in all, at least 1.
    pub max_attempts: u32,
}

impl Backoff {
    /// Creates a backoff with pauses of up to 100 ms at first and up to 10 s later.
    pub fn with_max_attempts(max_attempts: u32) -> Self {
        Self { base: Duration::from_millis(100), cap: Duration::from_secs(10), max_attempts }
    }

    /// Draws the pause after failed attempt `attempt`, counted from 0.
    pub fn random_delay(&self, attempt: u32) -> Duration {
        let bound = self.base.saturating_mul(2u32.saturating_pow(attempt)).min(self.cap);
        rand::rng().random_range(Duration::ZERO..=bound)
    }

    /// Pauses after failed attempt `attempt`, counted from 0. Returns false as soon as `cancel` is
    /// cancelled: then no further attempt is made.
    #[must_use = "a cancelled wait ends the attempts"]
    pub async fn wait(&self, attempt: u32, cancel: &CancellationToken) -> bool {
        wait_for(self.random_delay(attempt), cancel).await
    }

    /// Pauses as [`Self::wait`] does, but as long as `error` asks if it does.
    #[must_use = "a cancelled wait ends the attempts"]
    pub async fn wait_after(
        &self,
        error: &impl Classify,
        attempt: u32,
        cancel: &CancellationToken,
    ) -> bool {
        let delay = error.retry_after().unwrap_or_else(|| self.random_delay(attempt));
        wait_for(delay, cancel).await
    }
}

async fn wait_for(delay: Duration, cancel: &CancellationToken) -> bool {
    tokio::select! {
        biased;
        () = cancel.cancelled() => false,
        () = tokio::time::sleep(delay) => true,
    }
}

/// Runs `work` until it succeeds, fails with anything but [`Disposition::Retry`], or was tried
/// `backoff.max_attempts` times. Calls `on_retry` with the number of attempts so far and the error
/// before each pause, which is as long as the error asks if it does.
///
/// When `cancel` is cancelled, the pause ends at once and the last error is returned. `work` itself is
/// never interrupted, and is tried once even if `cancel` is cancelled already.
pub async fn retry<T, E, F>(
    backoff: Backoff,
    cancel: &CancellationToken,
    mut on_retry: impl FnMut(u32, &E),
    mut work: impl FnMut() -> F,
) -> Result<T, E>
where
    E: Classify,
    F: Future<Output = Result<T, E>>,
{
    let mut attempt = 0;
    loop {
        let error = match work().await {
            Ok(value) => return Ok(value),
            Err(error) => error,
        };
        if error.disposition() != Disposition::Retry || attempt + 1 >= backoff.max_attempts {
            return Err(error);
        }
        on_retry(attempt + 1, &error);
        if !backoff.wait_after(&error, attempt, cancel).await {
            return Err(error);
        }
        attempt += 1;
    }
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;

    use tokio::time::Instant;

    use super::*;

    const HOUR: Duration = Duration::from_secs(3600);

    #[derive(Debug, PartialEq)]
    struct TestError(Disposition);
    impl Classify for TestError {
        fn disposition(&self) -> Disposition {
            self.0
        }
    }

    async fn count_attempts(
        disposition: Disposition,
        succeed_at: u32,
    ) -> (u32, Result<(), TestError>) {
        let attempts = Cell::new(0);
        let backoff = Backoff { base: Duration::ZERO, ..Backoff::with_max_attempts(5) };
        let cancel = CancellationToken::new();
        let result = retry(
            backoff,
            &cancel,
            |_, _| {},
            || async {
                attempts.set(attempts.get() + 1);
                if attempts.get() == succeed_at { Ok(()) } else { Err(TestError(disposition)) }
            },
        )
        .await;
        (attempts.get(), result)
    }

    #[tokio::test]
    async fn only_transient_errors_are_retried_up_to_the_limit() {
        assert_eq!(count_attempts(Disposition::Retry, 3).await, (3, Ok(())));
        assert_eq!(count_attempts(Disposition::Retry, 99).await.0, 5);
        assert_eq!(count_attempts(Disposition::DeadLetter, 3).await.0, 1);
        assert_eq!(count_attempts(Disposition::Fatal, 3).await.0, 1);
    }

    #[tokio::test]
    async fn the_pause_is_as_long_as_the_error_asks() {
        struct Busy;
        impl Classify for Busy {
            fn disposition(&self) -> Disposition {
                Disposition::Retry
            }
            fn retry_after(&self) -> Option<Duration> {
                Some(Duration::ZERO)
            }
        }
        let year = 9_000 * HOUR;
        let backoff = Backoff { base: year, cap: year, max_attempts: 3 };
        let cancel = CancellationToken::new();
        let work = retry(backoff, &cancel, |_, _| {}, || async { Err::<(), _>(Busy) });
        let result = tokio::time::timeout(HOUR / 60, work).await;
        assert!(result.is_ok_and(|result| result.is_err()));
    }

    #[tokio::test]
    async fn cancelling_ends_the_wait() {
        let cancel = CancellationToken::new();
        cancel.cancel();
        let backoff = Backoff { base: HOUR, cap: HOUR, max_attempts: 9 };
        let result: Result<(), TestError> =
            retry(backoff, &cancel, |_, _| {}, || async { Err(TestError(Disposition::Retry)) })
                .await;
        assert!(result.is_err());
    }

    #[tokio::test]
    async fn a_wait_ends_at_the_moment_of_its_cancellation() {
        let year = HOUR * 8_760;
        let backoff = Backoff { base: year, cap: year, max_attempts: u32::MAX };
        let cancel = CancellationToken::new();
        let started = Instant::now();
        let (lasted, ()) = tokio::join!(backoff.wait(0, &cancel), async {
            tokio::time::sleep(Duration::from_millis(10)).await;
            cancel.cancel();
        });
        assert!(!lasted && started.elapsed() < Duration::from_secs(60));
        let none = Backoff { base: Duration::ZERO, ..backoff };
        assert!(!none.wait(0, &cancel).await, "it was cancelled before");
        assert!(none.wait(0, &CancellationToken::new()).await);
    }
}
