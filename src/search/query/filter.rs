//! Which images may be found, by their declared attributes and times.
//!
//! A filter is evaluated once for each different value of an attribute in a chunk, then looked up for
//! each row, and becomes a bitmap. Bitmaps of recent filters are kept for each chunk: chunks never
//! change, so a commit costs those of its own rows.

use std::cmp::Ordering;
use std::collections::{BTreeMap, VecDeque};
use std::sync::{Arc, Mutex, PoisonError, Weak};

use chrono::DateTime;
use rayon::prelude::*;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::record::{AttributeType, AttributeTypes};
use crate::search::snapshot::Snapshot;
use crate::search::snapshot::chunk::{Body, Column, GROUP};

/// Deepest nesting of `and`, `or` and `not`.
const MAX_DEPTH: usize = 8;
/// Most values that a filter compares with.
const MAX_VALUES: usize = 256;
/// Filters whose bitmaps are kept: an eighth of a byte an image each.
const KEPT: usize = 32;

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
    fn text(&self) -> String {
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
    pub(crate) fn check(&self, declared: &AttributeTypes) -> Result<Checked, String> {
        let mut values = 0;
        let root = Check { declared, values: &mut values }.node(self, MAX_DEPTH)?;
        Ok(Checked { text: self.text(), root })
    }
}

/// A filter that fits the declared attributes.
#[derive(Debug)]
pub(crate) struct Checked {
    text: String,
    root: Node,
}

#[derive(Debug)]
enum Node {
    And(Vec<Node>),
    Or(Vec<Node>),
    Not(Box<Node>),
    Term(Field, Test),
}

#[derive(Debug)]
enum Field {
    Attribute(String, AttributeType),
    EventTime,
    EmbeddedAt,
}

#[derive(Debug)]
enum Test {
    Exists,
    /// The value stands so to the literal.
    Is(fn(Ordering) -> bool, Literal),
    In(Vec<Literal>),
    Prefix(String),
}

/// A value by its declared type.
#[derive(Debug, PartialEq, PartialOrd)]
enum Literal {
    Text(String),
    Integer(i128),
    Number(f64),
    Boolean(bool),
    /// Microseconds since 1970.
    Time(i64),
}

struct Check<'a> {
    declared: &'a AttributeTypes,
    values: &'a mut usize,
}

