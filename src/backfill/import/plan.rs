//! Joins embeddings with ids, addresses, versions and attributes, and checks every row.

use std::collections::HashMap;

use chrono::{DateTime, TimeDelta, Utc};
use serde_json::Value;
use sha2::{Digest, Sha256};

use super::columns::{Columns, IdColumn};
use crate::ingest::source::canonical_attribute_text;
use crate::record::arrays::{ArrayError, EmbeddingArray, RowFault};
use crate::record::{
    AttributeType, AttributeTypes, Attributes, ImageId, SequenceKey, VersionOrdering, to_hex,
    whole_number,
};

/// The columns of the metadata from which an import reads.
#[derive(Debug, Clone, Default)]
pub struct ImportColumns {
    /// Column of addresses.
    pub uri: Option<String>,
    /// Column of versions; `None` gives all images the version of the import's start.
    pub sequence: Option<String>,
}

/// How the values of a catalogue are read.
#[derive(Debug, Clone)]
pub struct ImportRules<'a> {
    /// Number of values of the model's embeddings.
    pub dimension: usize,
    /// What orders the versions of an image.
    pub ordering: VersionOrdering,
    /// Declared attributes.
    pub attribute_types: &'a AttributeTypes,
    /// How far in the future a version may lie that is a time.
    pub max_clock_skew: TimeDelta,
    /// The time now.
    pub now: DateTime<Utc>,
}

/// What is stored of a row besides its embedding.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PlannedImage {
    /// Id of the image.
    pub image_id: ImageId,
    /// Address of the image.
    pub uri: Option<String>,
    /// Version of the image, and its time if it is one; `None` for the version of the import's start.
    pub version: Option<(SequenceKey, Option<DateTime<Utc>>)>,
    /// Declared attributes.
    pub attributes: Attributes,
}

/// Checked rows, ready to be stored.
#[derive(Debug)]
pub struct ImportPlan {
    /// The embeddings.
    pub images: EmbeddingArray,
    /// One entry per row; `None` for a row that cannot be stored.
    pub rows: Vec<Option<PlannedImage>>,
    /// Why rows cannot be stored, ascending.
    pub faults: Vec<RowFault>,
    /// Columns of the metadata that are not stored: they are no declared attributes.
    pub unused_columns: Vec<String>,
}

impl ImportPlan {
    /// Joins `images` with `ids` and `metadata`. Fails with one error per fault of a whole file; the faults of
    /// rows are in the plan.
    pub fn new(
        images: EmbeddingArray,
        ids: &IdColumn,
        metadata: Option<&Columns>,
        columns: &ImportColumns,
        rules: &ImportRules<'_>,
    ) -> Result<Self, Vec<ArrayError>> {
        let mut errors = Vec::new();
        if images.dimension() != rules.dimension {
            let reason = format!(
                "its embeddings have {} values, those of the model {}; import them with the checkpoint that computed them",
                images.dimension(),
                rules.dimension
            );
            errors.push(ArrayError::new(images.name(), reason));
        }
        let counts = [(&ids.name, ids.values.len(), "ids")].into_iter();
        for (name, count, what) in counts.chain(metadata.map(|m| (&m.name, m.rows, "rows"))) {
            if count != images.rows() {
                let reason =
                    format!("has {count} {what}, but there are {} embeddings", images.rows());
                errors.push(ArrayError::new(&**name, reason));
            }
        }
        let mut find = |column: &Option<String>| {
            let column = column.as_ref()?;
            let found = metadata
                .map(|metadata| metadata.column(column).ok_or_else(|| metadata.missing(column)));
            match found {
                Some(Ok(values)) => Some(values),
                Some(Err(error)) => {
                    errors.push(error);
                    None
                }
                None => {
                    let reason = format!("has no column {column:?}: give --metadata");
                    errors.push(ArrayError::new(images.name(), reason));
                    None
                }
            }
        };
        let (uris, versions) = (find(&columns.uri), find(&columns.sequence));
        if !errors.is_empty() {
            return Err(errors);
        }
        let reader = RowReader { ids, metadata, uris, versions, rules };
        let mut known: HashMap<ImageId, usize> = HashMap::with_capacity(images.rows());
        let mut array_faults = images.faults().iter().peekable();
        let (mut rows, mut faults) = (Vec::with_capacity(images.rows()), Vec::new());
        for row in 0..images.rows() {
            let mut problems = Vec::new();
            if let Some(fault) = array_faults.next_if(|fault| fault.row == row) {
                problems.push(format!("embedding: {}", fault.reason));
            }
            let image = reader.read(row, &mut problems);
            if let Some(image) = image.as_ref().filter(|_| problems.is_empty()) {
                match known.get(&image.image_id) {
                    Some(first) => problems.push(format!(
                        "image_id: {:?} is that of row {first}, too; an image has one embedding",
                        image.image_id.as_str()
                    )),
                    None => _ = known.insert(image.image_id.clone(), row),
                }
            }
            rows.push(image.filter(|_| problems.is_empty()));
            if !problems.is_empty() {
                faults.push(RowFault { row, reason: problems.join("; ") });
            }
        }
        let used = [columns.uri.as_deref(), columns.sequence.as_deref()];
        let unused_columns = metadata.map_or_else(Vec::new, |metadata| {
            let is_unused = |name: &&str| {
                !used.contains(&Some(*name))
                    && !rules.attribute_types.contains_key(*name)
                    && !ids.name.ends_with(&format!(": {name}"))
            };
            metadata.names().filter(is_unused).map(str::to_owned).collect()
        });
        Ok(Self { images, rows, faults, unused_columns })
    }

