//! Dot products of many vectors with many others, on the vector instructions of the machine.
//!
//! Both sides are packed first: the columns into panels that lie next to each other for every
//! component, and the rows into groups. A tile of the result then stays in registers for all components.
//! `candle`'s products use half of the width of AVX-512, and would write all scores to memory before the
//! first one can be ranked.

// Functions that are dispatched at run time must be inlined, so that they are compiled for the target
// features of the machine.
#![allow(clippy::inline_always)]

use pulp::{Arch, Simd, WithSimd};
use rayon::prelude::*;

/// Rows that are multiplied together.
pub(crate) const GROUP_ROWS: usize = 8;
/// Vectors of columns that a tile keeps in registers for each of its rows.
const TILE_VECTORS: usize = 3;
/// Components that are summed before the sum is added to that of the components before: rounding errors are
/// those of sums of so few.
const SUMMED_COMPONENTS: usize = 256;
/// Registers with which a tile of [`GROUP_ROWS`] rows fits; with fewer, tiles have half as many rows.
const MANY_REGISTERS: usize = 32;

/// Returns the number of roundings in the longest chain of operations that leads to a dot product of this
/// dimension by [`multiply`].
pub(crate) fn count_roundings(dimension: usize) -> usize {
    // A product and its sum, which may be rounded both, and then the sums of blocks.
    SUMMED_COMPONENTS.min(dimension) + 1 + dimension.div_ceil(SUMMED_COMPONENTS)
}

/// f32 or f64.
pub(crate) trait Element: Copy + Default + Send + Sync {
    /// As many values as fit into a register.
    type Vector<S: Simd>: Copy;
    /// Columns of a panel: three of the widest vectors.
    const PANEL_COLUMNS: usize;

    /// Views values as vectors; the rest is left out.
    fn vectors<S: Simd>(values: &[Self]) -> &[Self::Vector<S>];
    /// Views values as vectors that can be changed; the rest is left out.
    fn vectors_mut<S: Simd>(values: &mut [Self]) -> &mut [Self::Vector<S>];
    /// Returns a vector of equal values.
    fn splat<S: Simd>(simd: S, value: Self) -> Self::Vector<S>;
    /// Returns a·b + c, rounded once or twice, whichever is faster.
    fn mul_add<S: Simd>(
        simd: S,
        a: Self::Vector<S>,
        b: Self::Vector<S>,
        c: Self::Vector<S>,
    ) -> Self::Vector<S>;
    /// Returns a + b.
    fn add<S: Simd>(simd: S, a: Self::Vector<S>, b: Self::Vector<S>) -> Self::Vector<S>;
}

impl Element for f32 {
    type Vector<S: Simd> = S::f32s;
    const PANEL_COLUMNS: usize = 48;

    #[inline(always)]
    fn vectors<S: Simd>(values: &[Self]) -> &[S::f32s] {
        S::as_simd_f32s(values).0
    }

    #[inline(always)]
    fn vectors_mut<S: Simd>(values: &mut [Self]) -> &mut [S::f32s] {
        S::as_mut_simd_f32s(values).0
    }

    #[inline(always)]
    fn splat<S: Simd>(simd: S, value: Self) -> S::f32s {
        simd.splat_f32s(value)
    }

    #[inline(always)]
    fn mul_add<S: Simd>(simd: S, a: S::f32s, b: S::f32s, c: S::f32s) -> S::f32s {
        simd.mul_add_e_f32s(a, b, c)
    }

    #[inline(always)]
    fn add<S: Simd>(simd: S, a: S::f32s, b: S::f32s) -> S::f32s {
        simd.add_f32s(a, b)
    }
}

impl Element for f64 {
    type Vector<S: Simd> = S::f64s;
    const PANEL_COLUMNS: usize = 24;

    #[inline(always)]
    fn vectors<S: Simd>(values: &[Self]) -> &[S::f64s] {
        S::as_simd_f64s(values).0
    }

    #[inline(always)]
    fn vectors_mut<S: Simd>(values: &mut [Self]) -> &mut [S::f64s] {
        S::as_mut_simd_f64s(values).0
    }

    #[inline(always)]
    fn splat<S: Simd>(simd: S, value: Self) -> S::f64s {
        simd.splat_f64s(value)
    }

    #[inline(always)]
    fn mul_add<S: Simd>(simd: S, a: S::f64s, b: S::f64s, c: S::f64s) -> S::f64s {
        simd.mul_add_e_f64s(a, b, c)
    }

    #[inline(always)]
    fn add<S: Simd>(simd: S, a: S::f64s, b: S::f64s) -> S::f64s {
        simd.add_f64s(a, b)
    }
}

/// Vectors packed in blocks: component by component, and for each of them the values of all vectors of the
/// block. The last block is filled up with zeros.
pub(crate) struct Packed<T> {
    count: usize,
    /// Values per block.
    block_length: usize,
    values: Vec<T>,
}

impl<T: Element> Packed<T> {
    /// Packs vectors as panels of columns; `write` writes one of them.
    pub fn panels(count: usize, dimension: usize, write: impl Fn(usize, &mut [T]) + Sync) -> Self {
        Self::pack(count, dimension, T::PANEL_COLUMNS, write)
    }

