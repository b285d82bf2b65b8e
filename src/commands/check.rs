//! `bsap check`.

use std::collections::BTreeMap;
use std::fmt::Display;
use std::path::Path;

use super::{Done, Failure, parts};
use crate::catalogue::StateStore;
use crate::clip::{Clip, Towers, self_test};
use crate::config::Config;
use crate::kafka;
use crate::prompts::PromptSet;
use crate::search::{memory_limit, memory_needed};
use crate::serve::http;
use crate::table::Overview;

const REINDEX_TOPIC: &str = "source.reindex_topic";
/// Bytes that a dead letter may be larger than the original.
const HEADERS: i64 = 16 << 10;

/// Says what is right and what is not, a line each.
struct Report {
    failed: usize,
}

impl Report {
    fn line<E: Display>(&mut self, what: &str, result: Result<String, E>) {
        match result {
            Ok(found) => say!("ok      {what}: {found}"),
            Err(error) => {
                self.failed += 1;
                say!("FAILED  {what}: {error:#}");
            }
        }
    }
}

/// Checks everything that can be checked, whatever else fails.
pub async fn run(file: Option<&Path>) -> Done {
    let (config, problems) = crate::config::load_with_problems(file, std::env::vars())
        .map_err(|e| Failure::Usage(e.into()))?;
    let mut report = Report { failed: 0 };
    for problem in &problems {
        say!("FAILED  configuration: {problem}");
    }
    if problems.is_empty() {
        let name = file.map_or("defaults and environment".into(), |f| f.display().to_string());
        say!("ok      configuration: {name}");
    }
    check_kafka(&config, &mut report).await;
    check_table(&config, &mut report).await;
    let dimension = check_model(config.clone(), &mut report).await?;
    if let Some(dimension) = dimension {
        check_memory(&config, dimension, &mut report).await;
    }
    let listened = http::listen(&config.http).await;
    report.line("http.listen", listened.map(|_| format!("{} is free", config.http.listen)));
    match (problems.len(), report.failed) {
        (0, 0) => Ok(()),
        (0, failed) => Err(anyhow::anyhow!("{failed} checks failed").into()),
        (wrong, failed) => Err(Failure::usage(format!(
            "the configuration has {wrong} problems, and {failed} checks failed"
        ))),
    }
}

async fn check_kafka(config: &Config, report: &mut Report) {
    let mut topics = vec![
        ("source.topic", config.source.topic.as_str()),
        ("dead_letter.topic", config.dead_letter.topic.as_str()),
        (REINDEX_TOPIC, config.source.reindex_topic.as_str()),
    ];
    if !config.source.control_topic.is_empty() {
        topics.push(("source.control_topic", &config.source.control_topic));
    }
    let names: Vec<&str> = topics.iter().map(|(_, topic)| *topic).collect();
    match kafka::probe(&config.kafka, &names).await {
        Err(error) => report.line("kafka.brokers", Err::<String, _>(error)),
        Ok(partitions) => {
            report.line("kafka.brokers", Ok::<_, String>(config.kafka.brokers.clone()));
            let all = partitions[..2].iter().all(|count| *count > 0);
            let source = partitions[0];
            for ((key, topic), count) in topics.into_iter().zip(partitions) {
                if key == REINDEX_TOPIC && count == 0 && !has_generations(config).await {
                    say!(
                        "unused  {key}: topic {topic} does not exist; `bsap reindex model` needs it"
                    );
                    continue;
                }
                let found = match count {
                    n if key == REINDEX_TOPIC && n > 0 && n < source => Err(format!(
                        "topic {topic} has {n} partitions, source.topic has {source}: fewer workers than could would embed images again; give it as many"
                    )),
                    0 => Err(format!(
                        "topic {topic} does not exist; create it, or let the brokers create topics"
                    )),
                    n => Ok(format!("topic {topic}, {n} partitions")),
                };
                report.line(key, found);
            }
            if all {
                check_topics(config, &names[..2], report).await;
            }
        }
    }
}

/// Whether workers read of images that are to be embedded again.
async fn has_generations(config: &Config) -> bool {
    let Ok((store, state)) = parts::catalogue(config).await else { return false };
    let first = StateStore::new(&store).at(1).await.ok().flatten();
    state.beside.is_some() || first.is_some_and(|first| first.live.id != state.live.id)
}

/// Settings of the topics on which it depends that nothing is lost.
async fn check_topics(config: &Config, names: &[&str], report: &mut Report) {
    let settings = match kafka::topic_settings(&config.kafka, names).await {
        Ok(settings) => settings,
        // The right to read settings is not needed for the work.
        Err(error) => return say!("unknown settings of the topics: {error}"),
    };
    let [source, dead] = &settings[..] else { return };
    for problem in topic_problems(source, dead) {
        report.line("dead_letter.topic", Err::<String, _>(problem));
    }
}

