//! A query worker follows the catalogue's state: it serves what a promotion says, and takes a
//! candidate into memory, without a restart.

use std::sync::Arc;
use std::time::{Duration, Instant};

use chrono::Utc;
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};

use super::ReindexError;
use crate::prompts::ActiveSets;
use crate::search::{Engine, Served};
use crate::store::Store;
use crate::table::{CatalogueState, REPORT_EVERY, Readers, Report, StateStore};
use crate::telemetry::event;

/// What follows the state for one engine.
pub struct Reader {
    /// The catalogue.
    pub catalogue: Store,
    /// Answers queries.
    pub engine: Arc<Engine>,
    /// The generation that it has in memory.
    pub generation: String,
    /// How often the state is looked at.
    pub poll: Duration,
}

impl Reader {
    /// Follows the state until `token` is cancelled. A change is taken up whole or not at all: what
    /// is served stays while what the next revision needs is computed, and the two are swapped
    /// between two answers. Reports to `readers/` what it has, for those who wait for it.
    pub async fn run(self, token: CancellationToken) {
        let states = StateStore::new(&self.catalogue);
        let readers = Readers::new(&self.catalogue);
        let host = std::env::var("HOSTNAME").unwrap_or_else(|_| "unknown".into());
        let mut report = Report {
            id: format!("{:016x}", rand::random::<u64>()),
            host,
            generation: self.generation.clone(),
            revision: self.engine.served().revision,
            ready: false,
            at: Utc::now(),
            problem: None,
        };
        let mut told: Option<Instant> = None;
        loop {
            let before = (report.revision, report.ready, report.problem.clone());
            match self.step(&states, report.revision).await {
                Ok(revision) => {
                    report.revision = revision;
                    report.problem = None;
                }
                Err(error) => {
                    let problem = Some(error.to_string());
                    if problem != report.problem {
                        warn!(event = event::STATE_FAILED, %error, "the catalogue's state was not taken up; the next look tries again");
                    }
                    report.problem = problem;
                }
            }
            report.ready = self.engine.snapshots().ready();
            let changed = before != (report.revision, report.ready, report.problem.clone());
            if changed || told.is_none_or(|at| at.elapsed() >= REPORT_EVERY) {
                report.at = Utc::now();
                match readers.report(&report).await {
                    Ok(()) => told = Some(Instant::now()),
                    // Promotions would wait for it or pass it over; queries do not depend on it.
                    Err(error) => {
                        warn!(event = event::STATE_FAILED, %error, "this query worker could not report what it serves");
                    }
                }
            }
            tokio::select! {
                () = tokio::time::sleep(self.poll) => {}
                () = token.cancelled() => break,
            }
        }
        readers.leave(&report.id).await;
    }

    /// Takes up the newest revision after `known`; gives the one that is served then.
    async fn step(&self, states: &StateStore, known: u64) -> Result<u64, ReindexError> {
        let Some(mut state) = states.after(known).await? else { return Ok(known) };
        while let Some(newer) = states.after(state.revision).await? {
            state = newer;
        }
        let revision = state.revision;
        let started = Instant::now();
        let (name, keys) = self.take_up(state).await?;
        info!(
            event = event::CONFIGURATION,
            revision,
            configuration = name,
            prompt_sets = keys,
            ms = started.elapsed().as_millis() as u64,
            "queries are answered as this revision of the state says"
        );
        Ok(revision)
    }

    async fn take_up(&self, state: CatalogueState) -> Result<(String, String), ReindexError> {
        if state.live.id != self.generation {
            return Err(ReindexError::Refused(format!(
                "generation {} ({}) is live, this query worker has {} in memory; restart it with the checkpoint of the live one",
                state.live.id, state.live.model_name, self.generation
            )));
        }
        let engine = self.engine.clone();
        let taken = tokio::task::spawn_blocking(move || {
            let sets = ActiveSets::new(engine.served().sets.clone());
            let sets = sets.with_records(&state.prompt_sets, engine.towers())?;
            let keys = sets.iter().map(|s| s.key.as_str()).collect::<Vec<_>>().join(" ");
            let name = state.name.clone();
            engine
                .adopt(Served::of(&state, sets), &|_, _| {})
                .map_err(|error| ReindexError::Refused(error.to_string()))?;
            Ok::<_, ReindexError>((name, keys))
        });
        taken.await.map_err(|panic| ReindexError::Broken(panic.to_string()))?
    }
}
