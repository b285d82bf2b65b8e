//! Follows the catalogue's state and the tables that it names, so that a query worker serves a
//! promoted configuration, and loads the generation of a candidate, without a restart.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use chrono::Utc;
use tokio::task::JoinHandle;
use tokio_util::sync::{CancellationToken, DropGuard};
use tracing::{info, warn};

use super::error::ApplyStateError;
use crate::catalogue::{
    CatalogueState, PromptSetRecord, REPLICA_REPORT_INTERVAL, ReplicaReport, ReplicaReports,
    StateStore,
};
use crate::clip::Encoders;
use crate::prompts::{ActivePromptSets, EmbeddedPromptSet};
use crate::search::{Engine, EngineRoles, Engines, FollowError, ServingSnapshot};
use crate::store::Store;
use crate::table::{Follower, Generation, TableError};
use crate::telemetry::event;

/// How long the follower waits before it retries a standby generation that could not be loaded, or
/// a revision that could not be applied: both take all cores.
const RETRY_DELAY: Duration = Duration::from_secs(30);

/// Keeps the engines of a query worker up to date with the catalogue.
pub struct CatalogueFollower {
    /// Folder of the catalogue.
    pub catalogue: Store,
    /// The engines that answer queries; the live one serves the live generation of `state`.
    pub engines: Arc<Engines>,
    /// The models that this query worker has loaded.
    pub models: Vec<Arc<dyn Encoders>>,
    /// The newest known revision of the state.
    pub state: CatalogueState,
    /// How often the store is polled for newer revisions.
    pub poll_interval: Duration,
}

/// A generation in memory, and the task that follows its table.
struct LoadedGeneration {
    engine: Arc<Engine>,
    follow_task: JoinHandle<Result<(), FollowError>>,
    /// Ends `follow_task`.
    _cancel_on_drop: DropGuard,
}

/// The generations in memory, by id.
#[derive(Default)]
struct LoadedGenerations {
    by_id: BTreeMap<String, LoadedGeneration>,
    /// When the standby generation last could not be loaded, and why.
    last_load_failure: Option<(Instant, String)>,
    /// When a revision last could not be applied to a generation, which ones, and why.
    last_apply_failure: Option<(Instant, (u64, String), String)>,
}

