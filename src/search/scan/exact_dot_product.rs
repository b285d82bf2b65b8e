//! Dot product of a query and a stored embedding in f64.

use half::f16;
use pulp::WithSimd;

/// Converts a finite f16 exactly, in a form that compilers vectorise: the bits of an f16, shifted to the
/// position of those of an f32, are read as a value that is 2¹¹² times too small.
#[inline(always)]
fn f16_to_f32(value: f16) -> f32 {
    const EXPONENT_SCALE: f32 = f32::from_bits((127 + 112) << 23);
    let bits = u32::from(value.to_bits());
    let magnitude = f32::from_bits((bits & 0x7fff) << 13) * EXPONENT_SCALE;
    f32::from_bits(magnitude.to_bits() | (bits & 0x8000) << 16)
}

/// Computes the dot product in f64, in an order of additions that is the same on every machine.
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
        let (query_blocks, query_remainder) = self.query.as_chunks::<LANES>();
        let (row_blocks, row_remainder) = self.row.as_chunks::<LANES>();
        for (query, row) in query_blocks.iter().zip(row_blocks) {
            for lane in 0..LANES {
                lanes[lane] += f64::from(query[lane]) * f64::from(f16_to_f32(row[lane]));
            }
        }
        let remainder = query_remainder.iter().zip(row_remainder);
        let remainder: f64 = remainder.map(|(a, b)| f64::from(*a) * b.to_f64()).sum();
        lanes.iter().sum::<f64>() + remainder
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_finite_f16_is_converted_exactly() {
        for value in (0..=u16::MAX).map(f16::from_bits).filter(|value| value.is_finite()) {
            assert_eq!(f16_to_f32(value).to_bits(), value.to_f32().to_bits(), "{value}");
        }
    }
}
