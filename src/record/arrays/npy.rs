//! Reads and writes the format of NumPy's `.npy` files: floats of 16, 32 or 64 bits in C or Fortran order.
//!
//! The format is described in NEP 1 of NumPy. The reader of `candle-core` refuses Fortran order, which
//! `numpy.save` uses for every transposed array.

use std::io::{self, Read, Write};

use half::f16;

use super::embeddings::Values;

const MAGIC: &[u8; 6] = b"\x93NUMPY";
/// Longest header: NumPy itself refuses longer ones by default.
const MAX_HEADER_BYTES: usize = 10_000;
/// Bytes that are read and converted at one time.
const CHUNK_BYTES: usize = 1 << 20;

/// What the header of a file says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct NpyHeader {
    element: ElementType,
    is_big_endian: bool,
    is_fortran_order: bool,
    /// Rows and values per row.
    pub shape: [usize; 2],
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum ElementType {
    F16,
    F32,
    F64,
}

impl ElementType {
    fn byte_count(self) -> usize {
        match self {
            Self::F16 => 2,
            Self::F32 => 4,
            Self::F64 => 8,
        }
    }
}

impl NpyHeader {
    /// Reads the header. The reason of an error is a sentence without the name of the file.
    pub fn read(reader: &mut impl Read) -> Result<Self, String> {
        let mut start = [0u8; 8];
        let is_complete = reader.read_exact(&mut start).is_ok();
        if !is_complete || start[..6] != *MAGIC {
            return Err("is not a NumPy array: it does not begin with \\x93NUMPY".into());
        }
        let unreadable = |error: std::io::Error| format!("its header cannot be read: {error}");
        let header_bytes = match start[6] {
            1 => {
                let mut length = [0u8; 2];
                reader.read_exact(&mut length).map_err(unreadable)?;
                usize::from(u16::from_le_bytes(length))
            }
            2 | 3 => {
                let mut length = [0u8; 4];
                reader.read_exact(&mut length).map_err(unreadable)?;
                u32::from_le_bytes(length) as usize
            }
            version => return Err(format!("has version {version} of the format, not 1, 2 or 3")),
        };
        if header_bytes > MAX_HEADER_BYTES {
            return Err(format!(
                "its header has {header_bytes} bytes, more than {MAX_HEADER_BYTES}"
            ));
        }
        let mut header = vec![0u8; header_bytes];
        reader.read_exact(&mut header).map_err(unreadable)?;
        Self::parse(&String::from_utf8_lossy(&header))
    }

    /// Parses `{'descr': '<f4', 'fortran_order': False, 'shape': (3, 4), }`.
    fn parse(header: &str) -> Result<Self, String> {
        let value_of = |key: &str| {
            let (_, rest) = header.split_once(&format!("'{key}':"))?;
            Some(rest.trim_start())
        };
        let invalid = || format!("has the header {:?}, which is not one of NumPy", header.trim());
        let type_name = value_of("descr")
            .and_then(|rest| rest.strip_prefix('\''))
            .and_then(|rest| rest.split_once('\''))
            .map(|(name, _)| name);
        let Some(type_name) = type_name else {
            return Err("has elements of several fields; give an array of floats".into());
        };
        let (order, element) = type_name.split_at(usize::from(!type_name.is_empty()));
        let element = match element {
            "f2" => ElementType::F16,
            "f4" => ElementType::F32,
            "f8" => ElementType::F64,
            _ => {
                return Err(format!(
                    "has elements of type {type_name:?}; give floats of 16, 32 or 64 bits"
                ));
            }
        };
        let fortran = value_of("fortran_order").ok_or_else(invalid)?;
        let shape = value_of("shape").and_then(|rest| rest.strip_prefix('('));
        let (shape, _) = shape.and_then(|rest| rest.split_once(')')).ok_or_else(invalid)?;
        let sizes: Option<Vec<usize>> = shape
            .split(',')
            .map(str::trim)
            .filter(|size| !size.is_empty())
            .map(|size| size.parse().ok())
            .collect();
        let sizes = sizes.ok_or_else(invalid)?;
        let Ok(shape) = <[usize; 2]>::try_from(sizes) else {
            return Err(format!(
                "has the shape ({shape}); give rows of embeddings, (n, dimension)"
            ));
        };
        Ok(Self {
            element,
            is_big_endian: order == ">",
            is_fortran_order: fortran.starts_with("True"),
            shape,
        })
    }