    /// Packs vectors as groups of rows; `write` writes one of them.
    pub fn groups(count: usize, dimension: usize, write: impl Fn(usize, &mut [T]) + Sync) -> Self {
        Self::pack(count, dimension, GROUP_ROWS, write)
    }

    fn pack(
        count: usize,
        dimension: usize,
        width: usize,
        write: impl Fn(usize, &mut [T]) + Sync,
    ) -> Self {
        let block_length = width * dimension;
        let mut values = vec![T::default(); count.div_ceil(width) * block_length];
        values.par_chunks_mut(block_length.max(1)).enumerate().for_each(|(block, packed)| {
            let mut vector = vec![T::default(); dimension];
            let first = block * width;
            for i in first..(first + width).min(count) {
                write(i, &mut vector);
                for (components, value) in packed.chunks_exact_mut(width).zip(&vector) {
                    components[i - first] = *value;
                }
            }
        });
        Self { count, block_length, values }
    }

    /// Returns the number of vectors, without the zeros that fill up the last block.
    pub fn count(&self) -> usize {
        self.count
    }

    /// Returns the blocks.
    pub fn blocks(&self) -> impl ExactSizeIterator<Item = &[T]> {
        self.values.chunks_exact(self.block_length.max(1))
    }
}

/// Writes the dot products of the rows of a group with the columns of panels that follow each other:
/// [`GROUP_ROWS`] rows of `out`, each as long as all columns.
pub(crate) fn multiply<'a, T: Element + 'a>(
    group: &[T],
    panels: impl ExactSizeIterator<Item = &'a [T]>,
    out: &mut [T],
) {
    Arch::new().dispatch(Multiplication { group, panels, out });
}

struct Multiplication<'b, T, P> {
    group: &'b [T],
    panels: P,
    out: &'b mut [T],
}

impl<'a, T: Element + 'a, P: ExactSizeIterator<Item = &'a [T]>> WithSimd
    for Multiplication<'_, T, P>
{
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let Self { group, panels, out } = self;
        let row_length = panels.len() * T::PANEL_COLUMNS;
        for (panel, columns) in panels.zip((0..).step_by(T::PANEL_COLUMNS)) {
            if S::REGISTER_COUNT >= MANY_REGISTERS {
                multiply_panel::<S, T, GROUP_ROWS>(simd, group, panel, out, row_length, columns);
            } else {
                multiply_panel::<S, T, { GROUP_ROWS / 2 }>(
                    simd, group, panel, out, row_length, columns,
                );
            }
        }
    }
}

/// Multiplies a group with a panel, in tiles of `ROWS` rows and [`TILE_VECTORS`] vectors.
#[inline(always)]
fn multiply_panel<S: Simd, T: Element, const ROWS: usize>(
    simd: S,
    group: &[T],
    panel: &[T],
    out: &mut [T],
    row_length: usize,
    first_column: usize,
) {
    let vectors = size_of::<T>() * T::PANEL_COLUMNS / size_of::<T::Vector<S>>();
    let zero = T::splat(simd, T::default());
    let panel_blocks = panel.chunks(SUMMED_COMPONENTS * T::PANEL_COLUMNS);
    let group_blocks = group.chunks(SUMMED_COMPONENTS * GROUP_ROWS);
    for (block, (panel, group)) in panel_blocks.zip(group_blocks).enumerate() {
        for first_row in (0..GROUP_ROWS).step_by(ROWS) {
            for first_vector in (0..vectors).step_by(TILE_VECTORS) {
                let mut sums = [[zero; TILE_VECTORS]; ROWS];
                let components =
                    panel.chunks_exact(T::PANEL_COLUMNS).zip(group.chunks_exact(GROUP_ROWS));
                for (columns, rows) in components {
                    let columns = T::vectors::<S>(columns);
                    let columns = &columns[first_vector..first_vector + TILE_VECTORS];
                    let rows = &rows[first_row..first_row + ROWS];
                    for row in 0..ROWS {
                        let value = T::splat(simd, rows[row]);
                        for vector in 0..TILE_VECTORS {
                            sums[row][vector] =
                                T::mul_add(simd, columns[vector], value, sums[row][vector]);
                        }
                    }
                }
                for (row, sums) in sums.iter().enumerate() {
                    let start = (first_row + row) * row_length + first_column;
                    let out = T::vectors_mut::<S>(&mut out[start..start + T::PANEL_COLUMNS]);
                    let out = &mut out[first_vector..first_vector + TILE_VECTORS];
                    for (out, sum) in out.iter_mut().zip(sums) {
                        *out = if block == 0 { *sum } else { T::add(simd, *out, *sum) };
                    }
                }
            }
        }
    }
}

/// Rows that one task of [`map_scores`] multiplies with the same panels while those are in the cache.
const ROWS_PER_TASK: usize = 64;
/// Panels that stay in the cache for all rows of a task.
pub(crate) const PANELS_IN_CACHE: usize = 8;

