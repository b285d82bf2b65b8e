//! Questions and answers: text to embedding, one scan, both rankings, and why.

mod cursor;
mod drift_monitor;
pub(crate) mod engines;
pub(crate) mod explain;
pub(crate) mod follow;
mod query_log;
mod query_plan;
mod shadow;
pub(crate) mod traffic;

use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use tokio_util::sync::CancellationToken;

use query_plan::{QueryPlan, is_allowed, resolve_configuration, resolve_min_score};

use super::SearchOptions;
use super::query::embedder::QueryEmbedder;
use super::query::filter::FilterCache;
use super::query::{Query, QueryError, QueryInput, Timings};
use super::scan::ScanRequest;
use super::scan::batch_scanner::{BatchScanner, ScanGoal, ScanReply};
use super::scan::no_match::NoMatchVerdict;
use super::scan::rank::{Hit, TopK};
use super::snapshot::facets::{AttributeFacet, count_facets};
use super::snapshot::memory::{self, MemoryLimitExceeded};
use super::snapshot::snapshot_store::SnapshotStore;
use super::snapshot::{ServingSnapshot, Snapshot};
use crate::balance::calibration::{Calibration, ScoreDistribution};
use crate::balance::normalise::BalanceParameters;
use crate::catalogue::{RolloutCandidate, ServingConfig};
use crate::clip::Encoders;
use crate::ingest::decode;
use crate::prompts::EmbeddedPromptSet;
use crate::record::AttributeTypes;
use cursor::{Cursor, PinnedSnapshots};
use drift_monitor::DriftMonitor;
use explain::{Explanation, ScoredPrompt, explain_in_words};
use query_log::QueryLog;
use shadow::ShadowQuery;
use traffic::{Route, TrafficCounters, TrafficCounts};

/// An answer: the best by balanced and by raw score, from one scan.
#[derive(Debug)]
pub struct SearchResults {
    /// Version of the table.
    pub table_version: u64,
    /// Prompt set that was used.
    pub prompt_set: Arc<EmbeddedPromptSet>,
    /// Normaliser, weight and constants that were used.
    pub balance: BalanceParameters,
    /// Images in the catalogue.
    pub scanned: usize,
    /// Images that were ranked: those that the filter lets through.
    pub matched: usize,
    /// Moments of the balanced scores of all images; with a filter, of a part of them.
    pub score_distribution: ScoreDistribution,
    /// What was served when it was answered.
    pub serving_snapshot: Arc<ServingSnapshot>,
    /// Name of the configuration that answered, one of `served`.
    pub configuration: String,
    /// Best by balanced score.
    pub hits: Vec<Hit>,
    /// Best by raw score.
    pub raw_hits: Vec<Hit>,
    /// How long it took.
    pub timings: Timings,
    /// Why the answer is not to be trusted; none where nothing speaks against it.
    pub warning: Option<String>,
    /// Whether the best hit is no better than what unrelated texts reach; none where nothing is
    /// calibrated for such a query, and on later pages.
    pub no_match: Option<NoMatchVerdict>,
    /// The balanced score that hits had to have.
    pub min_score: Option<f32>,
    /// Where the next page begins; none after the last.
    pub next_cursor: Option<String>,
}

/// Answers queries over the newest snapshot.
pub struct Engine {
    embedder: QueryEmbedder,
    options: SearchOptions,
    declared_attributes: AttributeTypes,
    snapshots: SnapshotStore,
    filter_cache: FilterCache,
    pinned_snapshots: PinnedSnapshots,
    scanner: Arc<BatchScanner>,
    traffic_counters: Arc<TrafficCounters>,
    /// When the table was last read to its end.
    last_refreshed_at: Mutex<Instant>,
    pub(super) drift_monitor: DriftMonitor,
}

