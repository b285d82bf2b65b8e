//! A Kafka cluster, a catalogue, and workers as processes.

use std::collections::BTreeMap;
use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use bsap::clip::{self, ClipModel, Encoders};
use bsap::kafka;
use bsap::record::{TopicPartition, VersionOrdering};
use bsap::store::Store;
use bsap::table::{Generation, TableWriter};
use rdkafka::consumer::{BaseConsumer, Consumer};
use rdkafka::producer::{FutureProducer, FutureRecord};
use rdkafka::{Offset, TopicPartitionList};
use serde_json::Value;
use tokio_util::sync::CancellationToken;

use crate::broker::{Cluster, send_signal};
use crate::events::EventGenerator;
use crate::minio::Minio;

pub const TOPIC: &str = "images";
pub const REEMBED_TOPIC: &str = "images.reindex";
pub const DEAD_LETTER_TOPIC: &str = "images.dead-letters";
pub const GROUP: &str = "bsap";
/// How long a catalogue may take to catch up: per thousand messages, and the minimum.
const CATCH_UP_TIMEOUTS: (Duration, Duration) = (Duration::from_secs(90), Duration::from_secs(180));

/// Returns the number of messages and of kills per scenario; more of both with `BSAP_KAFKA_LONG`.
pub fn scenario_size() -> (u64, u32) {
    if std::env::var_os("BSAP_KAFKA_LONG").is_some() { (20_000, 20) } else { (2_000, 3) }
}

/// A Kafka cluster and a catalogue, and the events sent so far.
pub struct Fixture {
    pub cluster: Cluster,
    pub events: EventGenerator,
    pub folder: tempfile::TempDir,
    pub partitions: i32,
    pub generation: Generation,
    /// URL or folder of the catalogue.
    pub catalogue: String,
    /// The S3 server of the catalogue; `None` if it is in a folder.
    pub minio: Option<Minio>,
    pub producer: FutureProducer,
    pub scenario: &'static str,
    workers_started: usize,
    /// Options that replace those of the fixture, by the names of their environment variables.
    options: BTreeMap<String, String>,
    pub started: Instant,
}

/// A process of `bsap` that runs until it is stopped.
pub struct WorkerProcess {
    process: Child,
    log: PathBuf,
}

impl Fixture {
    pub async fn build(scenario: &'static str, brokers: usize) -> Self {
        Self::with_cluster(scenario, Cluster::start(brokers), 6).await
    }

    pub async fn with_cluster(scenario: &'static str, cluster: Cluster, partitions: i32) -> Self {
        let started = Instant::now();
        cluster.create_topic(TOPIC, partitions, 1_000_000).await;
        cluster.create_topic(DEAD_LETTER_TOPIC, 2, 2_000_000).await;
        let folder = tempfile::tempdir().unwrap();
        let catalogue = folder.path().join("catalogue").display().to_string();
        std::fs::create_dir(folder.path().join("pictures")).unwrap();
        let mut config = cluster.client_config();
        let producer = config.set("enable.idempotence", "true").create().unwrap();
        let model = ClipModel::load(&clip::ModelOptions {
            checkpoint: concat!(env!("CARGO_MANIFEST_DIR"), "/models/demo").into(),
            ..clip::ModelOptions::default()
        })
        .unwrap();
        let card = model.card();
        let generation = Generation::new(
            &card.name,
            &card.fingerprint,
            card.dimension,
            card.logit_scale,
            VersionOrdering::Sequence,
        );
        let events = EventGenerator::new(1, &folder.path().join("pictures"));
        Self {
            cluster,
            events,
            folder,
            partitions,
            generation,
            catalogue,
            minio: None,
            producer,
            scenario,
            workers_started: 0,
            options: BTreeMap::new(),
            started,
        }
    }

    /// Puts the catalogue on an S3 server if `tests/run` has one; otherwise it stays in a folder.
    pub fn with_catalogue_on_s3(mut self) -> Self {
        self.minio = Minio::start();
        if self.minio.is_some() {
            self.catalogue = format!("{}/catalogue", Minio::BUCKET_URL);
        }
        println!("{}: the catalogue is {}", self.scenario, self.catalogue);
        self
    }

    /// Environment variables with the options of the store.
    fn store_variables(&self) -> BTreeMap<String, String> {
        self.minio.as_ref().map(Minio::client_variables).unwrap_or_default()
    }

    pub async fn send_events(&mut self, count: u64) {
        self.events.send(&self.producer, TOPIC, count).await;
    }

