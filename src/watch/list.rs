//! Lists of addresses with attributes: CSV with a header, or JSON lines.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{self, Read as _};
use std::path::{Path, PathBuf};

use serde_json::{Map, Value};
use url::Url;

use super::folder::{picture_from_file, version_of_file};
use super::item::{FoundItem, FoundPicture, ItemVersion, SkipReason, image_id_from_key};
use crate::record::{AttributeType, AttributeTypes};

/// Names of the field that has the address.
const ADDRESS_FIELDS: [&str; 7] = ["uri", "url", "address", "path", "file", "image", "src"];
/// Names of the field that has the id; without one the address is the id.
const ID_FIELDS: [&str; 2] = ["image_id", "id"];
/// Fields of an image event that are no attributes.
const EVENT_FIELDS: [&str; 5] = ["attributes", "operation", "sequence", "event_time", "data"];
/// Largest list: it is read into memory.
const MAX_LIST_BYTES: u64 = 256 << 20;
/// Most attributes of one list: each is a column that the page offers as a filter.
const MAX_ATTRIBUTES: usize = 64;

/// The form of a list.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ListFormat {
    /// Comma-separated values with a header; `;` and tabs separate too.
    Csv,
    /// One JSON object per line.
    JsonLines,
}

impl ListFormat {
    /// Returns the form that the extension of a file says.
    pub fn from_path(path: &Path) -> Option<Self> {
        match path.extension()?.to_str()?.to_ascii_lowercase().as_str() {
            "csv" | "tsv" => Some(Self::Csv),
            "jsonl" | "ndjson" | "json" => Some(Self::JsonLines),
            _ => None,
        }
    }
}

/// A list, as it was read.
#[derive(Debug, Clone)]
pub struct AddressList {
    /// The folder that relative paths start from.
    folder: PathBuf,
    /// Name for messages.
    name: String,
    /// The lines with their numbers.
    lines: Vec<(u64, Result<ListLine, String>)>,
}

/// One address with its attributes.
#[derive(Debug, Clone, PartialEq)]
struct ListLine {
    address: String,
    image_id: Option<String>,
    attributes: BTreeMap<String, Value>,
}

impl AddressList {
    /// Reads a list. Fails if it is too large, is not text, or if no line has an address.
    pub fn read(path: &Path, format: ListFormat) -> io::Result<Self> {
        let invalid = |reason: String| io::Error::new(io::ErrorKind::InvalidData, reason);
        let mut text = String::new();
        let read = File::open(path)?.take(MAX_LIST_BYTES + 1).read_to_string(&mut text)?;
        if read as u64 > MAX_LIST_BYTES {
            return Err(invalid(format!(
                "has more than {} MiB, the largest list that is read; divide it",
                MAX_LIST_BYTES >> 20
            )));
        }
        let text = text.trim_start_matches('\u{feff}');
        let lines = match format {
            ListFormat::Csv => parse_csv(text).map_err(invalid)?,
            ListFormat::JsonLines => parse_json_lines(text),
        };
        if !lines.iter().any(|(_, line)| line.is_ok()) {
            let first =
                lines.iter().find_map(|(number, line)| Some((number, line.as_ref().err()?)));
            let first =
                first.map_or_else(String::new, |(n, reason)| format!(" (line {n}: {reason})"));
            return Err(invalid(format!(
                "no line has an address of a picture{first}; name the field with the address {}",
                ADDRESS_FIELDS[..4].join(", ")
            )));
        }
        let folder = path.parent().unwrap_or(path).to_owned();
        Ok(Self { folder, name: path.display().to_string(), lines })
    }

    /// Returns the type of each attribute: the one that all of its values have, otherwise text.
    pub fn infer_attribute_types(&self) -> AttributeTypes {
        let mut types = AttributeTypes::new();
        for (_, line) in &self.lines {
            let attributes = line.iter().flat_map(|line| &line.attributes);
            for (name, value) in attributes {
                let Some(found) = type_of_value(value) else { continue };
                if let Some(known) = types.get_mut(name) {
                    *known = common_type(*known, found);
                } else if types.len() < MAX_ATTRIBUTES {
                    types.insert(name.clone(), found);
                }
            }
        }
        types
    }

    /// Returns the folders of the local files that the list names: its own folder, or the root of the
    /// file system if some are elsewhere.
    pub fn local_roots(&self) -> Vec<PathBuf> {
        let own = self.folder.canonicalize().unwrap_or_else(|_| self.folder.clone());
        let paths =
            self.lines.iter().filter_map(|(_, line)| self.local_path(&line.as_ref().ok()?.address));
        let is_elsewhere =
            |path: PathBuf| path.canonicalize().is_ok_and(|path| !path.starts_with(&own));
        if paths.into_iter().any(is_elsewhere) { vec![PathBuf::from("/")] } else { vec![own] }
    }

