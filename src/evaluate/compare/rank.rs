//! Every query under every configuration, from one pass over the embeddings.

use rayon::prelude::*;
use tokio_util::sync::CancellationToken;

use super::configuration::{Configuration, Resolver, affine};
use super::world::{EvaluateError, World};
use crate::balance::calibration::{Background, BestHit};
use crate::balance::normalise::Affine;
use crate::balance::statistics::dot;
use crate::evaluate::best;

/// Queries that share one pass over the embeddings: each of their scores is held, 4 bytes an image.
const BLOCK: usize = 8;

/// The right images of a query that are in the world.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Right {
    /// Place in [`World::pictures`] and grade, by place; 0 is judged wrong.
    pub grades: Vec<(u32, f64)>,
    /// Whether only these images are ranked.
    pub condensed: bool,
}

impl Right {
    /// Grade of an image; 0 where it was not judged.
    pub fn grade(&self, picture: u32) -> f64 {
        let found = self.grades.binary_search_by_key(&picture, |(place, _)| *place);
        found.map_or(0.0, |i| self.grades[i].1)
    }

    /// Grades of the right images, largest first.
    pub fn ideal(&self) -> Vec<f64> {
        let right = self.grades.iter().map(|(_, grade)| *grade).filter(|grade| *grade > 0.0);
        let mut ideal: Vec<f64> = right.collect();
        ideal.sort_unstable_by(|a, b| b.total_cmp(a));
        ideal
    }
}

/// One query under one configuration.
#[derive(Debug, Clone, PartialEq)]
pub struct Ranked {
    /// The best: place in [`World::pictures`] and score, best first; ties go by id.
    pub best: Vec<(u32, f32)>,
    /// Place of the first right image in the whole ranking, from 1.
    pub first: Option<usize>,
    /// What no-match signals are made of.
    pub hit: BestHit,
}

/// What is ranked.
pub struct Ranking<'a> {
    world: &'a World,
    configurations: &'a [Configuration],
    /// By configuration; empty for plain CLIP.
    affines: Vec<Vec<Affine>>,
    depth: usize,
}

impl<'a> Ranking<'a> {
    /// Prepares α and β of every image under every configuration; looks `depth` down the rankings.
    pub fn new<'w: 'a>(
        resolver: &mut Resolver<'w>,
        configurations: &'a [Configuration],
        depth: usize,
    ) -> Self {
        let world = resolver.world;
        let mut of = |configuration: &Configuration| {
            configuration.set.as_ref().map_or_else(Vec::new, |set| {
                let statistics = resolver.statistics(configuration.table, set);
                affine(&world.tables[configuration.table], configuration, &statistics)
            })
        };
        let affines = configurations.iter().map(&mut of).collect();
        Self { world, configurations, affines, depth }
    }

    /// Ranks `texts`, whose right images are `right`. Gives a row a text, in it one entry a
    /// configuration. `progress` hears of how many more texts are done.
    pub fn rank(
        &self,
        texts: &[&str],
        right: &[Right],
        token: &CancellationToken,
        progress: &(dyn Fn(u64) + Sync),
    ) -> Result<Vec<Vec<Ranked>>, EvaluateError> {
        // By table, for the tables that a configuration reads.
        let mut embedded: Vec<Vec<Vec<f32>>> = Vec::new();
        for (number, table) in self.world.tables.iter().enumerate() {
            let used = self.configurations.iter().any(|c| c.table == number);
            let units = if used { table.towers().embed_many_texts(texts)? } else { Vec::new() };
            embedded.push(units);
        }
        let blocks: Vec<usize> = (0..texts.len()).step_by(BLOCK).collect();
        let rows = blocks.into_par_iter().map(|start| {
            if token.is_cancelled() {
                return Err(EvaluateError::Cancelled);
            }
            let end = (start + BLOCK).min(texts.len());
            let raw: Vec<Vec<Vec<f32>>> = embedded
                .iter()
                .zip(&self.world.tables)
                .map(|(units, table)| {
                    let mut scores = vec![Vec::new(); end - start];
                    for embedding in table.embeddings() {
                        for (unit, scores) in units.iter().skip(start).zip(&mut scores) {
                            scores.push(dot(unit, embedding.values()));
                        }
                    }
                    scores
                })
                .collect();
            let mut scratch = Vec::new();
            let block: Vec<Vec<Ranked>> = (start..end)
                .map(|query| {
                    let of = |(number, configuration): (usize, &Configuration)| {
                        let raw = &raw[configuration.table][query - start];
                        let known = configuration.vocabulary.known(texts[query]);
                        self.one(number, raw, &right[query], known, &mut scratch)
                    };
                    self.configurations.iter().enumerate().map(of).collect()
                })
                .collect();
            progress(block.len() as u64);
            Ok(block)
        });
        let blocks: Result<Vec<_>, EvaluateError> = rows.collect();
        Ok(blocks?.into_iter().flatten().collect())
    }

