//! Events from Kafka, in the order in which each message travels:
//!
//! 1. `consumer` polls the topics on a thread of its own and queues messages for the pipeline; it
//!    also commits stored offsets to Kafka every second, for lag monitors only;
//! 2. `rebalance` assigns partitions, and releases a revoked one only after the pipeline has stored what
//!    came before;
//! 3. `start_position` decides where an assigned partition starts: it compares the stored position with the
//!    log, and reports what was lost;
//! 4. `log_check` checks all the time that the topics exist and that their logs are still the same ones;
//! 5. `state` has the assigned partitions and their offsets, which the others and metrics share; `health` names
//!    the states of the source;
//! 6. [`decoder`] turns a message into events.

mod consumer;
pub mod decoder;
mod error;
mod event;
mod health;
mod log_check;
mod options;
mod rebalance;
mod start_position;
mod state;

pub use consumer::Source;
pub use decoder::{
    BucketNotification, CloudEvent, Decoder, EventDecodeError, ImageEvent, canonical_attribute_text,
};
pub use error::SourceError;
pub use event::{ConsumerEvent, RevokeAck};
pub use health::{SourceProblem, SourceState};
pub use options::SourceOptions;
pub use start_position::OffsetProvider;
pub use state::{ConsumerStatus, ConsumerStatusHandle};

#[cfg(test)]
mod tests;
