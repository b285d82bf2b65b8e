//! Steady load with updates, deletes and queries: what grows meanwhile, and how fresh answers are.

use std::net::TcpListener;
use std::time::{Duration, Instant};

use reqwest::Client;
use serde_json::{Value, json};
use tokio::sync::mpsc::{UnboundedReceiver, UnboundedSender, unbounded_channel};
use tokio::task::JoinSet;
use tokio::time::{MissedTickBehavior, interval, sleep};
use tokio_util::sync::CancellationToken;

use bsap::world::{Worker, World};

/// The catalogue does not grow without end, so that whatever grows is a fault.
const IMAGES: u64 = 3_000;
/// Messages that measure what the machine can do.
const BURST: u64 = 4_000;
const SHARE: f64 = 0.8;
const QUERIES_A_SECOND: u64 = 5;
/// How often messages are sent, and answers looked at for the newest picture.
const TICK: Duration = Duration::from_millis(100);
/// How long a picture may take to be found before that counts as a fault.
const FOUND: Duration = Duration::from_secs(60);
/// What the last quarter may have more than the second: memory by a share, handles by number.
const MEMORY: f64 = 1.2;
const HANDLES: usize = 24;

/// What a minute showed.
struct Minute {
    memory_mib: [f64; 2],
    handles: [usize; 2],
    queries_ms: Vec<f64>,
    fresh_ms: Vec<f64>,
    lag: i64,
}

impl Minute {
    fn print(&self, number: u64) {
        let [worker, query] = self.memory_mib;
        let [worker_handles, query_handles] = self.handles;
        println!(
            "minute {number:>3}: worker {worker:.0} MiB, {worker_handles} handles; query worker {query:.0} MiB, \
             {query_handles} handles; {} queries, p50 {:.0} ms, p99 {:.0} ms; fresh after p50 {:.0} ms, \
             p99 {:.0} ms; lag {}",
            self.queries_ms.len(),
            quantile(&self.queries_ms, 0.5),
            quantile(&self.queries_ms, 0.99),
            quantile(&self.fresh_ms, 0.5),
            quantile(&self.fresh_ms, 0.99),
            self.lag
        );
    }
}

/// A picture that was found.
struct Found {
    id: String,
    /// The version that was sent.
    sequence: u64,
    /// The version that was found.
    known: u64,
    /// How long after it was sent, in milliseconds.
    ms: f64,
}

/// Loads a worker and a query worker for `minutes`.
pub async fn run(world: &mut World, minutes: u64) {
    assert!(
        minutes >= 4,
        "the second quarter and the last are compared: give it 4 minutes or more"
    );
    world.events.most_images = IMAGES;
    // A merge holds about twice what it writes: with small files that is soon as much as it gets.
    let tidy =
        [("UPKEEP__EVERY_SECONDS", "10"), ("UPKEEP__FILE_MIB", "8"), ("INGEST__COMMIT_MS", "1000")];
    let mut worker = world.worker_with(&tidy);
    world.send(IMAGES).await;
    world.caught_up(&mut [&mut worker]).await;
    let address = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let mut query = world.start(&["serve"], &[("HTTP__LISTEN", &address.to_string())]);
    let url = format!("http://{address}");
    let client = Client::new();
    wait_until_ready(&client, &url).await;

    let token = CancellationToken::new();
    let (answered, mut answers) = unbounded_channel();
    let asking = tokio::spawn(ask(client.clone(), url.clone(), answered, token.clone()));
    let started = Instant::now();
    world.send(BURST).await;
    world.caught_up(&mut [&mut worker, &mut query]).await;
    let capacity = BURST as f64 / started.elapsed().as_secs_f64();
    let rate = capacity * SHARE;
    println!(
        "steady load: {capacity:.0} messages/s at most, {rate:.0} from now on, {minutes} minutes"
    );

    let (found, mut fresh) = unbounded_channel();
    let mut watched = JoinSet::new();
    let mut seen = Vec::new();
    drain(&mut answers);
    for number in 1..=minutes {
        minute(world, rate, &client, &url, &found, &mut watched).await;
        let minute = Minute {
            memory_mib: [&worker, &query].map(memory_mib),
            handles: [&worker, &query].map(handles),
            queries_ms: drain(&mut answers),
            // An image that was deleted before it was seen, and came again, says nothing.
            fresh_ms: drain(&mut fresh)
                .into_iter()
                .filter(|f: &Found| {
                    let between = (f.id.clone(), f.sequence)..(f.id.clone(), f.known);
                    world.events.deleted.range(between).next().is_none()
                })
                .map(|f| f.ms)
                .collect(),
            lag: world.lag().await,
        };
        minute.print(number);
        seen.push(minute);
    }
    token.cancel();
    asking.await.unwrap();
    // A picture that was not there may have been deleted by a later message: then it must be.
    for gone in watched.join_all().await.into_iter().flatten() {
        let newest = &world.events.newest[&gone];
        assert!(newest.content.is_none(), "{gone} was not found within {FOUND:?}");
    }
    world.caught_up(&mut [&mut worker, &mut query]).await;
    worker.stop();
    query.stop();
    world.verify(1).await;
    println!("{}", world.bsap(&["verify"]).trim());
    compare(&seen);
}

