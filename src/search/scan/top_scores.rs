//! The largest scores seen so far, and the bound that threads share.

use std::sync::atomic::{AtomicU32, Ordering};

/// The largest values seen, at least `depth` of them.
pub struct TopScores {
    depth: usize,
    /// Smaller values are not among the best.
    threshold: f32,
    pub values: Vec<f32>,
}

impl TopScores {
    pub fn new(depth: usize, floor: f32) -> Self {
        Self { depth: depth.max(1), threshold: floor, values: Vec::new() }
    }

    /// Takes what it can use of `values`, the largest of which is `most`.
    pub fn push_all(&mut self, values: &[f32], max: f32) {
        if max > self.threshold {
            for value in values {
                self.push(*value);
            }
        }
    }

    pub fn push(&mut self, value: f32) {
        if value > self.threshold {
            self.values.push(value);
            if self.values.len() >= 2 * self.depth {
                self.truncate_to_depth();
            }
        }
    }

    fn truncate_to_depth(&mut self) {
        let order = |a: &f32, b: &f32| b.total_cmp(a);
        let (_, kth, _) = self.values.select_nth_unstable_by(self.depth - 1, order);
        self.threshold = *kth;
        self.values.truncate(self.depth);
    }

    /// The k-th largest value; −∞ where there are fewer.
    pub fn kth_bound(mut self) -> f32 {
        if self.values.len() < self.depth {
            return f32::NEG_INFINITY;
        }
        self.truncate_to_depth();
        self.threshold
    }
}

/// Orders as f32 does.
pub fn to_ordered_bits(value: f32) -> u32 {
    let bits = value.to_bits();
    if bits >> 31 == 0 { bits | 1 << 31 } else { !bits }
}

pub fn load_bound(bound: &AtomicU32) -> f32 {
    match bound.load(Ordering::Relaxed) {
        0 => f32::NEG_INFINITY,
        bits if bits >> 31 == 1 => f32::from_bits(bits & !(1 << 31)),
        bits => f32::from_bits(!bits),
    }
}
