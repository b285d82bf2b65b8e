//! Traces and metrics for an OpenTelemetry collector, by OTLP over HTTP with JSON bodies.
//!
//! Spans are made from the log events that have durations, so that each duration is measured in one
//! place; metrics are those of Prometheus. If the collector is slow or unreachable, queued spans are
//! lost; commits and answers never wait for it.

use std::time::Duration;

use chrono::Utc;
use percent_encoding::percent_decode_str;
use reqwest::header::{HeaderMap, HeaderName, HeaderValue};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};
use tokio::sync::mpsc;
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;
use tracing::field::{Field, Visit};
use tracing::{Event, Subscriber, warn};
use tracing_subscriber::Layer;
use tracing_subscriber::layer::Context;

use super::event;
use super::metrics::{self, otlp_metrics};
use crate::diagnosis::describe;
use crate::diagnosis::redact::{HIDDEN, redact};

/// Capacity of the queue of spans; if it is full, spans are dropped and counted.
const SPAN_QUEUE_CAPACITY: usize = 4_096;
/// Most spans in one request to the collector.
const MAX_SPANS_PER_REQUEST: usize = 512;
/// Timeout of a request to the collector.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(5);
/// Value of `otlp.endpoint` that disables the export.
pub const ENDPOINT_OFF: &str = "off";
/// The variable with headers of every request, such as a key: `name=value,name=value`, with
/// percent-encoded values.
const HEADERS_VAR: &str = "OTEL_EXPORTER_OTLP_HEADERS";
/// How long a process waits at its end until queued spans and the last metrics are sent.
pub const FLUSH_TIMEOUT: Duration = Duration::from_secs(3);

/// Where traces and metrics are sent, and how often.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct OtlpOptions {
    /// Address of a collector that accepts OTLP over HTTP, such as `http://collector:4318`. Empty: the
    /// value of the variable OTEL_EXPORTER_OTLP_ENDPOINT; without either nothing is sent. `off`:
    /// nothing is sent, whatever the variable says. Headers, such as a key, come from the variable
    /// OTEL_EXPORTER_OTLP_HEADERS (`name=value,name=value`).
    pub endpoint: String,
    /// How often traces and metrics are sent, in seconds.
    pub interval_seconds: u64,
}

impl Default for OtlpOptions {
    fn default() -> Self {
        Self { endpoint: String::new(), interval_seconds: 15 }
    }
}

impl OtlpOptions {
    /// Returns one line per invalid option.
    pub fn validate(&self) -> Vec<String> {
        let mut problems = Vec::new();
        crate::validate::check_range(
            &mut problems,
            "interval_seconds",
            self.interval_seconds,
            1,
            3_600,
        );
        let http = |e: &str| e.starts_with("http://") || e.starts_with("https://");
        if !self.endpoint.is_empty() && self.endpoint != ENDPOINT_OFF && !http(&self.endpoint) {
            // Without its scheme, an address is not recognised as one that has a password.
            let host = self.endpoint.rsplit_once('@').map(|(_, host)| format!("{HIDDEN}@{host}"));
            problems.push(format!(
                "endpoint: {:?} does not begin with http:// or https://, and is not \"off\"",
                host.as_ref().unwrap_or(&self.endpoint)
            ));
        }
        if self.collector_url().is_some() {
            problems.extend(headers_from_env().err());
        }
        problems
    }

    /// Returns the address of the collector, from the options or the environment; `None` if nothing is
    /// to be sent.
    fn collector_url(&self) -> Option<String> {
        let configured = Some(self.endpoint.clone()).filter(|endpoint| !endpoint.is_empty());
        let endpoint = configured.or_else(|| std::env::var("OTEL_EXPORTER_OTLP_ENDPOINT").ok())?;
        let endpoint = endpoint.trim_end_matches('/').to_owned();
        (!endpoint.is_empty() && endpoint != ENDPOINT_OFF).then_some(endpoint)
    }
}

