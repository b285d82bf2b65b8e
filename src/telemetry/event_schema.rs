//! How a log event is declared: its name, levels, meaning, remedy and typed fields.

use serde_json::Value;

/// Type of the value of a field.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FieldType {
    /// Text.
    Text,
    /// A whole number, 0 or more.
    Count,
    /// A whole number, which may be below 0.
    Integer,
    /// A number, possibly with a fraction.
    Number,
    /// `true` or `false`.
    Flag,
}

impl FieldType {
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Text => "text",
            Self::Count => "count",
            Self::Integer => "integer",
            Self::Number => "number",
            Self::Flag => "flag",
        }
    }

    pub(super) fn matches(self, value: &Value) -> bool {
        match self {
            Self::Text => value.is_string(),
            Self::Count => value.is_u64(),
            Self::Integer => value.is_i64() || value.is_u64(),
            Self::Number => value.is_number(),
            Self::Flag => value.is_boolean(),
        }
    }
}

/// A field of an event. The value is in milliseconds if the name ends in `_ms`, in seconds if it ends
/// in `_seconds`, in bytes if the name contains `bytes`.
#[derive(Debug, Clone, Copy)]
pub struct LogEventField {
    /// Key in the JSON log.
    pub name: &'static str,
    /// Type of the value.
    pub field_type: FieldType,
    /// Meaning of the value; empty if the name suffices.
    pub description: &'static str,
    /// Whether the field is missing if its value is not known.
    pub optional: bool,
}

impl LogEventField {
    /// Returns the field as one that may be missing.
    pub(super) const fn optional(self) -> Self {
        Self { optional: true, ..self }
    }
}

const fn required_field(name: &'static str, kind: FieldType, about: &'static str) -> LogEventField {
    LogEventField { name, field_type: kind, description: about, optional: false }
}

pub(super) const fn text_field(name: &'static str, about: &'static str) -> LogEventField {
    required_field(name, FieldType::Text, about)
}

pub(super) const fn count_field(name: &'static str, about: &'static str) -> LogEventField {
    required_field(name, FieldType::Count, about)
}

pub(super) const fn integer_field(name: &'static str, about: &'static str) -> LogEventField {
    required_field(name, FieldType::Integer, about)
}

pub(super) const fn number_field(name: &'static str, about: &'static str) -> LogEventField {
    required_field(name, FieldType::Number, about)
}

pub(super) const fn flag_field(name: &'static str, about: &'static str) -> LogEventField {
    required_field(name, FieldType::Flag, about)
}

/// The declaration of an event.
#[derive(Debug, Clone, Copy)]
pub struct LogEventDefinition {
    /// The value of the field `event`.
    pub name: &'static str,
    /// The levels that it is logged at, in lower case.
    pub levels: &'static [&'static str],
    /// What happened.
    pub meaning: &'static str,
    /// What the operator should do.
    pub remedy: &'static str,
    /// Its fields, in addition to [`COMMON_LOG_FIELDS`].
    pub fields: &'static [LogEventField],
}

/// Fields that every line has or may have.
pub const COMMON_LOG_FIELDS: &[LogEventField] = &[
    text_field("timestamp", "RFC 3339, UTC"),
    text_field("level", "`ERROR`, `WARN`, `INFO`, `DEBUG`"),
    text_field("event", "one of the names below"),
    text_field("message", "for people; not part of the interface"),
    text_field("target", "the module, which starts with `bsap`"),
];
