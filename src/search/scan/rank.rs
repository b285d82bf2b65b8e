//! From the approximations of a pass to exact places.
//!
//! A row whose upper bound does not reach the k-th lower bound cannot be among the best k; all others
//! are scored in f64 on the stored vectors. The place of a row in a ranking is one more than the
//! number of rows above it: most are counted by their bounds, the few whose bounds hold the row's
//! own score are scored exactly. Ties go by id.

#![expect(
    clippy::inline_always,
    reason = "vector code is compiled for the caller's target features"
)]

use std::cmp::Ordering;
use std::collections::HashMap;
use std::sync::Arc;

use half::f16;
use pulp::{Arch, WithSimd};
use rayon::prelude::*;

use super::{Ask, Piece, Scanned, Task, widen};
use crate::balance::calibration::Background;
use crate::balance::normalise::Affine;
use crate::search::snapshot::Place;
use crate::search::snapshot::chunk::{Entry, GROUP, NONE};
use crate::search::snapshot::codes::Prepared;

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

/// Exact results of one query.
#[derive(Debug)]
pub struct Found {
    /// Best by balanced score, from the wanted place on.
    pub hits: Vec<Hit>,
    /// Best by raw score, from the same place on.
    pub raw_hits: Vec<Hit>,
    /// Rows that were ranked.
    pub matched: usize,
    /// Moments of the balanced scores of all images; with a filter, of a part of them.
    pub background: Background,
}

/// Balanced, raw.
const BALANCED: usize = 0;
const RAW: usize = 1;

/// A row with its exact scores.
#[derive(Debug, Clone, Copy)]
struct Exact {
    place: Place,
    /// Balanced, raw.
    scores: [f64; 2],
    affine: Affine,
}

/// One query's pass, to be made exact.
pub struct Exactly<'a> {
    ask: &'a Ask,
    tasks: &'a [Task],
    scanned: &'a Scanned,
    /// A query of each chunk, for the bounds of single rows.
    prepared: Vec<Prepared>,
}

impl<'a> Exactly<'a> {
    /// Of `ask`, whose pass over `tasks` found `scanned`.
    pub fn new(ask: &'a Ask, tasks: &'a [Task], scanned: &'a Scanned) -> Self {
        let mut integers = Vec::new();
        let mut prepared = Vec::with_capacity(ask.snapshot.chunks.len());
        for chunk in &ask.snapshot.chunks {
            integers.clear();
            prepared.push(chunk.body.codes.prepare(&ask.embedding, &mut integers));
        }
        Self { ask, tasks, scanned, prepared }
    }

    /// The best from place `offset` on, up to the depth that was scanned for.
    pub fn best(&self, offset: usize) -> Found {
        let near = self.near();
        let lists = [BALANCED, RAW].map(|by| self.sorted(&near, by));
        let page = |list: &[Exact]| list.get(offset..).unwrap_or_default().to_vec();
        let [hits, raw_hits] = lists.each_ref().map(|list| page(list));
        let known: [HashMap<Place, usize>; 2] =
            lists.map(|list| list.iter().enumerate().map(|(i, row)| (row.place, i + 1)).collect());
        Found {
            hits: self.placed(&hits, &known),
            raw_hits: self.placed(&raw_hits, &known),
            matched: self.scanned.matched,
            background: self.scanned.background,
        }
    }

    /// One image and its places.
    pub fn of(&self, place: Place) -> Option<Hit> {
        let row = [self.exact(place)];
        self.placed(&row, &Default::default()).pop()
    }

    /// Every row that can be among the best by either score.
    fn near(&self) -> Vec<Exact> {
        let least = self.scanned.least;
        let rows = |(task, piece): (&Task, &Piece)| {
            let mut near = Vec::new();
            let either = [(BALANCED, least[BALANCED]), (RAW, least[RAW])];
            self.each(*task, piece, &either, |row| near.push(self.exact(row.place)));
            near
        };
        self.tasks.par_iter().zip(&self.scanned.pieces).flat_map_iter(rows).collect()
    }

    fn sorted(&self, near: &[Exact], by: usize) -> Vec<Exact> {
        let mut list = near.to_vec();
        let order = |a: &Exact, b: &Exact| self.order(by, (a.scores[by], a.place), b);
        let depth = self.ask.depth;
        if list.len() > depth {
            list.select_nth_unstable_by(depth - 1, order);
            list.truncate(depth);
        }
        list.sort_unstable_by(order);
        list
    }

    /// How a row with this exact score stands to `other`.
    fn order(&self, by: usize, (score, place): (f64, Place), other: &Exact) -> Ordering {
        let id = |place: Place| self.ask.snapshot.chunks[place.chunk].body.id(place.row);
        other.scores[by].total_cmp(&score).then_with(|| id(place).cmp(id(other.place)))
    }

