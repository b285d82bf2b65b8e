//! Makes attributes of metadata.

use std::fmt;
use std::ops::RangeInclusive;

use chrono::SecondsFormat;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::charset::MetadataCharset;
use super::date::PhotoDate;
use super::reconcile::read_metadata;
use crate::record::{AttributeType, AttributeTypes, Attributes, LIST_SEPARATOR};

/// Accepted values of `decode.metadata_max_bytes`: query workers hold all attributes in memory.
pub const METADATA_MAX_BYTES_RANGE: RangeInclusive<u64> = 16..=65_536;

/// A field of an image's metadata. The attribute that it becomes has the same name.
#[derive(
    Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize, JsonSchema,
)]
#[serde(rename_all = "snake_case")]
pub enum MetadataField {
    /// The title, or the headline.
    Title,
    /// What the image shows.
    Caption,
    /// Keywords, separated by semicolons.
    Keywords,
    /// Who made it; several are separated by semicolons.
    Creator,
    /// When it was taken.
    Date,
    /// Who owns the rights to it, or what they are.
    Rights,
}

impl MetadataField {
    /// Returns the name of the attribute.
    pub fn name(self) -> &'static str {
        match self {
            Self::Title => "title",
            Self::Caption => "caption",
            Self::Keywords => "keywords",
            Self::Creator => "creator",
            Self::Date => "date",
            Self::Rights => "rights",
        }
    }

    /// Returns the types that the attribute may be declared with.
    fn allowed_types(self) -> &'static [AttributeType] {
        match self {
            Self::Date => &[AttributeType::Time, AttributeType::Text],
            _ => &[AttributeType::Text],
        }
    }
}

impl fmt::Display for MetadataField {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// Returns one line per field of `decode.metadata` that is given twice or is not declared as an
/// attribute of a type that it can have.
pub fn check_declarations(fields: &[MetadataField], declared: &AttributeTypes) -> Vec<String> {
    let mut problems = Vec::new();
    for (index, field) in fields.iter().enumerate() {
        let types = field.allowed_types();
        let type_names: Vec<&str> = types.iter().map(|one| one.as_str()).collect();
        let type_names = type_names.join(" or ");
        match declared.get(field.name()) {
            _ if fields[..index].contains(field) => {
                problems.push(format!("metadata: {field} is given twice"));
            }
            None => problems.push(format!(
                "metadata: {field} is no declared attribute; add {field} = \"{}\" to [attributes]",
                types[0].as_str()
            )),
            Some(declared) if !types.contains(declared) => problems.push(format!(
                "metadata: {field} is declared as {}; from metadata, it can be {type_names}",
                declared.as_str()
            )),
            Some(_) => {}
        }
    }
    problems
}

/// Reads the metadata of an encoded image; returns those of `fields` that it has and that are declared,
/// each with at most `max_bytes` bytes.
pub fn metadata_attributes(
    bytes: &[u8],
    fields: &[MetadataField],
    declared: &AttributeTypes,
    charset: MetadataCharset,
    max_bytes: usize,
) -> Attributes {
    if fields.is_empty() {
        return Attributes::new();
    }
    let metadata = read_metadata(bytes, charset);
    let value = |field: MetadataField| match (field, declared.get(field.name())?) {
        (MetadataField::Title, AttributeType::Text) => {
            cut_text(metadata.title.as_deref()?, max_bytes)
        }
        (MetadataField::Caption, AttributeType::Text) => {
            cut_text(metadata.caption.as_deref()?, max_bytes)
        }
        (MetadataField::Keywords, AttributeType::Text) => join_list(&metadata.keywords, max_bytes),
        (MetadataField::Creator, AttributeType::Text) => join_list(&metadata.creators, max_bytes),
        (MetadataField::Rights, AttributeType::Text) => {
            cut_text(metadata.rights.as_deref()?, max_bytes)
        }
        (MetadataField::Date, declared) => date_text(metadata.date.as_ref()?, *declared),
        _ => None,
    };
    let named = |field: &MetadataField| Some((field.name().to_owned(), value(*field)?));
    fields.iter().filter_map(named).collect()
}

fn date_text(date: &PhotoDate, declared: AttributeType) -> Option<String> {
    match declared {
        AttributeType::Text => Some(date.to_iso()),
        // In the form in which times of events are stored.
        AttributeType::Time => {
            Some(date.to_earliest_time()?.to_rfc3339_opts(SecondsFormat::Micros, true))
        }
        _ => None,
    }
}

/// Cuts a text at the end of a character.
fn cut_text(text: &str, max_bytes: usize) -> Option<String> {
    let cut = &text[..text.floor_char_boundary(max_bytes)];
    Some(cut.trim_end().to_owned()).filter(|text| !text.is_empty())
}

/// Joins the first items that fit, each once. Separators in an item become commas.
fn join_list(items: &[String], max_bytes: usize) -> Option<String> {
    let mut joined = String::new();
    let mut kept: Vec<String> = Vec::new();
    for item in items {
        let item = item.replace(LIST_SEPARATOR, ",");
        let needed = item.len() + if joined.is_empty() { 0 } else { 2 };
        if kept.contains(&item) || joined.len() + needed > max_bytes {
            continue;
        }
        if !joined.is_empty() {
            joined.push(LIST_SEPARATOR);
            joined.push(' ');
        }
        joined.push_str(&item);
        kept.push(item);
    }
    Some(joined).filter(|joined| !joined.is_empty())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn texts_are_cut_between_characters_and_lists_between_items() {
        assert_eq!(cut_text("größer", 3).unwrap(), "gr");
        assert_eq!(cut_text("größer", 4).unwrap(), "grö");
        assert_eq!(cut_text("a b", 2).unwrap(), "a");
        let items = ["eins", "zwei", "eins", "a;b", "drei"].map(String::from);
        assert_eq!(join_list(&items, 100).unwrap(), "eins; zwei; a,b; drei");
        assert_eq!(join_list(&items, 15).unwrap(), "eins; zwei; a,b");
        assert_eq!(join_list(&items, 14).unwrap(), "eins; zwei");
        assert_eq!(join_list(&items, 1), None);
    }

    #[test]
    fn fields_must_be_declared_once_with_a_type_that_they_can_have() {
        use AttributeType::{Integer, Text, Time};
        use MetadataField::{Caption, Date, Rights, Title};
        let declared: AttributeTypes = [("title", Text), ("date", Time), ("rights", Integer)]
            .map(|(name, one)| (name.into(), one))
            .into();
        assert_eq!(check_declarations(&[Title, Date], &declared), Vec::<String>::new());
        assert_eq!(
            check_declarations(&[Title, Title, Caption, Rights], &declared),
            [
                "metadata: title is given twice",
                "metadata: caption is no declared attribute; add caption = \"text\" to [attributes]",
                "metadata: rights is declared as integer; from metadata, it can be text",
            ]
        );
        let integers: AttributeTypes = [("date".into(), Integer)].into();
        assert_eq!(
            check_declarations(&[Date], &integers),
            ["metadata: date is declared as integer; from metadata, it can be time or text"]
        );
    }
}
