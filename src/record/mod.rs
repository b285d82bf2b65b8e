//! The records that the stages of the pipeline pass on.
//!
//! A Kafka message becomes one or more [`AcceptedEvent`]s, an accepted event becomes one [`ImageRow`] of
//! the stored table, and query workers read rows back. This module only checks and converts values.

pub mod arrays;

use std::cmp::Ordering as CmpOrdering;
use std::collections::BTreeMap;
use std::fmt;
use std::sync::Arc;

use bytes::Bytes;
use chrono::{DateTime, Utc};
use half::f16;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use self::arrays::JsonEmbedding;
use crate::balance::statistics::{ScoreStatistics, StatisticsKey};

/// Length of the longest accepted image id, in bytes. Query workers hold all ids in memory.
pub const MAX_IMAGE_ID_BYTES: usize = 1024;

/// A value that its field does not allow. Permanent: the same input fails again.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{field}: {reason}")]
pub struct InvalidField {
    /// Name of the field.
    pub field: String,
    /// What is wrong, and what is allowed.
    pub reason: String,
}

impl InvalidField {
    /// Creates an error for `field`.
    pub fn new(field: impl Into<String>, reason: impl Into<String>) -> Self {
        Self { field: field.into(), reason: reason.into() }
    }
}

/// The id of an image in the catalogue: 1 to 1024 bytes of UTF-8 without control characters.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct ImageId(Arc<str>);

impl ImageId {
    /// Checks an id.
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

    /// Returns the decimal digits of a number as an id.
    pub fn from_number(number: usize) -> Self {
        Self(number.to_string().into())
    }

    /// Returns the id as text.
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

/// A partition of a Kafka topic.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct TopicPartition {
    /// Name of the topic.
    pub topic: Arc<str>,
    /// Number of the partition, from 0.
    pub number: i32,
}

impl fmt::Display for TopicPartition {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}[{}]", self.topic, self.number)
    }
}

/// A message of a partition's log by which the log is recognised: after a topic was deleted and created
/// again, its partitions have the same names, but not this message.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LogAnchor {
    /// Offset of the message.
    pub offset: i64,
    /// [`KafkaMessage::fingerprint`] of the message.
    pub fingerprint: i64,
}

/// What the table has stored of a partition.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct StoredPosition {
    /// Number of the log that is consumed: 0 for the first log of the partition, one more for each log that
    /// replaced it.
    pub log_number: u64,
    /// The offset after the last stored message of this log; `None` if nothing of it is stored.
    pub next_offset: Option<i64>,
    /// A message of this log. `None` if none is stored, as in tables of earlier versions.
    pub anchor: Option<LogAnchor>,
    /// The last stored message of this log; `None` as above.
    pub last_message: Option<LogAnchor>,
}

impl StoredPosition {
    /// Returns the next offset to be consumed; `None`: from wherever the log begins. Of a log that replaced another
    /// one, everything is to be consumed.
    pub fn next_wanted_offset(&self) -> Option<i64> {
        self.next_offset.or((self.log_number > 0).then_some(0))
    }
}

/// A Kafka message, copied from the client.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct KafkaMessage {
    /// Partition of the message.
    pub partition: TopicPartition,
    /// Number of the log of the partition that the message is from ([`StoredPosition::log_number`]).
    pub log_number: u64,
    /// Offset in the partition.
    pub offset: i64,
    /// Key, if it has one.
    pub key: Option<Bytes>,
    /// Value; `None` is a tombstone.
    pub payload: Option<Bytes>,
    /// Headers, in order. A name may occur twice, and a value may be null.
    pub headers: Vec<(String, Option<Bytes>)>,
    /// Timestamp in milliseconds since 1970, if it has one.
    pub timestamp_ms: Option<i64>,
}

impl KafkaMessage {
    /// Returns a hash of timestamp, key and value: two messages with one fingerprint are taken for the same.
    /// Never negative, so that a Delta transaction can store it.
    pub fn fingerprint(&self) -> i64 {
        let mut hash = Sha256::new();
        hash.update(self.timestamp_ms.unwrap_or(i64::MIN).to_be_bytes());
        for part in [&self.key, &self.payload] {
            // The length separates key and value; a null value differs from an empty one.
            let length = part.as_ref().map_or(u64::MAX, |bytes| bytes.len() as u64);
            hash.update(length.to_be_bytes());
            hash.update(part.as_deref().unwrap_or_default());
        }
        let mut first = [0; 8];
        first.copy_from_slice(&hash.finalize()[..8]);
        i64::from_be_bytes(first) & i64::MAX
    }

