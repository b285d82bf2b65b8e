//! Ranks every query under every configuration in one pass over the embeddings.

use rayon::prelude::*;
use tokio_util::sync::CancellationToken;

use super::configuration::{ConfigurationResolver, RankingConfiguration, compute_affines};
use super::corpus::{Corpus, EvaluationError};
use super::grades::ImageGrades;
use crate::balance::calibration::{BestHitFeatures, ScoreDistribution};
use crate::balance::normalise::AffineTransform;
use crate::balance::statistics::dot_product;

/// Queries that share one pass over the embeddings. All their scores are held in memory, 4 bytes
/// per image and query.
const QUERIES_PER_SCAN: usize = 8;

/// The ranking of one query under one configuration.
#[derive(Debug, Clone, PartialEq)]
pub struct QueryRanking {
    /// Index into [`Corpus::images`] and score of the top results, best first; equal scores are
    /// ordered by image id.
    pub top_results: Vec<(u32, f32)>,
    /// Ranks of the relevant images in the whole ranking, from 1, ascending; those that are not ranked
    /// are missing.
    pub right_ranks: Vec<usize>,
    /// The features of the first result from which no-match signals are computed.
    pub best_hit_features: BestHitFeatures,
}

impl QueryRanking {
    /// Returns whether the first result is relevant.
    pub fn is_first_right(&self) -> bool {
        self.right_ranks.first() == Some(&1)
    }
}

/// Ranks texts under a fixed list of configurations.
pub struct Ranker<'a> {
    corpus: &'a Corpus,
    configurations: &'a [RankingConfiguration],
    /// α and β of each row, by configuration; empty for plain CLIP.
    affines: Vec<Vec<AffineTransform>>,
    depth: usize,
}

impl<'a> Ranker<'a> {
    /// Computes α and β of every image under every configuration; rankings hold `depth` results.
    pub fn new<'w: 'a>(
        resolver: &mut ConfigurationResolver<'w>,
        configurations: &'a [RankingConfiguration],
        depth: usize,
    ) -> Self {
        let corpus = resolver.corpus;
        let mut affines_of = |configuration: &RankingConfiguration| {
            configuration.prompt_set.as_ref().map_or_else(Vec::new, |set| {
                let statistics = resolver.cached_statistics(configuration.table_index, set);
                compute_affines(configuration, set, &statistics)
            })
        };
        let affines = configurations.iter().map(&mut affines_of).collect();
        Self { corpus, configurations, affines, depth }
    }

    /// Returns the embeddings of texts by the model of each table; none for a table that no
    /// configuration ranks.
    pub fn embed_texts(&self, texts: &[&str]) -> Result<Vec<Vec<Vec<f32>>>, EvaluationError> {
        let mut text_embeddings: Vec<Vec<Vec<f32>>> = Vec::new();
        for (index, table) in self.corpus.tables.iter().enumerate() {
            let is_ranked = self.configurations.iter().any(|c| c.table_index == index);
            let units = if is_ranked {
                table.encoders().embed_texts_in_batches(texts)?
            } else {
                Vec::new()
            };
            text_embeddings.push(units);
        }
        Ok(text_embeddings)
    }

    /// Ranks `texts` with the embeddings of [`Self::embed_texts`]; `image_grades` are the grades of each
    /// text's judged images. Returns one row per text with one entry per configuration. `progress`
    /// is called with how many more texts are done.
    pub fn rank_texts(
        &self,
        texts: &[&str],
        text_embeddings: &[Vec<Vec<f32>>],
        image_grades: &[ImageGrades],
        token: &CancellationToken,
        progress: &(dyn Fn(u64) + Sync),
    ) -> Result<Vec<Vec<QueryRanking>>, EvaluationError> {
        let blocks: Vec<usize> = (0..texts.len()).step_by(QUERIES_PER_SCAN).collect();
        let ranked_blocks = blocks.into_par_iter().map(|start| {
            if token.is_cancelled() {
                return Err(EvaluationError::Cancelled);
            }
            let end = (start + QUERIES_PER_SCAN).min(texts.len());
            let raw_scores: Vec<Vec<Vec<f32>>> = text_embeddings
                .iter()
                .zip(&self.corpus.tables)
                .map(|(units, table)| {
                    let mut scores = vec![Vec::new(); end - start];
                    for embedding in table.embeddings() {
                        for (unit, scores) in units.iter().skip(start).zip(&mut scores) {
                            scores.push(dot_product(unit, embedding.values()));
                        }
                    }
                    scores
                })
                .collect();
            let mut scratch = Vec::new();
            let block: Vec<Vec<QueryRanking>> = (start..end)
                .map(|query| {
                    let rank_one = |(index, configuration): (usize, &RankingConfiguration)| {
                        let raw = &raw_scores[configuration.table_index][query - start];
                        let known_words = configuration.vocabulary.known_word_share(texts[query]);
                        let grades = &image_grades[query];
                        self.rank_query(index, raw, grades, known_words, &mut scratch)
                    };
                    self.configurations.iter().enumerate().map(rank_one).collect()
                })
                .collect();
            progress(block.len() as u64);
            Ok(block)
        });
        let blocks: Result<Vec<_>, EvaluationError> = ranked_blocks.collect();
        Ok(blocks?.into_iter().flatten().collect())
    }

