//! Questions and answers: text to embedding, one scan, both rankings, and why.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};
use tokio_util::sync::CancellationToken;
use tracing::{debug, error, info};

use super::Options;
use super::batch::{Batches, Reply, Want};
use super::memory::{self, OverMemory};
use super::rank::Hit;
use super::scan::Ask;
use super::snapshot::{Served, Snapshot, Snapshots};
use super::told::{Told, query_hash};
use super::traffic::{Asking, Difference, Route, Traffic, TrafficCounts, route};
use crate::calibration::Background;
use crate::clip::{ClipError, Towers};
use crate::metrics;
use crate::normalise::{Balance, Normaliser};
use crate::prompts::EmbeddedSet;
use crate::retry::{Backoff, Decide, Verdict};
use crate::statistics::Statistics;
use crate::table::{Follower, Serving, TableError};
use crate::telemetry::event;

/// What is asked. Whatever is not said is answered as the catalogue's state says.
#[derive(Debug, Clone, Default)]
pub struct Query {
    /// The text.
    pub text: String,
    /// How many results.
    pub k: Option<usize>,
    /// Name or key of a prompt set.
    pub prompt_set: Option<String>,
    /// Which formula.
    pub normaliser: Option<Normaliser>,
    /// Weight of the balanced score.
    pub weight: Option<f32>,
    /// λ of `nnn`.
    pub lambda: Option<f32>,
    /// The trace that the question belongs to, for the log.
    pub trace_id: Option<String>,
    /// Which configuration answers: `live`, `candidate`, or the name of one of them.
    pub configuration: Option<String>,
    /// What the caller is told apart by, for the candidate's share: the same key is always answered
    /// by the same configuration.
    pub key: Option<String>,
}

