//! Steady load of updates, deletes and queries: asserts that memory and handles do not grow, and measures
//! how soon images become searchable.

use std::net::TcpListener;
use std::time::{Duration, Instant};

use reqwest::Client;
use serde_json::{Value, json};
use tokio::sync::mpsc::{UnboundedReceiver, UnboundedSender, unbounded_channel};
use tokio::task::JoinSet;
use tokio::time::{MissedTickBehavior, interval, sleep};
use tokio_util::sync::CancellationToken;

use crate::fixture::{Fixture, WorkerProcess};

/// Limits the size of the catalogue, so that whatever still grows is a leak.
const MAX_IMAGES: u64 = 3_000;
/// Messages that measure the capacity of the machine.
const BURST_MESSAGES: u64 = 4_000;
/// Share of the capacity that is used as steady load.
const LOAD_SHARE: f64 = 0.8;
const QUERIES_PER_SECOND: u64 = 5;
/// How often messages are sent, and answers are checked for the newest image.
const TICK_INTERVAL: Duration = Duration::from_millis(100);
/// How long an image may take to become searchable.
const SEARCHABLE_TIMEOUT: Duration = Duration::from_secs(60);
/// By how much memory and open handles may grow from the second quarter to the last.
const MAX_MEMORY_GROWTH_RATIO: f64 = 1.2;
const MAX_HANDLE_GROWTH: usize = 24;

/// Measurements of one minute; arrays contain the worker and the query worker.
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
             {query_handles} handles; {} queries, p50 {:.0} ms, p99 {:.0} ms; searchable after p50 {:.0} ms, \
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

/// An image that became searchable.
struct SearchableImage {
    id: String,
    /// The sequence that was sent.
    sequence: u64,
    /// The sequence that was searchable, maybe a later one.
    found_sequence: u64,
    /// Time between sending and finding it, in milliseconds.
    delay_ms: f64,
}

/// Puts steady load on a worker and a query worker for `minutes`.
pub async fn run(fixture: &mut Fixture, minutes: u64) {
    assert!(
        minutes >= 4,
        "the second quarter and the last are compared: give it 4 minutes or more"
    );
    fixture.events.max_images = MAX_IMAGES;
    // A compaction needs about twice the memory of the files that it writes: with small files, it reaches
    // that maximum early.
    let frequent_maintenance = [
        ("MAINTENANCE__INTERVAL_SECONDS", "10"),
        ("MAINTENANCE__TARGET_FILE_MIB", "8"),
        ("INGEST__COMMIT_MS", "1000"),
    ];
    let mut worker = fixture.start_worker_with(&frequent_maintenance);
    fixture.send_events(MAX_IMAGES).await;
    fixture.wait_until_caught_up(&mut [&mut worker]).await;
    let address = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let mut query = fixture.start_command(&["serve"], &[("HTTP__LISTEN", &address.to_string())]);
    let url = format!("http://{address}");
    let client = Client::new();
    wait_until_ready(&client, &url).await;

    let token = CancellationToken::new();
    let (latency_sender, mut latencies) = unbounded_channel();
    let querying =
        tokio::spawn(query_steadily(client.clone(), url.clone(), latency_sender, token.clone()));
    let started = Instant::now();
    fixture.send_events(BURST_MESSAGES).await;
    fixture.wait_until_caught_up(&mut [&mut worker, &mut query]).await;
    let capacity = BURST_MESSAGES as f64 / started.elapsed().as_secs_f64();
    let rate = capacity * LOAD_SHARE;
    println!(
        "steady load: capacity {capacity:.0} messages/s, load {rate:.0} messages/s, {minutes} minutes"
    );

    let (searchable_sender, mut searchable_images) = unbounded_channel();
    let mut pending_checks = JoinSet::new();
    let mut minute_stats = Vec::new();
    drain_channel(&mut latencies);
    for number in 1..=minutes {
        run_minute(fixture, rate, &client, &url, &searchable_sender, &mut pending_checks).await;
        let minute = MinuteStats {
            memory_mib: [&worker, &query].map(resident_memory_mib),
            handles: [&worker, &query].map(open_handles),
            query_latencies_ms: drain_channel(&mut latencies),
            // Skip images that were deleted and added again before they were found.
            freshness_ms: drain_channel(&mut searchable_images)
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
        minute_stats.push(minute);
    }
    token.cancel();
    querying.await.unwrap();
    // An image that was not found must have been deleted by a later message.
    for id in pending_checks.join_all().await.into_iter().flatten() {
        let newest = &fixture.events.expected_images[&id];
        assert!(newest.content_hash.is_none(), "{id} was not found within {SEARCHABLE_TIMEOUT:?}");
    }
    fixture.wait_until_caught_up(&mut [&mut worker, &mut query]).await;
    worker.stop();
    query.stop();
    fixture.assert_table_matches_events(1).await;
    println!("{}", fixture.run_command_ok(&["verify"]).trim());
    assert_no_growth(&minute_stats);
}

/// Sends `rate` messages per second for a minute; once per second starts to check when the newest image is
/// searchable.
async fn run_minute(
    fixture: &mut Fixture,
    rate: f64,
    client: &Client,
    url: &str,
    searchable_sender: &UnboundedSender<SearchableImage>,
    pending_checks: &mut JoinSet<Option<String>>,
) {
    let mut ticks = interval(TICK_INTERVAL);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Burst);
    let (mut due_messages, mut started_checks) = (0.0, 0);
    let started = Instant::now();
    while started.elapsed() < Duration::from_secs(60) {
        ticks.tick().await;
        due_messages += rate * TICK_INTERVAL.as_secs_f64();
        let sent_at = Instant::now();
        fixture.events.last_upsert = None;
        fixture.send_events(due_messages as u64).await;
        due_messages -= due_messages.floor();
        if started.elapsed().as_secs() >= started_checks
            && let Some((id, sequence)) = fixture.events.last_upsert.take()
        {
            started_checks += 1;
            let (client, url) = (client.clone(), url.to_owned());
            pending_checks.spawn(wait_until_searchable(
                client,
                url,
                id,
                sequence,
                sent_at,
                searchable_sender.clone(),
            ));
        }
    }
}