impl Check<'_> {
    fn node(&mut self, filter: &Filter, depth: usize) -> Result<Node, String> {
        let below = depth.checked_sub(1).ok_or_else(|| {
            format!("`and`, `or` and `not` are nested deeper than {MAX_DEPTH} times")
        })?;
        let mut nodes = |all: &[Filter], what: &str| {
            if all.is_empty() {
                return Err(format!("`{what}` is empty; name a condition"));
            }
            all.iter().map(|one| self.node(one, below)).collect::<Result<Vec<_>, _>>()
        };
        match filter {
            Filter::And(all) => nodes(all, "and").map(Node::And),
            Filter::Or(any) => nodes(any, "or").map(Node::Or),
            Filter::Not(one) => Ok(Node::Not(Box::new(self.node(one, below)?))),
            Filter::Eq(terms) => self.terms("eq", terms, Self::is(Ordering::is_eq)),
            Filter::Ne(terms) => self.terms("ne", terms, |check, name, value| {
                let term = Self::is(Ordering::is_eq)(check, name, value)?;
                Ok(Node::Not(Box::new(term)))
            }),
            Filter::Lt(terms) => self.terms("lt", terms, Self::is(Ordering::is_lt)),
            Filter::Lte(terms) => self.terms("lte", terms, Self::is(Ordering::is_le)),
            Filter::Gt(terms) => self.terms("gt", terms, Self::is(Ordering::is_gt)),
            Filter::Gte(terms) => self.terms("gte", terms, Self::is(Ordering::is_ge)),
            Filter::In(terms) => self.terms("in", terms, |check, name, values| {
                let field = check.field(name)?;
                if values.is_empty() {
                    return Err(format!("`in` names no value of {name}"));
                }
                let literals = values.iter().map(|value| check.literal(name, &field, value));
                let literals = literals.collect::<Result<_, _>>()?;
                Ok(Node::Term(field, Test::In(literals)))
            }),
            Filter::Prefix(terms) => self.terms("prefix", terms, |check, name, prefix| {
                let field = check.field(name)?;
                if !matches!(field, Field::Attribute(_, AttributeType::Text)) {
                    return Err(format!(
                        "`prefix` needs a text, and {name} is {}",
                        kind(&field).described()
                    ));
                }
                check.count()?;
                Ok(Node::Term(field, Test::Prefix(prefix.clone())))
            }),
            Filter::Exists(name) => {
                self.count()?;
                Ok(Node::Term(self.field(name)?, Test::Exists))
            }
        }
    }

    /// All of the terms, each made by `one`.
    fn terms<T>(
        &mut self,
        what: &str,
        terms: &BTreeMap<String, T>,
        one: impl Fn(&mut Self, &str, &T) -> Result<Node, String>,
    ) -> Result<Node, String> {
        if terms.is_empty() {
            return Err(format!("`{what}` is empty; name an attribute"));
        }
        let nodes = terms.iter().map(|(name, value)| one(self, name, value));
        Ok(Node::And(nodes.collect::<Result<_, _>>()?))
    }

    fn is(holds: fn(Ordering) -> bool) -> impl Fn(&mut Self, &str, &Value) -> Result<Node, String> {
        move |check, name, value| {
            let field = check.field(name)?;
            let literal = check.literal(name, &field, value)?;
            Ok(Node::Term(field, Test::Is(holds, literal)))
        }
    }

    fn count(&mut self) -> Result<(), String> {
        *self.values += 1;
        if *self.values > MAX_VALUES {
            return Err(format!("compares with more than {MAX_VALUES} values"));
        }
        Ok(())
    }

    fn field(&self, name: &str) -> Result<Field, String> {
        match (name, self.declared.get(name)) {
            (EVENT_TIME, _) => Ok(Field::EventTime),
            (EMBEDDED_AT, _) => Ok(Field::EmbeddedAt),
            (_, Some(kind)) => Ok(Field::Attribute(name.to_owned(), *kind)),
            (_, None) => {
                let known =
                    self.declared.iter().map(|(name, kind)| format!("{name} ({})", kind.name()));
                let times = [EVENT_TIME, EMBEDDED_AT].map(|name| format!("{name} (time)"));
                let known = known.chain(times).collect::<Vec<_>>().join(", ");
                Err(format!(
                    "{name:?} is not a declared attribute; there are {known} ([attributes])"
                ))
            }
        }
    }

    fn literal(&mut self, name: &str, field: &Field, value: &Value) -> Result<Literal, String> {
        self.count()?;
        let kind = kind(field);
        let literal = match (kind, value) {
            (AttributeType::Text, Value::String(text)) => Some(Literal::Text(text.clone())),
            (AttributeType::Integer, Value::Number(number)) => {
                number.as_i128().map(Literal::Integer)
            }
            (AttributeType::Number, Value::Number(number)) => number.as_f64().map(Literal::Number),
            (AttributeType::Boolean, Value::Bool(value)) => Some(Literal::Boolean(*value)),
            (AttributeType::Time, Value::String(text)) => stored(AttributeType::Time, text),
            _ => None,
        };
        literal.ok_or_else(|| format!("{name} is {}, and {value} is none", kind.described()))
    }
}

fn kind(field: &Field) -> AttributeType {
    match field {
        Field::Attribute(_, kind) => *kind,
        Field::EventTime | Field::EmbeddedAt => AttributeType::Time,
    }
}

