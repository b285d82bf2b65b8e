//! Closed reading of a checkpoint's JSON files: each key is obeyed, known to change no embedding, or
//! refused; a key that nobody knows is listed.

use serde_json::{Map, Value};

/// Longest value of a key that an error message repeats, in characters.
const MAX_SHOWN_VALUE_CHARS: usize = 80;

/// What is known of a key.
#[derive(Debug, Clone, Copy)]
pub enum KeyRule {
    /// It is read, and embeddings follow it.
    Obeyed,
    /// It changes no embedding.
    Harmless,
    /// It is computed as one of these values, given as JSON, says; any other value is refused. `null`
    /// is the same as a missing key.
    OneOf(&'static [&'static str]),
}

/// Known keys of one object, in parts that objects share.
pub type KeyTable = &'static [&'static [(&'static str, KeyRule)]];

/// The keys of a checkpoint's files, as `file:path.of.key`, and what became of them.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct KeyReport {
    /// Keys that embeddings follow.
    pub obeyed: Vec<String>,
    /// Keys that change no embedding, and unknown ones.
    pub ignored: Vec<String>,
    /// Those of `ignored` that are unknown here. The reference ignores them too.
    pub unknown: Vec<String>,
}

impl KeyReport {
    /// Files the keys of `object`, which is at `path` in `file`. The error names the first key whose
    /// value is refused.
    pub fn check(
        &mut self,
        file: &str,
        path: &str,
        object: &Map<String, Value>,
        table: KeyTable,
    ) -> Result<(), String> {
        for (key, value) in object {
            let name = if path.is_empty() { key.clone() } else { format!("{path}.{key}") };
            let mut known = table.iter().copied().flatten();
            match known.find(|(known, _)| known == key).map(|(_, rule)| rule) {
                Some(KeyRule::Obeyed) => self.obeyed.push(format!("{file}:{name}")),
                Some(KeyRule::OneOf(accepted)) if is_one_of(value, accepted) => {
                    self.obeyed.push(format!("{file}:{name}"));
                }
                Some(KeyRule::OneOf(accepted)) => return Err(refuse(&name, value, accepted)),
                Some(KeyRule::Harmless) => self.ignored.push(format!("{file}:{name}")),
                None => {
                    self.ignored.push(format!("{file}:{name}"));
                    self.unknown.push(format!("{file}:{name}"));
                }
            }
        }
        Ok(())
    }
}

fn is_one_of(value: &Value, accepted: &[&str]) -> bool {
    let equals = |accepted: &&str| match serde_json::from_str::<Value>(accepted) {
        Ok(Value::Number(number)) => value.as_f64() == number.as_f64(),
        Ok(accepted) => accepted == *value,
        Err(_) => false,
    };
    value.is_null() || accepted.iter().any(equals)
}

fn refuse(name: &str, value: &Value, accepted: &[&str]) -> String {
    let value = show_value(value);
    match accepted {
        [] => format!("{name} is {value}, which is not supported: only a checkpoint without it is"),
        [one] => format!("{name} is {value}, which is not supported; it can only be {one}"),
        several => {
            format!("{name} is {value}, which is not supported; it can be {}", several.join(" or "))
        }
    }
}

/// Returns `value` as JSON, shortened for a message.
pub fn show_value(value: &Value) -> String {
    let text = value.to_string();
    match text.char_indices().nth(MAX_SHOWN_VALUE_CHARS) {
        Some((end, _)) => format!("{}…", &text[..end]),
        None => text,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TABLE: KeyTable = &[
        &[("width", KeyRule::Obeyed), ("note", KeyRule::Harmless)],
        &[("do_flip", KeyRule::OneOf(&["false"])), ("size", KeyRule::OneOf(&["1", "{}"]))],
    ];

    fn check(written: &str) -> Result<KeyReport, String> {
        let mut report = KeyReport::default();
        let object: Map<String, Value> = serde_json::from_str(written).unwrap();
        report.check("a.json", "inner", &object, TABLE).map(|()| report)
    }

    #[test]
    fn every_key_is_obeyed_ignored_or_refused_by_name() {
        let report =
            check(r#"{"width": 3, "note": 1, "other": [], "do_flip": false, "size": 1.0}"#);
        let report = report.unwrap();
        assert_eq!(
            report.obeyed,
            ["a.json:inner.width", "a.json:inner.do_flip", "a.json:inner.size"]
        );
        assert_eq!(report.ignored, ["a.json:inner.note", "a.json:inner.other"]);
        assert_eq!(report.unknown, ["a.json:inner.other"]);
        assert!(check(r#"{"do_flip": null, "size": {}}"#).is_ok());
        let error = check(r#"{"do_flip": true}"#).unwrap_err();
        assert!(error.contains("inner.do_flip is true"), "{error}");
        let long = format!(r#"{{"size": "{}"}}"#, "x".repeat(1000));
        assert!(check(&long).unwrap_err().len() < 300);
    }
}
