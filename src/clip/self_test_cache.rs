//! The self-test when a process starts, skipped if the same model has passed it on this machine before.

use std::fmt::Write as _;
use std::path::PathBuf;
use std::time::UNIX_EPOCH;

use sha2::{Digest, Sha256};

use super::encoders::Encoders;
use super::error::ClipError;
use super::options::{ModelOptions, Precision};
use super::self_test::{SelfTestReport, run_self_test};
use crate::record::to_hex;

/// Runs the self-test and notes in the user's cache folder that it passed, under the fingerprint of the
/// model, its device and precision, and the program. Returns `None` if that is noted already. Where
/// nothing can be noted, the test runs at every start.
pub fn run_self_test_once(
    encoders: &dyn Encoders,
    options: &ModelOptions,
) -> Result<Option<SelfTestReport>, ClipError> {
    let note = cache_folder().map(|folder| folder.join(note_name(encoders, options)));
    run_unless_noted(encoders, note)
}

fn run_unless_noted(
    encoders: &dyn Encoders,
    note: Option<PathBuf>,
) -> Result<Option<SelfTestReport>, ClipError> {
    if note.as_ref().is_some_and(|note| note.exists()) {
        return Ok(None);
    }
    let report = run_self_test(encoders)?;
    if let Some(note) = note {
        // Only the next start is slower if it fails.
        let _ = note.parent().map(std::fs::create_dir_all);
        let _ = std::fs::write(note, "passed\n");
    }
    Ok(Some(report))
}

/// Returns `bsap/self-tests` in the user's cache folder, `None` if that is unknown.
fn cache_folder() -> Option<PathBuf> {
    let variable = |name: &str| std::env::var_os(name).filter(|value| !value.is_empty());
    let cache = match variable("XDG_CACHE_HOME") {
        Some(folder) => PathBuf::from(folder),
        None => PathBuf::from(variable("HOME")?).join(".cache"),
    };
    cache.is_absolute().then(|| cache.join("bsap/self-tests"))
}

/// Returns the digest of all that the result of the test depends on.
fn note_name(encoders: &dyn Encoders, options: &ModelOptions) -> String {
    let device: String = options.device.into();
    let dtype = match options.dtype {
        Precision::F32 => "f32",
        Precision::F16 => "f16",
        Precision::Bf16 => "bf16",
    };
    let mut key = format!("{} {device} {dtype}", encoders.card().fingerprint);
    // Another build of the program is another program, whatever its version says.
    let program = std::env::current_exe().and_then(std::fs::metadata);
    if let Ok(program) = program {
        let modified = program.modified().ok().and_then(|at| at.duration_since(UNIX_EPOCH).ok());
        let _ = write!(key, " {} {:?}", program.len(), modified);
    }
    to_hex(&Sha256::digest(key))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::clip::ClipModel;

    #[test]
    fn a_model_that_passed_is_not_tested_again() {
        let checkpoint = "tests/fixtures/clip-gelu".into();
        let options = ModelOptions { checkpoint, ..ModelOptions::default() };
        let clip = ClipModel::load(&options).unwrap();
        let folder = tempfile::tempdir().unwrap();
        let note = folder.path().join("a/b");
        let is_tested = |note| run_unless_noted(&clip, note).unwrap().is_some();
        assert!(is_tested(Some(note.clone())));
        assert!(!is_tested(Some(note)));
        assert!(is_tested(None), "nothing can be noted");

        let name = note_name(&clip, &options);
        assert_eq!(name, note_name(&clip, &options));
        let reduced = ModelOptions { dtype: Precision::Bf16, ..options.clone() };
        assert_ne!(name, note_name(&clip, &reduced));
    }
}
