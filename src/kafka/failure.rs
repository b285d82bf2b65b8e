//! Why a request to Kafka failed.

use std::sync::{Mutex, PoisonError};

use rdkafka::ClientContext;
use rdkafka::config::RDKafkaLogLevel;
use rdkafka::consumer::ConsumerContext;
use rdkafka::error::KafkaError;
use rdkafka::types::RDKafkaErrorCode as Code;

use crate::diagnosis::describe;

/// Why a request failed, as an operator must act on it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FailureKind {
    /// No broker answers.
    BrokersUnreachable,
    /// The brokers refuse the credentials, or a TLS handshake fails.
    AuthenticationFailed,
    /// The credentials lack a right.
    NotAuthorised,
    /// The topic does not exist.
    TopicMissing,
    /// Anything else; it may pass.
    Other,
}

/// A request to Kafka failed.
#[derive(Debug, Clone, thiserror::Error)]
#[error("{}", self.describe())]
pub struct KafkaFailure {
    /// What the operator must act on.
    pub kind: FailureKind,
    /// The configured brokers.
    brokers: String,
    /// What was requested, such as `topic images`.
    subject: String,
    /// What librdkafka says.
    reason: String,
}

impl KafkaFailure {
    /// Creates a failure of a request for `subject`.
    pub fn new(kind: FailureKind, brokers: &str, subject: &str, reason: impl Into<String>) -> Self {
        let (brokers, subject) = (brokers.to_owned(), subject.to_owned());
        Self { kind, brokers, subject, reason: reason.into() }
    }

    /// Creates a failure from an error of librdkafka. `recorded` is the most telling error that the client
    /// has reported apart from it: requests only time out if the credentials are wrong.
    pub(super) fn from_error(
        brokers: &str,
        subject: &str,
        error: &KafkaError,
        recorded: Option<(Code, String)>,
    ) -> Self {
        if let Some((recorded_code, reason)) = &recorded
            && is_authentication_error(*recorded_code)
        {
            return Self::new(FailureKind::AuthenticationFailed, brokers, subject, reason);
        }
        let kind = failure_kind(error);
        let reason = match recorded {
            Some((_, reason)) if kind == FailureKind::BrokersUnreachable => {
                let code = error.rdkafka_error_code();
                format!("{}: {reason}", code.map_or(error.to_string(), |code| code.to_string()))
            }
            _ => describe(error),
        };
        Self::new(kind, brokers, subject, reason)
    }

    fn describe(&self) -> String {
        let Self { kind, brokers, subject, reason } = self;
        match kind {
            FailureKind::BrokersUnreachable => format!(
                "kafka.brokers: no broker answers at {brokers}: {reason}; check the address, the network and kafka.properties"
            ),
            FailureKind::AuthenticationFailed => format!(
                "kafka.properties: the brokers at {brokers} refuse the connection: {reason}; check security.protocol, sasl.mechanism, sasl.username, sasl.password and the certificates"
            ),
            FailureKind::NotAuthorised => format!(
                "{subject}: the credentials in kafka.properties lack a right: {reason}; grant it (docs/rights.md lists the rights of each role)"
            ),
            FailureKind::TopicMissing => {
                format!("{subject} does not exist; create it, or correct its name")
            }
            FailureKind::Other => format!("{subject}: Kafka at {brokers}: {reason}"),
        }
    }
}

/// Returns what an error of librdkafka means for an operator.
pub fn failure_kind(error: &KafkaError) -> FailureKind {
    error.rdkafka_error_code().map_or(FailureKind::Other, kind_of_code)
}

/// Returns what an error code of librdkafka or of a broker means for an operator.
pub(super) fn kind_of_code(code: Code) -> FailureKind {
    match code {
        code if is_authentication_error(code) => FailureKind::AuthenticationFailed,
        Code::TopicAuthorizationFailed
        | Code::GroupAuthorizationFailed
        | Code::ClusterAuthorizationFailed
        | Code::TransactionalIdAuthorizationFailed => FailureKind::NotAuthorised,
        // Not `UnknownPartition`: a client says that until it knows of added partitions.
        Code::UnknownTopicOrPartition | Code::UnknownTopic => FailureKind::TopicMissing,
        Code::AllBrokersDown
        | Code::BrokerTransportFailure
        | Code::OperationTimedOut
        | Code::Resolve
        | Code::RequestTimedOut => FailureKind::BrokersUnreachable,
        _ => FailureKind::Other,
    }
}

pub(super) fn is_authentication_error(code: Code) -> bool {
    matches!(
        code,
        Code::Authentication
            | Code::SaslAuthenticationFailed
            | Code::UnsupportedSASLMechanism
            | Code::IllegalSASLState
            | Code::SSL
    )
}

