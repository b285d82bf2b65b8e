//! Candidates, promotions and roll backs within a generation.

use std::path::Path;
use std::time::Duration;

use chrono::{DateTime, TimeDelta, Utc};
use tokio_util::sync::CancellationToken;

use super::*;
use crate::backfill::retire_prompt_set;
use crate::balance::bank::{BankReport, MeasuredBank};
use crate::balance::fit::BankFit;
use crate::balance::normalise::{Normaliser, ScaleConstants};
use crate::balance::statistics::{ScoreStatistics, StatisticsKey, StatisticsSettings};
use crate::catalogue::{
    CatalogueState, PromptSetRecord, ReplicaReport, ReplicaReports, ServingConfig, StateChange,
    StateStore,
};
use crate::record::{
    Embedding, ImageId, ImageRow, SequenceKey, StoredImage, TopicPartition, VersionOrdering,
};
use crate::store::Store;
use crate::table::{Generation, PartitionBatch, TableWriter};

fn generation() -> Generation {
    Generation::new("tiny", &"ab12".repeat(16), 4, 100.0, VersionOrdering::Sequence)
}

fn prompt_set_record(name: &str) -> PromptSetRecord {
    PromptSetRecord {
        key: StatisticsKey::new(name, 1, "0123456789ab", 100.0, StatisticsSettings::with_top_k(8)),
        name: name.into(),
        version: 1,
        language: "en".into(),
        top_k: 8,
        temperature: 1.0,
        texts: vec!["a photo".into(), "a picture".into()],
        since: DateTime::from_timestamp(1_700_000_000, 0).unwrap(),
    }
}

fn statistics(i: u64) -> ScoreStatistics {
    let i = i as f32;
    ScoreStatistics::from_scores(&[0.1 + 0.01 * i, 0.3 - 0.02 * i, 0.2], 100.0, 2).unwrap()
}

/// A catalogue with the sets `a` and `b` and ten images. All have the statistics of `a`, and those
/// of `b` too if `complete`; else the first image lacks them.
async fn catalogue(complete: bool) -> Store {
    let store = Store::in_memory();
    let (a, b) = (prompt_set_record("a"), prompt_set_record("b"));
    let serving = ServingConfig::new(a.key.clone(), Normaliser::Softmax, 0.25);
    let states = StateStore::new(&store);
    states
        .initialise_or_extend(&generation(), &[a.clone(), b.clone()], &serving, "test")
        .await
        .unwrap();
    let rows = (0..10u64).map(|i| {
        let mut row_statistics = vec![(a.key.clone(), statistics(i))];
        if complete || i > 0 {
            row_statistics.push((b.key.clone(), statistics(i)));
        }
        let row = ImageRow {
            image_id: ImageId::new(format!("i{i}")).unwrap(),
            sequence: SequenceKey::from_number(1),
            event_time: None,
            embedded_at: DateTime::from_timestamp(1_700_000_001, 0).unwrap(),
            image: Some(StoredImage {
                uri: None,
                content_hash: String::new(),
                byte_size: 1,
                width: 1,
                height: 1,
                attributes: [].into(),
                embedding: Embedding::from_unit_vector(&[0.5; 4]),
                statistics: row_statistics.into_iter().collect(),
                decoding: None,
            }),
        };
        (i as i64, row)
    });
    let batch = PartitionBatch {
        log_number: 0,
        anchor: None,
        last_message: None,
        partition: TopicPartition { topic: "t".into(), number: 0 },
        expected_position: None,
        next_offset: 10,
        rows: rows.collect(),
    };
    TableWriter::open(&store, &generation(), 5)
        .await
        .unwrap()
        .append(vec![batch], &CancellationToken::new())
        .await
        .unwrap();
    store
}

fn candidate_spec(name: &str) -> CandidateSpec {
    CandidateSpec {
        name: name.into(),
        prompt_set: Some("b".into()),
        weight: Some(0.5),
        evaluation_fingerprint: Some("report-1".into()),
        shadow_share: 0.1,
        ..CandidateSpec::default()
    }
}

fn promotion_rules() -> PromotionRules<'static> {
    PromotionRules {
        propagation_delay: Duration::from_secs(3),
        grace_period: Duration::from_secs(60),
        max_differing_images: 0,
        temp_folder: Path::new("/tmp"),
    }
}

