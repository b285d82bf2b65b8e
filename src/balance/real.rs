//! The numbers in which the formulas of the normalisers are computed: f32 for serving, as it is stored,
//! and f64 for evaluations of arrays.

// Functions that are dispatched at run time must be inlined, so that they are compiled for the target
// features of the machine.
#![allow(clippy::inline_always)]

use std::cmp::Ordering;
use std::ops::{Add, Div, Mul, Neg, Sub};

/// f32 or f64.
pub(super) trait Real:
    Copy
    + Add<Output = Self>
    + Sub<Output = Self>
    + Mul<Output = Self>
    + Div<Output = Self>
    + Neg<Output = Self>
{
    /// Rounds a constant.
    fn from_f64(value: f64) -> Self;
    /// Returns the larger of two numbers.
    fn maximum(self, other: Self) -> Self;
    /// Orders all numbers, NaN included.
    fn compare(a: &Self, b: &Self) -> Ordering;
}

impl Real for f32 {
    #[inline(always)]
    fn from_f64(value: f64) -> Self {
        value as f32
    }

    #[inline(always)]
    fn maximum(self, other: Self) -> Self {
        self.max(other)
    }

    fn compare(a: &Self, b: &Self) -> Ordering {
        a.total_cmp(b)
    }
}

impl Real for f64 {
    #[inline(always)]
    fn from_f64(value: f64) -> Self {
        value
    }

    #[inline(always)]
    fn maximum(self, other: Self) -> Self {
        self.max(other)
    }

    fn compare(a: &Self, b: &Self) -> Ordering {
        a.total_cmp(b)
    }
}
