//! Random histories against a plain map: two workers that forget and crash, replays, compaction and
//! vacuum, a reader that follows and one that comes fresh.
//!
//! `BSAP_MODEL_RUNS` sets how many histories are tried; each is named by its seed.

use std::sync::atomic::{AtomicU64, AtomicUsize};

use chrono::{TimeDelta, Utc};
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use tokio_util::sync::CancellationToken;

use crate::table::maintenance::upkeep::{self, Options};
use crate::table::tests::*;

const RUNS: u64 = 40;
const STEPS: usize = 24;
const PARTITIONS: i32 = 2;
const MESSAGES: i64 = 40;

/// A history under way.
struct World {
    seed: u64,
    rng: ChaCha8Rng,
    memory: Arc<InMemory>,
    store: Store,
    /// What stands in Kafka, by partition.
    topic: Vec<Vec<Row>>,
    follower: Follower,
    followed: BTreeMap<String, Row>,
    crashes: usize,
}

fn keep_newest(images: &mut BTreeMap<String, Row>, row: Row) {
    match images.get(row.image_id.as_str()) {
        Some(known) if !row.supersedes(known) => {}
        _ => {
            images.insert(row.image_id.to_string(), row);
        }
    }
}

impl World {
    async fn new(seed: u64) -> Self {
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        let topic = (0..PARTITIONS)
            .map(|p| {
                (0..MESSAGES)
                    .map(|offset| {
                        let id = format!("i{}", rng.random_range(0..8));
                        let mut row = row(&id, rng.random_range(1..9), rng.random_ratio(1, 4));
                        // No two rows are made at the same moment.
                        row.embedded_at += TimeDelta::microseconds(offset * 10 + i64::from(p));
                        row
                    })
                    .collect()
            })
            .collect();
        let memory = Arc::new(InMemory::new());
        let store = Store::wrap(memory.clone());
        Writer::open(&store, &generation(), 1).await.unwrap();
        let follower = Follower::open(&store, &generation()).await.unwrap();
        let followed = BTreeMap::new();
        Self { seed, rng, memory, store, topic, follower, followed, crashes: 0 }
    }

    /// The store, through a crash at a random write in one of three cases.
    fn maybe_crashing(&mut self) -> Store {
        if self.rng.random_ratio(2, 3) {
            return self.store.clone();
        }
        let at = self.rng.random_range(0..6);
        let kind = if self.rng.random() { Fault::Crash(at) } else { Fault::CrashAfter(at) };
        let faulty = Faulty::over(self.memory.clone(), kind);
        faulty.armed.store(true, AtomicOrdering::SeqCst);
        self.crashes += 1;
        Store::wrap(Arc::new(faulty))
    }

    async fn step(&mut self, stale: &mut [Writer; 2]) {
        match self.rng.random_range(0..10) {
            0..6 => self.work(stale).await,
            6 => {
                // A worker that comes anew.
                let i = self.rng.random_range(0..2);
                stale[i] = Writer::open(&self.store, &generation(), 4).await.unwrap();
            }
            7 => self.compact().await,
            8 => self.vacuum().await,
            _ => self.follow().await,
        }
    }

    /// A worker commits some messages of a partition, from where it believes the table to be.
    async fn work(&mut self, workers: &mut [Writer; 2]) {
        let partition = partition(self.rng.random_range(0..PARTITIONS));
        let replay = if self.rng.random_ratio(1, 6) { "again" } else { "" };
        let i = self.rng.random_range(0..2);
        let expected = {
            let writer = Writer::open(&self.store, &generation(), 4).await.unwrap();
            writer.replaying(replay).position(&partition).await.unwrap()
        };
        // Sometimes it believes what was true a while ago, and consumes again what is stored.
        let back = if self.rng.random_ratio(1, 4) { self.rng.random_range(0..4) } else { 0 };
        let expected = expected.map(|e| e - back).filter(|e| *e > 0);
        let from = expected.unwrap_or_default();
        let to = (from + self.rng.random_range(1..6)).min(MESSAGES);
        if from >= to {
            return;
        }
        let rows = &self.topic[partition.number as usize];
        let rows = (from..to).map(|o| (o, rows[o as usize].clone())).collect();
        let one = PartitionBatch { partition, expected, next_offset: to, rows };
        let crashing = self.maybe_crashing();
        if Arc::ptr_eq(crashing.objects(), self.store.objects()) && replay.is_empty() {
            workers[i].append(vec![one]).await.unwrap();
        } else if let Ok(writer) = Writer::open(&crashing, &generation(), 1).await {
            let _ = writer.replaying(replay).append(vec![one]).await;
        }
    }

