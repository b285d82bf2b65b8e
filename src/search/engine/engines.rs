//! The engines of the generations that are in memory: each query is answered by exactly one.

use std::borrow::Cow;
use std::sync::Arc;
use std::time::Duration;

use arc_swap::ArcSwap;
use tokio_util::sync::CancellationToken;

use super::answer::SearchResults;
use super::explain::Explanation;
use super::generation_engine::Engine;
use super::shadow::ShadowQuery;
use super::traffic::{RoutingRequest, choose_route};
use crate::catalogue::RolloutCandidate;
use crate::search::error::QueryError;
use crate::search::query::{Query, QueryInput};
use crate::search::snapshot::{ImageMetadata, Route};

/// Which engine does what, at one moment.
#[derive(Clone)]
pub struct EngineRoles {
    /// Answers.
    pub live: Arc<Engine>,
    /// Another model's, that may become live; follows its own table and serves its candidate.
    pub standby: Option<Arc<Engine>>,
    /// What `beside` serves, and for whom.
    pub candidate: Option<RolloutCandidate>,
}

/// The engines. An engine has one model, one table, and what is served from it; nothing of them can
/// be mixed up, because a query is given to one of them as a whole.
pub struct Engines {
    roles: ArcSwap<EngineRoles>,
}

impl Engines {
    /// With one generation in memory.
    pub fn new(live: Arc<Engine>) -> Self {
        Self { roles: ArcSwap::from_pointee(EngineRoles { live, standby: None, candidate: None }) }
    }

    /// The engine that answers.
    pub fn live(&self) -> Arc<Engine> {
        self.roles.load().live.clone()
    }

    /// Which engine does what.
    pub fn roles(&self) -> Arc<EngineRoles> {
        self.roles.load_full()
    }

    /// Gives the engines other roles, from one query to the next.
    pub fn assign_roles(&self, roles: EngineRoles) {
        self.roles.store(roles.into());
    }

    /// An image, wherever an answer may have found it: the live table first.
    pub fn find_image(&self, id: &str) -> Option<Arc<ImageMetadata>> {
        let roles = self.roles.load();
        roles.engines().find_map(|engine| engine.snapshots().newest().metadata(id))
    }

    /// Why answers are older than they should be, if they are: of the live table, or of the one that a
    /// candidate reads.
    pub fn staleness_reason(&self) -> Option<String> {
        let roles = self.roles.load();
        let standby = roles.standby.iter().filter(|_| roles.candidate.is_some());
        let mut read = std::iter::once(&roles.live).chain(standby);
        let behind = read.find(|engine| engine.is_stale())?;
        Some(format!(
            "the table of generation {} is not followed; follow.failed or snapshot.memory in the log says why",
            behind.serving_snapshot().generation_id
        ))
    }

    /// Answers a query, unless `left` says that nobody waits for it any more. Computes: call it from
    /// a thread that may block.
    pub fn search(
        &self,
        query: &Query,
        cancel: &CancellationToken,
    ) -> Result<SearchResults, QueryError> {
        let roles = self.roles();
        let (engine, chosen) = roles.choose_engine(query)?;
        let answer = engine.search_with_cancel(&chosen, cancel);
        if roles.is_missing_in_standby(engine, query, &answer) {
            return roles.live.search_with_cancel(query, cancel);
        }
        if query.cursor.is_some()
            && matches!(
                answer,
                Err(QueryError::CursorExpired { .. } | QueryError::InvalidField { .. })
            )
        {
            // A page that was turned before a promotion is turned further in its own generation.
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

    /// Explains the place of one image in the answer to a query, unless `left` says that nobody waits
    /// for it any more. Computes: may block.
    pub fn explain(
        &self,
        query: &Query,
        image_id: &str,
        cancel: &CancellationToken,
    ) -> Result<Explanation, QueryError> {
        let roles = self.roles();
        let (engine, chosen) = roles.choose_engine(query)?;
        let answer = engine.explain(&chosen, image_id, cancel);
        if roles.is_missing_in_standby(engine, query, &answer) {
            return roles.live.explain(query, image_id, cancel);
        }
        answer
    }

    /// Tells how far the live engine's balancing goes every `search.watch_seconds`, until `token` is cancelled.
    pub async fn monitor_drift(self: Arc<Self>, token: CancellationToken) {
        let seconds = self.live().options().drift_interval_seconds;
        if seconds == 0 {
            return;
        }
        loop {
            tokio::select! {
                () = tokio::time::sleep(Duration::from_secs(seconds)) => {}
                () = token.cancelled() => return,
            }
            let engine = self.live();
            // Reads the statistics of all images.
            let logging = tokio::task::spawn_blocking(move || {
                if engine.snapshots().is_ready() {
                    engine.drift_monitor.log_drift(&engine.snapshots().newest());
                }
            });
            if let Err(error) = logging.await {
                std::panic::resume_unwind(error.into_panic());
            }
        }
    }
}

impl EngineRoles {
    /// The live engine, and the one beside it.
    fn engines(&self) -> impl Iterator<Item = &Arc<Engine>> {
        std::iter::once(&self.live).chain(&self.standby)
    }

    /// Whether an image is not in the candidate's generation, which `engine` asked, maybe not yet, and
    /// nobody asked for the candidate by name: then the live one answers.
    fn is_missing_in_standby<T>(
        &self,
        engine: &Arc<Engine>,
        query: &Query,
        answer: &Result<T, QueryError>,
    ) -> bool {
        !Arc::ptr_eq(engine, &self.live)
            && query.configuration.is_none()
            && matches!(answer, Err(QueryError::ImageNotFound(_)))
    }

    /// Who answers, and what it is asked.
    fn choose_engine<'a>(
        &self,
        query: &'a Query,
    ) -> Result<(&Arc<Engine>, Cow<'a, Query>), QueryError> {
        let Some((standby, candidate)) = self.standby.as_ref().zip(self.candidate.as_ref()) else {
            return Ok((&self.live, Cow::Borrowed(query)));
        };
        let asking = RoutingRequest {
            configuration: query.configuration.as_deref(),
            traffic_key: query.traffic_key.as_deref(),
            // A vector is one of the live model.
            has_overrides: query.has_overrides() || matches!(query.input, QueryInput::Vector(_)),
            filter: query.filter.as_ref(),
        };
        // A share is taken over once the whole table is there; who asks by name is told to wait.
        let there = standby.snapshots().is_ready() || query.configuration.is_some();
        let chosen = choose_route(
            &self.live.serving_snapshot().configuration_name,
            Some(candidate).filter(|_| there),
            asking,
        )
        .map_err(|reason| QueryError::invalid_field("configuration", reason))?;
        Ok(match chosen {
            Route::Live => (&self.live, Cow::Borrowed(query)),
            Route::Candidate => (standby, Cow::Owned(query.without_routing())),
        })
    }

    fn start_shadow(&self, query: &Query, results: &SearchResults) {
        let Some((standby, candidate)) = self.standby.as_ref().zip(self.candidate.as_ref()) else {
            return;
        };
        let whole = query.cursor.is_none() && query.min_score.is_none();
        let has_overrides = query.has_overrides() || query.input.is_image();
        if !whole
            || has_overrides
            || matches!(query.input, QueryInput::Vector(_))
            || !standby.snapshots().is_ready()
        {
            return;
        }
        let k = query.k.unwrap_or(standby.options().default_k);
        let live = &results.configuration;
        if let Some(shadow) =
            ShadowQuery::try_start(standby.traffic_counters(), candidate, live, query, k)
        {
            standby.start_standby_shadow(shadow, query, &results.hits);
        }
    }
}
