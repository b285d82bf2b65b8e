//! Options of the section `[search]`.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::balance::normalise::Normaliser;
use crate::{clip, validate};

/// How queries are answered and the table is followed.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct SearchOptions {
    /// How often the table is asked for new commits, in milliseconds.
    pub poll_ms: u64,
    /// Results of a query that does not say how many.
    pub default_k: usize,
    /// Most results of a query.
    pub max_k: usize,
    /// Deepest place that paging reaches.
    pub max_depth: usize,
    /// How long a cursor can be used after its page, in seconds.
    pub cursor_seconds: u64,
    /// Memory for versions of the catalogue that cursors point to and that are not the newest any
    /// more, in MiB; the oldest cursors expire early where it does not suffice.
    pub cursor_mib: u64,
    /// Longest query text, in characters. A text tower reads 77 tokens at most.
    pub max_text_chars: usize,
    /// Query embeddings kept for repeated queries, of texts and of pictures each.
    pub cached_queries: usize,
    /// Most memory of a loaded generation, in MiB; 0 takes four fifths of the machine's, or of its
    /// control group's. A catalogue that needs more is refused at the start; one that grows past it
    /// is served as it was, and the log says so.
    pub memory_mib: u64,
    /// Checkpoint of another model, whose generation is filled beside the live one or was live before:
    /// its table is held in memory too, so that a candidate and a promotion or a roll back to it need
    /// no restart. Empty: none. With `memory_mib` 0 each of the two gets half of that.
    pub standby_checkpoint: String,
    /// Branch, tag or commit of `candidate_checkpoint`, where it is a model of the hub; also of the
    /// checkpoint that `bsap reindex model` is given.
    pub standby_revision: String,
    /// Threads that scan; 0 takes as many as there are cores.
    pub threads: usize,
    /// Queries that share a pass over the catalogue. More make each of them wait longer.
    pub max_queries_per_scan: usize,
    /// Queries that wait for a pass; more are turned away with 429.
    pub queue_capacity: usize,
    /// How a catalogue that is made now serves: `raw`, `softmax`, `zscore`, `range` or `nnn`.
    /// Later changes go through the catalogue's state.
    pub normaliser: Normaliser,
    /// Weight of the balanced score in 0..=1, 0 being plain CLIP. Small is safe: evaluate on your
    /// own data before raising it.
    pub weight: f32,
    /// λ of `nnn`.
    pub lambda: f32,
    /// How often `balance.drift` is logged, in seconds: how far balancing goes now, beside the time of
    /// calibration. 0: never.
    pub drift_interval_seconds: u64,
    /// A query that takes longer is logged as `search.slow`, in milliseconds. 0: none is.
    pub slow_ms: u64,
}

impl Default for SearchOptions {
    fn default() -> Self {
        Self {
            poll_ms: 500,
            default_k: 24,
            max_k: 1000,
            max_depth: 10_000,
            cursor_seconds: 300,
            cursor_mib: 256,
            max_text_chars: 1000,
            cached_queries: 10_000,
            memory_mib: 0,
            standby_checkpoint: String::new(),
            standby_revision: "main".into(),
            threads: 0,
            max_queries_per_scan: 16,
            queue_capacity: 256,
            normaliser: Normaliser::Softmax,
            weight: 0.25,
            lambda: 1.0,
            drift_interval_seconds: 60,
            slow_ms: 1_000,
        }
    }
}

impl SearchOptions {
    /// What is wrong with these options, a line each.
    pub fn validate(&self) -> Vec<String> {
        let mut problems = Vec::new();
        let p = &mut problems;
        validate::check_range(p, "poll_ms", self.poll_ms, 10, 600_000);
        validate::check_range(p, "max_k", self.max_k as u64, 1, 100_000);
        validate::check_range(p, "default_k", self.default_k as u64, 1, self.max_k as u64);
        validate::check_range(p, "max_depth", self.max_depth as u64, self.max_k as u64, 1_000_000);
        validate::check_range(p, "cursor_seconds", self.cursor_seconds, 1, 86_400);
        validate::check_range(p, "cursor_mib", self.cursor_mib, 1, 1 << 20);
        validate::check_range(p, "max_text_chars", self.max_text_chars as u64, 1, 100_000);
        validate::check_range(p, "cached_queries", self.cached_queries as u64, 0, 10_000_000);
        validate::check_range(p, "memory_mib", self.memory_mib, 0, 1 << 24);
        validate::check_range(p, "drift_interval_seconds", self.drift_interval_seconds, 0, 86_400);
        validate::check_range(p, "threads", self.threads as u64, 0, 1024);
        validate::check_range(p, "max_queries_per_scan", self.max_queries_per_scan as u64, 1, 256);
        validate::check_range(p, "queue_capacity", self.queue_capacity as u64, 1, 100_000);
        if !self.standby_checkpoint.is_empty() {
            let model = clip::ModelOptions {
                checkpoint: self.standby_checkpoint.clone(),
                revision: self.standby_revision.clone(),
                ..clip::ModelOptions::default()
            };
            problems
                .extend(model.validate().into_iter().map(|problem| format!("candidate_{problem}")));
        }
        if !(0.0..=1.0).contains(&self.weight) {
            problems.push(format!("weight: {} is not between 0 and 1", self.weight));
        }
        if !(0.0..=10.0).contains(&self.lambda) {
            problems.push(format!("lambda: {} is not between 0 and 10", self.lambda));
        }
        problems
    }
}
