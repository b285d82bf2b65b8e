//! How a command fails, with which exit code, what to do about errors of disks and folders, and `--json [FILE]`.

use std::error::Error;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::{fmt, io};

use anyhow::anyhow;
use serde::Serialize;

use super::printing::{print_line, print_note};
use crate::clip::ClipError;
use crate::config::ConfigError;
use crate::diagnosis::describe_in_lines;
use crate::ingest::decode::ImageDecodeError;

/// The error of a command; decides the exit code.
#[derive(Debug)]
pub enum CommandError {
    /// Arguments, configuration, checkpoint or image are invalid; nothing was done.
    Usage(anyhow::Error),
    /// The command started its work and failed.
    Failed(anyhow::Error),
    /// The command did its work, and found something that is not as it should be.
    Unhealthy {
        /// The exit code, which says what.
        exit_code: u8,
        /// What was found.
        finding: String,
    },
}

impl CommandError {
    /// Prints the error on standard error; returns the exit code: 2 for usage, configuration, and a
    /// checkpoint or an image that is refused, 1 for failed work, and the finding's own one.
    pub fn print_and_exit_code(&self) -> ExitCode {
        print_note!("error: {self}");
        match self {
            Self::Usage(_) => ExitCode::from(2),
            Self::Failed(_) => ExitCode::FAILURE,
            Self::Unhealthy { exit_code, .. } => ExitCode::from(*exit_code),
        }
    }

    /// Returns a usage error with this message.
    pub fn usage(message: impl fmt::Display) -> Self {
        Self::Usage(anyhow::Error::msg(message.to_string()))
    }

    /// Replaces an error that a full disk caused by a sentence with the remedy, and `what_follows` after
    /// it. The option `--dir` has chosen `folder`.
    #[must_use]
    pub fn explain_full_disk(self, folder: &Path, what_follows: &str) -> Self {
        match self {
            Self::Failed(error) if error.chain().any(is_full_disk) => Self::Failed(anyhow!(
                "the disk of {} is full; free some space, or choose another folder with --dir{what_follows}",
                folder.display()
            )),
            other => other,
        }
    }
}

impl fmt::Display for CommandError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Usage(error) | Self::Failed(error) => {
                f.write_str(&describe_in_lines(error.as_ref()))
            }
            Self::Unhealthy { finding, .. } => f.write_str(finding),
        }
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

/// How the operating system says that there is no space: no space on the device, file too large (a limit of
/// the process), quota exceeded. Libraries keep only the text of an error.
const FULL_DISK_TEXTS: [&str; 3] = ["(os error 28)", "(os error 27)", "(os error 122)"];

fn is_full_disk(error: &(dyn Error + 'static)) -> bool {
    let text = error.to_string();
    error.downcast_ref::<io::Error>().is_some_and(|error| is_full(error.kind()))
        || FULL_DISK_TEXTS.iter().any(|full| text.contains(full))
}

fn is_full(kind: io::ErrorKind) -> bool {
    use io::ErrorKind::{FileTooLarge, QuotaExceeded, StorageFull};
    matches!(kind, StorageFull | QuotaExceeded | FileTooLarge)
}

/// Returns the error of a file or folder that an option names, with the remedy.
pub fn path_error(option: &str, path: &Path, error: &io::Error) -> CommandError {
    use io::ErrorKind::{PermissionDenied, ReadOnlyFilesystem};
    let remedy = match error.kind() {
        PermissionDenied | ReadOnlyFilesystem => "choose one that this user may write",
        kind if is_full(kind) => "free some space, or choose another disk",
        _ => "choose another one",
    };
    CommandError::usage(format!("{option}: {}: {error}; {remedy}", path.display()))
}

/// Prints a result as JSON on one line, or writes it into the file that `--json FILE` names.
pub fn write_json(
    result: &impl Serialize,
    json: Option<&Option<PathBuf>>,
) -> Result<(), CommandError> {
    match json {
        None => {}
        Some(None) => print_line!("{}", serde_json::to_string(result)?),
        Some(Some(file)) => {
            let text = serde_json::to_string_pretty(result)? + "\n";
            std::fs::write(file, text).map_err(|e| path_error("--json", file, &e))?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_full_disk_is_recognised_whatever_wraps_it() {
        let explain = |error| {
            CommandError::Failed(error)
                .explain_full_disk(Path::new("/somewhere"), ". Then?")
                .to_string()
        };
        let wrapped = anyhow::Error::new(io::Error::from_raw_os_error(28)).context("table.url");
        let as_text = anyhow!("no commit went through: No space left on device (os error 28)");
        for text in [wrapped, as_text].map(explain) {
            assert!(
                text.contains("/somewhere is full") && text.ends_with("--dir. Then?"),
                "{text}"
            );
        }
        assert_eq!(explain(anyhow!("a commit failed")), "a commit failed");
    }

    #[test]
    fn the_remedy_fits_the_error() {
        for (code, remedy) in
            [(13, "may write"), (30, "may write"), (28, "free some space"), (20, "another one")]
        {
            let error = io::Error::from_raw_os_error(code);
            let text = path_error("--dir", Path::new("/x"), &error).to_string();
            assert!(text.starts_with("--dir: /x: ") && text.contains(remedy), "{text}");
        }
    }
}
