//! The engines of the generations that are in memory: each query is answered by exactly one.

use std::borrow::Cow;
use std::sync::Arc;

use arc_swap::ArcSwap;
use tokio_util::sync::CancellationToken;

use super::explain::Explanation;
use super::shadow::Shadow;
use super::traffic::{Asking, Route, route};
use super::{Engine, Results};
use crate::catalogue::Candidate;
use crate::search::query::{Input, Query, QueryError};
use crate::search::snapshot::chunk::Entry;

/// Which engine does what, at one moment.
#[derive(Clone)]
pub struct Roles {
    /// Answers.
    pub live: Arc<Engine>,
    /// Another model's, that may become live; follows its own table and serves its candidate.
    pub beside: Option<Arc<Engine>>,
    /// What `beside` serves, and for whom.
    pub candidate: Option<Candidate>,
}

/// The engines. An engine has one model, one table, and what is served from it; nothing of them can
/// be mixed up, because a query is given to one of them as a whole.
pub struct Engines {
    roles: ArcSwap<Roles>,
}

impl Engines {
    /// With one generation in memory.
    pub fn new(live: Arc<Engine>) -> Self {
        Self { roles: ArcSwap::from_pointee(Roles { live, beside: None, candidate: None }) }
    }

    /// The engine that answers.
    pub fn live(&self) -> Arc<Engine> {
        self.roles.load().live.clone()
    }

    /// Which engine does what.
    pub fn roles(&self) -> Arc<Roles> {
        self.roles.load_full()
    }

    /// Gives the engines other roles, from one query to the next.
    pub fn assign(&self, roles: Roles) {
        self.roles.store(roles.into());
    }

    /// An image, wherever an answer may have found it: the live table first.
    pub fn image(&self, id: &str) -> Option<Arc<Entry>> {
        let roles = self.roles.load();
        roles.all().find_map(|engine| engine.snapshots().newest().get(id))
    }

    /// Why answers are older than they should be, if they are: of the live table, or of the one that a
    /// candidate reads.
    pub fn behind(&self) -> Option<String> {
        let roles = self.roles.load();
        let beside = roles.beside.iter().filter(|_| roles.candidate.is_some());
        let mut read = std::iter::once(&roles.live).chain(beside);
        let behind = read.find(|engine| engine.is_behind())?;
        Some(format!(
            "the table of generation {} is not followed; follow.failed or snapshot.memory in the log says why",
            behind.served().generation
        ))
    }

    /// Answers a query, unless `left` says that nobody waits for it any more. Computes: call it from
    /// a thread that may block.
    pub fn search(&self, query: &Query, left: &CancellationToken) -> Result<Results, QueryError> {
        let roles = self.roles();
        let (engine, chosen) = roles.choose(query)?;
        let answer = engine.search_unless(&chosen, left);
        if roles.has_yet_to_come(engine, query, &answer) {
            return roles.live.search_unless(query, left);
        }
        if query.cursor.is_some()
            && matches!(answer, Err(QueryError::CursorExpired { .. } | QueryError::Invalid { .. }))
        {
            // A page that was turned before a promotion is turned further in its own generation.
            let other = roles.all().find(|other| !Arc::ptr_eq(other, engine));
            let page = other.and_then(|other| other.search_unless(&query.as_live(), left).ok());
            return page.map_or(answer, Ok);
        }
        if let (Ok(results), true) = (&answer, Arc::ptr_eq(engine, &roles.live)) {
            roles.shadow(query, results);
        }
        answer
    }

    /// Explains the place of one image in the answer to a query, unless `left` says that nobody waits
    /// for it any more. Computes: may block.
    pub fn explain(
        &self,
        query: &Query,
        image_id: &str,
        left: &CancellationToken,
    ) -> Result<Explanation, QueryError> {
        let roles = self.roles();
        let (engine, chosen) = roles.choose(query)?;
        let answer = engine.explain(&chosen, image_id, left);
        if roles.has_yet_to_come(engine, query, &answer) {
            return roles.live.explain(query, image_id, left);
        }
        answer
    }
}

impl Roles {
    /// The live engine, and the one beside it.
    fn all(&self) -> impl Iterator<Item = &Arc<Engine>> {
        std::iter::once(&self.live).chain(&self.beside)
    }

    /// Whether an image is not in the candidate's generation, which `engine` asked, maybe not yet, and
    /// nobody asked for the candidate by name: then the live one answers.
    fn has_yet_to_come<T>(
        &self,
        engine: &Arc<Engine>,
        query: &Query,
        answer: &Result<T, QueryError>,
    ) -> bool {
        !Arc::ptr_eq(engine, &self.live)
            && query.configuration.is_none()
            && matches!(answer, Err(QueryError::NoImage(_)))
    }

    /// Who answers, and what it is asked.
    fn choose<'a>(&self, query: &'a Query) -> Result<(&Arc<Engine>, Cow<'a, Query>), QueryError> {
        let Some((beside, candidate)) = self.beside.as_ref().zip(self.candidate.as_ref()) else {
            return Ok((&self.live, Cow::Borrowed(query)));
        };
        let asking = Asking {
            configuration: query.configuration.as_deref(),
            key: query.key.as_deref(),
            // A vector is one of the live model.
            own: query.is_own() || matches!(query.input, Input::Vector(_)),
            filter: query.filter.as_ref(),
        };
        // A share is taken over once the whole table is there; who asks by name is told to wait.
        let there = beside.snapshots().ready() || query.configuration.is_some();
        let chosen = route(&self.live.served().name, Some(candidate).filter(|_| there), asking)
            .map_err(|reason| QueryError::invalid("configuration", reason))?;
        Ok(match chosen {
            Route::Live => (&self.live, Cow::Borrowed(query)),
            Route::Candidate => (beside, Cow::Owned(query.as_live())),
        })
    }

    fn shadow(&self, query: &Query, results: &Results) {
        let Some((beside, candidate)) = self.beside.as_ref().zip(self.candidate.as_ref()) else {
            return;
        };
        let whole = query.cursor.is_none() && query.min_score.is_none();
        let own = query.is_own() || query.input.is_picture();
        if !whole || own || matches!(query.input, Input::Vector(_)) || !beside.snapshots().ready() {
            return;
        }
        let k = query.k.unwrap_or(beside.options().default_k);
        let live = &results.configuration;
        if let Some(shadow) = Shadow::begin(beside.shared_traffic(), candidate, live, query, k) {
            beside.shadow_of(shadow, query, &results.hits);
        }
    }
}
