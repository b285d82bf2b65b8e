//! Turns a query into a request for the scan: validates it, resolves its settings and embeds it.

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
use crate::search::snapshot::{ROWS_PER_GROUP, RowLocation, ServingRole, Snapshot};
use crate::search::timings::to_milliseconds;

/// A validated and embedded query.
pub(super) struct QueryPlan {
    pub request: ScanRequest,
    /// Prompt set whose statistics are used.
    pub prompt_set: Arc<EmbeddedPromptSet>,
    pub embed_ms: f64,
    /// Configuration that answers.
    pub route: ServingRole,
    /// Number of results on earlier pages.
    pub offset: usize,
    /// Digest by which a cursor belongs to this query.
    pub query_digest: [u8; cursor::DIGEST_BYTES],
    /// Thresholds that apply to this query; `None` if none were measured for such a query.
    pub calibration: Option<Calibration>,
}

impl Engine {
    /// Validates and embeds a query for `k` results. Returns [`QueryError::Cancelled`] if `cancel` is
    /// cancelled before the encoder runs.
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
            let invalid =
                || QueryError::invalid_field("cursor", "is not a cursor that an answer returned");
            Cursor::decode(text).ok_or_else(invalid)
        });
        let cursor = cursor.transpose()?;
        let mut snapshot = self.snapshots.newest();
        if let Some(Cursor { table_version: version, state_revision, .. }) = cursor {
            let pinned = self.pinned_snapshots.find_snapshot(version, state_revision, snapshot);
            snapshot = pinned.ok_or(QueryError::CursorExpired { version })?;
        }
        let serving_snapshot = &snapshot.serving_snapshot;
        let routing_request = RoutingRequest {
            requested_configuration: query.requested_configuration.as_deref(),
            traffic_key: query.traffic_key.as_deref(),
            has_overrides: query.has_overrides(),
            filter: query.filter.as_ref(),
        };
        let live_configuration = &serving_snapshot.configuration_name;
        let candidate = serving_snapshot.candidate.as_ref();
        let route = choose_route(live_configuration, candidate, routing_request)
            .map_err(|reason| QueryError::invalid_field("configuration", reason))?;
        let serving = match (candidate, route) {
            (Some(candidate), ServingRole::Candidate) => &candidate.serving,
            _ => &serving_snapshot.serving,
        };
        let (prompt_set, mut balance) = resolve_configuration(&snapshot, serving, query)?;
        if let Some(cursor) = cursor {
            balance.scale = cursor.scale;
        }
        let calibration = applicable_calibration(query, serving, &prompt_set, &balance);
        let filter = query
            .filter
            .as_ref()
            .map(|filter| filter.validate(&self.declared_attributes))
            .transpose();
        let filter = filter.map_err(|reason| QueryError::invalid_field("filter", reason))?;
        let started_at = Instant::now();
        let embedding = self.embedder.embed_query(&query.input, &snapshot, cancel)?;
        let embed_ms = to_milliseconds(started_at.elapsed());
        let excluded_image = match &query.input {
            QueryInput::ImageId(id) if !query.include_self => Some(id.as_str()),
            _ => None,
        };
        let row_mask = self.build_row_mask(&snapshot, filter.as_ref(), excluded_image);
        let card = self.encoders().card();
        let offset = cursor.map_or(0, |cursor| cursor.offset as usize);
        let depth = (offset + k).min(self.options.max_depth.max(offset));
        let request = ScanRequest {
            snapshot,
            embedding,
            statistics_key: prompt_set.statistics_key.clone(),
            balance,
            softmax_scale: prompt_set.softmax_scale(),
            row_mask,
            depth,
        };
        let filter_json = filter.as_ref().map_or("", ValidatedFilter::as_json);
        let query_digest =
            cursor::query_digest(&request, filter_json, excluded_image, &card.fingerprint);
        if cursor.is_some_and(|cursor| {
            cursor.query_digest != query_digest || offset == 0 || offset >= depth
        }) {
            let reason =
                "belongs to another query; send it with the fields of the query that returned it";
            return Err(QueryError::invalid_field("cursor", reason));
        }
        Ok(QueryPlan { request, prompt_set, embed_ms, route, offset, query_digest, calibration })
    }

    /// Returns the rows of `snapshot` that may be hits; `None` if these are all live rows.
    fn build_row_mask(
        &self,
        snapshot: &Snapshot,
        filter: Option<&ValidatedFilter>,
        excluded_image: Option<&str>,
    ) -> Option<Arc<[u64]>> {
        let excluded_row = excluded_image.and_then(|id| snapshot.find_row(id));
        if filter.is_none() && excluded_row.is_none() {
            return None;
        }
        let all_live =
            || snapshot.chunks.iter().flat_map(|chunk| chunk.live_bitmap.iter().copied()).collect();
        let mut mask =
            filter.map_or_else(all_live, |filter| self.filter_cache.row_mask(filter, snapshot));
        if let Some(location) = excluded_row {
            let (word, bit) = mask_word_and_bit(snapshot, location);
            mask[word] &= !bit;
        }
        Some(mask.into())
    }
}

/// Returns the index of the word of a row in a mask, and the bit of the row in that word.
fn mask_word_and_bit(snapshot: &Snapshot, location: RowLocation) -> (usize, u64) {
    let words = snapshot.chunks[..location.chunk_index].iter().map(|chunk| chunk.live_bitmap.len());
    let word = words.sum::<usize>() + location.row_index / ROWS_PER_GROUP;
    (word, 1 << (location.row_index % ROWS_PER_GROUP))
}

