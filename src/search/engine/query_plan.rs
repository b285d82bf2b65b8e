//! A query, checked and embedded: what is asked of a scan.

use std::sync::Arc;
use std::time::Instant;

use tokio_util::sync::CancellationToken;

use super::cursor::{self, Cursor};
use super::generation_engine::Engine;
use super::traffic::{RoutingRequest, choose_route};
use crate::balance::calibration::Calibration;
use crate::balance::normalise::{BalanceParameters, Normaliser};
use crate::catalogue::ServingConfig;
use crate::prompts::EmbeddedPromptSet;
use crate::search::error::QueryError;
use crate::search::query::{MinScore, Query, QueryInput, ValidatedFilter};
use crate::search::scan::ScanRequest;
use crate::search::snapshot::{ROWS_PER_GROUP, Route, RowLocation, Snapshot};
use crate::search::timings::to_milliseconds;

/// A checked query.
pub(super) struct QueryPlan {
    pub request: ScanRequest,
    pub prompt_set: Arc<EmbeddedPromptSet>,
    pub embed_ms: f64,
    pub route: Route,
    /// Results on earlier pages.
    pub offset: usize,
    /// What a cursor is recognised by.
    pub query_digest: [u8; cursor::DIGEST_BYTES],
    /// What was measured for such a query.
    pub calibration: Option<Calibration>,
}

impl Engine {
    /// What a query asks for, checked and embedded; `k` results of it. Gives up where `left` says that
    /// nobody waits for it any more.
    pub(super) fn plan_query(
        &self,
        query: &Query,
        k: usize,
        cancel: &CancellationToken,
    ) -> Result<QueryPlan, QueryError> {
        if !self.snapshots.is_ready() {
            return Err(QueryError::NotReady);
        }
        let cursor = query.cursor.as_deref().map(|text| {
            let none = || QueryError::invalid_field("cursor", "is none that an answer gave");
            Cursor::decode(text).ok_or_else(none)
        });
        let cursor = cursor.transpose()?;
        let mut snapshot = self.snapshots.newest();
        if let Some(Cursor { table_version: version, state_revision: revision, .. }) = cursor {
            let held = self.pinned_snapshots.find_snapshot(version, revision, snapshot);
            snapshot = held.ok_or(QueryError::CursorExpired { version })?;
        }
        let served = &snapshot.serving_snapshot;
        let asking = RoutingRequest {
            configuration: query.configuration.as_deref(),
            traffic_key: query.traffic_key.as_deref(),
            has_overrides: query.has_overrides(),
            filter: query.filter.as_ref(),
        };
        let route = choose_route(&served.configuration_name, served.candidate.as_ref(), asking)
            .map_err(|reason| QueryError::invalid_field("configuration", reason))?;
        let serving = match (&served.candidate, route) {
            (Some(candidate), Route::Candidate) => &candidate.serving,
            _ => &served.serving,
        };
        let (set, mut balance) = resolve_configuration(&snapshot, serving, query)?;
        if let Some(cursor) = cursor {
            balance.scale = cursor.scale;
        }
        let calibration = applicable_calibration(query, serving, &set, &balance);
        let filter = query
            .filter
            .as_ref()
            .map(|filter| filter.validate(&self.declared_attributes))
            .transpose();
        let filter = filter.map_err(|reason| QueryError::invalid_field("filter", reason))?;
        let started = Instant::now();
        let embedding = self.embedder.embed_query(&query.input, &snapshot, cancel)?;
        let text_ms = to_milliseconds(started.elapsed());
        let without = match &query.input {
            QueryInput::ImageId(id) if !query.include_self => Some(id.as_str()),
            _ => None,
        };
        let mask = self.build_row_mask(&snapshot, filter.as_ref(), without);
        let card = self.encoders().card();
        let offset = cursor.map_or(0, |cursor| cursor.offset as usize);
        let depth = (offset + k).min(self.options.max_depth.max(offset));
        let (key, logit_scale) = (set.statistics_key.clone(), card.logit_scale);
        let ask = ScanRequest {
            snapshot,
            embedding,
            statistics_key: key,
            balance,
            logit_scale,
            row_mask: mask,
            depth,
        };
        let text = filter.as_ref().map_or("", ValidatedFilter::as_json);
        let digest = cursor::query_digest(&ask, text, without, &card.fingerprint);
        if cursor
            .is_some_and(|cursor| cursor.query_digest != digest || offset == 0 || offset >= depth)
        {
            let reason =
                "belongs to another question; send it with the fields of the answer that gave it";
            return Err(QueryError::invalid_field("cursor", reason));
        }
        Ok(QueryPlan {
            request: ask,
            prompt_set: set,
            embed_ms: text_ms,
            route,
            offset,
            query_digest: digest,
            calibration,
        })
    }