/// Creates the layer that makes spans from log events and the exporter that sends them; `None` if
/// nothing is to be sent.
pub fn build_layer_and_exporter(options: &OtlpOptions) -> Option<(SpanLayer, OtlpExporter)> {
    let endpoint = options.collector_url()?;
    let (sender, span_receiver) = mpsc::channel(SPAN_QUEUE_CAPACITY);
    let headers = headers_from_env().ok()?;
    let client = reqwest::Client::builder().timeout(REQUEST_TIMEOUT).default_headers(headers);
    let client = client.build().ok()?;
    let interval = Duration::from_secs(options.interval_seconds);
    Some((
        SpanLayer { sender },
        OtlpExporter { endpoint, client, span_receiver, send_interval: interval },
    ))
}

fn headers_from_env() -> Result<HeaderMap, String> {
    parse_headers(&std::env::var(HEADERS_VAR).unwrap_or_default())
}

/// Parses the variable [`HEADERS_VAR`], as specified for exporters of OpenTelemetry. The error does not
/// contain the value, which may be a key.
fn parse_headers(text: &str) -> Result<HeaderMap, String> {
    let pairs = text.split(',').map(str::trim).filter(|pair| !pair.is_empty());
    let header = |pair: &str| {
        let (name, value) = pair.split_once('=')?;
        let value = percent_decode_str(value.trim()).collect::<Vec<u8>>();
        let mut value = HeaderValue::from_bytes(&value).ok()?;
        value.set_sensitive(true);
        Some((HeaderName::from_bytes(name.trim().as_bytes()).ok()?, value))
    };
    pairs
        .enumerate()
        .map(|(i, pair)| {
            let invalid = || format!("{HEADERS_VAR}: entry {} is not name=value", i + 1);
            header(pair).ok_or_else(invalid)
        })
        .collect()
}

/// Makes spans from the events `search` and `commit.succeeded`.
pub struct SpanLayer {
    sender: mpsc::Sender<Value>,
}

/// The fields of a log event by name.
#[derive(Default)]
struct EventFields(Map<String, Value>);

impl EventFields {
    fn text(&self, name: &str) -> &str {
        self.0.get(name).and_then(Value::as_str).unwrap_or_default()
    }

    fn milliseconds(&self, name: &str) -> f64 {
        self.0.get(name).and_then(Value::as_f64).unwrap_or_default()
    }
}

impl Visit for EventFields {
    fn record_f64(&mut self, field: &Field, value: f64) {
        self.0.insert(field.name().to_owned(), json!(value));
    }
    fn record_i64(&mut self, field: &Field, value: i64) {
        self.0.insert(field.name().to_owned(), json!(value));
    }
    fn record_u64(&mut self, field: &Field, value: u64) {
        self.0.insert(field.name().to_owned(), json!(value));
    }
    fn record_bool(&mut self, field: &Field, value: bool) {
        self.0.insert(field.name().to_owned(), json!(value));
    }
    fn record_str(&mut self, field: &Field, value: &str) {
        self.0.insert(field.name().to_owned(), json!(value));
    }
    fn record_debug(&mut self, field: &Field, value: &dyn std::fmt::Debug) {
        self.0.insert(field.name().to_owned(), json!(format!("{value:?}")));
    }
}

impl<S: Subscriber> Layer<S> for SpanLayer {
    fn on_event(&self, event: &Event<'_>, _: Context<'_, S>) {
        let mut fields = EventFields::default();
        event.record(&mut fields);
        for span in spans_from_event(&fields, Utc::now().timestamp_nanos_opt().unwrap_or_default())
        {
            if self.sender.try_send(span).is_err() {
                metrics::global().otlp_dropped.add(&["traces"], 1);
            }
        }
    }
}

