//! The metrics of a process: each declared once, counted anywhere, written as Prometheus reads them.
//!
//! To add a metric, add an entry to the list below and run `just generate`, which writes
//! `ops/metrics.md` from it. Labels have few values, all known beforehand: never an id, an address or
//! a text of somebody else's. A name is not changed without a note in the CHANGELOG.

mod instruments;
pub mod otlp_metrics;

use std::fmt::Write as _;
use std::sync::{Arc, LazyLock, Mutex, PoisonError};

use prometheus_client::encoding::prometheus_text;
use prometheus_client::registry::Registry;

pub use instruments::{Counter, Gauge, Histogram};

/// What is known of a metric.
#[derive(Debug, Clone, Copy)]
pub struct MetricDescription {
    /// Its name as Prometheus shows it.
    pub name: &'static str,
    /// `counter`, `gauge` or `histogram`.
    pub kind: &'static str,
    /// Its labels.
    pub labels: &'static [&'static str],
    /// What it tells.
    pub about: &'static str,
}

macro_rules! metrics {
    ($($field:ident: $kind:ident, $name:literal, [$($label:literal),*], $about:literal;)*) => {
        /// Every metric of this process.
        pub struct Metrics {
            $(#[doc = concat!("`", $name, "`: ", $about)] pub $field: $kind,)*
            registry: Registry,
        }

        /// Every metric, in the order of `ops/metrics.md`.
        pub const METRIC_DESCRIPTIONS: &[MetricDescription] = &[$(MetricDescription {
            name: $name,
            kind: $kind::KIND,
            labels: &[$($label),*],
            about: $about,
        }),*];

        impl Metrics {
            fn new() -> Self {
                let mut registry = Registry::default();
                Self {
                    $($field: $kind::register(&mut registry, $name, &[$($label),*], $about),)*
                    registry,
                }
            }
        }
    };
}

metrics! {
    build_info: Gauge, "bsap_build_info", ["version", "role"],
        "Always 1. The version and the role (`worker`, `query worker`) of the process.";
    start_time: Gauge, "bsap_start_time_seconds", [],
        "When the process started, in seconds since 1970.";
    clock: Gauge, "bsap_clock_seconds", [],
        "The clock of the process when it was asked, in seconds since 1970: compare with that of the monitor.";
    log_events: Counter, "bsap_log_events_total", ["event", "level"],
        "Log events, counted before any are held back; ops/log-events.md says what each means.";

    otlp_dropped: Counter, "bsap_otlp_dropped_total", ["signal"],
        "Spans (`traces`) and requests (`metrics`) that a collector did not take, or that came too fast.";

    ingest_events: Counter, "bsap_ingest_events_total", ["outcome"],
        "Events settled: `embedded`, `deleted`, `gone` (no image to fetch), `dead_lettered`.";
    dead_letters: Counter, "bsap_dead_letters_total", ["stage", "code"],
        "Messages put aside, by the stage that refused them and why.";
    rows_stored: Counter, "bsap_rows_stored_total", [],
        "Rows stored in the table.";
    image_bytes: Counter, "bsap_image_bytes_total", [],
        "Bytes of the images that were fetched.";
    ingest_stage_seconds: Histogram, "bsap_ingest_stage_seconds", ["stage"],
        "How long an image took in `fetch`, `decode` (with the wait for a turn) and `embed` (with the wait for its batch).";
    model_batch_seconds: Histogram, "bsap_model_batch_seconds", [],
        "How long the image tower computed a batch.";
    model_wait_seconds: Histogram, "bsap_model_wait_seconds", [],
        "How long the image tower waited for a batch: where this grows while the worker lags, fetching and decoding are the bottleneck.";
    commit_seconds: Histogram, "bsap_commit_seconds", [],
        "How long a commit to the table took, with its files and its retries.";
    commit_bytes: Counter, "bsap_commit_bytes_total", [],
        "Bytes of the files that commits added.";
    event_age_seconds: Histogram, "bsap_event_age_seconds", [],
        "How old the oldest event of a commit was when it was stored. Nothing where events carry no time; below 0 (the first bucket) where clocks differ.";
    last_commit: Gauge, "bsap_last_commit_time_seconds", [],
        "When rows or positions were last stored, in seconds since 1970.";
    table_version: Gauge, "bsap_table_version", [],
        "Version of the table after the last commit, or that is served.";
    lag_messages: Gauge, "bsap_lag_messages", [],
        "Messages of this worker's partitions that are not stored yet. NaN: not known yet.";
    in_flight_messages: Gauge, "bsap_in_flight_messages", [],
        "Messages in the pipeline, taken from Kafka and not settled.";
    brokers_up: Gauge, "bsap_kafka_brokers_up", [],
        "Brokers that the worker is connected to, looked at every 5 s.";
    assigned_partitions: Gauge, "bsap_assigned_partitions", [],
        "Partitions that are this worker's.";
    poll_age: Gauge, "bsap_poll_age_seconds", [],
        "Since Kafka was last polled. NaN: not polled yet.";
    pipeline_age: Gauge, "bsap_pipeline_age_seconds", [],
        "Since the pipeline last took a step; it takes one at least every `ingest.heartbeat_seconds`.";

    searches: Counter, "bsap_searches_total", ["normaliser"],
        "Queries answered.";
    search_seconds: Histogram, "bsap_search_seconds", ["phase"],
        "How long the parts of an answer took: `text` (embedding it), `wait` (for a pass over the catalogue), `scan` (that pass), `rank` (exact scores and places).";
    feedback: Counter, "bsap_feedback_total", ["verdict"],
        "Results that users called `right` or `wrong`.";
    search_results: Counter, "bsap_search_results_total", [],
        "Results of these queries.";
    search_reranked: Counter, "bsap_search_reranked_total", [],
        "Results whose place is not that of plain CLIP.";
    balance_queries: Gauge, "bsap_balance_window_queries", [],
        "Different queries in the window of `balance.drift`, which the following are shares of.";
    balance_top_hit_changed: Gauge, "bsap_balance_top_hit_changed_ratio", ["period"],
        "Share of queries whose first hit is not that of plain CLIP: `now`, and at `calibration`. NaN: not known.";
    balance_no_match: Gauge, "bsap_balance_no_match_ratio", ["period"],
        "Share of queries that nothing matches: `now`, and at `calibration`. NaN: not known.";
    balance_hubness: Gauge, "bsap_balance_hubness_ratio", ["period"],
        "Skewness of how often an image is first, over that by plain CLIP: `now`, and at `calibration`. NaN: not known.";
    balance_drift: Gauge, "bsap_balance_drift", [],
        "How far the mean auxiliary score of the images has moved since calibration, in standard deviations that it had over the images then. NaN: not known.";
    balance_std: Gauge, "bsap_balance_std_ratio", [],
        "Mean standard deviation of the images' auxiliary scores, over that at calibration. NaN: not known.";
    http_requests: Counter, "bsap_http_requests_total", ["route", "status"],
        "HTTP requests answered.";
    http_request_seconds: Histogram, "bsap_http_request_seconds", ["route"],
        "How long HTTP requests took, until the answer began.";
    snapshot_images: Gauge, "bsap_snapshot_images", [],
        "Images that are served.";
    snapshot_ready: Gauge, "bsap_snapshot_ready", [],
        "1 where the whole table has been read, else 0.";
    last_table_refresh: Gauge, "bsap_last_table_refresh_time_seconds", [],
        "When the table was last looked at with success, in seconds since 1970.";
}

/// What a process knows of itself; asked by its probes and before its metrics are written.
pub trait HealthProbe: Send + Sync {
    /// Sets the gauges that only time changes.
    fn update_gauges(&self);
    /// Why the process should be restarted, if it should.
    fn check_liveness(&self) -> Result<(), String>;
    /// Why the process has nothing to offer yet, if so.
    fn check_readiness(&self) -> Result<(), String>;
}

static METRICS: LazyLock<Metrics> = LazyLock::new(Metrics::new);

/// The metrics of this process.
pub fn global() -> &'static Metrics {
    &METRICS
}

