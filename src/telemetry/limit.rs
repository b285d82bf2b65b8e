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
const WINDOW: Duration = Duration::from_secs(10);
/// Informative events of which one a message may come.
const FLOODS: [&str; 3] = [event::RETRY, event::COMMIT_CONFLICT, event::GONE];

/// The value of the field `event`.
#[derive(Default)]
struct Name(Option<String>);

impl Visit for Name {
    fn record_str(&mut self, field: &Field, value: &str) {
        if field.name() == "event" {
            self.0 = Some(value.to_owned());
        }
    }
    fn record_debug(&mut self, _: &Field, _: &dyn std::fmt::Debug) {}
}

fn name(event: &Event<'_>) -> Option<String> {
    let mut name = Name::default();
    event.record(&mut name);
    name.0
}

/// Counts the events of this program in `bsap_log_events_total`.
pub struct Count;

impl<S: Subscriber> Layer<S> for Count {
    fn on_event(&self, event: &Event<'_>, _: Context<'_, S>) {
        if let Some(name) = name(event) {
            let level = event.metadata().level().as_str().to_ascii_lowercase();
            metrics::get().log_events.add(&[&name, &level], 1);
        }
    }
}

/// Lets so many warnings and errors of one event through in a window. Lines of a library count by
/// their target.
#[derive(Clone)]
pub struct Limit {
    lines: u32,
    windows: Arc<Mutex<HashMap<String, Window>>>,
}

struct Window {
    since: Instant,
    passed: u32,
    held: u64,
}

impl Limit {
    /// At most `lines` in a window; 0 lets everything through.
    pub fn new(lines: u32) -> Self {
        Self { lines, windows: Arc::default() }
    }

    /// Whether a line of `key` may be written now.
    fn passes(&self, key: String, now: Instant) -> bool {
        let mut windows = self.windows.lock().unwrap_or_else(PoisonError::into_inner);
        let window = windows.entry(key).or_insert(Window { since: now, passed: 0, held: 0 });
        let passes = window.passed < self.lines;
        if passes {
            window.passed += 1;
        } else {
            window.held += 1;
        }
        passes
    }

    /// Ends the windows that are over; what was held back in them.
    fn over(&self, now: Instant) -> Vec<(String, u64)> {
        let mut windows = self.windows.lock().unwrap_or_else(PoisonError::into_inner);
        let mut held = Vec::new();
        windows.retain(|key, window| {
            let over = now - window.since >= WINDOW;
            if over && window.held > 0 {
                held.push((key.clone(), window.held));
            }
            !over
        });
        held
    }

    /// Starts the thread that tells what was held back; it ends with the process.
    pub fn start(&self) {
        if self.lines == 0 {
            return;
        }
        let limit = self.clone();
        // Where no thread can be had, nothing else works either.
        let _ = std::thread::Builder::new().name("log-limit".into()).spawn(move || {
            loop {
                std::thread::sleep(Duration::from_secs(1));
                for (held, count) in limit.over(Instant::now()) {
                    warn!(
                        event = event::HELD_BACK,
                        held,
                        count,
                        seconds = WINDOW.as_secs(),
                        "lines were held back"
                    );
                }
            }
        });
    }
}

impl<S> Filter<S> for Limit {
    fn enabled(&self, _: &Metadata<'_>, _: &Context<'_, S>) -> bool {
        true
    }

    fn event_enabled(&self, event: &Event<'_>, _: &Context<'_, S>) -> bool {
        if self.lines == 0 {
            return true;
        }
        let grave = *event.metadata().level() <= Level::WARN;
        let name = name(event);
        let limited = match &name {
            Some(name) => name != event::HELD_BACK && (grave || FLOODS.contains(&name.as_str())),
            None => grave,
        };
        let key = || name.unwrap_or_else(|| event.metadata().target().to_owned());
        !limited || self.passes(key(), Instant::now())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_flood_is_cut_off_and_counted_and_others_pass() {
        let limit = Limit::new(2);
        let start = Instant::now();
        let passed = (0..10).filter(|_| limit.passes("dead_letter".into(), start)).count();
        assert_eq!(passed, 2);
        assert!(limit.passes("shed".into(), start));
        assert!(limit.over(start + WINDOW / 2).is_empty());
        assert_eq!(limit.over(start + WINDOW), [("dead_letter".to_owned(), 8)]);
        assert!(limit.passes("dead_letter".into(), start + WINDOW));
    }
}
