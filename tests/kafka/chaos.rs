//! Anything fails at any time: rounds of faults drawn at random while events go on and the table is
//! tidied, each seed its own history.

use std::fmt;
use std::time::Duration;

use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use tokio::time::sleep;

use crate::fixture::{Fixture, WorkerProcess};

/// Messages sent in a round.
const MESSAGES_PER_ROUND: u64 = 60;
/// Rounds between two comparisons with what was sent.
const ROUNDS_PER_CHECK: u32 = 25;
/// Workers that run; each fault strikes one of them, or what they depend on.
const WORKER_COUNT: usize = 2;
/// They tidy as often as they may, so that faults strike at that too.
const FREQUENT_MAINTENANCE: [(&str, &str); 2] =
    [("MAINTENANCE__INTERVAL_SECONDS", "2"), ("MAINTENANCE__FILES_PER_MERGE", "3")];

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
pub async fn run_rounds(fixture: &mut Fixture, rounds: u32, seed: u64) -> FaultCounts {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    let mut workers: Vec<WorkerProcess> =
        (0..WORKER_COUNT).map(|_| fixture.start_worker_with(&FREQUENT_MAINTENANCE)).collect();
    let mut faults = FaultCounts::default();
    // To find out which fault it was.
    let only = std::env::var("BSAP_CHAOS_ONLY").ok().map(|name| {
        let named = |fault: &Fault| format!("{fault:?}") == name;
        Fault::ALL.iter().position(named).expect("BSAP_CHAOS_ONLY names a fault")
    });
    // A folder cannot be killed: that fault stands last.
    let possible = Fault::ALL.len() - usize::from(fixture.minio.is_none());
    for round in 1..=rounds {
        fixture.send_events(MESSAGES_PER_ROUND).await;
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
        inject_fault(fixture, Fault::ALL[which], &mut workers[victim], &mut rng).await;
        if round % ROUNDS_PER_CHECK == 0 || round == rounds {
            fixture.wait_until_caught_up(&mut workers.iter_mut().collect::<Vec<_>>()).await;
            println!("round {round} of {rounds}, seed {seed}: {faults}");
            fixture.assert_table_matches_events(1).await;
            println!("{}", fixture.run_command_ok(&["verify"]).trim());
        }
    }
    workers.into_iter().for_each(WorkerProcess::stop);
    faults
}

/// Until a worker has its partitions.
async fn wait_until_joined(worker: &WorkerProcess) {
    for _ in 0..600 {
        if worker.count_logged_events("rebalance") > 0 {
            return;
        }
        sleep(Duration::from_millis(100)).await;
    }
    panic!("a worker has not joined the group within a minute");
}

async fn inject_fault(
    fixture: &mut Fixture,
    fault: Fault,
    worker: &mut WorkerProcess,
    rng: &mut ChaCha8Rng,
) {
    match fault {
        Fault::WorkerKilled => {
            std::mem::replace(worker, fixture.start_worker_with(&FREQUENT_MAINTENANCE)).kill()
        }
        Fault::WorkerStopped => {
            std::mem::replace(worker, fixture.start_worker_with(&FREQUENT_MAINTENANCE)).stop()
        }
        Fault::WorkerAsleep => {
            worker.send_signal("STOP");
            // Its session ends after 6 s: at times it wakes before, at times after.
            sleep(Duration::from_millis(rng.random_range(3_000..9_000))).await;
            worker.send_signal("CONT");
        }
        Fault::BrokerKilled => {
            fixture.cluster.stop_broker(0, "KILL");
            sleep(Duration::from_millis(rng.random_range(0..3_000))).await;
            fixture.cluster.launch_broker(0);
            fixture.cluster.wait_until_ready();
        }
        Fault::BrokerSilent => {
            fixture.cluster.set_frozen(0, true);
            sleep(Duration::from_millis(rng.random_range(1_000..8_000))).await;
            fixture.cluster.set_frozen(0, false);
        }
        Fault::StoreKilled => {
            let minio = fixture.minio.as_mut().expect("it is drawn only where there is one");
            minio.kill();
            sleep(Duration::from_millis(rng.random_range(0..5_000))).await;
            minio.launch();
        }
        Fault::CompactionKilled => kill_midway(fixture, &["compact"], rng).await,
        Fault::ReindexKilled => {
            let set = ["photographs", "ecommerce-en"][rng.random_range(0..2)];
            kill_midway(fixture, &["reindex", "statistics", "--prompt-set", set], rng).await;
        }
    }
}

/// Starts a command and kills it somewhere in its work.
async fn kill_midway(fixture: &mut Fixture, arguments: &[&str], rng: &mut ChaCha8Rng) {
    let started = fixture.start_command(arguments, &[]);
    sleep(Duration::from_millis(rng.random_range(100..2_500))).await;
    started.kill();
}