    async fn compact(&mut self) {
        let options = Options {
            merge_files: self.rng.random_range(2..5),
            superseded_percent: self.rng.random_range(1..60),
            tombstone_days: 0,
            ..Options::default()
        };
        let depth = if self.rng.random() { Depth::Deep } else { Depth::Merge };
        let store = self.maybe_crashing();
        let Ok(mut compactor) = Compactor::open(&store, &generation(), &options, 1).await else {
            return;
        };
        let now = Utc::now() + TimeDelta::days(self.rng.random_range(0..3));
        let _ = compactor.run(depth, now, &|_, _| {}, &CancellationToken::new()).await;
    }

    async fn vacuum(&mut self) {
        let later = Utc::now() + TimeDelta::days(5);
        let store = self.maybe_crashing();
        let _ = upkeep::vacuum(&store, &generation(), &Options::default(), later, false).await;
    }

    async fn follow(&mut self) {
        self.follower.wait_a_minute();
        while let Some(changes) = self.follower.next(&|_, _| {}).await.unwrap() {
            if changes.whole {
                self.followed.clear();
            }
            for row in changes.rows {
                keep_newest(&mut self.followed, row);
            }
        }
    }

    /// Compares what is stored with what the positions say is consumed.
    async fn check(&mut self) {
        let mut wanted = BTreeMap::new();
        let mut usual = Writer::open(&self.store, &generation(), 4).await.unwrap();
        let replay = Writer::open(&self.store, &generation(), 4).await.unwrap();
        let mut replay = replay.replaying("again");
        for number in 0..PARTITIONS {
            let one = usual.position(&partition(number)).await.unwrap().unwrap_or_default();
            let two = replay.position(&partition(number)).await.unwrap().unwrap_or_default();
            for row in &self.topic[number as usize][..one.max(two) as usize] {
                keep_newest(&mut wanted, row.clone());
            }
        }
        // A whole table of some files comes in some parts.
        let fresh = Follower::open(&self.store, &generation()).await.unwrap();
        let mut fresh = fresh.in_parts_of(self.rng.random_range(1..40_000));
        let mut found = BTreeMap::new();
        for row in fresh.next(&|_, _| {}).await.unwrap().unwrap().rows {
            keep_newest(&mut found, row);
        }
        assert_eq!(found, wanted, "seed {}: a fresh reader", self.seed);
        self.follow().await;
        assert_eq!(self.followed, wanted, "seed {}: a reader that followed", self.seed);
    }
}

/// Tries one history; returns how many crashes it had.
async fn history(seed: u64) -> usize {
    let mut world = World::new(seed).await;
    let mut workers = [
        Writer::open(&world.store, &generation(), 4).await.unwrap(),
        Writer::open(&world.store, &generation(), 4).await.unwrap(),
    ];
    for step in 0..STEPS {
        world.step(&mut workers).await;
        if step % 8 == 7 {
            world.check().await;
        }
    }
    world.crashes
}

#[test]
fn any_history_leaves_the_newest_of_every_image() {
    let wanted = std::env::var("BSAP_MODEL_RUNS").ok();
    let runs =
        wanted.as_ref().map_or(RUNS, |runs| runs.parse().expect("BSAP_MODEL_RUNS: a number"));
    let seed = std::env::var("BSAP_MODEL_SEED").ok();
    let seed = seed.map(|seed| seed.parse::<u64>().expect("BSAP_MODEL_SEED: a number"));
    let any = if wanted.is_some() { rand::random::<u32>().into() } else { 0 };
    let base = seed.unwrap_or(any);
    println!("{runs} histories from seed {base} (BSAP_MODEL_SEED)");
    let (next, crashes) = (AtomicU64::new(base), AtomicUsize::new(0));
    std::thread::scope(|scope| {
        for _ in 0..std::thread::available_parallelism().unwrap().get() {
            scope.spawn(|| {
                let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
                let runtime = runtime.unwrap();
                loop {
                    let seed = next.fetch_add(1, AtomicOrdering::SeqCst);
                    if seed >= base + runs {
                        return;
                    }
                    crashes.fetch_add(runtime.block_on(history(seed)), AtomicOrdering::SeqCst);
                }
            });
        }
    });
    let crashes = crashes.into_inner();
    println!("{runs} histories of {STEPS} steps from seed {base}, {crashes} crashes");
    assert!(crashes as u64 > runs);
}