impl Engine {
    /// An engine that answers as `served` says, until [`Engine::adopt`].
    pub fn new(towers: Arc<dyn Encoders>, served: ServingSnapshot, options: SearchOptions) -> Self {
        let age = Duration::from_secs(options.cursor_seconds);
        Self {
            embedder: QueryEmbedder::new(towers, &options),
            declared_attributes: AttributeTypes::new(),
            snapshots: SnapshotStore::new(served, memory::limit_bytes(options.memory_mib)),
            filter_cache: FilterCache::default(),
            pinned_snapshots: PinnedSnapshots::new(age, options.cursor_mib << 20),
            scanner: Arc::new(BatchScanner::start(&options)),
            traffic_counters: Arc::default(),
            last_refreshed_at: Mutex::new(Instant::now()),
            drift_monitor: DriftMonitor::default(),
            options,
        }
    }

    /// The same engine, whose filters may name the attributes of `declared`, and that decodes the
    /// pictures of queries within the limits of `decode`.
    pub fn with_attributes_and_decoding(
        mut self,
        declared: AttributeTypes,
        decode: decode::DecodeOptions,
    ) -> Self {
        self.declared_attributes = declared;
        self.embedder = self.embedder.with_decode_options(decode);
        self
    }

    /// An engine with the same limits for another generation, whose model is `towers`. It shares nothing
    /// with this one but the counts.
    pub fn for_generation(&self, towers: Arc<dyn Encoders>, served: ServingSnapshot) -> Self {
        let other = Self::new(towers, served, self.options.clone());
        let other = other.with_attributes_and_decoding(
            self.declared_attributes.clone(),
            self.embedder.decode_options().clone(),
        );
        Self { traffic_counters: self.traffic_counters.clone(), ..other }
    }

    /// The snapshots.
    pub fn snapshots(&self) -> &SnapshotStore {
        &self.snapshots
    }

    /// The model.
    pub fn encoders(&self) -> &dyn Encoders {
        &**self.embedder.encoders()
    }

    /// The model, shared.
    pub fn shared_encoders(&self) -> Arc<dyn Encoders> {
        self.embedder.encoders().clone()
    }

