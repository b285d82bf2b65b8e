//! The product of few rows with a weight matrix, as a single query needs it.
//!
//! A general matrix product repacks the weights first, which for a text of eight tokens takes longer
//! than the product itself. Here each weight is read once, in place.

// A kernel must be inlined into the run-time dispatch to be compiled for the chosen instructions.
#![allow(clippy::inline_always)]

use candle_core::{CpuStorage, CustomOp2, Layout, Result, Shape, Tensor, bail};
use pulp::{Arch, Simd, WithSimd};
use rayon::prelude::*;

/// Number of rows up to which this is faster than a general product (benches/encoders.rs).
pub const MAX_SKINNY_ROWS: usize = 16;

/// Rows of inputs and of weights that are multiplied together: each loaded weight is used four times,
/// each loaded input twice.
const INPUT_TILE_ROWS: usize = 4;
const WEIGHT_TILE_ROWS: usize = 2;
/// Weight rows per task.
const WEIGHT_ROWS_PER_TASK: usize = 64;

/// Multiplies x [m, k] with the transpose of weight [n, k], both contiguous f32 on the CPU: [m, n].
pub fn multiply_skinny(x: &Tensor, weight: &Tensor) -> Result<Tensor> {
    x.apply_op2_no_bwd(weight, &SkinnyMatmul)
}

struct SkinnyMatmul;

impl CustomOp2 for SkinnyMatmul {
    fn name(&self) -> &'static str {
        "skinny-product"
    }

    fn cpu_fwd(
        &self,
        x: &CpuStorage,
        xl: &Layout,
        w: &CpuStorage,
        wl: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let ((m, k), (n, _)) = (xl.shape().dims2()?, wl.shape().dims2()?);
        let (x, w) = (super::fused_ops::f32_values(x, xl)?, super::fused_ops::f32_values(w, wl)?);
        if k == 0 || w.len() != n * k {
            bail!("{m}×{k} does not match weights of {} values", w.len());
        }
        // [n, m], so that each task writes a contiguous part.
        let mut transposed = vec![0f32; n * m];
        transposed
            .par_chunks_mut(WEIGHT_ROWS_PER_TASK * m)
            .zip(w.par_chunks(WEIGHT_ROWS_PER_TASK * k))
            .for_each(|(out, w)| {
                Arch::new().dispatch(SkinnyMatmulKernel { x, w, k, m, out });
            });
        let mut out = vec![0f32; m * n];
        for (j, column) in transposed.chunks_exact(m).enumerate() {
            for (i, value) in column.iter().enumerate() {
                out[i * n + j] = *value;
            }
        }
        Ok((CpuStorage::F32(out), (m, n).into()))
    }
}

struct SkinnyMatmulKernel<'a> {
    x: &'a [f32],
    w: &'a [f32],
    k: usize,
    m: usize,
    /// [weight rows, m].
    out: &'a mut [f32],
}

impl WithSimd for SkinnyMatmulKernel<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let Self { x, w, k, m, out } = self;
        for (w, out) in w.chunks(WEIGHT_TILE_ROWS * k).zip(out.chunks_mut(WEIGHT_TILE_ROWS * m)) {
            for (block, x) in x.chunks(INPUT_TILE_ROWS * k).enumerate() {
                let sums = if w.len() == WEIGHT_TILE_ROWS * k && x.len() == INPUT_TILE_ROWS * k {
                    tile_dot_products::<S, WEIGHT_TILE_ROWS, INPUT_TILE_ROWS>(simd, w, x, k)
                } else {
                    edge_dot_products(simd, w, x, k)
                };
                for (out, sums) in out.chunks_exact_mut(m).zip(sums) {
                    for (out, sum) in
                        out[block * INPUT_TILE_ROWS..].iter_mut().zip(sums).take(INPUT_TILE_ROWS)
                    {
                        *out = sum;
                    }
                }
            }
        }
    }
}

/// Returns the dot products of `A` rows with `B` rows of `k` values.
#[inline(always)]
fn tile_dot_products<S: Simd, const A: usize, const B: usize>(
    simd: S,
    w: &[f32],
    x: &[f32],
    k: usize,
) -> [[f32; INPUT_TILE_ROWS]; WEIGHT_TILE_ROWS] {
    let blocks = k / S::F32_LANES;
    let mut w_rows: [&[S::f32s]; A] = [&[]; A];
    let mut x_rows: [&[S::f32s]; B] = [&[]; B];
    // Sliced to one length, so that bounds are checked here and not in the loop.
    for i in 0..A {
        w_rows[i] = &S::as_simd_f32s(&w[i * k..(i + 1) * k]).0[..blocks];
    }
    for j in 0..B {
        x_rows[j] = &S::as_simd_f32s(&x[j * k..(j + 1) * k]).0[..blocks];
    }
    let mut sums = [[simd.splat_f32s(0.0); B]; A];
    for block in 0..blocks {
        for i in 0..A {
            let w = w_rows[i][block];
            for j in 0..B {
                sums[i][j] = simd.mul_add_f32s(w, x_rows[j][block], sums[i][j]);
            }
        }
    }
    let done = blocks * S::F32_LANES;
    let mut out = [[0f32; INPUT_TILE_ROWS]; WEIGHT_TILE_ROWS];
    for i in 0..A {
        for j in 0..B {
            let rest = (done..k).map(|p| w[i * k + p] * x[j * k + p]).sum::<f32>();
            out[i][j] = simd.reduce_sum_f32s(sums[i][j]) + rest;
        }
    }
    out
}

/// Returns the same for incomplete tiles at the edges, row by row.
#[inline(always)]
fn edge_dot_products<S: Simd>(
    simd: S,
    w: &[f32],
    x: &[f32],
    k: usize,
) -> [[f32; INPUT_TILE_ROWS]; WEIGHT_TILE_ROWS] {
    let mut out = [[0f32; INPUT_TILE_ROWS]; WEIGHT_TILE_ROWS];
    for (out, w) in out.iter_mut().zip(w.chunks_exact(k)) {
        for (out, x) in out.iter_mut().zip(x.chunks_exact(k)) {
            *out = tile_dot_products::<S, 1, 1>(simd, w, x, k)[0][0];
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use candle_core::{DType, Device};

    use super::*;

    #[test]
    fn products_are_those_of_candle() {
        for (m, n, k) in
            [(1, 1, 1), (1, 3, 16), (8, 130, 512), (5, 7, 33), (9, 65, 100), (4, 2, 15)]
        {
            let x = Tensor::rand(-1f32, 1.0, (m, k), &Device::Cpu).unwrap();
            let w = Tensor::rand(-1f32, 1.0, (n, k), &Device::Cpu).unwrap();
            let plain = x.matmul(&w.t().unwrap()).unwrap();
            let ours = multiply_skinny(&x, &w).unwrap();
            assert_eq!((ours.dims(), ours.dtype()), (&[m, n][..], DType::F32));
            let difference = (ours - plain).unwrap().abs().unwrap().max_all().unwrap();
            let difference = difference.to_scalar::<f32>().unwrap();
            assert!(difference < 1e-4, "{m} {n} {k}: {difference}");
        }
    }
}
