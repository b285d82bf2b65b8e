//! Reads embeddings and texts from columns of Parquet files.

use std::collections::BTreeMap;
use std::fs::File;
use std::path::Path;

use chrono::{DateTime, SecondsFormat};
use deltalake_core::arrow::array::{Array, ArrayRef, AsArray};
use deltalake_core::arrow::compute::cast;
use deltalake_core::arrow::datatypes::{
    DataType, Float16Type, Float32Type, Float64Type, Int64Type, TimeUnit, TimestampMicrosecondType,
    UInt64Type,
};
use deltalake_core::parquet::arrow::ProjectionMask;
use deltalake_core::parquet::arrow::arrow_reader::ParquetRecordBatchReaderBuilder;
use serde_json::Value;

use super::embeddings::{EmbeddingArray, MAX_VALUES, RowFault, Values};
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
    let mut lists = ListColumn::default();
    read_column(reader, column, &mut |batch| lists.append(batch)).map_err(refuse)?;
    let values = lists.values.unwrap_or(Values::F32(Vec::new()));
    EmbeddingArray::with_faults(name, values, [lists.rows, lists.dimension], lists.faults)
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

/// Reads all columns that hold one text, number, truth value or time per row, as JSON. Times are written as
/// RFC 3339. Returns the number of rows, and the columns by name.
pub fn read_value_columns(
    path: &Path,
) -> Result<(usize, BTreeMap<String, Vec<Value>>), ArrayError> {
    let refuse = |reason: String| ArrayError::new(path.display().to_string(), reason);
    let reader = open(path).map_err(refuse)?;
    let rows = usize::try_from(reader.metadata().file_metadata().num_rows()).unwrap_or_default();
    let fields = reader.schema().fields().clone();
    drop(reader);
    let mut columns = BTreeMap::new();
    for field in fields.iter().filter(|field| json_type(field.data_type()).is_some()) {
        let mut values = Vec::with_capacity(rows.min(MAX_VALUES));
        read_column(open(path).map_err(refuse)?, field.name(), &mut |batch| {
            append_json(batch, &mut values)
        })
        .map_err(refuse)?;
        columns.insert(field.name().clone(), values);
    }
    Ok((rows, columns))
}

/// Returns the type to which a column of single values is converted before it becomes JSON; `None` if it does
/// not hold single values.
fn json_type(data_type: &DataType) -> Option<DataType> {
    match data_type {
        DataType::Boolean => Some(DataType::Boolean),
        DataType::Utf8 | DataType::LargeUtf8 | DataType::Utf8View => Some(DataType::Utf8),
        DataType::Timestamp(..) | DataType::Date32 | DataType::Date64 => {
            Some(DataType::Timestamp(TimeUnit::Microsecond, Some("+00:00".into())))
        }
        DataType::Dictionary(_, values) => json_type(values),
        _ if data_type.is_unsigned_integer() => Some(DataType::UInt64),
        _ if data_type.is_signed_integer() => Some(DataType::Int64),
        _ if is_float(data_type) => Some(DataType::Float64),
        _ => None,
    }
}

