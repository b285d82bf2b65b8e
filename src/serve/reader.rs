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
    CatalogueState, Generation, PromptSetRecord, REPORT_EVERY, Readers, Report, StateStore,
};
use crate::clip::Towers;
use crate::prompts::{ActiveSets, EmbeddedSet};
use crate::search::{Engine, Engines, FollowError, Roles, Served};
use crate::store::Store;
use crate::table::Follower;
use crate::telemetry::event;

/// How long a generation beside the live one that could not be followed is left alone, and a revision
/// for which there is no memory.
const TRY_AGAIN: Duration = Duration::from_secs(30);

/// What follows the catalogue for the engines of a query worker.
pub struct Reader {
    /// The catalogue.
    pub catalogue: Store,
    /// Answer queries; the live one is made for `state`.
    pub engines: Arc<Engines>,
    /// The models that this query worker was given.
    pub models: Vec<Arc<dyn Towers>>,
    /// The newest revision of the state that is known.
    pub state: CatalogueState,
    /// How often the state is looked at.
    pub poll: Duration,
}

/// A generation in memory.
struct Lane {
    engine: Arc<Engine>,
    following: JoinHandle<Result<(), FollowError>>,
    /// Ends the following.
    _guard: DropGuard,
}

/// The generations in memory, by id.
#[derive(Default)]
struct Lanes {
    open: BTreeMap<String, Lane>,
    /// Why the one beside could not be followed, and when that was.
    failed: Option<(Instant, String)>,
    /// Why a revision was not adopted for a generation, and when that was.
    refused: Option<(Instant, (u64, String), String)>,
}

