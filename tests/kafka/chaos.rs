//! Anything fails at any time: rounds of faults drawn at random while events go on and the table is
//! tidied, each seed its own history.

use std::fmt;
use std::time::Duration;

use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use tokio::time::sleep;

use bsap::world::{Worker, World};

/// Messages sent in a round.
const MESSAGES_PER_ROUND: u64 = 60;
/// Rounds between two comparisons with what was sent.
const ROUNDS_PER_CHECK: u32 = 25;
/// Workers that run; each fault strikes one of them, or what they depend on.
const WORKER_COUNT: usize = 2;
/// They tidy as often as they may, so that faults strike at that too.
const FREQUENT_MAINTENANCE: [(&str, &str); 2] =
    [("UPKEEP__EVERY_SECONDS", "2"), ("UPKEEP__MERGE_FILES", "3")];

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Fault {
    WorkerKilled,
    WorkerStopped,
    WorkerAsleep,
    BrokerKilled,
    BrokerSilent,
    CompactionKilled,
    ReindexKilled,
    StoreKilled,
}

impl Fault {
    const ALL: [Self; 8] = [
        Self::WorkerKilled,
        Self::WorkerStopped,
        Self::WorkerAsleep,
        Self::BrokerKilled,
        Self::BrokerSilent,
        Self::CompactionKilled,
        Self::ReindexKilled,
        Self::StoreKilled,
    ];
}

/// What was done.
#[derive(Default)]
pub struct FaultCounts([u32; Fault::ALL.len()]);

impl fmt::Display for FaultCounts {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let counted = Fault::ALL.iter().zip(self.0).map(|(fault, n)| format!("{n} × {fault:?}"));
        f.write_str(&counted.collect::<Vec<_>>().join(", "))
    }
}

/// Rounds of faults; compares with what was sent every few rounds and at the end.
pub async fn run_rounds(world: &mut World, rounds: u32, seed: u64) -> FaultCounts {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    let mut workers: Vec<Worker> =
        (0..WORKER_COUNT).map(|_| world.worker_with(&FREQUENT_MAINTENANCE)).collect();
    let mut faults = FaultCounts::default();
    // To find out which fault it was.
    let only = std::env::var("BSAP_CHAOS_ONLY").ok().map(|name| {
        let named = |fault: &Fault| format!("{fault:?}") == name;
        Fault::ALL.iter().position(named).expect("BSAP_CHAOS_ONLY names a fault")
    });
    // A folder cannot be killed: that fault stands last.
    let possible = Fault::ALL.len() - usize::from(world.minio.is_none());
    for round in 1..=rounds {
        world.send(MESSAGES_PER_ROUND).await;
        sleep(Duration::from_millis(rng.random_range(0..3_000))).await;
        let drawn = rng.random_range(0..possible);
        let which = only.unwrap_or(drawn);
        faults.0[which] += 1;
        if matches!(
            Fault::ALL[which],
            Fault::StoreKilled | Fault::BrokerKilled | Fault::BrokerSilent
        ) {
            // One that starts while it reaches neither says so and ends, as it should.
            for worker in &workers {
                wait_until_joined(worker).await;
            }
        }
        let victim = rng.random_range(0..WORKER_COUNT);
        inject_fault(world, Fault::ALL[which], &mut workers[victim], &mut rng).await;
        if round % ROUNDS_PER_CHECK == 0 || round == rounds {
            world.caught_up(&mut workers.iter_mut().collect::<Vec<_>>()).await;
            println!("round {round} of {rounds}, seed {seed}: {faults}");
            world.verify(1).await;
            println!("{}", world.bsap(&["verify"]).trim());
        }
    }
    workers.into_iter().for_each(Worker::stop);
    faults
}

/// Until a worker has its partitions.
async fn wait_until_joined(worker: &Worker) {
    for _ in 0..600 {
        if worker.count("rebalance") > 0 {
            return;
        }
        sleep(Duration::from_millis(100)).await;
    }
    panic!("a worker has not joined the group within a minute");
}

async fn inject_fault(world: &mut World, fault: Fault, worker: &mut Worker, rng: &mut ChaCha8Rng) {
    match fault {
        Fault::WorkerKilled => {
            std::mem::replace(worker, world.worker_with(&FREQUENT_MAINTENANCE)).kill()
        }
        Fault::WorkerStopped => {
            std::mem::replace(worker, world.worker_with(&FREQUENT_MAINTENANCE)).stop()
        }
        Fault::WorkerAsleep => {
            worker.signal("STOP");
            // Its session ends after 6 s: at times it wakes before, at times after.
            sleep(Duration::from_millis(rng.random_range(3_000..9_000))).await;
            worker.signal("CONT");
        }
        Fault::BrokerKilled => {
            world.cluster.end(0, "KILL");
            sleep(Duration::from_millis(rng.random_range(0..3_000))).await;
            world.cluster.launch(0);
            world.cluster.wait_until_ready();
        }
        Fault::BrokerSilent => {
            world.cluster.freeze(0, true);
            sleep(Duration::from_millis(rng.random_range(1_000..8_000))).await;
            world.cluster.freeze(0, false);
        }
        Fault::StoreKilled => {
            let minio = world.minio.as_mut().expect("it is drawn only where there is one");
            minio.kill();
            sleep(Duration::from_millis(rng.random_range(0..5_000))).await;
            minio.launch();
        }
        Fault::CompactionKilled => kill_midway(world, &["compact"], rng).await,
        Fault::ReindexKilled => {
            let set = ["photographs", "ecommerce-en"][rng.random_range(0..2)];
            kill_midway(world, &["reindex", "statistics", "--prompt-set", set], rng).await;
        }
    }
}

/// Starts a command and kills it somewhere in its work.
async fn kill_midway(world: &mut World, arguments: &[&str], rng: &mut ChaCha8Rng) {
    let started = world.start(arguments, &[]);
    sleep(Duration::from_millis(rng.random_range(100..2_500))).await;
    started.kill();
}
