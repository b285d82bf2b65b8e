//! Steady load with updates, deletes and queries: what grows meanwhile, and how fresh answers are.

use std::net::TcpListener;
use std::time::{Duration, Instant};

use reqwest::Client;
use serde_json::{Value, json};
use tokio::sync::mpsc::{UnboundedReceiver, UnboundedSender, unbounded_channel};
use tokio::task::JoinSet;
use tokio::time::{MissedTickBehavior, interval, sleep};
use tokio_util::sync::CancellationToken;

use crate::fixture::{Fixture, WorkerProcess};

/// The catalogue does not grow without end, so that whatever grows is a fault.
const MAX_IMAGES: u64 = 3_000;
/// Messages that measure what the machine can do.
const BURST_MESSAGES: u64 = 4_000;
const LOAD_SHARE: f64 = 0.8;
const QUERIES_PER_SECOND: u64 = 5;
/// How often messages are sent, and answers looked at for the newest picture.
const TICK_INTERVAL: Duration = Duration::from_millis(100);
/// How long a picture may take to be found before that counts as a fault.
const SEARCHABLE_TIMEOUT: Duration = Duration::from_secs(60);
/// What the last quarter may have more than the second: memory by a share, handles by number.
const MAX_MEMORY_GROWTH_RATIO: f64 = 1.2;
const MAX_HANDLE_GROWTH: usize = 24;

/// What a minute showed.
struct MinuteStats {
    memory_mib: [f64; 2],
    handles: [usize; 2],
    query_latencies_ms: Vec<f64>,
    freshness_ms: Vec<f64>,
    lag: i64,
}

impl MinuteStats {
    fn print(&self, number: u64) {
        let [worker, query] = self.memory_mib;
        let [worker_handles, query_handles] = self.handles;
        println!(
            "minute {number:>3}: worker {worker:.0} MiB, {worker_handles} handles; query worker {query:.0} MiB, \
             {query_handles} handles; {} queries, p50 {:.0} ms, p99 {:.0} ms; fresh after p50 {:.0} ms, \
             p99 {:.0} ms; lag {}",
            self.query_latencies_ms.len(),
            quantile(&self.query_latencies_ms, 0.5),
            quantile(&self.query_latencies_ms, 0.99),
            quantile(&self.freshness_ms, 0.5),
            quantile(&self.freshness_ms, 0.99),
            self.lag
        );
    }
}

/// A picture that was found.
struct SearchableImage {
    id: String,
    /// The version that was sent.
    sequence: u64,
    /// The version that was found.
    found_sequence: u64,
    /// How long after it was sent, in milliseconds.
    delay_ms: f64,
}