/// Rolls back without a check of what that loses.
pub(crate) async fn roll_back(store: &Store, actor: &str) -> Result<CatalogueState, RolloutError> {
    RollbackPlan::prepare(store).await?.execute(store, actor).await
}

async fn promote_candidate(store: &Store, name: &str) -> u64 {
    let state = set_candidate(store, &candidate_spec(name), "ann (test)").await.unwrap();
    promote(store, state.revision, "tiny", "ann (test)").await.unwrap().revision
}

#[tokio::test]
async fn a_candidate_that_is_set_again_keeps_its_settings() {
    let store = catalogue(true).await;
    let first =
        set_candidate(&store, &candidate_spec("one"), "ann").await.unwrap().candidate.unwrap();
    let share =
        CandidateSpec { name: "one".into(), traffic_share: 0.5, ..CandidateSpec::default() };
    let again = set_candidate(&store, &share, "ann").await.unwrap().candidate.unwrap();
    assert_eq!((&again.serving, again.traffic_share), (&first.serving, 0.5));
    assert_eq!(again.evaluation_fingerprint.as_deref(), Some("report-1"));
    // Other settings are not what was evaluated; a candidate of another name begins with the live
    // ones.
    let heavier = CandidateSpec { weight: Some(0.75), ..share.clone() };
    let heavier = set_candidate(&store, &heavier, "ann").await.unwrap().candidate.unwrap();
    assert_eq!(heavier.serving.prompt_set, first.serving.prompt_set);
    assert_eq!((heavier.serving.weight, heavier.evaluation_fingerprint), (0.75, None));
    let other = CandidateSpec { name: "two".into(), ..share };
    let other = set_candidate(&store, &other, "ann").await.unwrap();
    assert_eq!(other.candidate.unwrap().serving.prompt_set, other.serving.prompt_set);
}

#[tokio::test]
async fn a_promotion_is_one_revision_and_a_roll_back_restores_the_previous_one() {
    let store = catalogue(true).await;
    let states = StateStore::new(&store);
    let first = states.read_newest().await.unwrap().unwrap();
    let error = roll_back(&store, "ann").await.unwrap_err().to_string();
    assert!(error.contains("nothing was promoted"), "{error}");

    promote_candidate(&store, "one").await;
    promote_candidate(&store, "two").await;
    let state = states.read_newest().await.unwrap().unwrap();
    assert_eq!((state.configuration_name.as_str(), state.candidate.as_ref()), ("two", None));
    assert_eq!(state.serving.weight, 0.5);

    // Within a generation nothing is lost.
    let plan = RollbackPlan::prepare(&store).await.unwrap();
    let gap = plan
        .compare_generations(&store, Path::new("/tmp"), Duration::ZERO, Utc::now())
        .await
        .unwrap();
    assert_eq!((plan.target_generation(), gap), (&generation(), None));

    // Back to `one`, then to the first configuration, and no further.
    let back = roll_back(&store, "bob (test)").await.unwrap();
    assert_eq!(back.configuration_name, "one");
    let error = plan.execute(&store, "ann").await.unwrap_err().to_string();
    assert!(error.contains("changed in the meantime") && error.contains("bob"), "{error}");
    let back = roll_back(&store, "bob (test)").await.unwrap();
    assert_eq!(
        (back.configuration_name.as_str(), &back.serving),
        (first.configuration_name.as_str(), &first.serving)
    );
    assert!(roll_back(&store, "bob").await.is_err());
    // A promotion and its roll back after that.
    promote_candidate(&store, "three").await;
    assert_eq!(
        roll_back(&store, "bob").await.unwrap().configuration_name,
        first.configuration_name
    );

    let revisions = list_revisions(&store, 100).await.unwrap();
    assert!(revisions.windows(2).all(|pair| pair[0].revision == pair[1].revision + 1));
    let promotion = revisions
        .iter()
        .find(|s| matches!(&s.change, StateChange::Promoted { name, .. } if name == "two"));
    let promotion = promotion.unwrap();
    assert_eq!(promotion.actor, "ann (test)");
    let StateChange::Promoted { evaluation_fingerprint, .. } = &promotion.change else {
        unreachable!()
    };
    assert_eq!(evaluation_fingerprint.as_deref(), Some("report-1"));
}

