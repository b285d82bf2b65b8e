//! Two models: a candidate in a generation of its own, its promotion, and the way back.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering as Atomic};
use std::time::Duration;

use chrono::{DateTime, Utc};
use tokio_util::sync::CancellationToken;

use super::tests::roll_back;
use super::*;
use crate::backfill::*;
use crate::balance::normalise::Normaliser;
use crate::catalogue::{Beside, Change, Generation, Serving, StateStore};
use crate::prompts::{EmbeddedSet, PromptSet};
use crate::record::{Embedding, Ordering, Partition, Row};
use crate::search::testing::{Hashed, embedding, row};
use crate::search::{Engine, Engines, Input, Options, Query, QueryError, Results, Served};
use crate::serve::Reader;
use crate::store::Store;
use crate::table::{PartitionBatch, Writer};

const IMAGES: u64 = 30;
const POLL: Duration = Duration::from_millis(20);
const LIMIT: Duration = Duration::from_secs(30);

fn model(name: &str, dimension: usize) -> Arc<Hashed> {
    let mut model = Arc::into_inner(Hashed::new(dimension)).unwrap();
    model.card.name = name.into();
    model.card.fingerprint = name.repeat(16);
    Arc::new(model)
}

fn generation(model: &Hashed) -> Generation {
    let card = &model.card;
    Generation::new(&card.name, &card.fingerprint, card.dimension, 100.0, Ordering::Sequence)
}

fn set(model: &Hashed) -> EmbeddedSet {
    let set = PromptSet::new("plain", (0..6).map(|i| format!("prompt {i}")).collect());
    set.embed(model, 3).unwrap()
}

/// The stored row of an image: its embedding is the model's own.
fn stored(model: &Hashed, id: u64) -> Row {
    let mut row = row(&format!("i{id}"), 1, Some(embedding(id, model.card.dimension)));
    let image = row.image.as_mut().unwrap();
    let set = set(model);
    let statistics = set.statistics(&image.embedding).unwrap();
    image.statistics = [(set.key.clone(), statistics)].into_iter().collect();
    row
}

async fn append(store: &Store, model: &Hashed, from: u64, to: u64) {
    let rows = (from..to).map(|id| (id as i64, stored(model, id))).collect();
    let partition = Partition { topic: "t".into(), number: 0 };
    let expected = (from > 0).then_some(from as i64);
    let batch = PartitionBatch { partition, expected, next_offset: to as i64, rows };
    Writer::open(store, &generation(model), 5).await.unwrap().append(vec![batch]).await.unwrap();
}

/// A catalogue filled by `old`, with a generation of `new` beside it that has images up to `to`.
async fn catalogue(old: &Hashed, new: &Hashed, to: u64) -> Store {
    let store = Store::memory();
    let set = set(old).record();
    let serving = Serving::new(set.key.clone(), Normaliser::Softmax, 0.25);
    StateStore::new(&store).ensure(&generation(old), &[set], &serving, "test").await.unwrap();
    append(&store, old, 0, IMAGES).await;
    let beside = Beside {
        generation: generation(new),
        checkpoint: "new checkpoint".into(),
        prompt_sets: vec![self::set(new).record()],
        since: DateTime::from_timestamp(1, 0).unwrap(),
    };
    set_up(&store, &beside, &[], 5, "test").await.unwrap();
    append(&store, new, 0, to).await;
    store
}

/// A query worker that was given `models`, the first of which fills the live generation.
async fn query_worker(
    store: &Store,
    models: &[Arc<Hashed>],
    token: &CancellationToken,
) -> Arc<Engines> {
    let state = StateStore::new(store).newest().await.unwrap().unwrap();
    let served = Served::of(&state, vec![Arc::new(set(&models[0]))]);
    let options = Options { poll_ms: 20, ..Options::default() };
    let engines = Arc::new(Engines::new(Arc::new(Engine::new(models[0].clone(), served, options))));
    let reader = Reader {
        catalogue: store.clone(),
        engines: engines.clone(),
        models: models.iter().map(|model| model.clone() as _).collect(),
        state,
        poll: POLL,
    };
    tokio::spawn(reader.run(token.clone()));
    while !engines.live().snapshots().ready() {
        tokio::time::sleep(POLL).await;
    }
    engines
}

