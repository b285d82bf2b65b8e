//! How well a model ranks the drawn catalogue, plain and balanced: what is in each picture is
//! known, so is every right answer.

use std::collections::BTreeMap;

use rayon::prelude::*;
use serde::Serialize;

use super::catalogue::{PhotoStyle, Scene};
use super::draw::{DrawError, render_jpeg};
use super::queries::AttributeQuery;
use crate::balance::normalise::{BalanceParameters, Normaliser, ScaleConstants};
use crate::balance::statistics::{ScoreStatistics, dot_product};
use crate::clip::{ClipError, Encoders};
use crate::evaluate::{
    Cutoffs, JudgedQuery, JudgedRanking, Judgements, MeasureSummary, RESAMPLING_SEED,
    compare_measures, top_indices,
};
use crate::ingest::decode::{self, DecodeError};
use crate::prompts::EmbeddedPromptSet;
use crate::record::{Embedding, ImageId, StoredImage};

/// Pictures drawn and embedded at one time.
const IMAGES_PER_BATCH: usize = 64;
/// Weights that are tried; 1 is the normaliser alone.
pub const TRIED_WEIGHTS: [f32; 4] = [0.1, 0.25, 0.5, 1.0];

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
pub struct DrawnImages {
    scenes: Vec<Scene>,
    embeddings: Vec<Embedding>,
}

/// A way to rank.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct RankingSetting {
    /// Name of the prompt set; none for plain CLIP.
    pub prompt_set: Option<String>,
    /// Which formula.
    pub normaliser: Normaliser,
    /// Weight of the balanced score.
    pub weight: f32,
}

/// What a way to rank is worth, beside plain CLIP.
#[derive(Debug, Clone, Serialize)]
pub struct SettingResult {
    /// The way.
    pub setting: RankingSetting,
    /// Over all queries.
    pub overall: MeasureSummary,
    /// Over the queries of each group.
    pub groups: BTreeMap<&'static str, MeasureSummary>,
}

/// The name of a drawn picture: its number.
fn drawn_image_id(number: usize) -> Option<ImageId> {
    ImageId::new(format!("{number:07}")).ok()
}

/// A query's raw scores and right answers, one a picture.
struct ScoredQuery {
    group: &'static str,
    raw_scores: Vec<f32>,
    is_right: Vec<bool>,
}

impl DrawnImages {
    /// Draws and embeds `count` pictures; `on_embedded` hears how many more are done.
    pub fn draw(
        encoders: &dyn Encoders,
        style: PhotoStyle,
        seed: u64,
        count: u64,
        side: u32,
        on_embedded: impl Fn(u64),
    ) -> Result<Self, JudgeError> {
        let scenes: Vec<Scene> = (0..count).map(|n| Scene::sample(seed, n, style)).collect();
        let mut embeddings = Vec::with_capacity(scenes.len());
        for batch in scenes.chunks(IMAGES_PER_BATCH) {
            let pixels = batch
                .par_iter()
                .map(|scene| {
                    let jpeg = render_jpeg(scene, side)?;
                    Ok(encoders.preprocess_image(&decode::decode(
                        &jpeg,
                        &decode::DecodeOptions::default(),
                    )?)?)
                })
                .collect::<Result<Vec<_>, JudgeError>>()?;
            let units = encoders.embed_images(&pixels)?;
            embeddings.extend(units.iter().map(|unit| Embedding::from_unit_vector(unit)));
            on_embedded(batch.len() as u64);
        }
        Ok(Self { scenes, embeddings })
    }

    /// What is in each picture.
    pub fn scenes(&self) -> &[Scene] {
        &self.scenes
    }

    /// The pictures as a table would hold them, without statistics.
    pub fn images(&self) -> BTreeMap<ImageId, StoredImage> {
        let image = |(number, (scene, embedding)): (usize, (&Scene, &Embedding))| {
            let image = StoredImage {
                uri: None,
                content_hash: String::new(),
                bytes: 0,
                width: 0,
                height: 0,
                attributes: scene.attributes(),
                embedding: embedding.clone(),
                statistics: BTreeMap::new(),
            };
            Some((drawn_image_id(number)?, image))
        };
        self.scenes.iter().zip(&self.embeddings).enumerate().filter_map(image).collect()
    }

    /// Queries with what is known of their right answers; those that no picture matches match
    /// nothing. Their group is their difficulty.
    pub fn judged_queries(&self, queries: &[AttributeQuery]) -> Vec<JudgedQuery> {
        let ask = |query: &AttributeQuery| {
            let matching = self.scenes.iter().enumerate().filter(|(_, scene)| query.matches(scene));
            let grades: BTreeMap<ImageId, f64> =
                matching.filter_map(|(number, _)| Some((drawn_image_id(number)?, 1.0))).collect();
            let truth = if grades.is_empty() {
                Judgements::NoMatch
            } else {
                Judgements::Graded { grades, judged_only: false }
            };
            let group = Some(query.difficulty.name().to_owned());
            JudgedQuery { text: query.text.clone(), group, judgements: truth }
        };
        queries.par_iter().map(ask).collect()
    }

