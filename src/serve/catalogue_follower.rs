//! A query worker follows the catalogue's state and the tables that it names: it serves what a
//! promotion says, and takes a candidate into memory, without a restart.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use chrono::Utc;
use tokio::task::JoinHandle;
use tokio_util::sync::{CancellationToken, DropGuard};
use tracing::{info, warn};

use crate::backfill::ReindexError;
use crate::catalogue::{
    CatalogueState, PromptSetRecord, REPLICA_REPORT_INTERVAL, ReplicaReport, ReplicaReports,
    StateStore,
};
use crate::clip::Encoders;
use crate::prompts::{ActivePromptSets, EmbeddedPromptSet};
use crate::search::{Engine, EngineRoles, Engines, FollowError, ServingSnapshot};
use crate::store::Store;
use crate::table::{Follower, Generation};
use crate::telemetry::event;

/// How long a generation beside the live one that could not be followed is left alone, and a revision
/// for which there is no memory.
const RETRY_DELAY: Duration = Duration::from_secs(30);

/// What follows the catalogue for the engines of a query worker.
pub struct CatalogueFollower {
    /// The catalogue.
    pub catalogue: Store,
    /// Answer queries; the live one is made for `state`.
    pub engines: Arc<Engines>,
    /// The models that this query worker was given.
    pub models: Vec<Arc<dyn Encoders>>,
    /// The newest revision of the state that is known.
    pub state: CatalogueState,
    /// How often the state is looked at.
    pub poll_interval: Duration,
}

/// A generation in memory.
struct LoadedGeneration {
    engine: Arc<Engine>,
    follow_task: JoinHandle<Result<(), FollowError>>,
    /// Ends the following.
    _cancel_on_drop: DropGuard,
}

/// The generations in memory, by id.
#[derive(Default)]
struct LoadedGenerations {
    by_id: BTreeMap<String, LoadedGeneration>,
    /// Why the one beside could not be followed, and when that was.
    last_failure: Option<(Instant, String)>,
    /// Why a revision was not adopted for a generation, and when that was.
    last_refusal: Option<(Instant, (u64, String), String)>,
}

impl CatalogueFollower {
    /// Follows state and tables until `token` is cancelled, or the live table cannot be followed and
    /// was never whole. A change of the state is taken up whole or not at all: what is served stays
    /// while what the next revision needs is read and computed, and the two are swapped between two
    /// answers. Reports to `readers/` what it has, for those who wait for it.
    pub async fn run(mut self, token: CancellationToken) -> Result<(), FollowError> {
        let readers = ReplicaReports::new(&self.catalogue);
        let mut loaded = LoadedGenerations::default();
        let engine = self.engines.live();
        let loaded_generation = self.start_following(&self.state.live, engine, &token).await?;
        loaded.by_id.insert(self.state.live.id.clone(), loaded_generation);
        let host = std::env::var("HOSTNAME").unwrap_or_else(|_| "unknown".into());
        let mut report = ReplicaReport {
            id: format!("{:016x}", rand::random::<u64>()),
            host,
            generation: self.state.live.id.clone(),
            revision: 0,
            ready: false,
            reported_at: Utc::now(),
            problem: None,
        };
        let mut reported_at: Option<Instant> = None;
        let mut failed = None;
        let ended = loop {
            let before = report.clone();
            let step = self.apply_newest_revision(&mut loaded, report.revision, &token);
            let step = run_with_heartbeat(&readers, &report, REPLICA_REPORT_INTERVAL, step);
            let Some(applied) = token.run_until_cancelled(step).await else { break Ok(()) };
            match applied {
                Ok(revision) => {
                    report.revision = revision;
                    failed = None;
                }
                Err(error) => {
                    let problem = Some(error.to_string());
                    if problem != failed {
                        warn!(event = event::STATE_FAILED, %error, "the catalogue's state was not taken up; the next look tries again");
                    }
                    failed = problem;
                }
            }
            let live = self.engines.live();
            let behind = self.engines.staleness_reason();
            report.generation.clone_from(&live.serving_snapshot().generation_id);
            report.ready = live.snapshots().is_ready() && behind.is_none();
            report.problem = failed.clone().or(behind);
            if report != before
                || reported_at.is_none_or(|at| at.elapsed() >= REPLICA_REPORT_INTERVAL)
            {
                report.reported_at = Utc::now();
                if store_report(&readers, &report).await {
                    reported_at = Some(Instant::now());
                }
            }
            if let Some(Err(error)) = loaded.follow_result(&report.generation).await {
                break Err(error);
            }
            tokio::select! {
                () = tokio::time::sleep(self.poll_interval) => {}
                () = token.cancelled() => break Ok(()),
            }
        };
        readers.remove(&report.id).await;
        ended
    }

