//! TODO

use std::collections::BTreeMap;

use serde::Serialize;

use super::configuration::ReportedConfiguration;
use crate::evaluate::calibrate::Thresholds;
use crate::evaluate::measures::interval::{ConfidenceInterval, MeasureComparison};

/// What hand correction costs, by the owner's own figures.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct CorrectionCost {
    /// Minutes that somebody spends on one false first hit.
    pub minutes_per_false_hit: f64,
    /// Queries a day.
    pub queries_per_day: f64,
    /// What an hour costs; none tells minutes alone.
    pub hourly_cost: Option<f64>,
}

impl CorrectionCost {
    /// What a difference of the rate of false first hits saves: fewer save.
    pub(super) fn estimate_savings(&self, gain: ConfidenceInterval) -> CorrectionSavings {
        let minutes = gain.scaled_by(-self.minutes_per_false_hit * self.queries_per_day);
        CorrectionSavings {
            minutes_per_day: minutes,
            money_per_day: self.hourly_cost.map(|wage| minutes.scaled_by(wage / 60.0)),
        }
    }
}

/// What a configuration saves beside the baseline. Below 0: it costs more.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct CorrectionSavings {
    /// Minutes a day.
    pub minutes_per_day: ConfidenceInterval,
    /// Money a day, in the unit of the wage.
    pub money_per_day: Option<ConfidenceInterval>,
}

/// Measures over some queries, in the order of the report's `measures`.
#[derive(Debug, Clone, Serialize)]
pub struct MeasureSummary {
    /// Queries that have a right answer.
    pub queries: usize,
    /// A column a measure.
    pub measures: Vec<MeasureComparison>,
}

/// How evenly first places and places among the best fall on images.
#[derive(Debug, Clone, Serialize)]
pub struct Hubness {
    /// How far down a ranking was looked.
    pub depth: usize,
    /// Skewness of how often an image is among the best (Radovanović et al., JMLR 2010): 0 is even,
    /// far above 0 means that few images crowd out the others.
    pub skewness: f64,
    /// Share of the images that are among the best of no query.
    pub never_ranked_share: f64,
    /// Images that are first most often, with the share of the queries.
    pub hubs: Vec<HubImage>,
}

/// An image that is first of many queries.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct HubImage {
    /// Which image.
    pub image_id: String,
    /// Share of the queries whose first result it is.
    pub share: f64,
}

/// How much rankings differ from the baseline's, judged or not.
#[derive(Debug, Clone, Serialize)]
pub struct RankingStability {
    /// How far down rankings were compared.
    pub depth: usize,
    /// Queries compared.
    pub queries: usize,
    /// Share of the queries with another first result.
    pub top_hit_changed: ConfidenceInterval,
    /// Share of the queries whose best results differ in any place.
    pub any_changed: ConfidenceInterval,
    /// Share of the best results that both have, whatever their order.
    pub overlap: ConfidenceInterval,
}

/// A query whose ranking changed.
#[derive(Debug, Clone, Serialize)]
pub struct RankingChange {
    /// The query.
    pub text: String,
    /// Its group.
    pub group: Option<String>,
    /// Gain of nDCG; none where nothing is known of its right answers.
    pub gain: Option<f64>,
    /// Share of the best results that both have.
    pub overlap: f64,
    /// The baseline's best results.
    pub before: Vec<ShownResult>,
    /// This configuration's best results.
    pub after: Vec<ShownResult>,
}

/// A result of a query whose ranking changed.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct ShownResult {
    /// Which image.
    pub image_id: String,
    /// Its attribute `title`, where it has one.
    pub title: Option<String>,
    /// Its score.
    pub score: f32,
    /// Whether it is right; none where that is not known.
    pub is_relevant: Option<bool>,
    /// Place in the world, for thumbnails.
    #[serde(skip)]
    pub image_position: u32,
}

/// Queries that change most.
#[derive(Debug, Clone, Default, Serialize)]
pub struct RankingChanges {
    /// Judged queries that gain most.
    pub improved: Vec<RankingChange>,
    /// Judged queries that lose most.
    pub worsened: Vec<RankingChange>,
    /// Queries of which nothing is known that change most, for a human to look at.
    pub unjudged: Vec<RankingChange>,
}

/// What a configuration is worth.
#[derive(Debug, Clone, Serialize)]
pub struct ConfigurationResult {
    /// Its name.
    pub name: String,
    /// What it is.
    pub setting: ReportedConfiguration,
    /// Over all judged queries; none where there are none.
    pub overall: Option<MeasureSummary>,
    /// Over the judged queries of each group.
    pub groups: BTreeMap<String, MeasureSummary>,
    /// Share of false ones among the first hits that reach the configuration's `min_score`.
    pub false_hit_rate_above_min_score: Option<ConfidenceInterval>,
    /// How evenly places fall on images; none where only judged images are looked at.
    pub hubness: Option<Hubness>,
    /// How much differs from the baseline; none for the baseline itself, and where only judged
    /// images are looked at.
    pub stability: Option<RankingStability>,
    /// What is saved; none without figures of the cost, judgements, or for the baseline itself.
    pub savings: Option<CorrectionSavings>,
    /// Thresholds, chosen on one half of the queries and measured on the other.
    pub thresholds: Option<Thresholds>,
    /// The queries that change most.
    pub changes: RankingChanges,
}
