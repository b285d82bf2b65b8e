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
use crate::catalogue::{ServingConfig, StandbyGeneration, StateChange, StateStore};
use crate::prompts::{EmbeddedPromptSet, PromptSet};
use crate::record::{Embedding, ImageRow, TopicPartition, VersionOrdering};
use crate::search::testing::{HashEncoders, clip_like_embedding, sample_row};
use crate::search::{
    Engine, Engines, Query, QueryError, QueryInput, SearchOptions, SearchResults, ServingSnapshot,
};
use crate::serve::CatalogueFollower;
use crate::store::Store;
use crate::table::{Generation, PartitionBatch, TableWriter};

const IMAGE_COUNT: u64 = 30;
const POLL_INTERVAL: Duration = Duration::from_millis(20);
const TEST_TIMEOUT: Duration = Duration::from_secs(30);

fn fake_model(name: &str, dimension: usize) -> Arc<HashEncoders> {
    let mut model = Arc::into_inner(HashEncoders::new(dimension)).unwrap();
    model.card.name = name.into();
    model.card.fingerprint = name.repeat(16);
    Arc::new(model)
}

fn generation(model: &HashEncoders) -> Generation {
    let card = &model.card;
    Generation::new(&card.name, &card.fingerprint, card.dimension, 100.0, VersionOrdering::Sequence)
}

fn embedded_prompt_set(model: &HashEncoders) -> EmbeddedPromptSet {
    let set = PromptSet::new("plain", (0..6).map(|i| format!("prompt {i}")).collect());
    set.embed(model, 3).unwrap()
}

/// The stored row of an image: its embedding is the model's own.
fn stored_row(model: &HashEncoders, id: u64) -> ImageRow {
    let mut row =
        sample_row(&format!("i{id}"), 1, Some(clip_like_embedding(id, model.card.dimension)));
    let image = row.image.as_mut().unwrap();
    let set = embedded_prompt_set(model);
    let statistics = set.statistics(&image.embedding).unwrap();
    image.statistics = [(set.statistics_key.clone(), statistics)].into_iter().collect();
    row
}

async fn append_images(store: &Store, model: &HashEncoders, from: u64, to: u64) {
    let rows = (from..to).map(|id| (id as i64, stored_row(model, id))).collect();
    let partition = TopicPartition { topic: "t".into(), number: 0 };
    let expected = (from > 0).then_some(from as i64);
    let batch =
        PartitionBatch { partition, expected_position: expected, next_offset: to as i64, rows };
    TableWriter::open(store, &generation(model), 5)
        .await
        .unwrap()
        .append(vec![batch], &CancellationToken::new())
        .await
        .unwrap();
}

/// A catalogue filled by `old`, with a generation of `new` beside it that has images up to `to`.
async fn catalogue_with_standby(old: &HashEncoders, new: &HashEncoders, to: u64) -> Store {
    let store = Store::in_memory();
    let set = embedded_prompt_set(old).to_record();
    let serving = ServingConfig::new(set.key.clone(), Normaliser::Softmax, 0.25);
    StateStore::new(&store)
        .initialise_or_extend(&generation(old), &[set], &serving, "test")
        .await
        .unwrap();
    append_images(&store, old, 0, IMAGE_COUNT).await;
    let beside = StandbyGeneration {
        generation: generation(new),
        checkpoint: "new checkpoint".into(),
        prompt_sets: vec![self::embedded_prompt_set(new).to_record()],
        since: DateTime::from_timestamp(1, 0).unwrap(),
    };
    set_up_standby(&store, &beside, &[], 5, "test", &CancellationToken::new()).await.unwrap();
    append_images(&store, new, 0, to).await;
    store
}

/// A query worker that was given `models`, the first of which fills the live generation.
async fn start_query_worker(
    store: &Store,
    models: &[Arc<HashEncoders>],
    token: &CancellationToken,
) -> Arc<Engines> {
    let state = StateStore::new(store).read_newest().await.unwrap().unwrap();
    let served =
        ServingSnapshot::from_state(&state, vec![Arc::new(embedded_prompt_set(&models[0]))]);
    let options = SearchOptions { poll_ms: 20, ..SearchOptions::default() };
    let engines = Arc::new(Engines::new(Arc::new(Engine::new(models[0].clone(), served, options))));
    let reader = CatalogueFollower {
        catalogue: store.clone(),
        engines: engines.clone(),
        models: models.iter().map(|model| model.clone() as _).collect(),
        state,
        poll_interval: POLL_INTERVAL,
    };
    tokio::spawn(reader.run(token.clone()));
    while !engines.live().snapshots().is_ready() {
        tokio::time::sleep(POLL_INTERVAL).await;
    }
    engines
}

