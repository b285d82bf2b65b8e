//! Reads embeddings and texts from columns of Parquet files.

use std::fs::File;
use std::path::Path;

use deltalake_core::arrow::array::{Array, ArrayRef, AsArray};
use deltalake_core::arrow::compute::cast;
use deltalake_core::arrow::datatypes::{DataType, Float16Type, Float32Type, Float64Type};
use deltalake_core::parquet::arrow::ProjectionMask;
use deltalake_core::parquet::arrow::arrow_reader::ParquetRecordBatchReaderBuilder;

use super::embeddings::{EmbeddingArray, MAX_VALUES, Values};
use super::error::ArrayError;

/// Reads the embeddings of a column of lists. Without the name of a column the file must have exactly one
/// such column. `name` is the file, and the column if it is given, for errors and reports.
pub(super) fn read_embeddings(
    name: &str,
    path: &Path,
    column: Option<&str>,
) -> Result<EmbeddingArray, ArrayError> {
    let refuse = |reason: String| ArrayError::new(name, reason);
    let reader = open(path).map_err(refuse)?;
    let is_embedding = |data_type: &DataType| list_element(data_type).is_some_and(is_float);
    let fields = reader.schema().fields().clone();
    let candidates: Vec<&str> = fields
        .iter()
        .filter(|field| is_embedding(field.data_type()))
        .map(|field| field.name().as_str())
        .collect();
    let column = match (column, candidates.as_slice()) {
        (Some(column), _) if candidates.contains(&column) => column,
        (None, [only]) => only,
        _ => {
            return Err(refuse(format!(
                "name one of its columns of lists of floats as FILE.parquet:COLUMN; it has {}",
                list_names(&candidates)
            )));
        }
    };
    let mut values: Option<Values> = None;
    let (mut rows, mut dimension) = (0, 0);
    read_column(reader, column, &mut |batch| {
        append_lists(batch, &mut values, &mut rows, &mut dimension)
    })
    .map_err(refuse)?;
    EmbeddingArray::new(name, values.unwrap_or(Values::F32(Vec::new())), [rows, dimension])
}

/// Reads a column of texts, one per row; `None` if the file has no such column of texts.
pub(super) fn read_texts(path: &Path, column: &str) -> Result<Option<Vec<String>>, ArrayError> {
    let refuse = |reason: String| ArrayError::new(path.display().to_string(), reason);
    let reader = open(path).map_err(refuse)?;
    let is_text = |data_type: &DataType| {
        matches!(data_type, DataType::Utf8 | DataType::LargeUtf8 | DataType::Utf8View)
    };
    let field = reader.schema().fields().iter().find(|field| field.name() == column);
    if !field.is_some_and(|field| is_text(field.data_type())) {
        return Ok(None);
    }
    let mut texts = Vec::new();
    read_column(reader, column, &mut |batch| {
        let batch = cast(batch, &DataType::Utf8).map_err(|error| error.to_string())?;
        let strings = batch.as_string::<i32>();
        texts.extend(strings.iter().map(|text| text.unwrap_or_default().to_owned()));
        Ok(())
    })
    .map_err(refuse)?;
    Ok(Some(texts))
}

fn open(path: &Path) -> Result<ParquetRecordBatchReaderBuilder<File>, String> {
    let file = File::open(path).map_err(|error| error.to_string())?;
    ParquetRecordBatchReaderBuilder::try_new(file)
        .map_err(|error| format!("is not a Parquet file: {error}"))
}

/// Calls `visit` with each batch of a column.
fn read_column(
    reader: ParquetRecordBatchReaderBuilder<File>,
    column: &str,
    visit: &mut dyn FnMut(&ArrayRef) -> Result<(), String>,
) -> Result<(), String> {
    let root = reader.schema().index_of(column).map_err(|error| error.to_string())?;
    let mask = ProjectionMask::roots(reader.parquet_schema(), [root]);
    let batches = reader.with_projection(mask).build().map_err(|error| error.to_string())?;
    for batch in batches {
        let batch = batch.map_err(|error| format!("column {column}: {error}"))?;
        visit(batch.column(0)).map_err(|reason| format!("column {column}, {reason}"))?;
    }
    Ok(())
}

fn list_element(data_type: &DataType) -> Option<&DataType> {
    match data_type {
        DataType::List(field) | DataType::LargeList(field) | DataType::FixedSizeList(field, _) => {
            Some(field.data_type())
        }
        _ => None,
    }
}

fn is_float(data_type: &DataType) -> bool {
    matches!(data_type, DataType::Float16 | DataType::Float32 | DataType::Float64)
}

