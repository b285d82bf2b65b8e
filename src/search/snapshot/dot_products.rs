//! Integer dot products of codes and quantised queries, with the vector instructions of the machine.

#![expect(
    clippy::inline_always,
    reason = "vector code is compiled for the caller's target features"
)]

/// Computes the dot product of each row (`width` codes) with each query (`width` whole numbers) into
/// `sums[query * row_count + row]`. Uses AVX-512 or AVX2 if the machine has it; on other machines the
/// compiler vectorises for the target (NEON on aarch64).
pub fn compute_dot_products(rows: &[i8], queries: &[i16], width: usize, sums: &mut [i32]) {
    let work = DotProducts { rows, queries, width, sums };
    #[cfg(target_arch = "x86_64")]
    {
        if let Some(simd) = pulp::x86::V4::try_new() {
            return simd.vectorize(x86::Avx512DotProducts { simd, work });
        }
        if let Some(simd) = pulp::x86::V3::try_new() {
            return simd.vectorize(x86::Avx2DotProducts { simd, work });
        }
    }
    compute_dot_products_portably(work);
}

struct DotProducts<'a> {
    rows: &'a [i8],
    queries: &'a [i16],
    width: usize,
    sums: &'a mut [i32],
}

impl DotProducts<'_> {
    /// Calls the kernel for each row with eight, four, two or one of the queries at a time.
    #[inline(always)]
    fn run_kernel(self, kernel: impl DotKernel) {
        let row_count = self.rows.len() / self.width;
        let query_count = self.queries.len() / self.width;
        for (r, row) in self.rows.chunks_exact(self.width).enumerate() {
            let mut q = 0;
            while q < query_count {
                let remaining = &self.queries[q * self.width..];
                let mut store = |sums: &[i32]| {
                    for (i, sum) in sums.iter().enumerate() {
                        self.sums[(q + i) * row_count + r] = *sum;
                    }
                    sums.len()
                };
                q += match query_count - q {
                    8.. => store(&kernel.dot_with_queries::<8>(row, remaining, self.width)),
                    4.. => store(&kernel.dot_with_queries::<4>(row, remaining, self.width)),
                    2.. => store(&kernel.dot_with_queries::<2>(row, remaining, self.width)),
                    _ => store(&kernel.dot_with_queries::<1>(row, remaining, self.width)),
                };
            }
        }
    }
}

trait DotKernel: Copy {
    /// Returns the dot products of a row with the first `N` queries.
    fn dot_with_queries<const N: usize>(
        self,
        row: &[i8],
        queries: &[i16],
        width: usize,
    ) -> [i32; N];
}

#[derive(Clone, Copy)]
struct PortableKernel;

impl DotKernel for PortableKernel {
    #[inline(always)]
    fn dot_with_queries<const N: usize>(
        self,
        row: &[i8],
        queries: &[i16],
        width: usize,
    ) -> [i32; N] {
        let mut sums = [0; N];
        for (sum, query) in sums.iter_mut().zip(queries.chunks_exact(width)) {
            *sum = row.iter().zip(query).map(|(x, t)| i32::from(*x) * i32::from(*t)).sum();
        }
        sums
    }
}

