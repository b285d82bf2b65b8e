//! Queries of an evaluation with what is known of their right answers.

use std::collections::BTreeMap;

use serde::Serialize;
use sha2::{Digest, Sha256};

use crate::record::{ImageId, to_hex};

/// Maximum number of queries in one evaluation. Each is ranked under every configuration.
pub const MAX_QUERIES: usize = 20_000;

/// A query with what is known of its right answers.
#[derive(Debug, Clone, PartialEq)]
pub struct JudgedQuery {
    /// The text that a user types.
    pub text: String,
    /// The group in which the query is also measured separately; `None` if it belongs to no group.
    pub group: Option<String>,
    /// What is known of its right answers.
    pub judgements: Judgements,
}

/// What is known of a query's right answers.
#[derive(Debug, Clone, PartialEq)]
pub enum Judgements {
    /// Nothing is known.
    Unjudged,
    /// No image of the catalogue matches.
    NoMatch,
    /// Some images were graded.
    Graded {
        /// Grade of each judged image: 0 is wrong, above 0 is right, and a higher grade is a better
        /// answer.
        grades: BTreeMap<ImageId, f64>,
        /// Whether only the judged images are ranked, because it is not known whether the others
        /// are right ("condensed lists"; Sakai, SIGIR 2007). If false, all others count as wrong.
        judged_only: bool,
    },
}

/// A query as it is hashed. The field names and their order are part of every fingerprint: changing
/// them gives all stored reports another fingerprint.
#[derive(Serialize)]
struct FingerprintLine<'a> {
    text: &'a str,
    group: Option<&'a str>,
    /// `null` for an unjudged query, empty if no image matches.
    relevant: Option<&'a BTreeMap<ImageId, f64>>,
    judged_only: bool,
}

/// Returns the SHA-256 over texts, groups and judgements in hexadecimal: one line of JSON per
/// query, in the given order.
pub fn fingerprint_queries(queries: &[JudgedQuery]) -> String {
    let no_grades = BTreeMap::new();
    let mut hasher = Sha256::new();
    for query in queries {
        let (relevant, judged_only) = match &query.judgements {
            Judgements::Unjudged => (None, false),
            Judgements::NoMatch => (Some(&no_grades), false),
            Judgements::Graded { grades, judged_only } => (Some(grades), *judged_only),
        };
        let group = query.group.as_deref();
        let line = FingerprintLine { text: &query.text, group, relevant, judged_only };
        // Strings, finite numbers and a map with string keys always serialise.
        hasher.update(serde_json::to_vec(&line).unwrap_or_default());
        hasher.update(b"\n");
    }
    to_hex(&hasher.finalize())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn graded(pairs: &[(&str, f64)], judged_only: bool) -> Judgements {
        let grades = pairs.iter().map(|(id, grade)| (ImageId::new(id).unwrap(), *grade)).collect();
        Judgements::Graded { grades, judged_only }
    }

    #[test]
    fn the_fingerprint_of_queries_is_the_same_in_every_version() {
        let query = |text: &str, group: Option<&str>, judgements| JudgedQuery {
            text: text.into(),
            group: group.map(Into::into),
            judgements,
        };
        let queries = [
            query("a red mug", Some("mugs"), graded(&[("1", 1.0), ("2", 0.5)], false)),
            query("a ü hat", None, graded(&[("3", 0.0)], true)),
            query("taxes", None, Judgements::NoMatch),
            query("a \"blue\" shoe", None, Judgements::Unjudged),
        ];
        // sha256sum of these lines, each ended by a newline:
        // {"text":"a red mug","group":"mugs","relevant":{"1":1.0,"2":0.5},"judged_only":false}
        // {"text":"a ü hat","group":null,"relevant":{"3":0.0},"judged_only":true}
        // {"text":"taxes","group":null,"relevant":{},"judged_only":false}
        // {"text":"a \"blue\" shoe","group":null,"relevant":null,"judged_only":false}
        assert_eq!(
            fingerprint_queries(&queries),
            "46290bbb1a89d0232ada760b1f8f748c75e4ab07a0b269a140b8c47a7e6ba512"
        );
        assert_ne!(fingerprint_queries(&queries), fingerprint_queries(&queries[..3]));
        assert_ne!(
            fingerprint_queries(&queries[2..3]),
            fingerprint_queries(&[query("taxes", None, Judgements::Unjudged)])
        );
    }
}
