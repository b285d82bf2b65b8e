//! Polls the metrics of the workers for the backlog in Kafka and the dead letters, neither of which
//! is in the table.

use std::collections::BTreeSet;
use std::net::SocketAddr;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use chrono::{DateTime, Utc};
use futures::future::join_all;
use schemars::JsonSchema;
use serde::Serialize;
use tokio::time::{MissedTickBehavior, interval};
use tokio_util::sync::CancellationToken;
use url::Url;

use crate::diagnosis::redact::redact_addresses;

/// How often the workers are polled.
const POLL_INTERVAL: Duration = Duration::from_secs(5);
/// How long a look-up of a name, or a response, may take.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(2);
/// Maximum size of a worker's metrics.
const MAX_RESPONSE_BYTES: usize = 4 << 20;
/// Maximum number of workers that are polled.
pub const MAX_POLLED_WORKERS: usize = 1_000;

/// The metrics of all workers together, from the last poll.
#[derive(Debug, Clone, Default, PartialEq, Serialize, JsonSchema)]
pub struct WorkersSummary {
    /// Number of workers that `http.worker_metrics_urls` resolves to; a name that cannot be
    /// resolved counts as one.
    pub discovered: usize,
    /// Number of these that responded.
    pub responding: usize,
    /// Number of messages of their partitions that are not stored yet; null unless all workers
    /// report it.
    pub lag_messages: Option<u64>,
    /// Number of messages that they have dead-lettered since they started.
    pub dead_letters: u64,
    /// Names that cannot be resolved and addresses that did not respond, at most ten.
    pub unreachable: Vec<String>,
    /// When they were polled; null before the first poll.
    pub checked_at: Option<DateTime<Utc>>,
}

/// Polls the workers and keeps the newest summary.
pub struct WorkerPoller {
    metrics_urls: Vec<Url>,
    latest_summary: Mutex<WorkersSummary>,
}

/// The metrics of one worker.
#[derive(Debug, PartialEq)]
struct WorkerMetrics {
    /// `None` if the worker does not know its lag yet.
    lag_messages: Option<u64>,
    dead_letter_count: u64,
}

impl WorkerPoller {
    pub fn new(urls: &[Url]) -> Self {
        Self { metrics_urls: urls.to_vec(), latest_summary: Mutex::default() }
    }

    /// Returns the newest summary; `None` if no address is configured.
    pub fn latest_summary(&self) -> Option<WorkersSummary> {
        let latest = self.latest_summary.lock().unwrap_or_else(PoisonError::into_inner);
        (!self.metrics_urls.is_empty()).then(|| latest.clone())
    }

    /// Polls until `cancel` is cancelled; returns at once if no address is configured.
    pub async fn run(&self, cancel: CancellationToken) {
        // Names are resolved to the addresses of all workers, which a proxy may not reach.
        let client = reqwest::Client::builder().timeout(REQUEST_TIMEOUT).no_proxy().build();
        let (false, Ok(client)) = (self.metrics_urls.is_empty(), client) else { return };
        let mut ticks = interval(POLL_INTERVAL);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            tokio::select! {
                _ = ticks.tick() => {}
                () = cancel.cancelled() => return,
            }
            let summary = self.poll(&client).await;
            *self.latest_summary.lock().unwrap_or_else(PoisonError::into_inner) = summary;
        }
    }

    async fn poll(&self, client: &reqwest::Client) -> WorkersSummary {
        let mut summary = WorkersSummary {
            lag_messages: Some(0),
            checked_at: Some(Utc::now()),
            ..Default::default()
        };
        let mut addresses = BTreeSet::new();
        for url in &self.metrics_urls {
            match resolve_addresses(url).await {
                resolved if resolved.is_empty() => {
                    summary.discovered += 1;
                    summary.unreachable.push(redact_addresses(url.as_str()).into_owned());
                }
                resolved => addresses.extend(resolved),
            }
        }
        let scrapes = addresses
            .iter()
            .take(MAX_POLLED_WORKERS)
            .map(|address| scrape_metrics(client, *address));
        for (address, metrics) in addresses.iter().zip(join_all(scrapes).await) {
            summary.discovered += 1;
            if metrics.is_some() {
                summary.responding += 1;
            } else {
                summary.unreachable.push(address.to_string());
            }
            // If one worker's lag is unknown, so is the sum.
            let lag = metrics.as_ref().and_then(|metrics| metrics.lag_messages);
            summary.lag_messages = summary.lag_messages.zip(lag).map(|(sum, lag)| sum + lag);
            summary.dead_letters += metrics.map_or(0, |metrics| metrics.dead_letter_count);
        }
        if summary.responding < summary.discovered {
            summary.lag_messages = None;
        }
        summary.unreachable.truncate(10);
        summary
    }
}

/// Returns the addresses of all workers behind a name, as Kubernetes' headless services have them;
/// none if the name cannot be resolved.
async fn resolve_addresses(url: &Url) -> Vec<SocketAddr> {
    let Some((host, port)) = url.host_str().zip(url.port_or_known_default()) else {
        return Vec::new();
    };
    let host = host.trim_start_matches('[').trim_end_matches(']');
    let lookup = tokio::time::timeout(REQUEST_TIMEOUT, tokio::net::lookup_host((host, port))).await;
    let all: Vec<SocketAddr> = lookup.ok().and_then(Result::ok).into_iter().flatten().collect();
    // In dual-stack networks each worker has an IPv4 and an IPv6 address: it must be counted once.
    let v4: Vec<SocketAddr> = all.iter().copied().filter(SocketAddr::is_ipv4).collect();
    if v4.is_empty() { all } else { v4 }
}

