//! Which images may be found, by their declared attributes and times.

use std::cmp::Ordering;
use std::collections::BTreeMap;

use chrono::DateTime;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::record::{AttributeType, AttributeTypes};

/// Deepest nesting of `and`, `or` and `not`.
const MAX_FILTER_DEPTH: usize = 8;
/// Most values that a filter compares with.
const MAX_FILTER_VALUES: usize = 256;

/// When the change happened, where its event said so.
const EVENT_TIME: &str = "event_time";
/// When the image was embedded.
const EMBEDDED_AT: &str = "embedded_at";

/// Which images may be found. Comparisons name attributes and give values; with several attributes,
/// all must hold. An image that lacks an attribute fulfils `ne` and nothing else. `event_time` and
/// `embedded_at` are there besides the declared attributes.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Filter {
    /// All of these hold.
    And(Vec<Filter>),
    /// One of these holds at least.
    Or(Vec<Filter>),
    /// This does not hold.
    Not(Box<Filter>),
    /// The attribute has the value.
    Eq(BTreeMap<String, Value>),
    /// The attribute has another value, or none.
    Ne(BTreeMap<String, Value>),
    /// It is less.
    Lt(BTreeMap<String, Value>),
    /// It is not more.
    Lte(BTreeMap<String, Value>),
    /// It is more.
    Gt(BTreeMap<String, Value>),
    /// It is not less.
    Gte(BTreeMap<String, Value>),
    /// It is one of the values.
    In(BTreeMap<String, Vec<Value>>),
    /// The text begins so.
    Prefix(BTreeMap<String, String>),
    /// The image has the attribute.
    Exists(String),
}

impl Filter {
    /// As compact JSON, the same for the same filter.
    fn to_json(&self) -> String {
        serde_json::to_string(self).unwrap_or_default()
    }

    /// Whether it lets only images through whose attribute has this value; false where that cannot
    /// be seen from the filter alone.
    pub fn implies(&self, attribute: &str, value: &str) -> bool {
        // As attributes are stored.
        let same = |given: &Value| match given {
            Value::String(text) => text == value,
            other => format!("{other}") == value,
        };
        match self {
            Self::And(all) => all.iter().any(|one| one.implies(attribute, value)),
            Self::Or(any) => !any.is_empty() && any.iter().all(|o| o.implies(attribute, value)),
            Self::Eq(terms) => terms.get(attribute).is_some_and(same),
            Self::In(terms) => {
                terms.get(attribute).is_some_and(|all| !all.is_empty() && all.iter().all(same))
            }
            _ => false,
        }
    }

    /// Checks it against what is declared. `Err` says what is wrong and what would be right.
    pub(crate) fn validate(&self, declared: &AttributeTypes) -> Result<ValidatedFilter, String> {
        let mut values = 0;
        let root = FilterValidator { declared_types: declared, value_count: &mut values }
            .validate_node(self, MAX_FILTER_DEPTH)?;
        Ok(ValidatedFilter { json: self.to_json(), root })
    }
}

/// A filter that fits the declared attributes.
#[derive(Debug)]
pub(crate) struct ValidatedFilter {
    json: String,
    pub(super) root: FilterNode,
}

#[derive(Debug)]
pub(super) enum FilterNode {
    And(Vec<FilterNode>),
    Or(Vec<FilterNode>),
    Not(Box<FilterNode>),
    Condition(FilterField, Predicate),
}

#[derive(Debug)]
pub(super) enum FilterField {
    Attribute(String, AttributeType),
    EventTime,
    EmbeddedAt,
}

#[derive(Debug)]
pub(super) enum Predicate {
    Exists,
    /// The value stands so to the literal.
    Compare(fn(Ordering) -> bool, Literal),
    In(Vec<Literal>),
    Prefix(String),
}

/// A value by its declared type.
#[derive(Debug, PartialEq, PartialOrd)]
pub(super) enum Literal {
    Text(String),
    Integer(i128),
    Number(f64),
    Boolean(bool),
    /// Microseconds since 1970.
    Time(i64),
}

struct FilterValidator<'a> {
    declared_types: &'a AttributeTypes,
    value_count: &'a mut usize,
}

