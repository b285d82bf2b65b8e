//! Prompt sets are switched during continuous updates and queries: no query fails, no image is
//! missing, no answer mixes two configurations, a killed backfill is resumed, and the switch is
//! rolled back.

#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::collections::BTreeMap;
use std::io::Cursor;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering as AtomicOrdering};
use std::time::{Duration, Instant};

use base64::Engine as _;
use bsap::backfill::{StatisticsBackfill, add_prompt_set, follow_prompt_sets};
use bsap::balance::normalise::Normaliser;
use bsap::balance::statistics::{StatisticsKey, StatisticsSettings};
use bsap::catalogue::{ServingConfig, StateStore};
use bsap::clip::{ClipError, Encoders, ModelCard, Pixels};
use bsap::demo::broker::MockBroker;
use bsap::ingest::dead_letter::{self, DeadLetterWriter};
use bsap::ingest::fetch::{self, Fetcher};
use bsap::ingest::source::{self, Decoder};
use bsap::ingest::{self, Progress, Worker, decode};
use bsap::kafka;
use bsap::prompts::{ActivePromptSets, EmbeddedPromptSet, PromptSet};
use bsap::record::{SequenceKey, VersionOrdering};
use bsap::rollout::{
    CandidateSpec, PromotionRules, RollbackPlan, check_promotion, promote, set_candidate,
    wait_for_replicas,
};
use bsap::search::{self, Engine, Engines, Query, ServingSnapshot};
use bsap::serve::CatalogueFollower;
use bsap::store::Store;
use bsap::table::{BackfillSource, Generation, TableWriter};
use image::{ImageFormat, RgbImage};
use rdkafka::producer::{FutureProducer, FutureRecord};
use serde_json::json;
use tokio_util::sync::CancellationToken;

const TOPIC: &str = "images";
const DIMENSION: usize = 32;
const IMAGE_COUNT: u64 = 60;
const POLL_INTERVAL: Duration = Duration::from_millis(100);

/// A model that embeds inputs by hashing their bytes: fast and deterministic.
struct HashedEncoders(ModelCard);

fn hash_to_unit_vector(bytes: &[u8]) -> Vec<f32> {
    let mut state = bytes
        .iter()
        .fold(0xcbf2_9ce4_8422_2325u64, |a, b| (a ^ u64::from(*b)).wrapping_mul(0x100_0000_01b3))
        | 1;
    let values: Vec<f32> = (0..DIMENSION)
        .map(|_| {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            (state >> 40) as f32 / (1u32 << 24) as f32 - 0.3
        })
        .collect();
    let length = values.iter().map(|v| v * v).sum::<f32>().sqrt();
    values.into_iter().map(|v| v / length).collect()
}

impl Encoders for HashedEncoders {
    fn card(&self) -> &ModelCard {
        &self.0
    }

    fn preprocess_image(&self, image: &RgbImage) -> Result<Pixels, ClipError> {
        Ok(Pixels(image.as_raw().clone()))
    }

    fn embed_images(&self, batch: &[Pixels]) -> Result<Vec<Vec<f32>>, ClipError> {
        Ok(batch.iter().map(|pixels| hash_to_unit_vector(&pixels.0)).collect())
    }

    fn embed_texts(&self, texts: &[&str]) -> Result<Vec<Vec<f32>>, ClipError> {
        Ok(texts.iter().map(|text| hash_to_unit_vector(text.as_bytes())).collect())
    }
}

fn hashed_encoders() -> Arc<dyn Encoders> {
    Arc::new(HashedEncoders(ModelCard::without_checkpoint("hashed", DIMENSION)))
}