    /// Returns the number of rows that can be stored.
    pub fn storable_rows(&self) -> usize {
        self.rows.len() - self.faults.len()
    }

    /// Returns a hash of everything that is stored: the same import has the same, whatever files it comes from.
    pub fn fingerprint(&self) -> String {
        let mut hash = Sha256::new();
        hash.update(self.images.fingerprint());
        let mut add = |text: Option<&str>| {
            // The length separates texts; one that is missing differs from an empty one.
            hash.update(text.map_or(u64::MAX, |text| text.len() as u64).to_le_bytes());
            hash.update(text.unwrap_or_default());
        };
        for row in &self.rows {
            let Some(row) = row else {
                add(None);
                continue;
            };
            add(Some(row.image_id.as_str()));
            add(row.uri.as_deref());
            add(row.version.as_ref().map(|(sequence, _)| sequence.as_str()));
            for (name, text) in &row.attributes {
                add(Some(name));
                add(Some(text));
            }
        }
        to_hex(&hash.finalize())
    }
}

/// Reads what the columns say of a row.
struct RowReader<'a> {
    ids: &'a IdColumn,
    metadata: Option<&'a Columns>,
    uris: Option<&'a [Value]>,
    versions: Option<&'a [Value]>,
    rules: &'a ImportRules<'a>,
}

impl RowReader<'_> {
    /// Reads a row; adds what is wrong with it to `problems`. Returns `None` if its id is not valid.
    fn read(&self, row: usize, problems: &mut Vec<String>) -> Option<PlannedImage> {
        let image_id = match read_id(&self.ids.values[row]) {
            Ok(id) => Some(id),
            Err(problem) => {
                problems.push(problem);
                None
            }
        };
        let uri = match self.uris.map(|uris| &uris[row]) {
            None | Some(Value::Null) => None,
            Some(Value::String(uri)) => Some(uri.clone()),
            Some(other) => {
                problems.push(format!("uri: {other} is not a text"));
                None
            }
        };
        let version = self.versions.and_then(|versions| {
            read_version(&versions[row], self.rules).map_err(|problem| problems.push(problem)).ok()
        });
        let attributes = self.read_attributes(row, problems);
        Some(PlannedImage { image_id: image_id?, uri, version, attributes })
    }

    fn read_attributes(&self, row: usize, problems: &mut Vec<String>) -> Attributes {
        let mut attributes = Attributes::new();
        let Some(metadata) = self.metadata else { return attributes };
        for (name, attribute_type) in self.rules.attribute_types {
            let value = metadata.column(name).map_or(&Value::Null, |values| &values[row]);
            if value.is_null() {
                continue;
            }
            match attribute_text(*attribute_type, value) {
                Some(text) => _ = attributes.insert(name.clone(), text),
                None => problems.push(format!(
                    "{name}: {value} is not {}, as the attribute is declared",
                    attribute_type.description()
                )),
            }
        }
        attributes
    }
}

fn read_id(value: &Value) -> Result<ImageId, String> {
    let id = match value {
        Value::Null => return Err("image_id: is missing".into()),
        Value::String(id) => ImageId::new(id),
        Value::Number(number) if whole_number(number).is_some() => {
            ImageId::new(whole_number(number).unwrap_or_default().to_string())
        }
        other => return Err(format!("image_id: {other} is neither a text nor a whole number")),
    };
    id.map_err(|invalid| invalid.to_string())
}

fn read_version(
    value: &Value,
    rules: &ImportRules<'_>,
) -> Result<(SequenceKey, Option<DateTime<Utc>>), String> {
    if value.is_null() {
        return Err("sequence: is missing".into());
    }
    match rules.ordering {
        VersionOrdering::Sequence | VersionOrdering::Offset => {
            let number = match value {
                Value::Number(number) => whole_number(number).and_then(|n| u64::try_from(n).ok()),
                Value::String(text) => text.trim().parse().ok(),
                _ => None,
            };
            let number = number
                .ok_or_else(|| format!("sequence: {value} is not a whole number below 2^64"))?;
            Ok((SequenceKey::from_number(number), None))
        }
        VersionOrdering::EventTime => {
            let time = value.as_str().and_then(|text| DateTime::parse_from_rfc3339(text).ok());
            let time = time.ok_or_else(|| {
                format!("sequence: {value} is not {}", AttributeType::Time.description())
            })?;
            let time = time.to_utc();
            if time > rules.now + rules.max_clock_skew {
                return Err(format!("sequence: {time} lies in the future"));
            }
            Ok((SequenceKey::from_time(time).map_err(|e| e.to_string())?, Some(time)))
        }
        VersionOrdering::Sequencer => {
            let text = value.as_str().unwrap_or_default();
            Ok((SequenceKey::from_sequencer(text).map_err(|e| e.to_string())?, None))
        }
    }
}

/// Returns the text under which an attribute is stored. Columns of CSV are all texts, and tools write codes as
/// numbers: a text is read as what the attribute is declared as, and a number as a text.
fn attribute_text(attribute_type: AttributeType, value: &Value) -> Option<String> {
    let text = canonical_attribute_text(attribute_type, value);
    text.or_else(|| match (attribute_type, value) {
        (AttributeType::Text, Value::Number(number)) => Some(number.to_string()),
        (AttributeType::Text, Value::Bool(truth)) => Some(truth.to_string()),
        (AttributeType::Text, _) => None,
        (_, Value::String(text)) => {
            canonical_attribute_text(attribute_type, &serde_json::from_str(text.trim()).ok()?)
        }
        _ => None,
    })
}
