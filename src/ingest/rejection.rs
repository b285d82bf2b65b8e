//! Tells the process that runs a worker which messages yield no row.

use std::fmt;

use crate::record::KafkaMessage;

/// A message that yields no row: it was dead-lettered, or its image was not found.
#[derive(Debug, Clone, Copy)]
pub struct Rejection<'a> {
    /// The message.
    pub message: &'a KafkaMessage,
    /// Code of the dead letter, or `image_not_found`.
    pub code: &'a str,
    /// Why, for people.
    pub explanation: &'a str,
}

/// A function that is called with each rejection.
pub struct RejectionListener(Box<dyn Fn(Rejection<'_>) + Send + Sync>);

impl RejectionListener {
    /// Wraps a function, which must not block.
    pub fn new(listener: impl Fn(Rejection<'_>) + Send + Sync + 'static) -> Self {
        Self(Box::new(listener))
    }

    pub(super) fn notify(&self, rejection: Rejection<'_>) {
        (self.0)(rejection);
    }
}

impl fmt::Debug for RejectionListener {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("RejectionListener")
    }
}
