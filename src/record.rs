//! The records handed from stage to stage.
//!
//! A Kafka message becomes one or more [`Event`]s, an accepted event becomes one [`Row`] of the
//! stored table, and the query worker reads rows back. Nothing here does any work beyond checking
//! that a value is what it says it is.

use std::cmp::Ordering as CmpOrdering;
use std::collections::BTreeMap;
use std::fmt;
use std::sync::Arc;

use bytes::Bytes;
use chrono::{DateTime, Utc};
use half::f16;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::balance::statistics::{ScoreStatistics, StatisticsKey};

/// Longest accepted image id, in bytes. Ids are primary keys that every worker holds in memory.
pub const MAX_IMAGE_ID_BYTES: usize = 1024;

/// A value that is not what its field requires. Permanent: the same input fails again.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{field}: {reason}")]
pub struct InvalidField {
    /// The field of the event that is wrong.
    pub field: String,
    /// What is wrong and what would be right.
    pub reason: String,
}

impl InvalidField {
    /// An error that names `field` and says why.
    pub fn new(field: impl Into<String>, reason: impl Into<String>) -> Self {
        Self { field: field.into(), reason: reason.into() }
    }
}

/// The catalogue's own name of an image: 1 to 1024 bytes of UTF-8 without control characters.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct ImageId(Arc<str>);

impl ImageId {
    /// Checks and wraps an id.
    pub fn new(id: impl AsRef<str>) -> Result<Self, InvalidField> {
        let id = id.as_ref();
        if id.is_empty() {
            return Err(InvalidField::new("image_id", "is empty"));
        }
        if id.len() > MAX_IMAGE_ID_BYTES {
            let reason =
                format!("has {} bytes, more than {MAX_IMAGE_ID_BYTES}; use a shorter id", id.len());
            return Err(InvalidField::new("image_id", reason));
        }
        if let Some(c) = id.chars().find(|c| c.is_control()) {
            let reason = format!("contains the control character {}", c.escape_unicode());
            return Err(InvalidField::new("image_id", reason));
        }
        Ok(Self(id.into()))
    }

    /// The id as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl TryFrom<String> for ImageId {
    type Error = InvalidField;
    fn try_from(id: String) -> Result<Self, InvalidField> {
        Self::new(id)
    }
}

impl From<ImageId> for String {
    fn from(id: ImageId) -> Self {
        id.as_str().to_owned()
    }
}

impl fmt::Display for ImageId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// Where a message stands in Kafka.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct TopicPartition {
    /// Topic name.
    pub topic: Arc<str>,
    /// Partition number within the topic.
    pub number: i32,
}

impl fmt::Display for TopicPartition {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}[{}]", self.topic, self.number)
    }
}

/// A Kafka message as it came, owned.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct KafkaMessage {
    /// Where it came from.
    pub partition: TopicPartition,
    /// Its offset there.
    pub offset: i64,
    /// Its key, if it has one.
    pub key: Option<Bytes>,
    /// Its value; none is a tombstone.
    pub payload: Option<Bytes>,
    /// Its headers, in order; a name may come twice and a value may be null.
    pub headers: Vec<(String, Option<Bytes>)>,
    /// Its timestamp in milliseconds since 1970, if it has one.
    pub timestamp_ms: Option<i64>,
}

impl KafkaMessage {
    /// The trace that the message belongs to: 32 hexadecimal digits from its `traceparent` header
    /// (W3C Trace Context). None where there is none, or it is not one.
    pub fn trace_id(&self) -> Option<&str> {
        let (_, value) = self.headers.iter().find(|(name, _)| name == "traceparent")?;
        Some(parse_traceparent(std::str::from_utf8(value.as_deref()?).ok()?)?.0)
    }
}

