//! Dot products in f64 of a query and a stored row.

#![expect(
    clippy::inline_always,
    reason = "vector code is compiled for the caller's target features"
)]

use half::f16;
use pulp::WithSimd;

/// The value of a finite f16, written so that compilers vectorise it: its bits, where those of an f32
/// stand, are 2¹¹² times too small.
#[inline(always)]
fn f16_to_f32(value: f16) -> f32 {
    const EXPONENT_SCALE: f32 = f32::from_bits((127 + 112) << 23);
    let bits = u32::from(value.to_bits());
    let magnitude = f32::from_bits((bits & 0x7fff) << 13) * EXPONENT_SCALE;
    f32::from_bits(magnitude.to_bits() | (bits & 0x8000) << 16)
}

/// The product of a query and a stored row in f64, in an order that does not depend on the machine.
pub struct ExactDotProduct<'a> {
    pub query: &'a [f32],
    pub row: &'a [f16],
}

impl WithSimd for ExactDotProduct<'_> {
    type Output = f64;
    #[inline(always)]
    fn with_simd<S: pulp::Simd>(self, _: S) -> f64 {
        const LANES: usize = 16;
        let mut lanes = [0f64; LANES];
        let (a, a_rest) = self.query.as_chunks::<LANES>();
        let (b, b_rest) = self.row.as_chunks::<LANES>();
        for (a, b) in a.iter().zip(b) {
            for lane in 0..LANES {
                lanes[lane] += f64::from(a[lane]) * f64::from(f16_to_f32(b[lane]));
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
            assert_eq!(f16_to_f32(value).to_bits(), value.to_f32().to_bits(), "{value}");
        }
    }
}