    /// Ranks one query by its raw scores, one per row. `scores` is scratch memory.
    fn rank_query(
        &self,
        configuration: usize,
        raw: &[f32],
        image_grades: &ImageGrades,
        known_words: f32,
        scores: &mut Vec<f32>,
    ) -> QueryRanking {
        let image_positions =
            self.corpus.tables[self.configurations[configuration].table_index].image_positions();
        let affines = &self.affines[configuration];
        scores.clear();
        if affines.is_empty() {
            scores.extend_from_slice(raw);
        } else {
            scores.extend(raw.iter().zip(affines).map(|(raw, affine)| affine.apply(*raw)));
        }
        let background = score_distribution(scores);
        let row_of = |position: &u32| image_positions.binary_search(position).ok();
        if image_grades.judged_only {
            let judged_rows: Vec<usize> = image_grades
                .grades_by_position
                .iter()
                .filter_map(|(position, _)| row_of(position))
                .collect();
            let judged_scores: Vec<f32> = judged_rows.iter().map(|row| scores[*row]).collect();
            let order = top_indices(&judged_scores, judged_scores.len());
            let ranking: Vec<(u32, f32)> = order
                .iter()
                .map(|i| (image_positions[judged_rows[*i]], judged_scores[*i]))
                .collect();
            let is_right = |(i, (position, _)): (usize, &(u32, f32))| {
                (image_grades.grade_of(*position) > 0.0).then_some(i + 1)
            };
            let right_ranks = ranking.iter().enumerate().filter_map(is_right).collect();
            let score = ranking.first().map_or(f32::NEG_INFINITY, |hit| hit.1);
            return QueryRanking {
                top_results: ranking.into_iter().take(self.depth).collect(),
                right_ranks,
                best_hit_features: BestHitFeatures {
                    score,
                    background,
                    known_word_share: known_words,
                },
            };
        }
        let top: Vec<(u32, f32)> = top_indices(scores, self.depth)
            .into_iter()
            .map(|row| (image_positions[row], scores[row]))
            .collect();
        let relevant = image_grades.grades_by_position.iter().filter(|(_, grade)| *grade > 0.0);
        let right_rows = relevant.filter_map(|(position, _)| row_of(position)).collect();
        let score = top.first().map_or(f32::NEG_INFINITY, |hit| hit.1);
        QueryRanking {
            top_results: top,
            right_ranks: ranks_of(scores, right_rows),
            best_hit_features: BestHitFeatures { score, background, known_word_share: known_words },
        }
    }
}

/// Returns the ranks of `rows` among all scores, from 1, ascending. Equal scores are ordered by row.
pub fn ranks_of(scores: &[f32], mut rows: Vec<usize>) -> Vec<usize> {
    let by_rank = |a: usize, b: usize| scores[b].total_cmp(&scores[a]).then(a.cmp(&b));
    rows.sort_unstable_by(|a, b| by_rank(*a, *b));
    // How many scores rank above the first of the rows, between it and the second, and so on.
    let mut above = vec![0usize; rows.len() + 1];
    for row in 0..scores.len() {
        above[rows.partition_point(|right| by_rank(*right, row).is_le())] += 1;
    }
    let mut rank = 0;
    // A row counts itself after its own rank: there it belongs to the rows above the next one.
    let ranks = above.iter().take(rows.len()).map(|count| {
        rank += count;
        rank + 1
    });
    ranks.collect()
}

/// Returns the indices of the `depth` largest scores, largest first; equal scores by index.
pub fn top_indices(scores: &[f32], depth: usize) -> Vec<usize> {
    let mut order: Vec<usize> = (0..scores.len()).collect();
    let by_score = |a: &usize, b: &usize| scores[*b].total_cmp(&scores[*a]).then(a.cmp(b));
    if depth < order.len() {
        order.select_nth_unstable_by(depth, by_score);
        order.truncate(depth);
    }
    order.sort_unstable_by(by_score);
    order
}

