//! What `bsap status` says of ingestion: whether messages can be consumed, and how far behind it is.

use comfy_table::Table;
use comfy_table::presets::UTF8_HORIZONTAL_ONLY;
use serde_json::{Value, json};
use tokio_util::sync::CancellationToken;

use crate::catalogue::StateStore;
use crate::commands::shared::error::{CommandError, CommandResult};
use crate::commands::shared::printing::print_line;
use crate::commands::shared::worker::generation_group;
use crate::config::Config;
use crate::ingest::source::SourceState;
use crate::kafka::{self, FailureKind, KafkaFailure, LogIdentity, PartitionLog, PartitionLogs};
use crate::record::{StoredPosition, TopicPartition};
use crate::store::Store;
use crate::table::{self, Generation};

/// Whether messages of the live generation are consumed, and how far behind it is.
pub struct IngestionStatus {
    state: SourceState,
    detail: String,
    /// Progress in each partition; `None` if it is not known.
    partitions: Option<Vec<PartitionProgress>>,
    /// Number of workers that have partitions; `None` if it is not known.
    consuming_workers: Option<usize>,
}

/// How much of one partition is stored.
struct PartitionProgress {
    number: i32,
    stored: StoredPosition,
    log: PartitionLog,
}

impl PartitionProgress {
    /// Returns how many messages are not stored yet. Of a log that was not consumed, all are.
    fn lag_messages(&self) -> i64 {
        let PartitionLog { earliest_offset, end_offset, identity } = &self.log;
        let position = match identity {
            LogIdentity::Other(_) => *earliest_offset,
            _ => self.stored.next_offset.unwrap_or_default().max(*earliest_offset),
        };
        (end_offset - position).max(0)
    }

    /// Returns how many messages were removed from the log before they were stored.
    fn lost_messages(&self) -> i64 {
        match self.log.identity {
            LogIdentity::Other(_) => 0,
            _ => {
                let wanted = self.stored.next_wanted_offset();
                wanted.map_or(0, |wanted| (self.log.earliest_offset - wanted).max(0))
            }
        }
    }
}

/// Returns the exit code of `bsap status` for a state; 1 and 2 are those of every command.
fn exit_code(state: SourceState) -> u8 {
    match state {
        SourceState::Consuming | SourceState::Starting => 0,
        SourceState::NoPartitionsAssigned => 3,
        SourceState::DeadLetterTopicMissing => 4,
        SourceState::LogReplaced => 5,
        SourceState::TopicMissing => 6,
        SourceState::NotAuthorised => 7,
        SourceState::AuthenticationFailed => 8,
        SourceState::BrokersUnreachable => 9,
    }
}

impl IngestionStatus {
    /// Asks Kafka and the table of `generation`. Fails only if the table cannot be read.
    pub async fn load(
        config: &Config,
        store: &Store,
        generation: &Generation,
        token: &CancellationToken,
    ) -> anyhow::Result<Self> {
        let mut status = Self {
            state: SourceState::Consuming,
            detail: String::new(),
            partitions: None,
            consuming_workers: None,
        };
        let read = read_partition_logs(config, store, generation, &config.source.topic, token);
        let read_failure = match read.await? {
            Err(failure) => {
                status.raise_failure(&failure);
                return Ok(status);
            }
            Ok((progress, read_failure)) => {
                for one in &progress {
                    if let LogIdentity::Other(reason) = &one.log.identity {
                        let topic = &config.source.topic;
                        status.raise(
                            SourceState::LogReplaced,
                            format!(
                                "the log of {topic}[{}] is not the one that was consumed: {reason}; a worker consumes it from its beginning",
                                one.number
                            ),
                        );
                    }
                }
                status.partitions = Some(progress);
                read_failure
            }
        };
        if let Some(failure) = read_failure {
            status.raise_failure(&failure);
        }
        let mut source = config.source.clone();
        source.group = generation_group(config, &StateStore::new(store), generation).await?;
        let (group, topic) = (source.group_id(), source.topic);
        let dead_letters = config.dead_letter.topic.clone();
        let (dead_letters, workers) =
            kafka::run_probe(&config.kafka, &group.clone(), move |probe| {
                let dead_letters = probe.count_partitions(&dead_letters).map(|_| ());
                Ok((dead_letters, probe.count_consuming_members(&group, &topic)))
            })
            .await?;
        match dead_letters {
            Ok(()) => {}
            Err(failure) if failure.kind == FailureKind::TopicMissing => {
                status.raise(SourceState::DeadLetterTopicMissing, failure.to_string());
            }
            Err(failure) => status.raise_failure(&failure),
        }
        match workers {
            Ok(count) => status.set_consuming_workers(count),
            Err(failure) => status.raise_failure(&failure),
        }
        Ok(status)
    }