impl CatalogueFollower {
    /// Follows the state and the tables until `cancel` is cancelled; fails if the live table cannot
    /// be followed before it was read completely. A revision is applied as a whole or not at all:
    /// while its tables are read and its prompts are embedded, the earlier revision is served, and
    /// the switch happens between two queries. Stores reports of what is served, for which
    /// promotions wait.
    pub async fn run(mut self, cancel: CancellationToken) -> Result<(), FollowError> {
        let reports = ReplicaReports::new(&self.catalogue);
        let mut loaded = LoadedGenerations::default();
        let engine = self.engines.live();
        let loaded_generation =
            self.start_following_table(&self.state.live, engine, &cancel).await?;
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
            banks: Vec::new(),
        };
        let mut reported_at: Option<Instant> = None;
        let mut apply_problem = None;
        let result = loop {
            let previous_report = report.clone();
            let apply = self.apply_newest_revision(&mut loaded, report.revision, &cancel);
            let apply = run_while_reporting(&reports, &report, REPLICA_REPORT_INTERVAL, apply);
            let Some(applied) = cancel.run_until_cancelled(apply).await else { break Ok(()) };
            match applied {
                Ok(revision) => {
                    report.revision = revision;
                    apply_problem = None;
                }
                Err(error) => {
                    let problem = Some(error.to_string());
                    if problem != apply_problem {
                        warn!(event = event::STATE_FAILED, %error, "the catalogue's state was not applied; the next poll tries again");
                    }
                    apply_problem = problem;
                }
            }
            let live = self.engines.live();
            let staleness = self.engines.staleness_reason();
            report.generation.clone_from(&live.serving_snapshot().generation_id);
            report.ready = live.snapshots().is_ready() && staleness.is_none();
            report.problem = apply_problem.clone().or(staleness);
            report.banks = self.engines.roles().measured_banks();
            if report != previous_report
                || reported_at.is_none_or(|at| at.elapsed() >= REPLICA_REPORT_INTERVAL)
            {
                report.reported_at = Utc::now();
                if store_report(&reports, &report).await {
                    reported_at = Some(Instant::now());
                }
            }
            if let Some(Err(error)) = loaded.follow_result(&report.generation).await {
                break Err(error);
            }
            tokio::select! {
                () = tokio::time::sleep(self.poll_interval) => {}
                () = cancel.cancelled() => break Ok(()),
            }
        };
        reports.remove(&report.id).await;
        result
    }

    /// Applies the newest revision, unless it is `applied_revision`, and returns its number.
    async fn apply_newest_revision(
        &mut self,
        loaded: &mut LoadedGenerations,
        applied_revision: u64,
        cancel: &CancellationToken,
    ) -> Result<u64, ApplyStateError> {
        let states = StateStore::new(&self.catalogue);
        while let Some(newer) = states.read_next(self.state.revision).await? {
            self.state = newer;
        }
        if self.state.revision != applied_revision {
            self.apply_state(loaded, cancel).await?;
        }
        Ok(self.state.revision)
    }

    /// Has the engines serve `self.state`; fails if a part of it cannot be served, or not yet.
    async fn apply_state(
        &self,
        loaded: &mut LoadedGenerations,
        cancel: &CancellationToken,
    ) -> Result<(), ApplyStateError> {
        let state = &self.state;
        let served_id = self.engines.live().serving_snapshot().generation_id.clone();
        let live =
            self.get_or_start_engine(&state.live, &state.prompt_sets, loaded, cancel).await?;
        let live = live.ok_or_else(|| {
            ApplyStateError::CannotServe(format!(
                "generation {} ({}) is live, this query worker has {served_id} in memory; restart it with the checkpoint of the live one",
                state.live.id, state.live.model_name
            ))
        })?;
        // The generation that was live answers until the promoted one is complete.
        let promoted = served_id != state.live.id;
        if promoted && !live.snapshots().is_ready() {
            return Err(still_loading_error(&state.live.id));
        }
        loaded.apply_state_to_engine(&live, state, &state.prompt_sets, None).await?;
        // A failure of the standby generation must not delay changes of the live one.
        let standby = match &state.standby {
            Some(standby) => {
                self.get_or_start_engine(&standby.generation, &standby.prompt_sets, loaded, cancel)
                    .await
            }
            None => Ok(None),
        };
        let standby_engine = standby.as_ref().ok().and_then(Option::as_ref);
        let roles = EngineRoles {
            live,
            standby: standby_engine.cloned(),
            candidate: state.standby_candidate().map(|(candidate, _)| candidate.clone()),
        };
        // Before the next step: the earlier engine must not adopt the role of standby while it
        // answers as the live one.
        if promoted {
            self.engines.assign_roles(roles.clone());
        }
        if let (Some(engine), Some(standby)) = (standby_engine, &state.standby) {
            let id = &standby.generation.id;
            loaded.apply_state_to_engine(engine, state, &standby.prompt_sets, Some(id)).await?;
        }
        self.engines.assign_roles(roles);
        self.engines.live().count_traffic_for(state.candidate.as_ref());
        // Dropping a generation stops following its table.
        loaded.by_id.retain(|id, _| state.find_generation(id).is_some());
        let Some((candidate, _)) = state.standby_candidate() else { return Ok(()) };
        match standby? {
            Some(engine) if engine.snapshots().is_ready() => Ok(()),
            Some(_) => Err(still_loading_error(&candidate.generation)),
            None => Err(ApplyStateError::CannotServe(format!(
                "candidate {} reads generation {}, whose model this query worker does not have; set search.standby_checkpoint to it and restart this query worker",
                candidate.name, candidate.generation
            ))),
        }
    }

    /// Returns the engine of a generation; if there is none, creates it and starts to follow the
    /// table. `None` if none of the models filled the generation.
    async fn get_or_start_engine(
        &self,
        generation: &Generation,
        records: &[PromptSetRecord],
        loaded: &mut LoadedGenerations,
        cancel: &CancellationToken,
    ) -> Result<Option<Arc<Engine>>, ApplyStateError> {
        let id = &generation.id;
        let live = self.engines.live();
        if live.serving_snapshot().generation_id == *id {
            return Ok(Some(live));
        }
        if let Some(loaded_generation) = loaded.by_id.get(id) {
            let engine = loaded_generation.engine.clone();
            if let Some(Err(error)) = loaded.follow_result(id).await {
                loaded.by_id.remove(id);
                let reason = format!("generation {id} cannot be held in memory: {error}");
                loaded.last_load_failure = Some((Instant::now(), reason.clone()));
                return Err(ApplyStateError::CannotServe(reason));
            }
            return Ok(Some(engine));
        }
        if let Some((failed_at, reason)) = &loaded.last_load_failure
            && failed_at.elapsed() < RETRY_DELAY
        {
            return Err(ApplyStateError::CannotServe(reason.clone()));
        }
        loaded.last_load_failure = None;
        let filled_generation =
            |model: &&Arc<dyn Encoders>| model.card().fingerprint == generation.model_fingerprint;
        let Some(encoders) = self.models.iter().find(filled_generation).cloned() else {
            return Ok(None);
        };
        let sets =
            embed_prompt_sets(ActivePromptSets::new(Vec::new()), records, encoders.clone()).await?;
        let serving = ServingSnapshot::for_standby(&self.state, id, sets, None);
        let engine = Arc::new(live.for_generation(encoders, serving));
        let loaded_generation =
            self.start_following_table(generation, engine.clone(), cancel).await?;
        loaded.by_id.insert(id.clone(), loaded_generation);
        Ok(Some(engine))
    }

    async fn start_following_table(
        &self,
        generation: &Generation,
        engine: Arc<Engine>,
        cancel: &CancellationToken,
    ) -> Result<LoadedGeneration, TableError> {
        let follower = Follower::open(&self.catalogue, generation).await?;
        let (cancel, task_engine) = (cancel.child_token(), engine.clone());
        let task_cancel = cancel.clone();
        let follow_task = tokio::spawn(async move {
            task_engine.follow_table(follower, task_cancel, &|_, _| {}).await
        });
        Ok(LoadedGeneration { engine, follow_task, _cancel_on_drop: cancel.drop_guard() })
    }
}

