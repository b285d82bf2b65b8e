//! Compares the rankings of all configurations with those of the baseline.

use std::collections::{BTreeMap, BTreeSet};

use rayon::prelude::*;

use super::configuration::ComparedConfiguration;
use super::corpus::CorpusImage;
use super::grades::ImageGrades;
use super::rank::QueryRanking;
use super::result::{
    ConfigurationResult, CorrectionCost, HubImage, Hubness, MeasureSummary, RankingChange,
    RankingChanges, RankingStability, Separation, ShownResult,
};
use crate::balance::calibration::skewness;
use crate::evaluate::calibrate::{
    CalibrationSample, GroundTruth, ThresholdReport, ThresholdTargets, choose_thresholds,
};
use crate::evaluate::judgements::{JudgedQuery, Judgements, NoMatchKind, NoMatchProbe};
use crate::evaluate::measures::interval::{
    ConfidenceInterval, RESAMPLING_SEED, bootstrap_mean, compare_measures, correct_by_holm,
};
use crate::evaluate::measures::separation::{FirstScores, compare_separation};
use crate::evaluate::measures::{Cutoffs, FALSE_HIT_MEASURE, JudgedRanking};

/// Changed queries in each list of [`RankingChanges`].
const MAX_SHOWN_CHANGES: usize = 8;
/// Results shown of a changed query.
const MAX_SHOWN_RESULTS: usize = 5;
/// Images in [`Hubness::hubs`].
const MAX_SHOWN_HUBS: usize = 3;
/// Groups that are measured separately: the largest ones. All smaller ones together become `other`.
const MAX_QUERY_GROUPS: usize = 20;

/// Rankings of the same queries under several configurations, ready to be compared.
pub struct ConfigurationComparison<'a> {
    /// The images that were ranked.
    pub images: &'a [CorpusImage],
    /// The configurations that ranked them.
    pub configurations: &'a [ComparedConfiguration],
    /// Index of the configuration with which all others are compared.
    pub baseline_index: usize,
    /// The queries that were ranked.
    pub queries: &'a [JudgedQuery],
    /// Grades of the judged images of each query.
    pub image_grades: &'a [ImageGrades],
    /// Texts that match no image.
    pub probes: &'a [NoMatchProbe],
    /// One row per query, then one row per probe; each has one entry per configuration.
    pub rankings: &'a [Vec<QueryRanking>],
    /// The ranks down to which the measures go.
    pub cutoffs: &'a Cutoffs,
    /// What chosen thresholds must achieve.
    pub threshold_targets: ThresholdTargets,
    /// The cost of manual correction, if the owner gave it.
    pub correction_cost: Option<CorrectionCost>,
}

