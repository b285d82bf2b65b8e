//! Measures how well prompt sets fit the queries that people ask now, without judgements.
//!
//! A window of recent distinct text queries holds their embeddings, not their texts. From them and a part
//! of the images, fit and concentration of the stored prompt sets are computed in the background
//! ([`crate::balance::fit`]), and with them the weight that is proposed for each.

use std::collections::VecDeque;
use std::hash::{BuildHasher as _, RandomState};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use arc_swap::ArcSwap;
use chrono::Utc;
use tracing::info;

use crate::balance::bank::{BankReport, MeasuredBank, QueriedImages};
use crate::balance::fit::{MIN_FIT_QUERIES, sample_indices};
use crate::balance::normalise::Normaliser;
use crate::catalogue::ServingConfig;
use crate::prompts::EmbeddedPromptSet;
use crate::record::{Embedding, ImageId};
use crate::search::snapshot::{ServingRole, Snapshot};
use crate::telemetry::{event, metrics};

/// Maximum number of queries in the window: 1 MiB of embeddings of dimension 512. The fit from more hardly
/// differs.
const MAX_WINDOW_QUERIES: usize = 512;
/// Age at which a query leaves the window, if it is not asked again.
const MAX_QUERY_AGE: Duration = Duration::from_secs(24 * 3_600);
/// Maximum number of images that are measured, 20 MiB of dimension 512: a random part of a larger
/// catalogue, with which the fit differs by at most 0.01 (standard error).
const MAX_MEASURED_IMAGES: usize = 10_000;
/// Maximum number of prompt sets that are measured, each in less than a second of one core for most sets.
const MAX_MEASURED_SETS: usize = 4;

/// What the window keeps of a query.
struct RecentQuery {
    answered_at: Instant,
    /// Hash of the text, with a key that only this process has.
    text_hash: u64,
    embedding: Arc<Vec<f32>>,
    /// First image of the whole catalogue by plain CLIP; `None` if it is not known.
    first_raw_hit: Option<ImageId>,
}

/// Recent distinct queries, the last asked at the end.
#[derive(Default)]
struct QueryWindow {
    queries: VecDeque<RecentQuery>,
    /// Number of changes of what is in the window.
    change_count: u64,
}

impl QueryWindow {
    fn add(&mut self, mut query: RecentQuery) {
        let known = self.queries.iter().position(|known| known.text_hash == query.text_hash);
        match known.and_then(|index| self.queries.remove(index)) {
            Some(known) => query.first_raw_hit = query.first_raw_hit.or(known.first_raw_hit),
            None => self.change_count += 1,
        }
        self.queries.push_back(query);
        self.expire();
    }

    /// Drops queries that are too old or too many.
    fn expire(&mut self) {
        let is_old = |query: &RecentQuery| query.answered_at.elapsed() > MAX_QUERY_AGE;
        while self.queries.len() > MAX_WINDOW_QUERIES || self.queries.front().is_some_and(is_old) {
            self.queries.pop_front();
            self.change_count += 1;
        }
    }
}

/// Keeps the window of recent queries, and what the prompt sets' fit to them was when it was last measured.
#[derive(Default)]
pub(crate) struct FitMonitor {
    window: Mutex<QueryWindow>,
    hasher: RandomState,
    banks: ArcSwap<Vec<MeasuredBank>>,
    /// Serial of the snapshot and number of changes of the window at the last measurement.
    last_measured: Mutex<Option<(u64, u64)>>,
}

impl FitMonitor {
    /// Adds a text query that was answered; `first_raw_hit` is the first image of the whole catalogue by
    /// plain CLIP, if it is known.
    pub fn record_query(
        &self,
        text: &str,
        embedding: Arc<Vec<f32>>,
        first_raw_hit: Option<ImageId>,
    ) {
        let text_hash = self.hasher.hash_one(text.trim());
        let answered_at = Instant::now();
        let query = RecentQuery { answered_at, text_hash, embedding, first_raw_hit };
        self.window.lock().unwrap_or_else(PoisonError::into_inner).add(query);
    }

    /// Returns what was measured last: the served prompt set, that of the candidate, and others.
    pub fn measured_banks(&self) -> Arc<Vec<MeasuredBank>> {
        self.banks.load_full()
    }