/// Appends the lists of a batch. All of them must be as long as the first one.
fn append_lists(
    batch: &ArrayRef,
    values: &mut Option<Values>,
    rows: &mut usize,
    dimension: &mut usize,
) -> Result<(), String> {
    for i in 0..batch.len() {
        let row = *rows;
        if batch.is_null(i) {
            return Err(format!("row {row}: is null; remove the row"));
        }
        let list = match batch.data_type() {
            DataType::List(_) => batch.as_list::<i32>().value(i),
            DataType::LargeList(_) => batch.as_list::<i64>().value(i),
            _ => batch.as_fixed_size_list().value(i),
        };
        if row == 0 {
            *dimension = list.len();
        }
        if list.len() != *dimension {
            return Err(format!("row {row}: has {} values, not {dimension}", list.len()));
        }
        if list.null_count() > 0 {
            return Err(format!("row {row}: a value is null; remove the row"));
        }
        if (row + 1).saturating_mul(*dimension) > MAX_VALUES {
            return Err(format!("row {row}: more than {MAX_VALUES} values; take a sample"));
        }
        let list = match list.data_type() {
            DataType::Float16 => {
                Values::from_f16(list.as_primitive::<Float16Type>().values().iter().copied())
            }
            DataType::Float32 => Values::F32(list.as_primitive::<Float32Type>().values().to_vec()),
            _ => Values::F64(list.as_primitive::<Float64Type>().values().to_vec()),
        };
        match values {
            // All lists of a column have the same type.
            Some(values) => _ = values.append(list),
            None => *values = Some(list),
        }
        *rows += 1;
    }
    Ok(())
}

/// Returns names for an error, or `none`.
pub(super) fn list_names(names: &[&str]) -> String {
    if names.is_empty() { "none".to_owned() } else { names.join(", ") }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use deltalake_core::arrow::array::{
        FixedSizeListArray, Float64Array, LargeListArray, ListArray, RecordBatch, StringArray,
    };
    use deltalake_core::parquet::arrow::ArrowWriter;

    use super::*;

    fn write(path: &Path, columns: Vec<(&str, ArrayRef)>) {
        let batch = RecordBatch::try_from_iter(columns).unwrap();
        let mut writer =
            ArrowWriter::try_new(File::create(path).unwrap(), batch.schema(), None).unwrap();
        writer.write(&batch).unwrap();
        writer.close().unwrap();
    }

    fn list(rows: &[Option<Vec<Option<f32>>>]) -> ArrayRef {
        Arc::new(ListArray::from_iter_primitive::<Float32Type, _, _>(rows.to_vec()))
    }

    #[test]
    fn lists_of_every_kind_are_read_and_texts_too() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.parquet");
        let rows = [Some(vec![Some(1.0), Some(0.0)]), Some(vec![Some(0.0), Some(2.0)])];
        let doubles: Vec<Option<Vec<Option<f64>>>> =
            vec![Some(vec![Some(1.0), Some(0.0)]), Some(vec![Some(0.0), Some(2.0)])];
        let large = LargeListArray::from_iter_primitive::<Float64Type, _, _>(doubles.clone());
        let fixed = FixedSizeListArray::from_iter_primitive::<Float64Type, _, _>(doubles, 2);
        let captions = StringArray::from(vec![Some("a mug"), None]);
        write(
            &path,
            vec![
                ("list", list(&rows)),
                ("large", Arc::new(large)),
                ("fixed", Arc::new(fixed)),
                ("number", Arc::new(Float64Array::from(vec![1.0, 2.0]))),
                ("caption", Arc::new(captions)),
            ],
        );
        for column in ["list", "large", "fixed"] {
            let array = read_embeddings("a", &path, Some(column)).unwrap();
            assert_eq!((array.rows(), array.dimension()), (2, 2), "{column}");
            assert_eq!(array.unit_row(1), [0.0, 1.0], "{column}");
        }
        assert_eq!(read_texts(&path, "caption").unwrap().unwrap(), ["a mug", ""]);
        assert_eq!(read_texts(&path, "number").unwrap(), None);
        for column in [None, Some("number"), Some("missing")] {
            let error = read_embeddings("a", &path, column).unwrap_err().to_string();
            assert!(error.contains("list, large, fixed"), "{error}");
        }
    }

    #[test]
    fn rows_that_are_no_embeddings_are_refused_by_row() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.parquet");
        let good = Some(vec![Some(1.0), Some(0.5)]);
        for (bad, reason) in [
            (Some(vec![Some(1.0)]), "row 1: has 1 values, not 2"),
            (None, "row 1: is null"),
            (Some(vec![Some(1.0), None]), "row 1: a value is null"),
            (Some(vec![Some(f32::NAN), Some(1.0)]), "row 1, column 0: NaN"),
        ] {
            write(&path, vec![("e", list(&[good.clone(), bad]))]);
            let error = read_embeddings("a", &path, None).unwrap_err().to_string();
            assert!(error.contains(reason), "{error}");
        }
        write(&path, vec![("e", list(&[]))]);
        assert!(read_embeddings("a", &path, None).unwrap_err().to_string().contains("(0, 0)"));
        std::fs::write(&path, "text").unwrap();
        let error = read_embeddings("a", &path, None).unwrap_err().to_string();
        assert!(error.contains("not a Parquet file"), "{error}");
    }
}
