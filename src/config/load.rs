//! Reads the configuration file and the environment, and collects every problem.

use std::fmt::Write as _;
use std::path::Path;

use serde_path_to_error::Segment;
use toml::{Table, Value};

use super::Config;
use super::secrets::SECRET_MAPS;
use crate::diagnosis::redact::{is_secret_name, redact, register_secrets};

/// Prefix of environment variables: `BSAP_<SECTION>__<KEY>`.
const ENV_PREFIX: &str = "BSAP_";
/// Reading stops after so many problems: the file is hardly a configuration of this program.
const MAX_REPORTED_PROBLEMS: usize = 100;

/// An invalid configuration, with all of its problems.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{}", format_problems(.source_name, .problems))]
pub struct ConfigError {
    /// Path of the file, or `defaults and environment`.
    pub source_name: String,
    /// One line per problem, starting with the key.
    pub problems: Vec<String>,
}

fn format_problems(source: &str, problems: &[String]) -> String {
    let mut text = match problems.len() {
        1 => format!("the configuration ({source}) has a problem:"),
        n => format!("the configuration ({source}) has {n} problems:"),
    };
    for problem in problems {
        // Writing to a string cannot fail.
        let _ = write!(text, "\n  {problem}");
    }
    text
}

/// Reads `file` (the defaults if it is `None`), overrides it by `environment`, and validates all
/// values.
///
/// A variable that starts with `BSAP_` and contains `__` sets a key: `BSAP_KAFKA__BROKERS` is
/// `kafka.brokers`, `BSAP_KAFKA__PROPERTIES__SASL_PASSWORD` is `kafka.properties."sasl.password"`.
/// A list is written `a, b` or `["a", "b"]`.
pub fn load_valid_config(
    file: Option<&Path>,
    environment: impl IntoIterator<Item = (String, String)>,
) -> Result<Config, ConfigError> {
    match load_valid_part(file, environment)? {
        (config, problems) if problems.is_empty() => Ok(config),
        (_, problems) => Err(ConfigError { source_name: describe_source(file), problems }),
    }
}

/// Does the same as [`load_valid_config`], but returns the valid part of an invalid configuration with its
/// problems. Only a file that cannot be read or is not TOML is an error.
pub fn load_valid_part(
    file: Option<&Path>,
    environment: impl IntoIterator<Item = (String, String)>,
) -> Result<(Config, Vec<String>), ConfigError> {
    let error = |problems| ConfigError { source_name: describe_source(file), problems };
    let mut table = match file {
        None => Table::new(),
        Some(file) => {
            let text = std::fs::read_to_string(file).map_err(|e| {
                error(vec![format!(
                    "{}: {e}; `bsap config example` prints one to start from",
                    file.display()
                )])
            })?;
            text.parse()
                .map_err(|e: toml::de::Error| error(vec![describe_syntax_error(&text, &e)]))?
        }
    };
    let mut problems = Vec::new();
    let types = Table::try_from(Config::default()).unwrap_or_default();
    convert_whole_floats(&mut table, &types);
    let mut variables: Vec<(String, String)> = environment.into_iter().collect();
    variables.sort();
    for (name, text) in &variables {
        if let Some(path) = key_path_from_variable(name)
            && let Err(problem) = set_key_from_text(&mut table, &types, &path, text)
        {
            problems.push(format!("{name}: {problem}"));
        }
    }
    register_secrets(collect_secrets(&table));
    let config = deserialise_valid_keys(table, &mut problems);
    problems.extend(config.validate());
    let problems = problems.iter().map(|problem| redact(problem).into_owned()).collect();
    Ok((config, problems))
}

/// Says where a file is no TOML. The line itself, which the parser's own message shows, may have a secret.
fn describe_syntax_error(text: &str, error: &toml::de::Error) -> String {
    let before = error.span().and_then(|span| text.get(..span.start)).unwrap_or_default();
    let (line, column) = (
        before.matches('\n').count() + 1,
        before.chars().rev().take_while(|c| *c != '\n').count() + 1,
    );
    format!("not TOML: line {line}, column {column}: {}", error.message().replace('\n', ", "))
}

/// Returns the values that are secret by the names of their keys, and those of the environment of stores.
fn collect_secrets(table: &Table) -> Vec<String> {
    let mut secrets = Vec::new();
    for (section, key, is_secret) in SECRET_MAPS {
        let map = table.get(section).and_then(|section| section.get(key)).and_then(Value::as_table);
        for (_, value) in map.into_iter().flatten().filter(|(name, _)| is_secret(name)) {
            secrets.push(value.as_str().map_or_else(|| value.to_string(), str::to_owned));
        }
    }
    let of_stores = |name: &str| {
        ["AWS_", "AZURE_", "GOOGLE_", "HF_", "HUGGING_FACE_"].iter().any(|p| name.starts_with(p))
    };
    let environment = std::env::vars().filter(|(name, _)| of_stores(name) && is_secret_name(name));
    secrets.extend(environment.map(|(_, value)| value));
    secrets
}

