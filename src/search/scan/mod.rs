//! One pass over the codes of a snapshot for several queries at once.
//!
//! The pass gives each row's approximate raw score, for each group of rows the highest that its exact
//! scores can be, and a lower bound of the k-th best score. What follows from them is exact and is
//! found in [`super::rank`].

#![expect(
    clippy::inline_always,
    reason = "vector code is compiled for the caller's target features"
)]

pub(crate) mod batch;
pub(crate) mod rank;
pub(crate) mod unmatched;

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use pulp::{Arch, WithSimd};
use rayon::prelude::*;

use super::snapshot::Snapshot;
use super::snapshot::chunk::{Chunk, GROUP};
use super::snapshot::codes::{self, Prepared};
use crate::balance::calibration::Background;
use crate::balance::normalise::{Affine, Balance, Factors};
use crate::balance::statistics::{Statistics, StatisticsKey};

/// Groups of a task: 4,096 rows, two megabytes of codes at 512 dimensions, so that threads share
/// the work evenly and a task's overhead does not show.
const TASK: usize = 64;
/// With a filter, the background is taken from the live rows of every so many-th group: its own hits
/// would say little of what unrelated images get.
pub const BACKGROUND: usize = 8;
/// Values that are folded at one time: the widest vector there is.
const LANES: usize = 16;
/// Bounds arithmetic of scores in f32, relative to the terms.
const SLACK: f32 = 1e-6;

/// A query, ready to be scanned for.
#[derive(Debug, Clone)]
pub struct Ask {
    /// What is searched.
    pub snapshot: Arc<Snapshot>,
    /// The query's embedding.
    pub embedding: Arc<Vec<f32>>,
    /// Which statistics.
    pub key: StatisticsKey,
    /// How they balance.
    pub balance: Balance,
    /// L of the statistics.
    pub logit_scale: f32,
    /// Rows that may be found, a bit each, a word a group over all chunks; none: all live rows.
    pub mask: Option<Arc<[u64]>>,
    /// How many of the best are wanted, those of earlier pages counted.
    pub depth: usize,
}

impl Ask {
    /// α and β of a row with these statistics.
    pub fn affine(&self, statistics: &Statistics) -> Affine {
        if statistics.n == 0 {
            return Affine { alpha: 1.0, beta: 0.0 };
        }
        self.balance.affine(statistics, self.logit_scale)
    }

    /// α and β of a group's rows with these statistics; where there are none, they stay 1 and 0.
    pub fn factors(&self, statistics: Option<&[Statistics]>, out: &mut [[f32; GROUP]; 2]) {
        let Some(statistics) = statistics else { return };
        let [alpha, beta] = out;
        Arch::new().dispatch(Factors {
            balance: self.balance,
            statistics,
            logit_scale: self.logit_scale,
            out: [alpha, beta],
        });
    }

    fn same_affine(&self, other: &Self) -> bool {
        self.key == other.key && self.balance == other.balance
    }
}

/// A run of groups of one chunk.
#[derive(Debug, Clone, Copy)]
pub struct Task {
    pub chunk: usize,
    /// First group in the chunk.
    pub from: usize,
    pub to: usize,
    /// Number of the first group over all chunks.
    pub first: usize,
}

impl Task {
    /// The rows of this task's chunk that may be found in its `g`-th group.
    pub fn word(&self, ask: &Ask, chunk: &Chunk, g: usize) -> u64 {
        match &ask.mask {
            Some(mask) => mask[self.first + g],
            None => chunk.live[self.from + g],
        }
    }

    /// The rows of that group that the background is made of.
    fn background(&self, ask: &Ask, chunk: &Chunk, g: usize) -> u64 {
        let counts = ask.mask.is_none() || (self.first + g).is_multiple_of(BACKGROUND);
        if counts { chunk.live[self.from + g] } else { 0 }
    }
}

/// What the pass found in one task for one query.
#[derive(Debug)]
pub struct Piece {
    /// Approximate raw score of each row.
    pub raw: Vec<f32>,
    /// Of each group, the most that a balanced and a raw score can be.
    pub high: Vec<[f32; 2]>,
    /// Balanced and raw lower bounds, the best of them at least.
    low: [Vec<f32>; 2],
    count: usize,
    background: Moments,
}

/// Of balanced scores.
#[derive(Debug, Clone, Copy, Default)]
struct Moments {
    count: usize,
    sum: f64,
    squares: f64,
}

