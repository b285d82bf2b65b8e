//! Writes α and β of every image, for whoever ranks by a vector search of their own.

use std::fs::File;
use std::io::{self, BufWriter, Write};
use std::path::Path;

use super::pilot::ArrayEvaluation;
use crate::balance::normalise::{ExactTransform, Normaliser};

/// Writes `NAME.npy` for each run but plain CLIP: one row of α and β per image, f64. Characters of the name
/// that file names do not have become `_`.
pub fn write_transforms(folder: &Path, evaluated: &ArrayEvaluation) -> io::Result<()> {
    for (run, transforms) in evaluated.runs.iter().zip(&evaluated.transforms) {
        if run.normaliser == Normaliser::Raw {
            continue;
        }
        let is_legal = |c: char| c.is_alphanumeric() || "-_.=".contains(c);
        let name: String =
            run.name.chars().map(|c| if is_legal(c) { c } else { '_' }).take(100).collect();
        let mut file = BufWriter::new(File::create(folder.join(format!("{name}.npy")))?);
        let images = evaluated.images.len();
        // A weight of 0 is plain CLIP.
        let all = transforms.iter().chain(std::iter::repeat(&ExactTransform::RAW)).take(images);
        write_npy(&mut file, images, all)?;
        file.flush()?;
    }
    Ok(())
}

/// Writes an array of shape (`rows`, 2) in version 1 of NumPy's format.
fn write_npy<'a>(
    file: &mut impl Write,
    rows: usize,
    transforms: impl Iterator<Item = &'a ExactTransform>,
) -> io::Result<()> {
    let header = format!("{{'descr': '<f8', 'fortran_order': False, 'shape': ({rows}, 2), }}");
    // With the ten bytes before it and the line break at its end, a multiple of 64 bytes.
    let length = (header.len() + 11).next_multiple_of(64) - 10;
    file.write_all(b"\x93NUMPY\x01\x00")?;
    file.write_all(&(length as u16).to_le_bytes())?;
    file.write_all(format!("{header:<0$}\n", length - 1).as_bytes())?;
    for transform in transforms {
        file.write_all(&transform.alpha.to_le_bytes())?;
        file.write_all(&transform.beta.to_le_bytes())?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::evaluate::arrays::embeddings::Values;
    use crate::evaluate::arrays::npy::NpyHeader;

    #[test]
    fn what_is_written_can_be_read() {
        let transforms =
            [ExactTransform { alpha: 0.5, beta: -0.25 }, ExactTransform { alpha: 1.0, beta: 0.0 }];
        let mut file = Vec::new();
        write_npy(&mut file, 2, transforms.iter()).unwrap();
        assert_eq!((file.len() - 32) % 64, 0);
        let mut reader = file.as_slice();
        let header = NpyHeader::read(&mut reader).unwrap();
        assert_eq!(header.shape, [2, 2]);
        let values = header.read_values(&mut reader).unwrap();
        assert_eq!(values, Values::F64(vec![0.5, -0.25, 1.0, 0.0]));
    }
}
