//! Compares random histories with a plain map: two workers that restart and crash, replays, compaction and
//! vacuum, one follower from the beginning and new ones at the end.
//!
//! `BSAP_MODEL_RUNS` sets the number of histories; each is identified by its seed.

use std::sync::atomic::{AtomicU64, AtomicUsize};

use chrono::{TimeDelta, Utc};
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;

use crate::table::maintenance::vacuum;
use crate::table::tests::*;

const HISTORY_COUNT: u64 = 40;
const STEPS_PER_HISTORY: usize = 24;
const PARTITION_COUNT: i32 = 2;
const MESSAGES_PER_PARTITION: i64 = 40;

/// A history in progress.
struct HistoryFixture {
    seed: u64,
    rng: ChaCha8Rng,
    memory: Arc<InMemory>,
    store: Store,
    /// The rows of the messages in Kafka, by partition.
    topic_rows: Vec<Vec<ImageRow>>,
    follower: Follower,
    followed_images: BTreeMap<String, ImageRow>,
    crash_count: usize,
}

fn keep_newest(images: &mut BTreeMap<String, ImageRow>, row: ImageRow) {
    match images.get(row.image_id.as_str()) {
        Some(known) if !row.supersedes(known) => {}
        _ => {
            images.insert(row.image_id.to_string(), row);
        }
    }
}

impl HistoryFixture {
    async fn new(seed: u64) -> Self {
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        let topic = (0..PARTITION_COUNT)
            .map(|p| {
                (0..MESSAGES_PER_PARTITION)
                    .map(|offset| {
                        let id = format!("i{}", rng.random_range(0..8));
                        let mut row = row(&id, rng.random_range(1..9), rng.random_ratio(1, 4));
                        // No two rows are created at the same moment.
                        row.embedded_at += TimeDelta::microseconds(offset * 10 + i64::from(p));
                        row
                    })
                    .collect()
            })
            .collect();
        let memory = Arc::new(InMemory::new());
        let store = Store::from_object_store(memory.clone());
        TableWriter::open(&store, &generation(), 1).await.unwrap();
        let follower = Follower::open(&store, &generation()).await.unwrap();
        let followed = BTreeMap::new();
        Self {
            seed,
            rng,
            memory,
            store,
            topic_rows: topic,
            follower,
            followed_images: followed,
            crash_count: 0,
        }
    }

    /// Returns the store; in one of three cases it crashes at a random write.
    fn maybe_crashing_store(&mut self) -> Store {
        if self.rng.random_ratio(2, 3) {
            return self.store.clone();
        }
        let at = self.rng.random_range(0..6);
        let kind = if self.rng.random() {
            FaultKind::CrashBeforeWrite(at)
        } else {
            FaultKind::CrashAfterWrite(at)
        };
        let faulty = FaultyStore::wrap(self.memory.clone(), kind);
        faulty.is_armed.store(true, AtomicOrdering::SeqCst);
        self.crash_count += 1;
        Store::from_object_store(Arc::new(faulty))
    }

    async fn run_random_step(&mut self, workers: &mut [TableWriter; 2]) {
        match self.rng.random_range(0..10) {
            0..6 => self.commit_random_messages(workers).await,
            6 => {
                // A worker is restarted.
                let i = self.rng.random_range(0..2);
                workers[i] = TableWriter::open(&self.store, &generation(), 4).await.unwrap();
            }
            7 => self.run_compaction().await,
            8 => self.run_vacuum().await,
            _ => self.follow_changes().await,
        }
    }

    /// Lets a worker commit some messages of a partition, from the position that it believes to be stored.
    async fn commit_random_messages(&mut self, workers: &mut [TableWriter; 2]) {
        let partition = partition(self.rng.random_range(0..PARTITION_COUNT));
        let replay = if self.rng.random_ratio(1, 6) { "again" } else { "" };
        let i = self.rng.random_range(0..2);
        let expected = {
            let writer = TableWriter::open(&self.store, &generation(), 4).await.unwrap();
            writer
                .with_replay_name(replay)
                .read_position(&partition, &CancellationToken::new())
                .await
                .unwrap()
        };
        // Sometimes its position is old, and it consumes messages again that are stored.
        let back = if self.rng.random_ratio(1, 4) { self.rng.random_range(0..4) } else { 0 };
        let expected = expected.map(|e| e - back).filter(|e| *e > 0);
        let from = expected.unwrap_or_default();
        let to = (from + self.rng.random_range(1..6)).min(MESSAGES_PER_PARTITION);
        if from >= to {
            return;
        }
        let rows = &self.topic_rows[partition.number as usize];
        let rows = (from..to).map(|o| (o, rows[o as usize].clone())).collect();
        let one = PartitionBatch {
            log_number: 0,
            anchor: None,
            last_message: None,
            partition,
            expected_position: expected,
            next_offset: to,
            rows,
        };
        let crashing = self.maybe_crashing_store();
        if Arc::ptr_eq(crashing.object_store(), self.store.object_store()) && replay.is_empty() {
            workers[i].append(vec![one], &CancellationToken::new()).await.unwrap();
        } else if let Ok(writer) = TableWriter::open(&crashing, &generation(), 1).await {
            let _ =
                writer.with_replay_name(replay).append(vec![one], &CancellationToken::new()).await;
        }
    }