    /// Calls `on_item` for every line, until it returns false. `types` are the declared attributes.
    pub fn list(&self, types: &AttributeTypes, on_item: &mut dyn FnMut(FoundItem) -> bool) {
        for (number, line) in &self.lines {
            let item = match line {
                Ok(line) => {
                    FoundItem { path: line.address.clone(), content: self.check_line(line, types) }
                }
                Err(reason) => FoundItem {
                    path: format!("{}:{number}", self.name),
                    content: Err(SkipReason::failure("a line without a picture", reason)),
                },
            };
            if !on_item(item) {
                return;
            }
        }
    }

    fn check_line(
        &self,
        line: &ListLine,
        types: &AttributeTypes,
    ) -> Result<FoundPicture, SkipReason> {
        let id = line.image_id.as_ref().unwrap_or(&line.address);
        let image_id = image_id_from_key("", id)?;
        let attributes = typed_attributes(&line.attributes, types)?;
        let Some(path) = self.local_path(&line.address) else {
            Url::parse(&line.address).map_err(|error| {
                SkipReason::failure(
                    "an address that may not be read",
                    format!("is no address: {error}"),
                )
            })?;
            let (uri, version) = (line.address.clone(), ItemVersion::default());
            return Ok(FoundPicture { image_id, uri, version, attributes });
        };
        let metadata = fs::metadata(&path).map_err(|error| match error.kind() {
            io::ErrorKind::NotFound => SkipReason::failure(
                "not there when it was to be read",
                format!("there is no file {}", path.display()),
            ),
            _ => super::file_kind::unreadable_file(&error),
        })?;
        if !metadata.is_file() {
            return Err(SkipReason::failure("cannot be read", "is no file"));
        }
        let picture = picture_from_file(&path, &metadata, "", Path::new("picture"))?;
        Ok(FoundPicture { image_id, attributes, version: version_of_file(&metadata), ..picture })
    }

    /// Returns the path of a local file; `None` for any other address.
    fn local_path(&self, address: &str) -> Option<PathBuf> {
        if address.starts_with("file:") {
            return Url::parse(address).ok()?.to_file_path().ok();
        }
        let is_url = address.contains("://") || address.starts_with("data:");
        (!is_url).then(|| self.folder.join(address))
    }
}

fn is_one_of(name: &str, names: &[&str]) -> bool {
    names.iter().any(|known| name.trim().eq_ignore_ascii_case(known))
}

/// Finds the field whose name comes first in `names`.
fn find_field<'a>(
    fields: &(impl Iterator<Item = &'a str> + Clone),
    names: &[&str],
) -> Option<usize> {
    names.iter().find_map(|name| fields.clone().position(|f| f.trim().eq_ignore_ascii_case(name)))
}

/// The number of a line, and what it says or why it cannot be read.
type NumberedLine = (u64, Result<ListLine, String>);

fn parse_csv(text: &str) -> Result<Vec<NumberedLine>, String> {
    let header = text.lines().next().unwrap_or_default();
    let delimiter = [b',', b';', b'\t'].into_iter().find(|d| header.contains(char::from(*d)));
    let mut reader = csv::ReaderBuilder::new()
        .delimiter(delimiter.unwrap_or(b','))
        .flexible(true)
        .from_reader(text.as_bytes());
    let header = reader.headers().map_err(|e| e.to_string())?.clone();
    let address = find_field(&header.iter(), &ADDRESS_FIELDS).ok_or_else(|| {
        format!("the header has none of the columns {}", ADDRESS_FIELDS.join(", "))
    })?;
    let id = find_field(&header.iter(), &ID_FIELDS);
    let mut lines = Vec::new();
    for record in reader.records() {
        let record = match record {
            Ok(record) => record,
            Err(error) => {
                let number = error.position().map_or(0, csv::Position::line);
                lines.push((number, Err(error.to_string())));
                continue;
            }
        };
        let number = record.position().map_or(0, csv::Position::line);
        let field = |index: usize| record.get(index).map(str::trim).filter(|v| !v.is_empty());
        let Some(found) = field(address) else {
            lines.push((number, Err("has no address".to_owned())));
            continue;
        };
        let attributes = header.iter().enumerate().filter_map(|(index, name)| {
            let is_attribute = index != address && Some(index) != id && !name.trim().is_empty();
            let value = field(index).filter(|_| is_attribute)?;
            Some((name.trim().to_owned(), Value::String(value.to_owned())))
        });
        let line = ListLine {
            address: found.to_owned(),
            image_id: id.and_then(field).map(str::to_owned),
            attributes: attributes.collect(),
        };
        lines.push((number, Ok(line)));
    }
    Ok(lines)
}

fn parse_json_lines(text: &str) -> Vec<(u64, Result<ListLine, String>)> {
    let lines = text.lines().zip(1u64..).filter(|(line, _)| !line.trim().is_empty());
    lines.map(|(line, number)| (number, parse_json_line(line))).collect()
}