/// Returns the spans of an event that ended at `now`, in nanoseconds since 1970.
fn spans_from_event(fields: &EventFields, now: i64) -> Vec<Value> {
    let before = |ms: f64| now - (ms * 1e6) as i64;
    match fields.text("event") {
        event::SEARCH => {
            let phases = ["embed", "wait", "scan", "rank"];
            let ms = phases.map(|phase| fields.milliseconds(&format!("{phase}_ms")));
            let trace = trace_id_or_new(fields.text("trace_id"));
            let caller = Some(fields.text("parent_id")).filter(|id| !id.is_empty());
            let phase_start = |phase: usize| before(ms[phase..].iter().sum());
            let query = span_json("search", &trace, caller, (phase_start(0), now), fields);
            let parent = query["spanId"].as_str().map(str::to_owned);
            let no_fields = EventFields::default();
            let phase_span = |(i, name): (usize, &&str)| {
                span_json(
                    name,
                    &trace,
                    parent.as_deref(),
                    (phase_start(i), phase_start(i + 1)),
                    &no_fields,
                )
            };
            phases.iter().enumerate().map(phase_span).chain([query]).collect()
        }
        event::COMMIT_SUCCEEDED => {
            let commit = fields.milliseconds("commit_ms");
            // The stages overlap: their durations are attributes instead of spans.
            let own_trace_id = trace_id_or_new("");
            let traces = fields.text("trace_ids").split_whitespace().map(trace_id_or_new);
            let times = (before(commit), now);
            std::iter::once(own_trace_id)
                .chain(traces)
                .map(|t| span_json("commit", &t, None, times, fields))
                .collect()
        }
        _ => Vec::new(),
    }
}

/// Returns `trace_id`, or a random one if it is empty.
fn trace_id_or_new(trace_id: &str) -> String {
    if trace_id.is_empty() {
        format!("{:032x}", rand::random::<u128>().max(1))
    } else {
        trace_id.into()
    }
}

fn span_json(
    name: &str,
    trace: &str,
    parent: Option<&str>,
    (start, end): (i64, i64),
    fields: &EventFields,
) -> Value {
    let is_attribute =
        |key: &str| !matches!(key, "event" | "message" | "trace_id" | "parent_id" | "trace_ids");
    let attributes: Vec<Value> =
        fields.0.iter().filter(|(key, _)| is_attribute(key)).map(attribute_json).collect();
    let mut span = json!({
        "traceId": trace,
        "spanId": format!("{:016x}", rand::random::<u64>().max(1)),
        "name": name,
        "kind": 1,
        "startTimeUnixNano": start.to_string(),
        "endTimeUnixNano": end.to_string(),
        "attributes": attributes,
    });
    if let Some(parent) = parent {
        span["parentSpanId"] = json!(parent);
    }
    span
}

fn attribute_json((key, value): (&String, &Value)) -> Value {
    let value = match value {
        Value::Bool(flag) => json!({"boolValue": flag}),
        // The JSON mapping of protobuf writes 64-bit integers as text.
        Value::Number(n) if !n.is_f64() => json!({"intValue": n.to_string()}),
        Value::Number(n) => json!({"doubleValue": n}),
        Value::String(text) => json!({"stringValue": redact(text)}),
        other => json!({"stringValue": redact(&other.to_string())}),
    };
    json!({"key": key, "value": value})
}

/// Sends queued spans and the current metrics to the collector.
pub struct OtlpExporter {
    endpoint: String,
    client: reqwest::Client,
    span_receiver: mpsc::Receiver<Value>,
    send_interval: Duration,
}

impl OtlpExporter {
    /// Sends at every interval until `token` is cancelled, then once more.
    pub async fn run(mut self, token: CancellationToken) {
        let mut due = tokio::time::interval(self.send_interval);
        due.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        loop {
            let is_last = tokio::select! {
                _ = due.tick() => false,
                () = token.cancelled() => true,
            };
            while let Some(spans) = self.take_span_batch() {
                if !self.send_request("traces", &trace_request_json(&spans), spans.len()).await {
                    break;
                }
            }
            self.send_request("metrics", &otlp_metrics::metrics_request_json(&resource_json()), 1)
                .await;
            if is_last {
                return;
            }
        }
    }

    /// Takes the spans of one request from the queue; `None` if it is empty.
    fn take_span_batch(&mut self) -> Option<Vec<Value>> {
        let next = |_| self.span_receiver.try_recv().ok();
        let spans: Vec<Value> = (0..MAX_SPANS_PER_REQUEST).map_while(next).collect();
        (!spans.is_empty()).then_some(spans)
    }

