//! TODO

use std::collections::{BTreeMap, BTreeSet};

use rayon::prelude::*;

use super::configuration::RankingConfiguration;
use super::corpus::Corpus;
use super::grades::ImageGrades;
use super::rank::QueryRanking;
use super::result::{
    ConfigurationResult, CorrectionCost, HubImage, Hubness, MeasureSummary, RankingChange,
    RankingChanges, RankingStability, ShownResult,
};
use crate::balance::calibration::skewness;
use crate::evaluate::calibrate::{
    CalibrationSample, GroundTruth, ThresholdTargets, Thresholds, choose_thresholds,
};
use crate::evaluate::judgements::{JudgedQuery, Judgements, NoMatchKind, NoMatchProbe};
use crate::evaluate::measures::interval::{
    ConfidenceInterval, RESAMPLING_SEED, bootstrap_mean, compare_measures, correct_by_holm,
};
use crate::evaluate::measures::{Cutoffs, FALSE_HIT_MEASURE, JudgedRanking};

/// Queries whose change is shown, of each kind and configuration.
const MAX_SHOWN_CHANGES: usize = 8;
/// Results of a shown query.
const MAX_SHOWN_RESULTS: usize = 5;
/// Images that are told to be on top most often.
const MAX_SHOWN_HUBS: usize = 3;
/// Groups that are told apart; smaller ones than the largest so many are told as `other`.
const MAX_QUERY_GROUPS: usize = 20;

/// What is compared.
pub struct ConfigurationComparison<'a> {
    /// The images.
    pub corpus: &'a Corpus,
    /// The ways to rank.
    pub configurations: &'a [RankingConfiguration],
    /// With which of them all others are compared.
    pub baseline: usize,
    /// The queries.
    pub queries: &'a [JudgedQuery],
    /// Right images of each query.
    pub image_grades: &'a [ImageGrades],
    /// Texts that match nothing.
    pub probes: &'a [NoMatchProbe],
    /// Rankings: a row a query, then a row a probe; in it an entry a configuration.
    pub rankings: &'a [Vec<QueryRanking>],
    /// How far down is looked.
    pub cutoffs: &'a Cutoffs,
    /// What thresholds are to reach.
    pub targets: ThresholdTargets,
    /// What hand correction costs.
    pub cost: Option<CorrectionCost>,
}