#[tokio::test]
async fn a_promotion_is_refused_if_the_state_has_changed() {
    let store = catalogue(true).await;
    let state = set_candidate(&store, &candidate_spec("one"), "ann").await.unwrap();
    set_candidate(&store, &candidate_spec("other"), "bob").await.unwrap();
    let error = promote(&store, state.revision, "tiny", "ann").await.unwrap_err().to_string();
    assert!(error.contains("bob"), "{error}");
    withdraw_candidate(&store, "bob").await.unwrap();
    assert!(withdraw_candidate(&store, "bob").await.is_err());
    assert_eq!(
        StateStore::new(&store).read_newest().await.unwrap().unwrap().configuration_name,
        "initial"
    );
}

#[tokio::test]
async fn a_candidate_without_all_statistics_is_not_promoted() {
    let (store, rules) = (catalogue(false).await, promotion_rules());
    assert!(check_promotion(&store, &rules, Utc::now()).await.is_err(), "there is no candidate");
    set_candidate(&store, &candidate_spec("one"), "ann").await.unwrap();
    let check = check_promotion(&store, &rules, Utc::now()).await.unwrap();
    assert!(check.blockers.len() == 1 && check.blockers[0].contains("0 of 10"), "{check:?}");
    let complete = catalogue(true).await;
    set_candidate(&complete, &candidate_spec("one"), "ann").await.unwrap();
    let check = check_promotion(&complete, &rules, Utc::now()).await.unwrap();
    assert_eq!((check.blockers, check.measured_bank), (vec![], None));
    assert!(check.warnings.len() == 1 && check.warnings[0].contains("not known"));
    // Workers may still write rows without the statistics of a set that was added a second ago.
    let soon_after = DateTime::from_timestamp(1_700_000_001, 0).unwrap();
    let check = check_promotion(&complete, &rules, soon_after).await.unwrap();
    assert!(check.blockers[0].contains("try again"), "{check:?}");
}

#[tokio::test]
async fn a_promotion_warns_of_what_query_workers_measured_of_the_prompt_set() {
    let store = catalogue(true).await;
    let state = set_candidate(&store, &candidate_spec("one"), "ann").await.unwrap();
    let candidate = state.candidate.unwrap();
    let bank = |generation: &str, key: &StatisticsKey, fit: f64, queries: usize| {
        let fit = BankFit { value: fit, low: fit - 0.1, high: fit + 0.1, queries };
        MeasuredBank {
            generation: generation.into(),
            prompt_set: key.clone(),
            measured_at: Utc::now(),
            images: 10,
            queries,
            report: BankReport::new(100, 100, Some(fit), Some(0.3)),
        }
    };
    let (id, key) = (candidate.generation.as_str(), &candidate.serving.prompt_set);
    let reports = ReplicaReports::new(&store);
    let report = |name: &str, age: i64, banks: Vec<MeasuredBank>| ReplicaReport {
        id: name.into(),
        host: "h".into(),
        generation: id.into(),
        revision: 2,
        ready: true,
        reported_at: Utc::now() - TimeDelta::seconds(age),
        problem: None,
        banks,
    };
    // Another set, another generation, and a query worker that no longer reports say nothing.
    let other = StatisticsKey::from_stored("other");
    let banks =
        vec![bank(id, &other, 0.9, 500), bank("other", key, 0.9, 500), bank(id, key, 0.2, 80)];
    reports.write(&report("few", 0, banks)).await.unwrap();
    reports.write(&report("stopped", 300, vec![bank(id, key, 0.9, 400)])).await.unwrap();
    let check = || async { check_promotion(&store, &promotion_rules(), Utc::now()).await.unwrap() };
    let warnings = check().await.warnings;
    let expected = "fit 0.20 (0.10 to 0.30) and concentration 0.30 for 80 recent queries";
    assert!(warnings.len() == 1 && warnings[0].contains(expected), "{warnings:?}");
    // The query worker with most queries counts.
    reports.write(&report("many", 0, vec![bank(id, key, 0.8, 300)])).await.unwrap();
    let check = check().await;
    assert_eq!((check.blockers, check.warnings), (vec![], vec![]));
    assert_eq!(check.measured_bank.map(|bank| bank.queries), Some(300));
}

