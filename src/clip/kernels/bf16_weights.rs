//! Matrix products with weights in bfloat16, for CPUs: a query reads half the memory, and the
//! arithmetic is twice as fast if the machine has instructions for it (AVX-512 BF16, AMX, Arm's). The
//! library chooses them at run time, and computes in f32 if there are none.
//!
//! Both factors are rounded to bfloat16; sums, and everything between products, are f32.

use candle_core::{CpuStorage, CustomOp1, Error, Layout, Result, Shape, Tensor as Plain, bail};
use numkong::capabilities::{available, cap, configure_thread};
use numkong::types::bf16;
use numkong::{PackedMatrix, Tensor};
use rayon::prelude::*;

use super::fused_ops::f32_values;

/// Rows of inputs per task: the weights of the task stay in the cache for all of them.
const INPUT_ROWS_PER_TASK: usize = 512;
/// Rows of weights per task: they fit the innermost cache even at 3,072 values per row, for which 256
/// rows take twice the time, and a single text still has work for many cores.
const WEIGHT_ROWS_PER_TASK: usize = 128;

/// Weights [out, in], laid out for the instructions of the machine.
pub struct Bf16Weights {
    packed_blocks: Vec<PackedMatrix<bf16>>,
    input_width: usize,
    output_width: usize,
}

impl Bf16Weights {
    /// Rounds and packs `weight` [out, in], f32 on the CPU.
    pub fn new(weight: &Plain) -> Result<Self> {
        request_amx_registers()?;
        let (out, width) = weight.dims2()?;
        let weight = weight.flatten_all()?.to_vec1::<f32>()?;
        let pack = |rows: &[f32]| {
            PackedMatrix::try_pack(&round_to_bf16(rows, width)?).map_err(|e| tensor_error(&e))
        };
        let packed_blocks = weight
            .par_chunks(WEIGHT_ROWS_PER_TASK * width.max(1))
            .map(pack)
            .collect::<Result<_>>()?;
        Ok(Self { packed_blocks, input_width: width, output_width: out })
    }

    /// Multiplies `x` [m, in], contiguous f32 on the CPU, with the transpose of the weights: [m, out].
    pub fn multiply(&self, x: &Plain) -> Result<Plain> {
        x.apply_op1_no_bwd(self)
    }

    /// Number of values per row of the result.
    pub fn output_width(&self) -> usize {
        self.output_width
    }
}

/// Asks Linux for the AMX registers where the CPU has them: their instructions kill a process that
/// has not asked. The permission holds for all threads.
fn request_amx_registers() -> Result<()> {
    let has_amx = available() & (cap::SAPPHIREAMX | cap::GRANITEAMX) != 0;
    if has_amx && !configure_thread() {
        bail!(
            "the system does not let this process use the AMX registers of its CPU: set model.dtype = \"f32\""
        );
    }
    Ok(())
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

impl CustomOp1 for Bf16Weights {
    fn name(&self) -> &'static str {
        "bf16-product"
    }

    fn cpu_fwd(&self, x: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let (m, width) = layout.shape().dims2()?;
        if width != self.input_width {
            bail!("rows of {width} values do not match weights of {}", self.input_width);
        }
        let x = f32_values(x, layout)?;
        let mut out = vec![0f32; m * self.output_width];
        out.par_chunks_mut(INPUT_ROWS_PER_TASK * self.output_width)
            .zip(x.par_chunks(INPUT_ROWS_PER_TASK * width))
            .try_for_each(|(out, x)| {
                let x = round_to_bf16(x, width)?;
                let multiply_block = |block: &PackedMatrix<bf16>| {
                    x.try_dots_packed(block).map_err(|e| tensor_error(&e))
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
            // Sums of up to 512 products below 1, added in a different order.
            assert!(difference < 1e-3, "{m} {n} {k}: {difference}");
        }
    }

    #[test]
    fn inputs_of_another_width_are_rejected() {
        let weights = Plain::zeros((4, 8), DType::F32, &Device::Cpu).unwrap();
        let x = Plain::zeros((2, 7), DType::F32, &Device::Cpu).unwrap();
        let message = Bf16Weights::new(&weights).unwrap().multiply(&x).unwrap_err().to_string();
        assert!(message.contains("7 values") && message.contains("of 8"), "{message}");
    }
}