async fn run_search(engines: &Arc<Engines>, query: Query) -> Result<SearchResults, QueryError> {
    let engines = engines.clone();
    let asked = move || engines.search(&query, &CancellationToken::new());
    tokio::task::spawn_blocking(asked).await.unwrap()
}

/// Everything of an answer comes from one model, the one of the generation that it names.
fn assert_answered_by_one_model(text: &str, results: &SearchResults, models: &[Arc<HashEncoders>]) {
    let is_its =
        |model: &&Arc<HashEncoders>| generation(model).id == results.serving_snapshot.generation_id;
    let model = models.iter().find(is_its).unwrap();
    assert_eq!(
        (results.prompt_set.statistics_key.clone(), results.hits.len()),
        (embedded_prompt_set(model).statistics_key, 20)
    );
    let query = model.embed_bytes(text.as_bytes());
    for hit in &results.hits {
        let id: u64 = hit.image.image_id.as_str()[1..].parse().unwrap();
        let image = Embedding::from_unit_vector(&clip_like_embedding(id, model.card.dimension));
        let raw: f32 = query.iter().zip(image.values()).map(|(a, b)| a * b).sum();
        assert!((raw - hit.raw_score).abs() < 1e-4, "{raw} {}", hit.raw_score);
    }
}

fn candidate_spec(share: f32, shadow: f32) -> CandidateSpec {
    CandidateSpec {
        name: "large".into(),
        standby: true,
        traffic_share: share,
        shadow_share: shadow,
        ..CandidateSpec::default()
    }
}

fn promotion_rules(allow_missing: u64) -> PromotionRules<'static> {
    let folder = Path::new("/tmp");
    PromotionRules {
        propagation_delay: Duration::ZERO,
        grace_period: Duration::ZERO,
        max_missing: allow_missing,
        temp_folder: folder,
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn models_are_switched_under_queries_and_back() {
    let models = [fake_model("ab12", 16), fake_model("cd34", 24)];
    let (old, new) = (&models[0], &models[1]);
    let store = catalogue_with_standby(old, new, IMAGE_COUNT - 1).await;
    let token = CancellationToken::new();
    let engines = start_query_worker(&store, &models, &token).await;
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
                let query = Query {
                    input: text.as_str().into(),
                    k: Some(20),
                    traffic_key: key,
                    ..Query::default()
                };
                let results = run_search(&engines, query).await.expect("no query fails");
                assert_answered_by_one_model(&text, &results, &models);
                let by = (results.serving_snapshot.generation_id.clone(), results.configuration);
                *answers.entry(by).or_default() += 1;
            }
            answers
        })
    };

    // What the new generation lacks is told, and may be allowed; then nothing is lacking.
    let state = set_candidate(&store, &candidate_spec(0.5, 1.0), "test").await.unwrap();
    let found = check_promotion(&store, &promotion_rules(0), Utc::now()).await.unwrap();
    assert!(found.blockers[0].contains("lacks 1 of 30 live images"), "{:?}", found.blockers);
    assert!(found.blockers[0].contains("for example i29"), "{:?}", found.blockers);
    assert_eq!(
        check_promotion(&store, &promotion_rules(1), Utc::now()).await.unwrap().blockers,
        Vec::<String>::new()
    );
    append_images(&store, new, IMAGE_COUNT - 1, IMAGE_COUNT).await;
    let found = check_promotion(&store, &promotion_rules(0), Utc::now()).await.unwrap();
    assert_eq!((found.blockers, found.coverage_gap.unwrap().missing), (vec![], 0));
    assert_eq!(
        (found.live_generation.id, found.candidate_generation.id),
        (generation(old).id, generation(new).id)
    );

    let standing = wait_for_replicas(&store, state.revision, TEST_TIMEOUT, &token).await.unwrap();
    assert_eq!((standing.ready.len(), standing.not_ready.len()), (1, 0));
    let asks = |configuration: Option<&str>| Query {
        input: "query 1".into(),
        k: Some(20),
        configuration: configuration.map(Into::into),
        ..Query::default()
    };
    let by_name = run_search(&engines, asks(Some("candidate"))).await.unwrap();
    assert_eq!(
        (by_name.configuration.as_str(), &by_name.serving_snapshot.generation_id),
        ("large", &generation(new).id)
    );
    let vector = Query {
        input: QueryInput::Vector(vec![1.0; 16]),
        traffic_key: Some("user 1".into()),
        ..asks(None)
    };
    assert_eq!(
        run_search(&engines, vector).await.unwrap().configuration,
        "initial",
        "it is the live model's"
    );
    let counted = || engines.live().traffic_counts();
    while counted().shadow_queries == 0 || counted().candidate < 5 {
        tokio::time::sleep(POLL_INTERVAL).await;
    }
    let first = run_search(&engines, Query { k: Some(5), ..asks(None) }).await.unwrap();

    let live = promote(&store, state.revision, "old checkpoint", "test").await.unwrap();
    assert_eq!((&live.live, &live.candidate), (&generation(new), &None));
    let kept = live.standby.as_ref().unwrap();
    assert_eq!((&kept.generation, kept.checkpoint.as_str()), (&generation(old), "old checkpoint"));
    wait_for_replicas(&store, live.revision, TEST_TIMEOUT, &token).await.unwrap();
    let results = run_search(&engines, asks(None)).await.unwrap();
    assert_eq!(
        (results.configuration.as_str(), &results.serving_snapshot.generation_id),
        ("large", &generation(new).id)
    );
    // A page that was turned before is turned further where it began.
    let next = Query { k: Some(5), cursor: first.next_cursor, ..asks(None) };
    let next = run_search(&engines, next).await.unwrap();
    assert_eq!((&next.serving_snapshot.generation_id, next.hits[0].rank), (&generation(old).id, 6));

    let back = roll_back(&store, "test").await.unwrap();
    assert_eq!((&back.live, back.configuration_name.as_str()), (&generation(old), "initial"));
    let kept = back.standby.as_ref().unwrap();
    assert_eq!((&kept.generation, kept.checkpoint.as_str()), (&generation(new), "new checkpoint"));
    wait_for_replicas(&store, back.revision, TEST_TIMEOUT, &token).await.unwrap();
    let results = run_search(&engines, asks(None)).await.unwrap();
    assert_eq!(
        (results.configuration.as_str(), &results.serving_snapshot.generation_id),
        ("initial", &generation(old).id)
    );

    // Without the generation there is nothing to go back to, and none in memory.
    promote_large(&store, &token).await;
    withdraw_standby(&store, "test").await.unwrap();
    let error = roll_back(&store, "test").await.unwrap_err().to_string();
    assert!(error.contains("no longer filled") && error.contains("bsap reindex model"), "{error}");
    while engines.roles().standby.is_some() {
        tokio::time::sleep(POLL_INTERVAL).await;
    }
    stop.store(true, Atomic::SeqCst);
    let answers = asking.await.unwrap();
    let names: Vec<_> = answers.keys().map(|(id, name)| (id.as_str(), name.as_str())).collect();
    assert_eq!(names, [(&*generation(old).id, "initial"), (&*generation(new).id, "large")]);
    token.cancel();
}

