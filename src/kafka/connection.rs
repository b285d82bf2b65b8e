//! Connection settings that all Kafka clients share, and how their messages and errors are read.

use std::collections::BTreeMap;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::time::Duration;

use bytes::Bytes;
use rdkafka::ClientConfig;
use rdkafka::error::KafkaError;
use rdkafka::message::{BorrowedHeaders, BorrowedMessage, Headers, Message as _};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use tracing::warn;

use crate::diagnosis;
use crate::record::{KafkaMessage, TopicPartition};
use crate::retry::Disposition;
use crate::telemetry::event;
use crate::validate;

/// Options of the section `kafka`: how to connect.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct KafkaOptions {
    /// Bootstrap brokers, each `host:port`, separated by commas.
    pub brokers: String,
    /// Further librdkafka properties of every client, for example `"security.protocol" = "SASL_SSL"`,
    /// `"sasl.mechanism" = "SCRAM-SHA-512"`, `"sasl.username"`, `"sasl.password"`, `"ssl.ca.location"`.
    /// Values are text. Properties that bsap sets itself, such as `acks` and `group.id`, cannot be set here.
    pub properties: BTreeMap<String, String>,
    /// How long a request for metadata or offsets may take, in milliseconds.
    pub request_timeout_ms: u64,
}

impl Default for KafkaOptions {
    fn default() -> Self {
        Self {
            brokers: "localhost:9092".into(),
            properties: BTreeMap::new(),
            request_timeout_ms: 10_000,
        }
    }
}

/// Properties that this program sets itself, most of them because delivery guarantees depend on them;
/// includes librdkafka's aliases.
const RESERVED_PROPERTIES: [&str; 27] = [
    "acks",
    "auto.commit.enable",
    "auto.offset.reset",
    "bootstrap.servers",
    "compression.codec",
    "compression.type",
    "delivery.timeout.ms",
    "enable.auto.commit",
    "enable.auto.offset.store",
    "enable.idempotence",
    "enable.partition.eof",
    "group.id",
    "group.instance.id",
    "group.protocol",
    "linger.ms",
    "max.poll.interval.ms",
    "message.timeout.ms",
    "metadata.broker.list",
    "partition.assignment.strategy",
    "queue.buffering.max.kbytes",
    "queue.buffering.max.messages",
    "queue.buffering.max.ms",
    "queued.max.messages.kbytes",
    "request.required.acks",
    "session.timeout.ms",
    "statistics.interval.ms",
    "topic.metadata.refresh.interval.ms",
];

impl KafkaOptions {
    /// Returns one line per invalid option.
    pub fn validate(&self) -> Vec<String> {
        let mut problems = Vec::new();
        if self.brokers.trim().is_empty() {
            problems.push("brokers: is empty; give host:port, several separated by commas".into());
        }
        validate::check_range(
            &mut problems,
            "request_timeout_ms",
            self.request_timeout_ms,
            100,
            300_000,
        );
        for (key, value) in &self.properties {
            if RESERVED_PROPERTIES.contains(&key.as_str()) {
                problems.push(format!("properties.\"{key}\": is set by bsap itself; remove it"));
            } else if let Some(problem) = diagnosis::check_kafka_property(key, value) {
                problems.push(format!("properties.\"{key}\": {problem}"));
            }
        }
        problems
    }

    /// Returns the configuration of a client with these settings.
    pub fn client_config(&self) -> ClientConfig {
        let mut config = ClientConfig::new();
        config
            .set("client.id", concat!("bsap-", env!("CARGO_PKG_VERSION")))
            .set("socket.keepalive.enable", "true");
        for (key, value) in &self.properties {
            config.set(key, value);
        }
        config.set("bootstrap.servers", &self.brokers);
        config
    }