/// What is wrong with the settings of the source topic and of the dead letters'.
fn topic_problems(
    source: &BTreeMap<String, String>,
    dead: &BTreeMap<String, String>,
) -> Vec<String> {
    let mut problems = Vec::new();
    let get = |topic: &BTreeMap<String, String>, key: &str| topic.get(key).cloned();
    let number = |topic: &BTreeMap<String, String>, key: &str| get(topic, key)?.parse::<i64>().ok();
    if number(dead, "retention.ms").is_some_and(|ms| ms >= 0)
        && get(dead, "message.timestamp.type").as_deref() != Some("LogAppendTime")
    {
        problems.push(
            "dead letters keep the time of the original message, and Kafka removes them by it: set retention.ms=-1 for this topic".into(),
        );
    }
    if get(dead, "cleanup.policy").is_some_and(|policy| policy.contains("compact")) {
        problems.push(
            "cleanup.policy is compact: of several dead letters with one key only the last would stay; set it to delete".into(),
        );
    }
    if let Some((ours, theirs)) =
        number(dead, "max.message.bytes").zip(number(source, "max.message.bytes"))
        && ours < theirs + HEADERS
    {
        problems.push(format!(
            "max.message.bytes is {ours}, the source topic's {theirs}: a large message and its headers ({HEADERS} bytes) would not fit; set at least {}",
            theirs + HEADERS
        ));
    }
    problems
}

async fn check_table(config: &Config, report: &mut Report) {
    let checked = async {
        let store = parts::store(config).await?;
        store.check().await?;
        Ok::<_, anyhow::Error>(format!(
            "{} can be written, read and put conditionally",
            store.url()
        ))
    };
    report.line("table.url", checked.await);
}

/// What a query worker will need, and whether it may have it.
async fn check_memory(config: &Config, dimension: usize, report: &mut Report) {
    let limit = memory_limit(parts::memory_mib(config));
    let (mut sets, mut rows) = (config.prompts.sets.len(), None);
    if let Ok((store, state)) = parts::catalogue(config).await {
        sets = state.prompt_sets.len();
        let overview = Overview::of(&store, &state.live, &config.upkeep).await;
        rows = overview.ok().and_then(|overview| overview.rows);
    }
    let of = |rows| memory_needed(rows, dimension, sets);
    let told = format!(
        "{} bytes an image besides its id, address and attributes; {} MiB are allowed, room for about {} images",
        of(1),
        mib(limit),
        limit / of(1)
    );
    let rows = rows.unwrap_or_default() as u64;
    let needed = format!("{told}; {rows} stored rows need up to {} MiB", mib(of(rows)));
    let fits = of(rows) <= limit;
    report.line("search.memory_mib", if fits { Ok(needed) } else { Err(needed) });
}

fn mib(bytes: u64) -> u64 {
    bytes.div_ceil(1 << 20)
}

/// Loads and tests the model, and embeds the prompt sets; gives the dimension of embeddings.
async fn check_model(config: Config, report: &mut Report) -> Result<Option<usize>, Failure> {
    let (dimension, models, prompts) = tokio::task::spawn_blocking(move || {
        let towers = match parts::towers(&config) {
            Ok(towers) => towers,
            Err(error) => return (None, vec![("model.checkpoint", Err(error))], Vec::new()),
        };
        let works = |towers: &dyn Towers| -> anyhow::Result<String> {
            self_test(towers)?;
            let card = towers.card();
            let notice = card.notice.as_deref().map_or(String::new(), |n| format!("; {n}"));
            Ok(format!(
                "{} ({} parameters, dimension {}, fingerprint {:.12}){notice}",
                card.name, card.parameters, card.dimension, card.fingerprint
            ))
        };
        let sets = config.prompts.sets.iter().map(|name| {
            let set = PromptSet::load(name)?.embed(&*towers, config.prompts.top_k)?;
            let warning =
                set.set.warning(&*towers).map_or(String::new(), |w| format!("; WARNING: {w}"));
            Ok(format!(
                "{} ({} prompts, {}){warning}",
                set.key,
                set.set.texts.len(),
                set.set.language
            ))
        });
        let mut models = vec![("model.checkpoint", works(&*towers))];
        if let Some(candidate) = parts::candidate_model(&config) {
            let clip = Clip::load(&candidate).map_err(anyhow::Error::from);
            let candidate = clip.and_then(|clip| works(&clip));
            models.push((parts::CANDIDATE_CHECKPOINT, candidate));
        }
        let dimension = Some(towers.card().dimension);
        (dimension, models, sets.collect::<Vec<Result<String, anyhow::Error>>>())
    })
    .await?;
    for (setting, model) in models {
        report.line(setting, model);
    }
    for set in prompts {
        report.line("prompts.sets", set);
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
    fn topics_that_would_lose_dead_letters_are_told() {
        let source = settings(&[("max.message.bytes", "1048588")]);
        let usual = settings(&[
            ("retention.ms", "604800000"),
            ("message.timestamp.type", "CreateTime"),
            ("cleanup.policy", "compact"),
            ("max.message.bytes", "1048588"),
        ]);
        let problems = topic_problems(&source, &usual);
        assert_eq!(problems.len(), 3, "{problems:?}");
        assert!(problems[2].contains("1064972"), "{problems:?}");
        let good = settings(&[
            ("retention.ms", "-1"),
            ("message.timestamp.type", "CreateTime"),
            ("cleanup.policy", "delete"),
            ("max.message.bytes", "2000000"),
        ]);
        assert_eq!(topic_problems(&source, &good), Vec::<String>::new());
    }
}