/// What the process is; called once, at its start.
pub fn record_start(role: &str) {
    let metrics = global();
    metrics.build_info.set(&[env!("CARGO_PKG_VERSION"), role], 1.0);
    metrics.start_time.set(&[], unix_seconds());
    if role == "worker" {
        // A rate over a series that begins with its first event does not see that event.
        for outcome in ["embedded", "deleted", "not_found", "dead_lettered"] {
            metrics.ingest_events.add(&[outcome], 0);
        }
    }
}

static HEALTH_PROBE: Mutex<Option<Arc<dyn HealthProbe>>> = Mutex::new(None);

/// Who is asked for the gauges that only time changes, from now on.
pub fn set_health_probe(health: Arc<dyn HealthProbe>) {
    *HEALTH_PROBE.lock().unwrap_or_else(PoisonError::into_inner) = Some(health);
}

/// Seconds since 1970.
pub fn unix_seconds() -> f64 {
    chrono::Utc::now().timestamp_micros() as f64 / 1e6
}

/// The content type of [`text`].
pub const PROMETHEUS_CONTENT_TYPE: &str = "text/plain; version=0.0.4; charset=utf-8";

/// All metrics in Prometheus' text format, version 0.0.4.
pub fn render_prometheus() -> String {
    if let Some(health) = &*HEALTH_PROBE.lock().unwrap_or_else(PoisonError::into_inner) {
        health.update_gauges();
    }
    let metrics = global();
    metrics.clock.set(&[], unix_seconds());
    let mut text = String::new();
    // Writing to a string cannot fail.
    let _ = prometheus_text::encode(&mut text, &metrics.registry);
    text
}

