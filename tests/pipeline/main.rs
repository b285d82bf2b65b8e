//! The whole pipeline with a Kafka broker in this process: from messages to rows of the table and
//! answers.

#![allow(clippy::unwrap_used, clippy::expect_used)]

mod backlog;
mod embedded;

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::Ordering as AtomicOrdering;
use std::time::{Duration, Instant};

use base64::Engine as _;
use bsap::backfill::{self, ReembedPlan};
use bsap::balance::normalise::Normaliser;
use bsap::catalogue::{ServingConfig, StandbyGeneration, StateStore};
use bsap::clip::{self, ClipModel, Encoders};
use bsap::demo::broker::MockBroker;
use bsap::demo::catalogue::{PhotoStyle, Scene};
use bsap::demo::draw::render_jpeg;
use bsap::ingest::dead_letter::{self, DeadLetterWriter};
use bsap::ingest::fetch::{self, Fetcher};
use bsap::ingest::metadata::MetadataField;
use bsap::ingest::source::{self, Decoder};
use bsap::ingest::{self, Progress, Worker, decode};
use bsap::kafka;
use bsap::prompts::{self, ActivePromptSets, EmbeddedPromptSet};
use bsap::publish::Publisher;
use bsap::record::{AttributeType, AttributeTypes, ImageRow, TopicPartition, VersionOrdering};
use bsap::search::{self, Engine, Query, ServingSnapshot};
use bsap::store::Store;
use bsap::table::{Follower, Generation, TableWriter};
use rdkafka::consumer::{BaseConsumer, Consumer};
use rdkafka::message::{Headers, Message};
use rdkafka::producer::{FutureProducer, FutureRecord};
use serde_json::{Value, json};
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

const TOPIC: &str = "images";
const DEAD_LETTER_TOPIC: &str = "images.dead-letters";
const REEMBED_TOPIC: &str = "images.reindex";

/// A broker, a folder for pictures and table, and a model.
struct Fixture {
    broker: MockBroker,
    folder: tempfile::TempDir,
    encoders: Arc<dyn Encoders>,
    sets: Vec<Arc<EmbeddedPromptSet>>,
    producer: FutureProducer,
}

impl Fixture {
    fn with_partitions(partitions: i32) -> Self {
        let broker =
            MockBroker::start(&[(TOPIC, partitions), (DEAD_LETTER_TOPIC, 1), (REEMBED_TOPIC, 2)])
                .unwrap();
        let checkpoint = "models/demo".to_owned();
        let encoders: Arc<dyn Encoders> = Arc::new(
            ClipModel::load(&clip::ModelOptions { checkpoint, ..clip::ModelOptions::default() })
                .unwrap(),
        );
        let options = prompts::PromptOptions {
            sets: vec!["demo".into()],
            ..prompts::PromptOptions::default()
        };
        let sets = prompts::load_configured_sets(&options, &*encoders).unwrap();
        let producer = kafka_options(&broker).producer_config().create().unwrap();
        Self { broker, folder: tempfile::tempdir().unwrap(), encoders, sets, producer }
    }

    fn open_store(&self) -> Store {
        let folder = self.folder.path().join("catalogue");
        Store::open(folder.to_str().unwrap(), &BTreeMap::new()).unwrap()
    }

    fn generation(&self) -> Generation {
        generation_of_model(&*self.encoders)
    }

    fn write_image(&self, name: &str, number: u64) -> String {
        let file = self.folder.path().join(name);
        std::fs::write(
            &file,
            render_jpeg(&Scene::sample(1, number, PhotoStyle::Studio), 64).unwrap(),
        )
        .unwrap();
        url::Url::from_file_path(file).unwrap().into()
    }

    async fn send_message(&self, key: Option<&str>, value: Option<&str>) {
        let mut record = FutureRecord::<str, str>::to(TOPIC);
        record.key = key;
        record.payload = value;
        self.producer.send(record, Duration::from_secs(10)).await.unwrap();
    }

    async fn send_event(&self, value: Value) {
        let id = value["image_id"].as_str().unwrap().to_owned();
        self.send_message(Some(&id), Some(&value.to_string())).await;
    }

