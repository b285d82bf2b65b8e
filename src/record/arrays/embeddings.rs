//! Embeddings in memory as they were stored, normalised when they are read.

// Functions that are dispatched at run time must be inlined, so that they are compiled for the target
// features of the machine.
#![allow(clippy::inline_always)]

use half::f16;
use pulp::{Arch, Simd, WithSimd};
use rayon::prelude::*;
use sha2::{Digest, Sha256};

use super::error::ArrayError;

/// Largest number of values of one array: 4 GiB in f32. Arrays are held in memory.
pub const MAX_VALUES: usize = 1 << 30;
/// Number of partial sums of a dot product in f64.
const LANES: usize = 16;

/// The values of an array, row by row. Values of 16 bits are widened.
#[derive(Debug, Clone, PartialEq)]
pub enum Values {
    /// Values of 16 or 32 bits.
    F32(Vec<f32>),
    /// Values of 64 bits.
    F64(Vec<f64>),
}

impl Values {
    /// Widens values of 16 bits.
    pub(super) fn from_f16(values: impl Iterator<Item = f16>) -> Self {
        Self::F32(values.map(f16::to_f32).collect())
    }

    pub(super) fn len(&self) -> usize {
        match self {
            Self::F32(values) => values.len(),
            Self::F64(values) => values.len(),
        }
    }

    /// Returns no values, of the same type.
    pub(super) fn same_type(&self) -> Self {
        match self {
            Self::F32(_) => Self::F32(Vec::new()),
            Self::F64(_) => Self::F64(Vec::new()),
        }
    }

    /// Appends zeros in the place of values that are missing.
    pub(super) fn append_zeros(&mut self, count: usize) {
        match self {
            Self::F32(values) => values.resize(values.len() + count, 0.0),
            Self::F64(values) => values.resize(values.len() + count, 0.0),
        }
    }

    /// Appends the values of another array; false if they have another type.
    pub(super) fn append(&mut self, other: Self) -> bool {
        match (self, other) {
            (Self::F32(values), Self::F32(other)) => values.extend(other),
            (Self::F64(values), Self::F64(other)) => values.extend(other),
            _ => return false,
        }
        true
    }
}

/// A row that holds no embedding.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RowFault {
    /// The row, from 0.
    pub row: usize,
    /// What is wrong with it, and what to do.
    pub reason: String,
}

/// One embedding per row, of any length but 0. They are used at unit length, computed in f64.
#[derive(Debug, Clone)]
pub struct EmbeddingArray {
    name: String,
    values: Values,
    rows: usize,
    dimension: usize,
    /// 1 divided by the length of each row; 0 for a row that holds no embedding.
    inverse_lengths: Vec<f64>,
    /// The rows that hold no embedding, ascending.
    faults: Vec<RowFault>,
    /// What each row embeds, if the files say it.
    labels: Option<Vec<String>>,
}

impl EmbeddingArray {
    /// Checks that every row is finite and has a direction. `name` is the file, for errors and reports.
    pub fn new(name: &str, values: Values, shape: [usize; 2]) -> Result<Self, ArrayError> {
        Self::with_faults(name, values, shape, Vec::new())?.require_sound()
    }

    /// Creates an array whose rows may hold no embedding: [`Self::faults`] has them. `faults` are those that
    /// were found already, ascending.
    pub(super) fn with_faults(
        name: &str,
        values: Values,
        [rows, dimension]: [usize; 2],
        faults: Vec<RowFault>,
    ) -> Result<Self, ArrayError> {
        if rows == 0 || dimension == 0 {
            let reason = format!("has the shape ({rows}, {dimension}), and so no embedding");
            return Err(ArrayError::new(name, reason));
        }
        debug_assert_eq!(values.len(), rows * dimension);
        let mut array = Self {
            name: name.to_owned(),
            values,
            rows,
            dimension,
            inverse_lengths: Vec::new(),
            faults: Vec::new(),
            labels: None,
        };
        let lengths: Vec<f64> =
            (0..rows).into_par_iter().map(|row| array.measure_length(row)).collect();
        let mut known = faults.into_iter().peekable();
        let mut inverse = |(row, length): (usize, f64)| {
            let fault = known.next_if(|fault| fault.row == row).or_else(|| {
                let has_direction = length.is_finite() && length.recip().is_finite();
                (!has_direction)
                    .then(|| RowFault { row, reason: array.describe_fault(row, length) })
            });
            let inverse_length = if fault.is_some() { 0.0 } else { length.recip() };
            (inverse_length, fault)
        };
        let (inverse_lengths, faults): (Vec<f64>, Vec<Option<RowFault>>) =
            lengths.into_iter().enumerate().map(&mut inverse).unzip();
        array.inverse_lengths = inverse_lengths;
        array.faults = faults.into_iter().flatten().collect();
        Ok(array)
    }