/// Waits until the query worker has this version of an image, or a later one, and sends how long that took.
/// Returns the id if it does not within [`SEARCHABLE_TIMEOUT`].
async fn wait_until_searchable(
    client: Client,
    url: String,
    id: String,
    sequence: u64,
    sent_at: Instant,
    searchable_sender: UnboundedSender<SearchableImage>,
) -> Option<String> {
    while sent_at.elapsed() < SEARCHABLE_TIMEOUT {
        let response = client.get(format!("{url}/v1/images?id={id}")).send().await.unwrap();
        let image: Value = serde_json::from_slice(&response.bytes().await.unwrap()).unwrap();
        let found_sequence = image["sequence"].as_str().and_then(|text| text.parse::<u64>().ok());
        if let Some(found_sequence) = found_sequence.filter(|found| *found >= sequence) {
            let delay_ms = sent_at.elapsed().as_secs_f64() * 1e3;
            let found = SearchableImage { id, sequence, found_sequence, delay_ms };
            let _ = searchable_sender.send(found);
            return None;
        }
        sleep(TICK_INTERVAL / 2).await;
    }
    Some(id)
}

/// Sends different queries at a steady rate until `token` is cancelled, and sends their latencies in
/// milliseconds. None may fail.
async fn query_steadily(
    client: Client,
    url: String,
    latency_sender: UnboundedSender<f64>,
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
        let response = client
            .post(format!("{url}/v1/search"))
            .header("content-type", "application/json")
            .body(body.to_string())
            .send()
            .await
            .unwrap();
        assert!(response.status().is_success(), "query {number}: {}", response.status());
        assert!(!response.bytes().await.unwrap().is_empty());
        let _ = latency_sender.send(started.elapsed().as_secs_f64() * 1e3);
    }
}

async fn wait_until_ready(client: &Client, url: &str) {
    for _ in 0..600 {
        match client.get(format!("{url}/readyz")).send().await {
            Ok(response) if response.status().is_success() => return,
            _ => sleep(TICK_INTERVAL).await,
        }
    }
    panic!("{url} does not become ready");
}

/// Compares the second quarter of the minutes with the last: the first is for warming up.
fn assert_no_growth(minutes: &[MinuteStats]) {
    let quarter = (minutes.len() / 4).max(1);
    let early = &minutes[quarter.min(minutes.len() - 1)..][..quarter.min(minutes.len())];
    let late = &minutes[minutes.len() - quarter..];
    let mean = |minutes: &[MinuteStats], value: &dyn Fn(&MinuteStats) -> f64| {
        minutes.iter().map(value).sum::<f64>() / minutes.len() as f64
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
    let freshness_ms: Vec<f64> =
        minutes.iter().flat_map(|m| m.freshness_ms.iter().copied()).collect();
    println!(
        "steady load: searchable after p50 {:.0} ms, p99 {:.0} ms, {} images",
        quantile(&freshness_ms, 0.5),
        quantile(&freshness_ms, 0.99),
        freshness_ms.len()
    );
    for (name, value) in [
        (
            "queries",
            (|m: &MinuteStats| quantile(&m.query_latencies_ms, 0.5)) as fn(&MinuteStats) -> f64,
        ),
        ("searchable after", |m: &MinuteStats| quantile(&m.freshness_ms, 0.5)),
    ] {
        let [before, after] = [early, late].map(|minutes| mean(minutes, &value));
        println!(
            "steady load: {name} p50 {before:.0} ms in the second quarter, {after:.0} in the last"
        );
    }
}

/// Returns the values that are in a channel now.
fn drain_channel<T>(values: &mut UnboundedReceiver<T>) -> Vec<T> {
    std::iter::from_fn(|| values.try_recv().ok()).collect()
}

fn quantile(values: &[f64], share: f64) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    let index = (share * sorted.len() as f64) as usize;
    sorted.get(index.min(sorted.len().saturating_sub(1))).copied().unwrap_or(f64::NAN)
}

/// Returns the resident memory of a process, by the kernel.
fn resident_memory_mib(process: &WorkerProcess) -> f64 {
    let status = std::fs::read_to_string(format!("/proc/{}/status", process.process_id())).unwrap();
    let line = status.lines().find(|line| line.starts_with("VmRSS:")).unwrap();
    line.split_whitespace().nth(1).unwrap().parse::<f64>().unwrap() / 1024.0
}

fn open_handles(process: &WorkerProcess) -> usize {
    std::fs::read_dir(format!("/proc/{}/fd", process.process_id())).unwrap().count()
}
