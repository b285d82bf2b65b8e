//! Filters on declared attributes and times, and their validation.

use std::cmp::Ordering;
use std::collections::BTreeMap;

use chrono::DateTime;
use schemars::JsonSchema;
use serde::Serialize;
use serde_json::Value;

use crate::record::{AttributeType, AttributeTypes, LIST_SEPARATOR, whole_number};

/// Deepest nesting of `and`, `or` and `not`.
const MAX_FILTER_DEPTH: usize = 8;
/// Maximum number of values that a filter compares with.
const MAX_FILTER_VALUES: usize = 256;

/// Field of the time at which the change happened, if its event said so.
const EVENT_TIME: &str = "event_time";
/// Field of the time at which the image was embedded.
const EMBEDDED_AT: &str = "embedded_at";

/// Condition that an image must fulfil. A comparison maps attributes to values; if it names several
/// attributes, all must hold. An image that lacks an attribute fulfils `ne` and no other comparison.
/// `event_time` and `embedded_at` can be used in addition to the declared attributes.
#[derive(Debug, Clone, PartialEq, Serialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Filter {
    /// All of the conditions hold.
    And(Vec<Filter>),
    /// At least one of the conditions holds.
    Or(Vec<Filter>),
    /// The condition does not hold.
    Not(Box<Filter>),
    /// The attribute equals the value.
    Eq(BTreeMap<String, Value>),
    /// The attribute has another value, or is missing.
    Ne(BTreeMap<String, Value>),
    /// The attribute is less than the value.
    Lt(BTreeMap<String, Value>),
    /// The attribute is less than or equal to the value.
    Lte(BTreeMap<String, Value>),
    /// The attribute is greater than the value.
    Gt(BTreeMap<String, Value>),
    /// The attribute is greater than or equal to the value.
    Gte(BTreeMap<String, Value>),
    /// The attribute equals one of the values.
    In(BTreeMap<String, Vec<Value>>),
    /// The text attribute begins with the value.
    Prefix(BTreeMap<String, String>),
    /// The text attribute is a list separated by semicolons, and the value is one of its items.
    HasItem(BTreeMap<String, String>),
    /// The image has the attribute.
    Exists(String),
}

impl Filter {
    /// Returns compact JSON, which is the same for equal filters.
    fn to_json(&self) -> String {
        serde_json::to_string(self).unwrap_or_default()
    }

    /// Returns whether every image that fulfils this filter has this value of the attribute. Returns
    /// false if that does not follow from the filter alone.
    pub fn implies(&self, attribute: &str, value: &str) -> bool {
        // Attributes are stored as text.
        let is_value = |literal: &Value| match literal {
            Value::String(text) => text == value,
            other => format!("{other}") == value,
        };
        match self {
            Self::And(nodes) => nodes.iter().any(|node| node.implies(attribute, value)),
            Self::Or(nodes) => {
                !nodes.is_empty() && nodes.iter().all(|node| node.implies(attribute, value))
            }
            Self::Eq(terms) => terms.get(attribute).is_some_and(is_value),
            Self::In(terms) => terms
                .get(attribute)
                .is_some_and(|values| !values.is_empty() && values.iter().all(is_value)),
            _ => false,
        }
    }

    /// Validates the filter against the declared attributes. The error says what is invalid and what
    /// would be valid.
    pub(crate) fn validate(&self, declared: &AttributeTypes) -> Result<ValidatedFilter, String> {
        let mut value_count = 0;
        let root = FilterValidator { declared_types: declared, value_count: &mut value_count }
            .resolve_node(self, MAX_FILTER_DEPTH)?;
        Ok(ValidatedFilter { json: self.to_json(), root })
    }
}

/// A filter whose attributes are declared and whose values have their types.
#[derive(Debug)]
pub(crate) struct ValidatedFilter {
    /// Compact JSON of the filter, which identifies it in the cache and in cursors.
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
    /// The ordering of the stored value relative to the literal fulfils the function.
    Compare(fn(Ordering) -> bool, Literal),
    In(Vec<Literal>),
    Prefix(String),
    HasItem(String),
}