fn compute_dot_products_portably(work: DotProducts<'_>) {
    work.run_kernel(PortableKernel);
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use std::arch::x86_64::{__m256i, __m512i};

    use pulp::x86::{V3, V4};

    use super::{DotKernel, DotProducts};
    use crate::search::snapshot::quantise::CODE_ALIGNMENT;

    pub struct Avx512DotProducts<'a> {
        pub simd: V4,
        pub work: DotProducts<'a>,
    }

    impl pulp::NullaryFnOnce for Avx512DotProducts<'_> {
        type Output = ();
        #[inline(always)]
        fn call(self) {
            self.work.run_kernel(Avx512Kernel(self.simd));
        }
    }

    #[derive(Clone, Copy)]
    struct Avx512Kernel(V4);

    impl DotKernel for Avx512Kernel {
        #[inline(always)]
        fn dot_with_queries<const N: usize>(
            self,
            row: &[i8],
            queries: &[i16],
            width: usize,
        ) -> [i32; N] {
            let simd = self.0;
            let mut sums = [pulp::cast::<[i32; 16], __m512i>([0; 16]); N];
            let row = row.as_chunks::<CODE_ALIGNMENT>().0;
            let queries: [&[[i16; CODE_ALIGNMENT]]; N] = std::array::from_fn(|q| {
                queries[q * width..(q + 1) * width].as_chunks::<CODE_ALIGNMENT>().0
            });
            for (i, x) in row.iter().enumerate() {
                let x = simd.avx512bw._mm512_cvtepi8_epi16(pulp::cast::<[i8; 32], __m256i>(*x));
                for (sum, query) in sums.iter_mut().zip(&queries) {
                    let t = pulp::cast::<[i16; 32], __m512i>(query[i]);
                    let product = simd.avx512bw._mm512_madd_epi16(x, t);
                    *sum = simd.avx512f._mm512_add_epi32(*sum, product);
                }
            }
            sums.map(|sum| simd.avx512f._mm512_reduce_add_epi32(sum))
        }
    }

    pub struct Avx2DotProducts<'a> {
        pub simd: V3,
        pub work: DotProducts<'a>,
    }

    impl pulp::NullaryFnOnce for Avx2DotProducts<'_> {
        type Output = ();
        #[inline(always)]
        fn call(self) {
            self.work.run_kernel(Avx2Kernel(self.simd));
        }
    }

    #[derive(Clone, Copy)]
    struct Avx2Kernel(V3);

    impl DotKernel for Avx2Kernel {
        #[inline(always)]
        fn dot_with_queries<const N: usize>(
            self,
            row: &[i8],
            queries: &[i16],
            width: usize,
        ) -> [i32; N] {
            let simd = self.0;
            let mut sums = [pulp::cast::<[i32; 8], __m256i>([0; 8]); N];
            let row = row.as_chunks::<16>().0;
            let queries: [&[[i16; 16]]; N] =
                std::array::from_fn(|q| queries[q * width..(q + 1) * width].as_chunks::<16>().0);
            for (i, x) in row.iter().enumerate() {
                let x = simd.avx2._mm256_cvtepi8_epi16(pulp::cast(*x));
                for (sum, query) in sums.iter_mut().zip(&queries) {
                    let t = pulp::cast::<[i16; 16], __m256i>(query[i]);
                    let product = simd.avx2._mm256_madd_epi16(x, t);
                    *sum = simd.avx2._mm256_add_epi32(*sum, product);
                }
            }
            sums.map(|sum| pulp::cast::<__m256i, [i32; 8]>(sum).iter().sum())
        }
    }
}

#[cfg(test)]
mod tests {
    use rand::{RngExt, SeedableRng};
    use rand_chacha::ChaCha8Rng;

    use super::*;

    #[test]
    fn every_kernel_gives_the_same_sums() {
        let mut rng = ChaCha8Rng::seed_from_u64(1);
        for (width, queries) in [(32, 1), (64, 3), (512, 8), (544, 15), (96, 16)] {
            let rows: Vec<i8> = (0..7 * width).map(|_| rng.random_range(-127..=127)).collect();
            let integers: Vec<i16> =
                (0..queries * width).map(|_| rng.random_range(-4000..4000)).collect();
            let mut portable = vec![0; 7 * queries];
            compute_dot_products_portably(DotProducts {
                rows: &rows,
                queries: &integers,
                width,
                sums: &mut portable,
            });
            let mut chosen = vec![0; 7 * queries];
            compute_dot_products(&rows, &integers, width, &mut chosen);
            assert_eq!(portable, chosen);
            #[cfg(target_arch = "x86_64")]
            if let Some(simd) = pulp::x86::V3::try_new() {
                let mut avx2 = vec![0; 7 * queries];
                let work = DotProducts { rows: &rows, queries: &integers, width, sums: &mut avx2 };
                simd.vectorize(x86::Avx2DotProducts { simd, work });
                assert_eq!(portable, avx2);
            }
        }
    }
}
