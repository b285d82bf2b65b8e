//! The configuration of a try: that of the user, with a broker in this process and a local table.

use std::path::{Path, PathBuf};

use chrono::Utc;
use toml::Table;

use super::arguments::TryArgs;
use super::model::{DEMO_CHECKPOINT, set_checkpoint};
use crate::commands::shared::configuration::{load_config, load_config_without_model};
use crate::commands::shared::error::CommandError;
use crate::commands::shared::in_process::system::shorten_waits;
use crate::config::{Config, ConfigError};
use crate::kafka::KafkaOptions;
use crate::record::VersionOrdering;
use crate::watch::WatchedSource;

/// The prompt set for photographs of all kinds (docs/balancing.md).
const DEFAULT_PROMPT_SET: &str = "everyday-nouns";
/// Queries that the page offers, for photographs of all kinds.
const EXAMPLE_QUERIES: [&str; 6] = [
    "people at a table",
    "a dog",
    "a sunset over water",
    "food on a plate",
    "a city street at night",
    "mountains",
];
/// A commit that fails is tried this often: a full disk must be reported, not waited for.
const MAX_COMMIT_ATTEMPTS: u32 = 5;

/// Reads the configuration file and the variables. `--checkpoint` takes the place of `model.checkpoint`, which
/// is then not validated.
pub fn load_base_config(args: &TryArgs, file: Option<&Path>) -> Result<Config, ConfigError> {
    let mut config = if args.checkpoint.is_some() {
        load_config_without_model(file)?
    } else {
        load_config(file)?
    };
    if !is_configured(file, "prompts", "sets") {
        config.prompts.sets = vec![DEFAULT_PROMPT_SET.to_owned()];
    }
    if config.http.example_queries.is_empty() {
        config.http.example_queries = EXAMPLE_QUERIES.map(str::to_owned).to_vec();
    }
    Ok(config)
}

/// Whether the file or a variable sets an option; its default does not count.
fn is_configured(file: Option<&Path>, section: &str, key: &str) -> bool {
    let variable = format!("BSAP_{section}__{key}").to_uppercase();
    let text = file.and_then(|file| std::fs::read_to_string(file).ok()).unwrap_or_default();
    let table: Table = text.parse().unwrap_or_default();
    std::env::var_os(variable).is_some()
        || table.get(section).and_then(|section| section.get(key)).is_some()
}

/// Adds to the configuration what the sources need: the folders that workers may read, and the attributes of
/// lists.
pub fn add_sources(config: &mut Config, sources: &[WatchedSource]) -> Result<(), CommandError> {
    let mut roots = config.fetch.file_roots.clone();
    for source in sources {
        roots.extend(source.local_roots().map_err(CommandError::usage)?);
        for (name, attribute_type) in source.attribute_types().map_err(CommandError::usage)? {
            config.attributes.entry(name).or_insert(attribute_type);
        }
    }
    config.fetch.file_roots = without_nested(roots);
    Ok(())
}

fn without_nested(mut roots: Vec<PathBuf>) -> Vec<PathBuf> {
    roots.sort();
    // A folder sorts before what is inside of it.
    roots.dedup_by(|inner, outer| inner.starts_with(&*outer));
    roots
}

/// Sets everything that is different in a try. The broker and the table's address are set later, when they are
/// known.
pub fn adapt_to_try(
    args: &TryArgs,
    folder: &Path,
    config: &mut Config,
) -> Result<(), CommandError> {
    set_checkpoint(args.checkpoint.as_deref(), folder, config)?;
    config.kafka = KafkaOptions::default();
    // Each process has a topic of its own: the broker begins at offset 0, and the table keeps the positions
    // of all topics.
    config.source.topic = format!("try-{}", Utc::now().timestamp_millis());
    config.source.control_topic.clear();
    config.source.replay_name.clear();
    config.source.ordering = VersionOrdering::Sequence;
    shorten_waits(config);
    config.table.store_options.clear();
    config.table.max_commit_attempts = MAX_COMMIT_ATTEMPTS;
    config.search.standby_checkpoint.clear();
    config.http.worker_metrics_urls.clear();
    if let Some(port) = args.port {
        config.http.listen.set_port(port);
    } else if args.once {
        config.http.listen.set_port(0);
    }
    if config.log.file.as_os_str().is_empty() {
        config.log.file = folder.join("bsap.log");
    }
    let problems = config.validate();
    let name_option = |problem: &String| match problem.strip_prefix("model.checkpoint:") {
        Some(reason) if args.checkpoint.is_some() => format!("--checkpoint:{reason}"),
        _ => problem.clone(),
    };
    match problems.iter().map(name_option).collect::<Vec<_>>() {
        problems if problems.is_empty() => Ok(()),
        problems => Err(CommandError::usage(problems.join("; "))),
    }
}

/// Whether the model of the demo was asked for.
pub fn is_demo_model(args: &TryArgs) -> bool {
    args.checkpoint.as_deref() == Some(DEMO_CHECKPOINT)
}
