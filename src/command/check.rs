//! `bsap check`.

use std::fmt::Display;
use std::path::Path;

use super::{Done, Failure, parts};
use crate::clip::self_test;
use crate::config::Config;
use crate::prompts::PromptSet;
use crate::{http, kafka};

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
    check_model(config.clone(), &mut report).await?;
    let listened = http::listen(config.http.listen).await;
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
    let topics =
        [("source.topic", &config.source.topic), ("dead_letter.topic", &config.dead_letter.topic)];
    let names = topics.map(|(_, topic)| topic.as_str());
    match kafka::probe(&config.kafka, &names).await {
        Err(error) => report.line("kafka.brokers", Err::<String, _>(error)),
        Ok(partitions) => {
            report.line("kafka.brokers", Ok::<_, String>(config.kafka.brokers.clone()));
            for ((key, topic), count) in topics.into_iter().zip(partitions) {
                let found = match count {
                    0 => Err(format!(
                        "topic {topic} does not exist; create it, or let the brokers create topics"
                    )),
                    n => Ok(format!("topic {topic}, {n} partitions")),
                };
                report.line(key, found);
            }
        }
    }
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

/// Loads and tests the model, and embeds the prompt sets.
async fn check_model(config: Config, report: &mut Report) -> Result<(), Failure> {
    let (model, prompts) = tokio::task::spawn_blocking(move || {
        let towers = match parts::towers(&config) {
            Ok(towers) => towers,
            Err(error) => return (Err(error), Vec::new()),
        };
        let works = || {
            self_test(&*towers)?;
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
        (works(), sets.collect::<Vec<Result<String, anyhow::Error>>>())
    })
    .await?;
    report.line("model.checkpoint", model);
    for set in prompts {
        report.line("prompts.sets", set);
    }
    Ok(())
}
