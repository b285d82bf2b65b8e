//! `bsap check`: tries the configuration and every connection that it names.

use std::collections::BTreeMap;
use std::fmt::Display;
use std::path::Path;

use super::shared::catalogue::{open_catalogue, open_store};
use super::shared::error::{CommandError, CommandResult};
use super::shared::models::{STANDBY_CHECKPOINT_KEY, load_configured_model, standby_model_options};
use super::shared::printing::print_line;
use super::shared::query_worker::generation_memory_limit_mib;
use super::shared::runtime::block_on;
use crate::catalogue::StateStore;
use crate::clip::{ClipModel, Encoders, run_self_test};
use crate::config::Config;
use crate::diagnosis::describe;
use crate::diagnosis::redact::redact;
use crate::ingest::decode::describe_readable_formats;
use crate::kafka::{self, FailureKind};
use crate::prompts::PromptSet;
use crate::search::{memory_limit_bytes, memory_required_bytes};
use crate::serve::http;
use crate::table::TableOverview;

const REINDEX_TOPIC_KEY: &str = "source.reindex_topic";
/// How many bytes larger a dead letter may be than the original message.
const DEAD_LETTER_OVERHEAD_BYTES: i64 = 16 << 10;

/// Checks the configuration and everything that it names.
pub fn run(config_file: Option<&Path>) -> CommandResult {
    block_on(run_checks(config_file))
}

/// Prints one line per check, and counts the failed ones.
struct CheckPrinter {
    failed_checks: usize,
}

impl CheckPrinter {
    fn print_and_count<E: Display>(&mut self, option: &str, result: Result<String, E>) {
        match result {
            Ok(description) => print_line!("ok      {option}: {description}"),
            Err(error) => {
                self.failed_checks += 1;
                print_line!("FAILED  {option}: {}", redact(&error.to_string()));
            }
        }
    }
}

/// Runs all checks, even if some fail.
async fn run_checks(file: Option<&Path>) -> CommandResult {
    let (config, problems) = crate::config::load_valid_part(file, std::env::vars())
        .map_err(|e| CommandError::Usage(e.into()))?;
    let mut report = CheckPrinter { failed_checks: 0 };
    for problem in &problems {
        print_line!("FAILED  configuration: {problem}");
    }
    if problems.is_empty() {
        let name = file.map_or("defaults and environment".into(), |f| f.display().to_string());
        print_line!("ok      configuration: {name}");
    }
    let formats = Ok::<_, String>(format!("this build reads {}", describe_readable_formats()));
    report.print_and_count("decode", formats);
    check_kafka(&config, &mut report).await;
    check_table(&config, &mut report).await;
    let dimension = check_model(config.clone(), &mut report).await?;
    if let Some(dimension) = dimension {
        check_memory(&config, dimension, &mut report).await;
    }
    let listener = http::bind_listener(&config.http).await;
    report.print_and_count(
        "http.listen",
        listener.map(|_| format!("{} is free", config.http.listen)),
    );
    match (problems.len(), report.failed_checks) {
        (0, 0) => Ok(()),
        (0, failed) => Err(anyhow::anyhow!("{failed} checks failed").into()),
        (invalid, failed) => Err(CommandError::usage(format!(
            "the configuration has {invalid} problems, and {failed} checks failed"
        ))),
    }
}

async fn check_kafka(config: &Config, report: &mut CheckPrinter) {
    let mut topics = vec![
        ("source.topic", config.source.topic.as_str()),
        ("dead_letter.topic", config.dead_letter.topic.as_str()),
        (REINDEX_TOPIC_KEY, config.source.reindex_topic.as_str()),
    ];
    if !config.source.control_topic.is_empty() {
        topics.push(("source.control_topic", &config.source.control_topic));
    }
    let names: Vec<&str> = topics.iter().map(|(_, topic)| *topic).collect();
    match kafka::fetch_partition_counts(&config.kafka, &names).await {
        Err(error) => report.print_and_count("kafka.brokers", Err::<String, _>(error)),
        Ok(partitions) => {
            report.print_and_count("kafka.brokers", Ok::<_, String>(config.kafka.brokers.clone()));
            let required_topics_exist = partitions[..2].iter().all(Result::is_ok);
            let source_partitions = partitions[0].as_ref().copied().unwrap_or(0);
            for ((key, topic), count) in topics.iter().zip(partitions) {
                // Missing or denied: all other failures are those of the brokers.
                let is_absent = count.is_err();
                if *key == REINDEX_TOPIC_KEY && is_absent && !needs_reindex_topic(config).await {
                    print_line!(
                        "unused  {key}: topic {topic} does not exist, or may not be used; `bsap reindex model` needs it"
                    );
                    continue;
                }
                let result = match count {
                    Ok(n) if *key == REINDEX_TOPIC_KEY && n < source_partitions => Err(format!(
                        "topic {topic} has {n} partitions, source.topic has {source_partitions}: only so many workers could embed images again; give it as many"
                    )),
                    Ok(n) => Ok(format!("topic {topic}, {n} partitions")),
                    Err(failure) => Err(failure.to_string()),
                };
                report.print_and_count(key, result);
            }
            check_rights(config, report).await;
            if required_topics_exist {
                check_topic_settings(config, &names[..2], report).await;
            }
        }
    }
}