/// Trace id and span id of a `traceparent` (W3C Trace Context): `00-<trace id>-<span id>-<flags>`.
pub fn parse_traceparent(traceparent: &str) -> Option<(&str, &str)> {
    let digits = |text: &str, length| {
        let digit = |b: u8| b.is_ascii_digit() || (b'a'..=b'f').contains(&b);
        text.len() == length && text.bytes().all(digit) && text.bytes().any(|b| b != b'0')
    };
    let mut parts = traceparent.trim().split('-');
    let (version, trace, span) = (parts.next()?, parts.next()?, parts.next()?);
    (version.len() == 2 && version != "ff" && digits(trace, 32) && digits(span, 16))
        .then_some((trace, span))
}

/// What orders the versions of one image. A catalogue has one ordering; two are never compared.
#[derive(
    Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema, clap::ValueEnum,
)]
#[serde(rename_all = "snake_case")]
pub enum VersionOrdering {
    /// The event's own `sequence`, an unsigned integer that grows with each change of an image.
    Sequence,
    /// The event's `event_time`, to the microsecond.
    #[default]
    EventTime,
    /// The Kafka offset. Only right where messages are keyed by image id, so that all events of
    /// an image are in one partition.
    Offset,
    /// The `sequencer` of bucket notifications (S3, MinIO): nothing else can be ordered beside it.
    Sequencer,
}

impl VersionOrdering {
    /// The name that stands in configuration and in the table's properties.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Sequence => "sequence",
            Self::EventTime => "event_time",
            Self::Offset => "offset",
            Self::Sequencer => "sequencer",
        }
    }
}

/// The version of an image: text that compares, byte by byte, in the order of the versions.
///
/// Numbers are written with 20 digits and sequencers without the zeros at their end, so that every
/// tool that reads the table can order rows by the column without knowing how it was made.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct SequenceKey(Arc<str>);

impl SequenceKey {
    /// From a number that grows with each version.
    pub fn from_number(number: u64) -> Self {
        Self(format!("{number:020}").into())
    }

    /// From a time, to the microsecond. Times before 1970 are refused.
    pub fn from_time(time: DateTime<Utc>) -> Result<Self, InvalidField> {
        u64::try_from(time.timestamp_micros())
            .map(Self::from_number)
            .map_err(|_| InvalidField::new("event_time", format!("{time} lies before 1970")))
    }

    /// From the `sequencer` of a bucket notification, hexadecimal digits. They compare as if the
    /// shorter one were filled up with zeros on the right ("Event message structure", Amazon S3
    /// user guide); without the zeros at the end, plain comparison does the same.
    pub fn from_sequencer(sequencer: &str) -> Result<Self, InvalidField> {
        const MAX_DIGITS: usize = 128;
        let digits = !sequencer.is_empty() && sequencer.bytes().all(|b| b.is_ascii_hexdigit());
        if !digits || sequencer.len() > MAX_DIGITS {
            let reason = format!("{sequencer:.200?} is not 1 to {MAX_DIGITS} hexadecimal digits");
            return Err(InvalidField::new("sequencer", reason));
        }
        Ok(Self(sequencer.trim_end_matches('0').to_ascii_uppercase().into()))
    }

    /// As stored in the table.
    pub fn from_stored(text: &str) -> Self {
        Self(text.into())
    }

    /// The text that is stored.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

/// Whether an event brings an image or takes it away.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Operation {
    /// The image is new or has changed.
    #[default]
    Upsert,
    /// The image is gone.
    Delete,
}

/// The declared type of an attribute.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum AttributeType {
    /// Any text.
    Text,
    /// A whole number.
    Integer,
    /// A number.
    Number,
    /// `true` or `false`.
    Boolean,
    /// A time as RFC 3339 writes it.
    Time,
}

impl AttributeType {
    /// The name that stands in configuration and answers.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Text => "text",
            Self::Integer => "integer",
            Self::Number => "number",
            Self::Boolean => "boolean",
            Self::Time => "time",
        }
    }

    /// For messages: a value is none of these.
    pub fn description(self) -> &'static str {
        match self {
            Self::Text => "a text",
            Self::Integer => "a whole number",
            Self::Number => "a number",
            Self::Boolean => "true or false",
            Self::Time => "a time as RFC 3339 writes it",
        }
    }
}

/// Declared attributes: name to type.
pub type AttributeTypes = BTreeMap<String, AttributeType>;

