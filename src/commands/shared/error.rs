//! How a command fails, and with which exit code.

use std::fmt;
use std::process::ExitCode;

use super::printing::print_note;
use crate::clip::ClipError;
use crate::config::ConfigError;
use crate::ingest::decode::ImageDecodeError;

/// The error of a command; decides the exit code.
#[derive(Debug)]
pub enum CommandError {
    /// Arguments, configuration, checkpoint or image are invalid; nothing was done.
    Usage(anyhow::Error),
    /// The command started its work and failed.
    Failed(anyhow::Error),
}

impl CommandError {
    /// Prints the error on standard error; returns the exit code, 2 for usage, configuration, and a
    /// checkpoint or an image that is refused, 1 for failed work.
    pub fn print_and_exit_code(&self) -> ExitCode {
        print_note!("error: {self}");
        match self {
            Self::Usage(_) => ExitCode::from(2),
            Self::Failed(_) => ExitCode::FAILURE,
        }
    }

    /// Returns a usage error with this message.
    pub fn usage(message: impl fmt::Display) -> Self {
        Self::Usage(anyhow::Error::msg(message.to_string()))
    }
}

impl fmt::Display for CommandError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (Self::Usage(error) | Self::Failed(error)) = self;
        write!(f, "{error:#}")
    }
}

impl<E: Into<anyhow::Error>> From<E> for CommandError {
    fn from(error: E) -> Self {
        let error = error.into();
        let refuses_checkpoint =
            error.downcast_ref::<ClipError>().is_some_and(ClipError::refuses_checkpoint);
        if refuses_checkpoint || error.is::<ConfigError>() || error.is::<ImageDecodeError>() {
            Self::Usage(error)
        } else {
            Self::Failed(error)
        }
    }
}

/// The result of a command; its output is already printed.
pub type CommandResult = Result<(), CommandError>;
