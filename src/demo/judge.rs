//! How well a model ranks the drawn catalogue, plain and balanced: what is in each picture is
//! known, so is every right answer.

use std::collections::BTreeMap;

use rayon::prelude::*;
use serde::Serialize;

use super::catalogue::{Scene, Style};
use super::draw::{DrawError, render};
use super::queries::AttributeQuery;
use crate::balance::normalise::{Balance, Normaliser, Scale};
use crate::balance::statistics::{Statistics, dot};
use crate::clip::{ClipError, Towers};
use crate::evaluate::{Asked, Cutoffs, Judged, SEED, Summary, Truth, best, columns};
use crate::ingest::decode::{self, DecodeError};
use crate::prompts::EmbeddedSet;
use crate::record::{Embedding, Image, ImageId};

/// Pictures drawn and embedded at one time.
const BATCH: usize = 64;
/// Weights that are tried; 1 is the normaliser alone.
pub const WEIGHTS: [f32; 4] = [0.1, 0.25, 0.5, 1.0];

/// Why nothing can be judged.
#[derive(Debug, thiserror::Error)]
pub enum JudgeError {
    /// A picture could not be drawn.
    #[error(transparent)]
    Draw(#[from] DrawError),
    /// A drawn picture could not be read.
    #[error(transparent)]
    Decode(#[from] DecodeError),
    /// The model failed.
    #[error(transparent)]
    Model(#[from] ClipError),
}

/// Drawn pictures with their embeddings as they would be stored.
pub struct Drawn {
    scenes: Vec<Scene>,
    embeddings: Vec<Embedding>,
}

/// A way to rank.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Setting {
    /// Name of the prompt set; none for plain CLIP.
    pub prompt_set: Option<String>,
    /// Which formula.
    pub normaliser: Normaliser,
    /// Weight of the balanced score.
    pub weight: f32,
}

/// What a way to rank is worth, beside plain CLIP.
#[derive(Debug, Clone, Serialize)]
pub struct Verdict {
    /// The way.
    pub setting: Setting,
    /// Over all queries.
    pub all: Summary,
    /// Over the queries of each group.
    pub groups: BTreeMap<&'static str, Summary>,
}

/// The name of a drawn picture: its number.
fn id(number: usize) -> Option<ImageId> {
    ImageId::new(format!("{number:07}")).ok()
}

/// A query's raw scores and right answers, one a picture.
struct Scored {
    group: &'static str,
    raw: Vec<f32>,
    right: Vec<bool>,
}

impl Drawn {
    /// Draws and embeds `count` pictures; `on_embedded` hears how many more are done.
    pub fn draw(
        towers: &dyn Towers,
        style: Style,
        seed: u64,
        count: u64,
        side: u32,
        on_embedded: impl Fn(u64),
    ) -> Result<Self, JudgeError> {
        let scenes: Vec<Scene> = (0..count).map(|n| Scene::sample(seed, n, style)).collect();
        let mut embeddings = Vec::with_capacity(scenes.len());
        for batch in scenes.chunks(BATCH) {
            let pixels = batch
                .par_iter()
                .map(|scene| {
                    let jpeg = render(scene, side)?;
                    Ok(towers.prepare(&decode::decode(&jpeg, &decode::Options::default())?)?)
                })
                .collect::<Result<Vec<_>, JudgeError>>()?;
            let units = towers.embed_images(&pixels)?;
            embeddings.extend(units.iter().map(|unit| Embedding::round(unit)));
            on_embedded(batch.len() as u64);
        }
        Ok(Self { scenes, embeddings })
    }

    /// What is in each picture.
    pub fn scenes(&self) -> &[Scene] {
        &self.scenes
    }

    /// The pictures as a table would hold them, without statistics.
    pub fn images(&self) -> BTreeMap<ImageId, Image> {
        let image = |(number, (scene, embedding)): (usize, (&Scene, &Embedding))| {
            let image = Image {
                uri: None,
                content_hash: String::new(),
                bytes: 0,
                width: 0,
                height: 0,
                attributes: scene.attributes(),
                embedding: embedding.clone(),
                statistics: BTreeMap::new(),
            };
            Some((id(number)?, image))
        };
        self.scenes.iter().zip(&self.embeddings).enumerate().filter_map(image).collect()
    }

    /// Queries with what is known of their right answers; those that no picture matches match
    /// nothing. Their group is their difficulty.
    pub fn asked(&self, queries: &[AttributeQuery]) -> Vec<Asked> {
        let ask = |query: &AttributeQuery| {
            let matching = self.scenes.iter().enumerate().filter(|(_, scene)| query.matches(scene));
            let grades: BTreeMap<ImageId, f64> =
                matching.filter_map(|(number, _)| Some((id(number)?, 1.0))).collect();
            let truth = if grades.is_empty() {
                Truth::NoMatch
            } else {
                Truth::Graded { grades, condensed: false }
            };
            let group = Some(query.difficulty.name().to_owned());
            Asked { text: query.text.clone(), group, truth }
        };
        queries.par_iter().map(ask).collect()
    }

    /// Judges plain CLIP and every normaliser at every weight with every one of `sets`. Queries
    /// without a right answer here are left out; `group` names the group of the others.
    pub fn judge(
        &self,
        towers: &dyn Towers,
        queries: &[AttributeQuery],
        sets: &[EmbeddedSet],
        group: impl Fn(&AttributeQuery) -> &'static str + Sync,
    ) -> Result<Vec<Verdict>, JudgeError> {
        let texts: Vec<&str> = queries.iter().map(|q| q.text.as_str()).collect();
        let embedded = towers.embed_many_texts(&texts)?;
        let asked: Vec<Scored> = queries
            .par_iter()
            .zip(&embedded)
            .map(|(query, unit)| Scored {
                group: group(query),
                raw: self.embeddings.iter().map(|e| dot(unit, e.values())).collect(),
                right: self.scenes.iter().map(|scene| query.matches(scene)).collect(),
            })
            .filter(|asked| asked.right.contains(&true))
            .collect();
        let plain = measure(&asked, |_, raw| raw);
        let setting = Setting { prompt_set: None, normaliser: Normaliser::Raw, weight: 0.0 };
        let mut verdicts = vec![verdict(setting, &asked, &plain, &plain)];
        let scale = towers.card().logit_scale;
        for set in sets {
            let statistics: Vec<Statistics> =
                self.embeddings.iter().filter_map(|e| set.statistics(e)).collect();
            for normaliser in Normaliser::ALL.into_iter().filter(|n| *n != Normaliser::Raw) {
                let constants = Scale::of(normaliser, statistics.iter().copied());
                for weight in WEIGHTS {
                    let balance = Balance { normaliser, weight, lambda: 1.0, scale: constants };
                    let affine: Vec<_> =
                        statistics.iter().map(|s| balance.affine(s, scale)).collect();
                    let prompt_set = Some(set.set.name.clone());
                    let setting = Setting { prompt_set, normaliser, weight };
                    let measured = measure(&asked, |i, raw| affine[i].score(raw));
                    verdicts.push(verdict(setting, &asked, &measured, &plain));
                }
            }
        }
        Ok(verdicts)
    }
}

/// Measures of every query's ranking by `score` of a picture's index and raw score.
fn measure(asked: &[Scored], score: impl Fn(usize, f32) -> f32 + Sync) -> Vec<Vec<f64>> {
    let cutoffs = Cutoffs::default();
    asked
        .par_iter()
        .filter_map(|Scored { raw, right, .. }| {
            let scores: Vec<f32> = raw.iter().enumerate().map(|(i, r)| score(i, *r)).collect();
            let grade = |right: bool| f64::from(u8::from(right));
            let top = best(&scores, cutoffs.depth());
            let grades: Vec<f64> = top.into_iter().map(|i| grade(right[i])).collect();
            let ideal = vec![1.0; right.iter().filter(|r| **r).count()];
            let ahead = |a: usize, b: usize| scores[a].total_cmp(&scores[b]).then(b.cmp(&a));
            let first = (0..right.len()).filter(|i| right[*i]).max_by(|a, b| ahead(*a, *b));
            let place = |first| 1 + (0..right.len()).filter(|i| ahead(*i, first).is_gt()).count();
            let judged = Judged { grades: &grades, ideal: &ideal, first: first.map(place) };
            cutoffs.measure(&judged)
        })
        .collect()
}

fn verdict(
    setting: Setting,
    asked: &[Scored],
    measured: &[Vec<f64>],
    plain: &[Vec<f64>],
) -> Verdict {
    type Rows<'a> = Vec<&'a [f64]>;
    let mut groups: BTreeMap<&'static str, (Rows, Rows)> = BTreeMap::new();
    for (asked, (own, plain)) in asked.iter().zip(measured.iter().zip(plain)) {
        let (owns, plains) = groups.entry(asked.group).or_default();
        owns.push(own);
        plains.push(plain);
    }
    let summarise = |owns: &[&[f64]], plains: &[&[f64]]| Summary {
        queries: owns.len(),
        columns: columns(owns, plains, SEED),
    };
    let all: (Rows, Rows) =
        measured.iter().zip(plain).map(|(own, plain)| (own.as_slice(), plain.as_slice())).unzip();
    Verdict {
        setting,
        all: summarise(&all.0, &all.1),
        groups: groups.iter().map(|(name, (o, p))| (*name, summarise(o, p))).collect(),
    }
}