/// Returns whether the image at `location` may be a hit of `request`.
pub(super) fn is_row_allowed(request: &ScanRequest, location: RowLocation) -> bool {
    let (word, bit) = mask_word_and_bit(&request.snapshot, location);
    request.row_mask.as_ref().is_none_or(|mask| mask[word] & bit != 0)
}

/// Returns the calibration of `serving` if it applies: thresholds are measured with single texts, and
/// for one prompt set, normaliser, weight and λ.
fn applicable_calibration(
    query: &Query,
    serving: &ServingConfig,
    prompt_set: &EmbeddedPromptSet,
    balance: &BalanceParameters,
) -> Option<Calibration> {
    let has_same_balance = prompt_set.statistics_key == serving.prompt_set
        && balance.normaliser == serving.normaliser
        && balance.weight == serving.weight
        && balance.lambda == serving.lambda;
    let applies = has_same_balance && matches!(query.input, QueryInput::Text(_));
    serving.calibration.clone().filter(|_| applies)
}

/// Returns the smallest balanced score that hits may have; `None` if the query does not limit it.
pub(super) fn resolve_min_score(
    query: &Query,
    calibration: Option<&Calibration>,
) -> Result<Option<f32>, QueryError> {
    match query.min_score {
        None => Ok(None),
        Some(MinScore::Score(score)) if score.is_finite() => Ok(Some(score)),
        Some(MinScore::Score(score)) => {
            Err(QueryError::invalid_field("min_score", format!("{score} is not a finite number")))
        }
        Some(MinScore::Calibrated(_)) => calibration.and_then(|c| c.min_score).map(Some).ok_or_else(
            || QueryError::invalid_field("min_score", "no threshold is calibrated for such a query and configuration (`bsap evaluate --calibrate live --store`); give a number"),
        ),
    }
}

/// Returns the prompt set and the balance of a query. What it does not override comes from `serving`.
pub(super) fn resolve_configuration(
    snapshot: &Snapshot,
    serving: &ServingConfig,
    query: &Query,
) -> Result<(Arc<EmbeddedPromptSet>, BalanceParameters), QueryError> {
    let sets = &snapshot.serving_snapshot.prompt_sets;
    // The prompts are texts. What they say about an image's scores for texts does not hold for its
    // scores for images, so that image queries are not balanced by default.
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
    let prompt_set = match query.prompt_set.as_deref() {
        Some(name) => EmbeddedPromptSet::find_by_name(sets, name)
            .ok_or_else(|| unknown_prompt_set(name, sets)),
        None => sets
            .iter()
            .find(|set| set.statistics_key == serving.prompt_set)
            .ok_or_else(|| QueryError::PromptSetMissing(serving.prompt_set.clone())),
    };
    let set = prompt_set?.clone();
    let normaliser = query.normaliser.unwrap_or(serving.normaliser);
    let frozen_scale = (normaliser == serving.normaliser
        && set.statistics_key == serving.prompt_set)
        .then_some(serving.scale)
        .flatten();
    let scale =
        frozen_scale.unwrap_or_else(|| snapshot.scale_constants(&set.statistics_key, normaliser));
    Ok((set, BalanceParameters { normaliser, weight, lambda, scale }))
}

/// Returns the error for a prompt set that does not exist, which lists those that do.
fn unknown_prompt_set(name: &str, sets: &[Arc<EmbeddedPromptSet>]) -> QueryError {
    let versioned_name = |set: &Arc<EmbeddedPromptSet>| {
        format!("{}@{}", set.prompt_set.name, set.prompt_set.version)
    };
    let stored: Vec<String> = sets.iter().map(versioned_name).collect();
    let reason = format!("{name:?} is not stored; stored are {}", stored.join(", "));
    QueryError::invalid_field("prompt_set", reason)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::balance::statistics::StatisticsKey;
    use crate::prompts::PromptSet;
    use crate::search::testing::{sample_prompt_set, sample_serving_snapshot};

    /// Returns the key of the prompt set that answers a query.
    fn resolved_key(snapshot: &Snapshot, query: &Query) -> Result<StatisticsKey, QueryError> {
        let serving = &snapshot.serving_snapshot.serving;
        resolve_configuration(snapshot, serving, query).map(|(set, _)| set.statistics_key.clone())
    }

    fn query_with_prompt_set(prompt_set: &str) -> Query {
        Query { prompt_set: Some(prompt_set.to_owned()), ..Query::default() }
    }

    #[test]
    fn a_name_means_the_newest_version_of_a_set_and_no_name_means_the_served_set() {
        let old = sample_prompt_set("one", 4);
        let new = PromptSet { version: 2, ..old.prompt_set.clone() };
        let new = Arc::new(EmbeddedPromptSet::from_embeddings(
            new,
            old.prompt_embeddings.clone(),
            100.0,
            old.settings(),
        ));
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
        let mut serving_snapshot = sample_serving_snapshot(vec![sample_prompt_set("one", 4)]);
        serving_snapshot.serving.prompt_set = StatisticsKey::from_stored("gone");
        let snapshot = Snapshot::empty(Arc::new(serving_snapshot));
        let error = resolved_key(&snapshot, &Query::default()).unwrap_err();
        assert!(error.to_string().starts_with("prompt set gone is served"), "{error}");
        assert!(matches!(error, QueryError::PromptSetMissing(_)));
        assert!(
            resolved_key(&snapshot, &query_with_prompt_set("one")).is_ok(),
            "a query that names another set is answered"
        );
    }
}
