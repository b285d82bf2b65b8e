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
const EVERY: Duration = Duration::from_secs(5);
/// How long one may take to answer.
const TIMEOUT: Duration = Duration::from_secs(2);
/// Most bytes of an answer.
const MOST_BYTES: usize = 4 << 20;
/// Most workers that are asked.
pub const MOST: usize = 1_000;

/// What the workers told last.
#[derive(Debug, Clone, Default, PartialEq, Serialize, JsonSchema)]
pub struct WorkersAnswer {
    /// Workers that are known by `http.workers`; a name may stand for several.
    pub known: usize,
    /// Of these, those that answered.
    pub answered: usize,
    /// Messages of their partitions that are not stored yet; null where one does not know.
    pub lag: Option<u64>,
    /// Messages put aside since they started.
    pub dead_letters: u64,
    /// Names that cannot be resolved, and addresses that did not answer, the first ten.
    pub silent: Vec<String>,
    /// When they were asked.
    pub at: Option<DateTime<Utc>>,
}

/// Asks the workers from time to time.
pub struct Workers {
    places: Vec<Url>,
    told: Mutex<WorkersAnswer>,
}

/// What one worker told.
#[derive(Debug, PartialEq)]
struct Told {
    lag: Option<u64>,
    dead_letters: u64,
}

impl Workers {
    /// Those at these addresses.
    pub fn new(places: &[Url]) -> Self {
        Self { places: places.to_vec(), told: Mutex::default() }
    }

    /// What they told last; none where no address is configured.
    pub fn told(&self) -> Option<WorkersAnswer> {
        let told = self.told.lock().unwrap_or_else(PoisonError::into_inner);
        (!self.places.is_empty()).then(|| told.clone())
    }

    /// Asks until `token` is cancelled.
    pub async fn run(&self, token: CancellationToken) {
        // A worker is asked at its own address, without a proxy between.
        let client = reqwest::Client::builder().timeout(TIMEOUT).no_proxy().build();
        let (false, Ok(client)) = (self.places.is_empty(), client) else { return };
        let mut due = interval(EVERY);
        due.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            tokio::select! {
                _ = due.tick() => {}
                () = token.cancelled() => return,
            }
            let told = self.ask(&client).await;
            *self.told.lock().unwrap_or_else(PoisonError::into_inner) = told;
        }
    }

    async fn ask(&self, client: &reqwest::Client) -> WorkersAnswer {
        let mut answer = WorkersAnswer { lag: Some(0), at: Some(Utc::now()), ..Default::default() };
        let mut addresses = BTreeSet::new();
        for place in &self.places {
            match resolved(place).await {
                found if found.is_empty() => {
                    answer.known += 1;
                    answer.silent.push(place.to_string());
                }
                found => addresses.extend(found),
            }
        }
        let asked = addresses.iter().take(MOST).map(|address| scrape(client, *address));
        for (address, told) in addresses.iter().zip(join_all(asked).await) {
            answer.known += 1;
            if told.is_some() {
                answer.answered += 1;
            } else {
                answer.silent.push(address.to_string());
            }
            // What one does not tell, nobody knows.
            let lag = told.as_ref().and_then(|told| told.lag);
            answer.lag = answer.lag.zip(lag).map(|(sum, lag)| sum + lag);
            answer.dead_letters += told.map_or(0, |told| told.dead_letters);
        }
        if answer.answered < answer.known {
            answer.lag = None;
        }
        answer.silent.truncate(10);
        answer
    }
}

/// The addresses that a place stands for: each worker behind a name, as headless services have it.
async fn resolved(place: &Url) -> Vec<SocketAddr> {
    let Some((host, port)) = place.host_str().zip(place.port_or_known_default()) else {
        return Vec::new();
    };
    let host = host.trim_start_matches('[').trim_end_matches(']');
    let found = tokio::time::timeout(TIMEOUT, tokio::net::lookup_host((host, port))).await;
    let all: Vec<SocketAddr> = found.ok().and_then(Result::ok).into_iter().flatten().collect();
    // A name that has addresses of both kinds stands for the same workers twice.
    let v4: Vec<SocketAddr> = all.iter().copied().filter(SocketAddr::is_ipv4).collect();
    if v4.is_empty() { all } else { v4 }
}

async fn scrape(client: &reqwest::Client, address: SocketAddr) -> Option<Told> {
    let answer = client.get(format!("http://{address}/metrics")).send().await.ok()?;
    let mut answer = answer.error_for_status().ok()?;
    let mut body = Vec::new();
    while let Some(part) = answer.chunk().await.ok()? {
        body.extend_from_slice(&part);
        if body.len() > MOST_BYTES {
            return None;
        }
    }
    read(&String::from_utf8(body).ok()?)
}

/// What a worker's metrics say; none where they are not a worker's.
fn read(text: &str) -> Option<Told> {
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
    Some(Told {
        lag: lag.map(|lag| lag as u64),
        dead_letters: values("bsap_dead_letters_total").sum::<f64>() as u64,
    })
}

#[cfg(test)]
mod tests {
    use axum::Router;
    use axum::routing::get;
    use tokio::net::TcpListener;

    use super::*;

    async fn worker(lag: &str) -> SocketAddr {
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

    async fn told(places: &[String]) -> WorkersAnswer {
        let places: Vec<Url> = places.iter().map(|place| place.parse().unwrap()).collect();
        Workers::new(&places).ask(&reqwest::Client::new()).await
    }

    #[tokio::test]
    async fn what_workers_tell_is_added_up() {
        let workers = [worker("7").await, worker("5").await];
        let answer = told(&workers.map(|address| format!("http://{address}"))).await;
        assert_eq!((answer.known, answer.answered), (2, 2));
        assert_eq!((answer.lag, answer.dead_letters, answer.silent.len()), (Some(12), 6, 0));
    }

    #[tokio::test]
    async fn what_is_not_known_is_said() {
        let unknown = told(&[format!("http://{}", worker("NaN").await)]).await;
        assert_eq!((unknown.answered, unknown.lag, unknown.dead_letters), (1, None, 3));
        let gone = TcpListener::bind("127.0.0.1:0").await.unwrap().local_addr().unwrap();
        let places = [format!("http://{}", worker("7").await), format!("http://{gone}")];
        let answer = told(&places).await;
        assert_eq!((answer.known, answer.answered, answer.lag), (2, 1, None));
        assert_eq!((answer.dead_letters, answer.silent), (3, vec![gone.to_string()]));
        let nobody = told(&["http://no-such-name.invalid:9464".into()]).await;
        assert_eq!((nobody.known, nobody.answered, nobody.lag), (1, 0, None));
        assert!(read("nothing of bsap 1\n").is_none());
        assert_eq!(Workers::new(&[]).told(), None);
    }
}