    pub fn kafka_options(&self) -> kafka::KafkaOptions {
        kafka::KafkaOptions {
            brokers: self.cluster.bootstrap_servers(),
            ..kafka::KafkaOptions::default()
        }
    }

    pub fn store(&self) -> Store {
        Store::open(&self.catalogue, &self.store_variables()).unwrap()
    }

    /// Sends one message.
    pub async fn send_message(&self, key: &str, value: &str) {
        let record = FutureRecord::to(TOPIC).key(key).payload(value);
        self.producer.send(record, Duration::from_secs(20)).await.unwrap();
    }

    /// Runs a command of `bsap`; returns its exit code and its output.
    pub fn run_command(&self, arguments: &[&str]) -> (Option<i32>, String) {
        let output = self.bsap_command(Path::new("")).args(arguments).output().unwrap();
        let (out, err) = (String::from_utf8(output.stdout), String::from_utf8(output.stderr));
        (output.status.code(), out.unwrap() + &err.unwrap())
    }

    /// Runs a worker that ends by itself; returns its exit code and its standard error.
    pub fn run_worker_to_exit(&self, options: &[(&str, &str)]) -> (Option<i32>, String) {
        let mut command = self.bsap_command(Path::new(""));
        command.arg("ingest");
        for (key, value) in options {
            command.env(format!("BSAP_{key}"), value);
        }
        let output = command.output().unwrap();
        (output.status.code(), String::from_utf8(output.stderr).unwrap())
    }

    /// Runs a command of `bsap` that must succeed; returns its standard output.
    pub fn run_command_ok(&self, arguments: &[&str]) -> String {
        let mut command = self.bsap_command(Path::new(""));
        let output = command.args(arguments).output().unwrap();
        let (out, err) = (String::from_utf8(output.stdout), String::from_utf8(output.stderr));
        let (out, err) = (out.unwrap(), err.unwrap());
        assert!(output.status.success(), "bsap {arguments:?}: {out}{err}");
        out
    }

    /// Returns a command for the program, configured for this fixture.
    pub fn bsap_command(&self, log: &Path) -> Command {
        let settings = [
            ("KAFKA__BROKERS", self.cluster.bootstrap_servers()),
            ("SOURCE__ORDERING", "sequence".into()),
            // The minimum that brokers allow, so that a silent worker is soon replaced.
            ("SOURCE__SESSION_TIMEOUT_MS", "6000".into()),
            ("FETCH__FILE_ROOTS", self.folder.path().join("pictures").display().to_string()),
            ("MODEL__CHECKPOINT", concat!(env!("CARGO_MANIFEST_DIR"), "/models/demo").into()),
            ("PROMPTS__SETS", "demo".into()),
            ("TABLE__URL", self.catalogue.clone()),
            // Many small commits, so that faults hit different moments of a commit.
            ("INGEST__COMMIT_MS", "200".into()),
            ("HTTP__LISTEN", "127.0.0.1:0".into()),
            ("LOG__FORMAT", "json".into()),
            ("LOG__FILE", log.display().to_string()),
        ];
        let mut command = Command::new(env!("CARGO_BIN_EXE_bsap"));
        command.envs(self.store_variables());
        for (key, value) in settings {
            command.env(format!("BSAP_{key}"), value);
        }
        for (key, value) in &self.options {
            command.env(format!("BSAP_{key}"), value);
        }
        command
    }

    /// Sets an option of all commands from now on, by the name of its environment variable.
    pub fn set_option(&mut self, key: &str, value: &str) {
        self.options.insert(key.to_owned(), value.to_owned());
    }

    /// Starts `bsap ingest` with further options, by the names of their environment variables.
    pub fn start_worker_with(&mut self, options: &[(&str, &str)]) -> WorkerProcess {
        self.start_command(&["ingest"], options)
    }

    /// Starts a command of `bsap` that runs until it is stopped.
    pub fn start_command(&mut self, arguments: &[&str], options: &[(&str, &str)]) -> WorkerProcess {
        self.workers_started += 1;
        let log = self.folder.path().join(format!("worker-{}.log", self.workers_started));
        // Standard error contains why a process does not start.
        let stderr = File::options().create(true).append(true).open(&log).unwrap();
        let mut command = self.bsap_command(&log);
        command.args(arguments).stdout(Stdio::null()).stderr(stderr);
        for (key, value) in options {
            command.env(format!("BSAP_{key}"), value);
        }
        WorkerProcess { process: command.spawn().unwrap(), log }
    }

