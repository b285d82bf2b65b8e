//! The largest lower bounds seen so far, and the k-th of them as the threads of a pass share it.

use std::sync::atomic::{AtomicU32, Ordering};

/// Keeps the `depth` largest of many values, and up to as many smaller ones.
pub struct TopScores {
    depth: usize,
    /// Values up to this are ignored: at least `depth` larger or equal ones are known.
    threshold: f32,
    pub values: Vec<f32>,
}

impl TopScores {
    /// Ignores values up to `threshold` from the start.
    pub fn new(depth: usize, threshold: f32) -> Self {
        Self { depth: depth.max(1), threshold, values: Vec::new() }
    }

    /// Adds the values above the threshold; `max` is the largest of `values`.
    pub fn push_all(&mut self, values: &[f32], max: f32) {
        if max > self.threshold {
            for value in values {
                self.push(*value);
            }
        }
    }

    /// Adds a value if it is above the threshold.
    pub fn push(&mut self, value: f32) {
        if value > self.threshold {
            self.values.push(value);
            if self.values.len() >= 2 * self.depth {
                self.truncate_to_depth();
            }
        }
    }

    /// Drops all but the `depth` largest values, and raises the threshold to the smallest of them.
    fn truncate_to_depth(&mut self) {
        let order = |a: &f32, b: &f32| b.total_cmp(a);
        let (_, kth, _) = self.values.select_nth_unstable_by(self.depth - 1, order);
        self.threshold = *kth;
        self.values.truncate(self.depth);
    }

    /// Returns the `depth`-th largest value; −∞ if there are fewer.
    pub fn kth_bound(mut self) -> f32 {
        if self.values.len() < self.depth {
            return f32::NEG_INFINITY;
        }
        self.truncate_to_depth();
        self.threshold
    }
}

/// Converts to bits that have the same order as the f32 values, so that an atomic integer can hold a
/// maximum. Never returns 0 for a number.
pub fn to_ordered_bits(value: f32) -> u32 {
    let bits = value.to_bits();
    if bits >> 31 == 0 { bits | 1 << 31 } else { !bits }
}

/// Reads a bound that [`to_ordered_bits`] wrote; 0 stands for −∞.
pub fn load_bound(bound: &AtomicU32) -> f32 {
    match bound.load(Ordering::Relaxed) {
        0 => f32::NEG_INFINITY,
        bits if bits >> 31 == 1 => f32::from_bits(bits & !(1 << 31)),
        bits => f32::from_bits(!bits),
    }
}