impl Moments {
    fn add(&mut self, other: Self) {
        self.count += other.count;
        self.sum += other.sum;
        self.squares += other.squares;
    }
}

/// What the pass found for one query.
#[derive(Debug)]
pub struct Scanned {
    /// A piece a task.
    pub pieces: Vec<Piece>,
    /// The k-th best balanced and raw score are at least this.
    pub least: [f32; 2],
    /// Rows that may be found.
    pub matched: usize,
    /// Moments of the balanced scores of the live rows; with a filter, of a part of them.
    pub background: Background,
}

/// The tasks of a snapshot.
pub fn tasks(snapshot: &Snapshot) -> Vec<Task> {
    let (mut tasks, mut first) = (Vec::new(), 0);
    for (chunk, c) in snapshot.chunks.iter().enumerate() {
        let groups = c.live.len();
        for from in (0..groups).step_by(TASK) {
            let to = (from + TASK).min(groups);
            tasks.push(Task { chunk, from, to, first: first + from });
        }
        first += groups;
    }
    tasks
}

/// Scans `snapshot` once for all `asks`, which must be of this snapshot. Runs on the current
/// thread pool.
pub fn scan(snapshot: &Snapshot, tasks: &[Task], asks: &[&Ask]) -> Vec<Scanned> {
    let prepared: Vec<(Vec<Prepared>, Vec<i16>)> = snapshot
        .chunks
        .par_iter()
        .map(|chunk| {
            let mut integers = Vec::with_capacity(asks.len() * chunk.body.codes.width());
            let of = |ask: &&Ask| chunk.body.codes.prepare(&ask.embedding, &mut integers);
            (asks.iter().map(of).collect(), integers)
        })
        .collect();
    let least: Vec<[AtomicU32; 2]> = asks.iter().map(|_| Default::default()).collect();
    let found: Vec<Vec<Piece>> = tasks
        .par_iter()
        .map(|task| {
            let (prepared, integers) = &prepared[task.chunk];
            run(&snapshot.chunks[task.chunk], *task, asks, prepared, integers, &least)
        })
        .collect();
    let mut by_query: Vec<Vec<Piece>> =
        asks.iter().map(|_| Vec::with_capacity(tasks.len())).collect();
    for pieces in found {
        for (query, piece) in by_query.iter_mut().zip(pieces) {
            query.push(piece);
        }
    }
    by_query.into_iter().zip(asks).map(|(pieces, ask)| settle(pieces, ask.depth)).collect()
}

fn settle(mut pieces: Vec<Piece>, depth: usize) -> Scanned {
    let least = [0, 1].map(|which| {
        let mut top = Top::new(depth, f32::NEG_INFINITY);
        for piece in &mut pieces {
            for low in std::mem::take(&mut piece.low[which]) {
                top.push(low);
            }
        }
        top.least()
    });
    let matched = pieces.iter().map(|p| p.count).sum();
    let of = |part: fn(&Moments) -> f64| pieces.iter().map(|p| part(&p.background)).sum::<f64>();
    let n = of(|m| m.count as f64).max(1.0);
    let mean = of(|m| m.sum) / n;
    let variance = of(|m| m.squares) / n - mean * mean;
    let background = Background { mean: mean as f32, std: variance.max(0.0).sqrt() as f32 };
    Scanned { pieces, least, matched, background }
}