    async fn start_worker(&self, token: &CancellationToken) -> (Arc<Progress>, JoinHandle<bool>) {
        let store = self.open_store();
        let serving =
            ServingConfig::new(self.sets[0].statistics_key.clone(), Normaliser::Softmax, 0.25);
        let records: Vec<_> = self.sets.iter().map(|s| s.to_record()).collect();
        StateStore::new(&store)
            .initialise_or_extend(&self.generation(), &records, &serving, "test")
            .await
            .unwrap();
        self.start_worker_with_model(&self.encoders, &self.sets, "bsap", token).await
    }

    /// Starts a worker of a model in a consumer group; the live model's group is `bsap`.
    async fn start_worker_with_model(
        &self,
        encoders: &Arc<dyn Encoders>,
        sets: &[Arc<EmbeddedPromptSet>],
        group: &str,
        token: &CancellationToken,
    ) -> (Arc<Progress>, JoinHandle<bool>) {
        let (kafka, store) = (kafka_options(&self.broker), self.open_store());
        let generation = generation_of_model(&**encoders);
        let progress = Arc::new(Progress::default());
        let fetch = fetch::FetchOptions {
            file_roots: vec![self.folder.path().to_owned()],
            max_attempts: 1,
            ..fetch::FetchOptions::default()
        };
        let source = source::SourceOptions {
            ordering: VersionOrdering::Sequence,
            group: group.into(),
            drain_seconds: 3,
            // In the mock cluster, a member that has left blocks the group until its session times
            // out.
            session_timeout_ms: 6_000,
            ..source::SourceOptions::default()
        };
        let attributes = ["colour", "title", "keywords", "creator"]
            .map(|name| (name.into(), AttributeType::Text))
            .into();
        let mut decoder = Decoder::new(&source, &attributes);
        if generation != self.generation() {
            decoder = decoder.with_reembed_topic(REEMBED_TOPIC, &generation.id);
        }
        let worker = Worker {
            decoder,
            source_options: source,
            dead_letter_writer: DeadLetterWriter::new(
                &kafka,
                &dead_letter::DeadLetterOptions::default(),
            )
            .unwrap(),
            kafka_options: kafka,
            fetcher: Fetcher::new(&fetch).unwrap(),
            decode_options: decode::DecodeOptions {
                metadata: vec![MetadataField::Keywords, MetadataField::Creator],
                ..decode::DecodeOptions::default()
            },
            encoders: encoders.clone(),
            prompt_sets: ActivePromptSets::new(sets.to_vec()),
            table_writer: TableWriter::open(&store, &generation, 20).await.unwrap(),
            ingest_options: ingest::IngestOptions {
                commit_ms: 200,
                drain_seconds: 3,
                ..ingest::IngestOptions::default()
            },
            progress: progress.clone(),
        };
        let token = token.clone();
        (progress, tokio::spawn(async move { worker.run(token).await.unwrap() }))
    }

    async fn read_rows(&self) -> Vec<ImageRow> {
        let mut follower = Follower::open(&self.open_store(), &self.generation()).await.unwrap();
        follower.next(&|_, _| {}).await.unwrap().unwrap().rows
    }

    async fn load_engine(&self) -> Engine {
        let state = StateStore::new(&self.open_store()).read_newest().await.unwrap().unwrap();
        let served = ServingSnapshot::from_state(&state, self.sets.clone());
        let engine = Engine::new(self.encoders.clone(), served, search::SearchOptions::default());
        let mut follower = Follower::open(&self.open_store(), &self.generation()).await.unwrap();
        while let Some(changes) = follower.next(&|_, _| {}).await.unwrap() {
            engine.snapshots().apply_changes(changes).await.unwrap();
        }
        engine
    }
}

fn generation_of_model(encoders: &dyn Encoders) -> Generation {
    let card = encoders.card();
    Generation::new(
        &card.name,
        &card.fingerprint,
        card.dimension,
        card.logit_scale,
        VersionOrdering::Sequence,
    )
}

fn kafka_options(broker: &MockBroker) -> kafka::KafkaOptions {
    kafka::KafkaOptions { brokers: broker.bootstrap_servers(), ..kafka::KafkaOptions::default() }
}

/// Longer than Kafka waits for a consumer that left without a word.
const WAIT_TIMEOUT: Duration = Duration::from_secs(120);

