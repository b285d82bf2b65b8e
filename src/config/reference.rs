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
pub struct Section {
    /// Its name.
    pub name: String,
    /// What it is for.
    pub about: String,
    /// Its keys; none where the keys are the owner's own.
    pub settings: Vec<Setting>,
}

/// One key.
#[derive(Debug)]
pub struct Setting {
    /// Its name within the section.
    pub key: String,
    /// What it is for.
    pub about: String,
    /// Its default, as TOML writes it.
    pub default: String,
}

/// The JSON schema of the configuration file.
pub fn schema() -> Json {
    schemars::schema_for!(Config).to_value()
}

/// All sections, in the order of the pipeline.
pub fn sections() -> Vec<Section> {
    let schema = schema();
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
                |(key, property)| Setting {
                    key: key.clone(),
                    about: description(property),
                    default: default
                        .and_then(|table| table.get(key))
                        .map_or_else(|| "{}".into(), written),
                },
            );
        Section { name: name.clone(), about: description(property), settings: settings.collect() }
    };
    properties.iter().map(section).collect()
}

fn description(property: &Json) -> String {
    let text = property["description"].as_str().unwrap_or_default();
    text.split_whitespace().collect::<Vec<_>>().join(" ")
}

/// A value as TOML writes it. Numbers that were f32 are shortened: 0.25, not 0.25000001.
fn written(value: &Value) -> String {
    match value {
        Value::Float(number) => format!("{:?}", *number as f32),
        Value::Table(table) if table.is_empty() => "{}".into(),
        other => other.to_string(),
    }
}

/// An example with every key at its default, commented.
pub fn example() -> String {
    let mut text = String::from(
        "# Configuration of bsap. Every key may be left out: what stands here is its default.\n\
         # An environment variable BSAP_<SECTION>__<KEY> overrides a key, for example\n\
         # BSAP_KAFKA__BROKERS=broker-1:9092,broker-2:9092\n",
    );
    for section in sections() {
        // Writing to a string cannot fail.
        let _ = writeln!(text, "\n{}[{}]", comment(&section.about), section.name);
        for setting in section.settings {
            let _ =
                writeln!(text, "{}{} = {}", comment(&setting.about), setting.key, setting.default);
        }
    }
    text
}

/// The options of `names`, for the long help of a command.
pub fn help(names: &[&str]) -> String {
    let mut text = String::from(
        "Configuration that this command reads, with defaults (file, or variables BSAP_<SECTION>__<KEY>):\n",
    );
    for section in sections().into_iter().filter(|s| names.contains(&s.name.as_str())) {
        // Writing to a string cannot fail.
        let _ = writeln!(text, "\n[{}]  {}", section.name, section.about);
        for setting in section.settings {
            let _ =
                writeln!(text, "  {} = {}\n      {}", setting.key, setting.default, setting.about);
        }
    }
    text
}

/// `about` as comment lines of at most 100 characters.
fn comment(about: &str) -> String {
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
pub fn markdown() -> String {
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
    for section in sections() {
        // Writing to a string cannot fail.
        let _ = write!(text, "\n## `[{}]`\n\n{}\n", section.name, section.about);
        if section.settings.is_empty() {
            continue;
        }
        text.push_str("\n| key | default | what it is |\n| --- | --- | --- |\n");
        for setting in section.settings {
            let about = setting.about.replace('|', "\\|");
            let _ = writeln!(text, "| `{}` | `{}` | {about} |", setting.key, setting.default);
        }
    }
    text
}