/// Sends at `rate` messages a second for a minute; once a second it watches until a picture is found.
async fn minute(
    world: &mut World,
    rate: f64,
    client: &Client,
    url: &str,
    found: &UnboundedSender<Found>,
    watching: &mut JoinSet<Option<String>>,
) {
    let mut ticks = interval(TICK);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Burst);
    let (mut due, mut watched) = (0.0, 0);
    let started = Instant::now();
    while started.elapsed() < Duration::from_secs(60) {
        ticks.tick().await;
        due += rate * TICK.as_secs_f64();
        let sent = Instant::now();
        world.events.last_picture = None;
        world.send(due as u64).await;
        due -= due.floor();
        if started.elapsed().as_secs() >= watched
            && let Some((id, sequence)) = world.events.last_picture.take()
        {
            watched += 1;
            let (client, url) = (client.clone(), url.to_owned());
            watching.spawn(watch(client, url, id, sequence, sent, found.clone()));
        }
    }
}

/// Tells after how many milliseconds the query worker knows this version of an image, or a newer one;
/// gives the image where it does not within [`FOUND`].
async fn watch(
    client: Client,
    url: String,
    id: String,
    sequence: u64,
    sent: Instant,
    found: UnboundedSender<Found>,
) -> Option<String> {
    while sent.elapsed() < FOUND {
        let answer = client.get(format!("{url}/v1/images/{id}")).send().await.unwrap();
        let known: Value = serde_json::from_slice(&answer.bytes().await.unwrap()).unwrap();
        let known = known["sequence"].as_str().and_then(|text| text.parse::<u64>().ok());
        if let Some(known) = known.filter(|known| *known >= sequence) {
            let ms = sent.elapsed().as_secs_f64() * 1e3;
            let _ = found.send(Found { id, sequence, known, ms });
            return None;
        }
        sleep(TICK / 2).await;
    }
    Some(id)
}

/// Asks ever new questions at a steady rate until `token` is cancelled; none may fail.
async fn ask(
    client: Client,
    url: String,
    answered: UnboundedSender<f64>,
    token: CancellationToken,
) {
    let mut ticks = interval(Duration::from_millis(1000 / QUERIES_A_SECOND));
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
            _ => sleep(TICK).await,
        }
    }
    panic!("{url} does not become ready");
}

/// The second quarter against the last: the first warms up.
fn compare(seen: &[Minute]) {
    let quarter = (seen.len() / 4).max(1);
    let early = &seen[quarter.min(seen.len() - 1)..][..quarter.min(seen.len())];
    let late = &seen[seen.len() - quarter..];
    let mean = |minutes: &[Minute], of: &dyn Fn(&Minute) -> f64| {
        minutes.iter().map(of).sum::<f64>() / minutes.len() as f64
    };
    for (i, name) in ["worker", "query worker"].into_iter().enumerate() {
        let [before, after] = [early, late].map(|minutes| mean(minutes, &|m| m.memory_mib[i]));
        println!(
            "steady load: {name} {before:.0} MiB in the second quarter, {after:.0} in the last"
        );
        assert!(after <= before * MEMORY, "{name}: memory grows");
        let [before, after] =
            [early, late].map(|minutes| minutes.iter().map(|m| m.handles[i]).max());
        assert!(
            after <= before.map(|n| n + HANDLES),
            "{name}: handles grow from {before:?} to {after:?}"
        );
    }
    let fresh: Vec<f64> = seen.iter().flat_map(|m| m.fresh_ms.iter().copied()).collect();
    println!(
        "steady load: fresh after p50 {:.0} ms, p99 {:.0} ms, of {} pictures",
        quantile(&fresh, 0.5),
        quantile(&fresh, 0.99),
        fresh.len()
    );
    for (name, of) in [
        ("queries", (|m: &Minute| quantile(&m.queries_ms, 0.5)) as fn(&Minute) -> f64),
        ("fresh after", |m: &Minute| quantile(&m.fresh_ms, 0.5)),
    ] {
        let [before, after] = [early, late].map(|minutes| mean(minutes, &of));
        println!(
            "steady load: {name} p50 {before:.0} ms in the second quarter, {after:.0} in the last"
        );
    }
}

fn drain<T>(values: &mut UnboundedReceiver<T>) -> Vec<T> {
    std::iter::from_fn(|| values.try_recv().ok()).collect()
}

fn quantile(values: &[f64], share: f64) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    let place = (share * sorted.len() as f64) as usize;
    sorted.get(place.min(sorted.len().saturating_sub(1))).copied().unwrap_or(f64::NAN)
}

/// Resident memory, by the kernel.
fn memory_mib(process: &Worker) -> f64 {
    let status = std::fs::read_to_string(format!("/proc/{}/status", process.id())).unwrap();
    let line = status.lines().find(|line| line.starts_with("VmRSS:")).unwrap();
    line.split_whitespace().nth(1).unwrap().parse::<f64>().unwrap() / 1024.0
}

fn handles(process: &Worker) -> usize {
    std::fs::read_dir(format!("/proc/{}/fd", process.id())).unwrap().count()
}