/// Converts values such as `4096.0` to whole numbers if the option is one: tools that render the file,
/// such as Helm, may have no other numbers than floats.
fn convert_whole_floats(table: &mut Table, types: &Table) {
    /// 2⁵³: floats represent every whole number up to it.
    const MAX_EXACT_INTEGER: f64 = 9_007_199_254_740_992.0;
    for (key, value) in table {
        match (value, types.get(key)) {
            (Value::Table(inner), Some(Value::Table(types))) => convert_whole_floats(inner, types),
            (value @ Value::Float(_), Some(Value::Integer(_))) => {
                if let Some(number) =
                    value.as_float().filter(|n| n.fract() == 0.0 && n.abs() < MAX_EXACT_INTEGER)
                {
                    *value = Value::Integer(number as i64);
                }
            }
            _ => {}
        }
    }
}

fn describe_source(file: Option<&Path>) -> String {
    file.map_or("defaults and environment".into(), |f| f.display().to_string())
}

/// Deserialises the valid keys: removes one invalid key at a time and tries again.
fn deserialise_valid_keys(mut table: Table, problems: &mut Vec<String>) -> Config {
    while problems.len() < MAX_REPORTED_PROBLEMS {
        let error = match serde_path_to_error::deserialize::<_, Config>(table.clone()) {
            Ok(config) => return config,
            Err(error) => error,
        };
        let path: Vec<String> = error
            .path()
            .iter()
            .filter_map(|segment| match segment {
                Segment::Map { key } => Some(key.clone()),
                _ => None,
            })
            .collect();
        let reason = hide_text_of_type_error(&error.inner().message().replace('\n', " "));
        problems.push(format!("{}: {reason}", path.join(".")));
        if !remove_key(&mut table, &path) {
            break;
        }
    }
    Config::default()
}

/// Hides the value in the message that a value is of the wrong type: it does not help, and may be a secret.
fn hide_text_of_type_error(reason: &str) -> String {
    let parts =
        reason.strip_prefix("invalid type: ").and_then(|rest| rest.rsplit_once(", expected "));
    match parts {
        Some((found, expected)) => {
            let kind = found.split([' ', '`', '"']).next().unwrap_or_default();
            format!("invalid type: {kind}, expected {expected}")
        }
        None => reason.to_owned(),
    }
}

/// Removes the deepest key of `path` that exists.
fn remove_key(table: &mut Table, path: &[String]) -> bool {
    let Some((first, rest)) = path.split_first() else { return false };
    match table.get_mut(first) {
        Some(Value::Table(inner)) if !rest.is_empty() => {
            remove_key(inner, rest) || table.remove(first).is_some()
        }
        _ => table.remove(first).is_some(),
    }
}

/// Returns the path of the key that a variable sets; `None` if it sets none.
fn key_path_from_variable(variable: &str) -> Option<Vec<String>> {
    let name = variable.strip_prefix(ENV_PREFIX)?;
    let mut path: Vec<String> = name.split("__").map(str::to_lowercase).collect();
    if path.len() < 2 || path.iter().any(String::is_empty) {
        return None;
    }
    // Names of librdkafka's properties contain dots, which names of variables cannot.
    if path[..2] == ["kafka", "properties"] && path.len() == 3 {
        path[2] = path[2].replace('_', ".");
    }
    Some(path)
}

/// Sets `path` in `table` to `text`, parsed as the type of the value at `path` in `types`.
fn set_key_from_text(
    table: &mut Table,
    types: &Table,
    path: &[String],
    text: &str,
) -> Result<(), String> {
    let (first, rest) = path.split_first().ok_or("names no key")?;
    let expected_type = types.get(first);
    if rest.is_empty() {
        table.insert(first.clone(), parse_value(expected_type, text)?);
        return Ok(());
    }
    let inner = table.entry(first.clone()).or_insert_with(|| Value::Table(Table::new()));
    let Value::Table(inner) = inner else {
        return Err(format!("{first} is not a section"));
    };
    let empty = Table::new();
    set_key_from_text(inner, expected_type.and_then(Value::as_table).unwrap_or(&empty), rest, text)
}

fn parse_value(expected_type: Option<&Value>, text: &str) -> Result<Value, String> {
    let invalid = |expected: &str| format!("{text:?} is not {expected}");
    Ok(match expected_type {
        Some(Value::Integer(_)) => {
            Value::Integer(text.parse().map_err(|_| invalid("a whole number"))?)
        }
        Some(Value::Float(_)) => Value::Float(text.parse().map_err(|_| invalid("a number"))?),
        Some(Value::Boolean(_)) => {
            Value::Boolean(text.parse().map_err(|_| invalid("true or false"))?)
        }
        Some(Value::Array(_)) if text.trim_start().starts_with('[') => {
            let list: Table = format!("list = {text}")
                .parse()
                .map_err(|_| invalid("a list: write a, b or [\"a\", \"b\"]"))?;
            list["list"].clone()
        }
        Some(Value::Array(_)) => {
            let items = text.split(',').map(str::trim).filter(|item| !item.is_empty());
            Value::Array(items.map(|item| Value::String(item.into())).collect())
        }
        _ => Value::String(text.into()),
    })
}