async fn wait_until(what: &str, mut done: impl FnMut() -> bool) {
    let started = Instant::now();
    while !done() {
        assert!(started.elapsed() < WAIT_TIMEOUT, "waited in vain until {what}");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn metadata_of_files_become_attributes_unless_the_event_has_them() {
    let fixture = Fixture::with_partitions(1);
    let file = fixture.folder.path().join("scan.tiff");
    std::fs::copy("tests/fixtures/metadata/all.tiff", &file).unwrap();
    let uri = url::Url::from_file_path(&file).unwrap();
    for (id, given) in [("a", json!({})), ("b", json!({"creator": "the event", "keywords": null}))]
    {
        let event =
            json!({"image_id": id, "uri": uri.as_str(), "sequence": 1, "attributes": given});
        fixture.send_event(event).await;
    }
    let token = CancellationToken::new();
    let (progress, running) = fixture.start_worker(&token).await;
    wait_until("both rows are stored", || progress.stored_rows.load(AtomicOrdering::Relaxed) == 2)
        .await;
    token.cancel();
    assert!(running.await.unwrap());
    let engine = fixture.load_engine().await;
    let snapshot = engine.snapshots().newest();
    let attributes = |id| serde_json::to_value(&snapshot.metadata(id).unwrap().attributes).unwrap();
    // The title is not listed in `decode.metadata`.
    assert_eq!(
        attributes("a"),
        json!({"creator": "Ann Müller; Ben", "keywords": "船; a, b & <c>"})
    );
    assert_eq!(attributes("b"), json!({"creator": "the event", "keywords": "船; a, b & <c>"}));
}

fn upsert_event(id: &str, uri: &str, sequence: u64) -> Value {
    json!({"image_id": id, "uri": uri, "sequence": sequence, "attributes": {"colour": "red", "other": 1}})
}

#[tokio::test(flavor = "multi_thread")]
async fn every_message_becomes_a_row_or_a_dead_letter() {
    let fixture = Fixture::with_partitions(3);
    let image_count = 40u64;
    for i in 0..image_count {
        let uri = fixture.write_image(&format!("{i}.jpg"), i);
        fixture.send_event(upsert_event(&format!("i{i}"), &uri, 1)).await;
    }
    let broken = fixture.folder.path().join("broken.jpg");
    std::fs::write(&broken, b"\xff\xd8\xff\xe0 no picture").unwrap();
    fixture
        .send_event(upsert_event("broken", url::Url::from_file_path(&broken).unwrap().as_str(), 1))
        .await;
    fixture.send_event(upsert_event("outside", "file:///etc/passwd", 1)).await;
    fixture.send_event(json!({"image_id": "no-sequence", "uri": "file:///x"})).await;
    fixture.send_message(None, Some("this is no event")).await;
    let missing = url::Url::from_file_path(fixture.folder.path().join("missing.jpg")).unwrap();
    fixture.send_event(upsert_event("missing", missing.as_str(), 1)).await;
    // A newer version, an older version that arrives late, a delete.
    let newer = fixture.write_image("newer.jpg", 777);
    fixture.send_event(upsert_event("i0", &newer, 3)).await;
    fixture.send_event(upsert_event("i0", &fixture.write_image("late.jpg", 778), 2)).await;
    fixture.send_event(json!({"image_id": "i1", "operation": "delete", "sequence": 5})).await;

    let token = CancellationToken::new();
    let (progress, running) = fixture.start_worker(&token).await;
    let stored = || progress.stored_rows.load(AtomicOrdering::Relaxed);
    wait_until("all rows are stored", || stored() == image_count + 3).await;
    wait_until("all other messages are processed", || {
        progress.dead_lettered_messages.load(AtomicOrdering::Relaxed) == 4
            && progress.not_found_images.load(AtomicOrdering::Relaxed) == 1
    })
    .await;
    token.cancel();
    assert!(running.await.unwrap(), "drained");

    let engine = fixture.load_engine().await;
    let snapshot = engine.snapshots().newest();
    assert_eq!(snapshot.len() as u64, image_count - 1);
    assert!(snapshot.metadata("i1").is_none());
    assert_eq!(snapshot.metadata("i0").unwrap().uri.as_deref(), Some(newer.as_str()));
    assert_eq!(snapshot.computed_statistics_count, 0, "all statistics were read from the rows");
    for (entry, embedding) in snapshot.images_with_embeddings() {
        assert_eq!(entry.attributes, BTreeMap::from([("colour".into(), "red".into())]));
        let computed = fixture.sets[0].compute_statistics(&embedding).unwrap();
        let stored =
            snapshot.statistics(entry.image_id.as_str(), &fixture.sets[0].statistics_key).unwrap();
        assert_eq!(
            stored, computed,
            "stored statistics are those of the stored embedding, bit by bit"
        );
    }
    let query = Query { input: "a mug".into(), k: Some(100), ..Query::default() };
    let results = engine.search(&query).unwrap();
    assert_eq!(results.hits.len() as u64, image_count - 1);

    let mut codes = read_dead_letter_codes(&fixture);
    codes.sort();
    assert_eq!(codes, ["image_damaged", "invalid_field", "unknown_format", "uri_not_allowed"]);
}

/// Returns the codes of all dead letters.
fn read_dead_letter_codes(fixture: &Fixture) -> Vec<String> {
    let consumer: BaseConsumer = kafka_options(&fixture.broker)
        .client_config()
        .set("group.id", "reader")
        .set("auto.offset.reset", "earliest")
        .set("enable.partition.eof", "true")
        .create()
        .unwrap();
    let mut all = rdkafka::TopicPartitionList::new();
    all.add_partition_offset(DEAD_LETTER_TOPIC, 0, rdkafka::Offset::Beginning).unwrap();
    consumer.assign(&all).unwrap();
    let mut codes = Vec::new();
    while let Some(Ok(message)) = consumer.poll(Duration::from_secs(5)) {
        let headers = message.headers().unwrap();
        let header_text = |name: &str| {
            let header =
                headers.iter().find(|h| h.key == format!("__connect.errors.{name}")).unwrap();
            String::from_utf8(header.value.unwrap().to_vec()).unwrap()
        };
        assert_eq!(header_text("topic"), TOPIC);
        assert!(!header_text("exception.message").is_empty());
        codes.push(header_text("exception.class.name"));
    }
    codes
}

#[tokio::test(flavor = "multi_thread")]
async fn a_worker_resumes_at_the_position_stored_in_the_table() {
    let fixture = Fixture::with_partitions(2);
    for round in 0..3u64 {
        for i in 0..10 {
            let id = format!("r{round}-{i}");
            let uri = fixture.write_image(&format!("{id}.jpg"), round * 10 + i);
            fixture.send_event(upsert_event(&id, &uri, 1)).await;
        }
        let token = CancellationToken::new();
        let (progress, running) = fixture.start_worker(&token).await;
        wait_until("the round is stored", || {
            progress.stored_rows.load(AtomicOrdering::Relaxed) == 10
        })
        .await;
        token.cancel();
        running.await.unwrap();
        assert_eq!(
            progress.embedded_images.load(AtomicOrdering::Relaxed),
            10,
            "no image is embedded twice"
        );
    }
    let mut ids: Vec<String> =
        fixture.read_rows().await.iter().map(|r| r.image_id.to_string()).collect();
    assert_eq!(ids.len(), 30);
    ids.sort();
    ids.dedup();
    assert_eq!(ids.len(), 30, "no row is stored twice");
}

/// No attempt to commit outlives the drain, and the next worker does what was not committed.
#[tokio::test(flavor = "multi_thread")]
async fn a_worker_whose_store_fails_ends_within_its_drain_time() {
    let house = Fixture::with_partitions(1);
    let send = async |range: std::ops::Range<u64>| {
        for i in range {
            let uri = house.write_image(&format!("{i}.jpg"), i);
            house.send_event(upsert_event(&format!("i{i}"), &uri, 1)).await;
        }
    };
    let stored = |p: &Progress| p.stored_rows.load(AtomicOrdering::Relaxed);
    let token = CancellationToken::new();
    let (progress, running) = house.start_worker(&token).await;
    send(0..5).await;
    wait_until("the first images are stored", || stored(&progress) == 5).await;

    // A file in the place of the catalogue's folder fails every request.
    let (folder, saved) =
        (house.folder.path().join("catalogue"), house.folder.path().join("saved"));
    std::fs::rename(&folder, &saved).unwrap();
    std::fs::write(&folder, "").unwrap();
    send(5..10).await;
    wait_until("the others wait for their commit", || {
        progress.embedded_images.load(AtomicOrdering::Relaxed) == 10
    })
    .await;
    tokio::time::sleep(Duration::from_secs(1)).await;
    let stopped_at = Instant::now();
    token.cancel();
    let drained = running.await.unwrap();
    let seconds = stopped_at.elapsed().as_secs();
    // `ingest.drain_seconds`, and 15 s for a consumer that leaves its group.
    assert!(!drained && seconds < 3 + 15, "{seconds} s");

    std::fs::remove_file(&folder).unwrap();
    std::fs::rename(&saved, &folder).unwrap();
    assert_eq!(house.read_rows().await.len(), 5);
    let token = CancellationToken::new();
    let (progress, running) = house.start_worker(&token).await;
    wait_until("the next worker stores the others", || stored(&progress) == 5).await;
    token.cancel();
    assert!(running.await.unwrap());
    let mut ids: Vec<String> =
        house.read_rows().await.iter().map(|r| r.image_id.to_string()).collect();
    ids.sort();
    ids.dedup();
    assert_eq!(ids.len(), 10);
}

#[tokio::test(flavor = "multi_thread")]
async fn workers_that_join_and_leave_lose_and_duplicate_nothing() {
    let fixture = Fixture::with_partitions(4);
    let total = 120u64;
    let send = async |range: std::ops::Range<u64>| {
        for i in range {
            let uri = fixture.write_image(&format!("{i}.jpg"), i);
            fixture.send_event(upsert_event(&format!("i{i}"), &uri, 1)).await;
        }
    };
    let stored = |p: &Progress| p.stored_rows.load(AtomicOrdering::Relaxed);
    let (stop_first, stop_second) = (CancellationToken::new(), CancellationToken::new());
    let (first, first_running) = fixture.start_worker(&stop_first).await;
    send(0..total / 4).await;
    // A second worker joins in the middle of the stream and is assigned some of the partitions.
    let (second, second_running) = fixture.start_worker(&stop_second).await;
    let mut sent = total / 4;
    while stored(&second) == 0 {
        assert!(sent < total / 2, "the second worker gets no messages");
        send(sent..sent + 1).await;
        sent += 1;
        // On a busy machine the group takes its time to rebalance.
        tokio::time::sleep(Duration::from_secs(1)).await;
    }
    send(sent..total * 3 / 4).await;
    stop_first.cancel();
    send(total * 3 / 4..total).await;
    first_running.await.unwrap();
    wait_until("everything is stored", || stored(&first) + stored(&second) >= total).await;
    stop_second.cancel();
    second_running.await.unwrap();
    assert!(stored(&first) > 0 && stored(&second) > 0, "{} {}", stored(&first), stored(&second));
    let mut ids: Vec<String> =
        fixture.read_rows().await.iter().map(|r| r.image_id.to_string()).collect();
    assert_eq!(ids.len() as u64, total);
    ids.sort();
    ids.dedup();
    assert_eq!(ids.len() as u64, total);
}

/// A worker fills the standby generation of another model while events keep coming, and is killed
/// once.
#[tokio::test(flavor = "multi_thread")]
async fn a_standby_generation_has_the_newest_version_of_every_image() {
    let fixture = Fixture::with_partitions(2);
    let count = 24u64;
    for i in 0..count {
        let uri = fixture.write_image(&format!("{i}.jpg"), i);
        fixture.send_event(upsert_event(&format!("i{i}"), &uri, 5)).await;
    }
    fixture.write_image("inline.jpg", 99);
    let inline = std::fs::read(fixture.folder.path().join("inline.jpg")).unwrap();
    let inline = base64::engine::general_purpose::STANDARD.encode(inline);
    fixture.send_event(json!({"image_id": "inline", "data": inline, "sequence": 1})).await;
    fixture.send_event(json!({"image_id": "i1", "operation": "delete", "sequence": 9})).await;
    let token = CancellationToken::new();
    let (progress, running) = fixture.start_worker(&token).await;
    let stored = |progress: &Progress| progress.stored_rows.load(AtomicOrdering::Relaxed);
    wait_until("the live generation has all images", || stored(&progress) == count + 2).await;

    let checkpoint = "tests/fixtures/clip-gelu".to_owned();
    let encoders: Arc<dyn Encoders> = Arc::new(
        ClipModel::load(&clip::ModelOptions {
            checkpoint: checkpoint.clone(),
            ..clip::ModelOptions::default()
        })
        .unwrap(),
    );
    let sets: Vec<_> = fixture
        .sets
        .iter()
        .map(|set| Arc::new(EmbeddedPromptSet::from_record(&set.to_record(), &*encoders).unwrap()))
        .collect();
    let standby = StandbyGeneration {
        generation: generation_of_model(&*encoders),
        checkpoint,
        prompt_sets: sets.iter().map(|set| set.to_record()).collect(),
        since: chrono::Utc::now(),
    };
    let partitions: Vec<_> =
        (0..2).map(|number| TopicPartition { topic: TOPIC.into(), number }).collect();
    let (store, new) = (fixture.open_store(), standby.generation.clone());
    for _ in 0..2 {
        let state = backfill::set_up_standby(
            &store,
            &standby,
            &partitions,
            20,
            "test",
            &CancellationToken::new(),
        )
        .await
        .unwrap();
        assert!(state.revision == 2 && state.is_standby(&new), "the second call changes nothing");
    }
    let live = StandbyGeneration { generation: fixture.generation(), ..standby.clone() };
    assert!(
        backfill::set_up_standby(&store, &live, &partitions, 20, "test", &CancellationToken::new())
            .await
            .is_err()
    );

    // Events keep coming; the first version of the deleted image arrives again, late.
    fixture.send_event(upsert_event("i0", &fixture.write_image("newer.jpg", 777), 6)).await;
    fixture.send_event(json!({"image_id": "i2", "operation": "delete", "sequence": 6})).await;
    fixture.send_event(upsert_event("i1", &fixture.write_image("late.jpg", 778), 5)).await;
    wait_until("the live generation has those too", || stored(&progress) == count + 5).await;

    let folder = tempfile::tempdir().unwrap();
    let plan_reembedding = async || {
        let types =
            AttributeTypes::from([("colour".to_owned(), bsap::record::AttributeType::Text)]);
        let live = fixture.generation();
        ReembedPlan::from_generations(&store, &live, &new, &types, folder.path()).await.unwrap()
    };
    let plan = plan_reembedding().await;
    assert_eq!(
        (plan.live_images, plan.images_to_reembed, plan.deletes_to_send, plan.inline_images),
        (23, 22, 2, 1)
    );
    let publisher = Publisher::new(&kafka_options(&fixture.broker), REEMBED_TOPIC).unwrap();
    // Requests for another generation are ignored by the worker.
    let other_plan = plan_reembedding().await;
    other_plan.publish_events(&publisher, "00112233", 10_000, &token, |_| {}).await.unwrap();
    assert_eq!(plan.publish_events(&publisher, &new.id, 10_000, &token, |_| {}).await.unwrap(), 24);

    let never_cancelled = CancellationToken::new();
    let (progress, second) =
        fixture.start_worker_with_model(&encoders, &sets, "bsap.new", &never_cancelled).await;
    wait_until("the standby generation has some images", || stored(&progress) > 0).await;
    second.abort();
    let (_, second) = fixture.start_worker_with_model(&encoders, &sets, "bsap.new", &token).await;
    let started = Instant::now();
    loop {
        let remaining = plan_reembedding().await;
        if remaining.images_to_reembed + remaining.deletes_to_send == 0 {
            assert_eq!((remaining.up_to_date_images, remaining.inline_images), (22, 1));
            break;
        }
        assert!(started.elapsed() < Duration::from_secs(90), "{remaining:?}");
        tokio::time::sleep(Duration::from_millis(200)).await;
    }
    token.cancel();
    assert!(running.await.unwrap() && second.await.unwrap());

    let mut follower = Follower::open(&store, &new).await.unwrap();
    let mut newest: BTreeMap<String, ImageRow> = BTreeMap::new();
    for row in follower.next(&|_, _| {}).await.unwrap().unwrap().rows {
        let id = row.image_id.to_string();
        if newest.get(&id).is_none_or(|known| row.supersedes(known)) {
            newest.insert(id, row);
        }
    }
    for row in fixture.read_rows().await {
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
        assert_eq!(image.embedding.values().len(), encoders.card().dimension);
        assert!(image.statistics.contains_key(&sets[0].statistics_key));
    }
}
