//! The folder of a demo.

use std::fs::{self, File, TryLockError};
use std::io::Write as _;
use std::path::Path;

use anyhow::Context;

use crate::commands::shared::error::{CommandError, path_error};
use crate::demo::{DEMO_MODEL_FOLDER, write_demo_checkpoint};

/// Marks a folder as created by a demo, so that the next demo may replace it. Locked by the demo that runs
/// in it.
const MARKER_FILE: &str = "made-by-bsap-demo";

/// Size of the file by which [`check_writable`] tries the folder, of the order of a commit's files.
const PROBE_BYTES: usize = 256 << 10;

/// Creates the folder, or removes an earlier demo from it, and locks it until the result is dropped. A
/// folder with other files, or with a demo that is running, is an error.
pub fn prepare_folder(dir: &Path) -> Result<File, CommandError> {
    let problem = |error| path_error("--dir", dir, &error);
    fs::create_dir_all(dir).map_err(problem)?;
    let is_used = fs::read_dir(dir).map_err(problem)?.next().is_some();
    let marker = dir.join(MARKER_FILE);
    if is_used && !marker.exists() {
        return Err(CommandError::usage(format!(
            "--dir: {} is not empty and was not made by bsap demo; choose another folder",
            dir.display()
        )));
    }
    let opened = File::options().create(true).truncate(false).write(true).open(&marker);
    let mut marker = opened.map_err(problem)?;
    match marker.try_lock() {
        Ok(()) => {}
        Err(TryLockError::WouldBlock) => {
            return Err(CommandError::usage(format!(
                "--dir: another bsap demo runs in {}; end it, or choose another folder",
                dir.display()
            )));
        }
        Err(TryLockError::Error(error)) => return Err(problem(error)),
    }
    for part in ["pictures", "catalogue", DEMO_MODEL_FOLDER] {
        match fs::remove_dir_all(dir.join(part)) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                return Err(problem(error));
            }
            _ => {}
        }
    }
    marker.write_all(b"bsap demo replaces what is in this folder.\n").map_err(problem)?;
    fs::create_dir_all(dir.join("pictures")).map_err(problem)?;
    write_demo_checkpoint(&dir.join(DEMO_MODEL_FOLDER)).map_err(problem)?;
    Ok(marker)
}

/// Fails if nothing can be written to the folder: workers try again while the store fails, and only log
/// why.
pub fn check_writable(dir: &Path) -> anyhow::Result<()> {
    let probe = dir.join(".probe");
    let written = fs::write(&probe, vec![1; PROBE_BYTES]);
    let removed = fs::remove_file(&probe);
    written.and(removed).with_context(|| dir.display().to_string())
}
