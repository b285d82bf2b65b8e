//! Prompt sets are switched under continuous updates and continuous queries: no query fails, no
//! image is missing, no answer mixes two configurations, a killed reindex goes on, and all goes back.

#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::collections::BTreeMap;
use std::io::Cursor;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering as AtomicOrdering};
use std::time::{Duration, Instant};

use base64::Engine as _;
use bsap::clip::{ClipError, ModelCard, Pixels, Towers};
use bsap::ingest::dead_letter::{self, DeadLetters};
use bsap::demo::broker::Broker;
use bsap::ingest::fetch::{self, Fetcher};
use bsap::ingest::{self, Progress, Worker, decode};
use bsap::balance::normalise::Normaliser;
use bsap::prompts::{ActiveSets, EmbeddedSet, PromptSet};
use bsap::record::{Ordering, Sequence};
use bsap::backfill::{Job, add_set, follow_sets};
use bsap::serve::Reader;
use bsap::rollout::{Rules, Wanted, WayBack, examine, promote, set_candidate, wait_for_readers};
use bsap::search::{self, Engine, Engines, Query, Served};
use bsap::ingest::source::{self, Decoder};
use bsap::balance::statistics::StatisticsKey;
use bsap::store::Store;
use bsap::catalogue::{Generation, Serving, StateStore};
use bsap::table::{Stored, Writer};
use bsap::kafka;
use image::{ImageFormat, RgbImage};
use rdkafka::producer::{FutureProducer, FutureRecord};
use serde_json::json;
use tokio_util::sync::CancellationToken;

const TOPIC: &str = "images";
const DIMENSION: usize = 32;
const IMAGES: u64 = 60;
const POLL: Duration = Duration::from_millis(100);

/// Directions that follow from the bytes, in the place of a model: quick, and the same every time.
struct Hashed(ModelCard);

