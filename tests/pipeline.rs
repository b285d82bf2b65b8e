//! The main job against a broker in this process: messages in, rows in the table, answers out.

#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::Ordering as AtomicOrdering;
use std::time::{Duration, Instant};

use base64::Engine as _;
use bsap::clip::{self, Clip, Towers};
use bsap::ingest::dead_letter::{self, DeadLetters};
use bsap::demo::broker::Broker;
use bsap::demo::catalogue::{Scene, Style};
use bsap::demo::draw::render;
use bsap::ingest::fetch::{self, Fetcher};
use bsap::ingest::{self, Progress, Worker, decode};
use bsap::balance::normalise::Normaliser;
use bsap::kafka;
use bsap::prompts::{self, ActiveSets, EmbeddedSet};
use bsap::publish::Publisher;
use bsap::record::{AttributeTypes, Ordering, Partition, Row};
use bsap::backfill::{self, Missing};
use bsap::search::{self, Engine, Query, Served};
use bsap::ingest::source::{self, Decoder};
use bsap::store::Store;
use bsap::catalogue::{Beside, Generation, Serving, StateStore};
use bsap::table::{Follower, Writer};
use rdkafka::consumer::{BaseConsumer, Consumer};
use rdkafka::message::{Headers, Message};
use rdkafka::producer::{FutureProducer, FutureRecord};
use serde_json::{Value, json};
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

const TOPIC: &str = "images";
const DEAD: &str = "images.dead-letters";
const AGAIN: &str = "images.reindex";

/// A broker, a folder for pictures and table, a model.
struct House {
    broker: Broker,
    folder: tempfile::TempDir,
    towers: Arc<dyn Towers>,
    sets: Vec<Arc<EmbeddedSet>>,
    producer: FutureProducer,
}

impl House {
    fn build(partitions: i32) -> Self {
        let broker = Broker::start(&[(TOPIC, partitions), (DEAD, 1), (AGAIN, 2)]).unwrap();
        let checkpoint = "models/demo".to_owned();
        let towers: Arc<dyn Towers> = Arc::new(
            Clip::load(&clip::Options { checkpoint, ..clip::Options::default() }).unwrap(),
        );
        let options = prompts::Options { sets: vec!["demo".into()], ..prompts::Options::default() };
        let sets = prompts::load_all(&options, &*towers).unwrap();
        let producer = kafka_options(&broker).producer().create().unwrap();
        Self { broker, folder: tempfile::tempdir().unwrap(), towers, sets, producer }
    }

    fn store(&self) -> Store {
        let folder = self.folder.path().join("catalogue");
        Store::open(folder.to_str().unwrap(), &BTreeMap::new()).unwrap()
    }

    fn generation(&self) -> Generation {
        generation(&*self.towers)
    }

    fn picture(&self, name: &str, number: u64) -> String {
        let file = self.folder.path().join(name);
        std::fs::write(&file, render(&Scene::sample(1, number, Style::Studio), 64).unwrap())
            .unwrap();
        url::Url::from_file_path(file).unwrap().into()
    }

    async fn send(&self, key: Option<&str>, value: Option<&str>) {
        let mut record = FutureRecord::<str, str>::to(TOPIC);
        record.key = key;
        record.payload = value;
        self.producer.send(record, Duration::from_secs(10)).await.unwrap();
    }

    async fn event(&self, value: Value) {
        let id = value["image_id"].as_str().unwrap().to_owned();
        self.send(Some(&id), Some(&value.to_string())).await;
    }

    async fn worker(&self, token: &CancellationToken) -> (Arc<Progress>, JoinHandle<bool>) {
        let store = self.store();
        let serving = Serving::new(self.sets[0].key.clone(), Normaliser::Softmax, 0.25);
        let records: Vec<_> = self.sets.iter().map(|s| s.record()).collect();
        StateStore::new(&store)
            .ensure(&self.generation(), &records, &serving, "test")
            .await
            .unwrap();
        self.worker_of(&self.towers, &self.sets, "bsap", token).await
    }

