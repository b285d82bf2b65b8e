//! Products by the machine's instructions for bfloat16, which the library chooses at run time.

use candle_core::{Error, Result, bail};
use numkong::types::bf16;
use numkong::{PackedMatrix, Tensor};
use rayon::prelude::*;

/// Rows of inputs per task: the weights of the task stay in the cache for all of them.
const INPUT_ROWS_PER_TASK: usize = 512;
/// Rows of weights per task: they fit the innermost cache even at 3,072 values per row, for which 256
/// rows take twice the time, and a single text still has work for many cores.
const WEIGHT_ROWS_PER_TASK: usize = 128;

/// Weights [out, in], laid out for the instructions of the machine.
pub struct RoundedWeights(Vec<PackedMatrix<bf16>>);

impl RoundedWeights {
    pub fn new(weight: &[f32], width: usize) -> Result<Self> {
        let pack = |rows: &[f32]| {
            PackedMatrix::try_pack(&round_to_bf16(rows, width)?).map_err(|e| tensor_error(&e))
        };
        let blocks = weight.par_chunks(WEIGHT_ROWS_PER_TASK * width.max(1)).map(pack);
        Ok(Self(blocks.collect::<Result<_>>()?))
    }

    /// Multiplies `x` [m, `width`] with the transpose of the weights: [m, `outputs`].
    pub fn multiply(&self, x: &[f32], width: usize, outputs: usize) -> Result<Vec<f32>> {
        let mut out = vec![0f32; x.len() / width * outputs];
        out.par_chunks_mut(INPUT_ROWS_PER_TASK * outputs)
            .zip(x.par_chunks(INPUT_ROWS_PER_TASK * width))
            .try_for_each(|(out, x)| {
                let x = round_to_bf16(x, width)?;
                let multiply_block = |block: &PackedMatrix<bf16>| {
                    x.try_dots_packed(block).map_err(|e| tensor_error(&e))
                };
                let parts = self.0.par_iter().map(multiply_block).collect::<Result<Vec<_>>>()?;
                for (i, row) in out.chunks_exact_mut(outputs).enumerate() {
                    for (row, part) in row.chunks_mut(WEIGHT_ROWS_PER_TASK).zip(&parts) {
                        row.copy_from_slice(&part.as_slice()[i * row.len()..][..row.len()]);
                    }
                }
                Ok::<_, Error>(())
            })?;
        Ok(out)
    }
}

/// Rounds rows of `width` values to bfloat16.
fn round_to_bf16(rows: &[f32], width: usize) -> Result<Tensor<bf16>> {
    let mut tensor =
        Tensor::try_full(&[rows.len() / width, width], bf16::ZERO).map_err(|e| tensor_error(&e))?;
    match numkong::cast(rows, tensor.as_mut_slice()) {
        Some(()) => Ok(tensor),
        None => bail!("{} values are not rows of {width}", rows.len()),
    }
}

fn tensor_error(error: &numkong::TensorError) -> Error {
    Error::Msg(format!("bf16 product: {error}"))
}
