//! The metrics of a process: each declared once, and rendered in the text format of Prometheus.
//!
//! To add a metric, add an entry to the list below and run `just generate`, which writes
//! `ops/metrics.md` from it. Labels have few values, all known in advance: never an id, an address or
//! a text from a message or request. A changed name needs a note in the CHANGELOG.

mod instruments;
pub mod otlp_metrics;

use std::fmt::Write as _;
use std::sync::{Arc, LazyLock, Mutex, PoisonError};

use prometheus_client::encoding::prometheus_text;
use prometheus_client::registry::Registry;

pub use instruments::{Counter, Gauge, Histogram};

/// The declaration of a metric.
#[derive(Debug, Clone, Copy)]
pub struct MetricDescription {
    /// Name as in Prometheus.
    pub name: &'static str,
    /// `counter`, `gauge` or `histogram`.
    pub kind: &'static str,
    /// Names of its labels, in the order in which values are given.
    pub labels: &'static [&'static str],
    /// What it measures, with the unit.
    pub about: &'static str,
}

macro_rules! define_metrics {
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

define_metrics! {
    build_info: Gauge, "bsap_build_info", ["version", "role"],
        "Always 1. The version and the role (`worker`, `query worker`) of the process.";
    start_time: Gauge, "bsap_start_time_seconds", [],
        "When the process started, in seconds since 1970.";
    clock: Gauge, "bsap_clock_seconds", [],
        "The clock of the process when its metrics were read, in seconds since 1970: compare it with the clock of Prometheus.";
    log_events: Counter, "bsap_log_events_total", ["event", "level"],
        "Log events, suppressed ones included; ops/log-events.md says what each means.";

    otlp_dropped: Counter, "bsap_otlp_dropped_total", ["signal"],
        "Spans (`traces`) and requests (`metrics`) that the collector did not accept, or that came too fast.";

    ingest_events: Counter, "bsap_ingest_events_total", ["outcome"],
        "Events that were processed: `embedded`, `deleted`, `not_found` (the image no longer existed), `dead_lettered`.";
    dead_letters: Counter, "bsap_dead_letters_total", ["stage", "code"],
        "Messages that were dead-lettered, by the stage that failed and the code of the error.";
    rows_stored: Counter, "bsap_rows_stored_total", [],
        "Rows stored in the table.";
    image_bytes: Counter, "bsap_image_bytes_total", [],
        "Bytes of the images that were fetched.";
    ingest_stage_seconds: Histogram, "bsap_ingest_stage_seconds", ["stage"],
        "How long an image took in `fetch`, `decode` (including the wait for a permit) and `embed` (including the wait for its batch).";
    model_batch_seconds: Histogram, "bsap_model_batch_seconds", [],
        "How long the image encoder computed a batch.";
    model_wait_seconds: Histogram, "bsap_model_wait_seconds", [],
        "How long the image encoder waited for a batch: if this grows while the worker lags, fetching and decoding are the bottleneck.";
    commit_seconds: Histogram, "bsap_commit_seconds", [],
        "How long a commit to the table took, including its files and retries.";
    commit_bytes: Counter, "bsap_commit_bytes_total", [],
        "Bytes of the files that commits added.";
    event_age_seconds: Histogram, "bsap_event_age_seconds", [],
        "How old the oldest event of a commit was when it was stored. Nothing is observed if events have no time; values below 0 (in the first bucket) mean that clocks differ.";
    last_commit: Gauge, "bsap_last_commit_time_seconds", [],
        "When rows or positions were last stored, in seconds since 1970.";
    table_version: Gauge, "bsap_table_version", [],
        "Version of the table after the last commit of a worker, or that a query worker serves.";
    lag_messages: Gauge, "bsap_lag_messages", [],
        "Messages of the partitions of this worker that are not stored yet. NaN: not known, as without partitions.";
    in_flight_messages: Gauge, "bsap_in_flight_messages", [],
        "Messages in the pipeline: read from Kafka, and not processed or not stored yet.";
    brokers_up: Gauge, "bsap_kafka_brokers_up", [],
        "Brokers that the worker is connected to, checked every 5 s.";
    source_state: Gauge, "bsap_source_state", ["state"],
        "1 for the state of the worker's source, 0 for the others: `consuming`, `starting`, `no_partitions_assigned`, `dead_letter_topic_missing`, `log_replaced` (of `bsap status` only), `topic_missing`, `not_authorised`, `authentication_failed`, `brokers_unreachable`.";
    lost_messages: Counter, "bsap_lost_messages_total", ["reason"],
        "Messages that were removed before they were processed: by `retention`, or with a log that is gone (`log_replaced`, as far as its end is known).";
    assigned_partitions: Gauge, "bsap_assigned_partitions", [],
        "Partitions assigned to this worker.";
    poll_age: Gauge, "bsap_poll_age_seconds", [],
        "Seconds since Kafka was last polled. NaN: not polled yet.";
    pipeline_age: Gauge, "bsap_pipeline_age_seconds", [],
        "Seconds since the last iteration of the main loop of the pipeline, which iterates at least every `ingest.heartbeat_seconds`.";

    searches: Counter, "bsap_searches_total", ["normaliser"],
        "Queries answered.";
    search_seconds: Histogram, "bsap_search_seconds", ["phase"],
        "How long the phases of an answer took: `embed` (embedding the query), `wait` (for a scan of the catalogue), `scan`, `rank` (exact scores and ranks).";
    feedback: Counter, "bsap_feedback_total", ["verdict"],
        "Results that users judged `right` or `wrong`.";
    search_results: Counter, "bsap_search_results_total", [],
        "Results in these answers.";
    search_reranked: Counter, "bsap_search_reranked_total", [],
        "Results whose rank is not that of plain CLIP.";
    balance_queries: Gauge, "bsap_balance_window_queries", [],
        "Different queries in the window of `balance.drift`; the following ratios are shares of them.";
    balance_top_hit_changed: Gauge, "bsap_balance_top_hit_changed_ratio", ["period"],
        "Share of queries whose first hit is not that of plain CLIP: `current`, and at calibration (`baseline`). NaN: not known.";
    balance_no_match: Gauge, "bsap_balance_no_match_ratio", ["period"],
        "Share of queries that nothing matches: `current`, and at calibration (`baseline`). NaN: not known.";
    balance_hubness: Gauge, "bsap_balance_hubness_ratio", ["period"],
        "Skewness of how often an image is first, divided by that of plain CLIP: `current`, and at calibration (`baseline`). NaN: not known.";
    balance_drift: Gauge, "bsap_balance_drift", [],
        "How far the mean auxiliary score of the images has moved since calibration, in standard deviations over the images at calibration. NaN: not known.";
    balance_std: Gauge, "bsap_balance_std_ratio", [],
        "Mean standard deviation of the auxiliary scores of the images, divided by that at calibration. NaN: not known.";
    balance_fit: Gauge, "bsap_balance_fit", ["role", "bound"],
        "Correlation, over the images, of the corrections by the prompt set with those by recent distinct queries: `value`, and its 95 % interval (`low`, `high`); `role` is `live` or `candidate`. NaN: not known, as with fewer than 64 queries.";
    balance_fit_queries: Gauge, "bsap_balance_fit_queries", ["role"],
        "Distinct queries from which `bsap_balance_fit` was computed.";
    balance_concentration: Gauge, "bsap_balance_concentration", ["role"],
        "Mean correction of the first images of these queries by plain CLIP, less the mean of the catalogue, in standard deviations of the catalogue; `role` is `live` or `candidate`. NaN: not known.";
    balance_weight: Gauge, "bsap_balance_weight", ["role", "kind"],
        "Weight of the balancing: `served`, and `proposed` by fit, concentration and size of the prompt set; 0 is plain CLIP. `role` is `live` or `candidate`. NaN: not known.";
    http_requests: Counter, "bsap_http_requests_total", ["route", "status"],
        "HTTP requests answered.";
    http_request_seconds: Histogram, "bsap_http_request_seconds", ["route"],
        "How long HTTP requests took until the answer started.";
    snapshot_images: Gauge, "bsap_snapshot_images", [],
        "Images that are served.";
    snapshot_ready: Gauge, "bsap_snapshot_ready", [],
        "1 if the whole table has been read, otherwise 0.";
    last_table_refresh: Gauge, "bsap_last_table_refresh_time_seconds", [],
        "When the table was last polled successfully, in seconds since 1970.";
}

/// The health of a process, for its probes and for gauges that change with time alone.
pub trait HealthProbe: Send + Sync {
    /// Sets the gauges that change with time alone; called before metrics are rendered.
    fn update_gauges(&self);
    /// Returns the reason as an error if the process should be restarted.
    fn check_liveness(&self) -> Result<(), String>;
    /// Returns what a ready process answers; the reason as an error if it is not ready to work.
    fn check_readiness(&self) -> Result<&'static str, String>;
}

static METRICS: LazyLock<Metrics> = LazyLock::new(Metrics::new);

/// Returns the metrics of this process.
pub fn global() -> &'static Metrics {
    &METRICS
}

