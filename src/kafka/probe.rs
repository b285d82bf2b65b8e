//! Requests of a client that consumes nothing by itself: topics, offsets, single messages, groups.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use rdkafka::consumer::{BaseConsumer, Consumer};
use rdkafka::error::{KafkaError, KafkaResult};
use rdkafka::metadata::Metadata;
use rdkafka::types::RDKafkaErrorCode as Code;
use rdkafka::{Offset, TopicPartitionList};

use super::connection::{KafkaOptions, to_owned_message};
use super::failure::{
    ErrorRecorder, FailureKind, KafkaFailure, failure_kind, is_authentication_error,
};
use crate::diagnosis::describe;
use crate::record::{LogAnchor, TopicPartition};

/// How long the first attempt of a request may take; each further one takes twice as long. After each it is
/// checked whether the client knows why no broker answers, so that wrong credentials are reported soon and not
/// after `kafka.request_timeout_ms`.
const FIRST_ATTEMPT: Duration = Duration::from_millis(500);
/// Pause after a request that failed at once.
const RETRY_PAUSE: Duration = Duration::from_millis(100);
/// How long one poll for a message waits.
const POLL_TIMEOUT: Duration = Duration::from_millis(100);
/// Largest number of errors that are collected at a time.
const MAX_COLLECTED_ERRORS: usize = 100;
/// How long a broker has to refuse a read, before the right to read is taken for granted.
const READ_TRIAL: Duration = Duration::from_secs(3);
/// Bytes that are fetched of a partition to read one of its messages. A larger message is still returned
/// whole.
const FETCH_BYTES: &str = "65536";

/// A client for single requests. All of them block, at most for `kafka.request_timeout_ms`, and fail with the
/// reason that an operator must act on.
pub struct KafkaProbe {
    pub(super) consumer: BaseConsumer<ErrorRecorder>,
    pub(super) brokers: String,
    timeout: Duration,
}

impl KafkaProbe {
    /// Creates a client; opens no connection yet. It never joins `group_id`, which librdkafka requires for
    /// reading messages.
    pub fn new(options: &KafkaOptions, group_id: &str) -> Result<Self, KafkaFailure> {
        let mut config = options.client_config();
        config
            .set("group.id", group_id)
            .set("enable.auto.commit", "false")
            .set("enable.auto.offset.store", "false")
            .set("auto.offset.reset", "error")
            .set("fetch.message.max.bytes", FETCH_BYTES)
            .set("fetch.wait.max.ms", "50")
            // Only one message is wanted: nothing is fetched ahead.
            .set("queued.min.messages", "1")
            .set("queued.max.messages.kbytes", "1024")
            .set("log_level", "0");
        let consumer = config.create_with_context(ErrorRecorder::default()).map_err(|error| {
            let (kind, subject) = (FailureKind::Other, "kafka.properties");
            KafkaFailure::new(kind, &options.brokers, subject, describe(&error))
        })?;
        let timeout = Duration::from_millis(options.request_timeout_ms);
        Ok(Self { consumer, brokers: options.brokers.clone(), timeout })
    }

    /// Returns the number of partitions of `topic`.
    pub fn count_partitions(&self, topic: &str) -> Result<usize, KafkaFailure> {
        let subject = format!("topic {topic}");
        self.request(&subject, |timeout| {
            partition_count(&self.consumer.fetch_metadata(Some(topic), timeout)?, topic)
        })
    }

    /// Returns the beginning and the end of a partition's log.
    pub fn fetch_watermarks(&self, partition: &TopicPartition) -> Result<(i64, i64), KafkaFailure> {
        self.request(&format!("topic {}", partition.topic), |timeout| {
            self.consumer.fetch_watermarks(&partition.topic, partition.number, timeout)
        })
    }

    /// Reads the first message at or after each of `offsets`, each partition once. What is not there, or is not
    /// read in time, is missing in the result.
    pub fn read_messages_at(
        &self,
        offsets: &[(TopicPartition, i64)],
    ) -> Result<BTreeMap<TopicPartition, LogAnchor>, KafkaFailure> {
        self.read_for(self.timeout, offsets)
    }

    /// Tries the right to read a partition, whether or not it has a message at `offset`.
    pub fn try_reading(&self, partition: &TopicPartition, offset: i64) -> Result<(), KafkaFailure> {
        self.read_for(READ_TRIAL, &[(partition.clone(), offset)]).map(|_| ())
    }

