//! Anything fails at any time: rounds of random faults while events are sent and the table is maintained.
//! A seed determines the faults.

use std::fmt;
use std::time::Duration;

use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use tokio::time::sleep;

use crate::fixture::{Fixture, WorkerProcess};

/// Messages sent per round.
const MESSAGES_PER_ROUND: u64 = 60;
/// Rounds between two comparisons with the sent events.
const ROUNDS_PER_CHECK: u32 = 25;
/// Running workers; each fault hits one of them, or a service they depend on.
const WORKER_COUNT: usize = 2;
/// The shortest interval of maintenance, so that faults hit it too.
const FREQUENT_MAINTENANCE: [(&str, &str); 2] =
    [("MAINTENANCE__INTERVAL_SECONDS", "2"), ("MAINTENANCE__FILES_PER_MERGE", "3")];

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Fault {
    WorkerKilled,
    WorkerStopped,
    WorkerSuspended,
    BrokerKilled,
    BrokerFrozen,
    CompactionKilled,
    ReindexKilled,
    StoreKilled,
}

impl Fault {
    const ALL: [Self; 8] = [
        Self::WorkerKilled,
        Self::WorkerStopped,
        Self::WorkerSuspended,
        Self::BrokerKilled,
        Self::BrokerFrozen,
        Self::CompactionKilled,
        Self::ReindexKilled,
        Self::StoreKilled,
    ];
}

/// How often each fault was injected.
#[derive(Default)]
pub struct FaultCounts([u32; Fault::ALL.len()]);

impl fmt::Display for FaultCounts {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let counts = Fault::ALL.iter().zip(self.0).map(|(fault, n)| format!("{n} × {fault:?}"));
        f.write_str(&counts.collect::<Vec<_>>().join(", "))
    }
}

/// Runs rounds of faults; compares the table with the sent events every few rounds and at the end.
pub async fn run_rounds(fixture: &mut Fixture, rounds: u32, seed: u64) -> FaultCounts {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    let mut workers: Vec<WorkerProcess> =
        (0..WORKER_COUNT).map(|_| fixture.start_worker_with(&FREQUENT_MAINTENANCE)).collect();
    let mut faults = FaultCounts::default();
    // For debugging: inject only this fault.
    let only_fault = std::env::var("BSAP_CHAOS_ONLY").ok().map(|name| {
        let has_name = |fault: &Fault| format!("{fault:?}") == name;
        Fault::ALL.iter().position(has_name).expect("BSAP_CHAOS_ONLY names a fault")
    });
    // A folder cannot be killed: leave out the last fault.
    let fault_count = Fault::ALL.len() - usize::from(fixture.minio.is_none());
    for round in 1..=rounds {
        fixture.send_events(MESSAGES_PER_ROUND).await;
        sleep(Duration::from_millis(rng.random_range(0..3_000))).await;
        let drawn = rng.random_range(0..fault_count);
        let which = only_fault.unwrap_or(drawn);
        faults.0[which] += 1;
        if matches!(
            Fault::ALL[which],
            Fault::StoreKilled | Fault::BrokerKilled | Fault::BrokerFrozen
        ) {
            // A worker that starts while a service is down ends with an error, as it should.
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

/// Waits until a worker was assigned partitions.
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
            std::mem::replace(worker, fixture.start_worker_with(&FREQUENT_MAINTENANCE)).kill();
        }
        Fault::WorkerStopped => {
            std::mem::replace(worker, fixture.start_worker_with(&FREQUENT_MAINTENANCE)).stop();
        }
        Fault::WorkerSuspended => {
            worker.send_signal("STOP");
            // Its session expires after 6 s: it resumes sometimes before, sometimes after.
            sleep(Duration::from_millis(rng.random_range(3_000..9_000))).await;
            worker.send_signal("CONT");
        }
        Fault::BrokerKilled => {
            fixture.cluster.stop_broker(0, "KILL");
            sleep(Duration::from_millis(rng.random_range(0..3_000))).await;
            fixture.cluster.launch_broker(0);
            fixture.cluster.wait_until_ready();
        }
        Fault::BrokerFrozen => {
            fixture.cluster.set_frozen(0, true);
            sleep(Duration::from_millis(rng.random_range(1_000..8_000))).await;
            fixture.cluster.set_frozen(0, false);
        }
        Fault::StoreKilled => {
            let minio =
                fixture.minio.as_mut().expect("the fault is drawn only if there is a server");
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

/// Starts a command and kills it after a random time.
async fn kill_midway(fixture: &mut Fixture, arguments: &[&str], rng: &mut ChaCha8Rng) {
    let started = fixture.start_command(arguments, &[]);
    sleep(Duration::from_millis(rng.random_range(100..2_500))).await;
    started.kill();
}