fn embed_prompt_set(name: &str, encoders: &dyn Encoders) -> Arc<EmbeddedPromptSet> {
    let set = PromptSet::new(name, (0..20).map(|i| format!("{name} {i}")).collect());
    Arc::new(set.embed(encoders, StatisticsSettings::with_top_k(4)).unwrap())
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

async fn new_worker(
    broker: &MockBroker,
    store: &Store,
    encoders: &Arc<dyn Encoders>,
    sets: &ActivePromptSets,
    progress: &Arc<Progress>,
) -> Worker {
    let kafka = kafka::KafkaOptions {
        brokers: broker.bootstrap_servers(),
        ..kafka::KafkaOptions::default()
    };
    let source = source::SourceOptions {
        ordering: VersionOrdering::Sequence,
        drain_seconds: 3,
        session_timeout_ms: 6_000,
        ..source::SourceOptions::default()
    };
    Worker {
        decoder: Decoder::new(&source, &BTreeMap::new()),
        source_options: source,
        dead_letter_writer: DeadLetterWriter::new(
            &kafka,
            &dead_letter::DeadLetterOptions::default(),
        )
        .unwrap(),
        kafka_options: kafka,
        fetcher: Fetcher::new(&fetch::FetchOptions::default()).unwrap(),
        decode_options: decode::DecodeOptions::default(),
        encoders: encoders.clone(),
        prompt_sets: sets.clone(),
        table_writer: TableWriter::open(store, &generation_of_model(&**encoders), 50)
            .await
            .unwrap(),
        ingest_options: ingest::IngestOptions {
            commit_ms: 150,
            drain_seconds: 3,
            ..ingest::IngestOptions::default()
        },
        progress: progress.clone(),
    }
}

/// Sends new versions of all images until `stop`; returns the newest version.
async fn send_updates(
    producer: FutureProducer,
    stop: Arc<AtomicBool>,
    sent: Arc<AtomicU64>,
) -> u64 {
    let mut version = 0;
    while version < 2 || !stop.load(AtomicOrdering::SeqCst) {
        version += 1;
        for id in 0..IMAGE_COUNT {
            let picture = RgbImage::from_fn(4, 4, |x, y| {
                image::Rgb([(x + 4 * y) as u8 * 9, id as u8, version as u8])
            });
            let mut png = Cursor::new(Vec::new());
            picture.write_to(&mut png, ImageFormat::Png).unwrap();
            let data = base64::engine::general_purpose::STANDARD.encode(png.into_inner());
            let key = format!("i{id}");
            let event = json!({"image_id": key, "sequence": version, "data": data}).to_string();
            let record = FutureRecord::to(TOPIC).key(&key).payload(&event);
            producer.send(record, Duration::from_secs(10)).await.unwrap();
            sent.fetch_add(1, AtomicOrdering::SeqCst);
            tokio::time::sleep(Duration::from_millis(3)).await;
        }
    }
    version
}

/// Prompt set and weight with which each configuration answers.
type ExpectedAnswers = BTreeMap<&'static str, (StatisticsKey, f32)>;

/// Sends queries without pause until `stop`; returns the number of answers by configuration.
async fn send_queries(
    engine: Arc<Engine>,
    expected: Arc<ExpectedAnswers>,
    stop: Arc<AtomicBool>,
) -> BTreeMap<String, u64> {
    let mut answers = BTreeMap::new();
    let mut number = 0u64;
    while !stop.load(AtomicOrdering::SeqCst) {
        number += 1;
        let query = Query {
            input: format!("query {}", number % 17).into(),
            k: Some(20),
            traffic_key: Some(format!("user {}", number % 31)),
            ..Query::default()
        };
        let engine = engine.clone();
        let results = tokio::task::spawn_blocking(move || engine.search(&query)).await.unwrap();
        let results = results.expect("no query fails");
        let (key, weight) = &expected[results.configuration_name.as_str()];
        assert_eq!(
            (&results.prompt_set.statistics_key, results.balance.weight),
            (key, *weight),
            "no answer mixes two configurations"
        );
        for hit in &results.hits {
            let score = hit.affine.alpha.mul_add(hit.raw_score, hit.affine.beta);
            assert!((hit.score - score).abs() < 1e-6, "{} {score}", hit.score);
        }
        assert_eq!(results.hits.len(), 20, "no image is missing");
        *answers.entry(results.configuration_name).or_default() += 1;
    }
    answers
}

/// Returns rules without waiting times, so that the test is short.
fn immediate_rules(folder: &Path) -> PromotionRules<'_> {
    PromotionRules {
        propagation_delay: Duration::ZERO,
        grace_period: Duration::ZERO,
        max_differing_images: 0,
        temp_folder: folder,
    }
}