    /// Hits of `rows` with both places, from `known` or counted.
    fn placed(&self, rows: &[Exact], known: &[HashMap<Place, usize>; 2]) -> Vec<Hit> {
        let places = [BALANCED, RAW].map(|by| {
            let mut unknown: Vec<Exact> =
                rows.iter().filter(|r| !known[by].contains_key(&r.place)).copied().collect();
            unknown.sort_unstable_by(|a, b| self.order(by, (a.scores[by], a.place), b));
            let counted = self.count(by, &unknown);
            unknown.iter().map(|r| r.place).zip(counted).collect::<HashMap<_, _>>()
        });
        let place = |by: usize, row: &Exact| {
            known[by].get(&row.place).or_else(|| places[by].get(&row.place)).copied().unwrap_or(0)
        };
        let hit = |row: &Exact| {
            let entry = self.ask.snapshot.chunks[row.place.chunk].body.entry(row.place.row)?;
            Some(Hit {
                entry: Arc::new(entry),
                raw_score: row.scores[RAW] as f32,
                raw_rank: place(RAW, row),
                score: row.scores[BALANCED] as f32,
                rank: place(BALANCED, row),
                affine: row.affine,
            })
        };
        rows.iter().filter_map(hit).collect()
    }

    /// Places of `rows`, which are sorted best first.
    fn count(&self, by: usize, rows: &[Exact]) -> Vec<usize> {
        let Some(last) = rows.last() else { return Vec::new() };
        // Not above it in f32: a row that is left out cannot stand before the last.
        let lowest = (last.scores[by] as f32).next_down();
        let scores: Vec<f64> = rows.iter().map(|row| row.scores[by]).collect();
        // above[i]: rows that stand before rows[i..], and not before rows[..i].
        let counted = |(task, piece): (&Task, &Piece)| {
            let mut above = vec![0usize; rows.len() + 1];
            self.each(*task, piece, &[(by, lowest)], |row| {
                let (low, high) = (f64::from(row.low[by]), f64::from(row.high[by]));
                let certain = scores.partition_point(|score| *score >= low);
                let possible = scores.partition_point(|score| *score > high);
                let first = if certain == possible {
                    certain
                } else {
                    let exact = self.exact(row.place).scores[by];
                    let before = |r: &Exact| self.order(by, (exact, row.place), r).is_lt();
                    possible + rows[possible..certain].partition_point(|r| !before(r))
                };
                above[first] += 1;
            });
            above
        };
        let add = |mut a: Vec<usize>, b: Vec<usize>| {
            for (a, b) in a.iter_mut().zip(b) {
                *a += b;
            }
            a
        };
        let none = || vec![0; rows.len() + 1];
        let above = self.tasks.par_iter().zip(&self.scanned.pieces).map(counted).reduce(none, add);
        let sums = above.iter().scan(0, |sum, more| {
            *sum += more;
            Some(*sum + 1)
        });
        sums.take(rows.len()).collect()
    }

    /// The rows of a task that may be found and whose upper bound of one of the scores `by` reaches
    /// what is asked of it, with the bounds of these scores.
    fn each(&self, task: Task, piece: &Piece, by: &[(usize, f32)], mut with: impl FnMut(Bounded)) {
        let chunk = &self.ask.snapshot.chunks[task.chunk];
        let column = chunk.statistics.get(&self.ask.key);
        let balanced = by.iter().any(|(by, _)| *by == BALANCED);
        let (arch, mut bounds) = (Arch::new(), GroupBounds::default());
        let mut factors = [[1f32; GROUP], [0f32; GROUP]];
        let reach = |high: &[f32; 2]| by.iter().any(|(by, least)| high[*by] >= *least);
        for (g, _) in piece.high.iter().enumerate().filter(|(_, high)| reach(high)) {
            let from = (task.from + g) * GROUP;
            let raw = &piece.raw[g * GROUP..];
            let raw = &raw[..raw.len().min(GROUP)];
            if balanced {
                self.ask.factors(column.map(|all| &all[from..][..raw.len()]), &mut factors);
            }
            let mut word = 0;
            for (by, least) in by {
                word |= arch.dispatch(Reaching {
                    out: &mut bounds,
                    by: *by,
                    least: *least,
                    raw,
                    error: &chunk.body.codes.error[from..][..raw.len()],
                    factors: (*by == BALANCED).then_some(&factors),
                    prepared: self.prepared[task.chunk],
                });
            }
            word &= task.word(self.ask, chunk, g);
            while word != 0 {
                let i = word.trailing_zeros() as usize;
                word &= word - 1;
                with(Bounded {
                    place: Place { chunk: task.chunk, row: from + i },
                    low: [bounds.low[0][i], bounds.low[1][i]],
                    high: [bounds.high[0][i], bounds.high[1][i]],
                });
            }
        }
    }

