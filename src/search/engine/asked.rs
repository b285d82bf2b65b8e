//! A query, checked and embedded: what is asked of a scan.

use std::sync::Arc;
use std::time::Instant;

use tokio_util::sync::CancellationToken;

use super::Engine;
use super::cursor::{self, Cursor};
use super::traffic::{Asking, Route, route};
use crate::balance::calibration::Calibration;
use crate::balance::normalise::{Balance, Normaliser};
use crate::catalogue::Serving;
use crate::prompts::EmbeddedSet;
use crate::search::query::filter::Checked;
use crate::search::query::{Input, MinScore, Query, QueryError, milliseconds};
use crate::search::scan::Ask;
use crate::search::snapshot::chunk::GROUP;
use crate::search::snapshot::{Place, Snapshot};

/// A checked query.
pub(super) struct Asked {
    pub ask: Ask,
    pub set: Arc<EmbeddedSet>,
    pub text_ms: f64,
    pub route: Route,
    /// Results on earlier pages.
    pub offset: usize,
    /// What a cursor is recognised by.
    pub digest: [u8; cursor::DIGEST],
    /// What was measured for such a query.
    pub calibration: Option<Calibration>,
}

impl Engine {
    /// What a query asks for, checked and embedded; `k` results of it. Gives up where `left` says that
    /// nobody waits for it any more.
    pub(super) fn asked(
        &self,
        query: &Query,
        k: usize,
        left: &CancellationToken,
    ) -> Result<Asked, QueryError> {
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
        let embedding = self.embedder.embed(&query.input, &snapshot, left)?;
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
            let (word, bit) = bit_of(snapshot, place);
            mask[word] &= !bit;
        }
        Some(mask.into())
    }
}

/// Where a row stands in a mask: the word, and its bit there.
fn bit_of(snapshot: &Snapshot, place: Place) -> (usize, u64) {
    let before = snapshot.chunks[..place.chunk].iter().map(|chunk| chunk.live.len());
    (before.sum::<usize>() + place.row / GROUP, 1 << (place.row % GROUP))
}

/// Whether what is asked may find the image at `place`.
pub(super) fn may_find(ask: &Ask, place: Place) -> bool {
    let (word, bit) = bit_of(&ask.snapshot, place);
    ask.mask.as_ref().is_none_or(|mask| mask[word] & bit != 0)
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
pub(super) fn min_score(
    query: &Query,
    calibration: Option<&Calibration>,
) -> Result<Option<f32>, QueryError> {
    match query.min_score {
        None => Ok(None),
        Some(MinScore::Score(score)) if score.is_finite() => Ok(Some(score)),
        Some(MinScore::Score(score)) => {
            Err(QueryError::invalid("min_score", format!("{score} is no finite number")))
        }
        Some(MinScore::Calibrated(_)) => calibration.and_then(|c| c.min_score).map(Some).ok_or_else(
            || QueryError::invalid("min_score", "no threshold is calibrated for such a query and configuration (`bsap evaluate --calibrate live --store`); give a number"),
        ),
    }
}

/// The prompt set and the balance that a query asks for; what it does not say is as in `serving`.
pub(super) fn configuration(
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
        Some(name) => EmbeddedSet::find(sets, name).ok_or_else(|| not_stored(name, sets)),
        None => sets
            .iter()
            .find(|set| set.key == serving.prompt_set)
            .ok_or_else(|| QueryError::SetMissing(serving.prompt_set.clone())),
    };
    let set = found?.clone();
    let normaliser = query.normaliser.unwrap_or(serving.normaliser);
    let frozen = (normaliser == serving.normaliser && set.key == serving.prompt_set)
        .then_some(serving.scale)
        .flatten();
    let scale = frozen.unwrap_or_else(|| snapshot.scale(&set.key, normaliser));
    Ok((set, Balance { normaliser, weight, lambda, scale }))
}

fn not_stored(name: &str, sets: &[Arc<EmbeddedSet>]) -> QueryError {
    let one = |set: &Arc<EmbeddedSet>| format!("{}@{}", set.set.name, set.set.version);
    let known: Vec<String> = sets.iter().map(one).collect();
    let reason = format!("{name:?} is not stored; stored are {}", known.join(", "));
    QueryError::invalid("prompt_set", reason)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::balance::statistics::StatisticsKey;
    use crate::prompts::PromptSet;
    use crate::search::testing::{served, set};

    /// The key of the set that a query is answered with.
    fn used(snapshot: &Snapshot, query: &Query) -> Result<StatisticsKey, QueryError> {
        let serving = &snapshot.served.serving;
        configuration(snapshot, serving, query).map(|(set, _)| set.key.clone())
    }

    fn asking(prompt_set: &str) -> Query {
        Query { prompt_set: Some(prompt_set.to_owned()), ..Query::default() }
    }

    #[test]
    fn a_query_names_the_newest_version_of_a_set_and_none_names_the_served_one() {
        let old = set("one", 4);
        let new = PromptSet { version: 2, ..old.set.clone() };
        let new = Arc::new(EmbeddedSet::of(new, old.embeddings.clone(), 100.0, 3));
        let snapshot = Snapshot::empty(Arc::new(served(vec![old.clone(), new.clone()])));
        assert_eq!(used(&snapshot, &asking("one")).unwrap(), new.key);
        assert_eq!(used(&snapshot, &asking("one@1")).unwrap(), old.key);
        assert_eq!(used(&snapshot, &asking(old.key.as_str())).unwrap(), old.key);
        assert_eq!(used(&snapshot, &Query::default()).unwrap(), old.key);
        let error = used(&snapshot, &asking("two")).unwrap_err().to_string();
        assert!(error.contains("\"two\" is not stored; stored are one@1, one@2"), "{error}");
    }

    #[test]
    fn no_other_set_stands_in_for_the_served_one() {
        let mut serves = served(vec![set("one", 4)]);
        serves.serving.prompt_set = StatisticsKey::from_stored("gone");
        let snapshot = Snapshot::empty(Arc::new(serves));
        let error = used(&snapshot, &Query::default()).unwrap_err();
        assert!(error.to_string().starts_with("prompt set gone is served"), "{error}");
        assert!(matches!(error, QueryError::SetMissing(_)));
        assert!(used(&snapshot, &asking("one")).is_ok(), "who names one is answered by it");
    }
}