    /// Returns the number of bytes that follow the header; `None` if it is too large for any file.
    pub fn data_bytes(&self) -> Option<usize> {
        self.shape[0].checked_mul(self.shape[1])?.checked_mul(self.element.byte_count())
    }

    /// Reads the values that follow the header, row by row. `reader` must end with them.
    pub fn read_values(&self, reader: &mut impl Read) -> Result<Values, String> {
        let count = self.shape[0] * self.shape[1];
        let values = match self.element {
            ElementType::F16 => Values::F32(self.read_all(reader, count, |bytes: [u8; 2]| {
                f16::from_bits(u16::from_le_bytes(bytes)).to_f32()
            })?),
            ElementType::F32 => Values::F32(self.read_all(reader, count, f32::from_le_bytes)?),
            ElementType::F64 => Values::F64(self.read_all(reader, count, f64::from_le_bytes)?),
        };
        let mut rest = [0u8; 1];
        match reader.read(&mut rest) {
            Ok(0) => Ok(values),
            Ok(_) => Err("has more values than its header says".into()),
            Err(error) => Err(error.to_string()),
        }
    }

    fn read_all<T: Copy + Default, const N: usize>(
        &self,
        reader: &mut impl Read,
        count: usize,
        convert: impl Fn([u8; N]) -> T,
    ) -> Result<Vec<T>, String> {
        let mut values = Vec::with_capacity(count);
        let mut chunk = vec![0u8; CHUNK_BYTES];
        while values.len() < count {
            let bytes = &mut chunk[..((count - values.len()) * N).min(CHUNK_BYTES)];
            reader.read_exact(bytes).map_err(|error| {
                format!("ends after {} of {count} values: {error}", values.len())
            })?;
            let (elements, _) = bytes.as_chunks_mut::<N>();
            if self.is_big_endian {
                for element in elements.iter_mut() {
                    element.reverse();
                }
            }
            values.extend(elements.iter().map(|element| convert(*element)));
        }
        if self.is_fortran_order { Ok(transpose(&values, self.shape)) } else { Ok(values) }
    }
}

/// Writes an array of f64, row by row, in version 1 of the format.
pub fn write_npy(
    file: &mut impl Write,
    [rows, columns]: [usize; 2],
    values: impl Iterator<Item = f64>,
) -> io::Result<()> {
    let header =
        format!("{{'descr': '<f8', 'fortran_order': False, 'shape': ({rows}, {columns}), }}");
    // With the ten bytes before it and the line break at its end, a multiple of 64 bytes.
    let length = (header.len() + 11).next_multiple_of(64) - 10;
    file.write_all(MAGIC)?;
    file.write_all(&[1, 0])?;
    file.write_all(&(length as u16).to_le_bytes())?;
    file.write_all(format!("{header:<0$}\n", length - 1).as_bytes())?;
    values.map(f64::to_le_bytes).try_for_each(|value| file.write_all(&value))
}

/// Returns an array of this shape in C order, from one in Fortran order.
fn transpose<T: Copy + Default>(columns: &[T], [rows, width]: [usize; 2]) -> Vec<T> {
    let mut values = vec![T::default(); columns.len()];
    if values.is_empty() {
        return values;
    }
    // Sixteen rows at a time, so that what is read of each column is a whole cache line.
    for (block, out) in values.chunks_mut(16 * width).enumerate() {
        let first = block * 16;
        for (column, cells) in columns.chunks_exact(rows).enumerate() {
            let cells = &cells[first..first + out.len() / width];
            for (row, cell) in cells.iter().enumerate() {
                out[row * width + column] = *cell;
            }
        }
    }
    values
}

#[cfg(test)]
mod tests {
    use super::*;

    fn npy(version: u8, header: &str, data: &[u8]) -> Vec<u8> {
        let mut file = MAGIC.to_vec();
        file.extend([version, 0]);
        match version {
            1 => file.extend((header.len() as u16).to_le_bytes()),
            _ => file.extend((header.len() as u32).to_le_bytes()),
        }
        file.extend(header.as_bytes());
        file.extend(data);
        file
    }