/// A question that cannot be answered.
#[derive(Debug, thiserror::Error)]
pub enum QueryError {
    /// A field of the request is wrong.
    #[error("{field}: {reason}")]
    Invalid {
        /// Which field.
        field: &'static str,
        /// Why, and what would be right.
        reason: String,
    },
    /// The snapshot is not whole yet.
    #[error("the catalogue is still being loaded; try again in a moment")]
    NotReady,
    /// No live image has this id.
    #[error("image {0:?} is not in the catalogue")]
    NoImage(String),
    /// As many queries wait as may.
    #[error("{0} queries wait already (search.waiting)")]
    Busy(usize),
    /// The caller left, or the engine stops.
    #[error("the query was given up")]
    GivenUp,
    /// The text tower failed.
    #[error(transparent)]
    Model(#[from] ClipError),
}

/// The table cannot be followed.
#[derive(Debug, thiserror::Error)]
pub enum FollowError {
    /// It cannot be read.
    #[error(transparent)]
    Table(#[from] TableError),
    /// It does not fit into memory.
    #[error(transparent)]
    Memory(#[from] OverMemory),
}

/// How long the parts of an answer took, in milliseconds.
#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
pub struct Timings {
    /// Embedding the text; 0 where it was remembered.
    pub text_ms: f64,
    /// Waiting for a pass over the catalogue that other queries share.
    pub wait_ms: f64,
    /// That pass.
    pub scan_ms: f64,
    /// From its bounds to exact scores and places.
    pub rank_ms: f64,
}

/// An answer: the best by balanced and by raw score, from one scan.
#[derive(Debug)]
pub struct Results {
    /// Version of the table.
    pub version: u64,
    /// Prompt set that was used.
    pub set: Arc<EmbeddedSet>,
    /// Normaliser, weight and constants that were used.
    pub balance: Balance,
    /// Images in the catalogue.
    pub scanned: usize,
    /// Images that were ranked.
    pub matched: usize,
    /// Moments of the balanced scores of those.
    pub background: Background,
    /// What was served when it was answered.
    pub served: Arc<Served>,
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
}

/// A prompt and the score that an image gives it.
#[derive(Debug, Clone, Serialize)]
pub struct ScoredPrompt {
    /// The prompt.
    pub text: String,
    /// Its score.
    pub score: f32,
}

/// Why an image ranks where it does.
#[derive(Debug)]
pub struct Explanation {
    /// Its scores and places.
    pub hit: Hit,
    /// Its statistics.
    pub statistics: Option<Statistics>,
    /// All prompts with its scores, strongest first.
    pub prompts: Vec<ScoredPrompt>,
    /// Images scanned.
    pub scanned: usize,
    /// Normaliser, weight and constants that were used.
    pub balance: Balance,
    /// Prompt set that was used.
    pub set: Arc<EmbeddedSet>,
    /// In plain words.
    pub sentence: String,
}

/// Answers queries over the newest snapshot.
pub struct Engine {
    towers: Arc<dyn Towers>,
    options: Options,
    snapshots: Snapshots,
    cache: Mutex<HashMap<String, Arc<Vec<f32>>>>,
    batches: Arc<Batches>,
    traffic: Arc<Traffic>,
}

impl Engine {
    /// An engine that answers as `served` says, until [`Engine::adopt`].
    pub fn new(towers: Arc<dyn Towers>, served: Served, options: Options) -> Self {
        Self {
            towers,
            snapshots: Snapshots::new(served, memory::limit(options.memory_mib)),
            cache: Mutex::default(),
            batches: Arc::new(Batches::start(&options)),
            traffic: Arc::default(),
            options,
        }
    }

    /// The snapshots.
    pub fn snapshots(&self) -> &Snapshots {
        &self.snapshots
    }

    /// The model.
    pub fn towers(&self) -> &dyn Towers {
        &*self.towers
    }

    /// The prompt sets that a query may name, and how queries are answered unless they say
    /// otherwise.
    pub fn served(&self) -> Arc<Served> {
        self.snapshots.newest().served.clone()
    }

    /// Serves `served` from one moment to the next: an answer uses either the old configuration or
    /// the new one. What images lack of the statistics of its sets is computed before; queries and
    /// commits go on meanwhile. `progress` hears of images done and images in all. Computes: call
    /// it from a thread that may block.
    pub fn adopt(
        &self,
        served: Served,
        progress: &(dyn Fn(usize, usize) + Sync),
    ) -> Result<(), OverMemory> {
        self.snapshots.adopt(served, progress)
    }

    /// Who has answered how many queries, and what the shadow showed.
    pub fn traffic(&self) -> TrafficCounts {
        self.traffic.counts()
    }

    /// The limits.
    pub fn options(&self) -> &Options {
        &self.options
    }

    /// Answers a query. Computes: call it from a thread that may block.
    pub fn search(&self, query: &Query) -> Result<Results, QueryError> {
        self.search_unless(query, &CancellationToken::new())
    }

    /// Answers a query, unless `left` says that nobody waits for it any more.
    pub fn search_unless(
        &self,
        query: &Query,
        left: &CancellationToken,
    ) -> Result<Results, QueryError> {
        let k = query.k.unwrap_or(self.options.default_k);
        if !(1..=self.options.max_k).contains(&k) {
            return Err(invalid("k", format!("{k} is not between 1 and {}", self.options.max_k)));
        }
        let since = Instant::now();
        let asked = self.asked(query, k)?;
        let (ask, set, route) = (asked.ask, asked.set, asked.route);
        let (snapshot, balance) = (ask.snapshot.clone(), ask.balance);
        let configuration = match (&snapshot.served.candidate, route) {
            (Some(candidate), Route::Candidate) => candidate.name.clone(),
            _ => snapshot.served.name.clone(),
        };
        let shadow = (route == Route::Live && !query.is_own()).then(|| ask.clone());
        let Reply { found, timings } = self.batches.ask(ask, Want::Best { offset: 0 }, left)?;
        let timings = Timings { text_ms: asked.text_ms, ..timings };
        self.traffic.count(route);
        let told = Told {
            query,
            configuration: &configuration,
            balance: &balance,
            k,
            scanned: snapshot.len(),
            matched: found.matched,
            hits: &found.hits,
            raw_hits: &found.raw_hits,
            timings: &timings,
            version: snapshot.version,
            since,
        };
        told.tell(&self.options);
        if let Some(ask) = shadow {
            self.shadow(ask, query, k, &found.hits);
        }
        Ok(Results {
            version: snapshot.version,
            set,
            balance,
            scanned: snapshot.len(),
            matched: found.matched,
            background: found.background,
            served: snapshot.served.clone(),
            configuration,
            hits: found.hits,
            raw_hits: found.raw_hits,
            timings,
            warning: self.warning(&query.text),
        })
    }

    /// Computes what the candidate would have answered, for its share of the queries, on a thread of
    /// its own and over the very same snapshot; the log tells the difference. One at a time.
    fn shadow(&self, mut ask: Ask, query: &Query, k: usize, hits: &[Hit]) {
        let served = ask.snapshot.served.clone();
        let Some(candidate) = &served.candidate else { return };
        if candidate.shadow <= rand::random::<f32>() || !self.traffic.begin_shadow() {
            return;
        }
        let Ok((set, balance)) = configuration(&ask.snapshot, &candidate.serving, query) else {
            return self.traffic.end_shadow(None);
        };
        ask.key = set.key.clone();
        ask.balance = balance;
        let live: Vec<String> = hits.iter().map(|h| h.entry.image_id.to_string()).collect();
        let (batches, traffic) = (self.batches.clone(), self.traffic.clone());
        let (name, hash) = (candidate.name.clone(), query_hash(&query.text));
        std::thread::spawn(move || {
            let version = ask.snapshot.version;
            let reply = batches.ask(ask, Want::Best { offset: 0 }, &CancellationToken::new());
            let found = reply.ok().map(|reply| {
                let ids: Vec<&str> =
                    reply.found.hits.iter().map(|h| h.entry.image_id.as_str()).collect();
                let live: Vec<&str> = live.iter().map(String::as_str).collect();
                Difference::of(&live, &ids)
            });
            if let Some(found) = &found {
                info!(
                    event = event::SHADOW,
                    query_hash = hash,
                    configuration = served.name,
                    candidate = name,
                    k,
                    overlap = found.overlap,
                    moved = found.moved,
                    top_changed = found.top_changed,
                    version,
                    "the candidate would have answered so"
                );
            }
            traffic.end_shadow(found.as_ref());
        });
    }

    fn warning(&self, text: &str) -> Option<String> {
        (!self.towers.knows_script(text)).then(|| {
            format!(
                "the text tower of {} is not multilingual: its vocabulary does not have the script of this query, so these results mean nothing",
                self.towers.card().name
            )
        })
    }

    /// Explains the place of one image in the answer to a query. Computes: may block.
    pub fn explain(&self, query: &Query, image_id: &str) -> Result<Explanation, QueryError> {
        let Asked { ask, set, .. } = self.asked(query, 1)?;
        let (snapshot, balance) = (ask.snapshot.clone(), ask.balance);
        let no_image = || QueryError::NoImage(image_id.to_owned());
        let place = snapshot.find(image_id).ok_or_else(no_image)?;
        let reply = self.batches.ask(ask, Want::Place(place), &CancellationToken::new())?;
        let hit = reply.found.hits.into_iter().next().ok_or_else(no_image)?;
        let statistics = snapshot.statistics(image_id, &set.key);
        let embedding = snapshot.embedding(image_id).ok_or_else(no_image)?;
        let prompts: Vec<ScoredPrompt> = set
            .strongest(&embedding)
            .into_iter()
            .map(|(text, score)| ScoredPrompt { text: text.to_owned(), score })
            .collect();
        Ok(Explanation {
            sentence: sentence(&hit, statistics.as_ref(), &prompts, snapshot.len()),
            hit,
            statistics,
            prompts,
            scanned: snapshot.len(),
            balance,
            set,
        })
    }

    /// What a query asks for, checked, with its text embedded.
    fn asked(&self, query: &Query, depth: usize) -> Result<Asked, QueryError> {
        if !self.snapshots.ready() {
            return Err(QueryError::NotReady);
        }
        let text = query.text.trim();
        if text.is_empty() {
            return Err(invalid("text", "is empty; say what to look for".into()));
        }
        let length = text.chars().count();
        if length > self.options.max_text_chars {
            return Err(invalid(
                "text",
                format!("has {length} characters, more than {}", self.options.max_text_chars),
            ));
        }
        let snapshot = self.snapshots.newest();
        let served = &snapshot.served;
        let asking = Asking {
            configuration: query.configuration.as_deref(),
            key: query.key.as_deref(),
            own: query.is_own(),
        };
        let route = route(&served.name, served.candidate.as_ref(), asking)
            .map_err(|reason| invalid("configuration", reason))?;
        let serving = match (&served.candidate, route) {
            (Some(candidate), Route::Candidate) => &candidate.serving,
            _ => &served.serving,
        };
        let (set, balance) = configuration(&snapshot, serving, query)?;
        let started = Instant::now();
        let embedding = self.embed(text)?;
        let text_ms = milliseconds(started.elapsed());
        let logit_scale = self.towers.card().logit_scale;
        let key = set.key.clone();
        let ask = Ask { snapshot, embedding, key, balance, logit_scale, mask: None, depth };
        Ok(Asked { ask, set, text_ms, route })
    }

    fn embed(&self, text: &str) -> Result<Arc<Vec<f32>>, ClipError> {
        let cache = || self.cache.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(known) = cache().get(text) {
            return Ok(known.clone());
        }
        let embedded = self.towers.embed_texts(&[text])?.into_iter().next();
        let embedding = Arc::new(embedded.unwrap_or_default());
        let mut cache = cache();
        if cache.len() >= self.options.cached_queries {
            cache.clear();
        }
        if self.options.cached_queries > 0 {
            cache.insert(text.to_owned(), embedding.clone());
        }
        Ok(embedding)
    }

    /// Follows the table until `token` is cancelled. A fault is logged and tried again: what was
    /// taken in is served meanwhile. `progress` hears of files read and files in all.
    pub async fn follow(
        &self,
        mut follower: Follower,
        token: CancellationToken,
        progress: &(dyn Fn(usize, usize) + Sync),
    ) -> Result<(), FollowError> {
        let backoff = Backoff { base: Duration::from_millis(200), ..Backoff::times(u32::MAX) };
        let poll = Duration::from_millis(self.options.poll_ms);
        let mut failures = 0;
        loop {
            let started = Instant::now();
            let changes = tokio::select! {
                changes = follower.next(progress) => changes,
                () = token.cancelled() => return Ok(()),
            };
            if changes.is_ok() {
                metrics::get().last_follow.set(&[], metrics::now());
            }
            let pause = match changes {
                Ok(Some(changes)) => {
                    failures = 0;
                    let (version, rows, whole) =
                        (changes.version, changes.rows.len(), changes.whole);
                    if let Err(refused) = self.snapshots.apply(changes).await {
                        error!(event = event::SNAPSHOT_MEMORY, error = %refused, version, "the snapshot does not grow");
                        if !self.snapshots.ready() {
                            return Err(refused.into());
                        }
                        // What is in memory is served; only another limit helps.
                        token.cancelled().await;
                        return Ok(());
                    }
                    let images = self.snapshots.newest().len();
                    let ms = milliseconds(started.elapsed());
                    metrics::get().images.set(&[], images as f64);
                    metrics::get().table_version.set(&[], version as f64);
                    if whole {
                        info!(
                            event = event::SNAPSHOT_READY,
                            version, images, ms, "the whole table is in memory"
                        );
                    } else {
                        debug!(
                            event = event::FOLLOW,
                            version, rows, images, ms, "a commit was taken in"
                        );
                    }
                    continue;
                }
                Ok(None) => {
                    failures = 0;
                    poll
                }
                Err(error) if error.verdict() == Verdict::Fatal && !self.snapshots.ready() => {
                    return Err(error.into());
                }
                Err(error) => {
                    error!(event = event::FOLLOW_FAILED, %error, attempt = failures, "the table cannot be followed; what is in memory is served");
                    failures += 1;
                    backoff.pause(failures) + poll
                }
            };
            tokio::select! {
                () = tokio::time::sleep(pause) => {}
                () = token.cancelled() => return Ok(()),
            }
        }
    }
}

/// A checked query.
struct Asked {
    ask: Ask,
    set: Arc<EmbeddedSet>,
    text_ms: f64,
    route: Route,
}

impl Query {
    /// Whether it says itself how it is to be answered, and so belongs to no share.
    fn is_own(&self) -> bool {
        self.prompt_set.is_some()
            || self.normaliser.is_some()
            || self.weight.is_some()
            || self.lambda.is_some()
    }
}

/// The prompt set and the balance that a query asks for; what it does not say is as in `serving`.
fn configuration(
    snapshot: &Snapshot,
    serving: &Serving,
    query: &Query,
) -> Result<(Arc<EmbeddedSet>, Balance), QueryError> {
    let sets = &snapshot.served.sets;
    let weight = query.weight.unwrap_or(serving.weight);
    if !(0.0..=1.0).contains(&weight) {
        return Err(invalid("weight", format!("{weight} is not between 0 and 1")));
    }
    let lambda = query.lambda.unwrap_or(serving.lambda);
    if !(0.0..=10.0).contains(&lambda) {
        return Err(invalid("lambda", format!("{lambda} is not between 0 and 10")));
    }
    let found = match query.prompt_set.as_deref() {
        Some(name) => sets.iter().find(|s| s.key.as_str() == name || s.set.name == name),
        None => sets.iter().find(|s| s.key == serving.prompt_set).or(sets.first()),
    };
    let set = found.cloned().ok_or_else(|| {
        let known: Vec<&str> = sets.iter().map(|s| s.set.name.as_str()).collect();
        let wanted = query.prompt_set.as_deref().unwrap_or_default();
        invalid("prompt_set", format!("{wanted:?} is not stored; stored are {}", known.join(", ")))
    })?;
    let normaliser = query.normaliser.unwrap_or(serving.normaliser);
    let frozen = (normaliser == serving.normaliser && set.key == serving.prompt_set)
        .then_some(serving.scale)
        .flatten();
    let scale = frozen.unwrap_or_else(|| snapshot.scale(&set.key, normaliser));
    Ok((set, Balance { normaliser, weight, lambda, scale }))
}

fn invalid(field: &'static str, reason: String) -> QueryError {
    QueryError::Invalid { field, reason }
}

pub(super) fn milliseconds(duration: Duration) -> f64 {
    (duration.as_secs_f64() * 1e6).round() / 1e3
}

/// The explanation in plain words.
fn sentence(
    hit: &Hit,
    statistics: Option<&Statistics>,
    prompts: &[ScoredPrompt],
    scanned: usize,
) -> String {
    let Some(s) = statistics else {
        return "This image has no statistics for the prompt set, so its raw score counts as it is.".into();
    };
    let above = prompts.iter().filter(|p| p.score >= hit.raw_score).count();
    let strongest = prompts.first().map_or("", |p| p.text.as_str());
    let moved = match hit.raw_rank.cmp(&hit.rank) {
        std::cmp::Ordering::Greater => {
            format!("moved up from place {} to {}", hit.raw_rank, hit.rank)
        }
        std::cmp::Ordering::Less => {
            format!("moved down from place {} to {}", hit.raw_rank, hit.rank)
        }
        std::cmp::Ordering::Equal => format!("stays at place {}", hit.rank),
    };
    format!(
        "This image gives the query {:.3}; its own prompts get {:.3} on average, and {above} of {} get as much as the query or more (most of all “{strongest}”, {:.3}). Balanced against that it {moved} of {scanned}.",
        hit.raw_score, s.mean, s.n, s.max
    )
}
