//! A candidate of another model in the standby generation: its promotion, and the roll back.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering as Atomic};
use std::time::Duration;

use chrono::{DateTime, Utc};
use tokio_util::sync::CancellationToken;

use super::tests::roll_back;
use super::*;
use crate::backfill::{
    GenerationGap, StatisticsBackfill, add_prompt_set, set_up_standby, withdraw_standby,
};
use crate::balance::normalise::Normaliser;
use crate::balance::statistics::StatisticsSettings;
use crate::catalogue::{ReplicaReports, ServingConfig, StandbyGeneration, StateChange, StateStore};
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
    set.embed(model, StatisticsSettings::with_top_k(3)).unwrap()
}

/// The row of an image in the table of `model`: its embedding has the dimension of that model.
fn stored_row(model: &HashEncoders, id: u64) -> ImageRow {
    let mut row =
        sample_row(&format!("i{id}"), 1, Some(clip_like_embedding(id, model.card.dimension)));
    let image = row.image.as_mut().unwrap();
    let set = embedded_prompt_set(model);
    let statistics = set.compute_statistics(&image.embedding).unwrap();
    image.statistics = [(set.statistics_key.clone(), statistics)].into_iter().collect();
    row
}

async fn append_images(store: &Store, model: &HashEncoders, from: u64, to: u64) {
    let rows = (from..to).map(|id| (id as i64, stored_row(model, id))).collect();
    let partition = TopicPartition { topic: "t".into(), number: 0 };
    let expected = (from > 0).then_some(from as i64);
    let batch = PartitionBatch {
        log_number: 0,
        anchor: None,
        last_message: None,
        partition,
        expected_position: expected,
        next_offset: to as i64,
        rows,
    };
    TableWriter::open(store, &generation(model), 5)
        .await
        .unwrap()
        .append(vec![batch], &CancellationToken::new())
        .await
        .unwrap();
}

/// A catalogue with a live generation of `old` that has all images, and a standby of `new` that has
/// the images before `to`.
async fn catalogue_with_standby(old: &HashEncoders, new: &HashEncoders, to: u64) -> Store {
    let store = Store::in_memory();
    let set = embedded_prompt_set(old).to_record();
    let serving = ServingConfig::new(set.key.clone(), Normaliser::Softmax, 0.25);
    StateStore::new(&store)
        .initialise_or_extend(&generation(old), &[set], &serving, "test")
        .await
        .unwrap();
    append_images(&store, old, 0, IMAGE_COUNT).await;
    let standby = StandbyGeneration {
        generation: generation(new),
        checkpoint: "new checkpoint".into(),
        prompt_sets: vec![embedded_prompt_set(new).to_record()],
        since: DateTime::from_timestamp(1, 0).unwrap(),
    };
    set_up_standby(&store, &standby, &[], 5, "test", &CancellationToken::new()).await.unwrap();
    append_images(&store, new, 0, to).await;
    store
}

/// Starts a query worker with `models`, the first of which fills the live generation.
async fn start_query_worker(
    store: &Store,
    models: &[Arc<HashEncoders>],
    cancel: &CancellationToken,
) -> Arc<Engines> {
    let state = StateStore::new(store).read_newest().await.unwrap().unwrap();
    let serving =
        ServingSnapshot::from_state(&state, vec![Arc::new(embedded_prompt_set(&models[0]))]);
    let options = SearchOptions { poll_ms: 20, ..SearchOptions::default() };
    let engines =
        Arc::new(Engines::new(Arc::new(Engine::new(models[0].clone(), serving, options))));
    let follower = CatalogueFollower {
        catalogue: store.clone(),
        engines: engines.clone(),
        models: models.iter().map(|model| model.clone() as _).collect(),
        state,
        poll_interval: POLL_INTERVAL,
    };
    tokio::spawn(follower.run(cancel.clone()));
    // Without a report of it, promotions would not wait for this query worker.
    let reports = ReplicaReports::new(store);
    while !engines.live().snapshots().is_ready()
        || reports.list_and_remove_expired(Utc::now()).await.unwrap().is_empty()
    {
        tokio::time::sleep(POLL_INTERVAL).await;
    }
    engines
}

async fn run_search(engines: &Arc<Engines>, query: Query) -> Result<SearchResults, QueryError> {
    let engines = engines.clone();
    let search = move || engines.search(&query, &CancellationToken::new());
    tokio::task::spawn_blocking(search).await.unwrap()
}