#[tokio::test(flavor = "multi_thread")]
async fn an_image_that_the_candidate_lacks_yet_is_answered_from_what_is_live() {
    let models = [fake_model("ab12", 16), fake_model("cd34", 24)];
    let store = catalogue_with_standby(&models[0], &models[1], IMAGE_COUNT - 1).await;
    let token = CancellationToken::new();
    let engines = start_query_worker(&store, &models, &token).await;
    let state = set_candidate(&store, &candidate_spec(1.0, 0.0), "test").await.unwrap();
    wait_for_replicas(&store, state.revision, TEST_TIMEOUT, &token).await.unwrap();
    let like = |id: &str, configuration: Option<&str>| Query {
        input: QueryInput::ImageId(id.into()),
        traffic_key: Some("user".into()),
        configuration: configuration.map(Into::into),
        ..Query::default()
    };
    let by = async |query| run_search(&engines, query).await.map(|found| found.configuration);
    assert_eq!(by(like("i28", None)).await.unwrap(), "large");
    assert_eq!(by(like("i29", None)).await.unwrap(), "initial");
    for (id, configuration) in [("i29", Some("large")), ("i30", None)] {
        let error = by(like(id, configuration)).await.unwrap_err();
        assert!(matches!(error, QueryError::ImageNotFound(_)), "{error}");
    }
    assert!(engines.find_image("i29").is_some() && engines.find_image("i30").is_none());
    token.cancel();
}

