//! What a caller does about an error, and how it waits before it tries again.

use std::time::Duration;

use rand::RngExt;
use tokio_util::sync::CancellationToken;

/// The decision that an error carries.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Disposition {
    /// It may pass: try again after a pause.
    Retry,
    /// This input will never work: put it aside and go on.
    DeadLetter,
    /// Nothing will work until somebody changes something: stop.
    Fatal,
}

/// An error that tells its caller what to do.
pub trait Classify {
    /// What to do about this error.
    fn disposition(&self) -> Disposition;
}

/// Exponential backoff with full jitter: the pause before attempt *n* is uniform in
/// `0..=min(cap, base·2ⁿ)`, as in "Exponential Backoff And Jitter" (AWS architecture blog, 2015).
#[derive(Debug, Clone, Copy)]
pub struct Backoff {
    /// Upper bound of the first pause.
    pub base: Duration,
    /// Upper bound of every pause.
    pub cap: Duration,
    /// How often the work is tried in all, at least once.
    pub max_attempts: u32,
}

impl Backoff {
    /// Between 100 ms and 10 s, `attempts` times in all.
    pub fn with_max_attempts(max_attempts: u32) -> Self {
        Self { base: Duration::from_millis(100), cap: Duration::from_secs(10), max_attempts }
    }

    /// The pause after the failed attempt `attempt`, counted from 0.
    pub fn random_delay(&self, attempt: u32) -> Duration {
        let bound = self.base.saturating_mul(2u32.saturating_pow(attempt)).min(self.cap);
        rand::rng().random_range(Duration::ZERO..=bound)
    }
}

/// Runs `work` until it succeeds, fails with anything but [`Verdict::Retry`], or has been tried
/// `backoff.attempts` times; `on_retry` hears of every failure that is tried again.
///
/// A cancelled `token` ends the waiting at once with the last error: whoever cancels wants to leave.
pub async fn retry<T, E, F>(
    backoff: Backoff,
    token: &CancellationToken,
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
        attempt += 1;
        if error.disposition() != Disposition::Retry || attempt >= backoff.max_attempts {
            return Err(error);
        }
        on_retry(attempt, &error);
        tokio::select! {
            () = tokio::time::sleep(backoff.random_delay(attempt - 1)) => {}
            () = token.cancelled() => return Err(error),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;

    use super::*;

    #[derive(Debug, PartialEq)]
    struct TestError(Disposition);
    impl Classify for TestError {
        fn disposition(&self) -> Disposition {
            self.0
        }
    }

    async fn count_attempts(verdict: Disposition, succeed_at: u32) -> (u32, Result<(), TestError>) {
        let tried = Cell::new(0);
        let backoff = Backoff { base: Duration::ZERO, ..Backoff::with_max_attempts(5) };
        let token = CancellationToken::new();
        let result = retry(
            backoff,
            &token,
            |_, _| {},
            || async {
                tried.set(tried.get() + 1);
                if tried.get() == succeed_at { Ok(()) } else { Err(TestError(verdict)) }
            },
        )
        .await;
        (tried.get(), result)
    }

    #[tokio::test]
    async fn only_transient_errors_are_retried_up_to_the_limit() {
        assert_eq!(count_attempts(Disposition::Retry, 3).await, (3, Ok(())));
        assert_eq!(count_attempts(Disposition::Retry, 99).await.0, 5);
        assert_eq!(count_attempts(Disposition::DeadLetter, 3).await.0, 1);
        assert_eq!(count_attempts(Disposition::Fatal, 3).await.0, 1);
    }

    #[tokio::test]
    async fn cancelling_ends_the_wait() {
        let token = CancellationToken::new();
        token.cancel();
        let backoff = Backoff {
            base: Duration::from_secs(3600),
            cap: Duration::from_secs(3600),
            max_attempts: 9,
        };
        let result: Result<(), TestError> =
            retry(backoff, &token, |_, _| {}, || async { Err(TestError(Disposition::Retry)) })
                .await;
        assert!(result.is_err());
    }
}
