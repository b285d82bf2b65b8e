//! Adds what to do to errors that come from below.

use std::error::Error;
use std::io;
use std::path::Path;

use anyhow::anyhow;

use crate::commands::shared::error::CommandError;

/// How the operating system says that there is no space: no space on the device, file too large (a limit of
/// the process), quota exceeded. Libraries keep only the text of an error.
const FULL_DISK_TEXTS: [&str; 3] = ["(os error 28)", "(os error 27)", "(os error 122)"];

/// Replaces an error that a full disk caused by a sentence with the remedy.
pub fn explain(error: anyhow::Error, folder: &Path) -> CommandError {
    let is_full = error.chain().any(is_full_disk);
    if !is_full {
        return error.into();
    }
    anyhow!(
        "the disk of {} is full; free some space, or choose another folder with --dir. Nothing is lost: the same command goes on where it was",
        folder.display()
    )
    .into()
}

fn is_full_disk(error: &(dyn Error + 'static)) -> bool {
    use io::ErrorKind::{FileTooLarge, QuotaExceeded, StorageFull};
    let kind = error.downcast_ref::<io::Error>().map(io::Error::kind);
    let text = error.to_string();
    matches!(kind, Some(StorageFull | QuotaExceeded | FileTooLarge))
        || FULL_DISK_TEXTS.iter().any(|full| text.contains(full))
}

/// Returns the error of a file or folder that an option names, with the remedy.
pub fn path_error(option: &str, path: &Path, error: &io::Error) -> CommandError {
    use io::ErrorKind::{
        FileTooLarge, PermissionDenied, QuotaExceeded, ReadOnlyFilesystem, StorageFull,
    };
    let remedy = match error.kind() {
        PermissionDenied | ReadOnlyFilesystem => "choose one that this user may write",
        StorageFull | QuotaExceeded | FileTooLarge => "free some space, or choose another disk",
        _ => "choose another one",
    };
    CommandError::usage(format!("{option}: {}: {error}; {remedy}", path.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_full_disk_is_recognised_whatever_wraps_it() {
        let folder = Path::new("/somewhere");
        let plain = io::Error::from_raw_os_error(28);
        let wrapped = anyhow::Error::new(plain).context("table.url");
        let as_text = anyhow!("no commit went through: No space left on device (os error 28)");
        for error in [wrapped, as_text] {
            let text = explain(error, folder).to_string();
            assert!(text.contains("/somewhere is full") && text.contains("--dir"), "{text}");
        }
        let other = explain(anyhow!("a commit failed"), folder).to_string();
        assert_eq!(other, "a commit failed");
    }
}