fn run(
    chunk: &Chunk,
    task: Task,
    asks: &[&Ask],
    prepared: &[Prepared],
    integers: &[i16],
    least: &[[AtomicU32; 2]],
) -> Vec<Piece> {
    let codes = &chunk.body.codes;
    let rows = chunk.body.len.min(task.to * GROUP) - task.from * GROUP;
    let groups = task.to - task.from;
    let mut pieces: Vec<Piece> = asks
        .iter()
        .map(|_| Piece {
            raw: vec![0.0; rows],
            high: vec![[f32::NEG_INFINITY; 2]; groups],
            low: Default::default(),
            count: 0,
            background: Moments::default(),
        })
        .collect();
    let mut tops: Vec<[Top; 2]> = asks
        .iter()
        .zip(least)
        .map(|(ask, least)| least.each_ref().map(|l| Top::new(ask.depth, read(l))))
        .collect();
    // Queries of one configuration share the factors of a group.
    let kinds: Vec<usize> =
        asks.iter().map(|a| asks.iter().position(|b| a.same_affine(b)).unwrap_or(0)).collect();
    let columns: Vec<_> = asks.iter().map(|ask| chunk.statistics.get(&ask.key)).collect();
    let mut factors = vec![[[1f32; GROUP], [0f32; GROUP]]; asks.len()];
    let mut sums = vec![0i32; GROUP * asks.len()];
    let mut bounds = Bounds::default();
    let arch = Arch::new();
    for g in 0..groups {
        let from = (task.from + g) * GROUP;
        let to = (from + GROUP).min(chunk.body.len);
        let n = to - from;
        let words =
            asks.iter().map(|ask| (task.word(ask, chunk, g), task.background(ask, chunk, g)));
        if words.clone().all(|(word, background)| word | background == 0) {
            continue;
        }
        codes::multiply(codes.rows(from, to), integers, codes.width(), &mut sums[..n * asks.len()]);
        for (q, ask) in asks.iter().enumerate().filter(|(q, _)| kinds[*q] == *q) {
            ask.factors(columns[q].map(|all| &all[from..to]), &mut factors[q]);
        }
        for (q, (word, background)) in words.enumerate() {
            if word | background == 0 {
                continue;
            }
            let [alpha, beta] = &factors[kinds[q]];
            let moments = arch.dispatch(Bounding {
                out: &mut bounds,
                word,
                background,
                prepared: &prepared[q],
                sums: &sums[q * n..(q + 1) * n],
                scale: &codes.scale[from..to],
                error: &codes.error[from..to],
                alpha,
                beta,
            });
            let piece = &mut pieces[q];
            piece.background.add(moments);
            piece.raw[from - task.from * GROUP..][..n].copy_from_slice(&bounds.raw[..n]);
            piece.high[g] = bounds.most_high;
            for ((top, low), most) in tops[q].iter_mut().zip(&bounds.low).zip(bounds.most_low) {
                top.offer(&low[..n], most);
            }
            piece.count += word.count_ones() as usize;
        }
    }
    for (((piece, tops), least), ask) in pieces.iter_mut().zip(tops).zip(least).zip(asks) {
        piece.low = tops.map(|top| top.values);
        for (low, least) in piece.low.iter_mut().zip(least) {
            if low.len() >= ask.depth {
                let order = |a: &f32, b: &f32| b.total_cmp(a);
                let (_, kth, _) = low.select_nth_unstable_by(ask.depth - 1, order);
                least.fetch_max(ordered(*kth), Ordering::Relaxed);
                low.truncate(ask.depth);
            }
        }
    }
    pieces
}

/// Scores of a group and how far they may be off.
struct Bounds {
    raw: [f32; GROUP],
    score: [f32; GROUP],
    /// Balanced, raw.
    low: [[f32; GROUP]; 2],
    high: [[f32; GROUP]; 2],
    most_low: [f32; 2],
    most_high: [f32; 2],
}

impl Default for Bounds {
    fn default() -> Self {
        let zeros = [0.0; GROUP];
        let most = [f32::NEG_INFINITY; 2];
        Self {
            raw: zeros,
            score: zeros,
            low: [zeros; 2],
            high: [zeros; 2],
            most_low: most,
            most_high: most,
        }
    }
}

impl Bounds {
    /// Takes the rows out that may not be found.
    #[inline(always)]
    fn mask(&mut self, word: u64, n: usize) {
        if word != full(n) {
            for i in (0..n).filter(|i| word >> i & 1 == 0) {
                for values in self.low.iter_mut().chain(&mut self.high) {
                    values[i] = f32::NEG_INFINITY;
                }
            }
        }
    }

    /// Moments of the scores of the rows of `word`. Clears those of the others.
    #[inline(always)]
    fn moments(&mut self, word: u64, n: usize) -> Moments {
        if word == 0 {
            return Moments::default();
        }
        if word != full(n) {
            for i in (0..n).filter(|i| word >> i & 1 == 0) {
                self.score[i] = 0.0;
            }
        }
        let (mut sum, mut squares) = ([0f32; LANES], [0f32; LANES]);
        let (whole, rest) = self.score[..n].as_chunks::<LANES>();
        for part in whole {
            for lane in 0..LANES {
                sum[lane] += part[lane];
                squares[lane] += part[lane] * part[lane];
            }
        }
        for score in rest {
            sum[0] += score;
            squares[0] += score * score;
        }
        Moments {
            count: word.count_ones() as usize,
            sum: f64::from(sum.iter().sum::<f32>()),
            squares: f64::from(squares.iter().sum::<f32>()),
        }
    }
}