/// Keeps the most telling error that a client reports apart from its requests: the reason why no broker can
/// be used. Nothing is logged: whoever made the request reports it.
#[derive(Debug, Default)]
pub struct ErrorRecorder {
    most_telling: Mutex<Option<(Code, String)>>,
}

impl ErrorRecorder {
    /// Returns the most telling error, and keeps it: a client reports the same one only once.
    pub(super) fn most_telling(&self) -> Option<(Code, String)> {
        self.most_telling.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Forgets refused credentials: if no broker can be reached later, they are not the reason.
    pub(super) fn forget_refusal(&self) {
        let mut kept = self.most_telling.lock().unwrap_or_else(PoisonError::into_inner);
        if kept.as_ref().is_some_and(|(code, _)| is_authentication_error(*code)) {
            *kept = None;
        }
    }

    /// Returns the most telling error since the last call.
    pub(super) fn take(&self) -> Option<(Code, String)> {
        self.most_telling.lock().unwrap_or_else(PoisonError::into_inner).take()
    }

    fn record(&self, code: Code, reason: &str) {
        let rank = |code: Code| match code {
            code if is_authentication_error(code) => 2,
            // Says nothing that a timeout does not say.
            Code::AllBrokersDown => 0,
            _ => 1,
        };
        let mut kept = self.most_telling.lock().unwrap_or_else(PoisonError::into_inner);
        if kept.as_ref().is_none_or(|(known, _)| rank(code) >= rank(*known)) {
            *kept = Some((code, reason.to_owned()));
        }
    }
}

impl ClientContext for ErrorRecorder {
    fn error(&self, error: KafkaError, reason: &str) {
        if let Some(code) = error.rdkafka_error_code() {
            self.record(code, reason);
        }
    }

    fn log(&self, _: RDKafkaLogLevel, _: &str, _: &str) {}
}

impl ConsumerContext for ErrorRecorder {}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_timeout_is_explained_by_the_most_telling_error_of_the_client() {
        let recorder = ErrorRecorder::default();
        recorder.record(Code::BrokerTransportFailure, "Connect to 127.0.0.1:1 failed: refused");
        let timeout = KafkaError::MetadataFetch(Code::OperationTimedOut);
        // Each attempt of a request; the client reports the reason to the first one only.
        for _ in 0..2 {
            recorder.record(Code::AllBrokersDown, "1/1 brokers are down");
            let failure =
                KafkaFailure::from_error("k:1", "topic images", &timeout, recorder.most_telling());
            assert_eq!(failure.kind, FailureKind::BrokersUnreachable);
            assert!(failure.to_string().contains("no broker answers at k:1"), "{failure}");
            assert!(failure.to_string().contains("refused"), "{failure}");
            recorder.forget_refusal();
        }

        recorder.record(Code::Authentication, "SASL authentication error: invalid credentials");
        recorder.record(Code::BrokerTransportFailure, "Disconnected");
        recorder.record(Code::AllBrokersDown, "1/1 brokers are down");
        let failure = KafkaFailure::from_error("k:1", "topic images", &timeout, recorder.take());
        assert_eq!(failure.kind, FailureKind::AuthenticationFailed);
        let text = failure.to_string();
        assert!(text.contains("invalid credentials") && text.contains("sasl.password"), "{text}");
        assert!(!text.contains("no broker answers"), "{text}");
        assert_eq!(recorder.take(), None);
        recorder.record(Code::SSL, "certificate verify failed");
        recorder.forget_refusal();
        assert_eq!(recorder.most_telling(), None);
    }

    #[test]
    fn no_failure_shows_the_value_of_a_property() {
        let options = crate::kafka::KafkaOptions {
            properties: [("security.protocol".into(), "s3cr".into())].into(),
            ..crate::kafka::KafkaOptions::default()
        };
        let failure = crate::kafka::KafkaProbe::new(&options, "g").err().unwrap().to_string();
        assert!(failure.contains("security.protocol") && !failure.contains("s3cr"), "{failure}");
    }

    #[test]
    fn a_missing_right_is_not_a_missing_topic() {
        for (code, kind, text) in [
            (Code::TopicAuthorizationFailed, FailureKind::NotAuthorised, "lack a right"),
            (Code::GroupAuthorizationFailed, FailureKind::NotAuthorised, "lack a right"),
            (Code::UnknownTopicOrPartition, FailureKind::TopicMissing, "does not exist"),
            (Code::LeaderNotAvailable, FailureKind::Other, "Kafka at k:1"),
        ] {
            let error = KafkaError::MetadataFetch(code);
            let failure = KafkaFailure::from_error("k:1", "topic images", &error, None);
            assert_eq!(failure.kind, kind);
            assert!(failure.to_string().contains(text), "{failure}");
        }
    }
}