    async fn run_compaction(&mut self) {
        let options = MaintenanceOptions {
            files_per_merge: self.rng.random_range(2..5),
            max_superseded_percent: self.rng.random_range(1..60),
            tombstone_retention_days: 0,
            ..MaintenanceOptions::default()
        };
        let mode = if self.rng.random() { CompactionMode::Deep } else { CompactionMode::Merge };
        let store = self.maybe_crashing_store();
        let Ok(mut compactor) = Compactor::open(&store, &generation(), &options, 1).await else {
            return;
        };
        let now = Utc::now() + TimeDelta::days(self.rng.random_range(0..3));
        let _ = compactor.run(mode, now, &|_, _| {}, &CancellationToken::new()).await;
    }

    async fn run_vacuum(&mut self) {
        let later = Utc::now() + TimeDelta::days(5);
        let store = self.maybe_crashing_store();
        let _ = vacuum::vacuum(&store, &generation(), &MaintenanceOptions::default(), later, false)
            .await;
    }

    async fn follow_changes(&mut self) {
        self.follower.expire_resync_timeout();
        while let Some(changes) = self.follower.next(&|_, _| {}).await.unwrap() {
            if changes.is_full_snapshot {
                self.followed_images.clear();
            }
            for row in changes.rows {
                keep_newest(&mut self.followed_images, row);
            }
        }
    }

    /// Compares the stored rows with those that are consumed according to the positions.
    async fn compare_with_expected(&mut self) {
        let mut expected = BTreeMap::new();
        let mut usual = TableWriter::open(&self.store, &generation(), 4).await.unwrap();
        let replay = TableWriter::open(&self.store, &generation(), 4).await.unwrap();
        let mut replay = replay.with_replay_name("again");
        for number in 0..PARTITION_COUNT {
            let one = usual
                .read_position(&partition(number), &CancellationToken::new())
                .await
                .unwrap()
                .unwrap_or_default();
            let two = replay
                .read_position(&partition(number), &CancellationToken::new())
                .await
                .unwrap()
                .unwrap_or_default();
            for row in &self.topic_rows[number as usize][..one.max(two) as usize] {
                keep_newest(&mut expected, row.clone());
            }
        }
        // A table of several files is read in several parts.
        let fresh = Follower::open(&self.store, &generation()).await.unwrap();
        let mut fresh = fresh.with_max_part_bytes(self.rng.random_range(1..40_000));
        let mut stored = BTreeMap::new();
        for row in fresh.next(&|_, _| {}).await.unwrap().unwrap().rows {
            keep_newest(&mut stored, row);
        }
        assert_eq!(stored, expected, "seed {}: a new follower", self.seed);
        self.follow_changes().await;
        assert_eq!(self.followed_images, expected, "seed {}: the old follower", self.seed);
    }
}

/// Runs one history. Returns how many crashes it had.
async fn run_history(seed: u64) -> usize {
    let mut history = HistoryFixture::new(seed).await;
    let mut workers = [
        TableWriter::open(&history.store, &generation(), 4).await.unwrap(),
        TableWriter::open(&history.store, &generation(), 4).await.unwrap(),
    ];
    for step in 0..STEPS_PER_HISTORY {
        history.run_random_step(&mut workers).await;
        if step % 8 == 7 {
            history.compare_with_expected().await;
        }
    }
    history.crash_count
}

#[test]
fn any_history_leaves_the_newest_of_every_image() {
    let runs_variable = std::env::var("BSAP_MODEL_RUNS").ok();
    let runs = runs_variable
        .as_ref()
        .map_or(HISTORY_COUNT, |runs| runs.parse().expect("BSAP_MODEL_RUNS: a number"));
    let seed = std::env::var("BSAP_MODEL_SEED").ok();
    let seed = seed.map(|seed| seed.parse::<u64>().expect("BSAP_MODEL_SEED: a number"));
    let any = if runs_variable.is_some() { rand::random::<u32>().into() } else { 0 };
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
                    crashes.fetch_add(runtime.block_on(run_history(seed)), AtomicOrdering::SeqCst);
                }
            });
        }
    });
    let crashes = crashes.into_inner();
    println!("{runs} histories of {STEPS_PER_HISTORY} steps from seed {base}, {crashes} crashes");
    assert!(crashes as u64 > runs);
}
