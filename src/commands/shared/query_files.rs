//! Reads files of queries and texts that arguments name.

use std::ffi::OsStr;
use std::fs::File;
use std::io::BufReader;
use std::path::{Path, PathBuf};

use anyhow::Context;

use super::error::CommandError;
use crate::evaluate::{self, JudgedQuery, QueryTextError, TextSample};

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
    let bytes = std::fs::read(path).with_context(problem).map_err(CommandError::Usage)?;
    evaluate::decode_text(bytes)
        .map_err(|reason| CommandError::usage(format!("{}: {reason}", problem())))
}

/// Reads the texts of logs of queries, each once: CSV if the file name ends in `.csv` or `.tsv`, otherwise JSON
/// lines or the JSON log of query workers.
pub fn read_query_logs(paths: &[PathBuf]) -> Result<TextSample, CommandError> {
    let mut texts = TextSample::default();
    for path in paths {
        let file = format!("--query-log: {}", path.display());
        let log = File::open(path).map_err(|error| {
            CommandError::usage(QueryTextError::Read { file: file.clone(), error })
        })?;
        let log = BufReader::new(log);
        let read = if is_csv(path) {
            texts.read_csv(log, &file)
        } else {
            texts.read_json_lines(log, &file)
        };
        read.map_err(CommandError::usage)?;
    }
    Ok(texts)
}

fn is_csv(path: &Path) -> bool {
    let is_table =
        |extension: &OsStr| ["csv", "tsv"].iter().any(|name| extension.eq_ignore_ascii_case(name));
    path.extension().is_some_and(is_table)
}

/// Reads judged queries: CSV if the file name ends in `.csv` or `.tsv`, otherwise JSON lines.
pub fn read_judged_queries(path: &Path, option: &str) -> Result<Vec<JudgedQuery>, CommandError> {
    let text = read_text_file(path, option)?;
    let name = path.display().to_string();
    let parse =
        if is_csv(path) { evaluate::queries_from_csv } else { evaluate::queries_from_json_lines };
    parse(&text, &name).map_err(CommandError::usage)
}