impl Reader {
    /// Follows state and tables until `token` is cancelled, or the live table cannot be followed and
    /// was never whole. A change of the state is taken up whole or not at all: what is served stays
    /// while what the next revision needs is read and computed, and the two are swapped between two
    /// answers. Reports to `readers/` what it has, for those who wait for it.
    pub async fn run(mut self, token: CancellationToken) -> Result<(), FollowError> {
        let readers = Readers::new(&self.catalogue);
        let mut lanes = Lanes::default();
        let engine = self.engines.live();
        let lane = self.follow(&self.state.live, engine, &token).await?;
        lanes.open.insert(self.state.live.id.clone(), lane);
        let host = std::env::var("HOSTNAME").unwrap_or_else(|_| "unknown".into());
        let mut report = Report {
            id: format!("{:016x}", rand::random::<u64>()),
            host,
            generation: self.state.live.id.clone(),
            revision: 0,
            ready: false,
            at: Utc::now(),
            problem: None,
        };
        let mut told: Option<Instant> = None;
        let mut failed = None;
        let ended = loop {
            let before = report.clone();
            let step = self.step(&mut lanes, report.revision, &token);
            match while_heard(&readers, &report, REPORT_EVERY, step).await {
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
            let behind = self.engines.behind();
            report.generation.clone_from(&live.served().generation);
            report.ready = live.snapshots().ready() && behind.is_none();
            report.problem = failed.clone().or(behind);
            if report != before || told.is_none_or(|at| at.elapsed() >= REPORT_EVERY) {
                report.at = Utc::now();
                if tell(&readers, &report).await {
                    told = Some(Instant::now());
                }
            }
            if let Some(Err(error)) = lanes.ended(&report.generation).await {
                break Err(error);
            }
            tokio::select! {
                () = tokio::time::sleep(self.poll) => {}
                () = token.cancelled() => break Ok(()),
            }
        };
        readers.leave(&report.id).await;
        ended
    }

    /// Takes up the newest revision; gives the one whose all is in memory and served then.
    async fn step(
        &mut self,
        lanes: &mut Lanes,
        known: u64,
        token: &CancellationToken,
    ) -> Result<u64, ReindexError> {
        let states = StateStore::new(&self.catalogue);
        while let Some(newer) = states.after(self.state.revision).await? {
            self.state = newer;
        }
        if self.state.revision != known {
            self.take_up(lanes, token).await?;
        }
        Ok(self.state.revision)
    }

    async fn take_up(
        &self,
        lanes: &mut Lanes,
        token: &CancellationToken,
    ) -> Result<(), ReindexError> {
        let state = &self.state;
        let served = self.engines.live().served().generation.clone();
        let live = self.engine(&state.live, &state.prompt_sets, lanes, token).await?;
        let live = live.ok_or_else(|| {
            ReindexError::Refused(format!(
                "generation {} ({}) is live, this query worker has {served} in memory; restart it with the checkpoint of the live one",
                state.live.id, state.live.model_name
            ))
        })?;
        // What was live goes on answering until the other one is there as a whole.
        let promoted = served != state.live.id;
        if promoted && !live.snapshots().ready() {
            return Err(reading(&state.live.id));
        }
        lanes.adopt(&live, state, &state.prompt_sets, None).await?;
        // One that fails does not hold up what is live.
        let beside = match &state.beside {
            Some(beside) => {
                self.engine(&beside.generation, &beside.prompt_sets, lanes, token).await
            }
            None => Ok(None),
        };
        let other = beside.as_ref().ok().and_then(Option::as_ref);
        let roles = Roles {
            live,
            beside: other.cloned(),
            candidate: state.candidate_beside().map(|(candidate, _)| candidate.clone()),
        };
        // An engine that answers is not told that it stands beside before another one answers.
        if promoted {
            self.engines.assign(roles.clone());
        }
        if let (Some(engine), Some(beside)) = (other, &state.beside) {
            let id = &beside.generation.id;
            lanes.adopt(engine, state, &beside.prompt_sets, Some(id)).await?;
        }
        self.engines.assign(roles);
        self.engines.live().count_for(state.candidate.as_ref());
        // Followed until nothing is answered from it any more.
        lanes.open.retain(|id, _| state.generation(id).is_some());
        let Some((candidate, _)) = state.candidate_beside() else { return Ok(()) };
        match beside? {
            Some(engine) if engine.snapshots().ready() => Ok(()),
            Some(_) => Err(reading(&candidate.generation)),
            None => Err(ReindexError::Refused(format!(
                "candidate {} reads generation {}, whose model this query worker does not have; set search.candidate_checkpoint to it and restart this query worker",
                candidate.name, candidate.generation
            ))),
        }
    }

    /// The engine of a generation, made now where there is none yet; none where no model fits.
    async fn engine(
        &self,
        generation: &Generation,
        records: &[PromptSetRecord],
        lanes: &mut Lanes,
        token: &CancellationToken,
    ) -> Result<Option<Arc<Engine>>, ReindexError> {
        let id = &generation.id;
        let live = self.engines.live();
        if live.served().generation == *id {
            return Ok(Some(live));
        }
        if let Some(lane) = lanes.open.get(id) {
            let engine = lane.engine.clone();
            if let Some(Err(error)) = lanes.ended(id).await {
                lanes.open.remove(id);
                let why = format!("generation {id} cannot be held in memory: {error}");
                lanes.failed = Some((Instant::now(), why.clone()));
                return Err(ReindexError::Refused(why));
            }
            return Ok(Some(engine));
        }
        if let Some((at, why)) = &lanes.failed
            && at.elapsed() < TRY_AGAIN
        {
            return Err(ReindexError::Refused(why.clone()));
        }
        lanes.failed = None;
        let fits =
            |model: &&Arc<dyn Towers>| model.card().fingerprint == generation.model_fingerprint;
        let Some(towers) = self.models.iter().find(fits).cloned() else { return Ok(None) };
        let sets = embedded(ActiveSets::new(Vec::new()), records, towers.clone()).await?;
        let served = Served::beside(&self.state, id, sets, None);
        let engine = Arc::new(live.another(towers, served));
        let lane = self.follow(generation, engine.clone(), token).await?;
        lanes.open.insert(id.clone(), lane);
        Ok(Some(engine))
    }

    async fn follow(
        &self,
        generation: &Generation,
        engine: Arc<Engine>,
        token: &CancellationToken,
    ) -> Result<Lane, crate::table::TableError> {
        let follower = Follower::open(&self.catalogue, generation).await?;
        let (token, followed) = (token.child_token(), engine.clone());
        let until = token.clone();
        let following =
            tokio::spawn(async move { followed.follow(follower, until, &|_, _| {}).await });
        Ok(Lane { engine, following, _guard: token.drop_guard() })
    }
}

impl Lanes {
    /// Has `engine` serve what `state` says of the live generation, or of the one `beside` it. What
    /// was refused is left alone for a while: embedding prompts and looking again costs all cores.
    async fn adopt(
        &mut self,
        engine: &Arc<Engine>,
        state: &CatalogueState,
        records: &[PromptSetRecord],
        beside: Option<&str>,
    ) -> Result<(), ReindexError> {
        let what = (state.revision, beside.unwrap_or(&state.live.id).to_owned());
        if let Some((at, refused, why)) = &self.refused
            && (*refused == what && at.elapsed() < TRY_AGAIN)
        {
            return Err(ReindexError::Refused(why.clone()));
        }
        let adopted = adopt(engine, state, records, beside).await;
        self.refused = match &adopted {
            Err(ReindexError::Refused(why)) => Some((Instant::now(), what, why.clone())),
            _ => None,
        };
        adopted
    }