    /// What filters may name, over the live images of `snapshot`.
    pub fn facets<'a>(&self, snapshot: &'a Snapshot) -> &'a [AttributeFacet] {
        snapshot.facets.get_or_init(|| count_facets(&self.declared_attributes, snapshot))
    }

    /// Bytes of versions that cursors point to, beside the newest.
    pub fn pinned_snapshot_bytes(&self) -> u64 {
        self.pinned_snapshots.extra_bytes(&self.snapshots.newest())
    }

    /// Lets go of versions that no cursor may ask for any more, or that take too much memory.
    pub(super) fn evict_pinned_snapshots(&self) {
        self.pinned_snapshots.evict(&self.snapshots.newest());
    }

    /// The prompt sets that a query may name, and how queries are answered unless they say
    /// otherwise.
    pub fn serving_snapshot(&self) -> Arc<ServingSnapshot> {
        self.snapshots.newest().serving_snapshot.clone()
    }

    /// Serves `served` from one moment to the next: an answer uses either the old configuration or
    /// the new one. What images lack of the statistics of its sets is computed before; queries and
    /// commits go on meanwhile. `progress` hears of images done and images in all. Computes: call
    /// it from a thread that may block.
    pub fn switch_serving(
        &self,
        served: ServingSnapshot,
        progress: &(dyn Fn(usize, usize) + Sync),
    ) -> Result<(), MemoryLimitExceeded> {
        self.snapshots.switch_serving(served, progress)
    }

    /// From now on it is counted how `candidate` does; what was counted of another one is forgotten.
    pub fn count_traffic_for(&self, candidate: Option<&RolloutCandidate>) {
        self.traffic_counters.reset_for(candidate);
    }

    /// Who has answered how many queries, and what the shadow showed.
    pub fn traffic_counts(&self) -> TrafficCounts {
        self.traffic_counters.counts()
    }

    pub(super) fn traffic_counters(&self) -> &Arc<TrafficCounters> {
        &self.traffic_counters
    }

    /// The limits.
    pub fn options(&self) -> &SearchOptions {
        &self.options
    }

    /// Answers a query. Computes: call it from a thread that may block.
    pub fn search(&self, query: &Query) -> Result<SearchResults, QueryError> {
        self.search_with_cancel(query, &CancellationToken::new())
    }

    /// Answers a query, unless `left` says that nobody waits for it any more.
    pub fn search_with_cancel(
        &self,
        query: &Query,
        cancel: &CancellationToken,
    ) -> Result<SearchResults, QueryError> {
        let k = query.k.unwrap_or(self.options.default_k);
        if !(1..=self.options.max_k).contains(&k) {
            let reason = format!("{k} is not between 1 and {}", self.options.max_k);
            return Err(QueryError::invalid_field("k", reason));
        }
        let started_at = Instant::now();
        let QueryPlan {
            request: ask,
            prompt_set: set,
            embed_ms: text_ms,
            route,
            offset,
            query_digest: digest,
            calibration,
        } = self.plan_query(query, k, cancel)?;
        let min_score = resolve_min_score(query, calibration.as_ref())?;
        let (snapshot, balance, depth) = (ask.snapshot.clone(), ask.balance, ask.depth);
        let configuration = snapshot.serving_snapshot.configuration_for(route).to_owned();
        let first = offset == 0;
        let shadow =
            (first && route == Route::Live && !query.input.is_image() && !query.has_overrides())
                .then(|| ask.clone());
        let ScanReply { top_k: mut found, timings } =
            self.scanner.scan_and_wait(ask, ScanGoal::TopHits { offset }, cancel)?;
        let timings = Timings { embed_ms: text_ms, ..timings };
        self.traffic_counters.count_answer(match route {
            Route::Live => snapshot.serving_snapshot.role,
            Route::Candidate => Route::Candidate,
        });
        let no_match = calibration
            .filter(|_| first)
            .and_then(|calibration| check_no_match(&query.input, &found, &set, &calibration));
        if first && route == Route::Live {
            self.observe_answer(
                query,
                &snapshot.serving_snapshot.serving,
                &found,
                no_match.as_ref(),
            );
        }
        if let Some(ask) = shadow {
            self.start_shadow(ask, query, k, &found.hits);
        }
        found.hits.retain(|hit| min_score.is_none_or(|least| hit.score >= least));
        let more =
            found.hits.len() == depth - offset && depth < found.matched.min(self.options.max_depth);
        let next_cursor = more.then(|| {
            self.pinned_snapshots.pin(&snapshot, &self.snapshots.newest());
            let (version, revision) =
                (snapshot.table_version, snapshot.serving_snapshot.state_revision);
            let (offset, scale) = (depth as u32, balance.scale);
            Cursor {
                table_version: version,
                state_revision: revision,
                offset,
                scale,
                query_digest: digest,
            }
            .encode()
        });
        let query_log = QueryLog {
            query,
            configuration: &configuration,
            balance: &balance,
            k,
            offset,
            scanned: snapshot.len(),
            matched: found.matched,
            hits: &found.hits,
            raw_hits: &found.raw_hits,
            no_match: no_match.as_ref(),
            timings: &timings,
            table_version: snapshot.table_version,
            started_at,
        };
        query_log.log_and_count(&self.options);
        Ok(SearchResults {
            table_version: snapshot.table_version,
            prompt_set: set,
            balance,
            scanned: snapshot.len(),
            matched: found.matched,
            score_distribution: found.score_distribution,
            serving_snapshot: snapshot.serving_snapshot.clone(),
            configuration,
            hits: found.hits,
            raw_hits: found.raw_hits,
            timings,
            warning: self.script_warning(&query.input),
            no_match,
            min_score,
            next_cursor,
        })
    }

    /// Shows the first results of a text, answered as everyone's are, to the watch.
    fn observe_answer(
        &self,
        query: &Query,
        serving: &ServingConfig,
        found: &TopK,
        no_match: Option<&NoMatchVerdict>,
    ) {
        if let QueryInput::Text(text) = &query.input
            && query.filter.is_none()
            && !query.has_overrides()
            && let (Some(hit), Some(raw)) = (found.hits.first(), found.raw_hits.first())
        {
            let firsts = (hit.image.image_id.clone(), raw.image.image_id.clone());
            self.drift_monitor.observe(
                serving,
                text,
                firsts,
                no_match.map(|verdict| verdict.nothing_matches),
            );
        }
    }

    /// Computes what the candidate would have answered, for its share of the queries, over the very
    /// same snapshot.
    fn start_shadow(&self, mut ask: ScanRequest, query: &Query, k: usize, hits: &[Hit]) {
        let served = ask.snapshot.serving_snapshot.clone();
        let Some(candidate) = &served.candidate else { return };
        let Some(shadow) = ShadowQuery::try_start(
            &self.traffic_counters,
            candidate,
            &served.configuration_name,
            query,
            k,
        ) else {
            return;
        };
        let set = resolve_configuration(&ask.snapshot, &candidate.serving, query).map(
            |(set, balance)| {
                ask.statistics_key = set.statistics_key.clone();
                ask.balance = balance;
            },
        );
        shadow.spawn(&self.scanner, hits, move || set.ok().map(|()| ask));
    }

    /// Computes what this engine, whose generation is a candidate's, would have answered to `query`,
    /// where another one's first `k` results are `hits`.
    pub(super) fn start_standby_shadow(
        self: &Arc<Self>,
        shadow: ShadowQuery,
        query: &Query,
        hits: &[Hit],
    ) {
        let (engine, query, k) = (self.clone(), query.without_routing(), shadow.k);
        shadow.spawn(&self.scanner, hits, move || {
            Some(engine.plan_query(&query, k, &CancellationToken::new()).ok()?.request)
        });
    }

    fn script_warning(&self, input: &QueryInput) -> Option<String> {
        let towers = self.encoders();
        (!input.texts().into_iter().all(|text| towers.supports_script(text))).then(|| {
            format!(
                "the text tower of {} is not multilingual: its vocabulary does not have the script of this query, so these results mean nothing",
                towers.card().name
            )
        })
    }

    /// Explains the place of one image in the answer to a query, unless `left` says that nobody waits
    /// for it any more. Computes: may block.
    pub fn explain(
        &self,
        query: &Query,
        image_id: &str,
        cancel: &CancellationToken,
    ) -> Result<Explanation, QueryError> {
        let QueryPlan { request: ask, prompt_set: set, route, .. } =
            self.plan_query(query, 1, cancel)?;
        let (snapshot, balance) = (ask.snapshot.clone(), ask.balance);
        let no_image = || QueryError::ImageNotFound(image_id.to_owned());
        let place = snapshot.find_row(image_id).ok_or_else(no_image)?;
        if !is_allowed(&ask, place) {
            let reason = "is left out of this query by its filter, or is what the query looks like";
            return Err(QueryError::invalid_field("image_id", reason));
        }
        let reply = self.scanner.scan_and_wait(ask, ScanGoal::RankOf(place), cancel)?;
        let hit = reply.top_k.hits.into_iter().next().ok_or_else(no_image)?;
        let statistics = snapshot.statistics(image_id, &set.statistics_key);
        let embedding = snapshot.embedding(image_id).ok_or_else(no_image)?;
        let prompts: Vec<ScoredPrompt> = set
            .rank_prompts(&embedding)
            .into_iter()
            .map(|(text, score)| ScoredPrompt { text: text.to_owned(), score })
            .collect();
        Ok(Explanation {
            summary: explain_in_words(
                &query.input,
                &hit,
                statistics.as_ref(),
                &prompts,
                reply.top_k.matched,
            ),
            hit,
            statistics,
            scored_prompts: prompts,
            scanned: snapshot.len(),
            balance,
            prompt_set: set,
            configuration: snapshot.serving_snapshot.configuration_for(route).to_owned(),
            serving_snapshot: snapshot.serving_snapshot.clone(),
        })
    }
}

/// Whether the best hit is no better than what unrelated texts reach; none where that was not
/// measured, or something else than a text was asked.
fn check_no_match(
    input: &QueryInput,
    found: &TopK,
    set: &EmbeddedPromptSet,
    calibration: &Calibration,
) -> Option<NoMatchVerdict> {
    let (QueryInput::Text(text), Some(hit)) = (input, found.hits.first()) else { return None };
    let rule = calibration.no_match?;
    Some(NoMatchVerdict::from_best_hit(
        rule,
        hit.score,
        found.score_distribution,
        text,
        set.vocabulary(),
    ))
}
