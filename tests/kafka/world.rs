//! A cluster, a catalogue, and workers as processes.

use std::collections::BTreeMap;
use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use bsap::clip::{self, Clip, Towers};
use bsap::record::{Ordering, Partition};
use bsap::store::Store;
use bsap::catalogue::Generation;
use bsap::table::Writer;
use bsap::kafka;
use rdkafka::consumer::{BaseConsumer, Consumer};
use rdkafka::producer::{FutureProducer, FutureRecord};
use rdkafka::{Offset, TopicPartitionList};
use serde_json::Value;

use bsap::broker::{Cluster, signal};
use bsap::events::Events;
use bsap::minio::Minio;

pub const TOPIC: &str = "images";
pub const AGAIN: &str = "images.reindex";
const DEAD: &str = "images.dead-letters";
const GROUP: &str = "bsap";
/// How long a catalogue may take to catch up, per thousand messages and at least.
const CATCH_UP: (Duration, Duration) = (Duration::from_secs(90), Duration::from_secs(180));

/// Messages of a scenario, and how often something is killed: few, or with BSAP_KAFKA_LONG what the
/// proof asks for.
pub fn size() -> (u64, u32) {
    if std::env::var_os("BSAP_KAFKA_LONG").is_some() { (20_000, 20) } else { (2_000, 3) }
}

pub struct World {
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
    pub name: &'static str,
    workers: usize,
    pub started: Instant,
}

/// A worker process. It must end only when it is told to.
pub struct Worker {
    process: Child,
    log: PathBuf,
}

impl World {
    pub async fn build(name: &'static str, brokers: usize) -> Self {
        let started = Instant::now();
        let cluster = Cluster::start(brokers);
        let partitions = 6;
        cluster.create(TOPIC, partitions, 1_000_000).await;
        cluster.create(DEAD, 2, 2_000_000).await;
        let folder = tempfile::tempdir().unwrap();
        let catalogue = folder.path().join("catalogue").display().to_string();
        std::fs::create_dir(folder.path().join("pictures")).unwrap();
        let mut config = cluster.client();
        let producer = config.set("enable.idempotence", "true").create().unwrap();
        let towers = Clip::load(&clip::Options {
            checkpoint: concat!(env!("CARGO_MANIFEST_DIR"), "/models/demo").into(),
            ..clip::Options::default()
        })
        .unwrap();
        let card = towers.card();
        let generation = Generation::new(
            &card.name,
            &card.fingerprint,
            card.dimension,
            card.logit_scale,
            Ordering::Sequence,
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
            name,
            workers: 0,
            started,
        }
    }

    /// Puts the catalogue on an S3 server where `tests/run` has one; else it stays in a folder.
    pub fn on_s3(mut self) -> Self {
        self.minio = Minio::start();
        if self.minio.is_some() {
            self.catalogue = format!("{}/catalogue", Minio::URL);
        }
        println!("{}: the catalogue is {}", self.name, self.catalogue);
        self
    }

    fn variables(&self) -> BTreeMap<String, String> {
        self.minio.as_ref().map(Minio::variables).unwrap_or_default()
    }

    pub async fn send(&mut self, count: u64) {
        self.events.send(&self.producer, TOPIC, count).await;
    }

    pub fn kafka(&self) -> kafka::Options {
        kafka::Options { brokers: self.cluster.addresses(), ..kafka::Options::default() }
    }

    pub fn store(&self) -> Store {
        Store::open(&self.catalogue, &self.variables()).unwrap()
    }

    /// Sends one message.
    pub async fn send_raw(&self, key: &str, value: &str) {
        let record = FutureRecord::to(TOPIC).key(key).payload(value);
        self.producer.send(record, Duration::from_secs(20)).await.unwrap();
    }

    /// Runs a command of `bsap` to its end: its exit code and what it prints.
    pub fn outcome(&self, arguments: &[&str]) -> (Option<i32>, String) {
        let output = self.command(Path::new("")).args(arguments).output().unwrap();
        let (out, err) = (String::from_utf8(output.stdout), String::from_utf8(output.stderr));
        (output.status.code(), out.unwrap() + &err.unwrap())
    }

