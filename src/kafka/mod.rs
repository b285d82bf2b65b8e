//! Connections to Kafka:
//!
//! 1. `connection` has the options, and the configuration of every client;
//! 2. `failure` says why a request failed, as an operator must act on it: no broker, wrong credentials, a
//!    missing right, a missing topic;
//! 3. `probe` makes requests for topics, offsets and single messages, and `requests` runs them from async code;
//! 4. `partition_log` recognises the log of a partition, because a topic can be created again under its name;
//! 5. `rights` tries what the credentials may do.

mod connection;
mod failure;
mod partition_log;
mod probe;
mod requests;
mod rights;

pub use connection::{KafkaOptions, classify_error, leave_group, to_owned_message};
pub use failure::{FailureKind, KafkaFailure, failure_kind};
pub use partition_log::{LogIdentity, PartitionLog, PartitionLogs, identify_log, identify_logs};
pub use probe::{KafkaProbe, partition_count};
pub use requests::{fetch_partition_counts, fetch_topic_configs, fetch_watermarks, run_probe};
pub use rights::{check_consume_rights, check_write_right};
