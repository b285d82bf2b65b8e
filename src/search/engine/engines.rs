//! The engines of all generations in memory. Exactly one of them answers each query.

use std::borrow::Cow;
use std::sync::Arc;
use std::time::Duration;

use arc_swap::ArcSwap;
use tokio_util::sync::CancellationToken;

use super::answer::SearchResults;
use super::explain::Explanation;
use super::fit_monitor::clear_metrics;
use super::generation_engine::Engine;
use super::rerank::{RerankCandidate, RerankResults};
use super::shadow::ShadowQuery;
use super::traffic::{RoutingRequest, choose_route};
use crate::balance::bank::MeasuredBank;
use crate::catalogue::RolloutCandidate;
use crate::search::error::QueryError;
use crate::search::query::{Query, QueryInput};
use crate::search::snapshot::{ImageMetadata, ServingRole};

/// The roles of the engines at one moment.
#[derive(Clone)]
pub struct EngineRoles {
    /// Engine of the live generation, which answers by default.
    pub live: Arc<Engine>,
    /// Engine of another generation that may become live. This engine follows its own table and serves its own
    /// configuration.
    pub standby: Option<Arc<Engine>>,
    /// Configuration that `standby` serves, and its share of the traffic; `None` while it answers no
    /// queries.
    pub candidate: Option<RolloutCandidate>,
}

/// The engines of all generations. An engine has one model, one table and the configurations served
/// from it. They cannot be mixed up, because a query is answered by one engine as a whole.
pub struct Engines {
    roles: ArcSwap<EngineRoles>,
}

impl Engines {
    /// Starts with one generation in memory.
    pub fn new(live: Arc<Engine>) -> Self {
        Self { roles: ArcSwap::from_pointee(EngineRoles { live, standby: None, candidate: None }) }
    }

    /// Returns the live engine.
    pub fn live(&self) -> Arc<Engine> {
        self.roles.load().live.clone()
    }

    /// Returns the current roles.
    pub fn roles(&self) -> Arc<EngineRoles> {
        self.roles.load_full()
    }

    /// Replaces the roles in one step: a query uses either the old or the new roles.
    pub fn assign_roles(&self, roles: EngineRoles) {
        self.roles.store(roles.into());
    }

    /// Finds an image in any generation that may answer, the live one first.
    pub fn find_image(&self, id: &str) -> Option<Arc<ImageMetadata>> {
        let roles = self.roles.load();
        roles.engines().find_map(|engine| engine.snapshots().newest().metadata(id))
    }

    /// Returns why answers are outdated, or `None` if they are not. Considers the live table and, if there
    /// is a candidate, the table that it reads.
    pub fn staleness_reason(&self) -> Option<String> {
        let roles = self.roles.load();
        let standby = roles.standby.iter().filter(|_| roles.candidate.is_some());
        let mut answering = std::iter::once(&roles.live).chain(standby);
        let stale = answering.find(|engine| engine.is_stale())?;
        Some(format!(
            "the table of generation {} is not followed; table.refresh_failed or snapshot.memory_exceeded in the log gives the reason",
            stale.serving_snapshot().generation_id
        ))
    }

    /// Answers a query. Returns [`QueryError::Cancelled`] if `cancel` is cancelled before the scan.
    /// Blocks while it computes: call it from a thread that may block.
    pub fn search(
        &self,
        query: &Query,
        cancel: &CancellationToken,
    ) -> Result<SearchResults, QueryError> {
        let roles = self.roles();
        let (engine, routed_query) = roles.route_query(query, false)?;
        let answer = engine.search_with_cancel(&routed_query, cancel);
        if roles.is_image_missing_in_standby(engine, query, &answer) {
            return roles.live.search_with_cancel(query, cancel);
        }
        if query.cursor.is_some()
            && matches!(
                answer,
                Err(QueryError::CursorExpired { .. } | QueryError::InvalidField { .. })
            )
        {
            // A cursor from before a promotion continues in the generation that returned it.
            let other = roles.engines().find(|other| !Arc::ptr_eq(other, engine));
            let page = other
                .and_then(|other| other.search_with_cancel(&query.without_routing(), cancel).ok());
            return page.map_or(answer, Ok);
        }
        if let (Ok(results), true) = (&answer, Arc::ptr_eq(engine, &roles.live)) {
            roles.start_shadow(query, results);
        }
        answer
    }