    /// A worker of a model, in a consumer group; the first model's is `bsap`.
    async fn worker_of(
        &self,
        towers: &Arc<dyn Towers>,
        sets: &[Arc<EmbeddedSet>],
        group: &str,
        token: &CancellationToken,
    ) -> (Arc<Progress>, JoinHandle<bool>) {
        let (kafka, store) = (kafka_options(&self.broker), self.store());
        let generation = generation(&**towers);
        let progress = Arc::new(Progress::default());
        let fetch = fetch::Options {
            file_roots: vec![self.folder.path().to_owned()],
            attempts: 1,
            ..fetch::Options::default()
        };
        let source = source::Options {
            ordering: Ordering::Sequence,
            group: group.into(),
            drain_seconds: 3,
            // The mock cluster makes a group wait for a member that has left until its session ends.
            session_timeout_ms: 6_000,
            ..source::Options::default()
        };
        let attributes = [("colour".into(), bsap::record::AttributeType::Text)].into();
        let mut decoder = Decoder::new(&source, &attributes);
        if generation != self.generation() {
            decoder = decoder.embedding_again(AGAIN, &generation.id);
        }
        let worker = Worker {
            decoder,
            source,
            dead_letters: DeadLetters::new(&kafka, &dead_letter::Options::default()).unwrap(),
            kafka,
            fetcher: Fetcher::new(&fetch).unwrap(),
            decode: decode::Options::default(),
            towers: towers.clone(),
            sets: ActiveSets::new(sets.to_vec()),
            writer: Writer::open(&store, &generation, 20).await.unwrap(),
            options: ingest::Options {
                commit_ms: 200,
                drain_seconds: 3,
                ..ingest::Options::default()
            },
            progress: progress.clone(),
        };
        let token = token.clone();
        (progress, tokio::spawn(async move { worker.run(token).await.unwrap() }))
    }

    async fn rows(&self) -> Vec<Row> {
        let mut follower = Follower::open(&self.store(), &self.generation()).await.unwrap();
        follower.next(&|_, _| {}).await.unwrap().unwrap().rows
    }

    async fn engine(&self) -> Engine {
        let state = StateStore::new(&self.store()).newest().await.unwrap().unwrap();
        let served = Served::of(&state, self.sets.clone());
        let engine = Engine::new(self.towers.clone(), served, search::Options::default());
        let mut follower = Follower::open(&self.store(), &self.generation()).await.unwrap();
        while let Some(changes) = follower.next(&|_, _| {}).await.unwrap() {
            engine.snapshots().apply(changes).await.unwrap();
        }
        engine
    }
}

fn generation(towers: &dyn Towers) -> Generation {
    let card = towers.card();
    Generation::new(
        &card.name,
        &card.fingerprint,
        card.dimension,
        card.logit_scale,
        Ordering::Sequence,
    )
}

fn kafka_options(broker: &Broker) -> kafka::Options {
    kafka::Options { brokers: broker.brokers(), ..kafka::Options::default() }
}