/// Asserts that prompt set, hits and scores of `results` come from the model of the generation they
/// name.
fn assert_answered_by_one_model(text: &str, results: &SearchResults, models: &[Arc<HashEncoders>]) {
    let fills_generation =
        |model: &&Arc<HashEncoders>| generation(model).id == results.serving_snapshot.generation_id;
    let model = models.iter().find(fills_generation).unwrap();
    assert_eq!(
        (results.prompt_set.statistics_key.clone(), results.hits.len()),
        (embedded_prompt_set(model).statistics_key, 20)
    );
    let query = model.embed_bytes(text.as_bytes());
    for hit in &results.hits {
        let id: u64 = hit.image_metadata.image_id.as_str()[1..].parse().unwrap();
        let image = Embedding::from_unit_vector(&clip_like_embedding(id, model.card.dimension));
        let raw: f32 = query.iter().zip(image.values()).map(|(a, b)| a * b).sum();
        assert!((raw - hit.raw_score).abs() < 1e-4, "{raw} {}", hit.raw_score);
    }
}

fn candidate_spec(traffic_share: f32, shadow_share: f32) -> CandidateSpec {
    CandidateSpec {
        name: "large".into(),
        use_standby_generation: true,
        traffic_share,
        shadow_share,
        ..CandidateSpec::default()
    }
}

fn promotion_rules(max_missing: u64) -> PromotionRules<'static> {
    PromotionRules {
        propagation_delay: Duration::ZERO,
        grace_period: Duration::ZERO,
        max_differing_images: max_missing,
        temp_folder: Path::new("/tmp"),
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn models_are_switched_and_back_while_queries_run() {
    let models = [fake_model("ab12", 16), fake_model("cd34", 24)];
    let (old, new) = (&models[0], &models[1]);
    let store = catalogue_with_standby(old, new, IMAGE_COUNT - 1).await;
    let cancel = CancellationToken::new();
    let engines = start_query_worker(&store, &models, &cancel).await;
    let stop = Arc::new(AtomicBool::new(false));
    let search_task = {
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
                let answered_by =
                    (results.serving_snapshot.generation_id.clone(), results.configuration_name);
                *answers.entry(answered_by).or_default() += 1;
            }
            answers
        })
    };

    // A missing image blocks the promotion unless it is allowed; after it was ingested nothing is
    // missing.
    let state = set_candidate(&store, &candidate_spec(0.5, 1.0), "test").await.unwrap();
    let check = check_promotion(&store, &promotion_rules(0), Utc::now()).await.unwrap();
    assert!(check.blockers[0].contains("lacks 1 of 30 live images"), "{:?}", check.blockers);
    assert!(check.blockers[0].contains("for example i29"), "{:?}", check.blockers);
    assert_eq!(
        check_promotion(&store, &promotion_rules(1), Utc::now()).await.unwrap().blockers,
        Vec::<String>::new()
    );
    append_images(&store, new, IMAGE_COUNT - 1, IMAGE_COUNT).await;
    let check = check_promotion(&store, &promotion_rules(0), Utc::now()).await.unwrap();
    assert_eq!((check.blockers, check.coverage_gap.unwrap().missing), (vec![], 0));
    assert_eq!(
        (check.live_generation.id, check.candidate_generation.id),
        (generation(old).id, generation(new).id)
    );

    let readiness = wait_for_replicas(&store, state.revision, TEST_TIMEOUT, &cancel).await.unwrap();
    assert_eq!((readiness.ready.len(), readiness.not_ready.len()), (1, 0));
    let query = |configuration: Option<&str>| Query {
        input: "query 1".into(),
        k: Some(20),
        requested_configuration: configuration.map(Into::into),
        ..Query::default()
    };
    let by_name = run_search(&engines, query(Some("candidate"))).await.unwrap();
    assert_eq!(
        (by_name.configuration_name.as_str(), &by_name.serving_snapshot.generation_id),
        ("large", &generation(new).id)
    );
    let vector = Query {
        input: QueryInput::Vector(vec![1.0; 16]),
        traffic_key: Some("user 1".into()),
        ..query(None)
    };
    assert_eq!(
        run_search(&engines, vector).await.unwrap().configuration_name,
        "initial",
        "a vector is of the live model"
    );
    let counts = || engines.live().traffic_counts();
    while counts().shadow_queries == 0 || counts().candidate < 5 {
        tokio::time::sleep(POLL_INTERVAL).await;
    }
    let first_page = run_search(&engines, Query { k: Some(5), ..query(None) }).await.unwrap();

    let live = promote(&store, state.revision, "old checkpoint", "test").await.unwrap();
    assert_eq!((&live.live, &live.candidate), (&generation(new), &None));
    let standby = live.standby.as_ref().unwrap();
    assert_eq!(
        (&standby.generation, standby.checkpoint.as_str()),
        (&generation(old), "old checkpoint")
    );
    wait_for_replicas(&store, live.revision, TEST_TIMEOUT, &cancel).await.unwrap();
    let results = run_search(&engines, query(None)).await.unwrap();
    assert_eq!(
        (results.configuration_name.as_str(), &results.serving_snapshot.generation_id),
        ("large", &generation(new).id)
    );
    // The next page of an earlier search comes from the generation of its first page.
    let next_page = Query { k: Some(5), cursor: first_page.next_cursor, ..query(None) };
    let next_page = run_search(&engines, next_page).await.unwrap();
    assert_eq!(
        (&next_page.serving_snapshot.generation_id, next_page.hits[0].rank),
        (&generation(old).id, 6)
    );

    let back = roll_back(&store, "test").await.unwrap();
    assert_eq!((&back.live, back.configuration_name.as_str()), (&generation(old), "initial"));
    let standby = back.standby.as_ref().unwrap();
    assert_eq!(
        (&standby.generation, standby.checkpoint.as_str()),
        (&generation(new), "new checkpoint")
    );
    wait_for_replicas(&store, back.revision, TEST_TIMEOUT, &cancel).await.unwrap();
    let results = run_search(&engines, query(None)).await.unwrap();
    assert_eq!(
        (results.configuration_name.as_str(), &results.serving_snapshot.generation_id),
        ("initial", &generation(old).id)
    );

    // If the standby is withdrawn, there is no roll back to it, and query workers drop it from
    // memory.
    promote_large(&store, &cancel).await;
    withdraw_standby(&store, "test").await.unwrap();
    let error = roll_back(&store, "test").await.unwrap_err().to_string();
    assert!(error.contains("no longer filled") && error.contains("bsap reindex model"), "{error}");
    while engines.roles().standby.is_some() {
        tokio::time::sleep(POLL_INTERVAL).await;
    }
    stop.store(true, Atomic::SeqCst);
    let answers = search_task.await.unwrap();
    let names: Vec<_> = answers.keys().map(|(id, name)| (id.as_str(), name.as_str())).collect();
    assert_eq!(names, [(&*generation(old).id, "initial"), (&*generation(new).id, "large")]);
    cancel.cancel();
}

