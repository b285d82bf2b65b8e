//! Configurations beside each other, over the same queries.

pub(crate) mod configuration;
pub(crate) mod rank;
pub(crate) mod world;

use std::collections::{BTreeMap, BTreeSet};

use rayon::prelude::*;
use serde::Serialize;

use super::calibrate::{Known, Sample, Thresholds, Wanted, thresholds};
use super::judgements::asked::{Asked, Truth};
use super::judgements::probes::{Probe, ProbeKind};
use super::measures::interval::{Column, Interval, SEED, bootstrap, columns, holm};
use super::measures::{Cutoffs, FALSE_HIT, Judged};
use crate::balance::calibration::skewness;
use configuration::{Configuration, Setting};
use rank::{Ranked, Right};
use world::World;

/// Queries whose change is shown, of each kind and configuration.
const SHOWN_CHANGES: usize = 8;
/// Results of a shown query.
const SHOWN_RESULTS: usize = 5;
/// Images that are told to be on top most often.
const SHOWN_HUBS: usize = 3;
/// Groups that are told apart; smaller ones than the largest so many are told as `other`.
const MAX_GROUPS: usize = 20;

/// What hand correction costs, by the owner's own figures.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct CostModel {
    /// Minutes that somebody spends on one false first hit.
    pub minutes_per_false_hit: f64,
    /// Queries a day.
    pub queries_per_day: f64,
    /// What an hour costs; none tells minutes alone.
    pub wage: Option<f64>,
}

/// What a configuration saves beside the baseline. Below 0: it costs more.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Savings {
    /// Minutes a day.
    pub minutes_per_day: Interval,
    /// Money a day, in the unit of the wage.
    pub money_per_day: Option<Interval>,
}

/// Measures over some queries, in the order of the report's `measures`.
#[derive(Debug, Clone, Serialize)]
pub struct Summary {
    /// Queries that have a right answer.
    pub queries: usize,
    /// A column a measure.
    pub columns: Vec<Column>,
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
    pub never: f64,
    /// Images that are first most often, with the share of the queries.
    pub hubs: Vec<Hub>,
}

/// An image that is first of many queries.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Hub {
    /// Which image.
    pub image_id: String,
    /// Share of the queries whose first result it is.
    pub share: f64,
}

/// How much rankings differ from the baseline's, judged or not.
#[derive(Debug, Clone, Serialize)]
pub struct Stability {
    /// How far down rankings were compared.
    pub depth: usize,
    /// Queries compared.
    pub queries: usize,
    /// Share of the queries with another first result.
    pub first_changed: Interval,
    /// Share of the queries whose best results differ in any place.
    pub any_changed: Interval,
    /// Share of the best results that both have, whatever their order.
    pub overlap: Interval,
}

/// A query whose ranking changed.
#[derive(Debug, Clone, Serialize)]
pub struct Change {
    /// The query.
    pub text: String,
    /// Its group.
    pub group: Option<String>,
    /// Gain of nDCG; none where nothing is known of its right answers.
    pub gain: Option<f64>,
    /// Share of the best results that both have.
    pub overlap: f64,
    /// The baseline's best results.
    pub before: Vec<Shown>,
    /// This configuration's best results.
    pub after: Vec<Shown>,
}

/// A result of a query whose ranking changed.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Shown {
    /// Which image.
    pub image_id: String,
    /// Its attribute `title`, where it has one.
    pub title: Option<String>,
    /// Its score.
    pub score: f32,
    /// Whether it is right; none where that is not known.
    pub right: Option<bool>,
    /// Place in the world, for thumbnails.
    #[serde(skip)]
    pub picture: u32,
}

/// Queries that change most.
#[derive(Debug, Clone, Default, Serialize)]
pub struct Changes {
    /// Judged queries that gain most.
    pub better: Vec<Change>,
    /// Judged queries that lose most.
    pub worse: Vec<Change>,
    /// Queries of which nothing is known that change most, for a human to look at.
    pub moved: Vec<Change>,
}

/// What a configuration is worth.
#[derive(Debug, Clone, Serialize)]
pub struct Outcome {
    /// Its name.
    pub name: String,
    /// What it is.
    pub setting: Setting,
    /// Over all judged queries; none where there are none.
    pub all: Option<Summary>,
    /// Over the judged queries of each group.
    pub groups: BTreeMap<String, Summary>,
    /// Share of false ones among the first hits that reach the configuration's `min_score`.
    pub false_above: Option<Interval>,
    /// How evenly places fall on images; none where only judged images are looked at.
    pub hubness: Option<Hubness>,
    /// How much differs from the baseline; none for the baseline itself, and where only judged
    /// images are looked at.
    pub stability: Option<Stability>,
    /// What is saved; none without figures of the cost, judgements, or for the baseline itself.
    pub savings: Option<Savings>,
    /// Thresholds, chosen on one half of the queries and measured on the other.
    pub thresholds: Option<Thresholds>,
    /// The queries that change most.
    pub changes: Changes,
}

