//! Writes α and β of every image, for whoever ranks by a vector search of their own.

use std::fs::File;
use std::io::{self, BufWriter, Write};
use std::path::Path;

use super::pilot::ArrayEvaluation;
use crate::balance::normalise::{ExactTransform, Normaliser};
use crate::record::arrays::write_npy;

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
        write_npy(&mut file, [images, 2], all.flat_map(|t| [t.alpha, t.beta]))?;
        file.flush()?;
    }
    Ok(())
}
