//! Columns with one value per embedding: ids, addresses, versions and attributes.

use std::collections::BTreeMap;
use std::path::PathBuf;

use serde_json::{Map, Value};

use crate::evaluate::{describe_without_position, detect_delimiter};
use crate::record::arrays::{ArrayError, read_value_columns};

/// Lines that an error lists at most.
const MAX_LISTED_LINES: usize = 20;
/// Columns by which the separator of a CSV file is recognised.
const USUAL_COLUMNS: [&str; 7] =
    ["image_id", "id", "uri", "url", "sequence", "event_time", "image_path"];
/// Field of an event whose fields are columns, too.
const ATTRIBUTES_FIELD: &str = "attributes";

/// Columns by name. A value that is missing is null.
#[derive(Debug, Clone)]
pub struct Columns {
    /// The file, as errors name it.
    pub name: String,
    /// Number of values of each column.
    pub rows: usize,
    values: BTreeMap<String, Vec<Value>>,
}

/// The id of each embedding.
#[derive(Debug, Clone)]
pub struct IdColumn {
    /// File and column, as errors name them.
    pub name: String,
    /// One id per embedding: a text or a whole number.
    pub values: Vec<Value>,
}

impl Columns {
    /// Reads Parquet files with the same columns, one after the other. Columns of lists and structures are left
    /// out.
    pub fn from_parquet(name: &str, files: &[PathBuf]) -> Result<Self, ArrayError> {
        let mut all: Option<Self> = None;
        for file in files {
            let (rows, values) = read_value_columns(file)?;
            match &mut all {
                None => all = Some(Self { name: name.to_owned(), rows, values }),
                Some(all) => {
                    // What only some files have is no column of all rows.
                    all.values.retain(|column, _| values.contains_key(column));
                    for (column, more) in values {
                        if let Some(known) = all.values.get_mut(&column) {
                            known.extend(more);
                        }
                    }
                    all.rows += rows;
                }
            }
        }
        all.ok_or_else(|| ArrayError::new(name, "has no Parquet files"))
    }

    /// Parses CSV or TSV with a header; an empty field is null.
    pub fn from_csv(name: &str, text: &str) -> Result<Self, ArrayError> {
        let refuse = |reason: String| ArrayError::new(name, reason);
        // The reader counts a line that ends in both characters late.
        let text = text.replace("\r\n", "\n");
        let mut reader = csv::ReaderBuilder::new()
            .delimiter(detect_delimiter(text.as_bytes(), &USUAL_COLUMNS))
            .flexible(true)
            .from_reader(text.as_bytes());
        let header = reader.headers().map_err(|error| refuse(error.to_string()))?;
        let header: Vec<String> = header.iter().map(|column| column.trim().to_owned()).collect();
        if let Some(i) = (1..header.len()).find(|i| header[..*i].contains(&header[*i])) {
            return Err(refuse(format!("has two columns {:?}; rename one of them", header[i])));
        }
        let mut columns: Vec<Vec<Value>> = vec![Vec::new(); header.len()];
        let mut problems = Problems::default();
        for record in reader.records() {
            let record = record.map_err(|error| refuse(error.to_string()))?;
            if record.len() != header.len() {
                let line = record.position().map_or(0, csv::Position::line);
                let reason = format!("has {} fields, not {}", record.len(), header.len());
                problems.add(line, &reason);
                continue;
            }
            for (column, field) in columns.iter_mut().zip(&record) {
                column.push(if field.is_empty() { Value::Null } else { field.into() });
            }
        }
        problems.into_result(name)?;
        let rows = columns.first().map_or(0, Vec::len);
        Ok(Self { name: name.to_owned(), rows, values: header.into_iter().zip(columns).collect() })
    }

    /// Parses JSON lines: an object per row, such as an event. The fields of `attributes` are columns, too.
    pub fn from_json_lines(name: &str, text: &str) -> Result<Self, ArrayError> {
        let mut columns: BTreeMap<String, Vec<Value>> = BTreeMap::new();
        let mut rows = 0;
        let mut problems = Problems::default();
        for (line, text) in (1u64..).zip(text.lines()).filter(|(_, text)| !text.trim().is_empty()) {
            let mut object: Map<String, Value> = match serde_json::from_str(text) {
                Ok(object) => object,
                Err(error) => {
                    problems.add(line, &describe_without_position(&error));
                    continue;
                }
            };
            if let Some(Value::Object(attributes)) = object.remove(ATTRIBUTES_FIELD) {
                for (attribute, value) in attributes {
                    object.entry(attribute).or_insert(value);
                }
            }
            for (column, value) in object {
                let column = columns.entry(column).or_default();
                column.resize(rows, Value::Null);
                column.push(value);
            }
            rows += 1;
        }
        problems.into_result(name)?;
        for column in columns.values_mut() {
            column.resize(rows, Value::Null);
        }
        Ok(Self { name: name.to_owned(), rows, values: columns })
    }

