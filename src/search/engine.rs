//! Questions and answers: text to embedding, one scan, both rankings, and why.

use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio_util::sync::CancellationToken;
use tracing::{debug, error, info};

use super::Options;
use super::attributes::{Attribute, attributes};
use super::batch::{Batches, Reply, Want};
use super::chunk::GROUP;
use super::cursor::{self, Cursor, Pins};
use super::embed::Embedder;
use super::explain::{Explanation, ScoredPrompt, sentence};
use super::filter::{Checked, Masks};
use super::memory::{self, OverMemory};
use super::query::{Input, MinScore, Query, QueryError, Timings, milliseconds};
use super::rank::Hit;
use super::scan::Ask;
use super::shadow::Shadow;
use super::snapshot::{Served, Snapshot, Snapshots};
use super::told::Told;
use super::traffic::{Asking, Route, Traffic, TrafficCounts, route};
use super::unmatched::Unmatched;
use super::watch::Watch;
use crate::calibration::{Background, Calibration};
use crate::clip::Towers;
use crate::decode;
use crate::metrics;
use crate::normalise::{Balance, Normaliser};
use crate::prompts::EmbeddedSet;
use crate::record::AttributeTypes;
use crate::retry::{Backoff, Decide, Verdict};
use crate::table::{Follower, Serving, TableError};
use crate::telemetry::event;

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
    /// Images that were ranked: those that the filter lets through.
    pub matched: usize,
    /// Moments of the balanced scores of all images; with a filter, of a part of them.
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
    /// Whether the best hit is no better than what unrelated texts reach; none where nothing is
    /// calibrated for such a query, and on later pages.
    pub no_match: Option<Unmatched>,
    /// The balanced score that hits had to have.
    pub min_score: Option<f32>,
    /// Where the next page begins; none after the last.
    pub next_cursor: Option<String>,
}

/// Answers queries over the newest snapshot.
pub struct Engine {
    embedder: Embedder,
    options: Options,
    declared: AttributeTypes,
    snapshots: Snapshots,
    masks: Masks,
    pins: Pins,
    batches: Arc<Batches>,
    traffic: Arc<Traffic>,
    pub(super) watch: Watch,
}

impl Engine {
    /// An engine that answers as `served` says, until [`Engine::adopt`].
    pub fn new(towers: Arc<dyn Towers>, served: Served, options: Options) -> Self {
        let age = Duration::from_secs(options.cursor_seconds);
        Self {
            embedder: Embedder::new(towers, &options),
            declared: AttributeTypes::new(),
            snapshots: Snapshots::new(served, memory::limit(options.memory_mib)),
            masks: Masks::default(),
            pins: Pins::new(age, options.cursor_mib << 20),
            batches: Arc::new(Batches::start(&options)),
            traffic: Arc::default(),
            watch: Watch::default(),
            options,
        }
    }

    /// The same engine, whose filters may name the attributes of `declared`, and that decodes the
    /// pictures of queries within the limits of `decode`.
    pub fn reading(mut self, declared: AttributeTypes, decode: decode::Options) -> Self {
        self.declared = declared;
        self.embedder = self.embedder.decoding(decode);
        self
    }

    /// An engine with the same limits for another generation, whose model is `towers`. It shares nothing
    /// with this one but the counts.
    pub fn another(&self, towers: Arc<dyn Towers>, served: Served) -> Self {
        let other = Self::new(towers, served, self.options.clone());
        let other = other.reading(self.declared.clone(), self.embedder.decode().clone());
        Self { traffic: self.traffic.clone(), ..other }
    }

    /// The snapshots.
    pub fn snapshots(&self) -> &Snapshots {
        &self.snapshots
    }

    /// The model.
    pub fn towers(&self) -> &dyn Towers {
        &**self.embedder.towers()
    }

    /// The model, shared.
    pub fn model(&self) -> Arc<dyn Towers> {
        self.embedder.towers().clone()
    }