    /// Measures the prompt sets again if images, sets or queries have changed. Blocks while it computes, on
    /// one thread.
    pub fn measure(&self, snapshot: &Snapshot) {
        let mut last_measured = self.last_measured.lock().unwrap_or_else(PoisonError::into_inner);
        let (embeddings, first_raw_hits, state) = {
            // Queries wait for this lock: nothing large is copied under it.
            let mut window = self.window.lock().unwrap_or_else(PoisonError::into_inner);
            window.expire();
            let state = (snapshot.serial, window.change_count);
            if *last_measured == Some(state) {
                return;
            }
            let embeddings: Vec<Arc<Vec<f32>>> =
                window.queries.iter().map(|query| query.embedding.clone()).collect();
            let first_raw_hits: Vec<ImageId> =
                window.queries.iter().filter_map(|query| query.first_raw_hit.clone()).collect();
            (embeddings, first_raw_hits, state)
        };
        let queries: Vec<Vec<f32>> = embeddings.iter().map(|values| values.to_vec()).collect();
        let measure = || measure_sets(snapshot, &queries, &first_raw_hits);
        // One thread, so that queries are not delayed. If it cannot be started, the computation runs on the
        // threads that all others use.
        let pool = rayon::ThreadPoolBuilder::new()
            .num_threads(1)
            .thread_name(|_| "measure-fit".into())
            .build();
        let banks = match pool {
            Ok(pool) => pool.install(measure),
            Err(_) => measure(),
        };
        self.banks.store(banks.into());
        *last_measured = Some(state);
    }

    /// Logs `balance.fit` of a configuration, and sets the metrics of the same name for its role.
    pub fn report_fit(
        &self,
        snapshot: &Snapshot,
        name: &str,
        serving: &ServingConfig,
        role: ServingRole,
    ) {
        let banks = self.banks.load();
        let Some(bank) = banks.iter().find(|bank| bank.prompt_set == serving.prompt_set) else {
            clear_metrics(role);
            return;
        };
        let (role_name, weight) = (role_name(role), effective_weight(serving));
        let BankReport { texts, fit, concentration, proposed_weight, reason } = &bank.report;
        info!(
            event = event::BALANCE_FIT,
            configuration = name,
            role = role_name,
            revision = snapshot.serving_snapshot.state_revision,
            prompt_set = bank.prompt_set.as_str(),
            texts,
            images = bank.images,
            queries = bank.queries,
            fit = fit.map(|fit| fit.value),
            fit_low = fit.map(|fit| fit.low),
            fit_high = fit.map(|fit| fit.high),
            concentration = *concentration,
            weight,
            proposed_weight = round_weight(*proposed_weight),
            reason,
            "fit of the prompt set to recent queries"
        );
        let metrics = metrics::global();
        let bounds = [
            ("value", fit.map(|f| f.value)),
            ("low", fit.map(|f| f.low)),
            ("high", fit.map(|f| f.high)),
        ];
        for (bound, value) in bounds {
            metrics.balance_fit.set(&[role_name, bound], value.unwrap_or(f64::NAN));
        }
        metrics.balance_fit_queries.set(&[role_name], bank.queries as f64);
        metrics.balance_concentration.set(&[role_name], concentration.unwrap_or(f64::NAN));
        metrics.balance_weight.set(&[role_name, "served"], weight);
        let proposed = fit.map_or(f64::NAN, |_| round_weight(*proposed_weight));
        metrics.balance_weight.set(&[role_name, "proposed"], proposed);
    }
}

/// Marks as unknown what the metrics say about a role that no configuration has any more.
pub(super) fn clear_metrics(role: ServingRole) {
    let (metrics, role) = (metrics::global(), role_name(role));
    for bound in ["value", "low", "high"] {
        metrics.balance_fit.set(&[role, bound], f64::NAN);
    }
    metrics.balance_fit_queries.set(&[role], f64::NAN);
    metrics.balance_concentration.set(&[role], f64::NAN);
    for kind in ["served", "proposed"] {
        metrics.balance_weight.set(&[role, kind], f64::NAN);
    }
}

fn role_name(role: ServingRole) -> &'static str {
    match role {
        ServingRole::Live => "live",
        ServingRole::Candidate => "candidate",
    }
}

/// Returns the weight with which scores are balanced: 0 for plain CLIP.
fn effective_weight(serving: &ServingConfig) -> f64 {
    if serving.normaliser == Normaliser::Raw { 0.0 } else { round_weight(serving.weight) }
}

/// Converts a weight so that 0.1 stays 0.1.
fn round_weight(weight: f32) -> f64 {
    (f64::from(weight) * 1e6).round() / 1e6
}