fn append_json(batch: &ArrayRef, values: &mut Vec<Value>) -> Result<(), String> {
    let Some(data_type) = json_type(batch.data_type()) else { return Ok(()) };
    let batch = cast(batch, &data_type).map_err(|error| error.to_string())?;
    let time = |micros: i64| {
        let time = DateTime::from_timestamp_micros(micros)?;
        Some(time.to_rfc3339_opts(SecondsFormat::Micros, true))
    };
    match data_type {
        DataType::Boolean => values.extend(batch.as_boolean().iter().map(Value::from)),
        DataType::UInt64 => {
            values.extend(batch.as_primitive::<UInt64Type>().iter().map(Value::from));
        }
        DataType::Int64 => values.extend(batch.as_primitive::<Int64Type>().iter().map(Value::from)),
        DataType::Float64 => {
            values.extend(batch.as_primitive::<Float64Type>().iter().map(Value::from));
        }
        DataType::Timestamp(..) => {
            let times = batch.as_primitive::<TimestampMicrosecondType>();
            values.extend(times.iter().map(|micros| Value::from(micros.and_then(time))));
        }
        _ => values.extend(batch.as_string::<i32>().iter().map(Value::from)),
    }
    Ok(())
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

/// The lists of a column. Rows that are null, or not as long as the first one, become zeros.
#[derive(Default)]
struct ListColumn {
    values: Option<Values>,
    rows: usize,
    /// Length of the first list; 0 before it.
    dimension: usize,
    faults: Vec<RowFault>,
}

impl ListColumn {
    /// Appends the lists of a batch.
    fn append(&mut self, batch: &ArrayRef) -> Result<(), String> {
        for i in 0..batch.len() {
            let row = self.rows;
            self.rows += 1;
            if row.saturating_add(1).saturating_mul(self.dimension) > MAX_VALUES {
                return Err(format!("row {row}: more than {MAX_VALUES} values; take a sample"));
            }
            match self.read_list(batch, i) {
                Ok(list) => match &mut self.values {
                    // All lists of a column have the same type.
                    Some(values) => _ = values.append(list),
                    None => {
                        let mut values = list.same_type();
                        values.append_zeros(row * self.dimension);
                        values.append(list);
                        self.values = Some(values);
                    }
                },
                Err(reason) => {
                    self.faults.push(RowFault { row, reason: format!("{reason}; remove the row") });
                    if let Some(values) = &mut self.values {
                        values.append_zeros(self.dimension);
                    }
                }
            }
        }
        Ok(())
    }

    /// Returns the list at `i` of a batch, which is as long as the first one.
    fn read_list(&mut self, batch: &ArrayRef, i: usize) -> Result<Values, String> {
        if batch.is_null(i) {
            return Err("is null".into());
        }
        let list = match batch.data_type() {
            DataType::List(_) => batch.as_list::<i32>().value(i),
            DataType::LargeList(_) => batch.as_list::<i64>().value(i),
            _ => batch.as_fixed_size_list().value(i),
        };
        if list.is_empty() {
            return Err("is empty".into());
        }
        if self.dimension == 0 {
            self.dimension = list.len();
        }
        if list.len() != self.dimension {
            return Err(format!("has {} values, not {}", list.len(), self.dimension));
        }
        if list.null_count() > 0 {
            return Err("a value is null".into());
        }
        Ok(match list.data_type() {
            DataType::Float16 => {
                Values::from_f16(list.as_primitive::<Float16Type>().values().iter().copied())
            }
            DataType::Float32 => Values::F32(list.as_primitive::<Float32Type>().values().to_vec()),
            _ => Values::F64(list.as_primitive::<Float64Type>().values().to_vec()),
        })
    }
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
            (Some(vec![Some(f32::NAN), Some(1.0)]), "row 1: column 0: NaN"),
        ] {
            write(&path, vec![("e", list(&[good.clone(), bad]))]);
            let array = read_embeddings("a", &path, None).unwrap();
            assert_eq!(array.faults().len(), 1);
            let error = array.require_sound().unwrap_err().to_string();
            assert!(error.contains(reason), "{error}");
        }
        let rows = [None, Some(vec![Some(3.0), Some(4.0)]), Some(vec![]), good];
        write(&path, vec![("e", list(&rows))]);
        let array = read_embeddings("a", &path, None).unwrap();
        assert_eq!(array.faults().iter().map(|fault| fault.row).collect::<Vec<_>>(), [0, 2]);
        assert_eq!((array.rows(), array.unit_row(1)), (4, vec![0.600_000_000_000_000_1, 0.8]));
        assert_eq!(array.count_not_unit(), 2);
        write(&path, vec![("e", list(&[]))]);
        assert!(read_embeddings("a", &path, None).unwrap_err().to_string().contains("(0, 0)"));
        std::fs::write(&path, "text").unwrap();
        let error = read_embeddings("a", &path, None).unwrap_err().to_string();
        assert!(error.contains("not a Parquet file"), "{error}");
    }
}