/// The word of a group of `n` rows that has them all.
fn full(n: usize) -> u64 {
    if n == GROUP { u64::MAX } else { (1 << n) - 1 }
}

struct Bounding<'a> {
    out: &'a mut Bounds,
    prepared: &'a Prepared,
    sums: &'a [i32],
    scale: &'a [f32],
    error: &'a [f32],
    alpha: &'a [f32; GROUP],
    beta: &'a [f32; GROUP],
    /// Rows that may be found.
    word: u64,
    /// Rows that the background is made of.
    background: u64,
}

impl WithSimd for Bounding<'_> {
    type Output = Moments;
    #[inline(always)]
    fn with_simd<S: pulp::Simd>(self, _: S) -> Moments {
        let n = self.sums.len().min(GROUP);
        let (sums, scale, error) = (&self.sums[..n], &self.scale[..n], &self.error[..n]);
        let out = self.out;
        for i in 0..n {
            let raw = self.prepared.raw(scale[i], sums[i]);
            let reach = self.prepared.reach(error[i]);
            let (score, width) = widen(self.alpha[i], self.beta[i], raw, reach);
            out.raw[i] = raw;
            out.score[i] = score;
            out.low[0][i] = score - width;
            out.high[0][i] = score + width;
            out.low[1][i] = raw - reach;
            out.high[1][i] = raw + reach;
        }
        let moments = out.moments(self.background, n);
        out.mask(self.word, n);
        out.most_low = [most(&out.low[0][..n]), most(&out.low[1][..n])];
        out.most_high = [most(&out.high[0][..n]), most(&out.high[1][..n])];
        moments
    }
}

/// The balanced score of an approximate raw score, and how far it can be off.
#[inline(always)]
pub fn widen(alpha: f32, beta: f32, raw: f32, reach: f32) -> (f32, f32) {
    let scaled = alpha * raw;
    (scaled + beta, alpha.abs() * reach + SLACK * (scaled.abs() + beta.abs()))
}

#[inline(always)]
fn most(values: &[f32]) -> f32 {
    let mut most = [f32::NEG_INFINITY; LANES];
    let (whole, rest) = values.as_chunks::<LANES>();
    for part in whole {
        for lane in 0..LANES {
            most[lane] = if part[lane] > most[lane] { part[lane] } else { most[lane] };
        }
    }
    most.iter().chain(rest).copied().fold(f32::NEG_INFINITY, f32::max)
}

/// The largest values seen, at least `depth` of them.
struct Top {
    depth: usize,
    /// Smaller values are not among the best.
    floor: f32,
    values: Vec<f32>,
}

impl Top {
    fn new(depth: usize, floor: f32) -> Self {
        Self { depth: depth.max(1), floor, values: Vec::new() }
    }

    /// Takes what it can use of `values`, the largest of which is `most`.
    fn offer(&mut self, values: &[f32], most: f32) {
        if most > self.floor {
            for value in values {
                self.push(*value);
            }
        }
    }

    fn push(&mut self, value: f32) {
        if value > self.floor {
            self.values.push(value);
            if self.values.len() >= 2 * self.depth {
                self.cut();
            }
        }
    }

    fn cut(&mut self) {
        let order = |a: &f32, b: &f32| b.total_cmp(a);
        let (_, kth, _) = self.values.select_nth_unstable_by(self.depth - 1, order);
        self.floor = *kth;
        self.values.truncate(self.depth);
    }

    /// The k-th largest value; −∞ where there are fewer.
    fn least(mut self) -> f32 {
        if self.values.len() < self.depth {
            return f32::NEG_INFINITY;
        }
        self.cut();
        self.floor
    }
}

/// Orders as f32 does.
fn ordered(value: f32) -> u32 {
    let bits = value.to_bits();
    if bits >> 31 == 0 { bits | 1 << 31 } else { !bits }
}

fn read(least: &AtomicU32) -> f32 {
    match least.load(Ordering::Relaxed) {
        0 => f32::NEG_INFINITY,
        bits if bits >> 31 == 1 => f32::from_bits(bits & !(1 << 31)),
        bits => f32::from_bits(!bits),
    }
}
