//! The folder in which a try keeps its table, and the lock that keeps a second process out.

use std::fs::{self, File, OpenOptions, TryLockError};
use std::io::{Read as _, Seek as _, Write as _};
use std::path::{Path, PathBuf};

use sha2::{Digest, Sha256};

use crate::commands::shared::error::{CommandError, path_error};
use crate::record::to_hex;
use crate::watch::WatchedSource;

/// File that the process which uses the folder has locked.
const LOCK_FILE: &str = "lock";
/// Longest part of the name of a folder that comes from the path.
const MAX_NAME_CHARS: usize = 40;

/// The folder of a try, locked until this is dropped.
pub struct StateFolder {
    /// Absolute, without links.
    pub path: PathBuf,
    lock: File,
}

impl StateFolder {
    /// Creates and locks the folder: `dir`, or by default one that belongs to these sources.
    pub fn open(dir: Option<&Path>, sources: &[WatchedSource]) -> Result<Self, CommandError> {
        let folder = match dir {
            Some(dir) => dir.to_owned(),
            None => default_folder(sources)?,
        };
        let failed = |error: &std::io::Error| path_error("--dir", &folder, error);
        fs::create_dir_all(&folder).map_err(|e| failed(&e))?;
        let path = folder.canonicalize().map_err(|e| failed(&e))?;
        let file = path.join(LOCK_FILE);
        let opened =
            OpenOptions::new().create(true).truncate(false).read(true).write(true).open(&file);
        let mut lock = opened.map_err(|e| failed(&e))?;
        match lock.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => {
                let mut owner = String::new();
                // Without it the message is only shorter.
                let _ = lock.read_to_string(&mut owner);
                let owner = owner.trim();
                let owner = if owner.is_empty() { String::new() } else { format!(" ({owner})") };
                return Err(CommandError::usage(format!(
                    "another bsap try{owner} uses the folder {}; stop it, or choose another folder with --dir",
                    path.display()
                )));
            }
            Err(TryLockError::Error(error)) => return Err(failed(&error)),
        }
        lock.set_len(0).map_err(|e| failed(&e))?;
        let state = Self { path, lock };
        state.describe_owner("").map_err(|e| failed(&e))?;
        Ok(state)
    }

    /// Writes who uses the folder, for the message to a second process.
    pub fn describe_owner(&self, page: &str) -> std::io::Result<()> {
        let mut file = &self.lock;
        file.rewind()?;
        let page = if page.is_empty() { String::new() } else { format!(", its page is {page}") };
        write!(file, "process {}{page}", std::process::id())
    }
}

/// Returns the folder that belongs to these sources, whatever the current folder is.
fn default_folder(sources: &[WatchedSource]) -> Result<PathBuf, CommandError> {
    let data =
        std::env::var_os("XDG_DATA_HOME").map(PathBuf::from).filter(|path| path.is_absolute());
    let data = data.or_else(|| Some(std::env::home_dir()?.join(".local/share")));
    let data = data.filter(|path| path.is_absolute()).ok_or_else(|| {
        CommandError::usage(
            "--dir: HOME names no folder to keep the table in; choose one with --dir",
        )
    })?;
    let mut addresses: Vec<String> = sources.iter().map(|source| source.kind.address()).collect();
    addresses.sort();
    let hash = to_hex(&Sha256::digest(addresses.join("\n")));
    let name = addresses.first().map_or("", String::as_str).trim_end_matches('/');
    let name = name.rsplit('/').next().unwrap_or_default();
    let legal = |c: char| if c.is_alphanumeric() || "-_.".contains(c) { c } else { '_' };
    let name: String = name.chars().map(legal).take(MAX_NAME_CHARS).collect();
    Ok(data.join("bsap/try").join(format!("{name}-{}", &hash[..8])))
}