/// Sets version, role (`worker` or `query worker`) and start time; called once, at the start.
pub fn record_process_start(role: &str) {
    let metrics = global();
    metrics.build_info.set(&[env!("CARGO_PKG_VERSION"), role], 1.0);
    metrics.start_time.set(&[], unix_seconds_now());
    if role == "worker" {
        // PromQL's `rate` ignores the first sample of a series: each series starts at 0, so that the
        // first event counts.
        for outcome in ["embedded", "deleted", "not_found", "dead_lettered"] {
            metrics.ingest_events.add(&[outcome], 0);
        }
        for reason in ["retention", "log_replaced"] {
            metrics.lost_messages.add(&[reason], 0);
        }
    }
}

static HEALTH_PROBE: Mutex<Option<Arc<dyn HealthProbe>>> = Mutex::new(None);

/// Sets the probe that updates the gauges before metrics are rendered.
pub fn set_health_probe(health: Arc<dyn HealthProbe>) {
    *HEALTH_PROBE.lock().unwrap_or_else(PoisonError::into_inner) = Some(health);
}

/// Returns the current time in seconds since 1970.
pub fn unix_seconds_now() -> f64 {
    chrono::Utc::now().timestamp_micros() as f64 / 1e6
}

/// The content type of [`render_prometheus`].
pub const PROMETHEUS_CONTENT_TYPE: &str = "text/plain; version=0.0.4; charset=utf-8";