#[tokio::test(flavor = "multi_thread")]
async fn queries_by_an_image_that_only_the_live_generation_has_are_answered_by_it() {
    let models = [fake_model("ab12", 16), fake_model("cd34", 24)];
    let store = catalogue_with_standby(&models[0], &models[1], IMAGE_COUNT - 1).await;
    let cancel = CancellationToken::new();
    let engines = start_query_worker(&store, &models, &cancel).await;
    let state = set_candidate(&store, &candidate_spec(1.0, 0.0), "test").await.unwrap();
    wait_for_replicas(&store, state.revision, TEST_TIMEOUT, &cancel).await.unwrap();
    let similar_to = |id: &str, configuration: Option<&str>| Query {
        input: QueryInput::ImageId(id.into()),
        traffic_key: Some("user".into()),
        requested_configuration: configuration.map(Into::into),
        ..Query::default()
    };
    let answering_configuration =
        async |query| run_search(&engines, query).await.map(|results| results.configuration_name);
    assert_eq!(answering_configuration(similar_to("i28", None)).await.unwrap(), "large");
    assert_eq!(answering_configuration(similar_to("i29", None)).await.unwrap(), "initial");
    for (id, configuration) in [("i29", Some("large")), ("i30", None)] {
        let error = answering_configuration(similar_to(id, configuration)).await.unwrap_err();
        assert!(matches!(error, QueryError::ImageNotFound(_)), "{error}");
    }
    assert!(engines.find_image("i29").is_some() && engines.find_image("i30").is_none());
    cancel.cancel();
}

