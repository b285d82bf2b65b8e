//! The result of a try: what was found, what is stored, and what is not, with reasons.

use serde::Serialize;

use crate::commands::shared::printing::Output;
use crate::watch::Tracker;

/// Most reasons that are printed, the most frequent first; all are in the JSON.
const MAX_PRINTED_REASONS: usize = 20;
/// Most failures of which the path is printed.
const MAX_PRINTED_FAILURES: usize = 20;

/// The result, as `--json` prints it. `found` is the sum of `stored`, `skipped` and `pending`.
#[derive(Debug, Serialize)]
pub struct TryOutcome {
    /// Files and addresses that were found.
    pub found: usize,
    /// Those that are stored and can be searched.
    pub stored: usize,
    /// Those that are not stored.
    pub skipped: Vec<SkippedFile>,
    /// Seconds since the start.
    pub seconds: f64,
    /// Those of `stored` that had been stored before this start.
    pub unchanged: usize,
    /// Those of `skipped` that should have been stored.
    pub failed: usize,
    /// Pictures that were not stored yet when the program was stopped.
    pub pending: usize,
    /// The model that embedded them.
    pub model: String,
    /// Folder of the table.
    pub table: String,
}

/// A file that is not stored.
#[derive(Debug, Serialize)]
pub struct SkippedFile {
    /// Its path or address.
    pub path: String,
    /// Why it is not stored.
    pub reason: String,
}

impl TryOutcome {
    /// Reads the result from the tracker.
    pub fn new(tracker: &Tracker, seconds: f64, model: String, table: String) -> Self {
        let counts = tracker.counts();
        let skipped = tracker.skipped().into_iter().map(|(path, reason)| SkippedFile {
            path: path.to_owned(),
            reason: reason.reason.clone(),
        });
        Self {
            found: counts.found,
            stored: counts.stored,
            skipped: skipped.collect(),
            seconds: (seconds * 10.0).round() / 10.0,
            unchanged: counts.unchanged,
            failed: counts.failed,
            pending: counts.pending,
            model,
            table,
        }
    }
}

/// Prints what is stored, and what is not by reason.
pub fn print_summary(tracker: &Tracker, seconds: f64, output: Output) {
    let counts = tracker.counts();
    let unchanged = match counts.unchanged {
        0 => String::new(),
        n => format!(" ({n} of them since an earlier start)"),
    };
    output.line(format_args!(
        "{} files found: {} stored{unchanged}, {} skipped, in {seconds:.1} s",
        counts.found, counts.stored, counts.skipped
    ));
    let skipped = tracker.skipped();
    for (reason, count) in tracker.count_reasons().into_iter().take(MAX_PRINTED_REASONS) {
        let example = skipped.iter().find(|(_, skipped)| skipped.group == reason);
        let example = example.map_or("", |(path, _)| *path);
        output.line(format_args!("{count:>10}  {reason}, for example {example}"));
    }
    let failures: Vec<_> = skipped.iter().filter(|(_, reason)| reason.is_failure).collect();
    if !failures.is_empty() {
        output.line(format_args!("{} should have been stored:", failures.len()));
    }
    for (path, reason) in failures.iter().take(MAX_PRINTED_FAILURES) {
        output.line(format_args!("  {path}: {}", reason.reason));
    }
    if failures.len() > MAX_PRINTED_FAILURES {
        output.line(format_args!(
            "  and {} more; --json lists all of them",
            failures.len() - MAX_PRINTED_FAILURES
        ));
    }
}