impl ConfigurationComparison<'_> {
    /// Measures every configuration and compares it with the baseline.
    pub fn compare_all(&self) -> Vec<ConfigurationResult> {
        let count = self.configurations.len();
        let measured: Vec<Vec<Option<Vec<f64>>>> = (0..count)
            .map(|c| (0..self.queries.len()).map(|q| self.measure_query(q, c)).collect())
            .collect();
        let mut results: Vec<ConfigurationResult> = (0..count)
            .into_par_iter()
            .map(|c| self.compare_configuration(c, &measured[c], &measured[self.baseline_index]))
            .collect();
        self.correct_p_values(&mut results);
        results
    }

    /// Returns the measures of one ranking; `None` if the query has no relevant image.
    fn measure_query(&self, query: usize, configuration: usize) -> Option<Vec<f64>> {
        let (judged, ranking) = (&self.image_grades[query], &self.rankings[query][configuration]);
        let grades: Vec<f64> =
            ranking.top_results.iter().map(|(position, _)| judged.grade_of(*position)).collect();
        let ideal = judged.ideal_grades();
        self.cutoffs.measure_ranking(&JudgedRanking {
            top_grades: &grades,
            ideal_grades: &ideal,
            right_ranks: &ranking.right_ranks,
        })
    }

    fn compare_configuration(
        &self,
        configuration: usize,
        measured: &[Option<Vec<f64>>],
        baseline: &[Option<Vec<f64>>],
    ) -> ConfigurationResult {
        let settings = &self.configurations[configuration];
        let judged_queries: Vec<usize> =
            (0..self.queries.len()).filter(|q| measured[*q].is_some()).collect();
        let summarise = |queries: &[usize]| {
            let rows = |measured: &'_ [Option<Vec<f64>>]| -> Vec<Vec<f64>> {
                queries.iter().filter_map(|q| measured[*q].clone()).collect()
            };
            let (new, old) = (rows(measured), rows(baseline));
            let new: Vec<&[f64]> = new.iter().map(Vec::as_slice).collect();
            let old: Vec<&[f64]> = old.iter().map(Vec::as_slice).collect();
            let columns = compare_measures(&new, &old, RESAMPLING_SEED);
            (!columns.is_empty())
                .then_some(MeasureSummary { queries: queries.len(), measures: columns })
        };
        let overall = summarise(&judged_queries);
        let groups = self.group_queries(&judged_queries);
        let groups = groups.into_iter().filter_map(|(name, qs)| Some((name, summarise(&qs)?)));
        let is_baseline = configuration == self.baseline_index;
        let false_hit =
            self.cutoffs.measure_names().iter().position(|name| name == FALSE_HIT_MEASURE);
        let false_hit_gain =
            overall.as_ref().zip(false_hit).map(|(all, measure)| all.measures[measure].gain);
        let savings = self.correction_cost.zip(false_hit_gain).filter(|_| !is_baseline);
        ConfigurationResult {
            name: settings.name.clone(),
            setting: settings.setting.clone(),
            groups: groups.collect(),
            false_hit_rate_above_min_score: self
                .measure_false_hits_above_min_score(configuration, &judged_queries),
            bank: settings.bank.clone(),
            separation: self.measure_separation(configuration, &judged_queries),
            hubness: self.measure_hubness(configuration),
            stability: (!is_baseline).then(|| self.measure_stability(configuration)).flatten(),
            savings: savings.map(|(cost, gain)| cost.estimate_savings(gain)),
            thresholds: self.choose_thresholds(configuration, &judged_queries),
            changes: if is_baseline {
                RankingChanges::default()
            } else {
                self.largest_changes(configuration, measured, baseline)
            },
            overall,
        }
    }

    /// Corrects the p values of each measure for the number of configurations compared.
    fn correct_p_values(&self, results: &mut [ConfigurationResult]) {
        let others: Vec<usize> = (0..results.len()).filter(|c| *c != self.baseline_index).collect();
        for measure in 0..self.cutoffs.measure_names().len() {
            let p_value = |result: &ConfigurationResult| {
                Some(result.overall.as_ref()?.measures[measure].p_value)
            };
            let p: Option<Vec<f64>> = others.iter().map(|c| p_value(&results[*c])).collect();
            let Some(p) = p else { return };
            for (other, corrected) in others.iter().zip(correct_by_holm(&p)) {
                if let Some(all) = &mut results[*other].overall {
                    all.measures[measure].p_value = corrected;
                }
            }
        }
    }

    /// Returns the queries of each group, at most [`MAX_QUERY_GROUPS`] and `other`.
    fn group_queries(&self, queries: &[usize]) -> BTreeMap<String, Vec<usize>> {
        let mut groups: BTreeMap<String, Vec<usize>> = BTreeMap::new();
        for query in queries {
            if let Some(group) = &self.queries[*query].group {
                groups.entry(group.clone()).or_default().push(*query);
            }
        }
        if groups.len() > MAX_QUERY_GROUPS {
            let mut largest: Vec<(usize, String)> =
                groups.iter().map(|(name, queries)| (queries.len(), name.clone())).collect();
            largest.sort_unstable_by(|a, b| b.0.cmp(&a.0).then_with(|| a.1.cmp(&b.1)));
            let rest = largest.into_iter().skip(MAX_QUERY_GROUPS);
            let mut other: Vec<usize> =
                rest.filter_map(|(_, name)| groups.remove(&name)).flatten().collect();
            other.sort_unstable();
            groups.entry("other".into()).or_default().append(&mut other);
        }
        groups
    }

    fn measure_false_hits_above_min_score(
        &self,
        configuration: usize,
        queries: &[usize],
    ) -> Option<ConfidenceInterval> {
        let min_score = self.configurations[configuration].setting.min_score?;
        let ranking = |q: &usize| &self.rankings[*q][configuration];
        let false_hits: Vec<f64> = queries
            .iter()
            .filter(|q| ranking(q).best_hit_features.score >= min_score)
            .map(|q| f64::from(u8::from(!ranking(q).is_first_right())))
            .collect();
        bootstrap_mean(&false_hits, RESAMPLING_SEED)
    }

    /// Returns the queries for which all images are ranked, not only judged ones.
    fn fully_ranked_queries(&self) -> impl Iterator<Item = usize> {
        (0..self.queries.len()).filter(|query| !self.image_grades[*query].judged_only)
    }

    fn measure_hubness(&self, configuration: usize) -> Option<Hubness> {
        let mut top_counts: BTreeMap<u32, u32> = BTreeMap::new();
        let mut first_counts: BTreeMap<u32, u32> = BTreeMap::new();
        let queries = self.fully_ranked_queries().count();
        if queries == 0 {
            return None;
        }
        for query in self.fully_ranked_queries() {
            let top = &self.rankings[query][configuration].top_results;
            for (index, (position, _)) in top.iter().enumerate() {
                *top_counts.entry(*position).or_default() += 1;
                if index == 0 {
                    *first_counts.entry(*position).or_default() += 1;
                }
            }
        }
        let images = self.configurations[configuration].image_count.max(1);
        let mut hubs: Vec<(u32, u32)> = first_counts.into_iter().collect();
        hubs.sort_by_key(|hub| std::cmp::Reverse(hub.1));
        let hub_image = |(position, count): &(u32, u32)| HubImage {
            image_id: self.images[*position as usize].image_id.to_string(),
            share: f64::from(*count) / queries as f64,
        };
        Some(Hubness {
            depth: self.cutoffs.depth(),
            never_ranked_share: 1.0 - top_counts.len() as f64 / images as f64,
            skewness: skewness(top_counts.into_values(), images),
            hubs: hubs.iter().take(MAX_SHOWN_HUBS).map(hub_image).collect(),
        })
    }

    fn measure_stability(&self, configuration: usize) -> Option<RankingStability> {
        let as_number = |is_true: bool| f64::from(u8::from(is_true));
        let (mut first_changed, mut any_changed, mut overlaps) =
            (Vec::new(), Vec::new(), Vec::new());
        for query in self.fully_ranked_queries() {
            let (old, new) = self.baseline_and_new_top_images(query, configuration);
            first_changed.push(as_number(old.first() != new.first()));
            any_changed.push(as_number(old != new));
            overlaps.push(overlap_share(&old, &new));
        }
        Some(RankingStability {
            depth: self.cutoffs.depth(),
            queries: first_changed.len(),
            top_hit_changed: bootstrap_mean(&first_changed, RESAMPLING_SEED)?,
            any_changed: bootstrap_mean(&any_changed, RESAMPLING_SEED)?,
            overlap: bootstrap_mean(&overlaps, RESAMPLING_SEED)?,
        })
    }

    /// Returns the top images under the baseline and under a configuration.
    fn baseline_and_new_top_images(
        &self,
        query: usize,
        configuration: usize,
    ) -> (Vec<u32>, Vec<u32>) {
        let top_images =
            |c: usize| self.rankings[query][c].top_results.iter().map(|(p, _)| *p).collect();
        (top_images(self.baseline_index), top_images(configuration))
    }

    fn choose_thresholds(&self, configuration: usize, judged: &[usize]) -> Option<ThresholdReport> {
        let ranking = |row: usize| &self.rankings[row][configuration];
        // If only judged images are ranked, the first result is not the one that a user sees.
        let fully_ranked = judged.iter().filter(|q| !self.image_grades[**q].judged_only);
        let with_match = fully_ranked.map(|q| CalibrationSample {
            text: &self.queries[*q].text,
            best_hit: ranking(*q).best_hit_features,
            ground_truth: GroundTruth::HasMatch { best_hit_is_right: ranking(*q).is_first_right() },
        });
        let without_match = self.texts_without_match().map(|(text, row, kind)| CalibrationSample {
            text,
            best_hit: ranking(row).best_hit_features,
            ground_truth: GroundTruth::NoMatch(kind),
        });
        choose_thresholds(
            &with_match.chain(without_match).collect::<Vec<_>>(),
            self.threshold_targets,
        )
    }

    /// Returns the texts that no image matches, with their rows in the rankings.
    fn texts_without_match(&self) -> impl Iterator<Item = (&String, usize, NoMatchKind)> {
        let absent = (0..self.queries.len())
            .filter(|q| self.queries[*q].judgements == Judgements::NoMatch)
            .map(|q| (&self.queries[q].text, q, NoMatchKind::Absent));
        let probes = self.probes.iter().enumerate();
        let probes = probes.map(|(i, probe)| (&probe.text, self.queries.len() + i, probe.kind));
        absent.chain(probes)
    }

    fn measure_separation(&self, configuration: usize, judged: &[usize]) -> Vec<Separation> {
        let score = |row: usize, c: usize| f64::from(self.rankings[row][c].best_hit_features.score);
        // If only judged images are ranked, the first result is not the one that a user sees.
        let answerable: Vec<usize> =
            judged.iter().copied().filter(|q| !self.image_grades[*q].judged_only).collect();
        let separate = |kind: NoMatchKind| {
            let texts = self.texts_without_match().filter(|(_, _, other)| *other == kind);
            let rows: Vec<usize> = texts.map(|(_, row, _)| row).collect();
            let scores = |c: usize| FirstScores {
                answerable: answerable.iter().map(|row| score(*row, c)).collect(),
                unanswerable: rows.iter().map(|row| score(*row, c)).collect(),
            };
            let compared =
                compare_separation(&scores(configuration), &scores(self.baseline_index))?;
            let (auroc, gain) = (compared.auroc, compared.gain);
            Some(Separation { kind, texts: rows.len(), auroc, gain })
        };
        NoMatchKind::ALL.into_iter().filter_map(separate).collect()
    }

    /// Returns the queries whose rankings differ most from the baseline's: judged ones by nDCG,
    /// unjudged ones by overlap.
    fn largest_changes(
        &self,
        configuration: usize,
        measured: &[Option<Vec<f64>>],
        baseline: &[Option<Vec<f64>>],
    ) -> RankingChanges {
        let ndcg = self.cutoffs.measure_names().iter().position(|name| name.starts_with("nDCG"));
        let Some(ndcg) = ndcg else { return RankingChanges::default() };
        let mut judged: Vec<(usize, f64)> = Vec::new();
        let mut unjudged: Vec<(usize, f64, bool)> = Vec::new();
        for query in 0..self.queries.len() {
            if let (Some(new), Some(old)) = (&measured[query], &baseline[query]) {
                judged.push((query, new[ndcg] - old[ndcg]));
            } else {
                let (old, new) = self.baseline_and_new_top_images(query, configuration);
                if old != new {
                    unjudged.push((query, overlap_share(&old, &new), old.first() != new.first()));
                }
            }
        }
        judged.sort_by(|a, b| b.1.total_cmp(&a.1));
        unjudged.sort_by(|a, b| a.1.total_cmp(&b.1).then(b.2.cmp(&a.2)));
        let describe_judged =
            |(query, gain): &(usize, f64)| self.describe_change(*query, configuration, Some(*gain));
        let improved = judged.iter().filter(|(_, gain)| *gain > 0.0);
        let worsened = judged.iter().rev().filter(|(_, gain)| *gain < 0.0);
        RankingChanges {
            improved: improved.take(MAX_SHOWN_CHANGES).map(describe_judged).collect(),
            worsened: worsened.take(MAX_SHOWN_CHANGES).map(describe_judged).collect(),
            unjudged: unjudged
                .iter()
                .take(MAX_SHOWN_CHANGES)
                .map(|(query, ..)| self.describe_change(*query, configuration, None))
                .collect(),
        }
    }

    fn describe_change(
        &self,
        query: usize,
        configuration: usize,
        gain: Option<f64>,
    ) -> RankingChange {
        let judged_query = &self.queries[query];
        let shown_results = |c: usize| {
            let top = self.rankings[query][c].top_results.iter().take(MAX_SHOWN_RESULTS);
            top.map(|(position, score)| {
                let image = &self.images[*position as usize];
                ShownResult {
                    image_id: image.image_id.to_string(),
                    title: image.attributes.get("title").cloned(),
                    score: *score,
                    is_relevant: gain.map(|_| self.image_grades[query].grade_of(*position) > 0.0),
                    image_position: *position,
                }
            })
            .collect()
        };
        let (old, new) = self.baseline_and_new_top_images(query, configuration);
        RankingChange {
            text: judged_query.text.clone(),
            group: judged_query.group.clone(),
            gain,
            overlap: overlap_share(&old, &new),
            before: shown_results(self.baseline_index),
            after: shown_results(configuration),
        }
    }
}

/// Returns the number of images that both lists have, divided by the length of the longer one.
fn overlap_share(a: &[u32], b: &[u32]) -> f64 {
    let in_a: BTreeSet<&u32> = a.iter().collect();
    let common = b.iter().filter(|image| in_a.contains(image)).count();
    common as f64 / a.len().max(b.len()).max(1) as f64
}