/// Measures the prompt sets of a snapshot with these queries.
fn measure_sets(
    snapshot: &Snapshot,
    queries: &[Vec<f32>],
    first_raw_hits: &[ImageId],
) -> Vec<MeasuredBank> {
    let sets = sets_to_measure(snapshot);
    let measured_at = Utc::now();
    let is_known = queries.len() >= MIN_FIT_QUERIES;
    let embeddings = if is_known { sample_embeddings(snapshot) } else { Vec::new() };
    let first: Vec<Embedding> =
        first_raw_hits.iter().filter_map(|id| snapshot.embedding(id.as_str())).collect();
    let queried = (!embeddings.is_empty()).then(|| {
        let images = embeddings.iter().map(Embedding::values).collect();
        let first = first.iter().map(Embedding::values).collect();
        QueriedImages::from_sample(images, queries, first)
    });
    let report = |set: &EmbeddedPromptSet| match &queried {
        Some(queried) => queried.measure_bank(&set.prompt_embeddings),
        None => {
            let texts = set.prompt_set.texts.len();
            BankReport::new(texts, texts, None, None)
        }
    };
    let measure = |set: &&Arc<EmbeddedPromptSet>| MeasuredBank {
        generation: snapshot.serving_snapshot.generation_id.clone(),
        prompt_set: set.statistics_key.clone(),
        measured_at,
        images: embeddings.len(),
        queries: queries.len(),
        report: report(set),
    };
    sets.iter().map(measure).collect()
}

/// Returns at most [`MAX_MEASURED_SETS`] prompt sets: the served one, that of the candidate, and others.
fn sets_to_measure(snapshot: &Snapshot) -> Vec<&Arc<EmbeddedPromptSet>> {
    let served = &snapshot.serving_snapshot;
    let candidate = served.candidate.as_ref().map(|candidate| &candidate.serving.prompt_set);
    let position = |set: &Arc<EmbeddedPromptSet>| {
        if set.statistics_key == served.serving.prompt_set {
            0
        } else if Some(&set.statistics_key) == candidate {
            1
        } else {
            2
        }
    };
    let mut sets: Vec<&Arc<EmbeddedPromptSet>> = served.prompt_sets.iter().collect();
    sets.sort_by_key(|set| position(set));
    sets.truncate(MAX_MEASURED_SETS);
    sets
}

