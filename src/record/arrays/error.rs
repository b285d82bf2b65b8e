//! Why arrays cannot be used.

/// An input that is refused. The message names the file, the row or line, the value and the remedy.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{file}: {reason}")]
pub struct ArrayError {
    /// The file, and the array inside it if it has several.
    pub file: String,
    /// What is wrong, and where.
    pub reason: String,
}

impl ArrayError {
    /// Creates an error about `file`.
    pub fn new(file: impl Into<String>, reason: impl Into<String>) -> Self {
        Self { file: file.into(), reason: reason.into() }
    }
}
