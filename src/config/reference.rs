//! The descriptions of the configuration: the commented example, the reference page, the JSON schema.
//!
//! All three are generated from the doc comments and defaults of the options, so that they cannot
//! differ from the program.

use std::fmt::Write as _;

use serde_json::Value as Json;
use toml::{Table, Value};

use super::Config;

/// A section of the configuration.
#[derive(Debug)]
pub struct ConfigSection {
    /// Name of the TOML table.
    pub name: String,
    /// What the section is for.
    pub description: String,
    /// Its keys; empty if users choose the keys, as in `[attributes]`.
    pub settings: Vec<ConfigSetting>,
}

/// An option of a section.
#[derive(Debug)]
pub struct ConfigSetting {
    /// Name within the section.
    pub key: String,
    /// What the option does.
    pub description: String,
    /// Default as a TOML literal.
    pub default: String,
}

/// Returns the JSON schema of the configuration file.
pub fn config_json_schema() -> Json {
    schemars::schema_for!(Config).to_value()
}

/// Returns all sections, in the order of the fields of [`Config`].
pub fn describe_sections() -> Vec<ConfigSection> {
    let schema = config_json_schema();
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

/// Returns a value as a TOML literal. Floats have the precision of f32: 0.25, not 0.25000001.
fn toml_literal(value: &Value) -> String {
    match value {
        Value::Float(number) => format!("{:?}", *number as f32),
        Value::Table(table) if table.is_empty() => "{}".into(),
        other => other.to_string(),
    }
}

/// Renders an example file with every key at its default, and comments.
pub fn example_toml() -> String {
    let mut text = String::from(
        "# Configuration of bsap. Every key may be left out: the values here are the defaults.\n\
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

/// Renders the options of the sections `names`, for the long help of a command.
pub fn section_help_text(names: &[&str]) -> String {
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

/// Returns `description` as comment lines of at most 100 characters.
fn comment_lines(description: &str) -> String {
    let mut text = String::new();
    let mut line = String::from("#");
    for word in description.split(' ') {
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

/// Renders the reference page, `docs/configuration.md`.
pub fn render_config_reference() -> String {
    let mut text = String::from(
        "# Configuration\n\n\
         One TOML file, named by `--config` or `BSAP_CONFIG`; without one, the defaults apply. An\n\
         environment variable `BSAP_<SECTION>__<KEY>` overrides a key: `BSAP_KAFKA__BROKERS` is\n\
         `kafka.brokers`, `BSAP_TABLE__STORE_OPTIONS__AWS_REGION` is `table.store_options.aws_region`,\n\
         `BSAP_KAFKA__PROPERTIES__SASL_PASSWORD` is `kafka.properties.\"sasl.password\"`. In variables, the items of\n\
         a list are separated by commas.\n\n\
         `bsap config example` prints a commented file, `bsap config show` the effective configuration with\n\
         secrets hidden, `bsap config schema` the JSON schema for editors, and `bsap check` tries every\n\
         connection. This page is generated by `bsap config reference`.\n",
    );
    for section in describe_sections() {
        // Writing to a string cannot fail.
        let _ = write!(text, "\n## `[{}]`\n\n{}\n", section.name, section.description);
        if section.settings.is_empty() {
            continue;
        }
        text.push_str("\n| key | default | what it is |\n| --- | --- | --- |\n");
        for setting in section.settings {
            let description = setting.description.replace('|', "\\|");
            let _ = writeln!(text, "| `{}` | `{}` | {description} |", setting.key, setting.default);
        }
    }
    text
}