impl LoadedGenerations {
    /// Makes `engine` serve the live generation of `state`, or the standby generation `standby_id`.
    /// After a failure, retries the same revision only after [`RETRY_DELAY`].
    async fn apply_state_to_engine(
        &mut self,
        engine: &Arc<Engine>,
        state: &CatalogueState,
        records: &[PromptSetRecord],
        standby_id: Option<&str>,
    ) -> Result<(), ApplyStateError> {
        let revision_and_generation =
            (state.revision, standby_id.unwrap_or(&state.live.id).to_owned());
        if let Some((failed_at, failed, reason)) = &self.last_apply_failure
            && (*failed == revision_and_generation && failed_at.elapsed() < RETRY_DELAY)
        {
            return Err(ApplyStateError::CannotServe(reason.clone()));
        }
        let result = adopt_state(engine, state, records, standby_id).await;
        self.last_apply_failure = match &result {
            Err(ApplyStateError::CannotServe(reason)) => {
                Some((Instant::now(), revision_and_generation, reason.clone()))
            }
            _ => None,
        };
        result
    }

    /// Returns the result of following a generation's table; `None` while it is followed.
    async fn follow_result(&mut self, id: &str) -> Option<Result<(), FollowError>> {
        let loaded_generation =
            self.by_id.get_mut(id).filter(|loaded| loaded.follow_task.is_finished())?;
        match (&mut loaded_generation.follow_task).await {
            Ok(result) => Some(result),
            Err(error) if error.is_panic() => std::panic::resume_unwind(error.into_panic()),
            Err(_) => None,
        }
    }
}