/// Returns the embeddings of [`MAX_MEASURED_IMAGES`] live images: of all if there are not more, otherwise of
/// random ones, which are the same while the catalogue does not change.
fn sample_embeddings(snapshot: &Snapshot) -> Vec<Embedding> {
    let chosen = sample_indices(snapshot.len(), MAX_MEASURED_IMAGES);
    let mut chosen = chosen.into_iter().peekable();
    let live_rows =
        snapshot.chunks.iter().flat_map(|chunk| chunk.live_rows().map(move |row| (chunk, row)));
    let is_chosen = |(index, _): &(usize, _)| chosen.next_if_eq(index).is_some();
    let sampled = live_rows.enumerate().filter(is_chosen);
    sampled.map(|(_, (chunk, row))| chunk.data.embedding(row)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::balance::fit::BankFit;
    use crate::balance::proposal::{CAUTIOUS_WEIGHT, HIGH_FIT, LOW_FIT, MAX_CONCENTRATION};
    use crate::search::testing::{
        HashEncoders, clip_like_embedding, sample_prompt_set, sample_row, sample_serving_snapshot,
    };
    use crate::search::{Engine, Query, QueryInput, SearchOptions};
    use crate::table::{SnapshotPart, TableChanges};

    const DIMENSION: usize = 16;

    async fn engine_with_images(count: u64) -> Engine {
        let sets = ["one", "three"].map(|name| sample_prompt_set(name, DIMENSION));
        let mut serving_snapshot = sample_serving_snapshot(sets.to_vec());
        serving_snapshot.serving.prompt_set = sets[1].statistics_key.clone();
        let engine =
            Engine::new(HashEncoders::new(DIMENSION), serving_snapshot, SearchOptions::default());
        let row = |i: u64| sample_row(&i.to_string(), 1, Some(clip_like_embedding(i, DIMENSION)));
        let changes = TableChanges {
            table_version: 1,
            is_full_snapshot: true,
            part: SnapshotPart::All,
            rows: (0..count).map(row).collect(),
        };
        engine.snapshots().apply_changes(changes).await.unwrap();
        engine
    }

    fn search(engine: &Engine, text: &str) {
        engine.search(&Query { input: text.into(), ..Query::default() }).unwrap();
    }

    #[test]
    fn the_window_holds_each_query_once_and_drops_the_oldest() {
        let monitor = FitMonitor::default();
        let id = ImageId::new("first").unwrap();
        for query in 0..3 * MAX_WINDOW_QUERIES {
            monitor.record_query(&query.to_string(), Arc::default(), None);
            // A query that is asked all the time stays, with the first image that was known of it.
            let first_raw_hit = (query == 0).then(|| id.clone());
            monitor.record_query(" popular ", Arc::default(), first_raw_hit);
        }
        let window = monitor.window.lock().unwrap();
        assert_eq!(window.queries.len(), MAX_WINDOW_QUERIES);
        let popular: Vec<&RecentQuery> =
            window.queries.iter().filter(|query| query.first_raw_hit.is_some()).collect();
        assert_eq!((popular.len(), popular[0].first_raw_hit.as_ref()), (1, Some(&id)));
        assert_eq!(popular[0].text_hash, monitor.hasher.hash_one("popular"));
    }

    #[tokio::test]
    async fn the_fit_is_that_of_the_answered_queries_from_64_on() {
        let engine = engine_with_images(300).await;
        let measure = || {
            engine.fit_monitor.measure(&engine.snapshots().newest());
            engine.measured_banks()
        };
        for query in 0..MIN_FIT_QUERIES - 1 {
            search(&engine, &format!("query {query}"));
            search(&engine, &format!("query {query} "));
        }
        let banks = measure();
        let served = engine.serving_snapshot().serving.prompt_set.clone();
        assert_eq!((banks.len(), &banks[0].prompt_set), (2, &served), "the served set is first");
        assert_eq!((banks[0].queries, banks[0].images, banks[0].report.fit), (63, 0, None));
        assert_eq!(banks[0].report.proposed_weight, 0.25);

        search(&engine, "query 63");
        let bank = measure()[0].clone();
        assert_eq!((bank.queries, bank.images, bank.report.texts), (64, 300, 6));
        let snapshot = engine.snapshots().newest();
        let images = sample_embeddings(&snapshot);
        let encoders = HashEncoders::new(DIMENSION);
        let queries: Vec<Vec<f32>> =
            (0..64).map(|i| encoders.embed_bytes(format!("query {i}").as_bytes())).collect();
        let expected = QueriedImages::new(images.iter().map(Embedding::values).collect(), &queries)
            .measure_bank(&sample_prompt_set("three", DIMENSION).prompt_embeddings);
        let fit = |report: &BankReport| report.fit.map(|BankFit { value, .. }| value).unwrap();
        assert!((fit(&bank.report) - fit(&expected)).abs() < 1e-9, "{bank:?} {expected:?}");
        let concentration = |report: &BankReport| report.concentration.unwrap();
        assert!((concentration(&bank.report) - concentration(&expected)).abs() < 1e-6);

        // Nothing has changed, so that nothing is computed again.
        assert_eq!(measure()[0].measured_at, bank.measured_at);
    }

    #[tokio::test]
    async fn a_filtered_query_and_an_image_query_say_nothing_of_first_images() {
        let engine = engine_with_images(10).await;
        let filter = serde_json::json!({"gte": {"embedded_at": "1970-01-01T00:00:00Z"}});
        let filter = serde_json::from_value(filter).unwrap();
        let filtered = Query { input: "a".into(), filter: Some(filter), ..Query::default() };
        engine.search(&filtered).unwrap();
        let image = QueryInput::ImageId("1".into());
        engine.search(&Query { input: image, ..Query::default() }).unwrap();
        let first_raw_hits = || {
            let window = engine.fit_monitor.window.lock().unwrap();
            window.queries.iter().map(|q| q.first_raw_hit.is_some()).collect::<Vec<_>>()
        };
        assert_eq!(first_raw_hits(), [false]);
        search(&engine, "a");
        assert_eq!(first_raw_hits(), [true]);
    }

    #[test]
    fn the_alert_has_the_thresholds_of_the_proposal() {
        let rules = std::fs::read_to_string("ops/prometheus/bsap.rules.yml").unwrap();
        let rule = rules.lines().find(|line| line.contains("bsap_balance_fit")).unwrap();
        for part in [
            format!("< {LOW_FIT} and"),
            format!("< {HIGH_FIT} and"),
            format!("> {MAX_CONCENTRATION} and"),
            format!("> {CAUTIOUS_WEIGHT})"),
        ] {
            assert!(rule.contains(&part), "{part} is not in {rule}");
        }
    }

    #[tokio::test]
    async fn a_part_of_a_large_catalogue_is_measured() {
        let engine = engine_with_images(MAX_MEASURED_IMAGES as u64 + 500).await;
        let snapshot = engine.snapshots().newest();
        let sampled = sample_embeddings(&snapshot);
        assert_eq!(sampled.len(), MAX_MEASURED_IMAGES);
        assert_eq!(sampled, sample_embeddings(&snapshot));
    }
}
