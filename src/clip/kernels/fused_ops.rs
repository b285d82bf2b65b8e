//! The element-wise operations between the products of a block, in one pass over memory instead of
//! four.
//!
//! On the CPU they run in place, vectorised for the instructions of the machine (`pulp` chooses at run
//! time); on other devices they are ordinary tensor operations.

// A kernel must be inlined into the run-time dispatch to be compiled for the chosen instructions.
#![allow(clippy::inline_always)]

use candle_core::{CpuStorage, InplaceOp2, InplaceOp3, Layout, Result, Tensor, bail};
use candle_nn::ops::sigmoid;
use pulp::{Arch, WithSimd};
use rayon::prelude::*;

use crate::clip::checkpoint::Activation;

/// Values per task: enough work to be worth moving to another core.
const VALUES_PER_TASK: usize = 1 << 15;

/// Returns activation(x + bias), or x + bias without an activation. `x` is [.., n] and must not share
/// its storage with another tensor: it is overwritten.
pub fn add_bias_and_activate(
    x: Tensor,
    bias: &Tensor,
    activation: Option<Activation>,
) -> Result<Tensor> {
    if is_contiguous_cpu_f32(&x) {
        x.inplace_op2(bias, &AddBiasAndActivateOp(activation))?;
        return Ok(x);
    }
    let x = x.broadcast_add(bias)?;
    match activation {
        None => Ok(x),
        Some(Activation::QuickGelu) => &x * sigmoid(&(&x * 1.702)?)?,
        Some(Activation::Gelu) => x.gelu_erf(),
        Some(Activation::GeluTanh) => x.gelu(),
    }
}

/// Returns x + bias + residual; `x` is overwritten, as above.
pub fn add_bias_and_residual(x: Tensor, bias: &Tensor, residual: &Tensor) -> Result<Tensor> {
    if is_contiguous_cpu_f32(&x) && residual.is_contiguous() {
        x.inplace_op3(bias, residual, &AddBiasAndResidualOp)?;
        return Ok(x);
    }
    x.broadcast_add(bias)? + residual
}

/// Whether `x` is contiguous f32 on the CPU, as the kernels need it.
pub fn is_contiguous_cpu_f32(x: &Tensor) -> bool {
    x.device().is_cpu() && x.dtype() == candle_core::DType::F32 && x.is_contiguous()
}

/// Returns the number of values in the whole rows of `width` that make up a task; at least one row.
fn values_per_task(width: usize) -> usize {
    (VALUES_PER_TASK / width).max(1) * width
}

struct AddBiasAndActivateOp(Option<Activation>);

impl InplaceOp2 for AddBiasAndActivateOp {
    fn name(&self) -> &'static str {
        "bias-activation"
    }

    fn cpu_fwd(
        &self,
        x: &mut CpuStorage,
        xl: &Layout,
        bias: &CpuStorage,
        bl: &Layout,
    ) -> Result<()> {
        let (x, bias) = (f32_values_mut(x, xl)?, f32_values(bias, bl)?);
        let rows = values_per_task(bias.len());
        x.par_chunks_mut(rows).for_each(|x| {
            Arch::new().dispatch(BiasActivationKernel { x, bias, activation: self.0 });
        });
        Ok(())
    }
}

struct AddBiasAndResidualOp;

impl InplaceOp3 for AddBiasAndResidualOp {
    fn name(&self) -> &'static str {
        "bias-residual"
    }

    fn cpu_fwd(
        &self,
        x: &mut CpuStorage,
        xl: &Layout,
        bias: &CpuStorage,
        bl: &Layout,
        residual: &CpuStorage,
        rl: &Layout,
    ) -> Result<()> {
        let (x, bias, residual) =
            (f32_values_mut(x, xl)?, f32_values(bias, bl)?, f32_values(residual, rl)?);
        let rows = values_per_task(bias.len());
        x.par_chunks_mut(rows).zip(residual.par_chunks(rows)).for_each(|(x, residual)| {
            Arch::new().dispatch(BiasResidualKernel { x, bias, residual });
        });
        Ok(())
    }
}

/// Returns the values of a contiguous f32 tensor.
pub fn f32_values<'a>(storage: &'a CpuStorage, layout: &Layout) -> Result<&'a [f32]> {
    match (layout.contiguous_offsets(), storage) {
        (Some((from, to)), CpuStorage::F32(values)) => Ok(&values[from..to]),
        _ => bail!("not contiguous f32"),
    }
}

fn f32_values_mut<'a>(storage: &'a mut CpuStorage, layout: &Layout) -> Result<&'a mut [f32]> {
    match (layout.contiguous_offsets(), storage) {
        (Some((from, to)), CpuStorage::F32(values)) => Ok(&mut values[from..to]),
        _ => bail!("not contiguous f32"),
    }
}

struct BiasActivationKernel<'a> {
    x: &'a mut [f32],
    bias: &'a [f32],
    activation: Option<Activation>,
}

impl WithSimd for BiasActivationKernel<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: pulp::Simd>(self, _: S) {
        let Self { x, bias, activation } = self;
        match activation {
            None => map_with_bias(x, bias, |v| v),
            Some(Activation::QuickGelu) => map_with_bias(x, bias, |v| v / (1.0 + exp(-1.702 * v))),
            // tanh(u) = 2σ(2u) − 1.
            Some(Activation::GeluTanh) => map_with_bias(x, bias, |v| {
                let u = 0.797_884_6 * (v + 0.044_715 * v * v * v);
                v / (1.0 + exp(-2.0 * u))
            }),
            Some(Activation::Gelu) => {
                map_with_bias(x, bias, |v| 0.5 * v * (1.0 + erf(v * 0.707_106_77)));
            }
        }
    }
}