/// Runs `work`, and stores the last report again every `interval` in the meantime: a query worker
/// that does not report is taken for stopped, and promotions do not wait for it.
async fn run_while_reporting<T>(
    reports: &ReplicaReports,
    last_report: &ReplicaReport,
    interval: Duration,
    work: impl Future<Output = T>,
) -> T {
    tokio::pin!(work);
    loop {
        tokio::select! {
            output = &mut work => return output,
            () = tokio::time::sleep(interval) => {}
        }
        let report = ReplicaReport { reported_at: Utc::now(), ..last_report.clone() };
        store_report(reports, &report).await;
    }
}

/// Stores a report and returns whether that succeeded. A failure is only logged: queries do not
/// depend on reports.
async fn store_report(reports: &ReplicaReports, report: &ReplicaReport) -> bool {
    let stored = reports.write(report).await;
    if let Err(error) = &stored {
        warn!(event = event::STATE_FAILED, %error, "this query worker could not report what it serves");
    }
    stored.is_ok()
}

fn still_loading_error(generation: &str) -> ApplyStateError {
    ApplyStateError::CannotServe(format!("generation {generation} is being read"))
}

/// Embeds the prompt sets of `records` that `engine` does not have and switches to the new
/// configuration, unless `engine` serves it already.
async fn adopt_state(
    engine: &Arc<Engine>,
    state: &CatalogueState,
    records: &[PromptSetRecord],
    standby_id: Option<&str>,
) -> Result<(), ApplyStateError> {
    let current = engine.serving_snapshot();
    let build_next = |sets| match standby_id {
        Some(id) => ServingSnapshot::for_standby(state, id, sets, Some(&current)),
        None => ServingSnapshot::from_state(state, sets),
    };
    let with_current_sets = build_next(current.prompt_sets.clone());
    if current.state_revision == with_current_sets.state_revision
        && current.role == with_current_sets.role
    {
        return Ok(());
    }
    let started = Instant::now();
    let active = ActivePromptSets::new(current.prompt_sets.clone());
    let next = build_next(embed_prompt_sets(active, records, engine.shared_encoders()).await?);
    let keys: Vec<&str> = next.prompt_sets.iter().map(|set| set.statistics_key.as_str()).collect();
    let (keys, applied) = (keys.join(" "), next.clone());
    let engine = engine.clone();
    tokio::task::spawn_blocking(move || engine.switch_serving(next, &|_, _| {}))
        .await
        .map_err(|panic| ApplyStateError::Panicked(panic.to_string()))?
        .map_err(|error| ApplyStateError::CannotServe(error.to_string()))?;
    if standby_id.is_none() {
        info!(
            event = event::CONFIGURATION_APPLIED,
            revision = applied.state_revision,
            generation = applied.generation_id,
            configuration = applied.configuration_name,
            prompt_sets = keys,
            duration_ms = started.elapsed().as_millis() as u64,
            "this revision of the state is served"
        );
    }
    Ok(())
}

/// Returns the sets of `records`: those of `active` as they are, the others embedded.
async fn embed_prompt_sets(
    active: ActivePromptSets,
    records: &[PromptSetRecord],
    encoders: Arc<dyn Encoders>,
) -> Result<Vec<Arc<EmbeddedPromptSet>>, ApplyStateError> {
    let records = records.to_vec();
    let sets = tokio::task::spawn_blocking(move || active.resolve_records(&records, &*encoders));
    Ok(sets.await.map_err(|panic| ApplyStateError::Panicked(panic.to_string()))??)
}

#[cfg(test)]
mod tests {
    use chrono::DateTime;

    use super::*;

    #[tokio::test]
    async fn a_busy_query_worker_keeps_reporting() {
        let reports = ReplicaReports::new(&Store::in_memory());
        let report = ReplicaReport {
            id: "busy".into(),
            host: String::new(),
            generation: "g".into(),
            revision: 1,
            ready: true,
            reported_at: DateTime::UNIX_EPOCH,
            problem: None,
            banks: Vec::new(),
        };
        let interval = Duration::from_millis(10);
        run_while_reporting(&reports, &report, interval, tokio::time::sleep(20 * interval)).await;
        let all = reports.list_and_remove_expired(Utc::now()).await.unwrap();
        assert_eq!(all.len(), 1);
        assert!(!all[0].is_stale(Utc::now()) && !all[0].serves_revision_or_later(2));
    }
}