/// Loads a worker and a query worker for `minutes`.
pub async fn run(fixture: &mut Fixture, minutes: u64) {
    assert!(
        minutes >= 4,
        "the second quarter and the last are compared: give it 4 minutes or more"
    );
    fixture.events.max_images = MAX_IMAGES;
    // A merge holds about twice what it writes: with small files that is soon as much as it gets.
    let tidy = [
        ("MAINTENANCE__INTERVAL_SECONDS", "10"),
        ("MAINTENANCE__TARGET_FILE_MIB", "8"),
        ("INGEST__COMMIT_MS", "1000"),
    ];
    let mut worker = fixture.start_worker_with(&tidy);
    fixture.send_events(MAX_IMAGES).await;
    fixture.wait_until_caught_up(&mut [&mut worker]).await;
    let address = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let mut query = fixture.start_command(&["serve"], &[("HTTP__LISTEN", &address.to_string())]);
    let url = format!("http://{address}");
    let client = Client::new();
    wait_until_ready(&client, &url).await;

    let token = CancellationToken::new();
    let (answered, mut answers) = unbounded_channel();
    let asking = tokio::spawn(query_steadily(client.clone(), url.clone(), answered, token.clone()));
    let started = Instant::now();
    fixture.send_events(BURST_MESSAGES).await;
    fixture.wait_until_caught_up(&mut [&mut worker, &mut query]).await;
    let capacity = BURST_MESSAGES as f64 / started.elapsed().as_secs_f64();
    let rate = capacity * LOAD_SHARE;
    println!(
        "steady load: {capacity:.0} messages/s at most, {rate:.0} from now on, {minutes} minutes"
    );

    let (found, mut fresh) = unbounded_channel();
    let mut watched = JoinSet::new();
    let mut seen = Vec::new();
    drain_channel(&mut answers);
    for number in 1..=minutes {
        run_minute(fixture, rate, &client, &url, &found, &mut watched).await;
        let minute = MinuteStats {
            memory_mib: [&worker, &query].map(resident_memory_mib),
            handles: [&worker, &query].map(open_handles),
            query_latencies_ms: drain_channel(&mut answers),
            // An image that was deleted before it was seen, and came again, says nothing.
            freshness_ms: drain_channel(&mut fresh)
                .into_iter()
                .filter(|f: &SearchableImage| {
                    let between = (f.id.clone(), f.sequence)..(f.id.clone(), f.found_sequence);
                    fixture.events.deleted.range(between).next().is_none()
                })
                .map(|f| f.delay_ms)
                .collect(),
            lag: fixture.lag().await,
        };
        minute.print(number);
        seen.push(minute);
    }
    token.cancel();
    asking.await.unwrap();
    // A picture that was not there may have been deleted by a later message: then it must be.
    for gone in watched.join_all().await.into_iter().flatten() {
        let newest = &fixture.events.expected_images[&gone];
        assert!(
            newest.content_hash.is_none(),
            "{gone} was not found within {SEARCHABLE_TIMEOUT:?}"
        );
    }
    fixture.wait_until_caught_up(&mut [&mut worker, &mut query]).await;
    worker.stop();
    query.stop();
    fixture.assert_table_matches_events(1).await;
    println!("{}", fixture.run_command_ok(&["verify"]).trim());
    assert_no_growth(&seen);
}

/// Sends at `rate` messages a second for a minute; once a second it watches until a picture is found.
async fn run_minute(
    fixture: &mut Fixture,
    rate: f64,
    client: &Client,
    url: &str,
    found: &UnboundedSender<SearchableImage>,
    watching: &mut JoinSet<Option<String>>,
) {
    let mut ticks = interval(TICK_INTERVAL);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Burst);
    let (mut due, mut watched) = (0.0, 0);
    let started = Instant::now();
    while started.elapsed() < Duration::from_secs(60) {
        ticks.tick().await;
        due += rate * TICK_INTERVAL.as_secs_f64();
        let sent = Instant::now();
        fixture.events.last_picture = None;
        fixture.send_events(due as u64).await;
        due -= due.floor();
        if started.elapsed().as_secs() >= watched
            && let Some((id, sequence)) = fixture.events.last_picture.take()
        {
            watched += 1;
            let (client, url) = (client.clone(), url.to_owned());
            watching.spawn(wait_until_searchable(client, url, id, sequence, sent, found.clone()));
        }
    }
}

/// Tells after how many milliseconds the query worker knows this version of an image, or a newer one;
/// gives the image where it does not within [`FOUND`].
async fn wait_until_searchable(
    client: Client,
    url: String,
    id: String,
    sequence: u64,
    sent: Instant,
    found: UnboundedSender<SearchableImage>,
) -> Option<String> {
    while sent.elapsed() < SEARCHABLE_TIMEOUT {
        let answer = client.get(format!("{url}/v1/images/{id}")).send().await.unwrap();
        let known: Value = serde_json::from_slice(&answer.bytes().await.unwrap()).unwrap();
        let known = known["sequence"].as_str().and_then(|text| text.parse::<u64>().ok());
        if let Some(known) = known.filter(|known| *known >= sequence) {
            let ms = sent.elapsed().as_secs_f64() * 1e3;
            let _ =
                found.send(SearchableImage { id, sequence, found_sequence: known, delay_ms: ms });
            return None;
        }
        sleep(TICK_INTERVAL / 2).await;
    }
    Some(id)
}

