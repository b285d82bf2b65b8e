//! How well a model ranks the drawn catalogue, plain and balanced: what is in each picture is
//! known, so is every right answer.

use rayon::prelude::*;
use serde::Serialize;

use super::catalogue::{Scene, Style};
use super::draw::{DrawError, render};
use super::queries::AttributeQuery;
use crate::clip::{ClipError, Towers};
use crate::decode::{self, DecodeError};
use crate::evaluate::{DEPTH, Interval, Measures, best, bootstrap};
use crate::normalise::{Balance, Normaliser, Scale};
use crate::prompts::EmbeddedSet;
use crate::record::Embedding;
use crate::statistics::{Statistics, dot};

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
pub struct Judged {
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

/// What a way to rank is worth over all queries.
#[derive(Debug, Clone, Serialize)]
pub struct Verdict {
    /// The way.
    pub setting: Setting,
    /// Queries that have a right answer.
    pub queries: usize,
    /// In the order of [`Measures::NAMES`].
    pub measures: Vec<Interval>,
}

impl Judged {
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

    /// Judges plain CLIP and every normaliser at every weight with every one of `sets`.
    pub fn judge(
        &self,
        towers: &dyn Towers,
        queries: &[AttributeQuery],
        sets: &[EmbeddedSet],
    ) -> Result<Vec<Verdict>, JudgeError> {
        let texts: Vec<&str> = queries.iter().map(|q| q.text.as_str()).collect();
        let mut embedded = Vec::with_capacity(texts.len());
        for batch in texts.chunks(BATCH) {
            embedded.extend(towers.embed_texts(batch)?);
        }
        let asked: Vec<(Vec<f32>, Vec<bool>)> = queries
            .par_iter()
            .zip(&embedded)
            .map(|(query, unit)| {
                let raw = self.embeddings.iter().map(|e| dot(unit, e.values())).collect();
                (raw, self.scenes.iter().map(|scene| query.matches(scene)).collect())
            })
            .collect();
        let plain = Setting { prompt_set: None, normaliser: Normaliser::Raw, weight: 0.0 };
        let mut verdicts = vec![verdict(plain, &asked, |_, raw| raw)];
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
                    verdicts.push(verdict(setting, &asked, |i, raw| affine[i].score(raw)));
                }
            }
        }
        Ok(verdicts)
    }
}

fn verdict(
    setting: Setting,
    asked: &[(Vec<f32>, Vec<bool>)],
    score: impl Fn(usize, f32) -> f32 + Sync,
) -> Verdict {
    let measured: Vec<Measures> = asked
        .par_iter()
        .filter_map(|(raw, right)| {
            let scores: Vec<f32> = raw.iter().enumerate().map(|(i, r)| score(i, *r)).collect();
            let top: Vec<bool> = best(&scores, DEPTH).into_iter().map(|i| right[i]).collect();
            Measures::of(&top, right.iter().filter(|r| **r).count())
        })
        .collect();
    let interval = |m: usize| {
        let values: Vec<f64> = measured.iter().map(|measures| measures.values()[m]).collect();
        bootstrap(&values, 1)
    };
    Verdict {
        setting,
        queries: measured.len(),
        measures: (0..Measures::NAMES.len()).filter_map(interval).collect(),
    }
}
