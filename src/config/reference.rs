//! The configuration described: the commented example, the reference page, the JSON schema.
//!
//! All three come from the doc comments and defaults of the options themselves, so that they
//! cannot say anything else.

use std::fmt::Write as _;

use serde_json::Value as Json;
use toml::{Table, Value};

use super::Config;

/// A section of the configuration.
#[derive(Debug)]
pub struct ConfigSection {
    /// Its name.
    pub name: String,
    /// What it is for.
    pub description: String,
    /// Its keys; none where the keys are the owner's own.
    pub settings: Vec<ConfigSetting>,
}

/// One key.
#[derive(Debug)]
pub struct ConfigSetting {
    /// Its name within the section.
    pub key: String,
    /// What it is for.
    pub description: String,
    /// Its default, as TOML writes it.
    pub default: String,
}

/// The JSON schema of the configuration file.
pub fn json_schema() -> Json {
    schemars::schema_for!(Config).to_value()
}

/// All sections, in the order of the pipeline.
pub fn describe_sections() -> Vec<ConfigSection> {
    let schema = json_schema();
    let defaults = Table::try_from(Config::default()).unwrap_or_default();
    let Some(properties) = schema["properties"].as_object() else { return Vec::new() };
    let section = |(name, property): (&String, &Json)| {
        let definition = property["$ref"]
            .as_str()
            .and_then(|path| path.strip_prefix('#'))
            .and_then(|path| schema.pointer(path));
        let default = defaults.get(name).and_then(Value::as_table);
        let settings =
            definition.and_then(|d| d["properties"].as_object()).into_iter().flatten().map(
                |(key, property)| ConfigSetting {
                    key: key.clone(),
                    description: property_description(property),
                    default: default
                        .and_then(|table| table.get(key))
                        .map_or_else(|| "{}".into(), toml_literal),
                },
            );
        ConfigSection {
            name: name.clone(),
            description: property_description(property),
            settings: settings.collect(),
        }
    };
    properties.iter().map(section).collect()
}

fn property_description(property: &Json) -> String {
    let text = property["description"].as_str().unwrap_or_default();
    text.split_whitespace().collect::<Vec<_>>().join(" ")
}

/// A value as TOML writes it. Numbers that were f32 are shortened: 0.25, not 0.25000001.
fn toml_literal(value: &Value) -> String {
    match value {
        Value::Float(number) => format!("{:?}", *number as f32),
        Value::Table(table) if table.is_empty() => "{}".into(),
        other => other.to_string(),
    }
}

/// An example with every key at its default, commented.
pub fn example_toml() -> String {
    let mut text = String::from(
        "# Configuration of bsap. Every key may be left out: what stands here is its default.\n\
         # An environment variable BSAP_<SECTION>__<KEY> overrides a key, for example\n\
         # BSAP_KAFKA__BROKERS=broker-1:9092,broker-2:9092\n",
    );
    for section in describe_sections() {
        // Writing to a string cannot fail.
        let _ = writeln!(text, "\n{}[{}]", comment_lines(&section.description), section.name);
        for setting in section.settings {
            let _ = writeln!(
                text,
                "{}{} = {}",
                comment_lines(&setting.description),
                setting.key,
                setting.default
            );
        }
    }
    text
}

/// The options of `names`, for the long help of a command.
pub fn help_text(names: &[&str]) -> String {
    let mut text = String::from(
        "Configuration that this command reads, with defaults (file, or variables BSAP_<SECTION>__<KEY>):\n",
    );
    for section in describe_sections().into_iter().filter(|s| names.contains(&s.name.as_str())) {
        // Writing to a string cannot fail.
        let _ = writeln!(text, "\n[{}]  {}", section.name, section.description);
        for setting in section.settings {
            let _ = writeln!(
                text,
                "  {} = {}\n      {}",
                setting.key, setting.default, setting.description
            );
        }
    }
    text
}

/// `about` as comment lines of at most 100 characters.
fn comment_lines(about: &str) -> String {
    let mut text = String::new();
    let mut line = String::from("#");
    for word in about.split(' ') {
        if line.chars().count() + 1 + word.chars().count() > 100 {
            text.push_str(&line);
            text.push('\n');
            line = String::from("#");
        }
        line.push(' ');
        line.push_str(word);
    }
    text + &line + "\n"
}

/// The reference page, `docs/configuration.md`.
pub fn render_markdown() -> String {
    let mut text = String::from(
        "# Configuration\n\n\
         One TOML file, given by `--config` or `BSAP_CONFIG`; without one, the defaults hold. An\n\
         environment variable `BSAP_<SECTION>__<KEY>` overrides a key: `BSAP_KAFKA__BROKERS` is\n\
         `kafka.brokers`, `BSAP_TABLE__STORE_OPTIONS__AWS_REGION` is `table.store_options.aws_region`,\n\
         `BSAP_KAFKA__PROPERTIES__SASL_PASSWORD` is `kafka.properties.\"sasl.password\"`. Lists are separated\n\
         by commas there.\n\n\
         `bsap config example` prints a commented file, `bsap config show` what is in effect with\n\
         secrets hidden, `bsap config schema` the JSON schema for editors, and `bsap check` tries every\n\
         connection. This page is written by `bsap config reference`.\n",
    );
    for section in describe_sections() {
        // Writing to a string cannot fail.
        let _ = write!(text, "\n## `[{}]`\n\n{}\n", section.name, section.description);
        if section.settings.is_empty() {
            continue;
        }
        text.push_str("\n| key | default | what it is |\n| --- | --- | --- |\n");
        for setting in section.settings {
            let about = setting.description.replace('|', "\\|");
            let _ = writeln!(text, "| `{}` | `{}` | {about} |", setting.key, setting.default);
        }
    }
    text
}