    fn read_for(
        &self,
        limit: Duration,
        offsets: &[(TopicPartition, i64)],
    ) -> Result<BTreeMap<TopicPartition, LogAnchor>, KafkaFailure> {
        let mut found = BTreeMap::new();
        if offsets.is_empty() {
            return Ok(found);
        }
        let mut list = TopicPartitionList::with_capacity(offsets.len());
        for (partition, offset) in offsets {
            list.add_partition_offset(&partition.topic, partition.number, Offset::Offset(*offset))
                .map_err(|error| self.failure("the messages of a topic", &error))?;
        }
        self.consumer.assign(&list).map_err(|error| self.failure("a topic", &error))?;
        let started = Instant::now();
        let (mut out_of_range, mut denied) = (0, None);
        while found.len() + out_of_range < offsets.len()
            && denied.is_none()
            && started.elapsed() < limit
        {
            match self.consumer.poll(POLL_TIMEOUT) {
                Some(Ok(message)) => {
                    let message = to_owned_message(&message);
                    let anchor = message.anchor();
                    found.entry(message.partition).or_insert(anchor);
                }
                Some(Err(error)) => match error.rdkafka_error_code() {
                    Some(Code::AutoOffsetReset) => out_of_range += 1,
                    Some(Code::TopicAuthorizationFailed) => denied = Some(error),
                    Some(code) if is_authentication_error(code) => denied = Some(error),
                    // Others may pass; the time is limited.
                    _ => {}
                },
                None => {}
            }
        }
        self.consumer.unassign().map_err(|error| self.failure("a topic", &error))?;
        self.collect_errors();
        let recorded = self.consumer.context().take();
        match denied {
            Some(error) => {
                let subject = format!("reading topic {}", offsets[0].0.topic);
                Err(KafkaFailure::from_error(&self.brokers, &subject, &error, recorded))
            }
            None => Ok(found),
        }
    }

    /// Returns how many members of `group`, which must be that of the probe, have partitions; 0 also if there is
    /// no such group, and `None` if the brokers cannot list groups.
    pub fn count_consuming_members(
        &self,
        group: &str,
        topic: &str,
    ) -> Result<Option<usize>, KafkaFailure> {
        let subject = format!("group {group}");
        let count = self.request(&subject, |timeout| {
            let groups = match self.consumer.fetch_group_list(Some(group), timeout) {
                Err(error) if error.rdkafka_error_code() == Some(Code::UnsupportedFeature) => {
                    return Ok(None);
                }
                groups => groups?,
            };
            let members = groups.groups().iter().flat_map(|group| group.members());
            Ok(Some(members.filter(|member| has_partitions(member.assignment())).count()))
        })?;
        if count == Some(0) {
            // Groups that may not be described are not listed. Only a request for offsets says so.
            let mut list = TopicPartitionList::new();
            list.add_partition(topic, 0);
            self.request(&subject, |timeout| {
                self.consumer.committed_offsets(list.clone(), timeout)
            })?;
        }
        Ok(count)
    }

    /// Repeats `request` until it succeeds, cannot succeed, or `kafka.request_timeout_ms` is over.
    pub(super) fn request<T>(
        &self,
        subject: &str,
        request: impl Fn(Duration) -> KafkaResult<T>,
    ) -> Result<T, KafkaFailure> {
        let (started, mut attempt_limit) = (Instant::now(), FIRST_ATTEMPT);
        loop {
            let remaining = self.timeout.saturating_sub(started.elapsed());
            let error = match request(remaining.clamp(RETRY_PAUSE, attempt_limit)) {
                Ok(answer) => {
                    // Errors from before must not explain a later failure.
                    self.collect_errors();
                    self.consumer.context().take();
                    return Ok(answer);
                }
                Err(error) => error,
            };
            self.collect_errors();
            let failure = self.failure(subject, &error);
            let may_pass =
                matches!(failure.kind, FailureKind::BrokersUnreachable | FailureKind::Other);
            if !may_pass || remaining.is_zero() {
                self.consumer.context().forget_refusal();
                return Err(failure);
            }
            std::thread::sleep(RETRY_PAUSE);
            attempt_limit = (attempt_limit * 2).min(self.timeout).max(FIRST_ATTEMPT);
        }
    }

    /// Serves the client's queue, so that it reports its errors. Nothing may be assigned.
    fn collect_errors(&self) {
        for _ in 0..MAX_COLLECTED_ERRORS {
            if self.consumer.poll(Duration::ZERO).is_none() {
                break;
            }
        }
    }

    /// Serves the client's queue; returns an error that says that a right is missing, if one was reported.
    pub(super) fn recorded_denial(&self) -> Option<KafkaError> {
        for _ in 0..MAX_COLLECTED_ERRORS {
            let error = self.consumer.poll(Duration::ZERO)?.err();
            let kind = error.as_ref().map(failure_kind);
            if kind == Some(FailureKind::NotAuthorised) {
                return error;
            }
        }
        None
    }

    pub(super) fn failure(&self, subject: &str, error: &KafkaError) -> KafkaFailure {
        let recorded = self.consumer.context().most_telling();
        KafkaFailure::from_error(&self.brokers, subject, error, recorded)
    }
}