/// Attributes as stored: name to canonical text (numbers, booleans and times as JSON writes them).
pub type Attributes = BTreeMap<String, String>;

/// Where an image's bytes come from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ImageContent {
    /// A URI that a worker fetches.
    Uri {
        /// The URI.
        uri: String,
        /// Which version of an object in a bucket that keeps versions; none takes the newest.
        version: Option<String>,
    },
    /// Bytes that came in the event itself.
    Inline(Bytes),
}

/// One accepted change of one image.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AcceptedEvent {
    /// Which image.
    pub image_id: ImageId,
    /// Its version.
    pub sequence: SequenceKey,
    /// When it happened, according to whoever sent the event.
    pub event_time: Option<DateTime<Utc>>,
    /// What happened.
    pub change: ImageChange,
}

/// What an [`Event`] does.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ImageChange {
    /// A new or changed image.
    Upsert {
        /// Where its bytes are.
        content: ImageContent,
        /// Its declared attributes.
        attributes: Attributes,
    },
    /// A removed image.
    Delete,
    /// One version of an object was removed: the image is whatever is there now, or gone.
    Recheck {
        /// Where its bytes are, if they are anywhere.
        content: ImageContent,
    },
}

/// A unit-length embedding whose values were rounded to f16, so that every reader of the stored
/// value computes with the very same numbers.
#[derive(Debug, Clone, PartialEq)]
pub struct Embedding(Box<[f32]>);

impl Embedding {
    /// Rounds a unit-length vector of any dimension to what is stored.
    pub fn from_unit_vector(unit: &[f32]) -> Self {
        Self(unit.iter().map(|v| f16::from_f32(*v).to_f32()).collect())
    }

    /// A vector read back from the table, already rounded.
    pub fn from_stored(values: &[f32]) -> Self {
        Self(values.into())
    }

    /// The values.
    pub fn values(&self) -> &[f32] {
        &self.0
    }
}

/// One version of one image, as the table stores it.
#[derive(Debug, Clone, PartialEq)]
pub struct ImageRow {
    /// Which image.
    pub image_id: ImageId,
    /// Its version: the newest of an image wins.
    pub sequence: SequenceKey,
    /// When the change happened, where the event said so.
    pub event_time: Option<DateTime<Utc>>,
    /// When the row was made. Breaks the tie between two rows of one version.
    pub embedded_at: DateTime<Utc>,
    /// The image, or nothing where it was deleted.
    pub image: Option<StoredImage>,
}

/// What is known of an image that is there.
#[derive(Debug, Clone, PartialEq)]
pub struct StoredImage {
    /// Where it was fetched from; none where the bytes came inline.
    pub uri: Option<String>,
    /// SHA-256 of the bytes that were decoded, in hexadecimal.
    pub content_hash: String,
    /// Size of those bytes.
    pub bytes: u64,
    /// Width in pixels, after the orientation was applied.
    pub width: u32,
    /// Height in pixels, after the orientation was applied.
    pub height: u32,
    /// Declared attributes.
    pub attributes: Attributes,
    /// The embedding.
    pub embedding: Embedding,
    /// Statistics of the auxiliary scores, by prompt set.
    pub statistics: BTreeMap<StatisticsKey, ScoreStatistics>,
}

impl ImageContent {
    /// The newest that a URI names.
    pub fn from_uri(uri: impl Into<String>) -> Self {
        Self::Uri { uri: uri.into(), version: None }
    }
}

impl ImageRow {
    /// Whether this row replaces `other` as the current version of the same image.
    ///
    /// The newer sequence wins. At an equal sequence a delete wins over an image (the version is
    /// the same, and what was asked to be gone must be gone), then the row that was made later.
    pub fn supersedes(&self, other: &ImageRow) -> bool {
        RowVersion::from_row(self).cmp(&RowVersion::from_row(other)) == CmpOrdering::Greater
    }
}

