//! `--write-config`: the configuration of the same thing in production.

use std::fmt::Write as _;
use std::fs::OpenOptions;
use std::io::Write as _;
use std::path::Path;

use toml::{Table, Value};

use crate::commands::shared::error::{CommandError, path_error};
use crate::config::{Config, describe_sections};
use crate::watch::{SourceKind, WatchedSource};

/// What [`Config::to_redacted_toml`] writes in the place of a secret.
const HIDDEN: &str = "(hidden)";

/// Options that are written even if they have their defaults, with what to do about them.
const ALWAYS_WRITTEN: [(&str, &str, &str); 8] = [
    ("kafka", "brokers", "the addresses of your brokers"),
    ("source", "topic", "create it with as many partitions as there are to be workers"),
    ("dead_letter", "topic", "create it too; it keeps messages forever (docs/real-catalogue.md)"),
    ("model", "checkpoint", ""),
    ("model", "revision", "name a commit if the model must not change"),
    ("prompts", "sets", ""),
    ("table", "url", "s3://bucket/prefix, or a folder"),
    ("http", "listen", "for other machines add http.keys (`bsap keys new`)"),
];

/// Writes the configuration. A file that exists already is an error.
pub fn write_production_config(
    file: &Path,
    config: &Config,
    sources: &[WatchedSource],
) -> Result<(), CommandError> {
    let text = render(file, config, sources)?;
    let failed = |error: &std::io::Error| path_error("--write-config", file, error);
    let created = OpenOptions::new().write(true).create_new(true).open(file);
    created.and_then(|mut created| created.write_all(text.as_bytes())).map_err(|e| failed(&e))
}

fn render(file: &Path, config: &Config, sources: &[WatchedSource]) -> anyhow::Result<String> {
    let values: Table = config.to_redacted_toml().parse()?;
    let defaults: Table = Config::default().to_redacted_toml().parse()?;
    let mut text = String::from(
        "# Written by bsap try: the same pictures, model and prompts, with Kafka and a table of their own.\n\
         # What is not here has its default (bsap config reference).\n#\n",
    );
    let file = file.display();
    let _ =
        writeln!(text, "#   bsap check  --config {file}    set kafka.brokers and table.url first");
    let _ = writeln!(text, "#   bsap ingest --config {file}    a worker");
    let _ = writeln!(text, "#   bsap serve  --config {file}    the page");
    for source in sources {
        let _ = writeln!(text, "#   {}", publish_command(source, &file.to_string()));
    }
    let mut has_secrets = false;
    for section in describe_sections() {
        let Some(Value::Table(found)) = values.get(&section.name) else { continue };
        let default = defaults.get(&section.name).and_then(Value::as_table);
        let lines = found.iter().filter_map(|(key, value)| {
            let note = ALWAYS_WRITTEN.iter().find(|(s, k, _)| *s == section.name && k == key);
            let is_default = default.and_then(|default| default.get(key)) == Some(value);
            let value = without_secrets(value, &mut has_secrets)?;
            if is_default && note.is_none() {
                return None;
            }
            let note = note.map_or("", |(.., note)| note);
            let note = if note.is_empty() { String::new() } else { format!("   # {note}") };
            Some(format!("{} = {value}{note}\n", quoted_key(key)))
        });
        let lines: String = lines.collect();
        if !lines.is_empty() {
            let _ = write!(text, "\n[{}]\n{lines}", section.name);
        }
    }
    if has_secrets {
        text.push_str("\n# Credentials are not written: give them in the environment (AWS_*, GOOGLE_*, AZURE_*, BSAP_*).\n");
    }
    Ok(text)
}

/// Returns the command that announces the pictures of a source.
fn publish_command(source: &WatchedSource, file: &str) -> String {
    match &source.kind {
        SourceKind::Folder(_) | SourceKind::Bucket(_) => {
            let (address, prefix) = (source.kind.address(), &source.id_prefix);
            format!(
                "bsap publish --config {file} {address} --id-prefix {prefix}    then bsap reconcile … --repair on a schedule"
            )
        }
        SourceKind::Picture(_) | SourceKind::Address(_) => {
            format!("bsap publish --config {file} {}", source.kind.address())
        }
        SourceKind::List(..) => format!(
            "bsap publish --config {file} --jsonl FILE    with the events of {} (docs/ingestion.md)",
            source.kind.address()
        ),
    }
}

/// Returns the value without what is hidden in it; `None` if nothing is left.
fn without_secrets(value: &Value, has_secrets: &mut bool) -> Option<Value> {
    match value {
        Value::String(text) if text == HIDDEN => {
            *has_secrets = true;
            None
        }
        Value::Table(table) if table.values().any(|value| value.as_str() == Some(HIDDEN)) => {
            *has_secrets = true;
            let open = table.iter().filter(|(_, value)| value.as_str() != Some(HIDDEN));
            let open: Table = open.map(|(key, value)| (key.clone(), value.clone())).collect();
            (!open.is_empty()).then_some(Value::Table(open))
        }
        other => Some(other.clone()),
    }
}

/// Returns a key as TOML writes it.
fn quoted_key(key: &str) -> String {
    let is_bare =
        !key.is_empty() && key.chars().all(|c| c.is_ascii_alphanumeric() || "-_".contains(c));
    if is_bare { key.to_owned() } else { Value::String(key.to_owned()).to_string() }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::load_valid_config;
    use crate::record::AttributeType;

    #[test]
    fn the_written_configuration_is_accepted_and_has_no_secrets() {
        let folder = tempfile::tempdir().unwrap();
        let mut config = Config::default();
        config.model.checkpoint = ".".into();
        config.prompts.sets = vec!["everyday-nouns".into()];
        config.attributes.insert("Price in €".into(), AttributeType::Number);
        config.fetch.file_roots = vec![folder.path().to_owned()];
        config.fetch.store_options.insert("aws_region".into(), "eu".into());
        config.fetch.store_options.insert("aws_secret_access_key".into(), "swordfish".into());
        let file = folder.path().join("production.toml");
        write_production_config(&file, &config, &[]).unwrap();
        let text = std::fs::read_to_string(&file).unwrap();
        assert!(
            !text.contains("swordfish") && text.contains("Credentials are not written"),
            "{text}"
        );
        let loaded = load_valid_config(Some(&file), []).unwrap();
        config.fetch.store_options.remove("aws_secret_access_key");
        assert_eq!(loaded, config);
        let again = write_production_config(&file, &config, &[]).unwrap_err().to_string();
        assert!(again.contains("--write-config") && again.contains("choose another"), "{again}");
    }
}