    /// Sends a request, and returns whether the collector accepted it. If not, its content is dropped
    /// and counted.
    async fn send_request(&self, signal: &str, body: &Value, count: usize) -> bool {
        let url = format!("{}/v1/{signal}", self.endpoint);
        let request = self.client.post(&url).header("content-type", "application/json");
        let sent = request.body(body.to_string()).send().await;
        let Err(error) = sent.and_then(reqwest::Response::error_for_status) else { return true };
        metrics::global().otlp_dropped.add(&[signal], count as u64);
        let error = describe(&error);
        warn!(
            event = event::OTLP_FAILED,
            signal, count, error, "the collector did not accept a request"
        );
        false
    }
}

/// A running exporter.
pub struct ExporterHandle {
    cancellation_token: CancellationToken,
    task: JoinHandle<()>,
}

impl ExporterHandle {
    /// Starts sending, in the background.
    pub fn start(exporter: OtlpExporter) -> Self {
        let token = CancellationToken::new();
        Self { task: tokio::spawn(exporter.run(token.clone())), cancellation_token: token }
    }

    /// Sends what is queued, for at most `timeout` (usually [`FLUSH_TIMEOUT`]); the rest is dropped. A
    /// panic of the exporter is ignored.
    pub async fn shut_down(self, timeout: Duration) {
        self.cancellation_token.cancel();
        let _ = tokio::time::timeout(timeout, self.task).await;
    }
}

fn resource_json() -> Value {
    let text = |key: &str, value: &str| json!({"key": key, "value": {"stringValue": value}});
    let mut attributes = vec![text("service.version", env!("CARGO_PKG_VERSION"))];
    let name = std::env::var("OTEL_SERVICE_NAME").unwrap_or_else(|_| "bsap".into());
    attributes.push(text("service.name", &name));
    json!({"attributes": attributes})
}

fn trace_request_json(spans: &[Value]) -> Value {
    json!({"resourceSpans": [{
        "resource": resource_json(),
        "scopeSpans": [{"scope": {"name": "bsap"}, "spans": spans}],
    }]})
}

#[cfg(test)]
mod tests {
    use std::sync::{Arc, Mutex};

    use axum::Router;
    use axum::body::Bytes;
    use axum::http::Uri;
    use tokio::net::TcpListener;
    use tracing::info;
    use tracing_subscriber::layer::SubscriberExt as _;

    use super::*;

    type ReceivedRequests = Arc<Mutex<Vec<(String, Value)>>>;

    /// Starts a collector that keeps the requests it receives.
    async fn start_fake_collector() -> (String, ReceivedRequests) {
        let received = ReceivedRequests::default();
        let requests = received.clone();
        let keep = move |uri: Uri, body: Bytes| async move {
            let body = serde_json::from_slice(&body).unwrap();
            requests.lock().unwrap().push((uri.path().to_owned(), body));
            "{}"
        };
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = format!("http://{}/", listener.local_addr().unwrap());
        tokio::spawn(axum::serve(listener, Router::new().fallback(keep)).into_future());
        (address, received)
    }

    fn layer_and_exporter(endpoint: String) -> (SpanLayer, OtlpExporter) {
        build_layer_and_exporter(&OtlpOptions { endpoint, interval_seconds: 3_600 }).unwrap()
    }