/// Returns the metrics of the worker at `address`; `None` if it does not respond as a worker does.
async fn scrape_metrics(client: &reqwest::Client, address: SocketAddr) -> Option<WorkerMetrics> {
    let response = client.get(format!("http://{address}/metrics")).send().await.ok()?;
    let mut response = response.error_for_status().ok()?;
    let mut body = Vec::new();
    while let Some(part) = response.chunk().await.ok()? {
        body.extend_from_slice(&part);
        if body.len() > MAX_RESPONSE_BYTES {
            return None;
        }
    }
    parse_metrics(&String::from_utf8(body).ok()?)
}

/// Parses a worker's metrics in Prometheus' text format; `None` if they are not metrics of bsap.
fn parse_metrics(text: &str) -> Option<WorkerMetrics> {
    let lines = || text.lines().filter(|line| !line.starts_with('#'));
    let values = |name: &'static str| {
        lines().filter_map(move |line| {
            let rest = line.strip_prefix(name)?;
            let rest = match rest.strip_prefix('{') {
                Some(labels) => labels.split_once('}')?.1,
                None => rest,
            };
            rest.strip_prefix(' ')?.split(' ').next()?.parse::<f64>().ok()
        })
    };
    lines().find(|line| line.starts_with("bsap_build_info{"))?;
    // A spare worker has no partitions, and no messages of its own.
    let is_spare =
        values("bsap_source_state{state=\"no_partitions_assigned\"}").any(|is| is == 1.0);
    // The worker reports NaN until it knows its lag.
    let lag = values("bsap_lag_messages").next().filter(|lag| *lag >= 0.0);
    let lag = lag.or(is_spare.then_some(0.0));
    Some(WorkerMetrics {
        lag_messages: lag.map(|lag| lag as u64),
        dead_letter_count: values("bsap_dead_letters_total").sum::<f64>() as u64,
    })
}

#[cfg(test)]
mod tests {
    use axum::Router;
    use axum::routing::get;
    use tokio::net::TcpListener;

    use super::*;

    async fn start_fake_worker(lag: &str) -> SocketAddr {
        let text = format!(
            "# HELP bsap_lag_messages Messages.\n# TYPE bsap_lag_messages gauge\nbsap_lag_messages {lag}\n\
             bsap_build_info{{version=\"1\",role=\"worker\"}} 1\n\
             bsap_dead_letters_total{{stage=\"fetch\",code=\"too_large\"}} 2\n\
             bsap_dead_letters_total{{stage=\"decode_image\",code=\"truncated\"}} 1\n\
             bsap_lag_messages_else 9\n"
        );
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let router = Router::new().route("/metrics", get(|| async { text }));
        tokio::spawn(axum::serve(listener, router).into_future());
        address
    }

    async fn poll_workers(urls: &[String]) -> WorkersSummary {
        let urls: Vec<Url> = urls.iter().map(|url| url.parse().unwrap()).collect();
        WorkerPoller::new(&urls).poll(&reqwest::Client::new()).await
    }

    #[tokio::test]
    async fn metrics_of_all_workers_are_summed() {
        let workers = [start_fake_worker("7").await, start_fake_worker("5").await];
        let summary = poll_workers(&workers.map(|address| format!("http://{address}"))).await;
        assert_eq!((summary.discovered, summary.responding), (2, 2));
        assert_eq!(
            (summary.lag_messages, summary.dead_letters, summary.unreachable.len()),
            (Some(12), 6, 0)
        );
    }

    #[tokio::test]
    async fn unknown_lag_and_unreachable_workers_are_reported() {
        let unknown = poll_workers(&[format!("http://{}", start_fake_worker("NaN").await)]).await;
        assert_eq!((unknown.responding, unknown.lag_messages, unknown.dead_letters), (1, None, 3));
        let closed = TcpListener::bind("127.0.0.1:0").await.unwrap().local_addr().unwrap();
        let urls = [format!("http://{}", start_fake_worker("7").await), format!("http://{closed}")];
        let summary = poll_workers(&urls).await;
        assert_eq!((summary.discovered, summary.responding, summary.lag_messages), (2, 1, None));
        assert_eq!((summary.dead_letters, summary.unreachable), (3, vec![closed.to_string()]));
        let unresolved = poll_workers(&["http://no-such-name.invalid:9464".into()]).await;
        let counts = (unresolved.discovered, unresolved.responding, unresolved.lag_messages);
        assert_eq!(counts, (1, 0, None));
        assert!(parse_metrics("nothing of bsap 1\n").is_none());
        for (spare, lag) in [("1", Some(0)), ("1.0", Some(0)), ("0", None)] {
            let metrics = parse_metrics(&format!(
                "bsap_build_info{{role=\"worker\"}} 1\nbsap_lag_messages NaN\n\
                 bsap_source_state{{state=\"no_partitions_assigned\"}} {spare}\n"
            ));
            assert_eq!(metrics.unwrap().lag_messages, lag, "{spare}");
        }
        assert_eq!(WorkerPoller::new(&[]).latest_summary(), None);
    }
}