/// Returns mean and standard deviation of all scores.
fn score_distribution(scores: &[f32]) -> ScoreDistribution {
    let count = scores.len().max(1) as f64;
    let mean = scores.iter().map(|s| f64::from(*s)).sum::<f64>() / count;
    let square = scores.iter().map(|s| (f64::from(*s) - mean).powi(2)).sum::<f64>() / count;
    ScoreDistribution { mean: mean as f32, std: square.sqrt() as f32 }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;
    use std::sync::Arc;

    use image::RgbImage;

    use super::*;
    use crate::balance::normalise::Normaliser;
    use crate::balance::statistics::StatisticsSettings;
    use crate::catalogue::ServingConfig;
    use crate::clip::{ClipError, Encoders, ModelCard, Pixels};
    use crate::evaluate::compare::corpus::LoadedGeneration;
    use crate::evaluate::compare::spec::ConfigurationSpec;
    use crate::prompts::{EmbeddedPromptSet, PromptSet};
    use crate::record::{Attributes, Embedding, ImageId, StoredImage};

    /// A model that embeds a text as the numbers that it spells: "0.6 0.8".
    struct LiteralEncoders(ModelCard);

    impl Encoders for LiteralEncoders {
        fn card(&self) -> &ModelCard {
            &self.0
        }
        fn preprocess_image(&self, _: &RgbImage) -> Result<Pixels, ClipError> {
            Err(ClipError::InvalidInput("has no image encoder".into()))
        }
        fn embed_images(&self, _: &[Pixels]) -> Result<Vec<Vec<f32>>, ClipError> {
            Err(ClipError::InvalidInput("has no image encoder".into()))
        }
        fn embed_texts(&self, texts: &[&str]) -> Result<Vec<Vec<f32>>, ClipError> {
            let numbers = |text: &&str| text.split(' ').map(|n| n.parse().unwrap()).collect();
            Ok(texts.iter().map(numbers).collect())
        }
    }

    fn corpus_and_set() -> (Corpus, EmbeddedPromptSet) {
        let encoders = LiteralEncoders(ModelCard {
            logit_scale: 10.0,
            ..ModelCard::without_checkpoint("literal", 2)
        });
        let texts = ["1 0", "0 1"].map(String::from).to_vec();
        let set = PromptSet::new("axes", texts);
        let set = set.embed(&encoders, StatisticsSettings::with_top_k(1)).unwrap();
        let image = |values: &[f32]| StoredImage {
            uri: None,
            content_hash: String::new(),
            byte_size: 0,
            width: 1,
            height: 1,
            attributes: Attributes::new(),
            embedding: Embedding::from_stored(values),
            statistics: BTreeMap::new(),
            decoding: None,
        };
        // b and c are the same image; a is nearest to the first axis.
        let images = [("a", [1.0, 0.0]), ("b", [0.5, 0.5]), ("c", [0.5, 0.5]), ("d", [0.0, 0.25])];
        let images = images.map(|(id, v)| (ImageId::new(id).unwrap(), image(&v)));
        (
            Corpus::from_generations(vec![LoadedGeneration::new(
                "live",
                "g",
                1,
                Arc::new(encoders),
                images.into(),
            )]),
            set,
        )
    }

    #[test]
    fn top_indices_are_ordered_by_score_and_then_by_index() {
        assert_eq!(top_indices(&[0.1, 0.5, 0.5, 0.9], 3), [3, 1, 2]);
        assert_eq!(top_indices(&[0.1], 3), [0]);
    }

    #[test]
    fn a_ranking_covers_all_images_or_if_asked_only_judged_ones() {
        let settings = StatisticsSettings::with_top_k(1);
        let (corpus, set) = corpus_and_set();
        let serving = ServingConfig::new(set.statistics_key.clone(), Normaliser::Nnn, 1.0);
        let mut resolver =
            ConfigurationResolver::new(&corpus, None, serving, vec![Arc::new(set)], settings);
        let specs = [ConfigurationSpec::plain_clip(), ConfigurationSpec::try_from("live").unwrap()];
        let configurations: Vec<RankingConfiguration> =
            specs.iter().map(|spec| resolver.resolve(spec).unwrap()).collect();
        let of_all = ImageGrades { grades_by_position: vec![(3, 1.0)], judged_only: false };
        let of_judged =
            ImageGrades { grades_by_position: vec![(2, 0.0), (3, 1.0)], judged_only: true };
        let ranker = Ranker::new(&mut resolver, &configurations, 3);
        let token = CancellationToken::new();
        let texts = ["1 0", "1 0"];
        let units = ranker.embed_texts(&texts).unwrap();
        let ranked =
            ranker.rank_texts(&texts, &units, &[of_all, of_judged], &token, &|_| {}).unwrap();

        let raw = &ranked[0][0];
        assert_eq!(raw.top_results, [(0, 1.0), (1, 0.5), (2, 0.5)]);
        assert_eq!(raw.right_ranks, [4], "its rank is below the depth");
        let background = raw.best_hit_features.background;
        assert!(
            (background.mean - 0.5).abs() < 1e-6 && (background.std - 0.125f32.sqrt()).abs() < 1e-6
        );
        // Each image's largest auxiliary score is subtracted: 1 − 1, 0.5 − 0.5, 0 − 0.25.
        let balanced = &ranked[0][1];
        assert_eq!(balanced.top_results, [(0, 0.0), (1, 0.0), (2, 0.0)]);
        let condensed = &ranked[1][0];
        assert_eq!(condensed.top_results, [(2, 0.5), (3, 0.0)]);
        assert_eq!(condensed.right_ranks, [2]);

        token.cancel();
        let ungraded = [ImageGrades::default(), ImageGrades::default()];
        let interrupted = ranker.rank_texts(&texts, &units, &ungraded, &token, &|_| {});
        assert!(matches!(interrupted, Err(EvaluationError::Cancelled)));
    }
}