    /// Judges plain CLIP and every normaliser at every weight with every one of `sets`. Queries
    /// without a right answer here are left out; `group` names the group of the others.
    pub fn measure_settings(
        &self,
        encoders: &dyn Encoders,
        queries: &[AttributeQuery],
        sets: &[EmbeddedPromptSet],
        group: impl Fn(&AttributeQuery) -> &'static str + Sync,
    ) -> Result<Vec<SettingResult>, JudgeError> {
        let texts: Vec<&str> = queries.iter().map(|q| q.text.as_str()).collect();
        let embedded = encoders.embed_texts_in_batches(&texts)?;
        let scored_queries: Vec<ScoredQuery> = queries
            .par_iter()
            .zip(&embedded)
            .map(|(query, unit)| ScoredQuery {
                group: group(query),
                raw_scores: self.embeddings.iter().map(|e| dot_product(unit, e.values())).collect(),
                is_right: self.scenes.iter().map(|scene| query.matches(scene)).collect(),
            })
            .filter(|asked| asked.is_right.contains(&true))
            .collect();
        let plain = measure_queries(&scored_queries, |_, raw| raw);
        let setting = RankingSetting { prompt_set: None, normaliser: Normaliser::Raw, weight: 0.0 };
        let mut verdicts = vec![summarise_setting(setting, &scored_queries, &plain, &plain)];
        let scale = encoders.card().logit_scale;
        for set in sets {
            let statistics: Vec<ScoreStatistics> =
                self.embeddings.iter().filter_map(|e| set.statistics(e)).collect();
            for normaliser in Normaliser::ALL.into_iter().filter(|n| *n != Normaliser::Raw) {
                let constants =
                    ScaleConstants::from_catalogue(normaliser, statistics.iter().copied());
                for weight in TRIED_WEIGHTS {
                    let balance =
                        BalanceParameters { normaliser, weight, lambda: 1.0, scale: constants };
                    let affine: Vec<_> =
                        statistics.iter().map(|s| balance.affine_transform(s, scale)).collect();
                    let prompt_set = Some(set.prompt_set.name.clone());
                    let setting = RankingSetting { prompt_set, normaliser, weight };
                    let measured = measure_queries(&scored_queries, |i, raw| affine[i].apply(raw));
                    verdicts.push(summarise_setting(setting, &scored_queries, &measured, &plain));
                }
            }
        }
        Ok(verdicts)
    }
}

/// Measures of every query's ranking by `score` of a picture's index and raw score.
fn measure_queries(
    scored_queries: &[ScoredQuery],
    score: impl Fn(usize, f32) -> f32 + Sync,
) -> Vec<Vec<f64>> {
    let cutoffs = Cutoffs::default();
    scored_queries
        .par_iter()
        .filter_map(|ScoredQuery { raw_scores: raw, is_right: right, .. }| {
            let scores: Vec<f32> = raw.iter().enumerate().map(|(i, r)| score(i, *r)).collect();
            let grade = |right: bool| f64::from(u8::from(right));
            let top = top_indices(&scores, cutoffs.depth());
            let grades: Vec<f64> = top.into_iter().map(|i| grade(right[i])).collect();
            let ideal = vec![1.0; right.iter().filter(|r| **r).count()];
            let ahead = |a: usize, b: usize| scores[a].total_cmp(&scores[b]).then(b.cmp(&a));
            let first = (0..right.len()).filter(|i| right[*i]).max_by(|a, b| ahead(*a, *b));
            let place = |first| 1 + (0..right.len()).filter(|i| ahead(*i, first).is_gt()).count();
            let judged = JudgedRanking {
                grades: &grades,
                ideal_grades: &ideal,
                first_right_rank: first.map(place),
            };
            cutoffs.measure(&judged)
        })
        .collect()
}

fn summarise_setting(
    setting: RankingSetting,
    scored_queries: &[ScoredQuery],
    measured: &[Vec<f64>],
    plain: &[Vec<f64>],
) -> SettingResult {
    type MeasureRows<'a> = Vec<&'a [f64]>;
    let mut groups: BTreeMap<&'static str, (MeasureRows, MeasureRows)> = BTreeMap::new();
    for (asked, (own, plain)) in scored_queries.iter().zip(measured.iter().zip(plain)) {
        let (owns, plains) = groups.entry(asked.group).or_default();
        owns.push(own);
        plains.push(plain);
    }
    let summarise = |owns: &[&[f64]], plains: &[&[f64]]| MeasureSummary {
        queries: owns.len(),
        measures: compare_measures(owns, plains, RESAMPLING_SEED),
    };
    let all: (MeasureRows, MeasureRows) =
        measured.iter().zip(plain).map(|(own, plain)| (own.as_slice(), plain.as_slice())).unzip();
    SettingResult {
        setting,
        overall: summarise(&all.0, &all.1),
        groups: groups.iter().map(|(name, (o, p))| (*name, summarise(o, p))).collect(),
    }
}