/// What is compared.
pub struct Comparison<'a> {
    /// The images.
    pub world: &'a World,
    /// The ways to rank.
    pub configurations: &'a [Configuration],
    /// With which of them all others are compared.
    pub baseline: usize,
    /// The queries.
    pub asked: &'a [Asked],
    /// Right images of each query.
    pub right: &'a [Right],
    /// Texts that match nothing.
    pub probes: &'a [Probe],
    /// Rankings: a row a query, then a row a probe; in it an entry a configuration.
    pub ranked: &'a [Vec<Ranked>],
    /// How far down is looked.
    pub cutoffs: &'a Cutoffs,
    /// What thresholds are to reach.
    pub wanted: Wanted,
    /// What hand correction costs.
    pub cost: Option<CostModel>,
}

/// Right images of a query that are in the world, and how many are not.
pub fn right_of(asked: &Asked, world: &World) -> (Right, usize) {
    let Truth::Graded { grades, condensed } = &asked.truth else {
        return (Right::default(), 0);
    };
    let found: Vec<(u32, f64)> =
        grades.iter().filter_map(|(id, grade)| Some((world.place(id)?, *grade))).collect();
    let missing = grades.len() - found.len();
    (Right { grades: found, condensed: *condensed }, missing)
}

impl Comparison<'_> {
    /// Compares.
    pub fn outcomes(&self) -> Vec<Outcome> {
        let count = self.configurations.len();
        let measured: Vec<Vec<Option<Vec<f64>>>> = (0..count)
            .map(|c| (0..self.asked.len()).map(|q| self.measure(q, c)).collect())
            .collect();
        let mut outcomes: Vec<Outcome> = (0..count)
            .into_par_iter()
            .map(|c| self.outcome(c, &measured[c], &measured[self.baseline]))
            .collect();
        self.correct(&mut outcomes);
        outcomes
    }

    fn measure(&self, query: usize, configuration: usize) -> Option<Vec<f64>> {
        let (right, ranked) = (&self.right[query], &self.ranked[query][configuration]);
        let grades: Vec<f64> =
            ranked.best.iter().map(|(picture, _)| right.grade(*picture)).collect();
        let ideal = right.ideal();
        self.cutoffs.measure(&Judged { grades: &grades, ideal: &ideal, first: ranked.first })
    }

    fn outcome(
        &self,
        configuration: usize,
        measured: &[Option<Vec<f64>>],
        baseline: &[Option<Vec<f64>>],
    ) -> Outcome {
        let own = &self.configurations[configuration];
        let all: Vec<usize> = (0..self.asked.len()).filter(|q| measured[*q].is_some()).collect();
        let summary = |queries: &[usize]| {
            let rows = |from: &'_ [Option<Vec<f64>>]| -> Vec<Vec<f64>> {
                queries.iter().filter_map(|q| from[*q].clone()).collect()
            };
            let (new, old) = (rows(measured), rows(baseline));
            let new: Vec<&[f64]> = new.iter().map(Vec::as_slice).collect();
            let old: Vec<&[f64]> = old.iter().map(Vec::as_slice).collect();
            let columns = columns(&new, &old, SEED);
            (!columns.is_empty()).then_some(Summary { queries: queries.len(), columns })
        };
        let whole = summary(&all);
        let groups = self.groups(&all);
        let groups = groups.into_iter().filter_map(|(name, qs)| Some((name, summary(&qs)?)));
        let other = configuration != self.baseline;
        let false_hit = self.cutoffs.names().iter().position(|name| name == FALSE_HIT);
        let gain = whole.as_ref().zip(false_hit).map(|(all, column)| all.columns[column].gain);
        let savings = self.cost.zip(gain).filter(|_| other);
        Outcome {
            name: own.name.clone(),
            setting: own.setting(self.world),
            groups: groups.collect(),
            false_above: self.false_above(configuration, &all),
            hubness: self.hubness(configuration),
            stability: other.then(|| self.stability(configuration)).flatten(),
            savings: savings.map(|(cost, gain)| cost.savings(gain)),
            thresholds: self.thresholds(configuration, &all),
            changes: if other {
                self.changes(configuration, measured, baseline)
            } else {
                Changes::default()
            },
            all: whole,
        }
    }

    /// p values are corrected for the number of configurations, measure by measure.
    fn correct(&self, outcomes: &mut [Outcome]) {
        let others: Vec<usize> = (0..outcomes.len()).filter(|c| *c != self.baseline).collect();
        for measure in 0..self.cutoffs.names().len() {
            let column = |outcome: &Outcome| Some(outcome.all.as_ref()?.columns[measure].p);
            let p: Option<Vec<f64>> = others.iter().map(|c| column(&outcomes[*c])).collect();
            let Some(p) = p else { return };
            for (other, corrected) in others.iter().zip(holm(&p)) {
                if let Some(all) = &mut outcomes[*other].all {
                    all.columns[measure].p = corrected;
                }
            }
        }
    }

    fn groups(&self, queries: &[usize]) -> BTreeMap<String, Vec<usize>> {
        let mut groups: BTreeMap<String, Vec<usize>> = BTreeMap::new();
        for query in queries {
            if let Some(group) = &self.asked[*query].group {
                groups.entry(group.clone()).or_default().push(*query);
            }
        }
        if groups.len() > MAX_GROUPS {
            let mut largest: Vec<(usize, String)> =
                groups.iter().map(|(name, queries)| (queries.len(), name.clone())).collect();
            largest.sort_unstable_by(|a, b| b.0.cmp(&a.0).then_with(|| a.1.cmp(&b.1)));
            let rest = largest.into_iter().skip(MAX_GROUPS);
            let mut other: Vec<usize> =
                rest.filter_map(|(_, name)| groups.remove(&name)).flatten().collect();
            other.sort_unstable();
            groups.entry("other".into()).or_default().append(&mut other);
        }
        groups
    }

    fn false_above(&self, configuration: usize, queries: &[usize]) -> Option<Interval> {
        let least = self.configurations[configuration].min_score?;
        let ranked = |q: &usize| &self.ranked[*q][configuration];
        let shown: Vec<f64> = queries
            .iter()
            .filter(|q| ranked(q).hit.score >= least)
            .map(|q| f64::from(u8::from(ranked(q).first != Some(1))))
            .collect();
        bootstrap(&shown, SEED)
    }

    /// Queries whose whole ranking is looked at.
    fn whole(&self) -> impl Iterator<Item = usize> {
        (0..self.asked.len()).filter(|query| !self.right[*query].condensed)
    }

    fn hubness(&self, configuration: usize) -> Option<Hubness> {
        let table = &self.world.tables[self.configurations[configuration].table];
        let mut among: BTreeMap<u32, u32> = BTreeMap::new();
        let mut first: BTreeMap<u32, u32> = BTreeMap::new();
        let queries = self.whole().count();
        if queries == 0 {
            return None;
        }
        for ranked in self.whole().map(|query| &self.ranked[query][configuration]) {
            for (place, (picture, _)) in ranked.best.iter().enumerate() {
                *among.entry(*picture).or_default() += 1;
                if place == 0 {
                    *first.entry(*picture).or_default() += 1;
                }
            }
        }
        let images = table.pictures().len().max(1);
        let mut hubs: Vec<(u32, u32)> = first.into_iter().collect();
        hubs.sort_by_key(|hub| std::cmp::Reverse(hub.1));
        let hub = |(picture, count): &(u32, u32)| Hub {
            image_id: self.world.pictures[*picture as usize].image_id.to_string(),
            share: f64::from(*count) / queries as f64,
        };
        Some(Hubness {
            depth: self.cutoffs.depth(),
            never: 1.0 - among.len() as f64 / images as f64,
            skewness: skewness(among.into_values(), images),
            hubs: hubs.iter().take(SHOWN_HUBS).map(hub).collect(),
        })
    }

    fn stability(&self, configuration: usize) -> Option<Stability> {
        let truth = |is: bool| f64::from(u8::from(is));
        let (mut first, mut any, mut overlaps) = (Vec::new(), Vec::new(), Vec::new());
        for query in self.whole() {
            let (old, new) = self.pair(query, configuration);
            first.push(truth(old.first() != new.first()));
            any.push(truth(old != new));
            overlaps.push(overlap(&old, &new));
        }
        Some(Stability {
            depth: self.cutoffs.depth(),
            queries: first.len(),
            first_changed: bootstrap(&first, SEED)?,
            any_changed: bootstrap(&any, SEED)?,
            overlap: bootstrap(&overlaps, SEED)?,
        })
    }

    /// The best images of the baseline and of a configuration.
    fn pair(&self, query: usize, configuration: usize) -> (Vec<u32>, Vec<u32>) {
        let of = |c: usize| self.ranked[query][c].best.iter().map(|(p, _)| *p).collect();
        (of(self.baseline), of(configuration))
    }

    fn thresholds(&self, configuration: usize, judged: &[usize]) -> Option<Thresholds> {
        let hit = |row: usize| &self.ranked[row][configuration];
        // Where only judged images are looked at, the best hit is not what a user sees.
        let whole = judged.iter().filter(|q| !self.right[**q].condensed);
        let answers = whole.map(|q| Sample {
            text: &self.asked[*q].text,
            hit: hit(*q).hit,
            known: Known::Answer { right: hit(*q).first == Some(1) },
        });
        let absent = (0..self.asked.len())
            .filter(|q| self.asked[*q].truth == Truth::NoMatch)
            .map(|q| (&self.asked[q].text, q, ProbeKind::Absent));
        let probes = self.probes.iter().enumerate();
        let probes = probes.map(|(i, probe)| (&probe.text, self.asked.len() + i, probe.kind));
        let nothing = absent.chain(probes).map(|(text, row, kind)| Sample {
            text,
            hit: hit(row).hit,
            known: Known::Nothing(kind),
        });
        thresholds(&answers.chain(nothing).collect::<Vec<_>>(), self.wanted)
    }

    fn changes(
        &self,
        configuration: usize,
        measured: &[Option<Vec<f64>>],
        baseline: &[Option<Vec<f64>>],
    ) -> Changes {
        let ndcg = self.cutoffs.names().iter().position(|name| name.starts_with("nDCG"));
        let Some(ndcg) = ndcg else { return Changes::default() };
        let mut judged: Vec<(usize, f64)> = Vec::new();
        let mut unknown: Vec<(usize, f64, bool)> = Vec::new();
        for query in 0..self.asked.len() {
            if let (Some(new), Some(old)) = (&measured[query], &baseline[query]) {
                judged.push((query, new[ndcg] - old[ndcg]));
            } else {
                let (old, new) = self.pair(query, configuration);
                if old != new {
                    unknown.push((query, overlap(&old, &new), old.first() != new.first()));
                }
            }
        }
        judged.sort_by(|a, b| b.1.total_cmp(&a.1));
        unknown.sort_by(|a, b| a.1.total_cmp(&b.1).then(b.2.cmp(&a.2)));
        let gain = |(query, gain): &(usize, f64)| self.change(*query, configuration, Some(*gain));
        let up = judged.iter().filter(|(_, gain)| *gain > 0.0);
        let down = judged.iter().rev().filter(|(_, gain)| *gain < 0.0);
        Changes {
            better: up.take(SHOWN_CHANGES).map(gain).collect(),
            worse: down.take(SHOWN_CHANGES).map(gain).collect(),
            moved: unknown
                .iter()
                .take(SHOWN_CHANGES)
                .map(|(query, ..)| self.change(*query, configuration, None))
                .collect(),
        }
    }

    fn change(&self, query: usize, configuration: usize, gain: Option<f64>) -> Change {
        let asked = &self.asked[query];
        let shown = |c: usize| {
            let best = self.ranked[query][c].best.iter().take(SHOWN_RESULTS);
            best.map(|(picture, score)| {
                let known = &self.world.pictures[*picture as usize];
                Shown {
                    image_id: known.image_id.to_string(),
                    title: known.attributes.get("title").cloned(),
                    score: *score,
                    right: gain.map(|_| self.right[query].grade(*picture) > 0.0),
                    picture: *picture,
                }
            })
            .collect()
        };
        let (old, new) = self.pair(query, configuration);
        Change {
            text: asked.text.clone(),
            group: asked.group.clone(),
            gain,
            overlap: overlap(&old, &new),
            before: shown(self.baseline),
            after: shown(configuration),
        }
    }
}

impl CostModel {
    /// What a difference of the rate of false first hits saves: fewer save.
    fn savings(&self, gain: Interval) -> Savings {
        let minutes = gain.times(-self.minutes_per_false_hit * self.queries_per_day);
        Savings {
            minutes_per_day: minutes,
            money_per_day: self.wage.map(|wage| minutes.times(wage / 60.0)),
        }
    }
}

/// Share of the images that both have, of the longer of both.
fn overlap(a: &[u32], b: &[u32]) -> f64 {
    let set: BTreeSet<&u32> = a.iter().collect();
    let both = b.iter().filter(|picture| set.contains(picture)).count();
    both as f64 / a.len().max(b.len()).max(1) as f64
}