struct BiasResidualKernel<'a> {
    x: &'a mut [f32],
    bias: &'a [f32],
    residual: &'a [f32],
}

impl WithSimd for BiasResidualKernel<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: pulp::Simd>(self, _: S) {
        let Self { x, bias, residual } = self;
        let n = bias.len();
        for (x, residual) in x.chunks_exact_mut(n).zip(residual.chunks_exact(n)) {
            for ((x, bias), residual) in x.iter_mut().zip(bias).zip(residual) {
                *x += bias + residual;
            }
        }
    }
}

#[inline(always)]
fn map_with_bias(x: &mut [f32], bias: &[f32], f: impl Fn(f32) -> f32) {
    for row in x.chunks_exact_mut(bias.len()) {
        for (x, bias) in row.iter_mut().zip(bias) {
            *x = f(*x + bias);
        }
    }
}

/// Returns eˣ to about 2 units in the last place, in a form that compilers vectorise: 2ⁿ·eʳ with
/// |r| ≤ ln 2 / 2 and a polynomial for eʳ (Cephes).
#[inline(always)]
fn exp(x: f32) -> f32 {
    /// Adding it rounds to a whole number, whose bits are then the low bits of the sum.
    const ROUNDING_OFFSET: f32 = 12_582_912.0;
    let x = x.clamp(-87.0, 88.0);
    let shifted = x.mul_add(std::f32::consts::LOG2_E, ROUNDING_OFFSET);
    let n = shifted - ROUNDING_OFFSET;
    let r = n.mul_add(2.121_944_4e-4, n.mul_add(-0.693_359_4, x));
    let mut p = 1.987_569_2e-4f32;
    for c in [1.398_2e-3, 8.333_452e-3, 4.166_579_6e-2, 0.166_666_66, 0.5] {
        p = p.mul_add(r, c);
    }
    let e = p.mul_add(r * r, r + 1.0);
    let power = (shifted.to_bits().wrapping_sub(ROUNDING_OFFSET.to_bits()).wrapping_add(127)) << 23;
    e * f32::from_bits(power)
}

/// Returns erf(x) to 1.5e-7 (Abramowitz and Stegun, 7.1.26).
#[inline(always)]
fn erf(x: f32) -> f32 {
    let a = x.abs();
    let t = 1.0 / 0.327_591_1f32.mul_add(a, 1.0);
    let mut p = 1.061_405_4f32;
    for c in [-1.453_152, 1.421_413_7, -0.284_496_74, 0.254_829_6] {
        p = p.mul_add(t, c);
    }
    (1.0 - p * t * exp(-a * a)).copysign(x)
}

#[cfg(test)]
mod tests {
    use candle_core::Device;

    use super::*;

    #[test]
    fn activations_are_those_of_candle() {
        let values: Vec<f32> = (-4_000..4_000).map(|i| i as f32 * 0.004).collect();
        let x = Tensor::from_vec(values, (40, 200), &Device::Cpu).unwrap();
        let bias = Tensor::arange(0f32, 200., &Device::Cpu).unwrap().affine(0.01, -1.0).unwrap();
        let sum = x.broadcast_add(&bias).unwrap();
        for (activation, plain) in [
            (Activation::QuickGelu, (&sum * sigmoid(&(&sum * 1.702).unwrap()).unwrap()).unwrap()),
            (Activation::Gelu, sum.gelu_erf().unwrap()),
            (Activation::GeluTanh, sum.gelu().unwrap()),
        ] {
            let ours = add_bias_and_activate(x.copy().unwrap(), &bias, Some(activation)).unwrap();
            let difference = (ours - plain).unwrap().abs().unwrap().max_all().unwrap();
            let difference = difference.to_scalar::<f32>().unwrap();
            assert!(difference < 3e-6, "{activation:?} differs by {difference}");
        }
    }

    #[test]
    fn extremes_stay_finite() {
        let x = Tensor::new(&[-1e30f32, -200.0, 0.0, 200.0, 1e4], &Device::Cpu).unwrap();
        let bias = Tensor::zeros(5, candle_core::DType::F32, &Device::Cpu).unwrap();
        for activation in [Activation::QuickGelu, Activation::Gelu, Activation::GeluTanh] {
            let x = x.reshape((1, 5)).unwrap().copy().unwrap();
            let y = add_bias_and_activate(x, &bias, Some(activation))
                .unwrap()
                .to_vec2::<f32>()
                .unwrap();
            assert!(y[0].iter().all(|v| v.is_finite()), "{activation:?}: {y:?}");
            assert!(y[0][1].abs() < 1e-6 && y[0][2] == 0.0 && y[0][3] == 200.0, "{y:?}");
        }
    }

    #[test]
    fn bias_and_residual_are_added() {
        let x = Tensor::rand(0f32, 1.0, (3, 5, 7), &Device::Cpu).unwrap();
        let (bias, residual) = (x.get(0).unwrap().get(1).unwrap(), (&x * 2.0).unwrap());
        let plain = (x.broadcast_add(&bias).unwrap() + &residual).unwrap();
        let ours =
            add_bias_and_residual(x.copy().unwrap(), &bias.copy().unwrap(), &residual).unwrap();
        let difference = (ours - plain).unwrap().abs().unwrap().max_all().unwrap();
        assert!(difference.to_scalar::<f32>().unwrap() < 1e-6);
    }
}
