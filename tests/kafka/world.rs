//! A cluster, a catalogue, workers as processes, and the comparison of what is with what must be.

use std::collections::BTreeMap;
use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use bsap::clip::{Clip, Towers};
use bsap::record::{Ordering, Partition, Row};
use bsap::store::Store;
use bsap::table::{Follower, Generation, Writer};
use bsap::{clip, dead_letter, kafka};
use deltalake_core::arrow::array::AsArray;
use deltalake_core::parquet::arrow::arrow_reader::ParquetRecordBatchReaderBuilder;
use futures::TryStreamExt;
use object_store::ObjectStoreExt;
use rdkafka::consumer::{BaseConsumer, Consumer};
use rdkafka::producer::{FutureProducer, FutureRecord};
use rdkafka::{Offset, TopicPartitionList};
use serde_json::Value;
use tokio_util::sync::CancellationToken;

use crate::broker::{Cluster, signal};
use crate::events::{Events, Newest, Sent};
use crate::minio::Minio;

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
    name: &'static str,
    workers: usize,
    started: Instant,
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

    fn ends(&self) -> BTreeMap<i32, i64> {
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

    /// Compares table and dead letters with what was sent. `passes`: how often the whole topic was
    /// deliberately consumed.
    pub async fn verify(&self, passes: u64) {
        let mut follower = Follower::open(&self.store(), &self.generation).await.unwrap();
        let mut newest: BTreeMap<String, Row> = BTreeMap::new();
        let rows = self.appended().await;
        while let Some(changes) = follower.next(&|_, _| {}).await.unwrap() {
            for row in changes.rows {
                match newest.get(row.image_id.as_str()) {
                    Some(known) if !row.supersedes(known) => {}
                    _ => {
                        newest.insert(row.image_id.to_string(), row);
                    }
                }
            }
        }
        let found: BTreeMap<String, Newest> = newest
            .into_iter()
            .map(|(id, row)| {
                let sequence = row.sequence.as_str().parse().unwrap();
                (id, Newest { sequence, content: row.image.map(|image| image.content_hash) })
            })
            .collect();
        let wanted = &self.events.newest;
        let missing = wanted.keys().filter(|id| !found.contains_key(*id)).count();
        let strange = found.keys().filter(|id| !wanted.contains_key(*id)).count();
        let differ =
            wanted.iter().filter(|(id, w)| found.get(*id).is_some_and(|f| f != *w)).count();
        let (letters, put_aside) = self.dead_letters();
        let live = wanted.values().filter(|newest| newest.content.is_some()).count();
        let events = &self.events;
        // A producer that lost its broker may have written a message twice: that is no fault here.
        let written: i64 = self.ends().values().sum();
        println!(
            "{}: {} messages, {written} in the topic ({} repeated, {} late, {} deletes, {} gone, {} poison) gave {rows} rows \
             of {} wanted; {live} live images: {missing} missing, {strange} strange, {differ} not the \
             newest; {} dead letters of {} positions; {:.0} s",
            self.name,
            events.sent,
            events.duplicates,
            events.stale,
            events.deletes,
            events.gone,
            events.poison.len(),
            events.rows * passes,
            put_aside,
            letters.len(),
            self.started.elapsed().as_secs_f64(),
        );
        if rows != events.rows * passes {
            println!("{}: stored twice: {:?}", self.name, self.doubled().await);
        }
        assert_eq!((missing, strange, differ), (0, 0, 0));
        assert_eq!(rows, events.rows * passes, "each message is committed exactly once a pass");
        assert_eq!(letters, events.poison, "dead letters are the poison, byte for byte");
        let (committed, positions) = (self.committed(), self.positions().await);
        for (partition, offset) in committed {
            assert!(offset <= positions[&partition], "Kafka is ahead of the table");
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

    /// The newest version of every image in a generation: its sequence and its content.
    pub async fn newest(
        &self,
        generation: &Generation,
    ) -> BTreeMap<String, (String, Option<String>)> {
        let folder = self.folder.path();
        let rows = bsap::reconcile::current(&self.store(), generation, folder).await.unwrap();
        let mut follower = Follower::open(&self.store(), generation).await.unwrap();
        let mut hashes = BTreeMap::new();
        for row in follower.next(&|_, _| {}).await.unwrap().unwrap().rows {
            let hash = row.image.map(|image| image.content_hash);
            hashes.insert((row.image_id.to_string(), row.sequence.as_str().to_owned()), hash);
        }
        rows.map(|entry| {
            let entry = entry.unwrap();
            let sequence = entry.version.sequence.as_str().to_owned();
            let hash = hashes.remove(&(entry.image_id.clone(), sequence.clone())).flatten();
            (entry.image_id, (sequence, hash))
        })
        .collect()
    }

    /// Actions of the table's log by which rows were appended; compaction takes superseded ones away.
    async fn adds(&self, store: &Store) -> Vec<Value> {
        let log = store.objects().list(Some(&"_delta_log".into()));
        let commits: Vec<_> = log.try_collect().await.unwrap();
        let mut adds = Vec::new();
        for commit in commits.iter().filter(|commit| commit.location.extension() == Some("json")) {
            let found = store.objects().get(&commit.location).await.unwrap();
            let text = String::from_utf8(found.bytes().await.unwrap().into()).unwrap();
            let actions = text.lines().map(|line| serde_json::from_str::<Value>(line).unwrap());
            adds.extend(actions.filter(|action| action["add"]["dataChange"] == true));
        }
        adds
    }

    /// Rows that were ever appended.
    async fn appended(&self) -> u64 {
        let store = self.store().child(&format!("generations/{}/images", self.generation.id));
        let rows = |add: &Value| {
            let stats: Value = serde_json::from_str(add["add"]["stats"].as_str().unwrap()).unwrap();
            stats["numRecords"].as_u64().unwrap()
        };
        self.adds(&store).await.iter().map(rows).sum()
    }

    /// Positions in Kafka of which the table's files have more than one row each; files that compaction
    /// took away count, as long as they are there, and those that it made do not.
    async fn doubled(&self) -> Vec<String> {
        let store = self.store().child(&format!("generations/{}/images", self.generation.id));
        let mut seen: BTreeMap<String, Vec<String>> = BTreeMap::new();
        for add in self.adds(&store).await {
            let file = add["add"]["path"].as_str().unwrap().to_owned();
            let Ok(found) = store.objects().get(&file.as_str().into()).await else { continue };
            let bytes = found.bytes().await.unwrap();
            let batches = ParquetRecordBatchReaderBuilder::try_new(bytes).unwrap().build().unwrap();
            for batch in batches {
                let batch = batch.unwrap();
                let sources = batch.column_by_name("source").unwrap().as_string::<i32>();
                for source in sources.iter().flatten() {
                    seen.entry(source.to_owned()).or_default().push(file.clone());
                }
            }
        }
        let twice = seen.into_iter().filter(|(_, files)| files.len() > 1);
        twice.map(|(source, files)| format!("{source} in {}", files.join(", "))).collect()
    }

    /// How often the logs of all workers have an event.
    pub fn log_lines(&self, event: &str) -> usize {
        let log = |n| count(&self.folder.path().join(format!("worker-{n}.log")), event);
        (1..=self.workers).map(log).sum()
    }

    /// Dead letters by the position that they had, and how many there are in all.
    fn dead_letters(&self) -> (BTreeMap<(i32, i64), Sent>, u64) {
        let (mut letters, mut all) = (BTreeMap::new(), 0);
        let (options, filter) = (dead_letter::Options::default(), dead_letter::Filter::default());
        let token = CancellationToken::new();
        let strange = dead_letter::read(&self.kafka(), &options, &filter, &token, |letter| {
            all += 1;
            assert_eq!(&*letter.message.partition.topic, TOPIC);
            let message = letter.message;
            let sent = Sent {
                key: message.key.map(Into::into),
                value: message.payload.map(Into::into),
                headers: message.headers.into_iter().map(|(k, v)| (k, v.map(Into::into))).collect(),
                timestamp_ms: message.timestamp_ms.unwrap(),
            };
            letters.insert((message.partition.number, message.offset), sent);
            true
        });
        assert_eq!(strange.unwrap(), 0);
        (letters, all)
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