    #[tokio::test]
    async fn queued_spans_are_sent_as_otlp_on_shutdown() {
        let (endpoint, received) = start_fake_collector().await;
        let (spans, exporter) = layer_and_exporter(endpoint);
        let (trace, parent) = ("4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7");
        let log = tracing_subscriber::registry().with(spans);
        tracing::subscriber::with_default(log, || {
            info!(
                event = event::SEARCH,
                trace_id = trace,
                parent_id = parent,
                embed_ms = 3.0,
                wait_ms = 1.0,
                scan_ms = 2.0,
                rank_ms = 4.0,
                k = 24,
                "m"
            );
            info!(
                event = event::COMMIT_SUCCEEDED,
                trace_ids = trace,
                rows = 7,
                commit_ms = 40,
                "m"
            );
            info!(event = event::VACUUM, files = 1, log_files = 0, "no span");
        });
        let token = CancellationToken::new();
        token.cancel();
        exporter.run(token).await;
        let received = received.lock().unwrap();
        let (_, traces) = received.iter().find(|(path, _)| path == "/v1/traces").unwrap();
        let spans = traces["resourceSpans"][0]["scopeSpans"][0]["spans"].as_array().unwrap();
        let named = |name: &str| spans.iter().filter(|s| s["name"] == name).collect::<Vec<_>>();
        let (search, scan) = (named("search")[0], named("scan")[0]);
        assert_eq!((&search["traceId"], &scan["traceId"]), (&json!(trace), &json!(trace)));
        assert_eq!(scan["parentSpanId"], search["spanId"]);
        assert_eq!(search["parentSpanId"], parent);
        let time = |s: &Value, key: &str| s[key].as_str().unwrap().parse::<i64>().unwrap();
        let duration = |s: &Value| time(s, "endTimeUnixNano") - time(s, "startTimeUnixNano");
        assert_eq!((duration(search), duration(scan)), (10_000_000, 2_000_000));
        let rank = named("rank")[0];
        assert_eq!(time(scan, "endTimeUnixNano"), time(rank, "startTimeUnixNano"));
        let k = json!({"key": "k", "value": {"intValue": "24"}});
        assert!(search["attributes"].as_array().unwrap().contains(&k));
        let commits = named("commit");
        assert_eq!(commits.len(), 2, "one in a trace of its own, one in the trace of its message");
        assert_eq!((&commits[1]["traceId"], duration(commits[1])), (&json!(trace), 40_000_000));
        assert!(commits.iter().all(|commit| commit.get("parentSpanId").is_none()));
        assert_eq!(spans.len(), 7);
        let (_, metrics) = received.iter().find(|(path, _)| path == "/v1/metrics").unwrap();
        let metrics = &metrics["resourceMetrics"][0]["scopeMetrics"][0]["metrics"];
        assert!(metrics.as_array().unwrap().iter().any(|m| m["name"] == "bsap_clock_seconds"));
    }

    #[tokio::test]
    async fn an_unreachable_collector_does_not_block_logging() {
        // It accepts connections and never answers.
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let (spans, exporter) =
            layer_and_exporter(format!("http://{}", listener.local_addr().unwrap()));
        let log = tracing_subscriber::registry().with(spans);
        tracing::subscriber::with_default(log, || {
            for _ in 0..2 * SPAN_QUEUE_CAPACITY {
                info!(event = event::COMMIT_SUCCEEDED, rows = 1, commit_ms = 1, "a commit");
            }
        });
        assert_eq!(
            exporter.span_receiver.len(),
            SPAN_QUEUE_CAPACITY,
            "no more are queued than the capacity"
        );
        let running = ExporterHandle::start(exporter);
        let started = std::time::Instant::now();
        running.shut_down(Duration::from_millis(300)).await;
        assert!(
            (300..REQUEST_TIMEOUT.as_millis()).contains(&started.elapsed().as_millis()),
            "the export was abandoned after the timeout"
        );

        let unreachable = layer_and_exporter("http://127.0.0.1:9".into()).1;
        let token = CancellationToken::new();
        token.cancel();
        unreachable.run(token).await;
    }

    #[test]
    fn headers_are_parsed_and_their_values_are_not_revealed() {
        let read = parse_headers("authorization=Bearer%20a%3Db , x-scope = shop,").unwrap();
        assert_eq!(read["authorization"], "Bearer a=b");
        assert_eq!(read["x-scope"], "shop");
        assert!(!format!("{read:?}").contains("Bearer"));
        for invalid in ["secret", "a=b,no name=secret", "a=secret%0D%0Ab"] {
            let message = parse_headers(invalid).unwrap_err();
            assert!(
                message.contains("is not name=value") && !message.contains("secret"),
                "{message}"
            );
        }
    }

    #[test]
    fn options_are_checked() {
        let problems = |endpoint: &str, interval_seconds| {
            OtlpOptions { endpoint: endpoint.into(), interval_seconds }.validate()
        };
        assert!(problems("", 15).is_empty() && problems("http://c:4318", 1).is_empty());
        assert!(
            build_layer_and_exporter(&OtlpOptions {
                endpoint: ENDPOINT_OFF.into(),
                ..OtlpOptions::default()
            })
            .is_none()
        );
        assert!(problems(ENDPOINT_OFF, 15).is_empty());
        assert!(problems("c:4318", 15)[0].contains("http://"));
        assert!(problems("", 0)[0].contains("interval_seconds"));
    }
}