    /// Returns the message as one by which its log is recognised.
    pub fn anchor(&self) -> LogAnchor {
        LogAnchor { offset: self.offset, fingerprint: self.fingerprint() }
    }

    /// Returns the id of the trace that the message belongs to: 32 hexadecimal digits from its
    /// `traceparent` header (W3C Trace Context). Returns `None` if the header is missing or invalid.
    pub fn trace_id(&self) -> Option<&str> {
        let (_, value) = self.headers.iter().find(|(name, _)| name == "traceparent")?;
        Some(parse_traceparent(std::str::from_utf8(value.as_deref()?).ok()?)?.0)
    }
}

/// Returns the trace id and span id of a `traceparent` (W3C Trace Context), which has the form
/// `00-<trace id>-<span id>-<flags>`. Returns `None` if it is invalid.
pub fn parse_traceparent(traceparent: &str) -> Option<(&str, &str)> {
    let is_id = |text: &str, length| {
        let is_digit = |b: u8| b.is_ascii_digit() || (b'a'..=b'f').contains(&b);
        text.len() == length && text.bytes().all(is_digit) && text.bytes().any(|b| b != b'0')
    };
    let mut parts = traceparent.trim().split('-');
    let (version, trace, span) = (parts.next()?, parts.next()?, parts.next()?);
    (version.len() == 2 && version != "ff" && is_id(trace, 32) && is_id(span, 16))
        .then_some((trace, span))
}

/// How the versions of an image are ordered. A catalogue has one ordering; versions of different orderings
/// are never compared.
#[derive(
    Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema, clap::ValueEnum,
)]
#[serde(rename_all = "snake_case")]
pub enum VersionOrdering {
    /// By the event's `sequence`, an unsigned integer that grows with each change of an image.
    Sequence,
    /// By the event's `event_time`, to the microsecond.
    #[default]
    EventTime,
    /// By the Kafka offset. Correct only if messages are keyed by image id, so that all events of an image
    /// are in one partition.
    Offset,
    /// By the `sequencer` of bucket notifications (S3, MinIO). Other events cannot be ordered with them.
    Sequencer,
}

impl VersionOrdering {
    /// Returns the name that configuration and the properties of the table use.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Sequence => "sequence",
            Self::EventTime => "event_time",
            Self::Offset => "offset",
            Self::Sequencer => "sequencer",
        }
    }
}

/// The version of an image, as text that compares byte by byte in the order of the versions.
///
/// Numbers are written with 20 digits, and sequencers without trailing zeros, so that every tool that
/// reads the table can order rows by this column without knowing the ordering of the catalogue.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct SequenceKey(Arc<str>);

impl SequenceKey {
    /// Creates a key from a number that grows with each version.
    pub fn from_number(number: u64) -> Self {
        Self(format!("{number:020}").into())
    }

    /// Creates a key from the position of a message. Every message of a partition's later log is newer than
    /// those of its earlier logs, although its offsets begin at 0 again.
    pub fn from_log_position(log_number: u64, offset: i64) -> Result<Self, InvalidField> {
        /// More messages than a partition ever has; leaves room for 18,000 logs.
        const MAX_LOG_MESSAGES: u64 = 1_000_000_000_000_000;
        let offset = u64::try_from(offset).ok().filter(|offset| *offset < MAX_LOG_MESSAGES);
        let first = log_number.checked_mul(MAX_LOG_MESSAGES);
        let number = first.zip(offset).and_then(|(first, offset)| first.checked_add(offset));
        number.map(Self::from_number).ok_or_else(|| {
            InvalidField::new("offset", format!("is negative, or {MAX_LOG_MESSAGES} or more"))
        })
    }

    /// Creates a key from a time, to the microsecond. Rejects times before 1970.
    pub fn from_time(time: DateTime<Utc>) -> Result<Self, InvalidField> {
        u64::try_from(time.timestamp_micros())
            .map(Self::from_number)
            .map_err(|_| InvalidField::new("event_time", format!("{time} lies before 1970")))
    }