/// What decides between two rows of an image; compares in the order of its fields.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct RowVersion {
    /// The order of the versions of an image.
    pub sequence: SequenceKey,
    /// Whether the image was deleted.
    pub deleted: bool,
    /// When the row was made.
    pub embedded_at: DateTime<Utc>,
}

impl RowVersion {
    /// The version of a row.
    pub fn from_row(row: &ImageRow) -> Self {
        Self {
            sequence: row.sequence.clone(),
            deleted: row.image.is_none(),
            embedded_at: row.embedded_at,
        }
    }
}

/// Lower-case hexadecimal, as hashes and fingerprints are written.
pub fn to_hex(bytes: &[u8]) -> String {
    bytes.iter().map(|b| format!("{b:02x}")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_whole_traceparent_gives_a_trace_id() {
        let id = "4bf92f3577b34da6a3ce929d0e0e4736";
        let span = "00f067aa0ba902b7";
        assert_eq!(parse_traceparent(&format!("00-{id}-{span}-01")), Some((id, span)));
        let zeros = "0".repeat(32);
        for wrong in [
            "",
            "00",
            id,
            &format!("00-{id}"),
            &format!("ff-{id}-00f067aa0ba902b7-01"),
            &format!("00-{zeros}-00f067aa0ba902b7-01"),
            &format!("00-{}-00f067aa0ba902b7-01", id.to_uppercase()),
        ] {
            assert_eq!(parse_traceparent(wrong), None, "{wrong}");
        }
    }

    #[test]
    fn hostile_ids_are_refused_by_name() {
        for id in ["", "a\u{0}b", "line\nbreak", &"x".repeat(1025)] {
            assert_eq!(ImageId::new(id).unwrap_err().field, "image_id");
        }
        assert!(ImageId::new("ミルク/マグ 1.jpg").is_ok());
        // Ids that only look the same are ids of two images: bytes decide, nothing is normalised.
        for (id, alike) in [("a.jpg", "\u{430}.jpg"), ("\u{e9}", "e\u{301}"), ("a", "a\u{200b}")] {
            assert_ne!(ImageId::new(id).unwrap(), ImageId::new(alike).unwrap());
        }
    }

    #[test]
    fn sequences_order_as_their_numbers() {
        let mut numbers = [99, u64::MAX, 10, 0, 1_000, 9];
        numbers.sort_by_key(|n| SequenceKey::from_number(*n));
        assert_eq!(numbers, [0, 9, 10, 99, 1_000, u64::MAX]);
    }

    #[test]
    fn sequencers_order_by_the_padding_rule() {
        let of = |s: &str| SequenceKey::from_sequencer(s).unwrap();
        // From the Amazon S3 user guide's rule: fill up with zeros on the right, then compare.
        assert_eq!(of("0055AED6DCD90281E5"), of("0055aed6dcd90281e500"));
        assert!(of("0055AED6DCD90281E5") < of("0055AED6DCD90281E501"));
        assert!(of("0055AED6DCD90281E5") < of("0055AED6DCD90281F"));
        for wrong in ["", "12G4", " 12", &"A".repeat(129)] {
            assert_eq!(SequenceKey::from_sequencer(wrong).unwrap_err().field, "sequencer");
        }
    }

    #[test]
    fn a_delete_wins_a_tie_and_never_an_older_version() {
        let row = |sequence: u64, deleted: bool| ImageRow {
            image_id: ImageId::new("a").unwrap(),
            sequence: SequenceKey::from_number(sequence),
            event_time: None,
            embedded_at: DateTime::from_timestamp(5, 0).unwrap(),
            image: (!deleted).then(|| StoredImage {
                uri: None,
                content_hash: String::new(),
                bytes: 0,
                width: 1,
                height: 1,
                attributes: Attributes::new(),
                embedding: Embedding::from_unit_vector(&[1.0]),
                statistics: BTreeMap::new(),
            }),
        };
        assert!(row(2, true).supersedes(&row(2, false)));
        assert!(!row(2, false).supersedes(&row(2, true)));
        assert!(row(3, false).supersedes(&row(2, true)));
        assert!(!row(2, false).supersedes(&row(2, false)));
    }
}
