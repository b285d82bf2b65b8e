//! Questions and answers: text to embedding, one scan, both rankings, and why.

mod asked;
mod cursor;
pub(crate) mod engines;
pub(crate) mod explain;
pub(crate) mod follow;
mod shadow;
mod told;
pub(crate) mod traffic;
mod watch;

use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use tokio_util::sync::CancellationToken;

use asked::{Asked, configuration, may_find, min_score};

use super::Options;
use super::query::embed::Embedder;
use super::query::filter::Masks;
use super::query::{Input, Query, QueryError, Timings};
use super::scan::Ask;
use super::scan::batch::{Batches, Reply, Want};
use super::scan::rank::{Found, Hit};
use super::scan::unmatched::Unmatched;
use super::snapshot::attributes::{Attribute, attributes};
use super::snapshot::memory::{self, OverMemory};
use super::snapshot::snapshots::Snapshots;
use super::snapshot::{Served, Snapshot};
use crate::balance::calibration::{Background, Calibration};
use crate::balance::normalise::Balance;
use crate::catalogue::{Candidate, Serving};
use crate::clip::Towers;
use crate::ingest::decode;
use crate::prompts::EmbeddedSet;
use crate::record::AttributeTypes;
use cursor::{Cursor, Pins};
use explain::{Explanation, ScoredPrompt, sentence};
use shadow::Shadow;
use told::Told;
use traffic::{Route, Traffic, TrafficCounts};
use watch::Watch;

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
    /// When the table was last read to its end.
    followed: Mutex<Instant>,
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
            followed: Mutex::new(Instant::now()),
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

    /// From now on it is counted how `candidate` does; what was counted of another one is forgotten.
    pub fn count_for(&self, candidate: Option<&Candidate>) {
        self.traffic.of(candidate);
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
            self.asked(query, k, left)?;
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
        let no_match = calibration
            .filter(|_| first)
            .and_then(|calibration| unmatched(&query.input, &found, &set, &calibration));
        if first && route == Route::Live {
            self.watch_over(query, &snapshot.served.serving, &found, no_match.as_ref());
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

    /// Shows the first results of a text, answered as everyone's are, to the watch.
    fn watch_over(
        &self,
        query: &Query,
        serving: &Serving,
        found: &Found,
        no_match: Option<&Unmatched>,
    ) {
        if let Input::Text(text) = &query.input
            && query.filter.is_none()
            && !query.is_own()
            && let (Some(hit), Some(raw)) = (found.hits.first(), found.raw_hits.first())
        {
            let firsts = (hit.entry.image_id.clone(), raw.entry.image_id.clone());
            self.watch.see(serving, text, firsts, no_match.map(|verdict| verdict.holds));
        }
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
        shadow.compute(&self.batches, hits, move || {
            Some(engine.asked(&query, k, &CancellationToken::new()).ok()?.ask)
        });
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

    /// Explains the place of one image in the answer to a query, unless `left` says that nobody waits
    /// for it any more. Computes: may block.
    pub fn explain(
        &self,
        query: &Query,
        image_id: &str,
        left: &CancellationToken,
    ) -> Result<Explanation, QueryError> {
        let Asked { ask, set, route, .. } = self.asked(query, 1, left)?;
        let (snapshot, balance) = (ask.snapshot.clone(), ask.balance);
        let no_image = || QueryError::NoImage(image_id.to_owned());
        let place = snapshot.find(image_id).ok_or_else(no_image)?;
        if !may_find(&ask, place) {
            let reason = "is left out of this query by its filter, or is what the query looks like";
            return Err(QueryError::invalid("image_id", reason));
        }
        let reply = self.batches.ask(ask, Want::Place(place), left)?;
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
}

/// Whether the best hit is no better than what unrelated texts reach; none where that was not
/// measured, or something else than a text was asked.
fn unmatched(
    input: &Input,
    found: &Found,
    set: &EmbeddedSet,
    calibration: &Calibration,
) -> Option<Unmatched> {
    let (Input::Text(text), Some(hit)) = (input, found.hits.first()) else { return None };
    let rule = calibration.no_match?;
    Some(Unmatched::of(rule, hit.score, found.background, text, set.vocabulary()))
}