    pub fn start_worker(&mut self) -> WorkerProcess {
        self.start_worker_with(&[])
    }

    pub fn partitions(&self) -> impl Iterator<Item = TopicPartition> + use<> {
        (0..self.partitions).map(|number| TopicPartition { topic: TOPIC.into(), number })
    }

    /// Returns the table's position of each partition.
    pub async fn table_positions(&self) -> BTreeMap<i32, i64> {
        self.replay_positions("").await
    }

    async fn replay_positions(&self, replay: &str) -> BTreeMap<i32, i64> {
        let writer = TableWriter::open(&self.store(), &self.generation, 20).await.unwrap();
        let mut writer = writer.with_replay_name(replay);
        let mut positions = BTreeMap::new();
        for partition in self.partitions() {
            let position =
                writer.read_position(&partition, &CancellationToken::new()).await.unwrap();
            positions.insert(partition.number, position.unwrap_or_default());
        }
        positions
    }

    /// Returns the offsets that the group has committed to Kafka.
    pub fn committed_offsets(&self) -> BTreeMap<i32, i64> {
        let consumer: BaseConsumer =
            self.cluster.client_config().set("group.id", GROUP).create().unwrap();
        let mut list = TopicPartitionList::new();
        for p in self.partitions() {
            list.add_partition(&p.topic, p.number);
        }
        let found = consumer.committed_offsets(list, Duration::from_secs(20)).unwrap();
        let offset = |offset: Offset| if let Offset::Offset(n) = offset { n } else { 0 };
        found.elements().iter().map(|e| (e.partition(), offset(e.offset()))).collect()
    }

    /// Sets the group's offsets back to zero, as an operator might.
    pub fn reset_group_offsets(&self) {
        let consumer: BaseConsumer =
            self.cluster.client_config().set("group.id", GROUP).create().unwrap();
        let mut list = TopicPartitionList::new();
        for p in self.partitions() {
            list.add_partition_offset(&p.topic, p.number, Offset::Offset(0)).unwrap();
        }
        consumer.commit(&list, rdkafka::consumer::CommitMode::Sync).unwrap();
    }

    /// Returns the end of each partition of the topic.
    pub fn end_offsets(&self) -> BTreeMap<i32, i64> {
        let consumer: BaseConsumer = self.cluster.client_config().create().unwrap();
        // A broker that has just restarted does not lead its partitions yet.
        let end = |p: TopicPartition| {
            let started = Instant::now();
            loop {
                match consumer.fetch_watermarks(&p.topic, p.number, Duration::from_secs(20)) {
                    Ok((_, end)) => return (p.number, end),
                    Err(_) if started.elapsed() < Duration::from_secs(60) => {
                        std::thread::sleep(Duration::from_millis(500));
                    }
                    Err(error) => panic!("{}[{}]: {error}", p.topic, p.number),
                }
            }
        };
        self.partitions().map(end).collect()
    }

    /// Returns the number of messages that the table has not consumed yet.
    pub async fn lag(&self) -> i64 {
        self.end_offsets().values().sum::<i64>()
            - self.table_positions().await.values().sum::<i64>()
    }

    /// Waits until the table has consumed the whole topic. Fails if one of `workers` ends.
    pub async fn wait_until_caught_up(&self, workers: &mut [&mut WorkerProcess]) {
        self.wait_until_replayed("", workers).await;
    }

    /// Waits until the replay of this name has consumed the whole topic.
    pub async fn wait_until_replayed(&self, replay: &str, workers: &mut [&mut WorkerProcess]) {
        let limit = (CATCH_UP_TIMEOUTS.0 * (self.events.sent_messages / 1_000) as u32)
            .max(CATCH_UP_TIMEOUTS.1);
        let (ends, started) = (self.end_offsets(), Instant::now());
        loop {
            let positions = self.replay_positions(replay).await;
            if positions == ends {
                return;
            }
            for worker in workers.iter_mut() {
                worker.assert_alive();
            }
            assert!(
                started.elapsed() < limit,
                "{}: stuck at {positions:?} of {ends:?}: {}",
                self.scenario,
                workers.iter().map(|w| w.log_tail()).collect::<Vec<_>>().join("\n")
            );
            tokio::time::sleep(Duration::from_millis(500)).await;
        }
    }

