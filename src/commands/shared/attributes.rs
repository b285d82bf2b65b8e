//! Attributes of images given as arguments: `--attribute NAME=VALUE`.

use std::collections::BTreeMap;

use serde_json::Value;

use super::error::CommandError;
use crate::config::Config;
use crate::ingest::source::canonical_attribute_text;
use crate::record::AttributeType;

/// Parses `NAME=VALUE`.
pub fn parse_name_value(text: &str) -> Result<(String, String), String> {
    let pair = text.split_once('=').filter(|(name, _)| !name.is_empty());
    let (name, value) = pair.ok_or_else(|| format!("{text:?} is not NAME=VALUE"))?;
    Ok((name.to_owned(), value.to_owned()))
}

/// Parses attribute values as their declared types. Undeclared attributes are an error: every worker
/// would ignore them.
pub fn parse_attributes(
    given: &[(String, String)],
    config: &Config,
) -> Result<BTreeMap<String, Value>, CommandError> {
    let mut attributes = BTreeMap::new();
    for (name, text) in given {
        let attribute_type = config.attributes.get(name).ok_or_else(|| {
            CommandError::usage(format!(
                "--attribute {name}: is not declared; add it to [attributes] in the configuration"
            ))
        })?;
        let value = match attribute_type {
            AttributeType::Text | AttributeType::Time => Some(Value::String(text.clone())),
            _ => serde_json::from_str(text).ok(),
        };
        let value = value
            .filter(|value| canonical_attribute_text(*attribute_type, value).is_some())
            .ok_or_else(|| {
                let description = attribute_type.description();
                CommandError::usage(format!(
                    "--attribute {name}: {text:?} is not {description}, as declared"
                ))
            })?;
        attributes.insert(name.clone(), value);
    }
    Ok(attributes)
}