    /// Creates a key from the `sequencer` of a bucket notification, which is hexadecimal digits. Sequencers
    /// compare as if the shorter one were padded with zeros on the right ("Event message structure",
    /// Amazon S3 user guide); without trailing zeros, plain comparison gives the same order.
    pub fn from_sequencer(sequencer: &str) -> Result<Self, InvalidField> {
        const MAX_DIGITS: usize = 128;
        let is_hexadecimal =
            !sequencer.is_empty() && sequencer.bytes().all(|b| b.is_ascii_hexdigit());
        if !is_hexadecimal || sequencer.len() > MAX_DIGITS {
            let reason = format!("{sequencer:.200?} is not 1 to {MAX_DIGITS} hexadecimal digits");
            return Err(InvalidField::new("sequencer", reason));
        }
        Ok(Self(sequencer.trim_end_matches('0').to_ascii_uppercase().into()))
    }

    /// Wraps a key that was read from the table.
    pub fn from_stored(text: &str) -> Self {
        Self(text.into())
    }

    /// Returns the text that is stored.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

/// What an event does to an image.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Operation {
    /// The image is new or has changed.
    #[default]
    Upsert,
    /// The image was removed.
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
    /// Returns the name that configuration and answers use.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Text => "text",
            Self::Integer => "integer",
            Self::Number => "number",
            Self::Boolean => "boolean",
            Self::Time => "time",
        }
    }

    /// Returns a description for messages, such as "a number".
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

/// Returns a whole number of JSON, also if it is written as 2020.0; `None` if it is not whole, or so
/// large that a float does not say which whole number is meant.
pub fn whole_number(number: &serde_json::Number) -> Option<i128> {
    // From 2⁵³ on, several whole numbers are read as the same float.
    const FLOAT_LIMIT: f64 = 9_007_199_254_740_992.0;
    let from_float = || {
        let float = number.as_f64().filter(|f| f.fract() == 0.0 && f.abs() < FLOAT_LIMIT)?;
        Some(float as i128)
    };
    number.as_i128().or_else(from_float)
}

/// Types of the declared attributes, by name.
pub type AttributeTypes = BTreeMap<String, AttributeType>;

/// Attributes as stored: canonical texts by name. Numbers, booleans and times are written as in JSON.
pub type Attributes = BTreeMap<String, String>;

/// Separates the items of a list in one text attribute, as in `sunset; beach`.
pub const LIST_SEPARATOR: char = ';';

/// The source of an image's bytes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ImageSource {
    /// A URI that a worker fetches.
    Uri {
        /// The URI.
        uri: String,
        /// Version of an object in a versioned bucket; `None` is the newest.
        version: Option<String>,
    },
    /// The encoded image, which came in the event itself.
    Inline(Bytes),
}

/// One accepted change of one image.
#[derive(Debug, Clone, PartialEq)]
pub struct AcceptedEvent {
    /// Id of the image.
    pub image_id: ImageId,
    /// Version of the image.
    pub sequence: SequenceKey,
    /// When the change happened, as the sender says; `None` if it does not.
    pub event_time: Option<DateTime<Utc>>,
    /// What changed.
    pub change: ImageChange,
}

/// What an [`AcceptedEvent`] changes.
#[derive(Debug, Clone, PartialEq)]
pub enum ImageChange {
    /// A new or changed image.
    Upsert {
        /// Where the image is.
        content: ImageSource,
        /// Declared attributes of the image.
        attributes: Attributes,
    },
    /// A new or changed image that somebody else has embedded.
    Embedded {
        /// The embedding as it was sent.
        embedding: JsonEmbedding,
        /// Fingerprint of the model that computed it.
        model: String,
        /// Where the image is, if the event says it.
        uri: Option<String>,
        /// Declared attributes of the image.
        attributes: Attributes,
    },
    /// A removed image.
    Delete,
    /// One version of an object was removed: the image is the version that remains, if any.
    Recheck {
        /// Where the image is, if a version remains.
        content: ImageSource,
    },
}

/// An embedding of length 1 whose values are rounded to f16, so that whoever computed it and whoever
/// reads it from the table compute with the very same numbers.
#[derive(Debug, Clone, PartialEq)]
pub struct Embedding(Box<[f32]>);

impl Embedding {
    /// Rounds a vector of length 1 and any dimension to what is stored.
    pub fn from_unit_vector(unit: &[f32]) -> Self {
        Self(unit.iter().map(|v| f16::from_f32(*v).to_f32()).collect())
    }

    /// Wraps a vector that was read from the table and is rounded already.
    pub fn from_stored(values: &[f32]) -> Self {
        Self(values.into())
    }

    /// Returns the values with the precision to which they are rounded.
    pub fn to_f16(&self) -> Vec<f16> {
        self.0.iter().map(|value| f16::from_f32(*value)).collect()
    }

    /// Returns the values, one per dimension.
    pub fn values(&self) -> &[f32] {
        &self.0
    }
}

