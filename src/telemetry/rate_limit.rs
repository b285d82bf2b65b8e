//! Counts log events, and suppresses those that occur too often.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use tracing::field::{Field, Visit};
use tracing::{Event, Level, Metadata, Subscriber, warn};
use tracing_subscriber::Layer;
use tracing_subscriber::layer::{Context, Filter};

use super::{event, metrics};

/// Length of a window in which lines are counted; at its end the suppressed ones are reported.
const RATE_LIMIT_WINDOW: Duration = Duration::from_secs(10);
/// Events at level info that may occur once per message and so are limited like warnings.
const RATE_LIMITED_INFO_EVENTS: [&str; 3] =
    [event::RETRY, event::COMMIT_CONFLICT, event::IMAGE_NOT_FOUND];

/// Reads the value of the field `event`.
#[derive(Default)]
struct EventNameVisitor(Option<String>);

impl Visit for EventNameVisitor {
    fn record_str(&mut self, field: &Field, value: &str) {
        if field.name() == "event" {
            self.0 = Some(value.to_owned());
        }
    }
    fn record_debug(&mut self, _: &Field, _: &dyn std::fmt::Debug) {}
}

fn event_name(event: &Event<'_>) -> Option<String> {
    let mut name = EventNameVisitor::default();
    event.record(&mut name);
    name.0
}

/// Counts every event in `bsap_log_events_total`, suppressed ones included.
pub struct LogEventCounter;

impl<S: Subscriber> Layer<S> for LogEventCounter {
    fn on_event(&self, event: &Event<'_>, _: Context<'_, S>) {
        if let Some(name) = event_name(event) {
            let level = event.metadata().level().as_str().to_ascii_lowercase();
            metrics::global().log_events.add(&[&name, &level], 1);
        }
    }
}

/// Limits how many warnings and errors of one event are written per window. Lines of a library are
/// limited per target.
#[derive(Clone)]
pub struct LogEventRateLimit {
    max_lines_per_window: u32,
    windows_by_key: Arc<Mutex<HashMap<String, RateWindow>>>,
}

/// The window of one event or target.
struct RateWindow {
    started_at: Instant,
    written_lines: u32,
    suppressed_lines: u64,
}

impl LogEventRateLimit {
    /// Creates a limit per window of 10 s; 0 suppresses nothing.
    pub fn new(max_lines_per_window: u32) -> Self {
        Self { max_lines_per_window, windows_by_key: Arc::default() }
    }

    /// Counts a line of `key`, and returns whether it may be written.
    fn admit_line(&self, key: String, now: Instant) -> bool {
        let mut windows = self.windows_by_key.lock().unwrap_or_else(PoisonError::into_inner);
        let window = windows.entry(key).or_insert(RateWindow {
            started_at: now,
            written_lines: 0,
            suppressed_lines: 0,
        });
        let admitted = window.written_lines < self.max_lines_per_window;
        if admitted {
            window.written_lines += 1;
        } else {
            window.suppressed_lines += 1;
        }
        admitted
    }

    /// Removes the windows that have ended; returns the keys and counts of suppressed lines.
    fn take_suppressed_counts(&self, now: Instant) -> Vec<(String, u64)> {
        let mut windows = self.windows_by_key.lock().unwrap_or_else(PoisonError::into_inner);
        let mut suppressed = Vec::new();
        windows.retain(|key, window| {
            let expired = now - window.started_at >= RATE_LIMIT_WINDOW;
            if expired && window.suppressed_lines > 0 {
                suppressed.push((key.clone(), window.suppressed_lines));
            }
            !expired
        });
        suppressed
    }

    /// Starts the thread that logs how many lines were suppressed; it ends with the process.
    pub fn spawn_reporter(&self) {
        if self.max_lines_per_window == 0 {
            return;
        }
        let limit = self.clone();
        // If no thread can be started, nothing else works either.
        let _ = std::thread::Builder::new().name("log-limit".into()).spawn(move || {
            loop {
                std::thread::sleep(Duration::from_secs(1));
                for (suppressed_event, count) in limit.take_suppressed_counts(Instant::now()) {
                    warn!(
                        event = event::LOG_SUPPRESSED,
                        suppressed_event,
                        count,
                        window_seconds = RATE_LIMIT_WINDOW.as_secs(),
                        "lines were suppressed"
                    );
                }
            }
        });
    }
}

impl<S> Filter<S> for LogEventRateLimit {
    fn enabled(&self, _: &Metadata<'_>, _: &Context<'_, S>) -> bool {
        true
    }

    fn event_enabled(&self, event: &Event<'_>, _: &Context<'_, S>) -> bool {
        if self.max_lines_per_window == 0 {
            return true;
        }
        let is_warning_or_error = *event.metadata().level() <= Level::WARN;
        let name = event_name(event);
        let limited = match &name {
            Some(name) => {
                name != event::LOG_SUPPRESSED
                    && (is_warning_or_error || RATE_LIMITED_INFO_EVENTS.contains(&name.as_str()))
            }
            None => is_warning_or_error,
        };
        let key = || name.unwrap_or_else(|| event.metadata().target().to_owned());
        !limited || self.admit_line(key(), Instant::now())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_flood_is_limited_and_counted_and_other_events_are_written() {
        let limit = LogEventRateLimit::new(2);
        let start = Instant::now();
        let written = (0..10).filter(|_| limit.admit_line("dead_letter".into(), start)).count();
        assert_eq!(written, 2);
        assert!(limit.admit_line("request.rejected".into(), start));
        assert!(limit.take_suppressed_counts(start + RATE_LIMIT_WINDOW / 2).is_empty());
        assert_eq!(
            limit.take_suppressed_counts(start + RATE_LIMIT_WINDOW),
            [("dead_letter".to_owned(), 8)]
        );
        assert!(limit.admit_line("dead_letter".into(), start + RATE_LIMIT_WINDOW));
    }
}
