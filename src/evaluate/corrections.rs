//! Writes α and β of every image under some configurations, for whoever keeps the images in an index of their own
//! and computes the balanced score there.

use std::fs::Permissions;
use std::io::{self, BufWriter, Write};
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::sync::Arc;

use deltalake_core::arrow::array::{ArrayRef, Float32Array, RecordBatch, StringArray};
use deltalake_core::parquet::arrow::ArrowWriter;

use crate::balance::normalise::AffineTransform;
use crate::record::arrays::write_npy;

/// The kinds of files that corrections are written to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum CorrectionFormat {
    /// Columns `image_id`, and α and β of each configuration.
    Parquet,
    /// The same columns.
    Csv,
    /// An array of shape (images, 2 · configurations) without the ids.
    Npy,
}

impl CorrectionFormat {
    /// Returns the format that the extension of a file names.
    pub fn from_path(path: &Path) -> Option<Self> {
        let extension = path.extension()?.to_str()?.to_ascii_lowercase();
        match extension.as_str() {
            "parquet" => Some(Self::Parquet),
            "csv" => Some(Self::Csv),
            "npy" => Some(Self::Npy),
            _ => None,
        }
    }
}

/// α and β of images under some configurations.
#[derive(Debug, Default)]
pub struct Corrections {
    /// Ids of the images, in the order of the rows.
    pub image_ids: Vec<String>,
    /// Name of each configuration, with α and β of each image; `None` if the catalogue does not have it.
    pub configurations: Vec<(String, Vec<Option<AffineTransform>>)>,
}

impl Corrections {
    /// Returns the names of the columns of numbers: `alpha` and `beta`, followed by the name of the configuration
    /// if there are several.
    pub fn columns(&self) -> Vec<String> {
        let is_legal = |c: char| c.is_alphanumeric() || c == '_';
        let suffix = |name: &str| match self.configurations.len() {
            1 => String::new(),
            _ => format!("_{}", name.replace(|c| !is_legal(c), "_")),
        };
        let columns = |(name, _): &(String, _)| {
            ["alpha", "beta"].map(|number| format!("{number}{}", suffix(name)))
        };
        self.configurations.iter().flat_map(columns).collect()
    }

    /// Writes the corrections into a file, which appears only once it is complete.
    pub fn write(&self, path: &Path, format: CorrectionFormat) -> io::Result<()> {
        let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty());
        // With the permissions of any new file; by default only its owner could read it.
        let mut file = tempfile::Builder::new()
            .permissions(Permissions::from_mode(0o666))
            .tempfile_in(folder.unwrap_or(Path::new(".")))?;
        match format {
            CorrectionFormat::Parquet => self.write_parquet(file.as_file_mut())?,
            CorrectionFormat::Csv => self.write_csv(file.as_file_mut())?,
            CorrectionFormat::Npy => self.write_npy(file.as_file_mut())?,
        }
        file.persist(path).map_err(|error| error.error)?;
        Ok(())
    }

    /// Returns the columns of numbers, in the order of [`Self::columns`].
    fn numbers(&self) -> impl Iterator<Item = Vec<Option<f32>>> {
        self.configurations.iter().flat_map(|(_, affines)| {
            let numbers = |number: fn(&AffineTransform) -> f32| {
                affines.iter().map(|affine| affine.as_ref().map(number)).collect()
            };
            [numbers(|affine| affine.alpha), numbers(|affine| affine.beta)]
        })
    }

    fn write_parquet(&self, file: impl Write + Send) -> io::Result<()> {
        let ids: ArrayRef = Arc::new(StringArray::from_iter_values(&self.image_ids));
        let mut columns = vec![("image_id".to_owned(), ids, false)];
        for (name, numbers) in self.columns().into_iter().zip(self.numbers()) {
            let numbers: ArrayRef = Arc::new(Float32Array::from(numbers));
            columns.push((name, numbers, true));
        }
        let batch = RecordBatch::try_from_iter_with_nullable(columns).map_err(io::Error::other)?;
        let mut writer =
            ArrowWriter::try_new(file, batch.schema(), None).map_err(io::Error::other)?;
        writer.write(&batch).map_err(io::Error::other)?;
        writer.close().map_err(io::Error::other)?;
        Ok(())
    }

    fn write_csv(&self, file: impl Write) -> io::Result<()> {
        let mut writer = csv::Writer::from_writer(file);
        let mut header = vec!["image_id".to_owned()];
        header.extend(self.columns());
        writer.write_record(&header)?;
        let columns: Vec<Vec<Option<f32>>> = self.numbers().collect();
        for (row, id) in self.image_ids.iter().enumerate() {
            let number = |column: &Vec<Option<f32>>| {
                column[row].map_or_else(String::new, |number| number.to_string())
            };
            writer.write_record(std::iter::once(id.clone()).chain(columns.iter().map(number)))?;
        }
        writer.flush()
    }

    fn write_npy(&self, file: impl Write) -> io::Result<()> {
        let columns: Vec<Vec<Option<f32>>> = self.numbers().collect();
        let number = |value: Option<f32>| value.map_or(f64::NAN, f64::from);
        let columns_ref = &columns;
        let values = (0..self.image_ids.len())
            .flat_map(|row| columns_ref.iter().map(move |column| number(column[row])));
        let mut file = BufWriter::new(file);
        write_npy(&mut file, [self.image_ids.len(), columns.len()], values)?;
        file.flush()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::record::arrays::{ArrayRole, read_array, read_value_columns};

    fn corrections(names: &[&str]) -> Corrections {
        let affines = vec![Some(AffineTransform { alpha: 0.75, beta: -0.125 }), None];
        Corrections {
            image_ids: vec!["a,\"b\"".into(), "gone".into()],
            configurations: names.iter().map(|name| ((*name).into(), affines.clone())).collect(),
        }
    }

    #[test]
    fn every_format_has_the_same_numbers_and_what_is_missing_is_null() {
        let folder = tempfile::tempdir().unwrap();
        let path = |extension: &str| folder.path().join(format!("c.{extension}"));
        let both = corrections(&["live", "nnn,weight=1"]);
        for format in ["csv", "parquet", "npy"] {
            let format_of_path = CorrectionFormat::from_path(&path(format)).unwrap();
            both.write(&path(format), format_of_path).unwrap();
        }
        let csv = std::fs::read_to_string(path("csv")).unwrap();
        let header = "image_id,alpha_live,beta_live,alpha_nnn_weight_1,beta_nnn_weight_1\n";
        let rows = "\"a,\"\"b\"\"\",0.75,-0.125,0.75,-0.125\ngone,,,,\n";
        assert_eq!(csv, format!("{header}{rows}"));
        let (count, columns) = read_value_columns(&path("parquet")).unwrap();
        assert_eq!((count, columns.len()), (2, 5));
        assert_eq!(columns["beta_live"], [serde_json::json!(-0.125), serde_json::Value::Null]);
        let error = read_array(path("npy").to_str().unwrap(), ArrayRole::Images).unwrap_err();
        assert!(error.to_string().contains("row 1: column 0: NaN"), "{error}");
        assert_eq!(corrections(&["live"]).columns(), ["alpha", "beta"]);
        assert_eq!(CorrectionFormat::from_path(Path::new("c.txt")), None);
        let left = std::fs::read_dir(folder.path()).unwrap().count();
        assert_eq!(left, 3, "no temporary file is left");
    }
}