fn unit(bytes: &[u8]) -> Vec<f32> {
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

impl Towers for Hashed {
    fn card(&self) -> &ModelCard {
        &self.0
    }

    fn prepare(&self, image: &RgbImage) -> Result<Pixels, ClipError> {
        Ok(Pixels(image.as_raw().clone()))
    }

    fn embed_images(&self, batch: &[Pixels]) -> Result<Vec<Vec<f32>>, ClipError> {
        Ok(batch.iter().map(|pixels| unit(&pixels.0)).collect())
    }

    fn embed_texts(&self, texts: &[&str]) -> Result<Vec<Vec<f32>>, ClipError> {
        Ok(texts.iter().map(|text| unit(text.as_bytes())).collect())
    }
}

fn towers() -> Arc<dyn Towers> {
    Arc::new(Hashed(ModelCard::stand_in("hashed", DIMENSION)))
}

fn set(name: &str, towers: &dyn Towers) -> Arc<EmbeddedSet> {
    let set = PromptSet::new(name, (0..20).map(|i| format!("{name} {i}")).collect());
    Arc::new(set.embed(towers, 4).unwrap())
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

async fn worker(
    broker: &Broker,
    store: &Store,
    towers: &Arc<dyn Towers>,
    sets: &ActiveSets,
    progress: &Arc<Progress>,
) -> Worker {
    let kafka = kafka::Options { brokers: broker.brokers(), ..kafka::Options::default() };
    let source = source::Options {
        ordering: Ordering::Sequence,
        drain_seconds: 3,
        session_timeout_ms: 6_000,
        ..source::Options::default()
    };
    Worker {
        decoder: Decoder::new(&source, &BTreeMap::new()),
        source,
        dead_letters: DeadLetters::new(&kafka, &dead_letter::Options::default()).unwrap(),
        kafka,
        fetcher: Fetcher::new(&fetch::Options::default()).unwrap(),
        decode: decode::Options::default(),
        towers: towers.clone(),
        sets: sets.clone(),
        writer: Writer::open(store, &generation(&**towers), 50).await.unwrap(),
        options: ingest::Options { commit_ms: 150, drain_seconds: 3, ..ingest::Options::default() },
        progress: progress.clone(),
    }
}

/// Sends new versions of the images, round after round, until `stop`; gives the newest of each.
async fn update(producer: FutureProducer, stop: Arc<AtomicBool>, sent: Arc<AtomicU64>) -> u64 {
    let mut version = 0;
    while version < 2 || !stop.load(AtomicOrdering::SeqCst) {
        version += 1;
        for id in 0..IMAGES {
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

/// What each configuration answers with.
type Configurations = BTreeMap<&'static str, (StatisticsKey, f32)>;

/// Asks without pause until `stop`; gives how many answers each configuration made.
async fn ask(
    engine: Arc<Engine>,
    wanted: Arc<Configurations>,
    stop: Arc<AtomicBool>,
) -> BTreeMap<String, u64> {
    let mut answers = BTreeMap::new();
    let mut number = 0u64;
    while !stop.load(AtomicOrdering::SeqCst) {
        number += 1;
        let query = Query {
            input: format!("query {}", number % 17).into(),
            k: Some(20),
            key: Some(format!("user {}", number % 31)),
            ..Query::default()
        };
        let asked = engine.clone();
        let results = tokio::task::spawn_blocking(move || asked.search(&query)).await.unwrap();
        let results = results.expect("no query fails");
        let (key, weight) = &wanted[results.configuration.as_str()];
        assert_eq!((&results.set.key, results.balance.weight), (key, *weight), "not mixed");
        for hit in &results.hits {
            let score = hit.affine.alpha.mul_add(hit.raw_score, hit.affine.beta);
            assert!((hit.score - score).abs() < 1e-6, "{} {score}", hit.score);
        }
        assert_eq!(results.hits.len(), 20, "nothing is missing");
        *answers.entry(results.configuration).or_default() += 1;
    }
    answers
}

/// Without waiting for anything, so that the test is short.
fn rules(folder: &Path) -> Rules<'_> {
    Rules { settle: Duration::ZERO, grace: Duration::ZERO, allow_missing: 0, folder }
}

async fn until(what: &str, mut done: impl AsyncFnMut() -> bool) {
    let started = Instant::now();
    while !done().await {
        assert!(started.elapsed() < Duration::from_secs(60), "waited in vain until {what}");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn prompt_sets_are_switched_under_updates_and_queries() {
    let broker = Broker::start(&[(TOPIC, 3), ("images.dead-letters", 1)]).unwrap();
    let folder = tempfile::tempdir().unwrap();
    let store = Store::open(folder.path().to_str().unwrap(), &BTreeMap::new()).unwrap();
    let towers = towers();
    let generation = generation(&*towers);
    let (old, new) = (set("old", &*towers), set("new", &*towers));
    let serving = Serving::new(old.key.clone(), Normaliser::Softmax, 0.25);
    let states = StateStore::new(&store);
    let state = states.ensure(&generation, &[old.record()], &serving, "test").await.unwrap();

    // A worker that is fed without pause, and takes up sets from the state.
    let (token, progress) = (CancellationToken::new(), Arc::new(Progress::default()));
    let sets = ActiveSets::new(vec![old.clone()]);
    let working = worker(&broker, &store, &towers, &sets, &progress).await;
    let working = tokio::spawn(working.run(token.clone()));
    tokio::spawn(follow_sets(
        store.clone(),
        generation.id.clone(),
        sets.clone(),
        towers.clone(),
        POLL,
        token.clone(),
    ));
    let (stop_updates, sent) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU64::new(0)));
    let kafka = kafka::Options { brokers: broker.brokers(), ..kafka::Options::default() };
    let producer: FutureProducer = kafka.producer().create().unwrap();
    let updating = tokio::spawn(update(producer, stop_updates.clone(), sent.clone()));

    // Two query workers that follow table and state, asked without pause.
    let wanted: Arc<Configurations> = Arc::new(BTreeMap::from([
        ("initial", (old.key.clone(), 0.25)),
        ("newer", (new.key.clone(), 0.5)),
    ]));
    let stop_queries = Arc::new(AtomicBool::new(false));
    let (mut engines, mut asking) = (Vec::new(), Vec::new());
    until("all images are stored once", async || {
        progress.stored.load(AtomicOrdering::SeqCst) > IMAGES
    })
    .await;
    for _ in 0..2 {
        let served = Served::of(&state, vec![old.clone()]);
        let options = search::Options { poll_ms: 100, ..search::Options::default() };
        let engine = Arc::new(Engine::new(towers.clone(), served, options));
        let reader = Reader {
            catalogue: store.clone(),
            engines: Arc::new(Engines::new(engine.clone())),
            models: vec![towers.clone()],
            state: state.clone(),
            poll: POLL,
        };
        tokio::spawn(reader.run(token.clone()));
        engines.push(engine);
    }
    until("the query workers are ready", async || engines.iter().all(|e| e.snapshots().ready()))
        .await;
    for engine in &engines {
        asking.push(tokio::spawn(ask(engine.clone(), wanted.clone(), stop_queries.clone())));
    }

    // A reindex that is killed in the middle, then two at once that do the rest.
    add_set(&store, &generation, &new, "test").await.unwrap();
    let job = || Job {
        catalogue: store.clone(),
        generation: generation.clone(),
        set: new.clone(),
        attempts: 50,
        lanes: 2,
        settle: Duration::from_secs(2),
    };
    let (killed, never) = (job(), CancellationToken::new());
    let killed = tokio::spawn(async move { killed.run(&|_, _| {}, &never).await.map(drop) });
    tokio::time::sleep(Duration::from_millis(150)).await;
    killed.abort();
    let rules = rules(folder.path());
    let error = examine(&store, &rules, chrono::Utc::now()).await.unwrap_err();
    assert!(error.to_string().contains("no candidate"), "{error}");
    let (first, second) = (job(), job());
    let (one, other) = tokio::join!(first.run(&|_, _| {}, &token), second.run(&|_, _| {}, &token));
    assert!(one.unwrap().complete && other.unwrap().complete);

    // A candidate, for a share and in the shadow, then live, then back.
    let wish = Wanted {
        name: "newer".into(),
        prompt_set: Some("new".into()),
        weight: Some(0.5),
        share: 0.4,
        shadow: 0.5,
        ..Wanted::default()
    };
    let limit = Duration::from_secs(30);
    let state = set_candidate(&store, &wish, "test").await.unwrap();
    let standing = wait_for_readers(&store, state.revision, limit, &token).await.unwrap();
    assert_eq!((standing.ready.len(), standing.waiting.len()), (2, 0));
    let asks = |configuration: Option<&str>| Query {
        input: "query 1".into(),
        configuration: configuration.map(Into::into),
        ..Query::default()
    };
    let answer = |configuration: Option<&'static str>| {
        let engine = engines[0].clone();
        async move {
            let query = asks(configuration);
            tokio::task::spawn_blocking(move || engine.search(&query)).await.unwrap()
        }
    };
    assert_eq!(answer(Some("candidate")).await.unwrap().configuration, "newer");
    assert_eq!(answer(None).await.unwrap().configuration, "initial");
    assert!(answer(Some("nobody")).await.unwrap_err().to_string().contains("newer"));
    until("the shadow was computed", async || engines[0].traffic().shadows > 3).await;
    assert!(engines[0].traffic().candidate > 0);

    let found = examine(&store, &rules, chrono::Utc::now()).await.unwrap();
    assert_eq!(found.problems, Vec::<String>::new());
    let live = promote(&store, found.revision, "hashed", "test").await.unwrap();
    let standing = wait_for_readers(&store, live.revision, limit, &token).await.unwrap();
    assert_eq!(standing.ready.len(), 2);
    assert_eq!(answer(None).await.unwrap().configuration, "newer");
    let way = WayBack::of(&store).await.unwrap();
    let back = way.go(&store, "test").await.unwrap();
    let standing = wait_for_readers(&store, back.revision, limit, &token).await.unwrap();
    assert_eq!(standing.ready.len(), 2);
    assert_eq!(answer(None).await.unwrap().configuration, "initial");

    stop_queries.store(true, AtomicOrdering::SeqCst);
    for asked in asking {
        let answers = asked.await.expect("no answer is mixed");
        assert!(answers["initial"] > 0 && answers["newer"] > 0, "{answers:?}");
    }
    stop_updates.store(true, AtomicOrdering::SeqCst);
    let newest = updating.await.unwrap();
    let all = sent.load(AtomicOrdering::SeqCst);
    until("everything is stored", async || progress.stored.load(AtomicOrdering::SeqCst) == all)
        .await;

    // Every row carries both sets, and every image is there in its newest version.
    let mut stored = Stored::open(&store, &generation).await.unwrap();
    for key in [&old.key, &new.key] {
        assert!(stored.pending(key).await.unwrap().1.complete(), "{key}");
    }
    let wanted = Sequence::from_number(newest);
    until("the query workers have the newest versions", async || {
        engines.iter().all(|engine| {
            let snapshot = engine.snapshots().newest();
            snapshot.len() as u64 == IMAGES
                && snapshot.images().all(|(entry, _)| entry.version.sequence == wanted)
        })
    })
    .await;
    let snapshot = engines[0].snapshots().newest();
    for (entry, embedding) in snapshot.images() {
        for set in [&old, &new] {
            let found = snapshot.statistics(entry.image_id.as_str(), &set.key);
            assert_eq!(found, set.statistics(&embedding), "to the bit");
        }
    }
    token.cancel();
    assert!(working.await.unwrap().unwrap(), "drained");
}