async fn ask(engines: &Arc<Engines>, query: Query) -> Result<Results, QueryError> {
    let engines = engines.clone();
    let asked = move || engines.search(&query, &CancellationToken::new());
    tokio::task::spawn_blocking(asked).await.unwrap()
}

/// Everything of an answer comes from one model, the one of the generation that it names.
fn one_model(text: &str, results: &Results, models: &[Arc<Hashed>]) {
    let is_its = |model: &&Arc<Hashed>| generation(model).id == results.served.generation;
    let model = models.iter().find(is_its).unwrap();
    assert_eq!((results.set.key.clone(), results.hits.len()), (set(model).key, 20));
    let query = model.embedding(text.as_bytes());
    for hit in &results.hits {
        let id: u64 = hit.entry.image_id.as_str()[1..].parse().unwrap();
        let image = Embedding::round(&embedding(id, model.card.dimension));
        let raw: f32 = query.iter().zip(image.values()).map(|(a, b)| a * b).sum();
        assert!((raw - hit.raw_score).abs() < 1e-4, "{raw} {}", hit.raw_score);
    }
}

fn large(share: f32, shadow: f32) -> Wanted {
    Wanted { name: "large".into(), beside: true, share, shadow, ..Wanted::default() }
}

fn rules(allow_missing: u64) -> Rules<'static> {
    let folder = Path::new("/tmp");
    Rules { settle: Duration::ZERO, grace: Duration::ZERO, allow_missing, folder }
}

#[tokio::test(flavor = "multi_thread")]
async fn models_are_switched_under_queries_and_back() {
    let models = [model("ab12", 16), model("cd34", 24)];
    let (old, new) = (&models[0], &models[1]);
    let store = catalogue(old, new, IMAGES - 1).await;
    let token = CancellationToken::new();
    let engines = query_worker(&store, &models, &token).await;
    let stop = Arc::new(AtomicBool::new(false));
    let asking = {
        let (engines, models, stop) = (engines.clone(), models.clone(), stop.clone());
        tokio::spawn(async move {
            let mut answers = BTreeMap::<(String, String), u64>::new();
            let mut number = 0;
            while !stop.load(Atomic::SeqCst) {
                number += 1;
                let text = format!("query {}", number % 7);
                let key = Some(format!("user {}", number % 31));
                let query =
                    Query { input: text.as_str().into(), k: Some(20), key, ..Query::default() };
                let results = ask(&engines, query).await.expect("no query fails");
                one_model(&text, &results, &models);
                let by = (results.served.generation.clone(), results.configuration);
                *answers.entry(by).or_default() += 1;
            }
            answers
        })
    };

    // What the new generation lacks is told, and may be allowed; then nothing is lacking.
    let state = set_candidate(&store, &large(0.5, 1.0), "test").await.unwrap();
    let found = examine(&store, &rules(0), Utc::now()).await.unwrap();
    assert!(found.problems[0].contains("lacks 1 of 30 live images"), "{:?}", found.problems);
    assert!(found.problems[0].contains("for example i29"), "{:?}", found.problems);
    assert_eq!(
        examine(&store, &rules(1), Utc::now()).await.unwrap().problems,
        Vec::<String>::new()
    );
    append(&store, new, IMAGES - 1, IMAGES).await;
    let found = examine(&store, &rules(0), Utc::now()).await.unwrap();
    assert_eq!((found.problems, found.gap.unwrap().missing), (vec![], 0));
    assert_eq!((found.from.id, found.to.id), (generation(old).id, generation(new).id));

    let standing = wait_for_readers(&store, state.revision, LIMIT, &token).await.unwrap();
    assert_eq!((standing.ready.len(), standing.waiting.len()), (1, 0));
    let asks = |configuration: Option<&str>| Query {
        input: "query 1".into(),
        k: Some(20),
        configuration: configuration.map(Into::into),
        ..Query::default()
    };
    let by_name = ask(&engines, asks(Some("candidate"))).await.unwrap();
    assert_eq!(
        (by_name.configuration.as_str(), &by_name.served.generation),
        ("large", &generation(new).id)
    );
    let vector =
        Query { input: Input::Vector(vec![1.0; 16]), key: Some("user 1".into()), ..asks(None) };
    assert_eq!(
        ask(&engines, vector).await.unwrap().configuration,
        "initial",
        "it is the live model's"
    );
    let counted = || engines.live().traffic();
    while counted().shadows == 0 || counted().candidate < 5 {
        tokio::time::sleep(POLL).await;
    }
    let first = ask(&engines, Query { k: Some(5), ..asks(None) }).await.unwrap();

    let live = promote(&store, state.revision, "old checkpoint", "test").await.unwrap();
    assert_eq!((&live.live, &live.candidate), (&generation(new), &None));
    let kept = live.beside.as_ref().unwrap();
    assert_eq!((&kept.generation, kept.checkpoint.as_str()), (&generation(old), "old checkpoint"));
    wait_for_readers(&store, live.revision, LIMIT, &token).await.unwrap();
    let results = ask(&engines, asks(None)).await.unwrap();
    assert_eq!(
        (results.configuration.as_str(), &results.served.generation),
        ("large", &generation(new).id)
    );
    // A page that was turned before is turned further where it began.
    let next = Query { k: Some(5), cursor: first.next_cursor, ..asks(None) };
    let next = ask(&engines, next).await.unwrap();
    assert_eq!((&next.served.generation, next.hits[0].rank), (&generation(old).id, 6));

    let back = roll_back(&store, "test").await.unwrap();
    assert_eq!((&back.live, back.name.as_str()), (&generation(old), "initial"));
    let kept = back.beside.as_ref().unwrap();
    assert_eq!((&kept.generation, kept.checkpoint.as_str()), (&generation(new), "new checkpoint"));
    wait_for_readers(&store, back.revision, LIMIT, &token).await.unwrap();
    let results = ask(&engines, asks(None)).await.unwrap();
    assert_eq!(
        (results.configuration.as_str(), &results.served.generation),
        ("initial", &generation(old).id)
    );

    // Without the generation there is nothing to go back to, and none in memory.
    promoted_again(&store, &token).await;
    withdraw(&store, "test").await.unwrap();
    let error = roll_back(&store, "test").await.unwrap_err().to_string();
    assert!(error.contains("no longer filled") && error.contains("bsap reindex model"), "{error}");
    while engines.roles().beside.is_some() {
        tokio::time::sleep(POLL).await;
    }
    stop.store(true, Atomic::SeqCst);
    let answers = asking.await.unwrap();
    let names: Vec<_> = answers.keys().map(|(id, name)| (id.as_str(), name.as_str())).collect();
    assert_eq!(names, [(&*generation(old).id, "initial"), (&*generation(new).id, "large")]);
    token.cancel();
}

