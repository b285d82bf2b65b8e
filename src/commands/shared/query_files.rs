//! Files of queries and texts named by arguments.

use std::path::Path;

use anyhow::Context;

use super::error::CommandError;
use crate::evaluate::{self, JudgedQuery};

/// Largest file of queries, and most bytes of stored feedback that are read: it is held in memory.
pub const MAX_INPUT_BYTES: u64 = 256 << 20;

/// A file's text.
pub(crate) fn read_text_file(path: &Path, option: &str) -> Result<String, CommandError> {
    let problem = || format!("{option}: {}", path.display());
    let size = std::fs::metadata(path).with_context(problem).map_err(CommandError::Usage)?.len();
    if size > MAX_INPUT_BYTES {
        return Err(CommandError::usage(format!(
            "{}: has {size} bytes, more than {MAX_INPUT_BYTES}; take a sample",
            problem()
        )));
    }
    std::fs::read_to_string(path).with_context(problem).map_err(CommandError::Usage)
}

/// The queries of a file: CSV by its name, else JSON lines.
pub(crate) fn read_queries(path: &Path, option: &str) -> Result<Vec<JudgedQuery>, CommandError> {
    let text = read_text_file(path, option)?;
    let name = path.display().to_string();
    let csv = path.extension().is_some_and(|extension| extension.eq_ignore_ascii_case("csv"));
    let read = if csv { evaluate::queries_from_csv } else { evaluate::queries_from_json_lines };
    read(&text, &name).map_err(CommandError::usage)
}
