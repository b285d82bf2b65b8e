//! The worker: from Kafka messages to rows of the table. The stages, in the order of the pipeline:
//!
//! 1. [`source`] consumes messages and decodes them into events;
//! 2. [`fetch`] gets the bytes of an image;
//! 3. [`decode`] turns the bytes into pixels, and [`metadata`] reads what they say of themselves;
//!    both find their way in a file by `containers`;
//! 4. `embed` computes embeddings in batches, and their statistics for each prompt set;
//! 5. `message_processor` takes one message through the stages above, or dead-letters it;
//! 6. [`dead_letter`] is the topic of messages that can never be processed;
//! 7. `sink` collects the rows and commits them together with the positions of the partitions;
//! 8. `pipeline` is the loop that runs all of this; `worker` puts it together.
//!
//! Messages are processed concurrently, but their results reach the sink in the order of their offsets,
//! so that each commit covers all messages of a partition up to its position.

mod containers;
pub mod dead_letter;
pub mod decode;
mod embed;
mod error;
pub mod fetch;
mod message_processor;
pub mod metadata;
mod options;
mod pipeline;
mod progress;
mod rejection;
mod sink;
pub mod source;
mod tally;
mod worker;

pub use error::IngestError;
pub use options::IngestOptions;
pub use progress::Progress;
pub use rejection::{Rejection, RejectionListener};
pub use worker::Worker;