#[tokio::test(flavor = "multi_thread")]
async fn an_image_that_the_candidate_lacks_yet_is_answered_from_what_is_live() {
    let models = [model("ab12", 16), model("cd34", 24)];
    let store = catalogue(&models[0], &models[1], IMAGES - 1).await;
    let token = CancellationToken::new();
    let engines = query_worker(&store, &models, &token).await;
    let state = set_candidate(&store, &large(1.0, 0.0), "test").await.unwrap();
    wait_for_readers(&store, state.revision, LIMIT, &token).await.unwrap();
    let like = |id: &str, configuration: Option<&str>| Query {
        input: Input::Image(id.into()),
        key: Some("user".into()),
        configuration: configuration.map(Into::into),
        ..Query::default()
    };
    let by = async |query| ask(&engines, query).await.map(|found| found.configuration);
    assert_eq!(by(like("i28", None)).await.unwrap(), "large");
    assert_eq!(by(like("i29", None)).await.unwrap(), "initial");
    for (id, configuration) in [("i29", Some("large")), ("i30", None)] {
        let error = by(like(id, configuration)).await.unwrap_err();
        assert!(matches!(error, QueryError::NoImage(_)), "{error}");
    }
    assert!(engines.image("i29").is_some() && engines.image("i30").is_none());
    token.cancel();
}