/// Asks ever new questions at a steady rate until `token` is cancelled; none may fail.
async fn query_steadily(
    client: Client,
    url: String,
    answered: UnboundedSender<f64>,
    token: CancellationToken,
) {
    let mut ticks = interval(Duration::from_millis(1000 / QUERIES_PER_SECOND));
    for number in 0.. {
        tokio::select! {
            _ = ticks.tick() => {}
            () = token.cancelled() => return,
        }
        let started = Instant::now();
        let body = json!({"text": format!("a red mug {number}"), "k": 20});
        let answer = client
            .post(format!("{url}/v1/search"))
            .header("content-type", "application/json")
            .body(body.to_string())
            .send()
            .await
            .unwrap();
        assert!(answer.status().is_success(), "query {number}: {}", answer.status());
        assert!(!answer.bytes().await.unwrap().is_empty());
        let _ = answered.send(started.elapsed().as_secs_f64() * 1e3);
    }
}

async fn wait_until_ready(client: &Client, url: &str) {
    for _ in 0..600 {
        match client.get(format!("{url}/readyz")).send().await {
            Ok(answer) if answer.status().is_success() => return,
            _ => sleep(TICK_INTERVAL).await,
        }
    }
    panic!("{url} does not become ready");
}

/// The second quarter against the last: the first warms up.
fn assert_no_growth(seen: &[MinuteStats]) {
    let quarter = (seen.len() / 4).max(1);
    let early = &seen[quarter.min(seen.len() - 1)..][..quarter.min(seen.len())];
    let late = &seen[seen.len() - quarter..];
    let mean = |minutes: &[MinuteStats], of: &dyn Fn(&MinuteStats) -> f64| {
        minutes.iter().map(of).sum::<f64>() / minutes.len() as f64
    };
    for (i, name) in ["worker", "query worker"].into_iter().enumerate() {
        let [before, after] = [early, late].map(|minutes| mean(minutes, &|m| m.memory_mib[i]));
        println!(
            "steady load: {name} {before:.0} MiB in the second quarter, {after:.0} in the last"
        );
        assert!(after <= before * MAX_MEMORY_GROWTH_RATIO, "{name}: memory grows");
        let [before, after] =
            [early, late].map(|minutes| minutes.iter().map(|m| m.handles[i]).max());
        assert!(
            after <= before.map(|n| n + MAX_HANDLE_GROWTH),
            "{name}: handles grow from {before:?} to {after:?}"
        );
    }
    let fresh: Vec<f64> = seen.iter().flat_map(|m| m.freshness_ms.iter().copied()).collect();
    println!(
        "steady load: fresh after p50 {:.0} ms, p99 {:.0} ms, of {} pictures",
        quantile(&fresh, 0.5),
        quantile(&fresh, 0.99),
        fresh.len()
    );
    for (name, of) in [
        (
            "queries",
            (|m: &MinuteStats| quantile(&m.query_latencies_ms, 0.5)) as fn(&MinuteStats) -> f64,
        ),
        ("fresh after", |m: &MinuteStats| quantile(&m.freshness_ms, 0.5)),
    ] {
        let [before, after] = [early, late].map(|minutes| mean(minutes, &of));
        println!(
            "steady load: {name} p50 {before:.0} ms in the second quarter, {after:.0} in the last"
        );
    }
}

fn drain_channel<T>(values: &mut UnboundedReceiver<T>) -> Vec<T> {
    std::iter::from_fn(|| values.try_recv().ok()).collect()
}

fn quantile(values: &[f64], share: f64) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    let place = (share * sorted.len() as f64) as usize;
    sorted.get(place.min(sorted.len().saturating_sub(1))).copied().unwrap_or(f64::NAN)
}

/// Resident memory, by the kernel.
fn resident_memory_mib(process: &WorkerProcess) -> f64 {
    let status = std::fs::read_to_string(format!("/proc/{}/status", process.process_id())).unwrap();
    let line = status.lines().find(|line| line.starts_with("VmRSS:")).unwrap();
    line.split_whitespace().nth(1).unwrap().parse::<f64>().unwrap() / 1024.0
}

fn open_handles(process: &WorkerProcess) -> usize {
    std::fs::read_dir(format!("/proc/{}/fd", process.process_id())).unwrap().count()
}