impl ConfigurationComparison<'_> {
    /// Compares.
    pub fn compare_all(&self) -> Vec<ConfigurationResult> {
        let count = self.configurations.len();
        let measured: Vec<Vec<Option<Vec<f64>>>> = (0..count)
            .map(|c| (0..self.queries.len()).map(|q| self.measure_query(q, c)).collect())
            .collect();
        let mut outcomes: Vec<ConfigurationResult> = (0..count)
            .into_par_iter()
            .map(|c| self.compare_configuration(c, &measured[c], &measured[self.baseline]))
            .collect();
        self.correct_p_values(&mut outcomes);
        outcomes
    }

    fn measure_query(&self, query: usize, configuration: usize) -> Option<Vec<f64>> {
        let (right, ranked) = (&self.image_grades[query], &self.rankings[query][configuration]);
        let grades: Vec<f64> =
            ranked.top.iter().map(|(picture, _)| right.grade(*picture)).collect();
        let ideal = right.ideal_grades();
        self.cutoffs.measure(&JudgedRanking {
            grades: &grades,
            ideal_grades: &ideal,
            first_right_rank: ranked.first_right_rank,
        })
    }

    fn compare_configuration(
        &self,
        configuration: usize,
        measured: &[Option<Vec<f64>>],
        baseline: &[Option<Vec<f64>>],
    ) -> ConfigurationResult {
        let own = &self.configurations[configuration];
        let all: Vec<usize> = (0..self.queries.len()).filter(|q| measured[*q].is_some()).collect();
        let summary = |queries: &[usize]| {
            let rows = |from: &'_ [Option<Vec<f64>>]| -> Vec<Vec<f64>> {
                queries.iter().filter_map(|q| from[*q].clone()).collect()
            };
            let (new, old) = (rows(measured), rows(baseline));
            let new: Vec<&[f64]> = new.iter().map(Vec::as_slice).collect();
            let old: Vec<&[f64]> = old.iter().map(Vec::as_slice).collect();
            let columns = compare_measures(&new, &old, RESAMPLING_SEED);
            (!columns.is_empty())
                .then_some(MeasureSummary { queries: queries.len(), measures: columns })
        };
        let whole = summary(&all);
        let groups = self.group_queries(&all);
        let groups = groups.into_iter().filter_map(|(name, qs)| Some((name, summary(&qs)?)));
        let other = configuration != self.baseline;
        let false_hit =
            self.cutoffs.measure_names().iter().position(|name| name == FALSE_HIT_MEASURE);
        let gain = whole.as_ref().zip(false_hit).map(|(all, column)| all.measures[column].gain);
        let savings = self.cost.zip(gain).filter(|_| other);
        ConfigurationResult {
            name: own.name.clone(),
            setting: own.to_reported(self.corpus),
            groups: groups.collect(),
            false_hit_rate_above_min_score: self.measure_false_above(configuration, &all),
            hubness: self.measure_hubness(configuration),
            stability: other.then(|| self.measure_stability(configuration)).flatten(),
            savings: savings.map(|(cost, gain)| cost.estimate_savings(gain)),
            thresholds: self.choose_thresholds(configuration, &all),
            changes: if other {
                self.largest_changes(configuration, measured, baseline)
            } else {
                RankingChanges::default()
            },
            overall: whole,
        }
    }

    /// p values are corrected for the number of configurations, measure by measure.
    fn correct_p_values(&self, outcomes: &mut [ConfigurationResult]) {
        let others: Vec<usize> = (0..outcomes.len()).filter(|c| *c != self.baseline).collect();
        for measure in 0..self.cutoffs.measure_names().len() {
            let column = |outcome: &ConfigurationResult| {
                Some(outcome.overall.as_ref()?.measures[measure].p_value)
            };
            let p: Option<Vec<f64>> = others.iter().map(|c| column(&outcomes[*c])).collect();
            let Some(p) = p else { return };
            for (other, corrected) in others.iter().zip(correct_by_holm(&p)) {
                if let Some(all) = &mut outcomes[*other].overall {
                    all.measures[measure].p_value = corrected;
                }
            }
        }
    }

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

    fn measure_false_above(
        &self,
        configuration: usize,
        queries: &[usize],
    ) -> Option<ConfidenceInterval> {
        let min_score = self.configurations[configuration].min_score?;
        let ranked = |q: &usize| &self.rankings[*q][configuration];
        let shown: Vec<f64> = queries
            .iter()
            .filter(|q| ranked(q).best_hit.score >= min_score)
            .map(|q| f64::from(u8::from(ranked(q).first_right_rank != Some(1))))
            .collect();
        bootstrap_mean(&shown, RESAMPLING_SEED)
    }

    /// Queries whose whole ranking is looked at.
    fn fully_ranked_queries(&self) -> impl Iterator<Item = usize> {
        (0..self.queries.len()).filter(|query| !self.image_grades[*query].judged_only)
    }

    fn measure_hubness(&self, configuration: usize) -> Option<Hubness> {
        let table = &self.corpus.tables[self.configurations[configuration].table_index];
        let mut among: BTreeMap<u32, u32> = BTreeMap::new();
        let mut first: BTreeMap<u32, u32> = BTreeMap::new();
        let queries = self.fully_ranked_queries().count();
        if queries == 0 {
            return None;
        }
        for ranked in self.fully_ranked_queries().map(|query| &self.rankings[query][configuration])
        {
            for (place, (picture, _)) in ranked.top.iter().enumerate() {
                *among.entry(*picture).or_default() += 1;
                if place == 0 {
                    *first.entry(*picture).or_default() += 1;
                }
            }
        }
        let images = table.image_positions().len().max(1);
        let mut hubs: Vec<(u32, u32)> = first.into_iter().collect();
        hubs.sort_by_key(|hub| std::cmp::Reverse(hub.1));
        let hub = |(picture, count): &(u32, u32)| HubImage {
            image_id: self.corpus.images[*picture as usize].image_id.to_string(),
            share: f64::from(*count) / queries as f64,
        };
        Some(Hubness {
            depth: self.cutoffs.depth(),
            never_ranked_share: 1.0 - among.len() as f64 / images as f64,
            skewness: skewness(among.into_values(), images),
            hubs: hubs.iter().take(MAX_SHOWN_HUBS).map(hub).collect(),
        })
    }

    fn measure_stability(&self, configuration: usize) -> Option<RankingStability> {
        let truth = |is: bool| f64::from(u8::from(is));
        let (mut first, mut any, mut overlaps) = (Vec::new(), Vec::new(), Vec::new());
        for query in self.fully_ranked_queries() {
            let (old, new) = self.top_images_before_after(query, configuration);
            first.push(truth(old.first() != new.first()));
            any.push(truth(old != new));
            overlaps.push(overlap_share(&old, &new));
        }
        Some(RankingStability {
            depth: self.cutoffs.depth(),
            queries: first.len(),
            top_hit_changed: bootstrap_mean(&first, RESAMPLING_SEED)?,
            any_changed: bootstrap_mean(&any, RESAMPLING_SEED)?,
            overlap: bootstrap_mean(&overlaps, RESAMPLING_SEED)?,
        })
    }

    /// The best images of the baseline and of a configuration.
    fn top_images_before_after(&self, query: usize, configuration: usize) -> (Vec<u32>, Vec<u32>) {
        let top_images = |c: usize| self.rankings[query][c].top.iter().map(|(p, _)| *p).collect();
        (top_images(self.baseline), top_images(configuration))
    }

    fn choose_thresholds(&self, configuration: usize, judged: &[usize]) -> Option<Thresholds> {
        let hit = |row: usize| &self.rankings[row][configuration];
        // Where only judged images are looked at, the best hit is not what a user sees.
        let whole = judged.iter().filter(|q| !self.image_grades[**q].judged_only);
        let answers = whole.map(|q| CalibrationSample {
            text: &self.queries[*q].text,
            best_hit: hit(*q).best_hit,
            ground_truth: GroundTruth::HasMatch {
                best_hit_is_right: hit(*q).first_right_rank == Some(1),
            },
        });
        let absent = (0..self.queries.len())
            .filter(|q| self.queries[*q].judgements == Judgements::NoMatch)
            .map(|q| (&self.queries[q].text, q, NoMatchKind::Absent));
        let probes = self.probes.iter().enumerate();
        let probes = probes.map(|(i, probe)| (&probe.text, self.queries.len() + i, probe.kind));
        let nothing = absent.chain(probes).map(|(text, row, kind)| CalibrationSample {
            text,
            best_hit: hit(row).best_hit,
            ground_truth: GroundTruth::NoMatch(kind),
        });
        choose_thresholds(&answers.chain(nothing).collect::<Vec<_>>(), self.targets)
    }

    fn largest_changes(
        &self,
        configuration: usize,
        measured: &[Option<Vec<f64>>],
        baseline: &[Option<Vec<f64>>],
    ) -> RankingChanges {
        let ndcg = self.cutoffs.measure_names().iter().position(|name| name.starts_with("nDCG"));
        let Some(ndcg) = ndcg else { return RankingChanges::default() };
        let mut judged: Vec<(usize, f64)> = Vec::new();
        let mut unknown: Vec<(usize, f64, bool)> = Vec::new();
        for query in 0..self.queries.len() {
            if let (Some(new), Some(old)) = (&measured[query], &baseline[query]) {
                judged.push((query, new[ndcg] - old[ndcg]));
            } else {
                let (old, new) = self.top_images_before_after(query, configuration);
                if old != new {
                    unknown.push((query, overlap_share(&old, &new), old.first() != new.first()));
                }
            }
        }
        judged.sort_by(|a, b| b.1.total_cmp(&a.1));
        unknown.sort_by(|a, b| a.1.total_cmp(&b.1).then(b.2.cmp(&a.2)));
        let gain =
            |(query, gain): &(usize, f64)| self.describe_change(*query, configuration, Some(*gain));
        let up = judged.iter().filter(|(_, gain)| *gain > 0.0);
        let down = judged.iter().rev().filter(|(_, gain)| *gain < 0.0);
        RankingChanges {
            improved: up.take(MAX_SHOWN_CHANGES).map(gain).collect(),
            worsened: down.take(MAX_SHOWN_CHANGES).map(gain).collect(),
            unjudged: unknown
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
        let asked = &self.queries[query];
        let shown = |c: usize| {
            let best = self.rankings[query][c].top.iter().take(MAX_SHOWN_RESULTS);
            best.map(|(picture, score)| {
                let known = &self.corpus.images[*picture as usize];
                ShownResult {
                    image_id: known.image_id.to_string(),
                    title: known.attributes.get("title").cloned(),
                    score: *score,
                    is_relevant: gain.map(|_| self.image_grades[query].grade(*picture) > 0.0),
                    image_position: *picture,
                }
            })
            .collect()
        };
        let (old, new) = self.top_images_before_after(query, configuration);
        RankingChange {
            text: asked.text.clone(),
            group: asked.group.clone(),
            gain,
            overlap: overlap_share(&old, &new),
            before: shown(self.baseline),
            after: shown(configuration),
        }
    }
}

/// Share of the images that both have, of the longer of both.
fn overlap_share(a: &[u32], b: &[u32]) -> f64 {
    let set: BTreeSet<&u32> = a.iter().collect();
    let both = b.iter().filter(|picture| set.contains(picture)).count();
    both as f64 / a.len().max(b.len()).max(1) as f64
}
