//! One pass over a snapshot: raw and balanced scores, both rankings.

use std::sync::Arc;

use super::snapshot::{Entry, Snapshot};
use crate::normalise::{Affine, Balance};
use crate::statistics::{StatisticsKey, dot};

/// One image among the results.
#[derive(Debug, Clone)]
pub struct Hit {
    /// The image.
    pub entry: Arc<Entry>,
    /// Cosine of query and image: plain CLIP.
    pub raw_score: f32,
    /// Place in the ranking of plain CLIP, from 1.
    pub raw_rank: usize,
    /// Balanced score α·raw + β.
    pub score: f32,
    /// Place in the balanced ranking, from 1.
    pub rank: usize,
    /// The image's own factor and shift.
    pub affine: Affine,
}

/// The scores of one image, in the order of the snapshot.
#[derive(Debug, Clone, Copy)]
struct Scored {
    raw: f32,
    score: f32,
    affine: Affine,
}

/// Both rankings over a whole snapshot.
pub struct Ranking<'a> {
    snapshot: &'a Snapshot,
    scored: Vec<Scored>,
    by_score: Vec<u32>,
    by_raw: Vec<u32>,
}

impl<'a> Ranking<'a> {
    /// Scores every image against `query` (unit length, the model's dimension). An image without
    /// statistics of `key` keeps its raw score.
    pub fn of(
        snapshot: &'a Snapshot,
        query: &[f32],
        key: &StatisticsKey,
        balance: &Balance,
        logit_scale: f32,
    ) -> Self {
        let plain = Affine { alpha: 1.0, beta: 0.0 };
        let scored: Vec<Scored> = snapshot
            .entries
            .iter()
            .map(|entry| {
                let raw = dot(query, entry.image.embedding.values());
                let statistics = entry.image.statistics.get(key);
                let affine = statistics.map_or(plain, |s| balance.affine(s, logit_scale));
                Scored { raw, score: affine.score(raw), affine }
            })
            .collect();
        let order = |value: fn(&Scored) -> f32| {
            let mut order: Vec<u32> = (0..scored.len() as u32).collect();
            // Ties go by id, so that the same question has the same answer.
            order.sort_unstable_by(|a, b| {
                let (a, b) = (*a as usize, *b as usize);
                value(&scored[b])
                    .total_cmp(&value(&scored[a]))
                    .then_with(|| snapshot.entries[a].image_id.cmp(&snapshot.entries[b].image_id))
            });
            order
        };
        let (by_score, by_raw) = (order(|s| s.score), order(|s| s.raw));
        Self { snapshot, scored, by_score, by_raw }
    }

    /// The best `k` by balanced score.
    pub fn balanced(&self, k: usize) -> Vec<Hit> {
        self.by_score.iter().take(k).map(|i| self.hit(*i)).collect()
    }

    /// The best `k` by raw score.
    pub fn raw(&self, k: usize) -> Vec<Hit> {
        self.by_raw.iter().take(k).map(|i| self.hit(*i)).collect()
    }

    /// One image's place in both rankings.
    pub fn of_image(&self, entry: &Arc<Entry>) -> Option<Hit> {
        let i = self.snapshot.entries.iter().position(|e| Arc::ptr_eq(e, entry))?;
        Some(self.hit(i as u32))
    }

    fn hit(&self, i: u32) -> Hit {
        let place = |order: &[u32]| order.iter().position(|j| *j == i).map_or(0, |p| p + 1);
        let scored = self.scored[i as usize];
        Hit {
            entry: self.snapshot.entries[i as usize].clone(),
            raw_score: scored.raw,
            raw_rank: place(&self.by_raw),
            score: scored.score,
            rank: place(&self.by_score),
            affine: scored.affine,
        }
    }
}