impl FilterValidator<'_> {
    fn validate_node(&mut self, filter: &Filter, depth: usize) -> Result<FilterNode, String> {
        let below = depth.checked_sub(1).ok_or_else(|| {
            format!("`and`, `or` and `not` are nested deeper than {MAX_FILTER_DEPTH} times")
        })?;
        let mut nodes = |all: &[Filter], what: &str| {
            if all.is_empty() {
                return Err(format!("`{what}` is empty; name a condition"));
            }
            all.iter().map(|one| self.validate_node(one, below)).collect::<Result<Vec<_>, _>>()
        };
        match filter {
            Filter::And(all) => nodes(all, "and").map(FilterNode::And),
            Filter::Or(any) => nodes(any, "or").map(FilterNode::Or),
            Filter::Not(one) => Ok(FilterNode::Not(Box::new(self.validate_node(one, below)?))),
            Filter::Eq(terms) => {
                self.validate_terms("eq", terms, Self::comparison(Ordering::is_eq))
            }
            Filter::Ne(terms) => self.validate_terms("ne", terms, |check, name, value| {
                let term = Self::comparison(Ordering::is_eq)(check, name, value)?;
                Ok(FilterNode::Not(Box::new(term)))
            }),
            Filter::Lt(terms) => {
                self.validate_terms("lt", terms, Self::comparison(Ordering::is_lt))
            }
            Filter::Lte(terms) => {
                self.validate_terms("lte", terms, Self::comparison(Ordering::is_le))
            }
            Filter::Gt(terms) => {
                self.validate_terms("gt", terms, Self::comparison(Ordering::is_gt))
            }
            Filter::Gte(terms) => {
                self.validate_terms("gte", terms, Self::comparison(Ordering::is_ge))
            }
            Filter::In(terms) => self.validate_terms("in", terms, |check, name, values| {
                let field = check.resolve_field(name)?;
                if values.is_empty() {
                    return Err(format!("`in` names no value of {name}"));
                }
                let literals = values.iter().map(|value| check.parse_literal(name, &field, value));
                let literals = literals.collect::<Result<_, _>>()?;
                Ok(FilterNode::Condition(field, Predicate::In(literals)))
            }),
            Filter::Prefix(terms) => self.validate_terms("prefix", terms, |check, name, prefix| {
                let field = check.resolve_field(name)?;
                if !matches!(field, FilterField::Attribute(_, AttributeType::Text)) {
                    return Err(format!(
                        "`prefix` needs a text, and {name} is {}",
                        field_type(&field).description()
                    ));
                }
                check.count_value()?;
                Ok(FilterNode::Condition(field, Predicate::Prefix(prefix.clone())))
            }),
            Filter::Exists(name) => {
                self.count_value()?;
                Ok(FilterNode::Condition(self.resolve_field(name)?, Predicate::Exists))
            }
        }
    }

    /// All of the terms, each made by `one`.
    fn validate_terms<T>(
        &mut self,
        what: &str,
        terms: &BTreeMap<String, T>,
        one: impl Fn(&mut Self, &str, &T) -> Result<FilterNode, String>,
    ) -> Result<FilterNode, String> {
        if terms.is_empty() {
            return Err(format!("`{what}` is empty; name an attribute"));
        }
        let nodes = terms.iter().map(|(name, value)| one(self, name, value));
        Ok(FilterNode::And(nodes.collect::<Result<_, _>>()?))
    }

    fn comparison(
        holds: fn(Ordering) -> bool,
    ) -> impl Fn(&mut Self, &str, &Value) -> Result<FilterNode, String> {
        move |check, name, value| {
            let field = check.resolve_field(name)?;
            let literal = check.parse_literal(name, &field, value)?;
            Ok(FilterNode::Condition(field, Predicate::Compare(holds, literal)))
        }
    }

    fn count_value(&mut self) -> Result<(), String> {
        *self.value_count += 1;
        if *self.value_count > MAX_FILTER_VALUES {
            return Err(format!("compares with more than {MAX_FILTER_VALUES} values"));
        }
        Ok(())
    }

    fn resolve_field(&self, name: &str) -> Result<FilterField, String> {
        match (name, self.declared_types.get(name)) {
            (EVENT_TIME, _) => Ok(FilterField::EventTime),
            (EMBEDDED_AT, _) => Ok(FilterField::EmbeddedAt),
            (_, Some(kind)) => Ok(FilterField::Attribute(name.to_owned(), *kind)),
            (_, None) => {
                let known = self
                    .declared_types
                    .iter()
                    .map(|(name, kind)| format!("{name} ({})", kind.as_str()));
                let times = [EVENT_TIME, EMBEDDED_AT].map(|name| format!("{name} (time)"));
                let known = known.chain(times).collect::<Vec<_>>().join(", ");
                Err(format!(
                    "{name:?} is not a declared attribute; there are {known} ([attributes])"
                ))
            }
        }
    }

    fn parse_literal(
        &mut self,
        name: &str,
        field: &FilterField,
        value: &Value,
    ) -> Result<Literal, String> {
        self.count_value()?;
        let kind = field_type(field);
        let literal = match (kind, value) {
            (AttributeType::Text, Value::String(text)) => Some(Literal::Text(text.clone())),
            (AttributeType::Integer, Value::Number(number)) => {
                number.as_i128().map(Literal::Integer)
            }
            (AttributeType::Number, Value::Number(number)) => number.as_f64().map(Literal::Number),
            (AttributeType::Boolean, Value::Bool(value)) => Some(Literal::Boolean(*value)),
            (AttributeType::Time, Value::String(text)) => {
                parse_stored_value(AttributeType::Time, text)
            }
            _ => None,
        };
        literal.ok_or_else(|| format!("{name} is {}, and {value} is none", kind.description()))
    }
}

fn field_type(field: &FilterField) -> AttributeType {
    match field {
        FilterField::Attribute(_, kind) => *kind,
        FilterField::EventTime | FilterField::EmbeddedAt => AttributeType::Time,
    }
}

/// A stored text by its declared type; none where it is none, as after a change of the declaration.
pub(super) fn parse_stored_value(kind: AttributeType, text: &str) -> Option<Literal> {
    Some(match kind {
        AttributeType::Text => Literal::Text(text.to_owned()),
        AttributeType::Integer => Literal::Integer(text.parse().ok()?),
        AttributeType::Number => Literal::Number(text.parse().ok()?),
        AttributeType::Boolean => Literal::Boolean(text.parse().ok()?),
        AttributeType::Time => {
            Literal::Time(DateTime::parse_from_rfc3339(text).ok()?.timestamp_micros())
        }
    })
}

impl Predicate {
    pub(super) fn matches(&self, value: &Literal) -> bool {
        match self {
            Self::Exists => true,
            Self::Compare(holds, literal) => value.partial_cmp(literal).is_some_and(holds),
            Self::In(literals) => literals.contains(value),
            Self::Prefix(prefix) => matches!(value, Literal::Text(t) if t.starts_with(prefix)),
        }
    }
}

impl ValidatedFilter {
    /// As compact JSON.
    pub fn as_json(&self) -> &str {
        &self.json
    }
}