    fn exact(&self, place: Place) -> Exact {
        let chunk = &self.ask.snapshot.chunks[place.chunk];
        let (query, row) = (&self.ask.embedding, chunk.body.vector(place.row));
        let raw = Arch::new().dispatch(Dot { query, row });
        let column = chunk.statistics.get(&self.ask.key);
        let affine = self.ask.affine(column.map_or(&NONE, |all| &all[place.row]));
        let score = f64::from(affine.alpha) * raw + f64::from(affine.beta);
        Exact { place, scores: [score, raw], affine }
    }
}

/// Bounds of the scores of a group's rows, balanced and raw.
struct GroupBounds {
    low: [[f32; GROUP]; 2],
    high: [[f32; GROUP]; 2],
}

impl Default for GroupBounds {
    fn default() -> Self {
        let none = [[f32::NEG_INFINITY; GROUP]; 2];
        Self { low: none, high: none }
    }
}

/// Finds bounds of one score of a group's rows, and the rows, a bit each, whose upper bound is at least
/// `least`.
struct Reaching<'a> {
    out: &'a mut GroupBounds,
    by: usize,
    least: f32,
    raw: &'a [f32],
    error: &'a [f32],
    /// α and β of each row; of the raw score none are needed.
    factors: Option<&'a [[f32; GROUP]; 2]>,
    prepared: Prepared,
}

impl WithSimd for Reaching<'_> {
    type Output = u64;
    #[inline(always)]
    fn with_simd<S: pulp::Simd>(self, _: S) -> u64 {
        let n = self.raw.len().min(GROUP);
        let (raw, error) = (&self.raw[..n], &self.error[..n]);
        // Arrays of its own: what cannot overlap is computed in vectors.
        let (mut low, mut high) = ([0f32; GROUP], [0f32; GROUP]);
        match self.factors {
            None => {
                for i in 0..n {
                    let reach = self.prepared.reach(error[i]);
                    low[i] = raw[i] - reach;
                    high[i] = raw[i] + reach;
                }
            }
            Some([alpha, beta]) => {
                for i in 0..n {
                    let reach = self.prepared.reach(error[i]);
                    let (score, width) = widen(alpha[i], beta[i], raw[i], reach);
                    low[i] = score - width;
                    high[i] = score + width;
                }
            }
        }
        (self.out.low[self.by], self.out.high[self.by]) = (low, high);
        (0..n).fold(0, |word, i| word | u64::from(high[i] >= self.least) << i)
    }
}

/// A row and the bounds of its scores, balanced and raw; of those that were asked for.
struct Bounded {
    place: Place,
    low: [f32; 2],
    high: [f32; 2],
}

/// The value of a finite f16, written so that compilers vectorise it: its bits, where those of an f32
/// stand, are 2¹¹² times too small.
#[inline(always)]
fn wide(value: f16) -> f32 {
    const SCALE: f32 = f32::from_bits((127 + 112) << 23);
    let bits = u32::from(value.to_bits());
    let magnitude = f32::from_bits((bits & 0x7fff) << 13) * SCALE;
    f32::from_bits(magnitude.to_bits() | (bits & 0x8000) << 16)
}

/// The product of a query and a stored row in f64, in an order that does not depend on the machine.
struct Dot<'a> {
    query: &'a [f32],
    row: &'a [f16],
}

impl WithSimd for Dot<'_> {
    type Output = f64;
    #[inline(always)]
    fn with_simd<S: pulp::Simd>(self, _: S) -> f64 {
        const LANES: usize = 16;
        let mut lanes = [0f64; LANES];
        let (a, a_rest) = self.query.as_chunks::<LANES>();
        let (b, b_rest) = self.row.as_chunks::<LANES>();
        for (a, b) in a.iter().zip(b) {
            for lane in 0..LANES {
                lanes[lane] += f64::from(a[lane]) * f64::from(wide(b[lane]));
            }
        }
        let rest = a_rest.iter().zip(b_rest);
        let rest: f64 = rest.map(|(a, b)| f64::from(*a) * b.to_f64()).sum();
        lanes.iter().sum::<f64>() + rest
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_finite_half_is_widened_exactly() {
        for value in (0..=u16::MAX).map(f16::from_bits).filter(|value| value.is_finite()) {
            assert_eq!(wide(value).to_bits(), value.to_f32().to_bits(), "{value}");
        }
    }
}