async fn promote_large(store: &Store, cancel: &CancellationToken) {
    let state = set_candidate(store, &candidate_spec(0.0, 0.0), "test").await.unwrap();
    wait_for_replicas(store, state.revision, TEST_TIMEOUT, cancel).await.unwrap();
    let live = promote(store, state.revision, "old checkpoint", "test").await.unwrap();
    wait_for_replicas(store, live.revision, TEST_TIMEOUT, cancel).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_query_worker_without_the_candidate_model_reports_it_and_keeps_answering() {
    let (old, new) = (fake_model("ab12", 16), fake_model("cd34", 24));
    let store = catalogue_with_standby(&old, &new, IMAGE_COUNT).await;
    let cancel = CancellationToken::new();
    let engines = start_query_worker(&store, &[old], &cancel).await;
    let state = set_candidate(&store, &candidate_spec(1.0, 0.0), "test").await.unwrap();
    let readiness = loop {
        let readiness =
            wait_for_replicas(&store, state.revision, POLL_INTERVAL, &cancel).await.unwrap();
        if readiness.not_ready.first().is_some_and(|report| report.problem.is_some()) {
            break readiness;
        }
    };
    assert!(readiness.ready.is_empty());
    let problem = readiness.not_ready[0].problem.as_deref().unwrap();
    assert!(problem.contains("search.standby_checkpoint"), "{problem}");
    let query =
        Query { input: "query".into(), traffic_key: Some("user".into()), ..Query::default() };
    assert_eq!(run_search(&engines, query).await.unwrap().configuration_name, "initial");
    cancel.cancel();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_rollback_to_another_model_reports_missing_images() {
    let (old, new) = (fake_model("ab12", 16), fake_model("cd34", 24));
    let store = catalogue_with_standby(&old, &new, IMAGE_COUNT).await;
    let state = set_candidate(&store, &candidate_spec(0.0, 0.0), "test").await.unwrap();
    promote(&store, state.revision, "old checkpoint", "test").await.unwrap();
    // The workers of the old model are stopped, those of the new one continue.
    append_images(&store, &new, IMAGE_COUNT, IMAGE_COUNT + 2).await;
    let plan = RollbackPlan::prepare(&store).await.unwrap();
    assert_eq!(plan.target_generation(), &generation(&old));
    let gap = plan
        .compare_generations(&store, Path::new("/tmp"), Duration::ZERO, Utc::now())
        .await
        .unwrap();
    let example = Some(format!("i{IMAGE_COUNT}"));
    let expected =
        GenerationGap { live: IMAGE_COUNT + 2, missing: 2, example, ..GenerationGap::default() };
    assert_eq!(gap, Some(expected));
    // The roll back is possible nevertheless.
    let back = plan.execute(&store, "test").await.unwrap();
    assert_eq!(back.live, generation(&old));
}

#[tokio::test(flavor = "multi_thread")]
async fn the_standby_generation_has_its_own_prompt_sets() {
    let (old, new) = (fake_model("ab12", 16), fake_model("cd34", 24));
    let store = catalogue_with_standby(&old, &new, IMAGE_COUNT).await;
    let other = PromptSet::new("other", (0..6).map(|i| format!("other {i}")).collect());
    let other = other.embed(&*new, StatisticsSettings::with_top_k(3)).unwrap();
    let spec = CandidateSpec { prompt_set: Some("other".into()), ..candidate_spec(0.0, 0.0) };
    let error = set_candidate(&store, &spec, "test").await.unwrap_err().to_string();
    assert!(error.contains("model.checkpoint = \"new checkpoint\""), "{error}");

    // The same key can be added to both generations; each has its own list.
    for model in [&new, &old] {
        let added_to = generation(model);
        let state = add_prompt_set(&store, &added_to, &other, "test").await.unwrap();
        let repeated = add_prompt_set(&store, &added_to, &other, "test").await.unwrap();
        assert_eq!(state.revision, repeated.revision, "adding it twice changes nothing");
        let has_set = |model: &HashEncoders| {
            let sets = state.prompt_sets_of_generation(&generation(model).id).unwrap();
            sets.iter().any(|set| set.key == other.statistics_key)
        };
        assert_eq!((has_set(&new), has_set(&old)), (true, added_to == generation(&old)));
        let standby_id = (added_to == generation(&new)).then(|| added_to.id.clone());
        let keys = vec![other.statistics_key.to_string()];
        assert_eq!(state.change, StateChange::PromptSets { keys, generation: standby_id });
    }
    let third = generation(&fake_model("ef56", 16));
    let result = add_prompt_set(&store, &third, &other, "test").await;
    assert!(result.is_err(), "a generation that is neither live nor the standby");

    let backfill = StatisticsBackfill {
        catalogue: store.clone(),
        generation: generation(&new),
        prompt_set: Arc::new(other),
        max_commit_attempts: 5,
        max_concurrent_files: 1,
        propagation_delay: Duration::ZERO,
    };
    let result = backfill.run(&|_, _| {}, &CancellationToken::new()).await.unwrap();
    assert!(result.is_complete && result.measured_row_count == IMAGE_COUNT as usize, "{result:?}");
    set_candidate(&store, &spec, "test").await.unwrap();
    let check = check_promotion(&store, &promotion_rules(0), Utc::now()).await.unwrap();
    assert_eq!(check.blockers, Vec::<String>::new());
}