    /// Takes up the newest revision; gives the one whose all is in memory and served then.
    async fn apply_newest_revision(
        &mut self,
        loaded: &mut LoadedGenerations,
        known: u64,
        token: &CancellationToken,
    ) -> Result<u64, ReindexError> {
        let states = StateStore::new(&self.catalogue);
        while let Some(newer) = states.read_next(self.state.revision).await? {
            self.state = newer;
        }
        if self.state.revision != known {
            self.apply_state(loaded, token).await?;
        }
        Ok(self.state.revision)
    }

    async fn apply_state(
        &self,
        loaded: &mut LoadedGenerations,
        token: &CancellationToken,
    ) -> Result<(), ReindexError> {
        let state = &self.state;
        let served = self.engines.live().serving_snapshot().generation_id.clone();
        let live = self.get_or_start_engine(&state.live, &state.prompt_sets, loaded, token).await?;
        let live = live.ok_or_else(|| {
            ReindexError::Refused(format!(
                "generation {} ({}) is live, this query worker has {served} in memory; restart it with the checkpoint of the live one",
                state.live.id, state.live.model_name
            ))
        })?;
        // What was live goes on answering until the other one is there as a whole.
        let promoted = served != state.live.id;
        if promoted && !live.snapshots().is_ready() {
            return Err(still_loading_error(&state.live.id));
        }
        loaded.apply_state_to_engine(&live, state, &state.prompt_sets, None).await?;
        // One that fails does not hold up what is live.
        let beside = match &state.standby {
            Some(beside) => {
                self.get_or_start_engine(&beside.generation, &beside.prompt_sets, loaded, token)
                    .await
            }
            None => Ok(None),
        };
        let other = beside.as_ref().ok().and_then(Option::as_ref);
        let roles = EngineRoles {
            live,
            standby: other.cloned(),
            candidate: state.standby_candidate().map(|(candidate, _)| candidate.clone()),
        };
        // An engine that answers is not told that it stands beside before another one answers.
        if promoted {
            self.engines.assign_roles(roles.clone());
        }
        if let (Some(engine), Some(beside)) = (other, &state.standby) {
            let id = &beside.generation.id;
            loaded.apply_state_to_engine(engine, state, &beside.prompt_sets, Some(id)).await?;
        }
        self.engines.assign_roles(roles);
        self.engines.live().count_traffic_for(state.candidate.as_ref());
        // Followed until nothing is answered from it any more.
        loaded.by_id.retain(|id, _| state.find_generation(id).is_some());
        let Some((candidate, _)) = state.standby_candidate() else { return Ok(()) };
        match beside? {
            Some(engine) if engine.snapshots().is_ready() => Ok(()),
            Some(_) => Err(still_loading_error(&candidate.generation)),
            None => Err(ReindexError::Refused(format!(
                "candidate {} reads generation {}, whose model this query worker does not have; set search.standby_checkpoint to it and restart this query worker",
                candidate.name, candidate.generation
            ))),
        }
    }

