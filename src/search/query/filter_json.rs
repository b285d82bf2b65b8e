//! Reads filters from JSON. Errors name the operators and what is wrong; the reader of the whole request
//! adds the position.

use std::collections::BTreeMap;
use std::fmt;
use std::marker::PhantomData;

use serde::de::{Deserialize, Deserializer, Error, MapAccess, Visitor};

use super::filter::Filter;

/// The operators, as messages list them.
const OPERATORS: &str = "and, or, not, eq, ne, lt, lte, gt, gte, in, prefix, has_item, exists";

struct FilterVisitor;

impl<'de> Deserialize<'de> for Filter {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_map(FilterVisitor)
    }
}

impl<'de> Visitor<'de> for FilterVisitor {
    type Value = Filter;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, r#"an object with one operator, such as {{"eq": {{NAME: VALUE}}}}"#)
    }

    fn visit_map<M: MapAccess<'de>>(self, mut map: M) -> Result<Filter, M::Error> {
        let Some(operator) = map.next_key::<String>()? else {
            return Err(M::Error::custom(format!(
                "the filter is empty; it is an object with one operator of {OPERATORS}"
            )));
        };
        let filter = match operator.as_str() {
            "and" => Filter::And(map.next_value()?),
            "or" => Filter::Or(map.next_value()?),
            "not" => Filter::Not(map.next_value()?),
            "eq" => Filter::Eq(next_terms(&mut map)?),
            "ne" => Filter::Ne(next_terms(&mut map)?),
            "lt" => Filter::Lt(next_terms(&mut map)?),
            "lte" => Filter::Lte(next_terms(&mut map)?),
            "gt" => Filter::Gt(next_terms(&mut map)?),
            "gte" => Filter::Gte(next_terms(&mut map)?),
            "in" => Filter::In(next_terms(&mut map)?),
            "prefix" => Filter::Prefix(next_terms(&mut map)?),
            "has_item" => Filter::HasItem(next_terms(&mut map)?),
            "exists" => Filter::Exists(map.next_value()?),
            _ => {
                return Err(M::Error::custom(format!(
                    "{operator:?} is not an operator of filters; there are {OPERATORS}"
                )));
            }
        };
        match map.next_key::<String>()? {
            None => Ok(filter),
            Some(second) => Err(M::Error::custom(format!(
                "a filter has one operator, and this one has {operator:?} and {second:?}; combine them as {{\"and\": [{{{operator:?}: …}}, {{{second:?}: …}}]}}"
            ))),
        }
    }
}

fn next_terms<'de, M: MapAccess<'de>, T: Deserialize<'de>>(
    map: &mut M,
) -> Result<BTreeMap<String, T>, M::Error> {
    map.next_value::<UniqueTerms<T>>().map(|terms| terms.0)
}

/// Attributes and what they are compared with; an attribute may occur once only.
struct UniqueTerms<T>(BTreeMap<String, T>);

struct TermsVisitor<T>(PhantomData<T>);

impl<'de, T: Deserialize<'de>> Deserialize<'de> for UniqueTerms<T> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_map(TermsVisitor(PhantomData))
    }
}

impl<'de, T: Deserialize<'de>> Visitor<'de> for TermsVisitor<T> {
    type Value = UniqueTerms<T>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an object of attributes and what they are compared with")
    }

    fn visit_map<M: MapAccess<'de>>(self, mut map: M) -> Result<UniqueTerms<T>, M::Error> {
        let mut terms = BTreeMap::new();
        while let Some((name, value)) = map.next_entry::<String, T>()? {
            if terms.contains_key(&name) {
                return Err(M::Error::custom(format!(
                    "{name:?} occurs twice in one comparison; combine two comparisons with `and`"
                )));
            }
            terms.insert(name, value);
        }
        Ok(UniqueTerms(terms))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn filters_that_are_none_are_refused_by_operator_and_position() {
        for (json, position, reason) in [
            ("{}", ".", "the filter is empty; it is an object with one operator of and, or, not"),
            ("[]", ".", "an object with one operator"),
            (r#"{"eqq":{"a":1}}"#, ".", r#""eqq" is not an operator of filters; there are and,"#),
            (r#"{"eq":{"a":1},"ne":{"a":2}}"#, ".", r#"{"and": [{"eq": …}, {"ne": …}]}"#),
            (r#"{"and":[{"eq":{"a":1}},{"not":{}}]}"#, "and[1].not", "the filter is empty"),
            (r#"{"or":[{"eq":{"a":1}},{"gt":3}]}"#, "or[1].gt", "an object of attributes"),
            (r#"{"in":{"a":3}}"#, "in.a", "a sequence"),
            (r#"{"eq":{"a":1,"b":2,"a":3}}"#, "eq", r#""a" occurs twice"#),
        ] {
            let mut deserializer = serde_json::Deserializer::from_str(json);
            let error =
                serde_path_to_error::deserialize::<_, Filter>(&mut deserializer).unwrap_err();
            assert_eq!(error.path().to_string(), position, "{json}: {error}");
            assert!(error.inner().to_string().contains(reason), "{json}: {error}");
            assert!(error.inner().is_data(), "{json}: answered with 422");
        }
    }

    #[test]
    fn every_operator_is_read_as_it_is_written() {
        let json = r#"{"and":[{"or":[{"eq":{"a":1}},{"ne":{"a":"b","c":true}}]},{"not":{"lt":{"a":1}}},{"lte":{"a":1}},{"gt":{"a":1.5}},{"gte":{"a":1}},{"in":{"a":[1,2]}},{"prefix":{"a":"b"}},{"has_item":{"a":"b"}},{"exists":"a"}]}"#;
        let filter: Filter = serde_json::from_str(json).unwrap();
        assert_eq!(serde_json::to_string(&filter).unwrap(), json);
        for operator in OPERATORS.split(", ") {
            assert!(json.contains(&format!("{{\"{operator}\":")), "{operator}");
        }
    }
}