    /// Records how many workers have partitions; `None` if the brokers cannot list groups.
    fn set_consuming_workers(&mut self, count: Option<usize>) {
        self.consuming_workers = count;
        match count {
            Some(0) => {
                let detail = "no worker has partitions of the topic; start one with `bsap ingest`";
                self.raise(SourceState::NoPartitionsAssigned, detail.into());
            }
            // That messages are consumed is then an assumption.
            None if self.state == SourceState::Consuming => {
                self.detail = "the brokers cannot list consumer groups: whether any worker has partitions is not known".into();
            }
            _ => {}
        }
    }

    /// Sets the state unless a graver one is set.
    fn raise(&mut self, state: SourceState, detail: String) {
        if state > self.state {
            (self.state, self.detail) = (state, detail);
        }
    }

    fn raise_failure(&mut self, failure: &KafkaFailure) {
        // What may pass by itself keeps messages from being consumed as well.
        let state = SourceState::from_failure(failure.kind);
        self.raise(state.unwrap_or(SourceState::BrokersUnreachable), failure.to_string());
    }

    /// Returns how many messages are not stored yet; `None` if it is not known.
    fn lag_messages(&self) -> Option<i64> {
        Some(self.partitions.as_ref()?.iter().map(PartitionProgress::lag_messages).sum())
    }

    /// Returns the fields of `bsap status --json`.
    pub fn to_json(&self) -> Value {
        let partition = |one: &PartitionProgress| {
            json!({
                "partition": one.number, "position": one.stored.next_offset,
                "earliest_offset": one.log.earliest_offset, "end_offset": one.log.end_offset,
                "lag": one.lag_messages(), "lost": one.lost_messages(), "log_number": one.stored.log_number,
                "log": one.log.identity.as_str(),
            })
        };
        let partitions = self.partitions.as_ref();
        let partitions = partitions.map(|all| all.iter().map(partition).collect::<Vec<_>>());
        json!({
            "state": self.state, "detail": self.detail, "lag_messages": self.lag_messages(),
            "consuming_workers": self.consuming_workers, "partitions": partitions,
        })
    }

    /// Prints the state, the lag and a table of the partitions.
    pub fn print(&self, config: &Config) {
        let workers = self.consuming_workers.map_or(String::new(), |n| format!(", {n} workers"));
        print_line!("\ningestion   {}{workers}", self.state.as_str());
        if !self.detail.is_empty() {
            print_line!("            {}", self.detail);
        }
        let Some((partitions, lag)) = self.partitions.as_ref().zip(self.lag_messages()) else {
            return print_line!("lag         unknown");
        };
        print_line!("lag         {lag} messages of {} are not stored yet", config.source.topic);
        let lost: i64 = partitions.iter().map(PartitionProgress::lost_messages).sum();
        if lost > 0 {
            print_line!(
                "lost        {lost} messages were removed from Kafka before they were stored; run a reconcile of the catalogue"
            );
        }
        let replay = &config.source.replay_name;
        if !replay.is_empty() {
            print_line!("            by the positions of the replay {replay} (source.replay_name)");
        }
        let mut table = Table::new();
        table.load_style(UTF8_HORIZONTAL_ONLY);
        table.set_header(["partition", "log", "stored up to", "Kafka has", "lag"]);
        for one in partitions {
            let log = match one.log.identity {
                LogIdentity::Other(_) => "another one".into(),
                _ => one.stored.log_number.to_string(),
            };
            table.add_row([
                one.number.to_string(),
                log,
                one.stored.next_offset.map_or("nothing".into(), |offset| offset.to_string()),
                format!("{} to {}", one.log.earliest_offset, one.log.end_offset),
                one.lag_messages().to_string(),
            ]);
        }
        print_line!("{table}");
    }

    /// Fails with the exit code of the state if messages are not consumed.
    pub fn into_result(self) -> CommandResult {
        match exit_code(self.state) {
            0 => Ok(()),
            exit_code => Err(CommandError::Unhealthy {
                exit_code,
                finding: format!("{}: {}", self.state.as_str(), self.detail),
            }),
        }
    }
}