    /// The engine of a generation, made now where there is none yet; none where no model fits.
    async fn get_or_start_engine(
        &self,
        generation: &Generation,
        records: &[PromptSetRecord],
        loaded: &mut LoadedGenerations,
        token: &CancellationToken,
    ) -> Result<Option<Arc<Engine>>, ReindexError> {
        let id = &generation.id;
        let live = self.engines.live();
        if live.serving_snapshot().generation_id == *id {
            return Ok(Some(live));
        }
        if let Some(loaded_generation) = loaded.by_id.get(id) {
            let engine = loaded_generation.engine.clone();
            if let Some(Err(error)) = loaded.follow_result(id).await {
                loaded.by_id.remove(id);
                let why = format!("generation {id} cannot be held in memory: {error}");
                loaded.last_failure = Some((Instant::now(), why.clone()));
                return Err(ReindexError::Refused(why));
            }
            return Ok(Some(engine));
        }
        if let Some((at, why)) = &loaded.last_failure
            && at.elapsed() < RETRY_DELAY
        {
            return Err(ReindexError::Refused(why.clone()));
        }
        loaded.last_failure = None;
        let fits =
            |model: &&Arc<dyn Encoders>| model.card().fingerprint == generation.model_fingerprint;
        let Some(towers) = self.models.iter().find(fits).cloned() else { return Ok(None) };
        let sets =
            embed_prompt_sets(ActivePromptSets::new(Vec::new()), records, towers.clone()).await?;
        let served = ServingSnapshot::for_standby(&self.state, id, sets, None);
        let engine = Arc::new(live.for_generation(towers, served));
        let loaded_generation = self.start_following(generation, engine.clone(), token).await?;
        loaded.by_id.insert(id.clone(), loaded_generation);
        Ok(Some(engine))
    }

    async fn start_following(
        &self,
        generation: &Generation,
        engine: Arc<Engine>,
        token: &CancellationToken,
    ) -> Result<LoadedGeneration, crate::table::TableError> {
        let follower = Follower::open(&self.catalogue, generation).await?;
        let (token, followed) = (token.child_token(), engine.clone());
        let until = token.clone();
        let following =
            tokio::spawn(async move { followed.follow_table(follower, until, &|_, _| {}).await });
        Ok(LoadedGeneration { engine, follow_task: following, _cancel_on_drop: token.drop_guard() })
    }
}

impl LoadedGenerations {
    /// Has `engine` serve what `state` says of the live generation, or of the one `beside` it. What
    /// was refused is left alone for a while: embedding prompts and looking again costs all cores.
    async fn apply_state_to_engine(
        &mut self,
        engine: &Arc<Engine>,
        state: &CatalogueState,
        records: &[PromptSetRecord],
        standby_id: Option<&str>,
    ) -> Result<(), ReindexError> {
        let revision_and_generation =
            (state.revision, standby_id.unwrap_or(&state.live.id).to_owned());
        if let Some((at, refused, why)) = &self.last_refusal
            && (*refused == revision_and_generation && at.elapsed() < RETRY_DELAY)
        {
            return Err(ReindexError::Refused(why.clone()));
        }
        let adopted = adopt_state(engine, state, records, standby_id).await;
        self.last_refusal = match &adopted {
            Err(ReindexError::Refused(why)) => {
                Some((Instant::now(), revision_and_generation, why.clone()))
            }
            _ => None,
        };
        adopted
    }

    /// How the following of a generation has ended, where it has.
    async fn follow_result(&mut self, id: &str) -> Option<Result<(), FollowError>> {
        let loaded_generation =
            self.by_id.get_mut(id).filter(|lane| lane.follow_task.is_finished())?;
        match (&mut loaded_generation.follow_task).await {
            Ok(result) => Some(result),
            Err(error) if error.is_panic() => std::panic::resume_unwind(error.into_panic()),
            Err(_) => None,
        }
    }
}