fn parse_json_line(line: &str) -> Result<ListLine, String> {
    let object: Map<String, Value> =
        serde_json::from_str(line).map_err(|e| format!("is no JSON object: {e}"))?;
    if object.get("operation").is_some_and(|operation| operation == "delete") {
        return Err("is a delete; a list names the pictures that exist".into());
    }
    let keys = || object.keys().map(String::as_str);
    let text_of = |names: &[&str]| {
        let index = find_field(&keys(), names)?;
        object.values().nth(index).and_then(|value| match value {
            Value::String(text) => Some(text.clone()),
            Value::Number(number) => Some(number.to_string()),
            _ => None,
        })
    };
    let address = text_of(&ADDRESS_FIELDS).filter(|address| !address.is_empty());
    let address =
        address.ok_or_else(|| format!("has none of the fields {}", ADDRESS_FIELDS.join(", ")))?;
    let attributes = match object.get("attributes") {
        Some(Value::Object(attributes)) => attributes.clone(),
        _ => object
            .iter()
            .filter(|(name, _)| {
                !is_one_of(name, &ADDRESS_FIELDS)
                    && !is_one_of(name, &ID_FIELDS)
                    && !is_one_of(name, &EVENT_FIELDS)
            })
            .map(|(name, value)| (name.clone(), value.clone()))
            .collect(),
    };
    let has_type = |(_, value): &(String, Value)| type_of_value(value).is_some();
    let attributes = attributes.into_iter().filter(has_type).collect();
    Ok(ListLine { address, image_id: text_of(&ID_FIELDS), attributes })
}

/// Returns the type of a value; `None` if it is null, or a list or object, which is not stored. Texts are
/// read as numbers and booleans, because CSV has no other.
fn type_of_value(value: &Value) -> Option<AttributeType> {
    match value {
        Value::Bool(_) => Some(AttributeType::Boolean),
        Value::Number(number) if number.is_i64() || number.is_u64() => Some(AttributeType::Integer),
        Value::Number(_) => Some(AttributeType::Number),
        Value::String(text) if text.parse::<i64>().is_ok() => Some(AttributeType::Integer),
        Value::String(text) if text.parse::<f64>().is_ok_and(f64::is_finite) => {
            Some(AttributeType::Number)
        }
        Value::String(text) if text == "true" || text == "false" => Some(AttributeType::Boolean),
        Value::String(_) => Some(AttributeType::Text),
        Value::Null | Value::Array(_) | Value::Object(_) => None,
    }
}

fn common_type(a: AttributeType, b: AttributeType) -> AttributeType {
    use AttributeType::{Integer, Number, Text};
    match (a, b) {
        (a, b) if a == b => a,
        (Integer, Number) | (Number, Integer) => Number,
        _ => Text,
    }
}

/// Converts the attributes to their declared types; leaves out those that are not declared.
fn typed_attributes(
    attributes: &BTreeMap<String, Value>,
    types: &AttributeTypes,
) -> Result<BTreeMap<String, Value>, SkipReason> {
    let declared =
        attributes.iter().filter_map(|(name, value)| Some((name, value, *types.get(name)?)));
    declared
        .map(|(name, value, attribute_type)| {
            let typed = convert_value(value, attribute_type).ok_or_else(|| {
                let expected = attribute_type.description();
                let reason = format!(
                    "{name} is {value}, not {expected} as it was when the list was first read; start again to read the types again"
                );
                SkipReason::failure("an attribute of another type", reason)
            })?;
            Ok((name.clone(), typed))
        })
        .collect()
}

fn convert_value(value: &Value, attribute_type: AttributeType) -> Option<Value> {
    match (attribute_type, value) {
        (AttributeType::Text | AttributeType::Time, Value::String(_)) => Some(value.clone()),
        (AttributeType::Text, other) => Some(Value::String(other.to_string())),
        (AttributeType::Integer | AttributeType::Number | AttributeType::Boolean, value) => {
            let parsed = match value {
                Value::String(text) => parse_scalar(text)?,
                other => other.clone(),
            };
            let fits = match attribute_type {
                AttributeType::Integer => parsed.is_i64() || parsed.is_u64(),
                AttributeType::Number => parsed.is_number(),
                _ => parsed.is_boolean(),
            };
            fits.then_some(parsed)
        }
        (AttributeType::Time, _) => None,
    }
}

/// Reads a number or a boolean; unlike JSON, also `007`, `+1` and `.5`.
fn parse_scalar(text: &str) -> Option<Value> {
    if let Ok(integer) = text.parse::<i64>() {
        return Some(integer.into());
    }
    if let Ok(boolean) = text.parse::<bool>() {
        return Some(boolean.into());
    }
    serde_json::Number::from_f64(text.parse().ok()?).map(Value::Number)
}