    /// The rows of `snapshot` that may be found; none: all live ones.
    fn build_row_mask(
        &self,
        snapshot: &Snapshot,
        filter: Option<&ValidatedFilter>,
        excluded_image: Option<&str>,
    ) -> Option<Arc<[u64]>> {
        let place = excluded_image.and_then(|id| snapshot.find_row(id));
        if filter.is_none() && place.is_none() {
            return None;
        }
        let live =
            || snapshot.chunks.iter().flat_map(|chunk| chunk.live_bitmap.iter().copied()).collect();
        let mut mask =
            filter.map_or_else(live, |filter| self.filter_cache.row_mask(filter, snapshot));
        if let Some(place) = place {
            let (word, bit) = mask_bit(snapshot, place);
            mask[word] &= !bit;
        }
        Some(mask.into())
    }
}

/// Where a row stands in a mask: the word, and its bit there.
fn mask_bit(snapshot: &Snapshot, place: RowLocation) -> (usize, u64) {
    let before = snapshot.chunks[..place.chunk].iter().map(|chunk| chunk.live_bitmap.len());
    (before.sum::<usize>() + place.row / ROWS_PER_GROUP, 1 << (place.row % ROWS_PER_GROUP))
}

/// Whether what is asked may find the image at `place`.
pub(super) fn is_allowed(ask: &ScanRequest, place: RowLocation) -> bool {
    let (word, bit) = mask_bit(&ask.snapshot, place);
    ask.row_mask.as_ref().is_none_or(|mask| mask[word] & bit != 0)
}

/// Thresholds are measured with single texts, each for one configuration.
fn applicable_calibration(
    query: &Query,
    serving: &ServingConfig,
    set: &EmbeddedPromptSet,
    balance: &BalanceParameters,
) -> Option<Calibration> {
    let same = set.statistics_key == serving.prompt_set
        && balance.normaliser == serving.normaliser
        && balance.weight == serving.weight
        && balance.lambda == serving.lambda;
    let holds = same && matches!(query.input, QueryInput::Text(_));
    serving.calibration.clone().filter(|_| holds)
}

/// The balanced score that hits must have.
pub(super) fn resolve_min_score(
    query: &Query,
    calibration: Option<&Calibration>,
) -> Result<Option<f32>, QueryError> {
    match query.min_score {
        None => Ok(None),
        Some(MinScore::Score(score)) if score.is_finite() => Ok(Some(score)),
        Some(MinScore::Score(score)) => {
            Err(QueryError::invalid_field("min_score", format!("{score} is no finite number")))
        }
        Some(MinScore::Calibrated(_)) => calibration.and_then(|c| c.min_score).map(Some).ok_or_else(
            || QueryError::invalid_field("min_score", "no threshold is calibrated for such a query and configuration (`bsap evaluate --calibrate live --store`); give a number"),
        ),
    }
}