/// Does `work`, and repeats the last report meanwhile, `every` so often: who is silent is taken to be
/// gone, and a promotion would not wait for it.
async fn run_with_heartbeat<T>(
    readers: &ReplicaReports,
    last: &ReplicaReport,
    every: Duration,
    work: impl Future<Output = T>,
) -> T {
    tokio::pin!(work);
    loop {
        tokio::select! {
            done = &mut work => return done,
            () = tokio::time::sleep(every) => {}
        }
        store_report(readers, &ReplicaReport { reported_at: Utc::now(), ..last.clone() }).await;
    }
}

/// Whether the report was stored. Promotions would wait for it or pass it over; queries do not depend on
/// it.
async fn store_report(readers: &ReplicaReports, report: &ReplicaReport) -> bool {
    let stored = readers.write(report).await;
    if let Err(error) = &stored {
        warn!(event = event::STATE_FAILED, %error, "this query worker could not report what it serves");
    }
    stored.is_ok()
}

fn still_loading_error(generation: &str) -> ReindexError {
    ReindexError::Refused(format!("generation {generation} is being read"))
}

async fn adopt_state(
    engine: &Arc<Engine>,
    state: &CatalogueState,
    records: &[PromptSetRecord],
    standby_id: Option<&str>,
) -> Result<(), ReindexError> {
    let before = engine.serving_snapshot();
    let next = |sets| match standby_id {
        Some(id) => ServingSnapshot::for_standby(state, id, sets, Some(&before)),
        None => ServingSnapshot::from_state(state, sets),
    };
    let same = next(before.prompt_sets.clone());
    if before.state_revision == same.state_revision && before.role == same.role {
        return Ok(());
    }
    let started = Instant::now();
    let active = ActivePromptSets::new(before.prompt_sets.clone());
    let served = next(embed_prompt_sets(active, records, engine.shared_encoders()).await?);
    let keys: Vec<&str> =
        served.prompt_sets.iter().map(|set| set.statistics_key.as_str()).collect();
    let (keys, logged) = (keys.join(" "), served.clone());
    let engine = engine.clone();
    let adopted = tokio::task::spawn_blocking(move || engine.switch_serving(served, &|_, _| {}));
    let adopted = adopted.await.map_err(|panic| ReindexError::Panicked(panic.to_string()))?;
    adopted.map_err(|error| ReindexError::Refused(error.to_string()))?;
    if standby_id.is_none() {
        info!(
            event = event::CONFIGURATION_APPLIED,
            revision = logged.state_revision,
            generation = logged.generation_id,
            configuration = logged.configuration_name,
            prompt_sets = keys,
            duration_ms = started.elapsed().as_millis() as u64,
            "queries are answered as this revision of the state says"
        );
    }
    Ok(())
}

async fn embed_prompt_sets(
    known: ActivePromptSets,
    records: &[PromptSetRecord],
    encoders: Arc<dyn Encoders>,
) -> Result<Vec<Arc<EmbeddedPromptSet>>, ReindexError> {
    let records = records.to_vec();
    let sets = tokio::task::spawn_blocking(move || known.resolve_records(&records, &*encoders));
    Ok(sets.await.map_err(|panic| ReindexError::Panicked(panic.to_string()))??)
}

#[cfg(test)]
mod tests {
    use chrono::DateTime;

    use super::*;

    #[tokio::test]
    async fn a_busy_query_worker_keeps_reporting() {
        let readers = ReplicaReports::new(&Store::in_memory());
        let report = ReplicaReport {
            id: "busy".into(),
            host: String::new(),
            generation: "g".into(),
            revision: 1,
            ready: true,
            reported_at: DateTime::UNIX_EPOCH,
            problem: None,
        };
        let every = Duration::from_millis(10);
        run_with_heartbeat(&readers, &report, every, tokio::time::sleep(20 * every)).await;
        let all = readers.list(Utc::now()).await.unwrap();
        assert_eq!(all.len(), 1);
        assert!(!all[0].is_stale(Utc::now()) && !all[0].serves_revision(2));
    }
}