/// Tries the rights that a worker needs, and prints whether events can be published.
async fn check_rights(config: &Config, report: &mut CheckPrinter) {
    let (kafka, source) = (&config.kafka, &config.source);
    let group = source.group_id();
    let mut consumers = vec![("source.group", group.clone(), &source.topic)];
    if !source.control_topic.is_empty() {
        let control_topic = &source.control_topic;
        consumers.push(("source.control_topic", source.control_group_id(), control_topic));
    }
    for (key, group, topic) in consumers {
        match kafka::check_consume_rights(kafka, &group, topic).await {
            // Reported with the topic.
            Err(failure) if failure.kind == FailureKind::TopicMissing => {}
            checked => {
                let consumable = |()| format!("group {group} can consume topic {topic}");
                report.print_and_count(key, checked.map(consumable));
            }
        }
    }
    let dead_letters = &config.dead_letter.topic;
    match kafka::check_write_right(kafka, dead_letters).await {
        Err(failure) if failure.kind == FailureKind::TopicMissing => {}
        checked => {
            let writable = |()| format!("topic {dead_letters} can be written");
            report.print_and_count("dead_letter.topic", checked.map(writable));
        }
    }
    if let Err(failure) = kafka::check_write_right(kafka, &source.topic).await
        && failure.kind != FailureKind::TopicMissing
    {
        // Not a failure: workers only read it.
        print_line!(
            "unused  source.topic: {failure}; `bsap publish`, `bsap reconcile --repair` and `bsap dead-letters replay` need it"
        );
    }
}

/// Whether there are workers that consume the topic of images to be embedded again.
async fn needs_reindex_topic(config: &Config) -> bool {
    let Ok((store, state)) = open_catalogue(config).await else { return false };
    let first = StateStore::new(&store).read_revision(1).await.ok().flatten();
    state.standby.is_some() || first.is_some_and(|first| first.live.id != state.live.id)
}

/// Checks the settings of topics that could lose dead letters.
async fn check_topic_settings(config: &Config, names: &[&str], report: &mut CheckPrinter) {
    let settings = match kafka::fetch_topic_configs(&config.kafka, names).await {
        Ok(settings) => settings,
        // Not a failure: workers do not need the permission to read settings.
        Err(error) => return print_line!("unknown settings of the topics: {error}"),
    };
    let [source, dead_letter] = &settings[..] else { return };
    for problem in validate_topic_settings(source, dead_letter) {
        report.print_and_count("dead_letter.topic", Err::<String, _>(problem));
    }
}

/// Returns one line per unsuitable setting of the source topic and of the dead-letter topic.
fn validate_topic_settings(
    source: &BTreeMap<String, String>,
    dead_letter: &BTreeMap<String, String>,
) -> Vec<String> {
    let mut problems = Vec::new();
    let get = |topic: &BTreeMap<String, String>, key: &str| topic.get(key).cloned();
    let number = |topic: &BTreeMap<String, String>, key: &str| get(topic, key)?.parse::<i64>().ok();
    if number(dead_letter, "retention.ms").is_some_and(|ms| ms >= 0)
        && get(dead_letter, "message.timestamp.type").as_deref() != Some("LogAppendTime")
    {
        problems.push(
            "dead letters keep the time of the original message, and Kafka removes them by it: set retention.ms=-1 for this topic".into(),
        );
    }
    if get(dead_letter, "cleanup.policy").is_some_and(|policy| policy.contains("compact")) {
        problems.push(
            "cleanup.policy is compact: of several dead letters with one key only the last would be kept; set it to delete".into(),
        );
    }
    if let Some((dead_letter_max, source_max)) =
        number(dead_letter, "max.message.bytes").zip(number(source, "max.message.bytes"))
        && dead_letter_max < source_max + DEAD_LETTER_OVERHEAD_BYTES
    {
        problems.push(format!(
            "max.message.bytes is {dead_letter_max}, the source topic's {source_max}: a large message and its headers ({DEAD_LETTER_OVERHEAD_BYTES} bytes) would not fit; set at least {}",
            source_max + DEAD_LETTER_OVERHEAD_BYTES
        ));
    }
    problems
}

async fn check_table(config: &Config, report: &mut CheckPrinter) {
    let result = async {
        let store = open_store(config).await?;
        store.check_capabilities().await?;
        // A catalogue that is there must be one that this program reads.
        StateStore::new(&store).read_newest().await?;
        Ok::<_, anyhow::Error>(format!(
            "{} can be written, read and put conditionally",
            redact(store.url().as_str())
        ))
    };
    let result = result.await.map_err(|error| describe(error.as_ref()));
    report.print_and_count("table.url", result);
}

