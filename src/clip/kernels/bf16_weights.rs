//! Products with weights in bfloat16, for CPUs: half the memory that a query reads, and twice the
//! arithmetic where the machine has instructions for it (AVX-512 BF16, AMX, Arm's). The library chooses
//! at run time, and computes in f32 where it finds none.
//!
//! What is multiplied is rounded to bfloat16; sums, and all that stands between products, are f32.

use candle_core::{CpuStorage, CustomOp1, Error, Layout, Result, Shape, Tensor as Plain, bail};
use numkong::types::bf16;
use numkong::{PackedMatrix, Tensor};
use rayon::prelude::*;

use super::fused_ops::f32_values;

/// Rows of inputs per task, for which a task's weights stay in the cache.
const INPUT_ROWS_PER_TASK: usize = 512;
/// Rows of weights per task: they fit the cache next to the core at 3,072 values a row too, where 256
/// rows cost twice the time; and a single text has work for many cores.
const WEIGHT_ROWS_PER_TASK: usize = 128;

/// Weights [out, in], laid out for the machine's instructions.
pub struct Bf16Weights {
    packed_blocks: Vec<PackedMatrix<bf16>>,
    input_width: usize,
    output_width: usize,
}

impl Bf16Weights {
    /// Of `weight` [out, in], f32 on the CPU.
    pub fn new(weight: &Plain) -> Result<Self> {
        let (out, width) = weight.dims2()?;
        let weight = weight.flatten_all()?.to_vec1::<f32>()?;
        let pack = |rows: &[f32]| {
            PackedMatrix::try_pack(&round_to_bf16(rows, width)?).map_err(|e| tensor_error(&e))
        };
        let pieces = weight
            .par_chunks(WEIGHT_ROWS_PER_TASK * width.max(1))
            .map(pack)
            .collect::<Result<_>>()?;
        Ok(Self { packed_blocks: pieces, input_width: width, output_width: out })
    }

    /// `x` [m, in], contiguous f32 on the CPU, times the transpose of the weights: [m, out].
    pub fn multiply(&self, x: &Plain) -> Result<Plain> {
        x.apply_op1_no_bwd(self)
    }

    /// Rows of results.
    pub fn output_width(&self) -> usize {
        self.output_width
    }
}

/// Rows of `width` values, rounded.
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

impl CustomOp1 for Bf16Weights {
    fn name(&self) -> &'static str {
        "bf16-product"
    }

    fn cpu_fwd(&self, x: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let (m, width) = layout.shape().dims2()?;
        if width != self.input_width {
            bail!("rows of {width} values do not go with weights of {}", self.input_width);
        }
        let x = f32_values(x, layout)?;
        let mut out = vec![0f32; m * self.output_width];
        out.par_chunks_mut(INPUT_ROWS_PER_TASK * self.output_width)
            .zip(x.par_chunks(INPUT_ROWS_PER_TASK * width))
            .try_for_each(|(out, x)| {
                let x = round_to_bf16(x, width)?;
                let multiply_block = |piece: &PackedMatrix<bf16>| {
                    x.try_dots_packed(piece).map_err(|e| tensor_error(&e))
                };
                let parts = self
                    .packed_blocks
                    .par_iter()
                    .map(multiply_block)
                    .collect::<Result<Vec<_>>>()?;
                for (i, row) in out.chunks_exact_mut(self.output_width).enumerate() {
                    for (row, part) in row.chunks_mut(WEIGHT_ROWS_PER_TASK).zip(&parts) {
                        row.copy_from_slice(&part.as_slice()[i * row.len()..][..row.len()]);
                    }
                }
                Ok::<_, Error>(())
            })?;
        Ok((CpuStorage::F32(out), (m, self.output_width).into()))
    }
}

#[cfg(test)]
mod tests {
    use candle_core::{DType, Device};

    use super::*;

    #[test]
    fn products_are_those_of_rounded_values() {
        for (m, n, k) in [(1, 1, 1), (3, 257, 33), (8, 512, 512), (130, 300, 100), (257, 5, 64)] {
            let x = Plain::rand(-1f32, 1.0, (m, k), &Device::Cpu).unwrap();
            let w = Plain::rand(-1f32, 1.0, (n, k), &Device::Cpu).unwrap();
            let round = |t: &Plain| t.to_dtype(DType::BF16).unwrap().to_dtype(DType::F32).unwrap();
            let plain = round(&x).matmul(&round(&w).t().unwrap()).unwrap();
            let ours = Bf16Weights::new(&w).unwrap().multiply(&x).unwrap();
            assert_eq!((ours.dims(), ours.dtype()), (&[m, n][..], DType::F32));
            let difference = (ours - plain).unwrap().abs().unwrap().max_all().unwrap();
            let difference = difference.to_scalar::<f32>().unwrap();
            // Of sums of up to 512 products below 1, in another order.
            assert!(difference < 1e-3, "{m} {n} {k}: {difference}");
        }
    }

    #[test]
    fn what_does_not_fit_is_refused() {
        let weights = Plain::zeros((4, 8), DType::F32, &Device::Cpu).unwrap();
        let x = Plain::zeros((2, 7), DType::F32, &Device::Cpu).unwrap();
        let message = Bf16Weights::new(&weights).unwrap().multiply(&x).unwrap_err().to_string();
        assert!(message.contains("7 values") && message.contains("of 8"), "{message}");
    }
}