    /// Explains the rank of one image in the answer to a query. Returns [`QueryError::Cancelled`] if
    /// `cancel` is cancelled before the scan. Blocks while it computes.
    pub fn explain(
        &self,
        query: &Query,
        image_id: &str,
        cancel: &CancellationToken,
    ) -> Result<Explanation, QueryError> {
        let roles = self.roles();
        let (engine, routed_query) = roles.route_query(query, false)?;
        let answer = engine.explain(&routed_query, image_id, cancel);
        if roles.is_image_missing_in_standby(engine, query, &answer) {
            return roles.live.explain(query, image_id, cancel);
        }
        answer
    }

    /// Ranks the candidates of a caller. Returns [`QueryError::Cancelled`] if `cancel` is cancelled before that.
    /// Blocks while it computes: call it from a thread that may block.
    pub fn rerank(
        &self,
        query: &Query,
        candidates: Vec<RerankCandidate>,
        explain: bool,
        cancel: &CancellationToken,
    ) -> Result<RerankResults, QueryError> {
        let roles = self.roles();
        let candidates: Arc<[RerankCandidate]> = candidates.into();
        let has_embeddings = candidates.iter().any(|candidate| candidate.embedding.is_some());
        let (engine, routed_query) = roles.route_query(query, has_embeddings)?;
        let answer = engine.rerank(&routed_query, &candidates, explain, cancel);
        let is_live = Arc::ptr_eq(engine, &roles.live);
        // Images that are not embedded in the other generation yet cannot be ranked there.
        let lacks_images = match &answer {
            Ok(results) => !results.unknown_ids.is_empty(),
            Err(error) => matches!(error, QueryError::ImageNotFound(_)),
        };
        if !is_live && lacks_images && query.requested_configuration.is_none() {
            return roles.live.rerank(query, &candidates, explain, cancel);
        }
        if let (Ok(results), true) = (&answer, is_live && !has_embeddings) {
            roles.start_rerank_shadow(query, &candidates, results);
        }
        answer
    }

    /// Compares the answers of the live engine with its calibration every
    /// `search.drift_interval_seconds`, until `token` is cancelled. Returns at once if that is 0.
    pub async fn monitor_drift(self: Arc<Self>, token: CancellationToken) {
        let seconds = self.live().options().drift_interval_seconds;
        // Reads the statistics of all images.
        let report = |engines: &Self| {
            let engine = engines.live();
            if engine.snapshots().is_ready() {
                engine.drift_monitor.report_drift(&engine.snapshots().newest());
            }
        };
        self.run_every(seconds, token, report).await;
    }

    /// Measures how well prompt sets fit recent queries every `search.fit_interval_seconds`, until `token`
    /// is cancelled. Returns at once if that is 0.
    pub async fn monitor_fit(self: Arc<Self>, token: CancellationToken) {
        let seconds = self.live().options().fit_interval_seconds;
        self.run_every(seconds, token, |engines: &Self| engines.roles().measure_fit()).await;
    }

    /// Calls `work`, which may block, every so many seconds until `token` is cancelled. Returns at once if
    /// that is 0.
    async fn run_every(
        self: Arc<Self>,
        seconds: u64,
        token: CancellationToken,
        work: impl Fn(&Self) + Copy + Send + 'static,
    ) {
        if seconds == 0 {
            return;
        }
        loop {
            tokio::select! {
                () = tokio::time::sleep(Duration::from_secs(seconds)) => {}
                () = token.cancelled() => return,
            }
            let engines = self.clone();
            if let Err(error) = tokio::task::spawn_blocking(move || work(&engines)).await {
                std::panic::resume_unwind(error.into_panic());
            }
        }
    }
}

impl EngineRoles {
    /// Returns how well the prompt sets of all engines fitted recent queries when that was last measured.
    pub fn measured_banks(&self) -> Vec<MeasuredBank> {
        self.engines().flat_map(|engine| engine.measured_banks().to_vec()).collect()
    }

    /// Measures how well the prompt sets of all engines fit recent queries, and reports that of the live
    /// configuration and of the candidate.
    fn measure_fit(&self) {
        for engine in self.engines().filter(|engine| engine.snapshots().is_ready()) {
            engine.fit_monitor.measure(&engine.snapshots().newest());
        }
        let live = &self.live;
        if !live.snapshots().is_ready() {
            return;
        }
        let snapshot = live.snapshots().newest();
        let served = &snapshot.serving_snapshot;
        let name = &served.configuration_name;
        live.fit_monitor.report_fit(&snapshot, name, &served.serving, ServingRole::Live);
        let standby = self.standby.as_ref().zip(self.candidate.as_ref());
        if let Some(candidate) = &served.candidate {
            let RolloutCandidate { name, serving, .. } = candidate;
            live.fit_monitor.report_fit(&snapshot, name, serving, ServingRole::Candidate);
        } else if let Some((standby, RolloutCandidate { name, serving, .. })) = standby {
            let snapshot = standby.snapshots().newest();
            standby.fit_monitor.report_fit(&snapshot, name, serving, ServingRole::Candidate);
        } else {
            clear_metrics(ServingRole::Candidate);
        }
    }