    /// Returns the array if every row holds an embedding; otherwise an error that names the first row.
    pub fn require_sound(self) -> Result<Self, ArrayError> {
        let Some(RowFault { row, reason }) = self.faults.first() else { return Ok(self) };
        let more = match self.faults.len() - 1 {
            0 => String::new(),
            n => format!("; {n} more rows hold no embedding"),
        };
        Err(ArrayError::new(self.name.as_str(), format!("row {row}: {reason}{more}")))
    }

    fn measure_length(&self, row: usize) -> f64 {
        let mut squares = 0.0;
        self.for_each_value(row, |_, value| squares += value * value);
        f64::sqrt(squares)
    }

    /// Says why a row of this length has no direction.
    fn describe_fault(&self, row: usize, length: f64) -> String {
        let mut not_finite = None;
        self.for_each_value(row, |column, value| {
            if !value.is_finite() && not_finite.is_none() {
                not_finite = Some((column, value));
            }
        });
        match not_finite {
            Some((column, value)) => {
                format!("column {column}: {value} is not a finite number; remove the row")
            }
            None if length == 0.0 => {
                "all values are 0, so that it has no direction; remove the row".to_owned()
            }
            None => format!("its length {length:e} cannot be normalised; remove the row"),
        }
    }

    /// Says what each row embeds.
    pub(super) fn with_labels(mut self, labels: Vec<String>) -> Self {
        debug_assert_eq!(labels.len(), self.rows);
        self.labels = Some(labels);
        self
    }

    /// Returns the file, as errors and reports name it.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Returns the rows that hold no embedding, ascending; none of an array that is sound.
    pub fn faults(&self) -> &[RowFault] {
        &self.faults
    }

    /// Returns how many embeddings had another length than 1, by more than rounding to 16 bits explains.
    pub fn count_not_unit(&self) -> usize {
        /// Rounding to f16 changes the length by less than half of this.
        const TOLERANCE: f64 = 1e-3;
        let is_other = |inverse: &&f64| **inverse != 0.0 && (**inverse - 1.0).abs() > TOLERANCE;
        self.inverse_lengths.iter().filter(is_other).count()
    }

    /// Returns the number of embeddings.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Returns the number of values per embedding.
    pub fn dimension(&self) -> usize {
        self.dimension
    }

    /// Returns what a row embeds; `None` if the files do not say it.
    pub fn label(&self, row: usize) -> Option<&str> {
        self.labels.as_ref().map(|labels| labels[row].as_str())
    }

    /// Returns an embedding at unit length.
    pub fn unit_row(&self, row: usize) -> Vec<f64> {
        let mut unit = vec![0.0; self.dimension];
        let inverse_length = self.inverse_lengths[row];
        self.for_each_value(row, |column, value| unit[column] = value * inverse_length);
        unit
    }

    /// Writes an embedding at unit length, rounded to f32.
    pub fn write_unit_row(&self, row: usize, out: &mut [f32]) {
        let inverse_length = self.inverse_lengths[row];
        self.for_each_value(row, |column, value| out[column] = (value * inverse_length) as f32);
    }

    /// Returns the dot product of an embedding at unit length with `other`, in f64.
    pub fn dot_product(&self, row: usize, other: &[f64]) -> f64 {
        let range = row * self.dimension..(row + 1) * self.dimension;
        let arch = Arch::new();
        let sum = match &self.values {
            Values::F32(values) => arch.dispatch(DotProduct { a: &values[range], b: other }),
            Values::F64(values) => arch.dispatch(DotProduct { a: &values[range], b: other }),
        };
        sum * self.inverse_lengths[row]
    }

    fn for_each_value(&self, row: usize, mut visit: impl FnMut(usize, f64)) {
        let range = row * self.dimension..(row + 1) * self.dimension;
        match &self.values {
            Values::F32(values) => {
                values[range].iter().enumerate().for_each(|(i, v)| visit(i, f64::from(*v)));
            }
            Values::F64(values) => values[range].iter().enumerate().for_each(|(i, v)| visit(i, *v)),
        }
    }

    /// Returns the SHA-256 of all values.
    pub fn fingerprint(&self) -> [u8; 32] {
        let mut hasher = Sha256::new();
        match &self.values {
            Values::F32(values) => hash_values(&mut hasher, values, f32::to_le_bytes),
            Values::F64(values) => hash_values(&mut hasher, values, f64::to_le_bytes),
        }
        hasher.update((self.dimension as u64).to_le_bytes());
        hasher.finalize().into()
    }