async fn promoted_again(store: &Store, token: &CancellationToken) {
    let state = set_candidate(store, &large(0.0, 0.0), "test").await.unwrap();
    wait_for_readers(store, state.revision, LIMIT, token).await.unwrap();
    let live = promote(store, state.revision, "old checkpoint", "test").await.unwrap();
    wait_for_readers(store, live.revision, LIMIT, token).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_query_worker_without_the_other_model_says_what_it_lacks_and_answers_on() {
    let (old, new) = (model("ab12", 16), model("cd34", 24));
    let store = catalogue(&old, &new, IMAGES).await;
    let token = CancellationToken::new();
    let engines = query_worker(&store, &[old], &token).await;
    let state = set_candidate(&store, &large(1.0, 0.0), "test").await.unwrap();
    let standing = loop {
        let found = wait_for_readers(&store, state.revision, POLL, &token).await.unwrap();
        if found.waiting.first().is_some_and(|report| report.problem.is_some()) {
            break found;
        }
    };
    assert!(standing.ready.is_empty());
    let problem = standing.waiting[0].problem.as_deref().unwrap();
    assert!(problem.contains("search.candidate_checkpoint"), "{problem}");
    let query = Query { input: "query".into(), key: Some("user".into()), ..Query::default() };
    assert_eq!(ask(&engines, query).await.unwrap().configuration, "initial");
    token.cancel();
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_way_back_to_another_model_loses_is_known_before() {
    let (old, new) = (model("ab12", 16), model("cd34", 24));
    let store = catalogue(&old, &new, IMAGES).await;
    let state = set_candidate(&store, &large(0.0, 0.0), "test").await.unwrap();
    promote(&store, state.revision, "old checkpoint", "test").await.unwrap();
    // The old model's workers are stopped; the new one's go on.
    append(&store, &new, IMAGES, IMAGES + 2).await;
    let way = WayBack::of(&store).await.unwrap();
    assert_eq!(way.to(), &generation(&old));
    let gap = way.gap(&store, Path::new("/tmp"), Duration::ZERO, Utc::now()).await.unwrap();
    let example = Some(format!("i{IMAGES}"));
    let wanted = Gap { live: IMAGES + 2, missing: 2, example, ..Gap::default() };
    assert_eq!(gap, Some(wanted));
    // And one may go all the same.
    let back = way.go(&store, "test").await.unwrap();
    assert_eq!(back.live, generation(&old));
}

#[tokio::test(flavor = "multi_thread")]
async fn the_generation_beside_gets_a_prompt_set_of_its_own() {
    let (old, new) = (model("ab12", 16), model("cd34", 24));
    let store = catalogue(&old, &new, IMAGES).await;
    let other = PromptSet::new("other", (0..6).map(|i| format!("other {i}")).collect());
    let other = other.embed(&*new, 3).unwrap();
    let wanted = Wanted { prompt_set: Some("other".into()), ..large(0.0, 0.0) };
    let error = set_candidate(&store, &wanted, "test").await.unwrap_err().to_string();
    assert!(error.contains("model.checkpoint = \"new checkpoint\""), "{error}");

    // One key may be known for both, each time for itself.
    for model in [&new, &old] {
        let known = generation(model);
        let state = add_set(&store, &known, &other, "test").await.unwrap();
        let again = add_set(&store, &known, &other, "test").await.unwrap();
        assert_eq!(state.revision, again.revision, "twice is once");
        let is_there = |of: &Hashed| {
            let sets = state.sets_of(&generation(of).id).unwrap();
            sets.iter().any(|set| set.key == other.key)
        };
        assert_eq!((is_there(&new), is_there(&old)), (true, known == generation(&old)));
        let beside = (known == generation(&new)).then(|| known.id.clone());
        let keys = vec![other.key.to_string()];
        assert_eq!(state.change, Change::PromptSets { keys, generation: beside });
    }
    let third = generation(&model("ef56", 16));
    assert!(add_set(&store, &third, &other, "test").await.is_err(), "it is neither");

    let job = Job {
        catalogue: store.clone(),
        generation: generation(&new),
        set: Arc::new(other),
        attempts: 5,
        lanes: 1,
        settle: Duration::ZERO,
    };
    let done = job.run(&|_, _| {}, &CancellationToken::new()).await.unwrap();
    assert!(done.complete && done.rows == IMAGES as usize, "{done:?}");
    set_candidate(&store, &wanted, "test").await.unwrap();
    let found = examine(&store, &rules(0), Utc::now()).await.unwrap();
    assert_eq!(found.problems, Vec::<String>::new());
}
