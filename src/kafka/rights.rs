//! Tries what the credentials may do, without changing anything.

use std::sync::mpsc;
use std::time::Duration;

use rdkafka::consumer::{CommitMode, Consumer};
use rdkafka::error::KafkaError;
use rdkafka::producer::{BaseRecord, Producer, ProducerContext, ThreadedProducer};
use rdkafka::types::RDKafkaErrorCode as Code;
use rdkafka::{ClientContext, Offset, TopicPartitionList};

use super::connection::KafkaOptions;
use super::failure::{ErrorRecorder, FailureKind, KafkaFailure, failure_kind};
use super::requests::{run_blocking, run_probe};
use crate::record::TopicPartition;

/// A partition that no topic has: an offset that is committed for it is refused, after the rights were checked.
const NO_SUCH_PARTITION: i32 = 1_000_000;
/// An acknowledgement that the protocol does not know: a broker refuses such a message, after the rights were
/// checked and before anything is written.
const NO_SUCH_ACKS: &str = "2";
/// How long a broker may take to find the coordinator of a group and answer a commit, beyond the client's own
/// retries.
const COMMIT_TIMEOUT: Duration = Duration::from_secs(20);

/// Tries the rights of a consumer: Read on `group` and on `topic`, by reading a message and by committing an
/// offset that the broker refuses. Does not join the group.
pub async fn check_consume_rights(
    options: &KafkaOptions,
    group: &str,
    topic: &str,
) -> Result<(), KafkaFailure> {
    let (owned_group, owned_topic) = (group.to_owned(), topic.to_owned());
    let checked = run_probe(options, group, move |probe| {
        let partition = TopicPartition { topic: owned_topic.as_str().into(), number: 0 };
        probe.count_partitions(&owned_topic)?;
        let (earliest, _) = probe.fetch_watermarks(&partition)?;
        probe.try_reading(&partition, earliest)?;
        let subject = format!("consuming topic {owned_topic} in group {owned_group}");
        let mut list = TopicPartitionList::new();
        let added = list.add_partition_offset(&owned_topic, NO_SUCH_PARTITION, Offset::Offset(0));
        added.map_err(|error| probe.failure(&subject, &error))?;
        let Err(error) = probe.consumer.commit(&list, CommitMode::Sync) else { return Ok(()) };
        match failure_kind(&error) {
            FailureKind::NotAuthorised | FailureKind::AuthenticationFailed => {
                Err(probe.failure(&subject, &error))
            }
            // The refusal that was asked for, or that of a group whose members commit.
            _ => match probe.recorded_denial() {
                Some(denial) => Err(probe.failure(&subject, &denial)),
                None => Ok(()),
            },
        }
    });
    tokio::time::timeout(COMMIT_TIMEOUT, checked).await.unwrap_or_else(|_| {
        let reason = format!("no answer within {} s", COMMIT_TIMEOUT.as_secs());
        let kind = FailureKind::BrokersUnreachable;
        Err(KafkaFailure::new(kind, &options.brokers, &format!("group {group}"), reason))
    })
}

/// Tries the right to write to `topic`, by a message that the broker refuses.
pub async fn check_write_right(options: &KafkaOptions, topic: &str) -> Result<(), KafkaFailure> {
    let (owned, topic) = (options.clone(), topic.to_owned());
    run_blocking(move || try_write(&owned, &topic)).await
}

fn try_write(options: &KafkaOptions, topic: &str) -> Result<(), KafkaFailure> {
    let timeout = Duration::from_millis(options.request_timeout_ms);
    let (sender, result) = mpsc::channel();
    let mut config = options.client_config();
    config
        .set("acks", NO_SUCH_ACKS)
        .set("enable.idempotence", "false")
        .set("retries", "0")
        .set("message.timeout.ms", timeout.as_millis().to_string())
        .set("log_level", "0");
    let subject = format!("writing to topic {topic}");
    let failure = |error: &KafkaError, recorded| {
        KafkaFailure::from_error(&options.brokers, &subject, error, recorded)
    };
    let context = WriteResult { sender, errors: ErrorRecorder::default() };
    let producer: ThreadedProducer<WriteResult> =
        config.create_with_context(context).map_err(|error| failure(&error, None))?;
    producer
        .send(BaseRecord::to(topic).key("bsap check").payload(""))
        .map_err(|(error, _)| failure(&error, None))?;
    // The producer itself gives up after `timeout`.
    let written = result.recv_timeout(timeout + COMMIT_TIMEOUT);
    let recorded = producer.context().errors.take();
    match written {
        Ok(Ok(())) => Ok(()),
        Ok(Err(error)) if error.rdkafka_error_code() == Some(Code::InvalidRequiredAcks) => Ok(()),
        Ok(Err(error)) if error.rdkafka_error_code() == Some(Code::MessageTimedOut) => {
            let timeout = KafkaError::MessageProduction(Code::OperationTimedOut);
            Err(failure(&timeout, recorded))
        }
        Ok(Err(error)) => Err(failure(&error, recorded)),
        Err(_) => Err(failure(&KafkaError::Canceled, recorded)),
    }
}

/// Passes on what became of the message.
struct WriteResult {
    sender: mpsc::Sender<Result<(), KafkaError>>,
    errors: ErrorRecorder,
}

impl ClientContext for WriteResult {
    fn error(&self, error: KafkaError, reason: &str) {
        self.errors.error(error, reason);
    }

    fn log(&self, _: rdkafka::config::RDKafkaLogLevel, _: &str, _: &str) {}
}

impl ProducerContext for WriteResult {
    type DeliveryOpaque = ();

    fn delivery(&self, result: &rdkafka::message::DeliveryResult<'_>, (): ()) {
        let result = result.as_ref().map(|_| ()).map_err(|(error, _)| error.clone());
        // Nobody waits any more only after the timeout.
        let _ = self.sender.send(result);
    }
}
