//! A cluster, a catalogue, and workers as processes.

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

use bsap::broker::{Cluster, signal};
use bsap::events::Events;
use bsap::minio::Minio;

pub const TOPIC: &str = "images";
pub const REEMBED_TOPIC: &str = "images.reindex";
const DEAD_LETTER_TOPIC: &str = "images.dead-letters";
const GROUP: &str = "bsap";
/// How long a catalogue may take to catch up, per thousand messages and at least.
const CATCH_UP_TIMEOUTS: (Duration, Duration) = (Duration::from_secs(90), Duration::from_secs(180));

/// Messages of a scenario, and how often something is killed: few, or with BSAP_KAFKA_LONG what the
/// proof asks for.
pub fn scenario_size() -> (u64, u32) {
    if std::env::var_os("BSAP_KAFKA_LONG").is_some() { (20_000, 20) } else { (2_000, 3) }
}

pub struct Fixture {
    pub cluster: Cluster,
    pub events: Events,
    pub folder: tempfile::TempDir,
    pub partitions: i32,
    pub generation: Generation,
    /// URL or folder of the catalogue.
    catalogue: String,
    /// Where the catalogue is, if not in a folder.
    pub minio: Option<Minio>,
    producer: FutureProducer,
    pub scenario: &'static str,
    workers_started: usize,
    pub started: Instant,
}

/// A worker process. It must end only when it is told to.
pub struct WorkerProcess {
    process: Child,
    log: PathBuf,
}

impl Fixture {
    pub async fn build(name: &'static str, brokers: usize) -> Self {
        let started = Instant::now();
        let cluster = Cluster::start(brokers);
        let partitions = 6;
        cluster.create(TOPIC, partitions, 1_000_000).await;
        cluster.create(DEAD_LETTER_TOPIC, 2, 2_000_000).await;
        let folder = tempfile::tempdir().unwrap();
        let catalogue = folder.path().join("catalogue").display().to_string();
        std::fs::create_dir(folder.path().join("pictures")).unwrap();
        let mut config = cluster.client();
        let producer = config.set("enable.idempotence", "true").create().unwrap();
        let towers = ClipModel::load(&clip::ModelOptions {
            checkpoint: concat!(env!("CARGO_MANIFEST_DIR"), "/models/demo").into(),
            ..clip::ModelOptions::default()
        })
        .unwrap();
        let card = towers.card();
        let generation = Generation::new(
            &card.name,
            &card.fingerprint,
            card.dimension,
            card.logit_scale,
            VersionOrdering::Sequence,
        );
        let events = Events::new(1, &folder.path().join("pictures"));
        Self {
            cluster,
            events,
            folder,
            partitions,
            generation,
            catalogue,
            minio: None,
            producer,
            scenario: name,
            workers_started: 0,
            started,
        }
    }

    /// Puts the catalogue on an S3 server where `tests/run` has one; else it stays in a folder.
    pub fn with_catalogue_on_s3(mut self) -> Self {
        self.minio = Minio::start();
        if self.minio.is_some() {
            self.catalogue = format!("{}/catalogue", Minio::URL);
        }
        println!("{}: the catalogue is {}", self.scenario, self.catalogue);
        self
    }

    fn store_variables(&self) -> BTreeMap<String, String> {
        self.minio.as_ref().map(Minio::variables).unwrap_or_default()
    }

    pub async fn send_events(&mut self, count: u64) {
        self.events.send(&self.producer, TOPIC, count).await;
    }

    pub fn kafka_options(&self) -> kafka::KafkaOptions {
        kafka::KafkaOptions { brokers: self.cluster.addresses(), ..kafka::KafkaOptions::default() }
    }

    pub fn store(&self) -> Store {
        Store::open(&self.catalogue, &self.store_variables()).unwrap()
    }

    /// Sends one message.
    pub async fn send_message(&self, key: &str, value: &str) {
        let record = FutureRecord::to(TOPIC).key(key).payload(value);
        self.producer.send(record, Duration::from_secs(20)).await.unwrap();
    }

    /// Runs a command of `bsap` to its end: its exit code and what it prints.
    pub fn run_command(&self, arguments: &[&str]) -> (Option<i32>, String) {
        let output = self.bsap_command(Path::new("")).args(arguments).output().unwrap();
        let (out, err) = (String::from_utf8(output.stdout), String::from_utf8(output.stderr));
        (output.status.code(), out.unwrap() + &err.unwrap())
    }

    /// A worker that is to end by itself: its exit code and what it says.
    pub fn run_worker_to_exit(&self, options: &[(&str, &str)]) -> (Option<i32>, String) {
        let mut command = self.bsap_command(Path::new(""));
        command.arg("ingest");
        for (key, value) in options {
            command.env(format!("BSAP_{key}"), value);
        }
        let output = command.output().unwrap();
        (output.status.code(), String::from_utf8(output.stderr).unwrap())
    }

    /// Runs a command of `bsap` to its end and returns what it prints.
    pub fn run_command_ok(&self, arguments: &[&str]) -> String {
        let mut command = self.bsap_command(Path::new(""));
        let output = command.args(arguments).output().unwrap();
        let (out, err) = (String::from_utf8(output.stdout), String::from_utf8(output.stderr));
        let (out, err) = (out.unwrap(), err.unwrap());
        assert!(output.status.success(), "bsap {arguments:?}: {out}{err}");
        out
    }