async fn wait_until(what: &str, mut done: impl AsyncFnMut() -> bool) {
    let started = Instant::now();
    while !done().await {
        assert!(started.elapsed() < Duration::from_secs(60), "waited in vain until {what}");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn prompt_sets_are_switched_during_updates_and_queries() {
    let broker = MockBroker::start(&[(TOPIC, 3), ("images.dead-letters", 1)]).unwrap();
    let folder = tempfile::tempdir().unwrap();
    let store = Store::open(folder.path().to_str().unwrap(), &BTreeMap::new()).unwrap();
    let encoders = hashed_encoders();
    let generation = generation_of_model(&*encoders);
    let (old, new) = (embed_prompt_set("old", &*encoders), embed_prompt_set("new", &*encoders));
    let serving = ServingConfig::new(old.statistics_key.clone(), Normaliser::Softmax, 0.25);
    let states = StateStore::new(&store);
    let state = states
        .initialise_or_extend(&generation, &[old.to_record()], &serving, "test")
        .await
        .unwrap();

    // A worker that gets updates without pause and follows the prompt sets of the state.
    let (token, progress) = (CancellationToken::new(), Arc::new(Progress::default()));
    let sets = ActivePromptSets::new(vec![old.clone()]);
    let worker = new_worker(&broker, &store, &encoders, &sets, &progress).await;
    let worker_task = tokio::spawn(worker.run(token.clone()));
    tokio::spawn(follow_prompt_sets(
        store.clone(),
        generation.id.clone(),
        sets.clone(),
        encoders.clone(),
        POLL_INTERVAL,
        token.clone(),
    ));
    let (stop_updates, sent) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU64::new(0)));
    let kafka = kafka::KafkaOptions {
        brokers: broker.bootstrap_servers(),
        ..kafka::KafkaOptions::default()
    };
    let producer: FutureProducer = kafka.producer_config().create().unwrap();
    let update_task = tokio::spawn(send_updates(producer, stop_updates.clone(), sent.clone()));

    // Two query workers that follow table and state, and get queries without pause.
    let expected: Arc<ExpectedAnswers> = Arc::new(BTreeMap::from([
        ("initial", (old.statistics_key.clone(), 0.25)),
        ("newer", (new.statistics_key.clone(), 0.5)),
    ]));
    let stop_queries = Arc::new(AtomicBool::new(false));
    let (mut engines, mut query_tasks) = (Vec::new(), Vec::new());
    wait_until("all images are stored once", async || {
        progress.stored_rows.load(AtomicOrdering::SeqCst) > IMAGE_COUNT
    })
    .await;
    for _ in 0..2 {
        let served = ServingSnapshot::from_state(&state, vec![old.clone()]);
        let options = search::SearchOptions { poll_ms: 100, ..search::SearchOptions::default() };
        let engine = Arc::new(Engine::new(encoders.clone(), served, options));
        let follower = CatalogueFollower {
            catalogue: store.clone(),
            engines: Arc::new(Engines::new(engine.clone())),
            models: vec![encoders.clone()],
            state: state.clone(),
            poll_interval: POLL_INTERVAL,
        };
        tokio::spawn(follower.run(token.clone()));
        engines.push(engine);
    }
    wait_until("the query workers are ready", async || {
        engines.iter().all(|e| e.snapshots().is_ready())
    })
    .await;
    for engine in &engines {
        query_tasks.push(tokio::spawn(send_queries(
            engine.clone(),
            expected.clone(),
            stop_queries.clone(),
        )));
    }

    // A backfill that is killed in the middle, then two concurrent ones that do the rest.
    add_prompt_set(&store, &generation, &new, "test").await.unwrap();
    let job = || StatisticsBackfill {
        catalogue: store.clone(),
        generation: generation.clone(),
        prompt_set: new.clone(),
        max_commit_attempts: 50,
        max_concurrent_files: 2,
        propagation_delay: Duration::from_secs(2),
    };
    let (killed, never_cancelled) = (job(), CancellationToken::new());
    let killed =
        tokio::spawn(async move { killed.run(&|_, _| {}, &never_cancelled).await.map(drop) });
    tokio::time::sleep(Duration::from_millis(150)).await;
    killed.abort();
    let rules = immediate_rules(folder.path());
    let error = check_promotion(&store, &rules, chrono::Utc::now()).await.unwrap_err();
    assert!(error.to_string().contains("no candidate"), "{error}");
    let (first, second) = (job(), job());
    let (first_result, second_result) =
        tokio::join!(first.run(&|_, _| {}, &token), second.run(&|_, _| {}, &token));
    assert!(first_result.unwrap().is_complete && second_result.unwrap().is_complete);

    // A candidate that answers a share of the queries and shadow queries, then is promoted and
    // rolled back.
    let candidate = CandidateSpec {
        name: "newer".into(),
        prompt_set: Some("new".into()),
        weight: Some(0.5),
        traffic_share: 0.4,
        shadow_share: 0.5,
        ..CandidateSpec::default()
    };
    let limit = Duration::from_secs(30);
    let state = set_candidate(&store, &candidate, "test").await.unwrap();
    let readiness = wait_for_replicas(&store, state.revision, limit, &token).await.unwrap();
    assert_eq!((readiness.ready.len(), readiness.not_ready.len()), (2, 0));
    let query_for = |configuration: Option<&str>| Query {
        input: "query 1".into(),
        requested_configuration: configuration.map(Into::into),
        ..Query::default()
    };
    let answer = |configuration: Option<&'static str>| {
        let engine = engines[0].clone();
        async move {
            let query = query_for(configuration);
            tokio::task::spawn_blocking(move || engine.search(&query)).await.unwrap()
        }
    };
    assert_eq!(answer(Some("candidate")).await.unwrap().configuration_name, "newer");
    assert_eq!(answer(None).await.unwrap().configuration_name, "initial");
    assert!(answer(Some("nobody")).await.unwrap_err().to_string().contains("newer"));
    wait_until("shadow queries were answered", async || {
        engines[0].traffic_counts().shadow_queries > 3
    })
    .await;
    assert!(engines[0].traffic_counts().candidate > 0);

    let promotion = check_promotion(&store, &rules, chrono::Utc::now()).await.unwrap();
    assert_eq!(promotion.blockers, Vec::<String>::new());
    let live = promote(&store, promotion.revision, "hashed", "test").await.unwrap();
    let readiness = wait_for_replicas(&store, live.revision, limit, &token).await.unwrap();
    assert_eq!(readiness.ready.len(), 2);
    assert_eq!(answer(None).await.unwrap().configuration_name, "newer");
    let rollback = RollbackPlan::prepare(&store).await.unwrap();
    let rolled_back = rollback.execute(&store, "test").await.unwrap();
    let readiness = wait_for_replicas(&store, rolled_back.revision, limit, &token).await.unwrap();
    assert_eq!(readiness.ready.len(), 2);
    assert_eq!(answer(None).await.unwrap().configuration_name, "initial");

    stop_queries.store(true, AtomicOrdering::SeqCst);
    for task in query_tasks {
        let answers = task.await.expect("no query fails or mixes configurations");
        assert!(answers["initial"] > 0 && answers["newer"] > 0, "{answers:?}");
    }
    stop_updates.store(true, AtomicOrdering::SeqCst);
    let newest = update_task.await.unwrap();
    let sent = sent.load(AtomicOrdering::SeqCst);
    wait_until("everything is stored", async || {
        progress.stored_rows.load(AtomicOrdering::SeqCst) == sent
    })
    .await;

    // Every row has the statistics of both sets, and the newest version of every image is served.
    let mut source = BackfillSource::open(&store, &generation).await.unwrap();
    for key in [&old.statistics_key, &new.statistics_key] {
        assert!(
            source.list_pending_files_and_coverage(key).await.unwrap().1.is_complete(),
            "{key}"
        );
    }
    let newest = SequenceKey::from_number(newest);
    wait_until("the query workers have the newest versions", async || {
        engines.iter().all(|engine| {
            let snapshot = engine.snapshots().newest();
            snapshot.len() as u64 == IMAGE_COUNT
                && snapshot
                    .images_with_embeddings()
                    .all(|(entry, _)| entry.version.sequence == newest)
        })
    })
    .await;
    let snapshot = engines[0].snapshots().newest();
    for (entry, embedding) in snapshot.images_with_embeddings() {
        for set in [&old, &new] {
            let stored = snapshot.statistics(entry.image_id.as_str(), &set.statistics_key);
            assert_eq!(stored, set.compute_statistics(&embedding), "equal bit by bit");
        }
    }
    token.cancel();
    assert!(worker_task.await.unwrap().unwrap(), "drained");
}