    /// A worker that is to end by itself: its exit code and what it says.
    pub fn refused(&self, options: &[(&str, &str)]) -> (Option<i32>, String) {
        let mut command = self.command(Path::new(""));
        command.arg("ingest");
        for (key, value) in options {
            command.env(format!("BSAP_{key}"), value);
        }
        let output = command.output().unwrap();
        (output.status.code(), String::from_utf8(output.stderr).unwrap())
    }

    /// Runs a command of `bsap` to its end and returns what it prints.
    pub fn bsap(&self, arguments: &[&str]) -> String {
        let mut command = self.command(Path::new(""));
        let output = command.args(arguments).output().unwrap();
        let (out, err) = (String::from_utf8(output.stdout), String::from_utf8(output.stderr));
        let (out, err) = (out.unwrap(), err.unwrap());
        assert!(output.status.success(), "bsap {arguments:?}: {out}{err}");
        out
    }

    /// The program, configured for this world.
    pub fn command(&self, log: &Path) -> Command {
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
        command.envs(self.variables());
        for (key, value) in settings {
            command.env(format!("BSAP_{key}"), value);
        }
        command
    }

    /// Starts `bsap ingest` as a user would, with further options as environment variables.
    pub fn worker_with(&mut self, options: &[(&str, &str)]) -> Worker {
        self.start(&["ingest"], options)
    }

    /// Starts a command of `bsap`, which goes on until it is told to end.
    pub fn start(&mut self, arguments: &[&str], options: &[(&str, &str)]) -> Worker {
        self.workers += 1;
        let log = self.folder.path().join(format!("worker-{}.log", self.workers));
        // What it says outside its log is said when it refuses to start.
        let complaints = File::options().create(true).append(true).open(&log).unwrap();
        let mut command = self.command(&log);
        command.args(arguments).stdout(Stdio::null()).stderr(complaints);
        for (key, value) in options {
            command.env(format!("BSAP_{key}"), value);
        }
        Worker { process: command.spawn().unwrap(), log }
    }

    pub fn worker(&mut self) -> Worker {
        self.worker_with(&[])
    }

    pub fn partitions(&self) -> impl Iterator<Item = Partition> + use<> {
        (0..self.partitions).map(|number| Partition { topic: TOPIC.into(), number })
    }

    /// The table's positions by partition.
    pub async fn positions(&self) -> BTreeMap<i32, i64> {
        self.positions_of("").await
    }

    async fn positions_of(&self, replay: &str) -> BTreeMap<i32, i64> {
        let writer = Writer::open(&self.store(), &self.generation, 20).await.unwrap();
        let mut writer = writer.replaying(replay);
        let mut positions = BTreeMap::new();
        for partition in self.partitions() {
            let position = writer.position(&partition).await.unwrap();
            positions.insert(partition.number, position.unwrap_or_default());
        }
        positions
    }

