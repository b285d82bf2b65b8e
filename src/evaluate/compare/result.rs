//! What a comparison of configurations returns; the JSON report has these fields.

use std::collections::BTreeMap;

use serde::Serialize;

use super::configuration::ReportedConfiguration;
use crate::balance::bank::BankReport;
use crate::evaluate::calibrate::ThresholdReport;
use crate::evaluate::judgements::NoMatchKind;
use crate::evaluate::measures::interval::{ConfidenceInterval, MeasureComparison};

/// The cost of correcting wrong results by hand, by the owner's own figures.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct CorrectionCost {
    /// Minutes of work per query whose first result is wrong.
    pub minutes_per_false_hit: f64,
    /// Queries per day.
    pub queries_per_day: f64,
    /// Cost of one hour of work, in any currency; if `None`, only minutes are reported.
    pub hourly_cost: Option<f64>,
}

impl CorrectionCost {
    /// Returns what a changed rate of false first hits saves; `gain` below 0 means fewer false
    /// hits.
    pub(super) fn estimate_savings(&self, gain: ConfidenceInterval) -> CorrectionSavings {
        let minutes = gain.scaled_by(-self.minutes_per_false_hit * self.queries_per_day);
        CorrectionSavings {
            minutes_per_day: minutes,
            money_per_day: self.hourly_cost.map(|cost| minutes.scaled_by(cost / 60.0)),
        }
    }
}

/// What a configuration saves compared with the baseline. Below 0, it costs more.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct CorrectionSavings {
    /// Minutes of work per day.
    pub minutes_per_day: ConfidenceInterval,
    /// Money per day, in the currency of the hourly cost.
    pub money_per_day: Option<ConfidenceInterval>,
}

/// Measures over some queries.
#[derive(Debug, Clone, Serialize)]
pub struct MeasureSummary {
    /// Number of queries that have a relevant image.
    pub queries: usize,
    /// One comparison per measure, in the order of the report's `measures`.
    pub measures: Vec<MeasureComparison>,
}

/// How well the score of the first result separates answerable queries from one kind of texts that no
/// image answers.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Separation {
    /// The kind of texts that no image answers.
    pub kind: NoMatchKind,
    /// Number of them.
    pub texts: usize,
    /// Area under the ROC curve: 0.5 separates nothing, 1 everything. The interval is DeLong's.
    pub auroc: ConfidenceInterval,
    /// Difference from the baseline, paired by query; below 0 the configuration separates worse.
    pub gain: ConfidenceInterval,
}

/// How evenly the images share the first ranks.
#[derive(Debug, Clone, Serialize)]
pub struct Hubness {
    /// Number of results per query that are counted.
    pub depth: usize,
    /// Skewness of how often an image is among these results (Radovanović et al., JMLR 2010): 0 is
    /// even, far above 0 means that few images crowd out the others.
    pub skewness: f64,
    /// Share of the images that are among these results of no query.
    pub never_ranked_share: f64,
    /// The images that are the first result of most queries.
    pub hubs: Vec<HubImage>,
}

/// An image that is the first result of many queries.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct HubImage {
    /// The image's id.
    pub image_id: String,
    /// Share of the queries whose first result it is.
    pub share: f64,
}

/// How much rankings differ from the baseline's, for judged and unjudged queries.
#[derive(Debug, Clone, Serialize)]
pub struct RankingStability {
    /// Number of results per query that are compared.
    pub depth: usize,
    /// Number of queries compared.
    pub queries: usize,
    /// Share of the queries with another first result.
    pub top_hit_changed: ConfidenceInterval,
    /// Share of the queries with another result at any of these ranks.
    pub any_changed: ConfidenceInterval,
    /// Share of these results that both rankings have, in any order.
    pub overlap: ConfidenceInterval,
}

/// A query whose ranking changed.
#[derive(Debug, Clone, Serialize)]
pub struct RankingChange {
    /// The query's text.
    pub text: String,
    /// The query's group.
    pub group: Option<String>,
    /// Change of nDCG; `None` for an unjudged query.
    pub gain: Option<f64>,
    /// Share of the top results that both rankings have.
    pub overlap: f64,
    /// The baseline's first results.
    pub before: Vec<ShownResult>,
    /// This configuration's first results.
    pub after: Vec<ShownResult>,
}

/// A result of a query whose ranking changed.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct ShownResult {
    /// The image's id.
    pub image_id: String,
    /// The image's attribute `title`, if it has one.
    pub title: Option<String>,
    /// The score under the configuration that ranked it.
    pub score: f32,
    /// Whether the image is a right answer; `None` for an unjudged query.
    pub is_relevant: Option<bool>,
    /// Index into the images of the corpus, for thumbnails.
    #[serde(skip)]
    pub image_position: u32,
}

/// The queries that change most.
#[derive(Debug, Clone, Default, Serialize)]
pub struct RankingChanges {
    /// Judged queries that gain most.
    pub improved: Vec<RankingChange>,
    /// Judged queries that lose most.
    pub worsened: Vec<RankingChange>,
    /// Unjudged queries that change most, for a person to judge.
    pub unjudged: Vec<RankingChange>,
}

/// All measurements of one configuration.
#[derive(Debug, Clone, Serialize)]
pub struct ConfigurationResult {
    /// The configuration's name.
    pub name: String,
    /// The settings that it ranks with.
    pub setting: ReportedConfiguration,
    /// Measures over all judged queries; `None` if no query is judged.
    pub overall: Option<MeasureSummary>,
    /// Measures over the judged queries of each group.
    pub groups: BTreeMap<String, MeasureSummary>,
    /// Share of wrong ones among the first results that reach the configuration's `min_score`.
    pub false_hit_rate_above_min_score: Option<ConfidenceInterval>,
    /// How its prompt set fits the queries, and which weight is proposed for it; `None` for plain CLIP.
    pub bank: Option<BankReport>,
    /// How well it separates answerable queries from each kind of texts that no image answers.
    pub separation: Vec<Separation>,
    /// How evenly the images share the first ranks; `None` if only judged images are ranked.
    pub hubness: Option<Hubness>,
    /// How much the rankings differ from the baseline's; `None` for the baseline itself, and if
    /// only judged images are ranked.
    pub stability: Option<RankingStability>,
    /// What the configuration saves; `None` without a cost, without judgements, and for the
    /// baseline.
    pub savings: Option<CorrectionSavings>,
    /// Thresholds, chosen on one half of the queries and measured on the other.
    pub thresholds: Option<ThresholdReport>,
    /// The queries that change most.
    pub changes: RankingChanges,
}