#[tokio::test]
async fn scale_constants_are_frozen_from_all_live_images_or_not_at_all() {
    let zscore = || CandidateSpec { normaliser: Some(Normaliser::Zscore), ..candidate_spec("z") };
    let error = set_candidate(&catalogue(false).await, &zscore(), "ann").await.unwrap_err();
    assert!(error.to_string().contains("9 of 10"), "{error}");
    let state = set_candidate(&catalogue(true).await, &zscore(), "ann").await.unwrap();
    let scale = ScaleConstants::from_catalogue(Normaliser::Zscore, (0..10).map(statistics));
    assert_eq!(state.candidate.unwrap().serving.scale, Some(scale));
}

#[tokio::test]
async fn candidate_names_and_settings_are_validated() {
    let store = catalogue(true).await;
    for name in ["", "live", "candidate", "initial"] {
        let error =
            set_candidate(&store, &candidate_spec(name), "ann").await.unwrap_err().to_string();
        assert!(error.contains("name"), "{error}");
    }
    let unknown = CandidateSpec { prompt_set: Some("nowhere".into()), ..candidate_spec("x") };
    let error = set_candidate(&store, &unknown, "ann").await.unwrap_err().to_string();
    assert!(error.contains("nowhere") && error.contains("a@1"), "{error}");
}

#[tokio::test]
async fn a_prompt_set_in_use_is_not_retired() {
    let store = catalogue(true).await;
    set_candidate(&store, &candidate_spec("one"), "ann").await.unwrap();
    for (set, reason) in [("a", "is served"), ("b", "candidate"), ("c", "not a stored")] {
        let error = retire_prompt_set(&store, set, 5, "ann", &CancellationToken::new())
            .await
            .unwrap_err()
            .to_string();
        assert!(error.contains(reason), "{error}");
    }
    withdraw_candidate(&store, "ann").await.unwrap();
    retire_prompt_set(&store, "b", 5, "ann", &CancellationToken::new()).await.unwrap();
    let state = StateStore::new(&store).read_newest().await.unwrap().unwrap();
    assert_eq!(state.prompt_sets.len(), 1);
}

#[tokio::test]
async fn a_roll_back_adds_a_retired_prompt_set_again() {
    let store = catalogue(true).await;
    promote_candidate(&store, "one").await;
    retire_prompt_set(&store, "a", 5, "ann", &CancellationToken::new()).await.unwrap();
    let state = roll_back(&store, "ann").await.unwrap();
    assert_eq!(state.serving.prompt_set, prompt_set_record("a").key);
    assert!(state.prompt_sets.iter().any(|set| set.key == prompt_set_record("a").key));
}

#[tokio::test]
async fn promotion_waits_for_active_query_workers_and_not_for_stale_ones() {
    let (store, cancel) = (Store::in_memory(), CancellationToken::new());
    let reports = ReplicaReports::new(&store);
    let report = |id: &str, revision: u64, age: i64| ReplicaReport {
        id: id.into(),
        host: "h".into(),
        generation: "g".into(),
        revision,
        ready: true,
        reported_at: Utc::now() - TimeDelta::seconds(age),
        problem: None,
        banks: Vec::new(),
    };
    reports.write(&report("fast", 7, 0)).await.unwrap();
    reports.write(&report("slow", 6, 0)).await.unwrap();
    reports.write(&report("stopped", 1, 300)).await.unwrap();
    let wait = |timeout| wait_for_replicas(&store, 7, timeout, &cancel);
    let names =
        |reports: &[ReplicaReport]| reports.iter().map(|r| r.id.clone()).collect::<Vec<_>>();
    let readiness = wait(Duration::ZERO).await.unwrap();
    assert_eq!(names(&readiness.not_ready), ["slow"]);
    assert_eq!(
        (names(&readiness.ready), names(&readiness.unresponsive)),
        (vec!["fast".into()], vec!["stopped".into()])
    );
    let later = async {
        tokio::time::sleep(Duration::from_millis(300)).await;
        reports.write(&report("slow", 7, 0)).await.unwrap();
    };
    let (readiness, ()) = tokio::join!(wait(Duration::from_secs(60)), later);
    let readiness = readiness.unwrap();
    assert_eq!((names(&readiness.ready).len(), readiness.not_ready.len()), (2, 0));
    reports.remove("slow").await;
    assert_eq!(wait(Duration::ZERO).await.unwrap().ready.len(), 1);
}