/// One version of one image, as the table stores it.
#[derive(Debug, Clone, PartialEq)]
pub struct ImageRow {
    /// Id of the image.
    pub image_id: ImageId,
    /// Version of the image. The row with the newest version is current.
    pub sequence: SequenceKey,
    /// When the change happened; `None` if the event did not say.
    pub event_time: Option<DateTime<Utc>>,
    /// When the row was created. Decides between two rows of one version.
    pub embedded_at: DateTime<Utc>,
    /// The image; `None` if it was deleted.
    pub image: Option<StoredImage>,
}

/// An image that is not deleted.
#[derive(Debug, Clone, PartialEq)]
pub struct StoredImage {
    /// URI that it was fetched from; `None` if its bytes came in the event.
    pub uri: Option<String>,
    /// SHA-256 of the encoded image, in hexadecimal; empty if the image was embedded elsewhere.
    pub content_hash: String,
    /// Size of the encoded image; 0 if the image was embedded elsewhere.
    pub byte_size: u64,
    /// Width in pixels, with the orientation applied; 0 if the image was embedded elsewhere.
    pub width: u32,
    /// Height in pixels, with the orientation applied; 0 if the image was embedded elsewhere.
    pub height: u32,
    /// Declared attributes.
    pub attributes: Attributes,
    /// Embedding of the image.
    pub embedding: Embedding,
    /// Statistics of the scores of auxiliary prompts, by prompt set.
    pub statistics: BTreeMap<StatisticsKey, ScoreStatistics>,
    /// How the image was decoded; `None` if the row was stored before this was recorded.
    pub decoding: Option<Decoding>,
}

/// How an image was decoded.
#[derive(Debug, Clone, PartialEq)]
pub struct Decoding {
    /// The rule: the edition of the decoders, and what becomes of damaged images.
    pub rule: Arc<str>,
    /// The share of the pixels that could be decoded, 1 unless the file was damaged.
    pub share: f32,
}

impl Decoding {
    /// The rule of an image that was embedded elsewhere, so that nothing was decoded.
    const EMBEDDED_ELSEWHERE: &str = "embedded elsewhere";

    /// Says that the image was embedded elsewhere: only its embedding was sent or imported.
    pub fn embedded_elsewhere() -> Self {
        Self { rule: Self::EMBEDDED_ELSEWHERE.into(), share: 1.0 }
    }

    /// Whether the image was embedded elsewhere.
    pub fn is_embedded_elsewhere(&self) -> bool {
        &*self.rule == Self::EMBEDDED_ELSEWHERE
    }
}

impl StoredImage {
    /// Returns an image of which only the embedding is known.
    pub fn embedded_elsewhere(
        uri: Option<String>,
        attributes: Attributes,
        embedding: Embedding,
        statistics: BTreeMap<StatisticsKey, ScoreStatistics>,
    ) -> Self {
        Self {
            uri,
            content_hash: String::new(),
            byte_size: 0,
            width: 0,
            height: 0,
            attributes,
            embedding,
            statistics,
            decoding: Some(Decoding::embedded_elsewhere()),
        }
    }
}

impl ImageSource {
    /// Names the newest version at a URI.
    pub fn from_uri(uri: impl Into<String>) -> Self {
        Self::Uri { uri: uri.into(), version: None }
    }
}

impl ImageRow {
    /// Whether this row replaces `other` as the current row of the same image.
    ///
    /// The row with the newer sequence wins. Of two rows with the same sequence a delete wins over an
    /// image, because what somebody asked to remove must not come back; otherwise the row that was
    /// created later wins.
    pub fn supersedes(&self, other: &ImageRow) -> bool {
        RowVersion::from_row(self).cmp(&RowVersion::from_row(other)) == CmpOrdering::Greater
    }
}

/// The part of a row that decides which row of an image is current. Compares in the order of its fields.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct RowVersion {
    /// Version of the image.
    pub sequence: SequenceKey,
    /// Whether the image was deleted.
    pub deleted: bool,
    /// When the row was created.
    pub embedded_at: DateTime<Utc>,
}

impl RowVersion {
    /// Returns the version of a row.
    pub fn from_row(row: &ImageRow) -> Self {
        Self {
            sequence: row.sequence.clone(),
            deleted: row.image.is_none(),
            embedded_at: row.embedded_at,
        }
    }
}

