//! Every query under every configuration, from one pass over the embeddings.

use rayon::prelude::*;
use tokio_util::sync::CancellationToken;

use super::configuration::{ConfigurationResolver, RankingConfiguration, compute_affines};
use super::corpus::{Corpus, EvaluationError};
use super::grades::ImageGrades;
use crate::balance::calibration::{BestHitFeatures, ScoreDistribution};
use crate::balance::normalise::AffineTransform;
use crate::balance::statistics::dot_product;

/// Queries that share one pass over the embeddings: each of their scores is held, 4 bytes an image.
const QUERIES_PER_SCAN: usize = 8;

/// One query under one configuration.
#[derive(Debug, Clone, PartialEq)]
pub struct QueryRanking {
    /// The best: place in [`World::pictures`] and score, best first; ties go by id.
    pub top: Vec<(u32, f32)>,
    /// Place of the first right image in the whole ranking, from 1.
    pub first_right_rank: Option<usize>,
    /// What no-match signals are made of.
    pub best_hit: BestHitFeatures,
}

/// What is ranked.
pub struct Ranker<'a> {
    corpus: &'a Corpus,
    configurations: &'a [RankingConfiguration],
    /// By configuration; empty for plain CLIP.
    affines: Vec<Vec<AffineTransform>>,
    depth: usize,
}

impl<'a> Ranker<'a> {
    /// Prepares α and β of every image under every configuration; looks `depth` down the rankings.
    pub fn new<'w: 'a>(
        resolver: &mut ConfigurationResolver<'w>,
        configurations: &'a [RankingConfiguration],
        depth: usize,
    ) -> Self {
        let world = resolver.corpus;
        let mut affines_of = |configuration: &RankingConfiguration| {
            configuration.prompt_set.as_ref().map_or_else(Vec::new, |set| {
                let statistics = resolver.statistics(configuration.table_index, set);
                compute_affines(
                    &world.tables[configuration.table_index],
                    configuration,
                    &statistics,
                )
            })
        };
        let affines = configurations.iter().map(&mut affines_of).collect();
        Self { corpus: world, configurations, affines, depth }
    }

    /// Ranks `texts`, whose right images are `right`. Gives a row a text, in it one entry a
    /// configuration. `progress` hears of how many more texts are done.
    pub fn rank(
        &self,
        texts: &[&str],
        image_grades: &[ImageGrades],
        token: &CancellationToken,
        progress: &(dyn Fn(u64) + Sync),
    ) -> Result<Vec<Vec<QueryRanking>>, EvaluationError> {
        // By table, for the tables that a configuration reads.
        let mut embedded: Vec<Vec<Vec<f32>>> = Vec::new();
        for (number, table) in self.corpus.tables.iter().enumerate() {
            let used = self.configurations.iter().any(|c| c.table_index == number);
            let units =
                if used { table.encoders().embed_texts_in_batches(texts)? } else { Vec::new() };
            embedded.push(units);
        }
        let blocks: Vec<usize> = (0..texts.len()).step_by(QUERIES_PER_SCAN).collect();
        let rows = blocks.into_par_iter().map(|start| {
            if token.is_cancelled() {
                return Err(EvaluationError::Cancelled);
            }
            let end = (start + QUERIES_PER_SCAN).min(texts.len());
            let raw: Vec<Vec<Vec<f32>>> = embedded
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
                    let rank_one = |(number, configuration): (usize, &RankingConfiguration)| {
                        let raw = &raw[configuration.table_index][query - start];
                        let known = configuration.vocabulary.known_word_share(texts[query]);
                        self.rank_query(number, raw, &image_grades[query], known, &mut scratch)
                    };
                    self.configurations.iter().enumerate().map(rank_one).collect()
                })
                .collect();
            progress(block.len() as u64);
            Ok(block)
        });
        let blocks: Result<Vec<_>, EvaluationError> = rows.collect();
        Ok(blocks?.into_iter().flatten().collect())
    }

    fn rank_query(
        &self,
        configuration: usize,
        raw: &[f32],
        image_grades: &ImageGrades,
        known_words: f32,
        scores: &mut Vec<f32>,
    ) -> QueryRanking {
        let pictures =
            self.corpus.tables[self.configurations[configuration].table_index].image_positions();
        let affines = &self.affines[configuration];
        scores.clear();
        if affines.is_empty() {
            scores.extend_from_slice(raw);
        } else {
            scores.extend(raw.iter().zip(affines).map(|(raw, affine)| affine.apply(*raw)));
        }
        let background = measure_background(scores);
        let row = |picture: &u32| pictures.binary_search(picture).ok();
        if image_grades.judged_only {
            let judged: Vec<usize> =
                image_grades.grades.iter().filter_map(|(p, _)| row(p)).collect();
            let own: Vec<f32> = judged.iter().map(|row| scores[*row]).collect();
            let order = top_indices(&own, own.len());
            let all: Vec<(u32, f32)> =
                order.iter().map(|i| (pictures[judged[*i]], own[*i])).collect();
            let first = all.iter().position(|(picture, _)| image_grades.grade(*picture) > 0.0);
            let score = all.first().map_or(f32::NEG_INFINITY, |hit| hit.1);
            let best = all.into_iter().take(self.depth).collect();
            let hit = BestHitFeatures { score, background, known_word_share: known_words };
            return QueryRanking {
                top: best,
                first_right_rank: first.map(|i| i + 1),
                best_hit: hit,
            };
        }
        let top: Vec<(u32, f32)> = top_indices(scores, self.depth)
            .into_iter()
            .map(|row| (pictures[row], scores[row]))
            .collect();
        let compare_rank = |a: usize, b: usize| scores[a].total_cmp(&scores[b]).then(b.cmp(&a));
        let rights = image_grades.grades.iter().filter(|(_, grade)| *grade > 0.0);
        let first =
            rights.filter_map(|(picture, _)| row(picture)).max_by(|a, b| compare_rank(*a, *b));
        let place = |first: usize| {
            1 + (0..scores.len()).filter(|other| compare_rank(*other, first).is_gt()).count()
        };
        let score = top.first().map_or(f32::NEG_INFINITY, |hit| hit.1);
        QueryRanking {
            top,
            first_right_rank: first.map(place),
            best_hit: BestHitFeatures { score, background, known_word_share: known_words },
        }
    }
}

