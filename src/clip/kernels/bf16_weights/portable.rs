//! Products for every CPU: weights are converted to f32 just before they are multiplied.

use candle_core::{Device, Result, Tensor};
use half::bf16;
use rayon::prelude::*;

use crate::clip::kernels::skinny_matmul::{WEIGHT_ROWS_PER_TASK, multiply_by_tasks};

/// Number of rows of inputs up to which each core multiplies the weights that it has just converted,
/// which are then in its cache. With more rows the conversion of all is cheap compared with a general
/// product, which is faster (benches/encoders.rs).
const MAX_FEW_ROWS: usize = 64;

/// Weights [out, in], row by row: the bits of a bfloat16 each.
pub struct RoundedWeights(Vec<u16>);

impl RoundedWeights {
    #[expect(clippy::unnecessary_wraps, reason = "with the feature `numkong` packing can fail")]
    pub fn new(weight: &[f32], _width: usize) -> Result<Self> {
        Ok(Self(weight.par_iter().map(|&value| bf16::from_f32(value).to_bits()).collect()))
    }

    /// Multiplies `x` [m, `width`] with the transpose of the weights: [m, `outputs`].
    pub fn multiply(&self, x: &[f32], width: usize, outputs: usize) -> Result<Vec<f32>> {
        let x: Vec<f32> = x.iter().map(|&value| bf16::from_f32(value).to_f32()).collect();
        let m = x.len() / width;
        if m <= MAX_FEW_ROWS {
            let tasks = self.0.par_chunks(WEIGHT_ROWS_PER_TASK * width).map(convert_to_f32);
            return Ok(multiply_by_tasks(&x, width, outputs, tasks));
        }
        let weights = self.0.par_chunks(WEIGHT_ROWS_PER_TASK * width).flat_map_iter(convert_to_f32);
        let weights = Tensor::from_vec(weights.collect(), (outputs, width), &Device::Cpu)?;
        let x = Tensor::from_vec(x, (m, width), &Device::Cpu)?;
        x.matmul(&weights.t()?)?.flatten_all()?.to_vec1()
    }
}

/// A bfloat16 is the upper half of an f32.
fn convert_to_f32(bits: &[u16]) -> Vec<f32> {
    bits.iter().map(|&bits| f32::from_bits(u32::from(bits) << 16)).collect()
}
