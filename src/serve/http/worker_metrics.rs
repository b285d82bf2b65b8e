//! What the workers tell of themselves: what waits in Kafka and what was put aside, which a query worker
//! cannot see in the table.

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

/// How often they are asked.
const POLL_INTERVAL: Duration = Duration::from_secs(5);
/// How long one may take to answer.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(2);
/// Most bytes of an answer.
const MAX_RESPONSE_BYTES: usize = 4 << 20;
/// Most workers that are asked.
pub const MAX_WORKERS: usize = 1_000;

/// What the workers told last.
#[derive(Debug, Clone, Default, PartialEq, Serialize, JsonSchema)]
pub struct WorkersSummary {
    /// Workers that are known by `http.workers`; a name may stand for several.
    pub discovered: usize,
    /// Of these, those that answered.
    pub responding: usize,
    /// Messages of their partitions that are not stored yet; null where one does not know.
    pub lag_messages: Option<u64>,
    /// Messages put aside since they started.
    pub dead_letters: u64,
    /// Names that cannot be resolved, and addresses that did not answer, the first ten.
    pub unreachable: Vec<String>,
    /// When they were asked.
    pub checked_at: Option<DateTime<Utc>>,
}

/// Asks the workers from time to time.
pub struct WorkerPoller {
    urls: Vec<Url>,
    latest: Mutex<WorkersSummary>,
}

/// What one worker told.
#[derive(Debug, PartialEq)]
struct WorkerMetrics {
    lag_messages: Option<u64>,
    dead_letters: u64,
}

impl WorkerPoller {
    /// Those at these addresses.
    pub fn new(urls: &[Url]) -> Self {
        Self { urls: urls.to_vec(), latest: Mutex::default() }
    }

    /// What they told last; none where no address is configured.
    pub fn latest_summary(&self) -> Option<WorkersSummary> {
        let latest = self.latest.lock().unwrap_or_else(PoisonError::into_inner);
        (!self.urls.is_empty()).then(|| latest.clone())
    }

    /// Asks until `token` is cancelled.
    pub async fn run(&self, token: CancellationToken) {
        // A worker is asked at its own address, without a proxy between.
        let client = reqwest::Client::builder().timeout(REQUEST_TIMEOUT).no_proxy().build();
        let (false, Ok(client)) = (self.urls.is_empty(), client) else { return };
        let mut due = interval(POLL_INTERVAL);
        due.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            tokio::select! {
                _ = due.tick() => {}
                () = token.cancelled() => return,
            }
            let summary = self.poll(&client).await;
            *self.latest.lock().unwrap_or_else(PoisonError::into_inner) = summary;
        }
    }

    async fn poll(&self, client: &reqwest::Client) -> WorkersSummary {
        let mut answer = WorkersSummary {
            lag_messages: Some(0),
            checked_at: Some(Utc::now()),
            ..Default::default()
        };
        let mut addresses = BTreeSet::new();
        for url in &self.urls {
            match resolve_addresses(url).await {
                found if found.is_empty() => {
                    answer.discovered += 1;
                    answer.unreachable.push(url.to_string());
                }
                found => addresses.extend(found),
            }
        }
        let asked =
            addresses.iter().take(MAX_WORKERS).map(|address| scrape_metrics(client, *address));
        for (address, metrics) in addresses.iter().zip(join_all(asked).await) {
            answer.discovered += 1;
            if metrics.is_some() {
                answer.responding += 1;
            } else {
                answer.unreachable.push(address.to_string());
            }
            // What one does not tell, nobody knows.
            let lag = metrics.as_ref().and_then(|told| told.lag_messages);
            answer.lag_messages = answer.lag_messages.zip(lag).map(|(sum, lag)| sum + lag);
            answer.dead_letters += metrics.map_or(0, |told| told.dead_letters);
        }
        if answer.responding < answer.discovered {
            answer.lag_messages = None;
        }
        answer.unreachable.truncate(10);
        answer
    }
}

/// The addresses that a place stands for: each worker behind a name, as headless services have it.
async fn resolve_addresses(url: &Url) -> Vec<SocketAddr> {
    let Some((host, port)) = url.host_str().zip(url.port_or_known_default()) else {
        return Vec::new();
    };
    let host = host.trim_start_matches('[').trim_end_matches(']');
    let found = tokio::time::timeout(REQUEST_TIMEOUT, tokio::net::lookup_host((host, port))).await;
    let all: Vec<SocketAddr> = found.ok().and_then(Result::ok).into_iter().flatten().collect();
    // A name that has addresses of both kinds stands for the same workers twice.
    let v4: Vec<SocketAddr> = all.iter().copied().filter(SocketAddr::is_ipv4).collect();
    if v4.is_empty() { all } else { v4 }
}

async fn scrape_metrics(client: &reqwest::Client, address: SocketAddr) -> Option<WorkerMetrics> {
    let answer = client.get(format!("http://{address}/metrics")).send().await.ok()?;
    let mut answer = answer.error_for_status().ok()?;
    let mut body = Vec::new();
    while let Some(part) = answer.chunk().await.ok()? {
        body.extend_from_slice(&part);
        if body.len() > MAX_RESPONSE_BYTES {
            return None;
        }
    }
    parse_metrics(&String::from_utf8(body).ok()?)
}

/// What a worker's metrics say; none where they are not a worker's.
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
    // NaN: not known yet.
    let lag = values("bsap_lag_messages").next().filter(|lag| *lag >= 0.0);
    Some(WorkerMetrics {
        lag_messages: lag.map(|lag| lag as u64),
        dead_letters: values("bsap_dead_letters_total").sum::<f64>() as u64,
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

    async fn poll_workers(places: &[String]) -> WorkersSummary {
        let places: Vec<Url> = places.iter().map(|place| place.parse().unwrap()).collect();
        WorkerPoller::new(&places).poll(&reqwest::Client::new()).await
    }

    #[tokio::test]
    async fn metrics_of_all_workers_are_summed() {
        let workers = [start_fake_worker("7").await, start_fake_worker("5").await];
        let answer = poll_workers(&workers.map(|address| format!("http://{address}"))).await;
        assert_eq!((answer.discovered, answer.responding), (2, 2));
        assert_eq!(
            (answer.lag_messages, answer.dead_letters, answer.unreachable.len()),
            (Some(12), 6, 0)
        );
    }

    #[tokio::test]
    async fn unknown_lag_and_silent_workers_are_reported() {
        let unknown = poll_workers(&[format!("http://{}", start_fake_worker("NaN").await)]).await;
        assert_eq!((unknown.responding, unknown.lag_messages, unknown.dead_letters), (1, None, 3));
        let gone = TcpListener::bind("127.0.0.1:0").await.unwrap().local_addr().unwrap();
        let places = [format!("http://{}", start_fake_worker("7").await), format!("http://{gone}")];
        let answer = poll_workers(&places).await;
        assert_eq!((answer.discovered, answer.responding, answer.lag_messages), (2, 1, None));
        assert_eq!((answer.dead_letters, answer.unreachable), (3, vec![gone.to_string()]));
        let nobody = poll_workers(&["http://no-such-name.invalid:9464".into()]).await;
        assert_eq!((nobody.discovered, nobody.responding, nobody.lag_messages), (1, 0, None));
        assert!(parse_metrics("nothing of bsap 1\n").is_none());
        assert_eq!(WorkerPoller::new(&[]).latest_summary(), None);
    }
}