/// Indices of the `depth` largest scores, best first; ties go to the smaller index.
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

/// Moments over all scores.
fn measure_background(scores: &[f32]) -> ScoreDistribution {
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
    use crate::catalogue::ServingConfig;
    use crate::clip::{ClipError, Encoders, ModelCard, Pixels};
    use crate::evaluate::compare::corpus::LoadedGeneration;
    use crate::evaluate::compare::spec::ConfigurationSpec;
    use crate::prompts::{EmbeddedPromptSet, PromptSet};
    use crate::record::{Attributes, Embedding, ImageId, StoredImage};

    /// A model whose texts are their own embeddings: "0.6 0.8".
    struct LiteralEncoders(ModelCard);

    impl Encoders for LiteralEncoders {
        fn card(&self) -> &ModelCard {
            &self.0
        }
        fn preprocess_image(&self, _: &RgbImage) -> Result<Pixels, ClipError> {
            Err(ClipError::InvalidInput("has no image tower".into()))
        }
        fn embed_images(&self, _: &[Pixels]) -> Result<Vec<Vec<f32>>, ClipError> {
            Err(ClipError::InvalidInput("has no image tower".into()))
        }
        fn embed_texts(&self, texts: &[&str]) -> Result<Vec<Vec<f32>>, ClipError> {
            let numbers = |text: &&str| text.split(' ').map(|n| n.parse().unwrap()).collect();
            Ok(texts.iter().map(numbers).collect())
        }
    }

    fn corpus_and_set() -> (Corpus, EmbeddedPromptSet) {
        let encoders = LiteralEncoders(ModelCard {
            logit_scale: 10.0,
            ..ModelCard::without_checkpoint("spelled", 2)
        });
        let texts = ["1 0", "0 1"].map(String::from).to_vec();
        let set = PromptSet::new("axes", texts);
        let set = set.embed(&encoders, 1).unwrap();
        let image = |values: &[f32]| StoredImage {
            uri: None,
            content_hash: String::new(),
            bytes: 0,
            width: 1,
            height: 1,
            attributes: Attributes::new(),
            embedding: Embedding::from_stored(values),
            statistics: BTreeMap::new(),
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
    fn the_best_come_first() {
        assert_eq!(top_indices(&[0.1, 0.5, 0.5, 0.9], 3), [3, 1, 2]);
        assert_eq!(top_indices(&[0.1], 3), [0]);
    }

    #[test]
    fn a_ranking_is_whole_ties_go_by_id_and_only_judged_images_count_where_asked() {
        let (world, set) = corpus_and_set();
        let serving = ServingConfig::new(set.statistics_key.clone(), Normaliser::Nnn, 1.0);
        let mut resolver =
            ConfigurationResolver::new(&world, None, serving, vec![Arc::new(set)], 1);
        let specs = [ConfigurationSpec::plain_clip(), ConfigurationSpec::try_from("live").unwrap()];
        let configurations: Vec<RankingConfiguration> =
            specs.iter().map(|spec| resolver.resolve(spec).unwrap()).collect();
        let whole = ImageGrades { grades: vec![(3, 1.0)], judged_only: false };
        let judged = ImageGrades { grades: vec![(2, 0.0), (3, 1.0)], judged_only: true };
        let ranking = Ranker::new(&mut resolver, &configurations, 3);
        let token = CancellationToken::new();
        let texts = ["1 0", "1 0"];
        let ranked = ranking.rank(&texts, &[whole, judged], &token, &|_| {}).unwrap();

        let raw = &ranked[0][0];
        assert_eq!(raw.top, [(0, 1.0), (1, 0.5), (2, 0.5)]);
        assert_eq!(raw.first_right_rank, Some(4), "found below the depth that is kept");
        let background = raw.best_hit.background;
        assert!(
            (background.mean - 0.5).abs() < 1e-6 && (background.std - 0.125f32.sqrt()).abs() < 1e-6
        );
        // Each image's largest auxiliary score is taken off: 1 − 1, 0.5 − 0.5, 0 − 0.25.
        let balanced = &ranked[0][1];
        assert_eq!(balanced.top, [(0, 0.0), (1, 0.0), (2, 0.0)]);
        let condensed = &ranked[1][0];
        assert_eq!(condensed.top, [(2, 0.5), (3, 0.0)]);
        assert_eq!(condensed.first_right_rank, Some(2));

        token.cancel();
        let none = [ImageGrades::default(), ImageGrades::default()];
        let interrupted = ranking.rank(&texts, &none, &token, &|_| {});
        assert!(matches!(interrupted, Err(EvaluationError::Cancelled)));
    }
}
