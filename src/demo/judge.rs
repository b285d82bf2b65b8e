//! Measures how well a model ranks the synthetic catalogue, with and without balancing. What each
//! picture shows is known, so every right answer is known too.

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
    compare_measures, ranks_of, top_indices,
};
use crate::ingest::decode::{self, ImageDecodeError};
use crate::prompts::EmbeddedPromptSet;
use crate::record::{Embedding, ImageId, StoredImage};

/// Pictures that are drawn and embedded together.
const IMAGES_PER_BATCH: usize = 64;
/// Weights that are tried; at weight 1 only the balanced score counts.
pub const TRIED_WEIGHTS: [f32; 4] = [0.1, 0.25, 0.5, 1.0];

/// Why a model cannot be measured.
#[derive(Debug, thiserror::Error)]
pub enum JudgeError {
    /// A picture could not be drawn.
    #[error(transparent)]
    Draw(#[from] DrawError),
    /// A drawn picture could not be decoded.
    #[error(transparent)]
    Decode(#[from] ImageDecodeError),
    /// The model failed.
    #[error(transparent)]
    Model(#[from] ClipError),
}

/// Drawn pictures with their embeddings as a table would store them.
pub struct DrawnImages {
    scenes: Vec<Scene>,
    embeddings: Vec<Embedding>,
}

/// A way to rank.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct RankingSetting {
    /// Name of the prompt set; `None` for plain CLIP.
    pub prompt_set: Option<String>,
    /// The formula that balances scores.
    pub normaliser: Normaliser,
    /// Weight of the normalised score in the balanced score, 0 to 1.
    pub weight: f32,
}

/// Measures of a way to rank, compared with plain CLIP.
#[derive(Debug, Clone, Serialize)]
pub struct SettingResult {
    /// The way to rank.
    pub setting: RankingSetting,
    /// Measures over all queries.
    pub overall: MeasureSummary,
    /// Measures over the queries of each group.
    pub groups: BTreeMap<&'static str, MeasureSummary>,
}

/// Returns the id of a drawn picture, which is its number.
fn picture_id(number: usize) -> Option<ImageId> {
    ImageId::new(format!("{number:07}")).ok()
}

/// A query with the raw score of each picture, and whether it is a right answer.
pub(super) struct ScoredQuery {
    pub group: &'static str,
    pub raw_scores: Vec<f32>,
    pub relevance_by_picture: Vec<bool>,
}

impl DrawnImages {
    /// Draws and embeds `count` pictures. `on_embedded` is called with how many more are done.
    pub fn draw_and_embed(
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
                    Ok(encoders.preprocess_image(&decode::decode_image(
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

    /// Returns what each picture shows, in the order of their numbers.
    pub fn scenes(&self) -> &[Scene] {
        &self.scenes
    }

    /// Returns the pictures as a table would store them, without statistics.
    pub fn to_stored_images(&self) -> BTreeMap<ImageId, StoredImage> {
        let stored_image = |(number, (scene, embedding)): (usize, (&Scene, &Embedding))| {
            let image = StoredImage {
                uri: None,
                content_hash: String::new(),
                byte_size: 0,
                width: 0,
                height: 0,
                attributes: scene.attributes(),
                embedding: embedding.clone(),
                statistics: BTreeMap::new(),
                decoding: None,
            };
            Some((picture_id(number)?, image))
        };
        self.scenes.iter().zip(&self.embeddings).enumerate().filter_map(stored_image).collect()
    }

    /// Judges queries by what the pictures show. A query's group is its difficulty.
    pub fn judge_queries(&self, queries: &[AttributeQuery]) -> Vec<JudgedQuery> {
        let judge = |query: &AttributeQuery| {
            let matching = self.scenes.iter().enumerate().filter(|(_, scene)| query.matches(scene));
            let grades: BTreeMap<ImageId, f64> =
                matching.filter_map(|(number, _)| Some((picture_id(number)?, 1.0))).collect();
            let judgements = if grades.is_empty() {
                Judgements::NoMatch
            } else {
                Judgements::Graded { grades, judged_only: false }
            };
            let group = Some(query.difficulty.name().to_owned());
            JudgedQuery { text: query.text.clone(), group, judgements }
        };
        queries.par_iter().map(judge).collect()
    }

    /// Measures plain CLIP, and every normaliser at every weight with every set. Queries that no
    /// picture matches are left out; `group` returns the name of a query's group.
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
                relevance_by_picture: self
                    .scenes
                    .iter()
                    .map(|scene| query.matches(scene))
                    .collect(),
            })
            .filter(|query| query.relevance_by_picture.contains(&true))
            .collect();
        let plain = measure_queries(&scored_queries, |_, raw| raw);
        let setting = RankingSetting { prompt_set: None, normaliser: Normaliser::Raw, weight: 0.0 };
        let mut results = vec![summarise_setting(setting, &scored_queries, &plain, &plain)];
        for set in sets {
            let scale = set.softmax_scale();
            let statistics: Vec<ScoreStatistics> =
                self.embeddings.iter().filter_map(|e| set.compute_statistics(e)).collect();
            for normaliser in Normaliser::ALL.into_iter().filter(|n| *n != Normaliser::Raw) {
                let constants =
                    ScaleConstants::from_catalogue(normaliser, statistics.iter().copied());
                for weight in TRIED_WEIGHTS {
                    let balance =
                        BalanceParameters { normaliser, weight, lambda: 1.0, scale: constants };
                    let affines: Vec<_> =
                        statistics.iter().map(|s| balance.affine_transform(s, scale)).collect();
                    let prompt_set = Some(set.prompt_set.name.clone());
                    let setting = RankingSetting { prompt_set, normaliser, weight };
                    let measured = measure_queries(&scored_queries, |i, raw| affines[i].apply(raw));
                    results.push(summarise_setting(setting, &scored_queries, &measured, &plain));
                }
            }
        }
        Ok(results)
    }
}

/// Measures the ranking of every query; `score` returns the score of a picture from its index and
/// raw score.
pub(super) fn measure_queries(
    scored_queries: &[ScoredQuery],
    score: impl Fn(usize, f32) -> f32 + Sync,
) -> Vec<Vec<f64>> {
    let cutoffs = Cutoffs::default();
    scored_queries
        .par_iter()
        .filter_map(|ScoredQuery { raw_scores, relevance_by_picture: is_right, .. }| {
            let scores: Vec<f32> =
                raw_scores.iter().enumerate().map(|(i, raw)| score(i, *raw)).collect();
            let grade = |i: usize| f64::from(u8::from(is_right[i]));
            let grades: Vec<f64> =
                top_indices(&scores, cutoffs.depth()).into_iter().map(grade).collect();
            let ideal = vec![1.0; is_right.iter().filter(|right| **right).count()];
            let right: Vec<usize> = (0..scores.len()).filter(|i| is_right[*i]).collect();
            let judged = JudgedRanking {
                top_grades: &grades,
                ideal_grades: &ideal,
                right_ranks: &ranks_of(&scores, right),
            };
            cutoffs.measure_ranking(&judged)
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
    for (query, (row, plain_row)) in scored_queries.iter().zip(measured.iter().zip(plain)) {
        let (rows, plain_rows) = groups.entry(query.group).or_default();
        rows.push(row);
        plain_rows.push(plain_row);
    }
    let summarise = |rows: &[&[f64]], plain_rows: &[&[f64]]| MeasureSummary {
        queries: rows.len(),
        measures: compare_measures(rows, plain_rows, RESAMPLING_SEED),
    };
    let (rows, plain_rows): (MeasureRows, MeasureRows) =
        measured.iter().zip(plain).map(|(row, plain)| (row.as_slice(), plain.as_slice())).unzip();
    SettingResult {
        setting,
        overall: summarise(&rows, &plain_rows),
        groups: groups
            .iter()
            .map(|(name, (rows, plain_rows))| (*name, summarise(rows, plain_rows)))
            .collect(),
    }
}