    /// The program, configured for this world.
    pub fn bsap_command(&self, log: &Path) -> Command {
        let settings = [
            ("KAFKA__BROKERS", self.cluster.addresses()),
            ("SOURCE__ORDERING", "sequence".into()),
            // The least that brokers allow: a worker that is silent is soon replaced.
            ("SOURCE__SESSION_TIMEOUT_MS", "6000".into()),
            ("FETCH__FILE_ROOTS", self.folder.path().join("pictures").display().to_string()),
            ("MODEL__CHECKPOINT", concat!(env!("CARGO_MANIFEST_DIR"), "/models/demo").into()),
            ("PROMPTS__SETS", "demo".into()),
            ("TABLE__URL", self.catalogue.clone()),
            // Many small commits: many moments at which something may happen.
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
        command
    }

    /// Starts `bsap ingest` as a user would, with further options as environment variables.
    pub fn start_worker_with(&mut self, options: &[(&str, &str)]) -> WorkerProcess {
        self.start_command(&["ingest"], options)
    }

    /// Starts a command of `bsap`, which goes on until it is told to end.
    pub fn start_command(&mut self, arguments: &[&str], options: &[(&str, &str)]) -> WorkerProcess {
        self.workers_started += 1;
        let log = self.folder.path().join(format!("worker-{}.log", self.workers_started));
        // What it says outside its log is said when it refuses to start.
        let complaints = File::options().create(true).append(true).open(&log).unwrap();
        let mut command = self.bsap_command(&log);
        command.args(arguments).stdout(Stdio::null()).stderr(complaints);
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

    /// The table's positions by partition.
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

    /// What Kafka believes the group has consumed.
    pub fn committed_offsets(&self) -> BTreeMap<i32, i64> {
        let consumer: BaseConsumer = self.cluster.client().set("group.id", GROUP).create().unwrap();
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
        let consumer: BaseConsumer = self.cluster.client().set("group.id", GROUP).create().unwrap();
        let mut list = TopicPartitionList::new();
        for p in self.partitions() {
            list.add_partition_offset(&p.topic, p.number, Offset::Offset(0)).unwrap();
        }
        consumer.commit(&list, rdkafka::consumer::CommitMode::Sync).unwrap();
    }

    /// Where each partition of the topic ends.
    pub fn end_offsets(&self) -> BTreeMap<i32, i64> {
        let consumer: BaseConsumer = self.cluster.client().create().unwrap();
        // A broker that has just come back leads no partition yet.
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

    /// Messages that the table has not consumed yet.
    pub async fn lag(&self) -> i64 {
        self.end_offsets().values().sum::<i64>()
            - self.table_positions().await.values().sum::<i64>()
    }

    /// Waits until the table has consumed the whole topic; no worker may end meanwhile.
    pub async fn wait_until_caught_up(&self, workers: &mut [&mut WorkerProcess]) {
        self.wait_until_replayed("", workers).await;
    }

    /// The same for a replay.
    pub async fn wait_until_replayed(&self, replay: &str, workers: &mut [&mut WorkerProcess]) {
        let limit =
            (CATCH_UP_TIMEOUTS.0 * (self.events.sent / 1_000) as u32).max(CATCH_UP_TIMEOUTS.1);
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

    /// Waits until the generation `new` has consumed the topics of events and of images to be
    /// embedded again.
    pub async fn wait_until_standby_caught_up(
        &self,
        new: &Generation,
        workers: &mut [&mut WorkerProcess],
    ) {
        let started = Instant::now();
        loop {
            let mut writer = TableWriter::open(&self.store(), new, 20).await.unwrap();
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
            let last = || workers.iter().map(|w| w.log_tail()).collect::<Vec<_>>().join("\n");
            assert!(
                started.elapsed() < CATCH_UP_TIMEOUTS.1,
                "{}: {remaining} wait: {}",
                self.scenario,
                last()
            );
            tokio::time::sleep(Duration::from_millis(500)).await;
        }
    }

    /// How often the logs of all workers have an event.
    pub fn count_logged_events(&self, event: &str) -> usize {
        let log = |n| count_event_lines(&self.folder.path().join(format!("worker-{n}.log")), event);
        (1..=self.workers_started).map(log).sum()
    }
}

impl WorkerProcess {
    pub fn send_signal(&self, name: &str) {
        signal(&self.process, name);
    }

    /// Process number.
    pub fn process_id(&self) -> u32 {
        self.process.id()
    }

    /// As the machine's failure would.
    pub fn kill(mut self) {
        self.process.kill().unwrap();
        self.process.wait().unwrap();
    }

    /// Asks the worker to end, and expects that it ends well.
    pub fn stop(mut self) {
        signal(&self.process, "TERM");
        let status = self.process.wait().unwrap();
        assert!(status.success(), "the worker ended with {status}: {}", self.log_tail());
    }

    fn assert_alive(&mut self) {
        if let Some(status) = self.process.try_wait().unwrap() {
            panic!("a worker ended by itself with {status}: {}", self.log_tail());
        }
    }

    /// How often the log has an event.
    pub fn count_logged_events(&self, event: &str) -> usize {
        count_event_lines(&self.log, event)
    }

    /// The last line of its log with an event.
    pub fn last_logged_event(&self, event: &str) -> Option<Value> {
        let log = std::fs::read_to_string(&self.log).unwrap_or_default();
        let of =
            |line: &&str| line.ends_with('}') && line.contains(&format!("\"event\":\"{event}\""));
        log.lines().rfind(of).map(|line| serde_json::from_str(line).unwrap())
    }

    /// Waits until the worker has ended by itself: whether that was well, and what it said last.
    pub fn wait_until_ended(mut self) -> (bool, String) {
        let started = Instant::now();
        while started.elapsed() < CATCH_UP_TIMEOUTS.0 {
            if let Some(status) = self.process.try_wait().unwrap() {
                return (status.success(), self.log_tail());
            }
            std::thread::sleep(Duration::from_millis(100));
        }
        panic!("the worker goes on: {}", self.log_tail());
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
