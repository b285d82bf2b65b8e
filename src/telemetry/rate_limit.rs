//! Counting events, and holding back those that come in floods.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use tracing::field::{Field, Visit};
use tracing::{Event, Level, Metadata, Subscriber, warn};
use tracing_subscriber::Layer;
use tracing_subscriber::layer::{Context, Filter};

use super::{event, metrics};

/// Lines are counted over so long, and those held back are told at its end.
const RATE_LIMIT_WINDOW: Duration = Duration::from_secs(10);
/// Informative events of which one a message may come.
const RATE_LIMITED_INFO_EVENTS: [&str; 3] =
    [event::RETRY, event::COMMIT_CONFLICT, event::IMAGE_NOT_FOUND];

/// The value of the field `event`.
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

/// Counts the events of this program in `bsap_log_events_total`.
pub struct EventCounter;

impl<S: Subscriber> Layer<S> for EventCounter {
    fn on_event(&self, event: &Event<'_>, _: Context<'_, S>) {
        if let Some(name) = event_name(event) {
            let level = event.metadata().level().as_str().to_ascii_lowercase();
            metrics::global().log_events.add(&[&name, &level], 1);
        }
    }
}

/// Lets so many warnings and errors of one event through in a window. Lines of a library count by
/// their target.
#[derive(Clone)]
pub struct EventRateLimit {
    max_lines_per_window: u32,
    windows: Arc<Mutex<HashMap<String, RateWindow>>>,
}

struct RateWindow {
    started: Instant,
    written: u32,
    suppressed: u64,
}

impl EventRateLimit {
    /// At most `lines` in a window; 0 lets everything through.
    pub fn new(max_lines_per_window: u32) -> Self {
        Self { max_lines_per_window, windows: Arc::default() }
    }

    /// Whether a line of `key` may be written now.
    fn admit_line(&self, key: String, now: Instant) -> bool {
        let mut windows = self.windows.lock().unwrap_or_else(PoisonError::into_inner);
        let window =
            windows.entry(key).or_insert(RateWindow { started: now, written: 0, suppressed: 0 });
        let passes = window.written < self.max_lines_per_window;
        if passes {
            window.written += 1;
        } else {
            window.suppressed += 1;
        }
        passes
    }

    /// Ends the windows that are over; what was held back in them.
    fn end_expired_windows(&self, now: Instant) -> Vec<(String, u64)> {
        let mut windows = self.windows.lock().unwrap_or_else(PoisonError::into_inner);
        let mut held = Vec::new();
        windows.retain(|key, window| {
            let over = now - window.started >= RATE_LIMIT_WINDOW;
            if over && window.suppressed > 0 {
                held.push((key.clone(), window.suppressed));
            }
            !over
        });
        held
    }

    /// Starts the thread that tells what was held back; it ends with the process.
    pub fn spawn_reporter(&self) {
        if self.max_lines_per_window == 0 {
            return;
        }
        let limit = self.clone();
        // Where no thread can be had, nothing else works either.
        let _ = std::thread::Builder::new().name("log-limit".into()).spawn(move || {
            loop {
                std::thread::sleep(Duration::from_secs(1));
                for (held, count) in limit.end_expired_windows(Instant::now()) {
                    warn!(
                        event = event::LOG_SUPPRESSED,
                        suppressed_event = held,
                        count,
                        window_seconds = RATE_LIMIT_WINDOW.as_secs(),
                        "lines were held back"
                    );
                }
            }
        });
    }
}

impl<S> Filter<S> for EventRateLimit {
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
    fn a_flood_is_cut_off_and_counted_and_others_pass() {
        let limit = EventRateLimit::new(2);
        let start = Instant::now();
        let passed = (0..10).filter(|_| limit.admit_line("dead_letter".into(), start)).count();
        assert_eq!(passed, 2);
        assert!(limit.admit_line("shed".into(), start));
        assert!(limit.end_expired_windows(start + RATE_LIMIT_WINDOW / 2).is_empty());
        assert_eq!(
            limit.end_expired_windows(start + RATE_LIMIT_WINDOW),
            [("dead_letter".to_owned(), 8)]
        );
        assert!(limit.admit_line("dead_letter".into(), start + RATE_LIMIT_WINDOW));
    }
}
