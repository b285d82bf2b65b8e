//! Matrix products with weights in bfloat16, for CPUs: a query reads half the memory of f32.
//!
//! Both factors are rounded to bfloat16; products and sums are f32. With the feature `numkong` of this
//! crate the products use the machine's instructions for bfloat16 (AVX-512 BF16, AMX, Arm's), where it
//! has them; without it weights are converted to f32 just before they are multiplied.

use candle_core::{CpuStorage, CustomOp1, Layout, Result, Shape, Tensor, bail};

use super::fused_ops::f32_values;

#[cfg(not(feature = "numkong"))]
mod portable;
#[cfg(feature = "numkong")]
mod with_numkong;

#[cfg(not(feature = "numkong"))]
use portable::RoundedWeights;
#[cfg(feature = "numkong")]
use with_numkong::RoundedWeights;

/// Weights [out, in], rounded to bfloat16.
pub struct Bf16Weights {
    weights: RoundedWeights,
    input_width: usize,
    output_width: usize,
}

impl Bf16Weights {
    /// Rounds `weight` [out, in], f32 on the CPU.
    pub fn new(weight: &Tensor) -> Result<Self> {
        let (output_width, input_width) = weight.dims2()?;
        let weights = RoundedWeights::new(&weight.flatten_all()?.to_vec1()?, input_width)?;
        Ok(Self { weights, input_width, output_width })
    }

    /// Multiplies `x` [m, in], contiguous f32 on the CPU, with the transpose of the weights: [m, out].
    pub fn multiply(&self, x: &Tensor) -> Result<Tensor> {
        x.apply_op1_no_bwd(self)
    }

    /// Number of values per row of the result.
    pub fn output_width(&self) -> usize {
        self.output_width
    }
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
        let out = self.weights.multiply(f32_values(x, layout)?, width, self.output_width)?;
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
            let x = Tensor::rand(-1f32, 1.0, (m, k), &Device::Cpu).unwrap();
            let w = Tensor::rand(-1f32, 1.0, (n, k), &Device::Cpu).unwrap();
            let round = |t: &Tensor| t.to_dtype(DType::BF16).unwrap().to_dtype(DType::F32).unwrap();
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
        let weights = Tensor::zeros((4, 8), DType::F32, &Device::Cpu).unwrap();
        let x = Tensor::zeros((2, 7), DType::F32, &Device::Cpu).unwrap();
        let message = Bf16Weights::new(&weights).unwrap().multiply(&x).unwrap_err().to_string();
        assert!(message.contains("7 values") && message.contains("of 8"), "{message}");
    }
}
