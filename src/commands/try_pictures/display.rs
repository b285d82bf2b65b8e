//! Progress for people: a bar on a terminal, otherwise a line every few seconds.

use std::collections::VecDeque;
use std::io::IsTerminal as _;
use std::time::{Duration, Instant};

use indicatif::{HumanDuration, ProgressBar, ProgressStyle};

use crate::commands::shared::printing::{Output, print_note};
use crate::watch::TrackerCounts;

/// Time over which the rate is measured.
const RATE_WINDOW: Duration = Duration::from_secs(60);
/// Shortest time after which a rate is shown.
const MIN_RATE_TIME: Duration = Duration::from_secs(3);
/// Interval of lines if there is no terminal.
const LINE_INTERVAL: Duration = Duration::from_secs(10);

/// The progress of storing what was found.
pub struct ProgressDisplay {
    bar: ProgressBar,
    /// Whether standard error is a terminal, so that the bar can be seen.
    is_terminal: bool,
    /// Numbers of finished pictures at earlier times.
    samples: VecDeque<(Instant, usize)>,
    last_line_at: Instant,
    /// Largest number of finished files that was shown.
    max_done: usize,
}

/// What is shown.
pub struct DisplayedProgress<'a> {
    /// Counts of what was found.
    pub counts: TrackerCounts,
    /// Pictures that are embedded and wait for the next commit.
    pub in_commit: usize,
    /// Whether the sources are still being listed for the first time.
    pub is_listing: bool,
    /// The most frequent reasons for skipping, with their counts.
    pub reasons: &'a [(String, usize)],
}

impl ProgressDisplay {
    /// Creates a display that shows nothing yet.
    pub fn new() -> anyhow::Result<Self> {
        let bar = ProgressBar::new(0);
        bar.set_style(
            ProgressStyle::with_template("  [{bar:30}] {pos}/{len} {wide_msg}")?
                .progress_chars("=> "),
        );
        let is_terminal = std::io::stderr().is_terminal();
        Ok(Self {
            bar,
            is_terminal,
            samples: VecDeque::new(),
            last_line_at: Instant::now(),
            max_done: 0,
        })
    }

    /// Shows the progress.
    pub fn show(&mut self, progress: &DisplayedProgress<'_>) {
        let counts = progress.counts;
        let pending = counts.pending.saturating_sub(progress.in_commit);
        // Rows that are committed but cannot be searched yet count in neither number.
        let done = (counts.found - pending).max(self.max_done.min(counts.found));
        self.max_done = done;
        let text = self.describe(progress, pending);
        if self.is_terminal {
            self.bar.set_length(counts.found as u64);
            self.bar.set_position(done as u64);
            self.bar.set_message(text);
            self.bar.tick();
        } else if self.last_line_at.elapsed() >= LINE_INTERVAL && pending > 0 {
            self.last_line_at = Instant::now();
            print_note!("{done} of {} {text}", counts.found);
        }
    }

    fn describe(&mut self, progress: &DisplayedProgress<'_>, pending: usize) -> String {
        let now = Instant::now();
        let finished = progress.counts.finished + progress.in_commit;
        self.samples.push_back((now, finished));
        while self.samples.front().is_some_and(|(at, _)| now - *at > RATE_WINDOW) {
            self.samples.pop_front();
        }
        let first = self.samples.front().filter(|(at, _)| now - *at >= MIN_RATE_TIME);
        let rate = first.map_or(0.0, |(at, before)| {
            finished.saturating_sub(*before) as f64 / (now - *at).as_secs_f64()
        });
        let mut parts = Vec::new();
        if progress.is_listing {
            parts.push("listing".to_owned());
        }
        if rate > 0.0 && pending > 0 {
            parts.push(format!("{rate:.1} a second"));
            let left = Duration::from_secs_f64((pending as f64 / rate).min(1e7));
            parts.push(format!("{} left", HumanDuration(left)));
        }
        if progress.counts.skipped > 0 {
            let reasons: Vec<String> = progress
                .reasons
                .iter()
                .map(|(reason, count)| format!("{count} {reason}"))
                .collect();
            parts.push(format!("{} skipped ({})", progress.counts.skipped, reasons.join("; ")));
        }
        parts.join(", ")
    }

    /// Prints a line above the bar.
    pub fn line(&self, output: Output, text: &str) {
        self.bar.suspend(|| output.line(format_args!("{text}")));
    }

    /// Removes the bar until it is shown again.
    pub fn clear(&mut self) {
        self.samples.clear();
        self.max_done = 0;
        self.bar.finish_and_clear();
        self.bar.reset();
    }
}