    /// Returns the configuration of a producer that loses no message and keeps the order within a
    /// partition: idempotent, acknowledged by all in-sync replicas, at most 30 s per message. The topic
    /// decides how large a message may be, because a dead letter is larger than its original.
    pub fn producer_config(&self) -> ClientConfig {
        let mut config = self.client_config();
        config
            .set("enable.idempotence", "true")
            .set("compression.type", "zstd")
            .set("linger.ms", "5")
            .set("queue.buffering.max.messages", "10000")
            .set("queue.buffering.max.kbytes", "65536")
            .set("message.max.bytes", "67108864")
            .set("message.timeout.ms", "30000");
        config
    }
}

/// Replaces a header name that is not UTF-8.
const UNREADABLE_HEADER_PLACEHOLDER: &str = "\u{fffd}";

/// How long a consumer may take to commit its last offsets and leave its group. Without a limit, the client
/// waits forever if no broker answers. Giving up loses nothing: positions are in the table, and the group
/// removes the consumer when its session expires.
const LEAVE_GROUP_TIMEOUT: Duration = Duration::from_secs(15);

/// Runs `close_consumer`, which blocks until the consumer has left its group, on a thread of its own. Returns
/// `None` if that takes too long; the thread then ends with the process.
pub async fn leave_group<T: Send + 'static>(
    close_consumer: impl FnOnce() -> T + Send + 'static,
) -> Option<T> {
    let result =
        tokio::time::timeout(LEAVE_GROUP_TIMEOUT, tokio::task::spawn_blocking(close_consumer))
            .await;
    match result {
        Ok(Ok(done)) => Some(done),
        Ok(Err(panic)) => std::panic::resume_unwind(panic.into_panic()),
        Err(_) => {
            let seconds = LEAVE_GROUP_TIMEOUT.as_secs();
            let error = format!("no answer within {seconds} s when leaving the consumer group");
            warn!(
                event = event::SOURCE_ERROR,
                error, "the consumer ends without leaving its group"
            );
            None
        }
    }
}

/// Copies a message of librdkafka, as one of the partition's first log. A header name that is not UTF-8, which Kafka
/// allows but which makes rdkafka panic, is replaced by `UNREADABLE_HEADER_PLACEHOLDER`.
pub fn to_owned_message(message: &BorrowedMessage<'_>) -> KafkaMessage {
    let header = |headers: &BorrowedHeaders, i| {
        let value = |value: Option<&[u8]>| value.map(Bytes::copy_from_slice);
        let read = || headers.try_get(i).map(|h| (h.key.to_owned(), value(h.value)));
        let read = catch_unwind(AssertUnwindSafe(read));
        read.unwrap_or_else(|_| Some((UNREADABLE_HEADER_PLACEHOLDER.to_owned(), None)))
    };
    let headers = message.headers().map_or_else(Vec::new, |headers| {
        (0..headers.count()).filter_map(|i| header(headers, i)).collect()
    });
    KafkaMessage {
        partition: TopicPartition { topic: message.topic().into(), number: message.partition() },
        log_number: 0,
        offset: message.offset(),
        key: message.key().map(Bytes::copy_from_slice),
        payload: message.payload().map(Bytes::copy_from_slice),
        headers,
        timestamp_ms: message.timestamp().to_millis(),
    }
}

/// Returns how to react to an error of librdkafka.
pub fn classify_error(error: &KafkaError) -> Disposition {
    use rdkafka::types::RDKafkaErrorCode as Code;
    match error.rdkafka_error_code() {
        Some(
            Code::Authentication
            | Code::SaslAuthenticationFailed
            | Code::TopicAuthorizationFailed
            | Code::GroupAuthorizationFailed
            | Code::ClusterAuthorizationFailed
            | Code::InvalidArgument
            | Code::Fatal
            | Code::UnsupportedFeature,
        ) => Disposition::Fatal,
        Some(Code::MessageSizeTooLarge | Code::InvalidMessageSize) => Disposition::DeadLetter,
        Some(_) => Disposition::Retry,
        None => Disposition::Fatal,
    }
}