/// Returns lower-case hexadecimal digits, as used for hashes and fingerprints.
pub fn to_hex(bytes: &[u8]) -> String {
    bytes.iter().map(|b| format!("{b:02x}")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_valid_traceparent_gives_a_trace_id() {
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
    fn invalid_image_ids_are_rejected() {
        for id in ["", "a\u{0}b", "line\nbreak", &"x".repeat(1025)] {
            assert_eq!(ImageId::new(id).unwrap_err().field, "image_id");
        }
        assert!(ImageId::new("ミルク/マグ 1.jpg").is_ok());
        // Ids that only look the same belong to two images: their bytes count, nothing is normalised.
        for (id, lookalike) in
            [("a.jpg", "\u{430}.jpg"), ("\u{e9}", "e\u{301}"), ("a", "a\u{200b}")]
        {
            assert_ne!(ImageId::new(id).unwrap(), ImageId::new(lookalike).unwrap());
        }
    }

    #[test]
    fn sequences_order_as_their_numbers() {
        let mut numbers = [99, u64::MAX, 10, 0, 1_000, 9];
        numbers.sort_by_key(|n| SequenceKey::from_number(*n));
        assert_eq!(numbers, [0, 9, 10, 99, 1_000, u64::MAX]);
    }

    #[test]
    fn messages_of_a_later_log_are_newer_than_all_of_earlier_ones() {
        let key = |log, offset| SequenceKey::from_log_position(log, offset).unwrap();
        assert_eq!(key(0, 7), SequenceKey::from_number(7));
        assert!(key(0, 999_999_999_999_999) < key(1, 0) && key(1, 0) < key(1, 1));
        for (log, offset) in [(0, -1), (0, 1_000_000_000_000_000), (u64::MAX, 0), (20_000, 0)] {
            assert_eq!(SequenceKey::from_log_position(log, offset).unwrap_err().field, "offset");
        }
    }

    #[test]
    fn a_fingerprint_depends_on_time_key_and_value_and_on_nothing_else() {
        let message = KafkaMessage {
            partition: TopicPartition { topic: "images".into(), number: 0 },
            log_number: 0,
            offset: 4,
            key: Some("ab".into()),
            payload: Some("c".into()),
            headers: Vec::new(),
            timestamp_ms: Some(5),
        };
        let other = |change: fn(&mut KafkaMessage)| {
            let mut other = message.clone();
            change(&mut other);
            other.fingerprint()
        };
        assert!(message.fingerprint() >= 0);
        assert_eq!(message.fingerprint(), other(|m| (m.offset, m.log_number) = (9, 1)));
        for differs in [
            other(|m| m.timestamp_ms = Some(6)),
            other(|m| m.timestamp_ms = None),
            other(|m| m.payload = Some("d".into())),
            other(|m| m.payload = None),
            other(|m| m.payload = Some(Bytes::new())),
            other(|m| (m.key, m.payload) = (Some("a".into()), Some("bc".into()))),
        ] {
            assert_ne!(message.fingerprint(), differs);
        }
    }

    #[test]
    fn sequencers_order_by_the_padding_rule() {
        let key = |s: &str| SequenceKey::from_sequencer(s).unwrap();
        // The rule of the Amazon S3 user guide: pad with zeros on the right, then compare.
        assert_eq!(key("0055AED6DCD90281E5"), key("0055aed6dcd90281e500"));
        assert!(key("0055AED6DCD90281E5") < key("0055AED6DCD90281E501"));
        assert!(key("0055AED6DCD90281E5") < key("0055AED6DCD90281F"));
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
                byte_size: 0,
                width: 1,
                height: 1,
                attributes: Attributes::new(),
                embedding: Embedding::from_unit_vector(&[1.0]),
                statistics: BTreeMap::new(),
                decoding: None,
            }),
        };
        assert!(row(2, true).supersedes(&row(2, false)));
        assert!(!row(2, false).supersedes(&row(2, true)));
        assert!(row(3, false).supersedes(&row(2, true)));
        assert!(!row(2, false).supersedes(&row(2, false)));
    }

    #[test]
    fn whole_numbers_may_be_written_as_floats() {
        let whole = |json: &str| whole_number(&serde_json::from_str(json).unwrap());
        for (json, number) in [
            ("2020", Some(2020)),
            ("2020.0", Some(2020)),
            ("-2.02e3", Some(-2020)),
            ("-0.0", Some(0)),
            ("18446744073709551615", Some(u64::MAX.into())),
            ("9007199254740993.0", None),
            ("1e300", None),
            ("2020.5", None),
        ] {
            assert_eq!(whole(json), number, "{json}");
        }
    }
}