/// Computes the dot products of each of `count` rows with all columns, and returns what `visit` makes of
/// them; `write` writes a row. Only the products of the rows in work are in memory.
pub(crate) fn map_scores<T: Element, R: Send>(
    count: usize,
    write: impl Fn(usize, &mut [T]) + Sync,
    columns: &Packed<T>,
    dimension: usize,
    visit: impl Fn(usize, &mut [T]) -> R + Sync,
) -> Vec<R> {
    if columns.count() == 0 {
        return (0..count).map(|i| visit(i, &mut [])).collect();
    }
    let panels: Vec<&[T]> = columns.blocks().collect();
    let row_length = panels.len() * T::PANEL_COLUMNS;
    let starts: Vec<usize> = (0..count).step_by(ROWS_PER_TASK).collect();
    let tasks = starts.into_par_iter().flat_map_iter(|first| {
        let rows = ROWS_PER_TASK.min(count - first);
        let groups = Packed::groups(rows, dimension, |i, out| write(first + i, out));
        let mut scores = vec![T::default(); rows.next_multiple_of(GROUP_ROWS) * row_length];
        let mut tile = vec![T::default(); GROUP_ROWS * PANELS_IN_CACHE * T::PANEL_COLUMNS];
        for (start, panels) in
            (0..).step_by(PANELS_IN_CACHE * T::PANEL_COLUMNS).zip(panels.chunks(PANELS_IN_CACHE))
        {
            let width = panels.len() * T::PANEL_COLUMNS;
            let tile = &mut tile[..GROUP_ROWS * width];
            for (group, scores) in
                groups.blocks().zip(scores.chunks_exact_mut(GROUP_ROWS * row_length))
            {
                multiply(group, panels.iter().copied(), tile);
                for (tile, scores) in
                    tile.chunks_exact(width).zip(scores.chunks_exact_mut(row_length))
                {
                    scores[start..start + width].copy_from_slice(tile);
                }
            }
        }
        let visit_row =
            |(i, scores): (usize, &mut [T])| visit(first + i, &mut scores[..columns.count()]);
        let rows = scores.chunks_exact_mut(row_length).take(rows).enumerate().map(visit_row);
        rows.collect::<Vec<R>>()
    });
    tasks.collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn value(i: usize) -> f64 {
        ((i * 2_654_435_761) % 10_007) as f64 / 10_007.0 - 0.5
    }

    fn check<T: Element + Into<f64>>(convert: fn(f64) -> T, tolerance: f64) {
        for (rows, columns, dimension) in [(1, 1, 1), (8, 48, 16), (19, 101, 77), (5, 24, 512)] {
            let row = |r: usize, c: usize| value(r * 1_000 + c);
            let column = |r: usize, c: usize| value(r * 2_003 + c + 7);
            let write = |vector: &dyn Fn(usize, usize) -> f64, i: usize, out: &mut [T]| {
                out.iter_mut().enumerate().for_each(|(c, out)| *out = convert(vector(i, c)));
            };
            let groups = Packed::groups(rows, dimension, |i, out| write(&row, i, out));
            let panels = Packed::panels(columns, dimension, |i, out| write(&column, i, out));
            assert_eq!((groups.count(), panels.count()), (rows, columns));
            let row_length = panels.blocks().len() * T::PANEL_COLUMNS;
            let mut out = vec![T::default(); GROUP_ROWS * row_length];
            for (g, group) in groups.blocks().enumerate() {
                multiply(group, panels.blocks(), &mut out);
                for (r, out) in out.chunks_exact(row_length).enumerate() {
                    for (c, out) in out.iter().enumerate() {
                        let (r, is_padding) = (g * GROUP_ROWS + r, c >= columns);
                        let expected = |i| row(r, i) * column(c, i);
                        let expected = if is_padding || r >= rows {
                            0.0
                        } else {
                            (0..dimension).map(expected).sum::<f64>()
                        };
                        let found: f64 = (*out).into();
                        assert!((found - expected).abs() < tolerance, "{r} {c}: {found}");
                    }
                }
            }
        }
    }

    #[test]
    fn products_are_those_of_plain_sums() {
        check::<f32>(|value| value as f32, 1e-4);
        check::<f64>(|value| value, 1e-12);
    }

    #[test]
    fn scores_of_rows_come_in_their_order() {
        let (rows, columns, dimension) = (150, 1_000, 33);
        let write = |seed: usize| {
            move |i: usize, out: &mut [f64]| {
                out.iter_mut().enumerate().for_each(|(c, out)| *out = value(i * seed + c));
            }
        };
        let panels = Packed::panels(columns, dimension, write(31));
        let sums = map_scores(rows, write(17), &panels, dimension, |i, scores| {
            assert_eq!(scores.len(), columns);
            (i, scores[999])
        });
        for (i, (row, found)) in sums.into_iter().enumerate() {
            let expected: f64 =
                (0..dimension).map(|c| value(i * 17 + c) * value(999 * 31 + c)).sum();
            assert_eq!(i, row);
            assert!((found - expected).abs() < 1e-12, "{i}");
        }
    }
}