    /// What Kafka believes the group has consumed.
    pub fn committed(&self) -> BTreeMap<i32, i64> {
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
    pub fn reset_group(&self) {
        let consumer: BaseConsumer = self.cluster.client().set("group.id", GROUP).create().unwrap();
        let mut list = TopicPartitionList::new();
        for p in self.partitions() {
            list.add_partition_offset(&p.topic, p.number, Offset::Offset(0)).unwrap();
        }
        consumer.commit(&list, rdkafka::consumer::CommitMode::Sync).unwrap();
    }

    /// Where each partition of the topic ends.
    pub fn ends(&self) -> BTreeMap<i32, i64> {
        let consumer: BaseConsumer = self.cluster.client().create().unwrap();
        // A broker that has just come back leads no partition yet.
        let end = |p: Partition| {
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
        self.ends().values().sum::<i64>() - self.positions().await.values().sum::<i64>()
    }

    /// Waits until the table has consumed the whole topic; no worker may end meanwhile.
    pub async fn caught_up(&self, workers: &mut [&mut Worker]) {
        self.replayed("", workers).await;
    }

    /// The same for a replay.
    pub async fn replayed(&self, replay: &str, workers: &mut [&mut Worker]) {
        let limit = (CATCH_UP.0 * (self.events.sent / 1_000) as u32).max(CATCH_UP.1);
        let (ends, started) = (self.ends(), Instant::now());
        loop {
            let positions = self.positions_of(replay).await;
            if positions == ends {
                return;
            }
            for worker in workers.iter_mut() {
                worker.expect_alive();
            }
            assert!(
                started.elapsed() < limit,
                "{}: stuck at {positions:?} of {ends:?}: {}",
                self.name,
                workers.iter().map(|w| w.last_words()).collect::<Vec<_>>().join("\n")
            );
            tokio::time::sleep(Duration::from_millis(500)).await;
        }
    }

    /// Waits until the generation `new` has consumed the topics of events and of images to be
    /// embedded again.
    pub async fn caught_up_beside(&self, new: &Generation, workers: &mut [&mut Worker]) {
        let started = Instant::now();
        loop {
            let mut writer = Writer::open(&self.store(), new, 20).await.unwrap();
            let mut left = 0;
            for topic in [TOPIC, AGAIN] {
                for (number, (_, end)) in kafka::logs(&self.kafka(), topic).await.unwrap() {
                    let partition = Partition { topic: topic.into(), number };
                    left += end - writer.position(&partition).await.unwrap().unwrap_or_default();
                }
            }
            if left == 0 {
                return;
            }
            for worker in workers.iter_mut() {
                worker.expect_alive();
            }
            let last = || workers.iter().map(|w| w.last_words()).collect::<Vec<_>>().join("\n");
            assert!(started.elapsed() < CATCH_UP.1, "{}: {left} wait: {}", self.name, last());
            tokio::time::sleep(Duration::from_millis(500)).await;
        }
    }

    /// How often the logs of all workers have an event.
    pub fn log_lines(&self, event: &str) -> usize {
        let log = |n| count(&self.folder.path().join(format!("worker-{n}.log")), event);
        (1..=self.workers).map(log).sum()
    }
}

impl Worker {
    pub fn signal(&self, name: &str) {
        signal(&self.process, name);
    }

    /// Process number.
    pub fn id(&self) -> u32 {
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
        assert!(status.success(), "the worker ended with {status}: {}", self.last_words());
    }

    fn expect_alive(&mut self) {
        if let Some(status) = self.process.try_wait().unwrap() {
            panic!("a worker ended by itself with {status}: {}", self.last_words());
        }
    }

    /// How often the log has an event.
    pub fn count(&self, event: &str) -> usize {
        count(&self.log, event)
    }

    /// The last line of its log with an event.
    pub fn last(&self, event: &str) -> Option<Value> {
        let log = std::fs::read_to_string(&self.log).unwrap_or_default();
        let of =
            |line: &&str| line.ends_with('}') && line.contains(&format!("\"event\":\"{event}\""));
        log.lines().rfind(of).map(|line| serde_json::from_str(line).unwrap())
    }

    /// Waits until the worker has ended by itself: whether that was well, and what it said last.
    pub fn ended(mut self) -> (bool, String) {
        let started = Instant::now();
        while started.elapsed() < CATCH_UP.0 {
            if let Some(status) = self.process.try_wait().unwrap() {
                return (status.success(), self.last_words());
            }
            std::thread::sleep(Duration::from_millis(100));
        }
        panic!("the worker goes on: {}", self.last_words());
    }

    fn last_words(&self) -> String {
        let log = std::fs::read_to_string(&self.log).unwrap_or_default();
        let mut lines: Vec<&str> = log.lines().rev().take(8).collect();
        lines.reverse();
        lines.join("\n")
    }
}

fn count(log: &Path, event: &str) -> usize {
    let log = std::fs::read_to_string(log).unwrap_or_default();
    log.lines().filter(|line| line.contains(&format!("\"event\":\"{event}\""))).count()
}

impl Drop for Worker {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}