/// The prompt set and the balance that a query asks for; what it does not say is as in `serving`.
pub(super) fn resolve_configuration(
    snapshot: &Snapshot,
    serving: &ServingConfig,
    query: &Query,
) -> Result<(Arc<EmbeddedPromptSet>, BalanceParameters), QueryError> {
    let sets = &snapshot.serving_snapshot.prompt_sets;
    // What auxiliary texts say of an image's scores with texts says nothing of those with pictures.
    let raw = ServingConfig { normaliser: Normaliser::Raw, weight: 0.0, ..serving.clone() };
    let serving = if query.input.is_image() && !query.has_overrides() { &raw } else { serving };
    let weight = query.weight.unwrap_or(serving.weight);
    if !(0.0..=1.0).contains(&weight) {
        return Err(QueryError::invalid_field(
            "weight",
            format!("{weight} is not between 0 and 1"),
        ));
    }
    let lambda = query.lambda.unwrap_or(serving.lambda);
    if !(0.0..=10.0).contains(&lambda) {
        return Err(QueryError::invalid_field(
            "lambda",
            format!("{lambda} is not between 0 and 10"),
        ));
    }
    let found = match query.prompt_set.as_deref() {
        Some(name) => {
            EmbeddedPromptSet::find(sets, name).ok_or_else(|| unknown_prompt_set(name, sets))
        }
        None => sets
            .iter()
            .find(|set| set.statistics_key == serving.prompt_set)
            .ok_or_else(|| QueryError::PromptSetMissing(serving.prompt_set.clone())),
    };
    let set = found?.clone();
    let normaliser = query.normaliser.unwrap_or(serving.normaliser);
    let frozen = (normaliser == serving.normaliser && set.statistics_key == serving.prompt_set)
        .then_some(serving.scale)
        .flatten();
    let scale = frozen.unwrap_or_else(|| snapshot.scale_constants(&set.statistics_key, normaliser));
    Ok((set, BalanceParameters { normaliser, weight, lambda, scale }))
}

fn unknown_prompt_set(name: &str, sets: &[Arc<EmbeddedPromptSet>]) -> QueryError {
    let one = |set: &Arc<EmbeddedPromptSet>| {
        format!("{}@{}", set.prompt_set.name, set.prompt_set.version)
    };
    let known: Vec<String> = sets.iter().map(one).collect();
    let reason = format!("{name:?} is not stored; stored are {}", known.join(", "));
    QueryError::invalid_field("prompt_set", reason)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::balance::statistics::StatisticsKey;
    use crate::prompts::PromptSet;
    use crate::search::testing::{sample_prompt_set, sample_serving_snapshot};

    /// The key of the set that a query is answered with.
    fn resolved_key(snapshot: &Snapshot, query: &Query) -> Result<StatisticsKey, QueryError> {
        let serving = &snapshot.serving_snapshot.serving;
        resolve_configuration(snapshot, serving, query).map(|(set, _)| set.statistics_key.clone())
    }

    fn query_with_prompt_set(prompt_set: &str) -> Query {
        Query { prompt_set: Some(prompt_set.to_owned()), ..Query::default() }
    }

    #[test]
    fn a_query_names_the_newest_version_of_a_set_and_none_names_the_served_one() {
        let old = sample_prompt_set("one", 4);
        let new = PromptSet { version: 2, ..old.prompt_set.clone() };
        let new =
            Arc::new(EmbeddedPromptSet::from_embeddings(new, old.embeddings.clone(), 100.0, 3));
        let snapshot =
            Snapshot::empty(Arc::new(sample_serving_snapshot(vec![old.clone(), new.clone()])));
        assert_eq!(
            resolved_key(&snapshot, &query_with_prompt_set("one")).unwrap(),
            new.statistics_key
        );
        assert_eq!(
            resolved_key(&snapshot, &query_with_prompt_set("one@1")).unwrap(),
            old.statistics_key
        );
        assert_eq!(
            resolved_key(&snapshot, &query_with_prompt_set(old.statistics_key.as_str())).unwrap(),
            old.statistics_key
        );
        assert_eq!(resolved_key(&snapshot, &Query::default()).unwrap(), old.statistics_key);
        let error = resolved_key(&snapshot, &query_with_prompt_set("two")).unwrap_err().to_string();
        assert!(error.contains("\"two\" is not stored; stored are one@1, one@2"), "{error}");
    }

    #[test]
    fn a_missing_served_set_is_an_error_and_is_not_substituted() {
        let mut serves = sample_serving_snapshot(vec![sample_prompt_set("one", 4)]);
        serves.serving.prompt_set = StatisticsKey::from_stored("gone");
        let snapshot = Snapshot::empty(Arc::new(serves));
        let error = resolved_key(&snapshot, &Query::default()).unwrap_err();
        assert!(error.to_string().starts_with("prompt set gone is served"), "{error}");
        assert!(matches!(error, QueryError::PromptSetMissing(_)));
        assert!(
            resolved_key(&snapshot, &query_with_prompt_set("one")).is_ok(),
            "who names one is answered by it"
        );
    }
}
