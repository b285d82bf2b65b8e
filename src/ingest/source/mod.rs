//! Events from Kafka, in the order in which each message travels:
//!
//! 1. `consumer` polls the topics on a thread of its own and queues messages for the pipeline; it
//!    also commits stored offsets to Kafka every second, for lag monitors only;
//! 2. `rebalance` decides where an assigned partition starts, and releases a revoked one only after
//!    the pipeline has stored what came before;
//! 3. `state` has the assigned partitions and their offsets, which `consumer`, `rebalance` and metrics share;
//! 4. [`decoder`] turns a message into events.

mod consumer;
pub mod decoder;
mod error;
mod event;
mod options;
mod rebalance;
mod state;

pub use consumer::Source;
pub use decoder::{
    BucketNotification, CloudEvent, Decoder, EventDecodeError, ImageEvent, canonical_attribute_text,
};
pub use error::SourceError;
pub use event::{ConsumerEvent, RevokeAck};
pub use options::SourceOptions;
pub use rebalance::OffsetProvider;
pub use state::{ConsumerStatus, ConsumerStatusHandle};