/// The page `ops/metrics.md`.
pub fn render_markdown() -> String {
    let mut page = String::from(
        "# Metrics\n\n\
         A worker and a query worker serve them at `http://<metrics.listen>/metrics`, in Prometheus' text\n\
         format. A series appears when there is something to tell; a value that is not known is NaN or\n\
         missing, never 0. Buckets of `_seconds` histograms\n\
         are 1, 2.5 and 5 times powers of ten from 1 ms to 500 s. This page is written by `bsap config metrics`\n\
         from `src/metrics/mod.rs`.\n\n\
         | metric | kind | labels | what it tells |\n\
         | --- | --- | --- | --- |\n",
    );
    for metric in METRIC_DESCRIPTIONS {
        let labels: Vec<String> = metric.labels.iter().map(|label| format!("`{label}`")).collect();
        let _ = writeln!(
            page,
            "| `{}` | {} | {} | {} |",
            metric.name,
            metric.kind,
            labels.join(", "),
            metric.about
        );
    }
    page
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn the_page_is_current() {
        let page = std::fs::read_to_string("ops/metrics.md").unwrap();
        assert!(page == render_markdown(), "ops/metrics.md is not current: run `just generate`");
    }

    #[test]
    fn names_follow_the_convention() {
        let names: BTreeSet<_> = METRIC_DESCRIPTIONS.iter().map(|metric| metric.name).collect();
        assert_eq!(names.len(), METRIC_DESCRIPTIONS.len());
        for metric in METRIC_DESCRIPTIONS {
            assert!(metric.name.starts_with("bsap_"), "{}", metric.name);
            assert_eq!(
                metric.name.ends_with("_total"),
                metric.kind == "counter",
                "{}",
                metric.name
            );
            assert!(metric.about.ends_with('.'), "{}", metric.name);
        }
    }

    #[test]
    fn what_is_counted_is_written_as_prometheus_reads_it() {
        let metrics = global();
        metrics.ingest_events.add(&["embedded"], 2);
        metrics.lag_messages.set(&[], f64::NAN);
        metrics.ingest_stage_seconds.observe(&["fetch"], 0.003);
        let text = render_prometheus();
        let has = |line: &str| assert!(text.lines().any(|l| l.starts_with(line)), "{line}: {text}");
        has("# TYPE bsap_ingest_events_total counter");
        has("bsap_ingest_events_total{outcome=\"embedded\"} 2");
        has("bsap_lag_messages NaN");
        has("bsap_stage_seconds_bucket{stage=\"fetch\",le=\"0.005\"} 1");
        has("bsap_stage_seconds_count{stage=\"fetch\"} 1");
    }
}
