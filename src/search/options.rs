//! The options of the section `[search]`.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::balance::normalise::Normaliser;
use crate::balance::proposal::CAUTIOUS_WEIGHT;
use crate::{clip, validate};

/// How queries are answered and how the table is followed.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct SearchOptions {
    /// Interval at which the table is polled for new commits, in milliseconds.
    pub poll_ms: u64,
    /// Number of results of a query that does not set `k`.
    pub default_k: usize,
    /// Largest `k` that a query may set.
    pub max_k: usize,
    /// Lowest rank that paging can return.
    pub max_depth: usize,
    /// Lifetime of a cursor after its page was returned, in seconds.
    pub cursor_seconds: u64,
    /// Memory for older versions of the catalogue that cursors still refer to, in MiB. If it does not
    /// suffice, the oldest cursors expire early.
    pub cursor_mib: u64,
    /// Maximum length of a query text, in characters. A text encoder reads at most 77 tokens.
    pub max_text_chars: usize,
    /// Number of query embeddings that are cached for repeated queries, counted separately for texts
    /// and for pictures.
    pub cached_queries: usize,
    /// Maximum memory of a loaded generation, in MiB; 0 means four fifths of the memory of the machine
    /// or of its control group. If the catalogue needs more, `bsap serve` does not start; if it grows
    /// past the limit later, the last version that fitted is served and `snapshot.memory_exceeded` is
    /// logged.
    pub memory_mib: u64,
    /// Checkpoint of a second model, whose generation is being filled as a standby or was live before.
    /// Its table is held in memory too, so that a candidate, a promotion and a rollback to it need no
    /// restart. Empty: none. If `memory_mib` is 0, each of the two generations gets half of that.
    pub standby_checkpoint: String,
    /// Branch, tag or commit of `standby_checkpoint` if that is a model of the hub; also of the
    /// checkpoint that `bsap reindex model` is given.
    pub standby_revision: String,
    /// Number of threads that scan; 0 means one per core.
    pub threads: usize,
    /// Maximum number of queries that share a pass over the catalogue. A larger number makes each of
    /// them wait longer.
    pub max_queries_per_scan: usize,
    /// Number of queries that may wait for a pass; further queries are rejected with status 429.
    pub queue_capacity: usize,
    /// Normaliser of a newly created catalogue: `raw`, `softmax`, `zscore`, `range` or `nnn`. Later
    /// changes are made in the catalogue's state.
    pub normaliser: Normaliser,
    /// Weight of the normalised score in the balanced score of a newly created catalogue, from 0
    /// (plain CLIP) to 1. How well a prompt set fits the queries is not known at first, so that it is
    /// small: measure before you raise it.
    pub weight: f32,
    /// λ of the normaliser `nnn`, from 0 to 10.
    pub lambda: f32,
    /// Interval at which `balance.drift` is logged, in seconds: how strongly balancing changes answers
    /// now, compared with the time of calibration. 0: never.
    pub drift_interval_seconds: u64,
    /// Interval at which it is measured how well prompt sets fit the last distinct queries (`balance.fit`),
    /// in seconds. Their embeddings are kept in memory for that, not their texts. 0: never.
    pub fit_interval_seconds: u64,
    /// Duration above which a query is logged as `search.slow`, in milliseconds. 0: never.
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
            normaliser: Normaliser::Nnn,
            weight: CAUTIOUS_WEIGHT,
            lambda: 1.0,
            drift_interval_seconds: 60,
            fit_interval_seconds: 60,
            slow_ms: 1_000,
        }
    }
}

impl SearchOptions {
    /// Returns one line per invalid option.
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
        validate::check_range(p, "fit_interval_seconds", self.fit_interval_seconds, 0, 86_400);
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
                .extend(model.validate().into_iter().map(|problem| format!("standby_{problem}")));
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