async fn wait_until(what: &str, mut done: impl FnMut() -> bool) {
    let started = Instant::now();
    while !done() {
        assert!(started.elapsed() < Duration::from_secs(60), "waited in vain until {what}");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

fn upsert(id: &str, uri: &str, sequence: u64) -> Value {
    json!({"image_id": id, "uri": uri, "sequence": sequence, "attributes": {"colour": "red", "other": 1}})
}

#[tokio::test(flavor = "multi_thread")]
async fn every_message_ends_in_the_table_or_among_the_dead_letters() {
    let house = House::build(3);
    let good = 40u64;
    for i in 0..good {
        let uri = house.picture(&format!("{i}.jpg"), i);
        house.event(upsert(&format!("i{i}"), &uri, 1)).await;
    }
    let broken = house.folder.path().join("broken.jpg");
    std::fs::write(&broken, b"\xff\xd8\xff\xe0 no picture").unwrap();
    house.event(upsert("broken", url::Url::from_file_path(&broken).unwrap().as_str(), 1)).await;
    house.event(upsert("outside", "file:///etc/passwd", 1)).await;
    house.event(json!({"image_id": "no-sequence", "uri": "file:///x"})).await;
    house.send(None, Some("this is no event")).await;
    let never = url::Url::from_file_path(house.folder.path().join("never.jpg")).unwrap();
    house.event(upsert("gone", never.as_str(), 1)).await;
    // A newer version, an older one that comes late, a delete.
    let again = house.picture("again.jpg", 777);
    house.event(upsert("i0", &again, 3)).await;
    house.event(upsert("i0", &house.picture("late.jpg", 778), 2)).await;
    house.event(json!({"image_id": "i1", "operation": "delete", "sequence": 5})).await;

    let token = CancellationToken::new();
    let (progress, running) = house.worker(&token).await;
    let stored = || progress.stored.load(AtomicOrdering::Relaxed);
    wait_until("all rows are stored", || stored() == good + 3).await;
    wait_until("all others are settled", || {
        progress.dead_lettered.load(AtomicOrdering::Relaxed) == 4
            && progress.gone.load(AtomicOrdering::Relaxed) == 1
    })
    .await;
    token.cancel();
    assert!(running.await.unwrap(), "drained");

    let engine = house.engine().await;
    let snapshot = engine.snapshots().newest();
    assert_eq!(snapshot.len() as u64, good - 1);
    assert!(snapshot.get("i1").is_none());
    assert_eq!(snapshot.get("i0").unwrap().uri.as_deref(), Some(again.as_str()));
    assert_eq!(snapshot.computed, 0, "statistics come with the rows");
    for (entry, embedding) in snapshot.images() {
        assert_eq!(entry.attributes, BTreeMap::from([("colour".into(), "red".into())]));
        let anew = house.sets[0].statistics(&embedding).unwrap();
        let stored = snapshot.statistics(entry.image_id.as_str(), &house.sets[0].key).unwrap();
        assert_eq!(stored, anew, "to the bit");
    }
    let query = Query { input: "a mug".into(), k: Some(100), ..Query::default() };
    let results = engine.search(&query).unwrap();
    assert_eq!(results.hits.len() as u64, good - 1);

    let mut codes = dead_letters(&house);
    codes.sort();
    assert_eq!(codes, ["image_damaged", "invalid_field", "unknown_format", "uri_refused"]);
}

/// The codes among the dead letters.
fn dead_letters(house: &House) -> Vec<String> {
    let consumer: BaseConsumer = kafka_options(&house.broker)
        .client()
        .set("group.id", "reader")
        .set("auto.offset.reset", "earliest")
        .set("enable.partition.eof", "true")
        .create()
        .unwrap();
    let mut all = rdkafka::TopicPartitionList::new();
    all.add_partition_offset(DEAD, 0, rdkafka::Offset::Beginning).unwrap();
    consumer.assign(&all).unwrap();
    let mut codes = Vec::new();
    while let Some(Ok(message)) = consumer.poll(Duration::from_secs(5)) {
        let headers = message.headers().unwrap();
        let find = |name: &str| {
            let header =
                headers.iter().find(|h| h.key == format!("__connect.errors.{name}")).unwrap();
            String::from_utf8(header.value.unwrap().to_vec()).unwrap()
        };
        assert_eq!(find("topic"), TOPIC);
        assert!(!find("exception.message").is_empty());
        codes.push(find("exception.class.name"));
    }
    codes
}

#[tokio::test(flavor = "multi_thread")]
async fn a_worker_goes_on_where_the_table_ends() {
    let house = House::build(2);
    for round in 0..3u64 {
        for i in 0..10 {
            let id = format!("r{round}-{i}");
            let uri = house.picture(&format!("{id}.jpg"), round * 10 + i);
            house.event(upsert(&id, &uri, 1)).await;
        }
        let token = CancellationToken::new();
        let (progress, running) = house.worker(&token).await;
        wait_until("the round is stored", || progress.stored.load(AtomicOrdering::Relaxed) == 10)
            .await;
        token.cancel();
        running.await.unwrap();
        assert_eq!(progress.embedded.load(AtomicOrdering::Relaxed), 10, "nothing is done twice");
    }
    let mut ids: Vec<String> = house.rows().await.iter().map(|r| r.image_id.to_string()).collect();
    assert_eq!(ids.len(), 30);
    ids.sort();
    ids.dedup();
    assert_eq!(ids.len(), 30, "no row stands twice");
}

#[tokio::test(flavor = "multi_thread")]
async fn workers_that_come_and_go_lose_and_double_nothing() {
    let house = House::build(4);
    let total = 120u64;
    let send = async |range: std::ops::Range<u64>| {
        for i in range {
            let uri = house.picture(&format!("{i}.jpg"), i);
            house.event(upsert(&format!("i{i}"), &uri, 1)).await;
        }
    };
    let stored = |p: &Progress| p.stored.load(AtomicOrdering::Relaxed);
    let (first, second) = (CancellationToken::new(), CancellationToken::new());
    let (a, running_a) = house.worker(&first).await;
    send(0..total / 4).await;
    // A second worker joins in the middle of the stream, and takes some of the partitions.
    let (b, running_b) = house.worker(&second).await;
    let mut sent = total / 4;
    while stored(&b) == 0 {
        assert!(sent < total / 2, "the second worker gets nothing");
        send(sent..sent + 1).await;
        sent += 1;
        tokio::time::sleep(Duration::from_millis(500)).await;
    }
    send(sent..total * 3 / 4).await;
    first.cancel();
    send(total * 3 / 4..total).await;
    running_a.await.unwrap();
    wait_until("everything is stored", || stored(&a) + stored(&b) >= total).await;
    second.cancel();
    running_b.await.unwrap();
    assert!(stored(&a) > 0 && stored(&b) > 0, "{} {}", stored(&a), stored(&b));
    let mut ids: Vec<String> = house.rows().await.iter().map(|r| r.image_id.to_string()).collect();
    assert_eq!(ids.len() as u64, total);
    ids.sort();
    ids.dedup();
    assert_eq!(ids.len() as u64, total);
}

/// Another model's generation, built while events go on, by a worker that is killed meanwhile.
#[tokio::test(flavor = "multi_thread")]
async fn another_models_generation_has_every_image_in_its_newest_version() {
    let house = House::build(2);
    let count = 24u64;
    for i in 0..count {
        let uri = house.picture(&format!("{i}.jpg"), i);
        house.event(upsert(&format!("i{i}"), &uri, 5)).await;
    }
    house.picture("inline.jpg", 99);
    let inline = std::fs::read(house.folder.path().join("inline.jpg")).unwrap();
    let inline = base64::engine::general_purpose::STANDARD.encode(inline);
    house.event(json!({"image_id": "inline", "data": inline, "sequence": 1})).await;
    house.event(json!({"image_id": "i1", "operation": "delete", "sequence": 9})).await;
    let token = CancellationToken::new();
    let (progress, running) = house.worker(&token).await;
    let stored = |progress: &Progress| progress.stored.load(AtomicOrdering::Relaxed);
    wait_until("the first model has all", || stored(&progress) == count + 2).await;

    let checkpoint = "tests/fixtures/clip-gelu".to_owned();
    let towers: Arc<dyn Towers> = Arc::new(
        Clip::load(&clip::Options { checkpoint: checkpoint.clone(), ..clip::Options::default() })
            .unwrap(),
    );
    let sets: Vec<_> = house
        .sets
        .iter()
        .map(|set| Arc::new(EmbeddedSet::from_record(&set.record(), &*towers).unwrap()))
        .collect();
    let beside = Beside {
        generation: generation(&*towers),
        checkpoint,
        prompt_sets: sets.iter().map(|set| set.record()).collect(),
        since: chrono::Utc::now(),
    };
    let partitions: Vec<_> =
        (0..2).map(|number| Partition { topic: TOPIC.into(), number }).collect();
    let (store, new) = (house.store(), beside.generation.clone());
    for _ in 0..2 {
        let state = backfill::set_up(&store, &beside, &partitions, 20, "test").await.unwrap();
        assert!(state.revision == 2 && state.is_beside(&new), "twice is once");
    }
    let first = Beside { generation: house.generation(), ..beside.clone() };
    assert!(backfill::set_up(&store, &first, &partitions, 20, "test").await.is_err());

    // Events go on; the deleted image's first version comes once more, late.
    house.event(upsert("i0", &house.picture("again.jpg", 777), 6)).await;
    house.event(json!({"image_id": "i2", "operation": "delete", "sequence": 6})).await;
    house.event(upsert("i1", &house.picture("late.jpg", 778), 5)).await;
    wait_until("the first model has those", || stored(&progress) == count + 5).await;

    let folder = tempfile::tempdir().unwrap();
    let missing = async || {
        let types =
            AttributeTypes::from([("colour".to_owned(), bsap::record::AttributeType::Text)]);
        let live = house.generation();
        Missing::of(&store, &live, &new, &types, folder.path()).await.unwrap()
    };
    let wanted = missing().await;
    assert_eq!((wanted.live, wanted.images, wanted.deletes, wanted.inline), (23, 22, 2, 1));
    let publisher = Publisher::new(&kafka_options(&house.broker), AGAIN).unwrap();
    // For some other generation: not this one's to do.
    missing().await.send(&publisher, "00112233", 10_000, &token, |_| {}).await.unwrap();
    assert_eq!(wanted.send(&publisher, &new.id, 10_000, &token, |_| {}).await.unwrap(), 24);

    let killed = CancellationToken::new();
    let (progress, second) = house.worker_of(&towers, &sets, "bsap.new", &killed).await;
    wait_until("the second model has some", || stored(&progress) > 0).await;
    second.abort();
    let (_, second) = house.worker_of(&towers, &sets, "bsap.new", &token).await;
    let started = Instant::now();
    loop {
        let left = missing().await;
        if left.images + left.deletes == 0 {
            assert_eq!((left.same, left.inline), (22, 1));
            break;
        }
        assert!(started.elapsed() < Duration::from_secs(90), "{left:?}");
        tokio::time::sleep(Duration::from_millis(200)).await;
    }
    token.cancel();
    assert!(running.await.unwrap() && second.await.unwrap());

    let mut follower = Follower::open(&store, &new).await.unwrap();
    let mut newest: BTreeMap<String, Row> = BTreeMap::new();
    for row in follower.next(&|_, _| {}).await.unwrap().unwrap().rows {
        let id = row.image_id.to_string();
        if newest.get(&id).is_none_or(|known| row.supersedes(known)) {
            newest.insert(id, row);
        }
    }
    for row in house.rows().await {
        let id = row.image_id.to_string();
        let other = newest.get(&id);
        if id == "inline" {
            assert!(other.is_none());
        } else if other.is_none_or(|other| other.sequence <= row.sequence) {
            let (other, image) = (other.unwrap(), row.image.is_some());
            assert_eq!(other.sequence, row.sequence, "{id}");
            assert_eq!(other.image.is_some(), image, "{id}");
        }
    }
    for row in newest.values() {
        let Some(image) = &row.image else { continue };
        assert_eq!(image.attributes, BTreeMap::from([("colour".into(), "red".into())]));
        assert_eq!(image.embedding.values().len(), towers.card().dimension);
        assert!(image.statistics.contains_key(&sets[0].key));
    }
}