/// The progress in each partition, and why no log was recognised if none could be read; or why Kafka did not
/// answer.
type PartitionLogsResult = Result<(Vec<PartitionProgress>, Option<KafkaFailure>), KafkaFailure>;

/// Returns the progress of a generation in each partition of `topic`.
async fn read_partition_logs(
    config: &Config,
    store: &Store,
    generation: &Generation,
    topic: &str,
    token: &CancellationToken,
) -> anyhow::Result<PartitionLogsResult> {
    let (group, counted_topic) = (config.source.group_id(), topic.to_owned());
    let counted = kafka::run_probe(&config.kafka, &group, move |probe| {
        probe.count_partitions(&counted_topic)
    });
    let count = match counted.await {
        Ok(count) => count,
        Err(failure) => return Ok(Err(failure)),
    };
    let writer =
        table::open_existing_writer(store, generation, config.table.max_commit_attempts).await?;
    let mut writer = writer.with_replay_name(&config.source.replay_name);
    let mut stored = Vec::with_capacity(count);
    for number in 0..count as i32 {
        let partition = TopicPartition { topic: topic.into(), number };
        let position = writer.read_stored_position(&partition, token).await?;
        stored.push((partition, position));
    }
    let to_identify = stored.clone();
    let identified = kafka::run_probe(&config.kafka, &group, move |probe| {
        kafka::identify_logs(probe, &to_identify)
    })
    .await;
    Ok(identified.map(|PartitionLogs { logs, read_failure }| {
        let progress = stored.into_iter().zip(logs).map(|((partition, stored), log)| {
            PartitionProgress { number: partition.number, stored, log }
        });
        (progress.collect(), read_failure)
    }))
}

/// Returns how many messages of `topic` a generation has not stored yet.
pub async fn read_lag_messages(
    config: &Config,
    store: &Store,
    generation: &Generation,
    topic: &str,
    token: &CancellationToken,
) -> anyhow::Result<i64> {
    let (progress, _) = read_partition_logs(config, store, generation, topic, token).await??;
    Ok(progress.iter().map(PartitionProgress::lag_messages).sum())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_state_but_consuming_has_an_exit_code_of_its_own() {
        let mut codes: Vec<u8> = SourceState::ALL.map(exit_code).into_iter().skip(2).collect();
        codes.sort_unstable();
        codes.dedup();
        assert_eq!(codes.len(), SourceState::ALL.len() - 2);
        assert!(codes[0] > 2, "1 and 2 are those of every command");
        assert_eq!(exit_code(SourceState::Consuming), 0);
    }

    #[test]
    fn workers_that_cannot_be_counted_are_unknown_and_not_missing() {
        let status = |state, count| {
            let detail = String::new();
            let mut status =
                IngestionStatus { state, detail, partitions: None, consuming_workers: None };
            status.set_consuming_workers(count);
            (status.state, status.to_json()["consuming_workers"].clone(), status.detail)
        };
        let (state, workers, detail) = status(SourceState::Consuming, None);
        assert_eq!((state, workers), (SourceState::Consuming, Value::Null));
        assert!(detail.contains("not known"), "{detail}");
        let (state, workers, detail) = status(SourceState::Consuming, Some(0));
        assert_eq!((state, workers), (SourceState::NoPartitionsAssigned, json!(0)));
        assert!(detail.contains("bsap ingest"), "{detail}");
        for (state, count) in [(SourceState::Consuming, Some(2)), (SourceState::LogReplaced, None)]
        {
            assert_eq!(status(state, count), (state, json!(count), String::new()));
        }
    }

    #[test]
    fn of_a_log_that_was_not_consumed_everything_is_lag() {
        let progress = |identity, next_offset| PartitionProgress {
            number: 0,
            stored: StoredPosition { next_offset, ..StoredPosition::default() },
            log: PartitionLog { earliest_offset: 2, end_offset: 12, identity },
        };
        let other = || LogIdentity::Other(String::new());
        for (identity, next_offset, lag, lost) in [
            (LogIdentity::Same, Some(12), 0, 0),
            (LogIdentity::Unknown, None, 10, 0),
            (other(), Some(12), 10, 0),
            // Retention has removed what was to be consumed next.
            (LogIdentity::Unknown, Some(0), 10, 2),
            (other(), Some(0), 10, 0),
        ] {
            let one = progress(identity, next_offset);
            assert_eq!((one.lag_messages(), one.lost_messages()), (lag, lost), "{next_offset:?}");
        }
    }
}