    /// Waits until the generation `standby` has consumed both the events and the images to be embedded
    /// again.
    pub async fn wait_until_standby_caught_up(
        &self,
        standby: &Generation,
        workers: &mut [&mut WorkerProcess],
    ) {
        let started = Instant::now();
        loop {
            let mut writer = TableWriter::open(&self.store(), standby, 20).await.unwrap();
            let mut remaining = 0;
            for topic in [TOPIC, REEMBED_TOPIC] {
                for (number, (_, end)) in
                    kafka::fetch_watermarks(&self.kafka_options(), topic).await.unwrap()
                {
                    let partition = TopicPartition { topic: topic.into(), number };
                    remaining += end
                        - writer
                            .read_position(&partition, &CancellationToken::new())
                            .await
                            .unwrap()
                            .unwrap_or_default();
                }
            }
            if remaining == 0 {
                return;
            }
            for worker in workers.iter_mut() {
                worker.assert_alive();
            }
            let log_tails = || workers.iter().map(|w| w.log_tail()).collect::<Vec<_>>().join("\n");
            assert!(
                started.elapsed() < CATCH_UP_TIMEOUTS.1,
                "{}: {remaining} messages remain: {}",
                self.scenario,
                log_tails()
            );
            tokio::time::sleep(Duration::from_millis(500)).await;
        }
    }

    /// Counts an event in the logs of all workers.
    pub fn count_logged_events(&self, event: &str) -> usize {
        let log = |n| count_event_lines(&self.folder.path().join(format!("worker-{n}.log")), event);
        (1..=self.workers_started).map(log).sum()
    }
}

impl WorkerProcess {
    pub fn send_signal(&self, name: &str) {
        send_signal(&self.process, name);
    }

    /// Returns the process id.
    pub fn process_id(&self) -> u32 {
        self.process.id()
    }

    /// Kills the process, as a failure of the machine would.
    pub fn kill(mut self) {
        self.process.kill().unwrap();
        self.process.wait().unwrap();
    }

    /// Asks the process to end, and expects success.
    pub fn stop(mut self) {
        send_signal(&self.process, "TERM");
        let status = self.process.wait().unwrap();
        assert!(status.success(), "the worker ended with {status}: {}", self.log_tail());
    }

    fn assert_alive(&mut self) {
        if let Some(status) = self.process.try_wait().unwrap() {
            panic!("a worker ended by itself with {status}: {}", self.log_tail());
        }
    }

    /// Counts an event in the log.
    pub fn count_logged_events(&self, event: &str) -> usize {
        count_event_lines(&self.log, event)
    }

    /// Returns the last line of the log with an event.
    pub fn last_logged_event(&self, event: &str) -> Option<Value> {
        let log = std::fs::read_to_string(&self.log).unwrap_or_default();
        let has_event =
            |line: &&str| line.ends_with('}') && line.contains(&format!("\"event\":\"{event}\""));
        log.lines().rfind(has_event).map(|line| serde_json::from_str(line).unwrap())
    }

    /// Waits until the process ends; returns whether it succeeded, and the end of its log.
    pub fn wait_until_ended(mut self) -> (bool, String) {
        let started = Instant::now();
        while started.elapsed() < CATCH_UP_TIMEOUTS.0 {
            if let Some(status) = self.process.try_wait().unwrap() {
                return (status.success(), self.log_tail());
            }
            std::thread::sleep(Duration::from_millis(100));
        }
        panic!("the worker does not end: {}", self.log_tail());
    }

    /// Returns the first lines of the log that are no signs of life.
    pub fn log_head(&self) -> String {
        let log = std::fs::read_to_string(&self.log).unwrap_or_default();
        let is_sign_of_life = |line: &&str| {
            ["heartbeat", "lag"].iter().any(|e| line.contains(&format!("\"event\":\"{e}\"")))
        };
        log.lines().filter(|line| !is_sign_of_life(line)).take(20).collect::<Vec<_>>().join("\n")
    }

    fn log_tail(&self) -> String {
        let log = std::fs::read_to_string(&self.log).unwrap_or_default();
        let mut lines: Vec<&str> = log.lines().rev().take(8).collect();
        lines.reverse();
        lines.join("\n")
    }
}

fn count_event_lines(log: &Path, event: &str) -> usize {
    let log = std::fs::read_to_string(log).unwrap_or_default();
    log.lines().filter(|line| line.contains(&format!("\"event\":\"{event}\""))).count()
}

impl Drop for WorkerProcess {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}