/// A value in its declared type.
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
    fn resolve_node(&mut self, filter: &Filter, depth: usize) -> Result<FilterNode, String> {
        let inner_depth = depth.checked_sub(1).ok_or_else(|| {
            format!("`and`, `or` and `not` are nested deeper than {MAX_FILTER_DEPTH} times")
        })?;
        let mut validate_all = |filters: &[Filter], operator: &str| {
            if filters.is_empty() {
                return Err(format!("`{operator}` is empty; name a condition"));
            }
            let nodes = filters.iter().map(|filter| self.resolve_node(filter, inner_depth));
            nodes.collect::<Result<Vec<_>, _>>()
        };
        match filter {
            Filter::And(filters) => validate_all(filters, "and").map(FilterNode::And),
            Filter::Or(filters) => validate_all(filters, "or").map(FilterNode::Or),
            Filter::Not(filter) => {
                Ok(FilterNode::Not(Box::new(self.resolve_node(filter, inner_depth)?)))
            }
            Filter::Eq(terms) => {
                self.resolve_terms("eq", terms, Self::comparison_resolver(Ordering::is_eq))
            }
            Filter::Ne(terms) => self.resolve_terms("ne", terms, |validator, name, value| {
                let equal = Self::comparison_resolver(Ordering::is_eq)(validator, name, value)?;
                Ok(FilterNode::Not(Box::new(equal)))
            }),
            Filter::Lt(terms) => {
                self.resolve_terms("lt", terms, Self::comparison_resolver(Ordering::is_lt))
            }
            Filter::Lte(terms) => {
                self.resolve_terms("lte", terms, Self::comparison_resolver(Ordering::is_le))
            }
            Filter::Gt(terms) => {
                self.resolve_terms("gt", terms, Self::comparison_resolver(Ordering::is_gt))
            }
            Filter::Gte(terms) => {
                self.resolve_terms("gte", terms, Self::comparison_resolver(Ordering::is_ge))
            }
            Filter::In(terms) => self.resolve_terms("in", terms, |validator, name, values| {
                let field = validator.resolve_field(name)?;
                if values.is_empty() {
                    return Err(format!("`in` has no values for {name}"));
                }
                let literals =
                    values.iter().map(|value| validator.parse_literal(name, &field, value));
                let literals = literals.collect::<Result<_, _>>()?;
                Ok(FilterNode::Condition(field, Predicate::In(literals)))
            }),
            Filter::Prefix(terms) => {
                self.resolve_terms("prefix", terms, |validator, name, prefix| {
                    let field = validator.resolve_text_field("prefix", name)?;
                    Ok(FilterNode::Condition(field, Predicate::Prefix(prefix.clone())))
                })
            }
            Filter::HasItem(terms) => {
                self.resolve_terms("has_item", terms, |validator, name, item| {
                    let field = validator.resolve_text_field("has_item", name)?;
                    let item = item.trim();
                    if item.is_empty() || item.contains(LIST_SEPARATOR) {
                        return Err(format!(
                            "`has_item` needs one item of {name}, but {item:?} is none; for several, use `and` or `or`"
                        ));
                    }
                    Ok(FilterNode::Condition(field, Predicate::HasItem(item.to_owned())))
                })
            }
            Filter::Exists(name) => {
                self.count_value()?;
                Ok(FilterNode::Condition(self.resolve_field(name)?, Predicate::Exists))
            }
        }
    }

    /// Requires all terms of the comparison `operator`, each validated by `validate_term`.
    fn resolve_terms<T>(
        &mut self,
        operator: &str,
        terms: &BTreeMap<String, T>,
        validate_term: impl Fn(&mut Self, &str, &T) -> Result<FilterNode, String>,
    ) -> Result<FilterNode, String> {
        if terms.is_empty() {
            return Err(format!("`{operator}` is empty; name an attribute"));
        }
        let nodes = terms.iter().map(|(name, value)| validate_term(self, name, value));
        Ok(FilterNode::And(nodes.collect::<Result<_, _>>()?))
    }

    /// Returns a function that validates one term of a comparison.
    fn comparison_resolver(
        holds: fn(Ordering) -> bool,
    ) -> impl Fn(&mut Self, &str, &Value) -> Result<FilterNode, String> {
        move |validator, name, value| {
            let field = validator.resolve_field(name)?;
            let literal = validator.parse_literal(name, &field, value)?;
            Ok(FilterNode::Condition(field, Predicate::Compare(holds, literal)))
        }
    }

    /// Counts one value towards [`MAX_FILTER_VALUES`].
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
            (_, Some(declared)) => Ok(FilterField::Attribute(name.to_owned(), *declared)),
            (_, None) => {
                let declared = self
                    .declared_types
                    .iter()
                    .map(|(name, declared)| format!("{name} ({})", declared.as_str()));
                let times = [EVENT_TIME, EMBEDDED_AT].map(|name| format!("{name} (time)"));
                let fields = declared.chain(times).collect::<Vec<_>>().join(", ");
                Err(format!(
                    "{name:?} is not a declared attribute; there are {fields} ([attributes])"
                ))
            }
        }
    }

    /// Counts one value, and returns the field that `operator` compares with it, which must be a text.
    fn resolve_text_field(&mut self, operator: &str, name: &str) -> Result<FilterField, String> {
        self.count_value()?;
        let field = self.resolve_field(name)?;
        if matches!(field, FilterField::Attribute(_, AttributeType::Text)) {
            return Ok(field);
        }
        let description = field_type(&field).description();
        Err(format!("`{operator}` needs a text, but {name} is {description}"))
    }

    /// Reads a value of the filter in the type of its field.
    fn parse_literal(
        &mut self,
        name: &str,
        field: &FilterField,
        value: &Value,
    ) -> Result<Literal, String> {
        self.count_value()?;
        let declared = field_type(field);
        let literal = match (declared, value) {
            (AttributeType::Text, Value::String(text)) => Some(Literal::Text(text.clone())),
            (AttributeType::Integer, Value::Number(number)) => {
                whole_number(number).map(Literal::Integer)
            }
            (AttributeType::Number, Value::Number(number)) => number.as_f64().map(Literal::Number),
            (AttributeType::Boolean, Value::Bool(value)) => Some(Literal::Boolean(*value)),
            (AttributeType::Time, Value::String(text)) => {
                parse_stored_value(AttributeType::Time, text)
            }
            _ => None,
        };
        literal.ok_or_else(|| format!("{name} is {}, but {value} is not", declared.description()))
    }
}

fn field_type(field: &FilterField) -> AttributeType {
    match field {
        FilterField::Attribute(_, declared) => *declared,
        FilterField::EventTime | FilterField::EmbeddedAt => AttributeType::Time,
    }
}

/// Reads a stored text in its declared type. Returns `None` if it does not have that type, which
/// happens if the declaration has changed.
pub(super) fn parse_stored_value(declared: AttributeType, text: &str) -> Option<Literal> {
    Some(match declared {
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
            Self::HasItem(item) => {
                matches!(value, Literal::Text(t) if t.split(LIST_SEPARATOR).any(|one| one.trim() == item))
            }
        }
    }
}

impl ValidatedFilter {
    /// Returns compact JSON, which is the same for equal filters.
    pub fn as_json(&self) -> &str {
        &self.json
    }
}