    /// Returns the values of a column; `None` if there is no such column.
    pub fn column(&self, column: &str) -> Option<&[Value]> {
        self.values.get(column).map(Vec::as_slice)
    }

    /// Iterates over the names of the columns.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.values.keys().map(String::as_str)
    }

    /// Returns the ids in a column; an error that lists the columns if there is no such column.
    pub fn ids(&self, column: &str) -> Result<IdColumn, ArrayError> {
        let values = self.column(column).ok_or_else(|| self.missing(column))?;
        Ok(IdColumn { name: format!("{}: {column}", self.name), values: values.to_vec() })
    }

    /// Returns the error of a column that is not there.
    pub fn missing(&self, column: &str) -> ArrayError {
        let columns: Vec<&str> = self.names().collect();
        let columns = if columns.is_empty() { "none".into() } else { columns.join(", ") };
        ArrayError::new(
            &*self.name,
            format!("has no column {column:?} of single values; it has {columns}"),
        )
    }
}

impl IdColumn {
    /// Parses one id per line.
    pub fn from_lines(name: &str, text: &str) -> Self {
        let values = text.lines().map(|line| Value::from(line.trim())).collect();
        Self { name: name.to_owned(), values }
    }
}

/// What is wrong with lines of a file.
#[derive(Default)]
struct Problems {
    listed: Vec<String>,
    count: usize,
}

impl Problems {
    fn add(&mut self, line: u64, reason: &str) {
        self.count += 1;
        if self.listed.len() < MAX_LISTED_LINES {
            self.listed.push(format!("line {line}: {reason}"));
        }
    }

    fn into_result(self, name: &str) -> Result<(), ArrayError> {
        if self.count == 0 {
            return Ok(());
        }
        let mut text = self.listed.join("\n  ");
        if self.count > self.listed.len() {
            let more = self.count - self.listed.len();
            text = format!("{text}\n  and {more} more lines");
        }
        Err(ArrayError::new(name, text))
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn columns_of_every_kind_of_file_are_the_same() {
        let csv =
            Columns::from_csv("a.csv", "image_id;price;title\r\na;7,5;x\r\nb;;y\r\n").unwrap();
        assert_eq!(csv.rows, 2);
        assert_eq!(csv.column("price").unwrap(), [json!("7,5"), Value::Null]);
        let lines = "{\"image_id\":\"a\",\"attributes\":{\"price\":7.5}}\n\n{\"image_id\":\"b\"}\n";
        let lines = Columns::from_json_lines("a.jsonl", lines).unwrap();
        assert_eq!(lines.column("price").unwrap(), [json!(7.5), Value::Null]);
        for columns in [csv, lines] {
            assert_eq!(columns.ids("image_id").unwrap().values, ["a", "b"]);
            let error = columns.ids("key").unwrap_err().to_string();
            assert!(
                error.contains("\"key\"") && error.contains("it has image_id, price"),
                "{error}"
            );
        }
        assert_eq!(IdColumn::from_lines("ids", "a \nb\r\n").values, ["a", "b"]);
    }

    #[test]
    fn all_wrong_lines_are_named_at_once() {
        let error = Columns::from_csv("a.csv", "a,b\n1\n1,2\n1,2,3\n").unwrap_err().to_string();
        assert!(
            error.contains("line 2: has 1 fields") && error.contains("line 4: has 3"),
            "{error}"
        );
        let error = Columns::from_csv("a.csv", "a,a\n").unwrap_err().to_string();
        assert!(error.contains("two columns \"a\""), "{error}");
        let lines = "[]\n".repeat(25) + "{\"a\":1}\n";
        let error = Columns::from_json_lines("a", &lines).unwrap_err().to_string();
        assert!(error.contains("line 20: ") && error.ends_with("and 5 more lines"), "{error}");
    }
}