async fn promote_large(store: &Store, token: &CancellationToken) {
    let state = set_candidate(store, &candidate_spec(0.0, 0.0), "test").await.unwrap();
    wait_for_replicas(store, state.revision, TEST_TIMEOUT, token).await.unwrap();
    let live = promote(store, state.revision, "old checkpoint", "test").await.unwrap();
    wait_for_replicas(store, live.revision, TEST_TIMEOUT, token).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_query_worker_without_the_candidate_model_reports_it_and_keeps_answering() {
    let (old, new) = (fake_model("ab12", 16), fake_model("cd34", 24));
    let store = catalogue_with_standby(&old, &new, IMAGE_COUNT).await;
    let token = CancellationToken::new();
    let engines = start_query_worker(&store, &[old], &token).await;
    let state = set_candidate(&store, &candidate_spec(1.0, 0.0), "test").await.unwrap();
    let standing = loop {
        let found = wait_for_replicas(&store, state.revision, POLL_INTERVAL, &token).await.unwrap();
        if found.not_ready.first().is_some_and(|report| report.problem.is_some()) {
            break found;
        }
    };
    assert!(standing.ready.is_empty());
    let problem = standing.not_ready[0].problem.as_deref().unwrap();
    assert!(problem.contains("search.standby_checkpoint"), "{problem}");
    let query =
        Query { input: "query".into(), traffic_key: Some("user".into()), ..Query::default() };
    assert_eq!(run_search(&engines, query).await.unwrap().configuration, "initial");
    token.cancel();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_rollback_to_another_model_reports_missing_images() {
    let (old, new) = (fake_model("ab12", 16), fake_model("cd34", 24));
    let store = catalogue_with_standby(&old, &new, IMAGE_COUNT).await;
    let state = set_candidate(&store, &candidate_spec(0.0, 0.0), "test").await.unwrap();
    promote(&store, state.revision, "old checkpoint", "test").await.unwrap();
    // The old model's workers are stopped; the new one's go on.
    append_images(&store, &new, IMAGE_COUNT, IMAGE_COUNT + 2).await;
    let way = RollbackPlan::load(&store).await.unwrap();
    assert_eq!(way.target_generation(), &generation(&old));
    let gap = way
        .compare_generations(&store, Path::new("/tmp"), Duration::ZERO, Utc::now())
        .await
        .unwrap();
    let example = Some(format!("i{IMAGE_COUNT}"));
    let wanted =
        GenerationGap { live: IMAGE_COUNT + 2, missing: 2, example, ..GenerationGap::default() };
    assert_eq!(gap, Some(wanted));
    // And one may go all the same.
    let back = way.execute(&store, "test").await.unwrap();
    assert_eq!(back.live, generation(&old));
}

#[tokio::test(flavor = "multi_thread")]
async fn the_standby_generation_has_its_own_prompt_sets() {
    let (old, new) = (fake_model("ab12", 16), fake_model("cd34", 24));
    let store = catalogue_with_standby(&old, &new, IMAGE_COUNT).await;
    let other = PromptSet::new("other", (0..6).map(|i| format!("other {i}")).collect());
    let other = other.embed(&*new, 3).unwrap();
    let wanted = CandidateSpec { prompt_set: Some("other".into()), ..candidate_spec(0.0, 0.0) };
    let error = set_candidate(&store, &wanted, "test").await.unwrap_err().to_string();
    assert!(error.contains("model.checkpoint = \"new checkpoint\""), "{error}");

    // One key may be known for both, each time for itself.
    for model in [&new, &old] {
        let known = generation(model);
        let state = add_prompt_set(&store, &known, &other, "test").await.unwrap();
        let again = add_prompt_set(&store, &known, &other, "test").await.unwrap();
        assert_eq!(state.revision, again.revision, "twice is once");
        let is_there = |of: &HashEncoders| {
            let sets = state.prompt_sets_of_generation(&generation(of).id).unwrap();
            sets.iter().any(|set| set.key == other.statistics_key)
        };
        assert_eq!((is_there(&new), is_there(&old)), (true, known == generation(&old)));
        let beside = (known == generation(&new)).then(|| known.id.clone());
        let keys = vec![other.statistics_key.to_string()];
        assert_eq!(state.change, StateChange::PromptSets { keys, generation: beside });
    }
    let third = generation(&fake_model("ef56", 16));
    assert!(add_prompt_set(&store, &third, &other, "test").await.is_err(), "it is neither");

    let job = StatisticsBackfill {
        catalogue: store.clone(),
        generation: generation(&new),
        prompt_set: Arc::new(other),
        max_commit_attempts: 5,
        max_concurrent_files: 1,
        propagation_delay: Duration::ZERO,
    };
    let done = job.run(&|_, _| {}, &CancellationToken::new()).await.unwrap();
    assert!(done.complete && done.measured_rows == IMAGE_COUNT as usize, "{done:?}");
    set_candidate(&store, &wanted, "test").await.unwrap();
    let found = check_promotion(&store, &promotion_rules(0), Utc::now()).await.unwrap();
    assert_eq!(found.blockers, Vec::<String>::new());
}
