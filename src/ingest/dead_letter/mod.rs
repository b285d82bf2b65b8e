//! Messages that can never be processed, in a topic of their own.
//!
//! A dead letter keeps key, value, headers and timestamp of the original message and adds headers in the
//! convention of Kafka Connect (`__connect.errors.*`), so that existing tools understand it.

mod letter;
mod options;
mod reader;
mod writer;

pub use letter::{DeadLetter, DeadLetterReason, OmittedValue};
pub use options::DeadLetterOptions;
pub use reader::{DeadLetterFilter, DeadLetterReadError, read_dead_letters};
pub use writer::{DeadLetterWriteError, DeadLetterWriter};