    /// What filters may name, over the live images of `snapshot`.
    pub fn attributes<'a>(&self, snapshot: &'a Snapshot) -> &'a [Attribute] {
        snapshot.attributes.get_or_init(|| attributes(&self.declared, snapshot))
    }

    /// Bytes of versions that cursors point to, beside the newest.
    pub fn pinned_bytes(&self) -> u64 {
        self.pins.bytes(&self.snapshots.newest())
    }

    /// Lets go of versions that no cursor may ask for any more, or that take too much memory.
    pub(super) fn tidy(&self) {
        self.pins.tidy(&self.snapshots.newest());
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

    pub(super) fn shared_traffic(&self) -> &Arc<Traffic> {
        &self.traffic
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
            let reason = format!("{k} is not between 1 and {}", self.options.max_k);
            return Err(QueryError::invalid("k", reason));
        }
        let since = Instant::now();
        let Asked { ask, set, text_ms, route, offset, digest, calibration } =
            self.asked(query, k)?;
        let min_score = min_score(query, calibration.as_ref())?;
        let (snapshot, balance, depth) = (ask.snapshot.clone(), ask.balance, ask.depth);
        let configuration = snapshot.served.name_of(route).to_owned();
        let first = offset == 0;
        let shadow =
            (first && route == Route::Live && !query.input.is_picture() && !query.is_own())
                .then(|| ask.clone());
        let Reply { mut found, timings } = self.batches.ask(ask, Want::Best { offset }, left)?;
        let timings = Timings { text_ms, ..timings };
        self.traffic.count(match route {
            Route::Live => snapshot.served.stands_as,
            Route::Candidate => Route::Candidate,
        });
        let no_match =
            match (&query.input, found.hits.first(), calibration.and_then(|c| c.no_match)) {
                (Input::Text(text), Some(hit), Some(rule)) if first => {
                    Some(Unmatched::of(rule, hit.score, found.background, text, set.vocabulary()))
                }
                _ => None,
            };
        if let (Input::Text(text), true, Route::Live) = (&query.input, first, route)
            && query.filter.is_none()
            && !query.is_own()
            && let (Some(hit), Some(raw)) = (found.hits.first(), found.raw_hits.first())
        {
            let no_match = no_match.as_ref().map(|verdict| verdict.holds);
            let serving = &snapshot.served.serving;
            let firsts = (hit.entry.image_id.clone(), raw.entry.image_id.clone());
            self.watch.see(serving, text, firsts, no_match);
        }
        if let Some(ask) = shadow {
            self.shadow(ask, query, k, &found.hits);
        }
        found.hits.retain(|hit| min_score.is_none_or(|least| hit.score >= least));
        let more =
            found.hits.len() == depth - offset && depth < found.matched.min(self.options.max_depth);
        let next_cursor = more.then(|| {
            self.pins.hold(&snapshot, &self.snapshots.newest());
            let (version, revision) = (snapshot.version, snapshot.served.revision);
            let (offset, scale) = (depth as u32, balance.scale);
            Cursor { version, revision, offset, scale, digest }.encode()
        });
        let told = Told {
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
            version: snapshot.version,
            since,
        };
        told.tell(&self.options);
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
            warning: self.warning(&query.input),
            no_match,
            min_score,
            next_cursor,
        })
    }

    /// Computes what the candidate would have answered, for its share of the queries, over the very
    /// same snapshot.
    fn shadow(&self, mut ask: Ask, query: &Query, k: usize, hits: &[Hit]) {
        let served = ask.snapshot.served.clone();
        let Some(candidate) = &served.candidate else { return };
        let Some(shadow) = Shadow::begin(&self.traffic, candidate, &served.name, query, k) else {
            return;
        };
        let set = configuration(&ask.snapshot, &candidate.serving, query).map(|(set, balance)| {
            ask.key = set.key.clone();
            ask.balance = balance;
        });
        shadow.compute(&self.batches, hits, move || set.ok().map(|()| ask));
    }

    /// Computes what this engine, whose generation is a candidate's, would have answered to `query`,
    /// where another one's first `k` results are `hits`.
    pub(super) fn shadow_of(self: &Arc<Self>, shadow: Shadow, query: &Query, hits: &[Hit]) {
        let (engine, query, k) = (self.clone(), query.as_live(), shadow.k);
        shadow.compute(&self.batches, hits, move || Some(engine.asked(&query, k).ok()?.ask));
    }

    fn warning(&self, input: &Input) -> Option<String> {
        let towers = self.towers();
        (!input.texts().into_iter().all(|text| towers.knows_script(text))).then(|| {
            format!(
                "the text tower of {} is not multilingual: its vocabulary does not have the script of this query, so these results mean nothing",
                towers.card().name
            )
        })
    }

    /// Explains the place of one image in the answer to a query. Computes: may block.
    pub fn explain(&self, query: &Query, image_id: &str) -> Result<Explanation, QueryError> {
        let Asked { ask, set, route, .. } = self.asked(query, 1)?;
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
            sentence: sentence(
                &query.input,
                &hit,
                statistics.as_ref(),
                &prompts,
                reply.found.matched,
            ),
            hit,
            statistics,
            prompts,
            scanned: snapshot.len(),
            balance,
            set,
            configuration: snapshot.served.name_of(route).to_owned(),
            served: snapshot.served.clone(),
        })
    }

    /// What a query asks for, checked and embedded; `k` results of it.
    fn asked(&self, query: &Query, k: usize) -> Result<Asked, QueryError> {
        if !self.snapshots.ready() {
            return Err(QueryError::NotReady);
        }
        let cursor = query.cursor.as_deref().map(|text| {
            let none = || QueryError::invalid("cursor", "is none that an answer gave");
            Cursor::decode(text).ok_or_else(none)
        });
        let cursor = cursor.transpose()?;
        let mut snapshot = self.snapshots.newest();
        if let Some(Cursor { version, revision, .. }) = cursor {
            let held = self.pins.find(version, revision, snapshot);
            snapshot = held.ok_or(QueryError::CursorExpired { version })?;
        }
        let served = &snapshot.served;
        let asking = Asking {
            configuration: query.configuration.as_deref(),
            key: query.key.as_deref(),
            own: query.is_own(),
            filter: query.filter.as_ref(),
        };
        let route = route(&served.name, served.candidate.as_ref(), asking)
            .map_err(|reason| QueryError::invalid("configuration", reason))?;
        let serving = match (&served.candidate, route) {
            (Some(candidate), Route::Candidate) => &candidate.serving,
            _ => &served.serving,
        };
        let (set, mut balance) = configuration(&snapshot, serving, query)?;
        if let Some(cursor) = cursor {
            balance.scale = cursor.scale;
        }
        let calibration = calibration(query, serving, &set, &balance);
        let filter = query.filter.as_ref().map(|filter| filter.check(&self.declared)).transpose();
        let filter = filter.map_err(|reason| QueryError::invalid("filter", reason))?;
        let started = Instant::now();
        let embedding = self.embedder.embed(&query.input, &snapshot)?;
        let text_ms = milliseconds(started.elapsed());
        let without = match &query.input {
            Input::Image(id) if !query.include_self => Some(id.as_str()),
            _ => None,
        };
        let mask = self.mask(&snapshot, filter.as_ref(), without);
        let card = self.towers().card();
        let offset = cursor.map_or(0, |cursor| cursor.offset as usize);
        let depth = (offset + k).min(self.options.max_depth.max(offset));
        let (key, logit_scale) = (set.key.clone(), card.logit_scale);
        let ask = Ask { snapshot, embedding, key, balance, logit_scale, mask, depth };
        let text = filter.as_ref().map_or("", Checked::text);
        let digest = cursor::digest(&ask, text, without, &card.fingerprint);
        if cursor.is_some_and(|cursor| cursor.digest != digest || offset == 0 || offset >= depth) {
            let reason =
                "belongs to another question; send it with the fields of the answer that gave it";
            return Err(QueryError::invalid("cursor", reason));
        }
        Ok(Asked { ask, set, text_ms, route, offset, digest, calibration })
    }

    /// The rows of `snapshot` that may be found; none: all live ones.
    fn mask(
        &self,
        snapshot: &Snapshot,
        filter: Option<&Checked>,
        without: Option<&str>,
    ) -> Option<Arc<[u64]>> {
        let place = without.and_then(|id| snapshot.find(id));
        if filter.is_none() && place.is_none() {
            return None;
        }
        let live = || snapshot.chunks.iter().flat_map(|chunk| chunk.live.iter().copied()).collect();
        let mut mask = filter.map_or_else(live, |filter| self.masks.of(filter, snapshot));
        if let Some(place) = place {
            let before = snapshot.chunks[..place.chunk].iter().map(|chunk| chunk.live.len());
            let first: usize = before.sum();
            mask[first + place.row / GROUP] &= !(1 << (place.row % GROUP));
        }
        Some(mask.into())
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
            self.tidy();
            if changes.is_ok() && self.served().stands_as == Route::Live {
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
                    if self.served().stands_as == Route::Live {
                        metrics::get().images.set(&[], images as f64);
                        metrics::get().table_version.set(&[], version as f64);
                    }
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
    /// Results on earlier pages.
    offset: usize,
    /// What a cursor is recognised by.
    digest: [u8; cursor::DIGEST],
    /// What was measured for such a query.
    calibration: Option<Calibration>,
}

/// Thresholds are measured with single texts, each for one configuration.
fn calibration(
    query: &Query,
    serving: &Serving,
    set: &EmbeddedSet,
    balance: &Balance,
) -> Option<Calibration> {
    let same = set.key == serving.prompt_set
        && balance.normaliser == serving.normaliser
        && balance.weight == serving.weight
        && balance.lambda == serving.lambda;
    let holds = same && matches!(query.input, Input::Text(_));
    serving.calibration.clone().filter(|_| holds)
}

/// The balanced score that hits must have.
fn min_score(query: &Query, calibration: Option<&Calibration>) -> Result<Option<f32>, QueryError> {
    match query.min_score {
        None => Ok(None),
        Some(MinScore::Score(score)) if score.is_finite() => Ok(Some(score)),
        Some(MinScore::Score(score)) => {
            Err(QueryError::invalid("min_score", format!("{score} is no finite number")))
        }
        Some(MinScore::Calibrated(_)) => calibration.and_then(|c| c.min_score).map(Some).ok_or_else(
            || QueryError::invalid("min_score", "no threshold is calibrated for such a query and configuration (`bsap evaluate calibrate`); give a number"),
        ),
    }
}

/// The prompt set and the balance that a query asks for; what it does not say is as in `serving`.
fn configuration(
    snapshot: &Snapshot,
    serving: &Serving,
    query: &Query,
) -> Result<(Arc<EmbeddedSet>, Balance), QueryError> {
    let sets = &snapshot.served.sets;
    // What auxiliary texts say of an image's scores with texts says nothing of those with pictures.
    let raw = Serving { normaliser: Normaliser::Raw, weight: 0.0, ..serving.clone() };
    let serving = if query.input.is_picture() && !query.is_own() { &raw } else { serving };
    let weight = query.weight.unwrap_or(serving.weight);
    if !(0.0..=1.0).contains(&weight) {
        return Err(QueryError::invalid("weight", format!("{weight} is not between 0 and 1")));
    }
    let lambda = query.lambda.unwrap_or(serving.lambda);
    if !(0.0..=10.0).contains(&lambda) {
        return Err(QueryError::invalid("lambda", format!("{lambda} is not between 0 and 10")));
    }
    let found = match query.prompt_set.as_deref() {
        Some(name) => sets.iter().find(|s| s.key.as_str() == name || s.set.name == name),
        None => sets.iter().find(|s| s.key == serving.prompt_set).or(sets.first()),
    };
    let set = found.cloned().ok_or_else(|| {
        let known: Vec<&str> = sets.iter().map(|s| s.set.name.as_str()).collect();
        let wanted = query.prompt_set.as_deref().unwrap_or_default();
        QueryError::invalid(
            "prompt_set",
            format!("{wanted:?} is not stored; stored are {}", known.join(", ")),
        )
    })?;
    let normaliser = query.normaliser.unwrap_or(serving.normaliser);
    let frozen = (normaliser == serving.normaliser && set.key == serving.prompt_set)
        .then_some(serving.scale)
        .flatten();
    let scale = frozen.unwrap_or_else(|| snapshot.scale(&set.key, normaliser));
    Ok((set, Balance { normaliser, weight, lambda, scale }))
}