    /// How the following of a generation has ended, where it has.
    async fn ended(&mut self, id: &str) -> Option<Result<(), FollowError>> {
        let lane = self.open.get_mut(id).filter(|lane| lane.following.is_finished())?;
        match (&mut lane.following).await {
            Ok(result) => Some(result),
            Err(error) if error.is_panic() => std::panic::resume_unwind(error.into_panic()),
            Err(_) => None,
        }
    }
}

/// Does `work`, and repeats the last report meanwhile, `every` so often: who is silent is taken to be
/// gone, and a promotion would not wait for it.
async fn while_heard<T>(
    readers: &Readers,
    last: &Report,
    every: Duration,
    work: impl Future<Output = T>,
) -> T {
    tokio::pin!(work);
    loop {
        tokio::select! {
            done = &mut work => return done,
            () = tokio::time::sleep(every) => {}
        }
        tell(readers, &Report { at: Utc::now(), ..last.clone() }).await;
    }
}

/// Whether the report was stored. Promotions would wait for it or pass it over; queries do not depend on
/// it.
async fn tell(readers: &Readers, report: &Report) -> bool {
    let told = readers.report(report).await;
    if let Err(error) = &told {
        warn!(event = event::STATE_FAILED, %error, "this query worker could not report what it serves");
    }
    told.is_ok()
}

fn reading(generation: &str) -> ReindexError {
    ReindexError::Refused(format!("generation {generation} is being read"))
}

async fn adopt(
    engine: &Arc<Engine>,
    state: &CatalogueState,
    records: &[PromptSetRecord],
    beside: Option<&str>,
) -> Result<(), ReindexError> {
    let before = engine.served();
    let next = |sets| match beside {
        Some(id) => Served::beside(state, id, sets, Some(&before)),
        None => Served::of(state, sets),
    };
    let same = next(before.sets.clone());
    if before.revision == same.revision && before.stands_as == same.stands_as {
        return Ok(());
    }
    let started = Instant::now();
    let active = ActiveSets::new(before.sets.clone());
    let served = next(embedded(active, records, engine.model()).await?);
    let keys: Vec<&str> = served.sets.iter().map(|set| set.key.as_str()).collect();
    let (keys, told) = (keys.join(" "), served.clone());
    let engine = engine.clone();
    let adopted = tokio::task::spawn_blocking(move || engine.adopt(served, &|_, _| {}));
    let adopted = adopted.await.map_err(|panic| ReindexError::Broken(panic.to_string()))?;
    adopted.map_err(|error| ReindexError::Refused(error.to_string()))?;
    if beside.is_none() {
        info!(
            event = event::CONFIGURATION,
            revision = told.revision,
            generation = told.generation,
            configuration = told.name,
            prompt_sets = keys,
            ms = started.elapsed().as_millis() as u64,
            "queries are answered as this revision of the state says"
        );
    }
    Ok(())
}

async fn embedded(
    known: ActiveSets,
    records: &[PromptSetRecord],
    towers: Arc<dyn Towers>,
) -> Result<Vec<Arc<EmbeddedSet>>, ReindexError> {
    let records = records.to_vec();
    let sets = tokio::task::spawn_blocking(move || known.with_records(&records, &*towers));
    Ok(sets.await.map_err(|panic| ReindexError::Broken(panic.to_string()))??)
}

#[cfg(test)]
mod tests {
    use chrono::DateTime;

    use super::*;

    #[tokio::test]
    async fn who_is_busy_for_long_is_not_taken_to_be_gone() {
        let readers = Readers::new(&Store::memory());
        let report = Report {
            id: "busy".into(),
            host: String::new(),
            generation: "g".into(),
            revision: 1,
            ready: true,
            at: DateTime::UNIX_EPOCH,
            problem: None,
        };
        let every = Duration::from_millis(10);
        while_heard(&readers, &report, every, tokio::time::sleep(20 * every)).await;
        let all = readers.all(Utc::now()).await.unwrap();
        assert_eq!(all.len(), 1);
        assert!(!all[0].is_stale(Utc::now()) && !all[0].has(2));
    }
}