    fn read(file: &[u8]) -> Result<(NpyHeader, Values), String> {
        let mut reader = file;
        let header = NpyHeader::read(&mut reader)?;
        let values = header.read_values(&mut reader)?;
        Ok((header, values))
    }

    fn header(kind: &str, fortran: &str, shape: &str) -> String {
        format!("{{'descr': '{kind}', 'fortran_order': {fortran}, 'shape': {shape}, }}  \n")
    }

    #[test]
    fn every_type_order_and_version_gives_the_same_values() {
        let rows = [1.0, 2.0, 3.0, -4.5, 0.25, 6.0];
        let columns = [1.0, -4.5, 2.0, 0.25, 3.0, 6.0];
        let f32s = |values: &[f32; 6]| values.iter().flat_map(|v| v.to_le_bytes()).collect();
        let cases: [(&str, &str, Vec<u8>); 5] = [
            ("<f4", "False", f32s(&rows)),
            ("<f4", "True", f32s(&columns)),
            (">f4", "False", rows.iter().flat_map(|v: &f32| v.to_be_bytes()).collect()),
            ("<f2", "False", rows.iter().flat_map(|v| f16::from_f32(*v).to_le_bytes()).collect()),
            ("<f8", "False", rows.iter().flat_map(|v| f64::from(*v).to_le_bytes()).collect()),
        ];
        for (kind, fortran, data) in cases {
            for version in [1, 2, 3] {
                let file = npy(version, &header(kind, fortran, "(2, 3)"), &data);
                let (header, values) = read(&file).unwrap();
                assert_eq!(header.shape, [2, 3]);
                assert_eq!(header.data_bytes(), Some(data.len()));
                let values = match values {
                    Values::F32(values) => values,
                    Values::F64(values) => values.iter().map(|v| *v as f32).collect(),
                };
                assert_eq!(values, rows, "{kind} {fortran} {version}");
            }
        }
    }

    #[test]
    fn what_is_written_can_be_read() {
        let written = [0.5, -0.25, 1.0, 0.0];
        let mut file = Vec::new();
        write_npy(&mut file, [2, 2], written.into_iter()).unwrap();
        assert_eq!((file.len() - 32) % 64, 0);
        let (header, values) = read(&file).unwrap();
        assert_eq!((header.shape, values), ([2, 2], Values::F64(written.to_vec())));
    }

    #[test]
    fn a_transposed_array_of_many_rows_is_read() {
        let (rows, width) = (37usize, 5usize);
        let columns: Vec<u32> =
            (0..width).flat_map(|c| (0..rows).map(move |r| (r * width + c) as u32)).collect();
        let expected: Vec<u32> = (0..(rows * width) as u32).collect();
        assert_eq!(transpose(&columns, [rows, width]), expected);
        assert!(transpose::<u32>(&[], [0, 3]).is_empty());
    }

    #[test]
    fn what_is_no_array_of_embeddings_is_refused_with_the_reason() {
        let data = [0u8; 24];
        for (file, reason) in [
            (b"PK\x03\x04".to_vec(), "not a NumPy array"),
            (npy(9, "", &[]), "version 9"),
            (npy(1, &header("<i8", "False", "(1, 3)"), &data), "\"<i8\""),
            (npy(1, &header("<U9", "False", "(2,)"), &data), "\"<U9\""),
            (npy(1, &header("<f4", "False", "(6,)"), &data), "(6,)"),
            (npy(1, &header("<f4", "False", "()"), &data), "()"),
            (npy(1, &header("<f4", "False", "(1, 2, 3)"), &data), "(1, 2, 3)"),
            (npy(1, &header("<f4", "False", "(2, x)"), &data), "header"),
            (npy(1, "{'descr': [('a', '<f4')], 'shape': (2, 3)}", &data), "several fields"),
            (npy(1, &header("<f4", "False", "(3, 3)"), &data), "ends after 0 of 9"),
            (npy(1, &header("<f4", "False", "(1, 3)"), &data), "more values"),
            (npy(2, &" ".repeat(MAX_HEADER_BYTES + 1), &data), "10001 bytes"),
        ] {
            let error = read(&file).unwrap_err();
            assert!(error.contains(reason), "{error}");
        }
        let huge = npy(1, &header("<f8", "False", "(9999999999999, 99999999)"), &[]);
        assert_eq!(NpyHeader::read(&mut huge.as_slice()).unwrap().data_bytes(), None);
    }
}