    fn one(
        &self,
        configuration: usize,
        raw: &[f32],
        right: &Right,
        known: f32,
        scores: &mut Vec<f32>,
    ) -> Ranked {
        let pictures = self.world.tables[self.configurations[configuration].table].pictures();
        let affines = &self.affines[configuration];
        scores.clear();
        if affines.is_empty() {
            scores.extend_from_slice(raw);
        } else {
            scores.extend(raw.iter().zip(affines).map(|(raw, affine)| affine.score(*raw)));
        }
        let background = background(scores);
        let row = |picture: &u32| pictures.binary_search(picture).ok();
        if right.condensed {
            let judged: Vec<usize> = right.grades.iter().filter_map(|(p, _)| row(p)).collect();
            let own: Vec<f32> = judged.iter().map(|row| scores[*row]).collect();
            let order = best(&own, own.len());
            let all: Vec<(u32, f32)> =
                order.iter().map(|i| (pictures[judged[*i]], own[*i])).collect();
            let first = all.iter().position(|(picture, _)| right.grade(*picture) > 0.0);
            let score = all.first().map_or(f32::NEG_INFINITY, |hit| hit.1);
            let best = all.into_iter().take(self.depth).collect();
            let hit = BestHit { score, background, known };
            return Ranked { best, first: first.map(|i| i + 1), hit };
        }
        let top: Vec<(u32, f32)> =
            best(scores, self.depth).into_iter().map(|row| (pictures[row], scores[row])).collect();
        let ahead = |a: usize, b: usize| scores[a].total_cmp(&scores[b]).then(b.cmp(&a));
        let rights = right.grades.iter().filter(|(_, grade)| *grade > 0.0);
        let first = rights.filter_map(|(picture, _)| row(picture)).max_by(|a, b| ahead(*a, *b));
        let place = |first: usize| {
            1 + (0..scores.len()).filter(|other| ahead(*other, first).is_gt()).count()
        };
        let score = top.first().map_or(f32::NEG_INFINITY, |hit| hit.1);
        Ranked { best: top, first: first.map(place), hit: BestHit { score, background, known } }
    }
}

/// Moments over all scores.
fn background(scores: &[f32]) -> Background {
    let count = scores.len().max(1) as f64;
    let mean = scores.iter().map(|s| f64::from(*s)).sum::<f64>() / count;
    let square = scores.iter().map(|s| (f64::from(*s) - mean).powi(2)).sum::<f64>() / count;
    Background { mean: mean as f32, std: square.sqrt() as f32 }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;
    use std::sync::Arc;

    use image::RgbImage;

    use super::*;
    use crate::balance::normalise::Normaliser;
    use crate::catalogue::Serving;
    use crate::clip::{ClipError, ModelCard, Pixels, Towers};
    use crate::evaluate::compare::configuration::Spec;
    use crate::evaluate::compare::world::Rows;
    use crate::prompts::{EmbeddedSet, PromptSet};
    use crate::record::{Attributes, Embedding, Image, ImageId};

    /// A model whose texts are their own embeddings: "0.6 0.8".
    struct Spelled(ModelCard);

    impl Towers for Spelled {
        fn card(&self) -> &ModelCard {
            &self.0
        }
        fn prepare(&self, _: &RgbImage) -> Result<Pixels, ClipError> {
            Err(ClipError::Input("has no image tower".into()))
        }
        fn embed_images(&self, _: &[Pixels]) -> Result<Vec<Vec<f32>>, ClipError> {
            Err(ClipError::Input("has no image tower".into()))
        }
        fn embed_texts(&self, texts: &[&str]) -> Result<Vec<Vec<f32>>, ClipError> {
            let numbers = |text: &&str| text.split(' ').map(|n| n.parse().unwrap()).collect();
            Ok(texts.iter().map(numbers).collect())
        }
    }

    fn world() -> (World, EmbeddedSet) {
        let towers = Spelled(ModelCard { logit_scale: 10.0, ..ModelCard::stand_in("spelled", 2) });
        let texts = ["1 0", "0 1"].map(String::from).to_vec();
        let set = PromptSet::new("axes", texts);
        let set = set.embed(&towers, 1).unwrap();
        let image = |values: &[f32]| Image {
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
        (World::of(vec![Rows::of("live", "g", 1, Arc::new(towers), images.into())]), set)
    }

    #[test]
    fn a_ranking_is_whole_ties_go_by_id_and_only_judged_images_count_where_asked() {
        let (world, set) = world();
        let serving = Serving::new(set.key.clone(), Normaliser::Nnn, 1.0);
        let mut resolver = Resolver::new(&world, None, serving, vec![Arc::new(set)], 1);
        let specs = [Spec::raw(), Spec::try_from("live").unwrap()];
        let configurations: Vec<Configuration> =
            specs.iter().map(|spec| resolver.resolve(spec).unwrap()).collect();
        let whole = Right { grades: vec![(3, 1.0)], condensed: false };
        let judged = Right { grades: vec![(2, 0.0), (3, 1.0)], condensed: true };
        let ranking = Ranking::new(&mut resolver, &configurations, 3);
        let token = CancellationToken::new();
        let texts = ["1 0", "1 0"];
        let ranked = ranking.rank(&texts, &[whole, judged], &token, &|_| {}).unwrap();

        let raw = &ranked[0][0];
        assert_eq!(raw.best, [(0, 1.0), (1, 0.5), (2, 0.5)]);
        assert_eq!(raw.first, Some(4), "found below the depth that is kept");
        let background = raw.hit.background;
        assert!(
            (background.mean - 0.5).abs() < 1e-6 && (background.std - 0.125f32.sqrt()).abs() < 1e-6
        );
        // Each image's largest auxiliary score is taken off: 1 − 1, 0.5 − 0.5, 0 − 0.25.
        let balanced = &ranked[0][1];
        assert_eq!(balanced.best, [(0, 0.0), (1, 0.0), (2, 0.0)]);
        let condensed = &ranked[1][0];
        assert_eq!(condensed.best, [(2, 0.5), (3, 0.0)]);
        assert_eq!(condensed.first, Some(2));

        token.cancel();
        let none = [Right::default(), Right::default()];
        let interrupted = ranking.rank(&texts, &none, &token, &|_| {});
        assert!(matches!(interrupted, Err(EvaluateError::Cancelled)));
    }
}