/// Returns the number of partitions of `topic`, by the answer to a request for it.
pub fn partition_count(metadata: &Metadata, topic: &str) -> KafkaResult<usize> {
    let found = metadata.topics().iter().find(|found| found.name() == topic);
    let found = found.ok_or(KafkaError::MetadataFetch(Code::UnknownTopicOrPartition))?;
    // Only a topic without an error has a list of partitions.
    match found.error() {
        Some(error) => Err(KafkaError::MetadataFetch(error.into())),
        None => Ok(found.partitions().len()),
    }
}

/// Whether the assignment of a group's member, as the protocol `consumer` writes it, names a topic: two bytes of
/// version, then the number of topics.
fn has_partitions(assignment: Option<&[u8]>) -> bool {
    let topics = assignment.and_then(|bytes| bytes.get(2..6));
    topics.is_some_and(|count| count.iter().any(|byte| *byte != 0))
}

#[cfg(test)]
mod tests {
    use rdkafka::mocking::MockCluster;
    use rdkafka::producer::{BaseProducer, BaseRecord, Producer};
    use rdkafka::types::RDKafkaRespErr;

    use super::*;

    fn partition(number: i32) -> TopicPartition {
        TopicPartition { topic: "images".into(), number }
    }

    #[test]
    fn missing_denied_and_unreachable_topics_fail_each_in_a_way_of_its_own() {
        let cluster = MockCluster::new(1).unwrap();
        cluster.create_topic("images", 3, 1).unwrap();
        cluster
            .topic_error("denied", RDKafkaRespErr::RD_KAFKA_RESP_ERR_TOPIC_AUTHORIZATION_FAILED)
            .unwrap();
        cluster
            .topic_error("missing", RDKafkaRespErr::RD_KAFKA_RESP_ERR_UNKNOWN_TOPIC_OR_PART)
            .unwrap();
        let options = |brokers: String| KafkaOptions {
            brokers,
            request_timeout_ms: 3_000,
            ..KafkaOptions::default()
        };
        let probe = KafkaProbe::new(&options(cluster.bootstrap_servers()), "g").unwrap();
        assert_eq!(probe.count_partitions("images").unwrap(), 3);
        let kind = |topic| probe.count_partitions(topic).unwrap_err().kind;
        assert_eq!(kind("denied"), FailureKind::NotAuthorised);
        assert_eq!(kind("missing"), FailureKind::TopicMissing);
        // After several attempts, and again: the client reports the reason once.
        let closed = KafkaOptions { request_timeout_ms: 1_000, ..options("127.0.0.1:1".into()) };
        let probe = KafkaProbe::new(&closed, "g").unwrap();
        for _ in 0..2 {
            let failure = probe.count_partitions("images").unwrap_err();
            assert_eq!(failure.kind, FailureKind::BrokersUnreachable);
            assert!(failure.to_string().contains("Connection refused"), "{failure}");
        }
    }

    #[test]
    fn single_messages_are_read_back_with_the_fingerprint_of_the_consumer() {
        let cluster = MockCluster::new(1).unwrap();
        cluster.create_topic("images", 2, 1).unwrap();
        let options =
            KafkaOptions { brokers: cluster.bootstrap_servers(), ..KafkaOptions::default() };
        let producer: BaseProducer = options.producer_config().create().unwrap();
        for i in 0..4 {
            let value = format!("value {i}");
            let record = BaseRecord::to("images").partition(0).key("k").payload(&value);
            producer.send(record.timestamp(1_000 + i)).unwrap();
        }
        producer.flush(Duration::from_secs(10)).unwrap();
        let options = KafkaOptions { request_timeout_ms: 2_000, ..options };
        let probe = KafkaProbe::new(&options, "g").unwrap();
        let found = probe.read_messages_at(&[(partition(0), 2), (partition(1), 0)]).unwrap();
        let expected = crate::record::KafkaMessage {
            partition: partition(0),
            log_number: 0,
            offset: 2,
            key: Some("k".into()),
            payload: Some("value 2".into()),
            headers: Vec::new(),
            timestamp_ms: Some(1_002),
        };
        assert_eq!(found.into_iter().collect::<Vec<_>>(), [(partition(0), expected.anchor())]);
        assert_eq!(probe.fetch_watermarks(&partition(0)).unwrap(), (0, 4));
    }

    #[test]
    fn members_are_unknown_if_brokers_cannot_list_groups() {
        // The cluster in this process cannot.
        let cluster = MockCluster::new(1).unwrap();
        let options =
            KafkaOptions { brokers: cluster.bootstrap_servers(), ..KafkaOptions::default() };
        let probe = KafkaProbe::new(&options, "g").unwrap();
        assert_eq!(probe.count_consuming_members("g", "images").unwrap(), None);
    }

    #[test]
    fn a_member_with_an_empty_assignment_has_no_partitions() {
        assert!(!has_partitions(None));
        assert!(!has_partitions(Some(&[])));
        assert!(!has_partitions(Some(&[0, 1, 0, 0, 0, 0, 255, 255, 255, 255])));
        assert!(has_partitions(Some(&[0, 1, 0, 0, 0, 1, 0, 6])));
    }
}