/// A stored text by its declared type; none where it is none, as after a change of the declaration.
fn stored(kind: AttributeType, text: &str) -> Option<Literal> {
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

impl Test {
    fn holds(&self, value: &Literal) -> bool {
        match self {
            Self::Exists => true,
            Self::Is(holds, literal) => value.partial_cmp(literal).is_some_and(holds),
            Self::In(literals) => literals.contains(value),
            Self::Prefix(prefix) => matches!(value, Literal::Text(t) if t.starts_with(prefix)),
        }
    }
}

impl Checked {
    /// As compact JSON.
    pub fn text(&self) -> &str {
        &self.text
    }
}

impl Node {
    /// A bit a row of `body`, set where this holds; what stands beyond the rows means nothing.
    fn words(&self, body: &Body) -> Vec<u64> {
        let fold = |nodes: &[Self], with: fn(u64, u64) -> u64| {
            let words = nodes.iter().map(|node| node.words(body));
            words.reduce(|a, b| a.iter().zip(&b).map(|(a, b)| with(*a, *b)).collect())
        };
        match self {
            Self::And(all) => fold(all, |a, b| a & b).unwrap_or_default(),
            Self::Or(any) => fold(any, |a, b| a | b).unwrap_or_default(),
            Self::Not(one) => one.words(body).into_iter().map(|word| !word).collect(),
            Self::Term(Field::Attribute(name, kind), test) => match body.attributes.get(name) {
                Some(column) => of_column(column, *kind, test),
                None => vec![0; body.len.div_ceil(GROUP)],
            },
            Self::Term(Field::EventTime, test) => of_times(&body.event_times, test),
            Self::Term(Field::EmbeddedAt, test) => of_times(&body.embedded_at, test),
        }
    }
}

fn of_column(column: &Column, kind: AttributeType, test: &Test) -> Vec<u64> {
    let holds = |text: &str| stored(kind, text).is_some_and(|value| test.holds(&value));
    let by_value: Vec<bool> =
        (0..column.values.len()).map(|i| holds(column.values.get(i))).collect();
    // A missing value's code is beyond all values.
    pack(&column.codes, |code| by_value.get(*code as usize).copied().unwrap_or(false))
}

fn of_times(times: &[i64], test: &Test) -> Vec<u64> {
    pack(times, |time| *time != Body::NO_TIME && test.holds(&Literal::Time(*time)))
}

fn pack<T>(rows: &[T], holds: impl Fn(&T) -> bool) -> Vec<u64> {
    let word = |group: &[T]| {
        group.iter().enumerate().fold(0, |word, (i, row)| word | u64::from(holds(row)) << i)
    };
    rows.chunks(GROUP).map(word).collect()
}

/// A bitmap of a chunk's rows.
type Words = (Weak<Body>, Arc<[u64]>);

/// Bitmaps of recent filters.
#[derive(Debug, Default)]
pub(crate) struct Masks {
    /// The last used at the end.
    kept: Mutex<VecDeque<(String, Vec<Words>)>>,
}

impl Masks {
    /// The live rows of `snapshot` that `filter` lets through, a word a group over all chunks.
    pub fn of(&self, filter: &Checked, snapshot: &Snapshot) -> Vec<u64> {
        let kept = || self.kept.lock().unwrap_or_else(PoisonError::into_inner);
        let known = kept().iter().find(|(text, _)| *text == filter.text).map(|(_, w)| w.clone());
        let known = known.unwrap_or_default();
        let words = |body: &Arc<Body>| {
            let same = |(other, _): &&Words| other.as_ptr() == Arc::as_ptr(body);
            known
                .iter()
                .find(same)
                .map_or_else(|| filter.root.words(body).into(), |(_, w)| w.clone())
        };
        let all: Vec<Words> = snapshot
            .chunks
            .par_iter()
            .map(|chunk| (Arc::downgrade(&chunk.body), words(&chunk.body)))
            .collect();
        let chunks = snapshot.chunks.iter().zip(&all);
        let mask = chunks
            .flat_map(|(chunk, (_, words))| chunk.live.iter().zip(&**words).map(|(a, b)| a & b))
            .collect();
        let mut kept = kept();
        kept.retain(|(text, _)| *text != filter.text);
        if kept.len() >= KEPT {
            kept.pop_front();
        }
        kept.push_back((filter.text.clone(), all));
        mask
    }
}