    /// Iterates over the live engine and the standby.
    fn engines(&self) -> impl Iterator<Item = &Arc<Engine>> {
        std::iter::once(&self.live).chain(&self.standby)
    }

    /// Returns whether `engine`, as the standby, did not find the image of the query, which may not have
    /// been embedded in that generation yet. The live engine answers then, unless the query names its
    /// configuration.
    fn is_image_missing_in_standby<T>(
        &self,
        engine: &Arc<Engine>,
        query: &Query,
        answer: &Result<T, QueryError>,
    ) -> bool {
        !Arc::ptr_eq(engine, &self.live)
            && query.requested_configuration.is_none()
            && matches!(answer, Err(QueryError::ImageNotFound(_)))
    }

    /// Chooses the engine that answers, and the query that it gets. `has_embeddings` says that embeddings by the
    /// live model come with the query.
    fn route_query<'a>(
        &self,
        query: &'a Query,
        has_embeddings: bool,
    ) -> Result<(&Arc<Engine>, Cow<'a, Query>), QueryError> {
        let Some((standby, candidate)) = self.standby.as_ref().zip(self.candidate.as_ref()) else {
            return Ok((&self.live, Cow::Borrowed(query)));
        };
        let request = RoutingRequest {
            requested_configuration: query.requested_configuration.as_deref(),
            traffic_key: query.traffic_key.as_deref(),
            // A vector is an embedding of the live model, so that another model cannot answer it.
            has_overrides: query.has_overrides()
                || has_embeddings
                || matches!(query.input, QueryInput::Vector(_)),
            filter: query.filter.as_ref(),
        };
        // The candidate gets its share of the traffic only after its whole table is loaded. A query
        // that names its configuration is answered with `NotReady` until then.
        let is_available =
            standby.snapshots().is_ready() || query.requested_configuration.is_some();
        let route = choose_route(
            &self.live.serving_snapshot().configuration_name,
            Some(candidate).filter(|_| is_available),
            request,
        )
        .map_err(|reason| QueryError::invalid_field("configuration", reason))?;
        Ok(match route {
            ServingRole::Live => (&self.live, Cow::Borrowed(query)),
            ServingRole::Candidate => (standby, Cow::Owned(query.without_routing())),
        })
    }

    /// Ranks the images in the standby too, if the query belongs to the candidate's shadow share.
    fn start_shadow(&self, query: &Query, results: &SearchResults) {
        let is_whole_answer = query.cursor.is_none() && query.min_score.is_none();
        let k = |standby: &Engine| query.k.unwrap_or(standby.options().default_k);
        if is_whole_answer
            && let Some((standby, shadow)) =
                self.acquire_standby_shadow(query, &results.configuration_name, k)
        {
            standby.start_standby_shadow(shadow, query, &results.hits);
        }
    }

    /// Ranks the candidates of a caller in the standby too, if the query belongs to the shadow share.
    fn start_rerank_shadow(
        &self,
        query: &Query,
        candidates: &Arc<[RerankCandidate]>,
        results: &RerankResults,
    ) {
        let k = |_: &Engine| candidates.len();
        let shadow = self.acquire_standby_shadow(query, &results.configuration_name, k);
        if let Some((standby, shadow)) = shadow {
            standby.start_standby_rerank_shadow(shadow, query, candidates, results);
        }
    }

    /// Returns the standby, and the permit to compare `k` of its results with the answer of the live configuration.
    /// Returns `None` if it does not compute this query.
    fn acquire_standby_shadow(
        &self,
        query: &Query,
        live_configuration: &str,
        k: impl FnOnce(&Engine) -> usize,
    ) -> Option<(&Arc<Engine>, ShadowQuery)> {
        let (standby, candidate) = self.standby.as_ref().zip(self.candidate.as_ref())?;
        let is_comparable = !query.has_overrides()
            && !query.input.is_image()
            && !matches!(query.input, QueryInput::Vector(_));
        if !is_comparable || !standby.snapshots().is_ready() {
            return None;
        }
        let (counters, k) = (standby.traffic_counters(), k(standby));
        let shadow = ShadowQuery::try_acquire(counters, candidate, live_configuration, query, k)?;
        Some((standby, shadow))
    }
}