    /// Returns each row as bytes that are equal for equal embeddings.
    pub fn row_bytes(&self) -> impl Iterator<Item = Vec<u8>> {
        (0..self.rows).map(|row| {
            let mut unit = vec![0f32; self.dimension];
            self.write_unit_row(row, &mut unit);
            unit.iter().flat_map(|value| value.to_le_bytes()).collect()
        })
    }
}

fn hash_values<T: Copy, const SIZE: usize>(
    hasher: &mut Sha256,
    values: &[T],
    to_bytes: fn(T) -> [u8; SIZE],
) {
    /// Values that are hashed at one time.
    const CHUNK: usize = 1 << 10;
    let mut bytes = [[0u8; SIZE]; CHUNK];
    for values in values.chunks(CHUNK) {
        let bytes = &mut bytes[..values.len()];
        bytes.iter_mut().zip(values).for_each(|(bytes, value)| *bytes = to_bytes(*value));
        hasher.update(bytes.as_flattened());
    }
}

/// Computes a dot product in f64 with the vector instructions of the machine. The order of the additions is
/// fixed.
struct DotProduct<'a, T> {
    a: &'a [T],
    b: &'a [f64],
}

impl<T: Copy + Into<f64>> WithSimd for DotProduct<'_, T> {
    type Output = f64;

    #[inline(always)]
    fn with_simd<S: Simd>(self, _: S) -> f64 {
        let mut lanes = [0f64; LANES];
        let (a_blocks, a_rest) = self.a.as_chunks::<LANES>();
        let (b_blocks, b_rest) = self.b.as_chunks::<LANES>();
        for (x, y) in a_blocks.iter().zip(b_blocks) {
            for lane in 0..LANES {
                lanes[lane] += x[lane].into() * y[lane];
            }
        }
        let mut sum = 0.0;
        for (x, y) in a_rest.iter().zip(b_rest) {
            sum += (*x).into() * y;
        }
        lanes.iter().sum::<f64>() + sum
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_have_unit_length_whatever_they_were_stored_as() {
        let single =
            EmbeddingArray::new("a", Values::F32(vec![3.0, 4.0, 0.0, 0.5]), [2, 2]).unwrap();
        let double =
            EmbeddingArray::new("b", Values::F64(vec![3.0, 4.0, 0.0, 0.5]), [2, 2]).unwrap();
        for array in [&single, &double] {
            assert_eq!(array.unit_row(0), [3.0 * (1.0 / 5.0), 4.0 * (1.0 / 5.0)]);
            assert!((array.dot_product(0, &[0.6, 0.8]) - 1.0).abs() < 1e-15);
            assert_eq!(array.dot_product(1, &[0.6, 0.8]), 0.8);
            let mut rounded = [0f32; 2];
            array.write_unit_row(1, &mut rounded);
            assert_eq!(rounded, [0.0, 1.0]);
        }
        assert_ne!(single.fingerprint(), double.fingerprint());
        assert_eq!(single.fingerprint(), single.clone().fingerprint());
        assert_eq!(single.row_bytes().collect::<Vec<_>>(), double.row_bytes().collect::<Vec<_>>());
    }

    #[test]
    fn rows_without_a_direction_are_refused_by_row_and_value() {
        let refused = |values: Vec<f64>, shape: [usize; 2]| {
            EmbeddingArray::new("a.npy", Values::F64(values), shape).unwrap_err().to_string()
        };
        let error = refused(vec![1.0, 0.0, 0.5, f64::NAN], [2, 2]);
        assert_eq!(error, "a.npy: row 1: column 1: NaN is not a finite number; remove the row");
        assert!(refused(vec![f64::NEG_INFINITY, 0.0], [1, 2]).contains("row 0: column 0: -inf"));
        assert!(refused(vec![1.0, 0.0, 0.0, 0.0], [2, 2]).contains("row 1: all values are 0"));
        assert!(refused(vec![1e300, 1e300], [1, 2]).contains("row 0: its length inf"));
        let several = refused(vec![0.0, 0.0, 1.0, 0.0, f64::NAN, 1.0], [3, 2]);
        assert!(
            several.contains("row 0: all") && several.ends_with("; 1 more rows hold no embedding")
        );
        assert!(refused(vec![], [0, 2]).contains("(0, 2)"));
        assert!(refused(vec![], [2, 0]).contains("(2, 0)"));
    }
}