/// Estimates the memory that a query worker needs, and compares it with the limit.
async fn check_memory(config: &Config, dimension: usize, report: &mut CheckPrinter) {
    let limit = memory_limit_bytes(generation_memory_limit_mib(config));
    let (mut sets, mut rows) = (config.prompts.sets.len(), None);
    if let Ok((store, state)) = open_catalogue(config).await {
        sets = state.prompt_sets.len();
        let overview = TableOverview::from_log(&store, &state.live, &config.maintenance).await;
        rows = overview.ok().and_then(|overview| overview.rows);
    }
    let memory_for = |rows| memory_required_bytes(rows, dimension, sets);
    let estimate = format!(
        "{} bytes per image besides its id, address and attributes; {} MiB are allowed, enough for about {} images",
        memory_for(1),
        to_mebibytes(limit),
        limit / memory_for(1)
    );
    let rows = rows.unwrap_or_default() as u64;
    let needed =
        format!("{estimate}; {rows} stored rows need up to {} MiB", to_mebibytes(memory_for(rows)));
    let fits = memory_for(rows) <= limit;
    report.print_and_count("search.memory_mib", if fits { Ok(needed) } else { Err(needed) });
}

fn to_mebibytes(bytes: u64) -> u64 {
    bytes.div_ceil(1 << 20)
}

/// Loads and tests the models, and embeds the prompt sets. Returns the dimension of embeddings, `None`
/// if the model cannot be loaded.
async fn check_model(
    config: Config,
    report: &mut CheckPrinter,
) -> Result<Option<usize>, CommandError> {
    let (dimension, models, prompts) = tokio::task::spawn_blocking(move || {
        let encoders = match load_configured_model(&config) {
            Ok(encoders) => encoders,
            Err(error) => return (None, vec![("model.checkpoint", Err(error))], Vec::new()),
        };
        let test_and_describe = |encoders: &dyn Encoders| -> anyhow::Result<String> {
            run_self_test(encoders)?;
            let card = encoders.card();
            let notice = card.notice.as_deref().map_or(String::new(), |n| format!("; {n}"));
            Ok(format!(
                "{} ({} parameters, dimension {}, fingerprint {:.12}){notice}",
                card.name, card.parameters, card.dimension, card.fingerprint
            ))
        };
        let sets = config.prompts.sets.iter().map(|name| {
            let settings = config.prompts.statistics_settings();
            let set = PromptSet::load_builtin_or_file(name)?.embed(&*encoders, settings)?;
            let warning = set
                .prompt_set
                .script_warning(&*encoders)
                .map_or(String::new(), |w| format!("; WARNING: {w}"));
            Ok(format!(
                "{} ({} prompts, {}){warning}",
                set.statistics_key,
                set.prompt_set.texts.len(),
                set.prompt_set.language
            ))
        });
        let mut models = vec![("model.checkpoint", test_and_describe(&*encoders))];
        if let Some(options) = standby_model_options(&config) {
            let clip = ClipModel::load(&options).map_err(anyhow::Error::from);
            models.push((STANDBY_CHECKPOINT_KEY, clip.and_then(|clip| test_and_describe(&clip))));
        }
        let dimension = Some(encoders.card().dimension);
        (dimension, models, sets.collect::<Vec<Result<String, anyhow::Error>>>())
    })
    .await?;
    for (setting, model) in models {
        report.print_and_count(setting, model.map_err(|error| describe(error.as_ref())));
    }
    for set in prompts {
        report.print_and_count("prompts.sets", set.map_err(|error| describe(error.as_ref())));
    }
    Ok(dimension)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn settings(pairs: &[(&str, &str)]) -> BTreeMap<String, String> {
        pairs.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect()
    }

    #[test]
    fn topics_that_would_lose_dead_letters_are_reported() {
        let source = settings(&[("max.message.bytes", "1048588")]);
        let unsuitable = settings(&[
            ("retention.ms", "604800000"),
            ("message.timestamp.type", "CreateTime"),
            ("cleanup.policy", "compact"),
            ("max.message.bytes", "1048588"),
        ]);
        let problems = validate_topic_settings(&source, &unsuitable);
        assert_eq!(problems.len(), 3, "{problems:?}");
        assert!(problems[2].contains("1064972"), "{problems:?}");
        let suitable = settings(&[
            ("retention.ms", "-1"),
            ("message.timestamp.type", "CreateTime"),
            ("cleanup.policy", "delete"),
            ("max.message.bytes", "2000000"),
        ]);
        assert_eq!(validate_topic_settings(&source, &suitable), Vec::<String>::new());
    }
}