/// Renders all metrics in the text format of Prometheus, version 0.0.4.
pub fn render_prometheus() -> String {
    if let Some(health) = &*HEALTH_PROBE.lock().unwrap_or_else(PoisonError::into_inner) {
        health.update_gauges();
    }
    let metrics = global();
    metrics.clock.set(&[], unix_seconds_now());
    let mut text = String::new();
    // Writing to a string cannot fail.
    let _ = prometheus_text::encode(&mut text, &metrics.registry);
    text
}

/// Renders the page `ops/metrics.md`.
pub fn render_metric_reference() -> String {
    let mut page = String::from(
        "# Metrics\n\n\
         A worker and a query worker serve them at `http://<metrics.listen>/metrics`, in the text format of\n\
         Prometheus. A series appears with its first value; a value that is not known is NaN or\n\
         missing, never 0. Buckets of `_seconds` histograms\n\
         are 1, 2.5 and 5 times powers of ten from 1 ms to 500 s. This page is generated by `bsap config metrics`\n\
         from `src/telemetry/metrics/mod.rs`.\n\n\
         | metric | kind | labels | what it measures |\n\
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
    fn the_generated_page_is_current() {
        let page = std::fs::read_to_string("ops/metrics.md").unwrap();
        assert!(
            page == render_metric_reference(),
            "ops/metrics.md is not current: run `just generate`"
        );
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
    fn values_are_rendered_in_the_text_format_of_prometheus() {
        let metrics = global();
        metrics.ingest_events.add(&["embedded"], 2);
        metrics.lag_messages.set(&[], f64::NAN);
        metrics.ingest_stage_seconds.observe_seconds(&["fetch"], 0.003);
        let text = render_prometheus();
        let has = |line: &str| assert!(text.lines().any(|l| l.starts_with(line)), "{line}: {text}");
        has("# TYPE bsap_ingest_events_total counter");
        has("bsap_ingest_events_total{outcome=\"embedded\"} 2");
        has("bsap_lag_messages NaN");
        has("bsap_ingest_stage_seconds_bucket{stage=\"fetch\",le=\"0.005\"} 1");
        has("bsap_ingest_stage_seconds_count{stage=\"fetch\"} 1");
    }
}
