//! Reads files of queries and texts that arguments name.

use std::path::Path;

use anyhow::Context;

use super::error::CommandError;
use crate::evaluate::{self, JudgedQuery};

/// Largest file of queries, and largest total of stored feedback: both are read into memory.
pub const MAX_INPUT_BYTES: u64 = 256 << 20;

/// Reads a text file; `option` names it in errors.
pub fn read_text_file(path: &Path, option: &str) -> Result<String, CommandError> {
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

/// Reads judged queries: CSV if the file name ends in `.csv`, otherwise JSON lines.
pub fn read_judged_queries(path: &Path, option: &str) -> Result<Vec<JudgedQuery>, CommandError> {
    let text = read_text_file(path, option)?;
    let name = path.display().to_string();
    let is_csv = path.extension().is_some_and(|extension| extension.eq_ignore_ascii_case("csv"));
    let parse = if is_csv { evaluate::queries_from_csv } else { evaluate::queries_from_json_lines };
    parse(&text, &name).map_err(CommandError::usage)
}
