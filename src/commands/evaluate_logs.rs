//! `bsap evaluate --from-logs`.

use std::fs::File;
use std::io::{BufReader, stdin};

use super::cli::evaluate::EvaluateArgs;
use super::evaluate::{told, write};
use super::{Done, Failure};
use crate::evaluate::LogsError;
use crate::evaluate::logs::{Reader, html, terminal};

/// Reads the logs, prints and writes what was asked for.
pub fn run(args: &EvaluateArgs) -> Done {
    let mut reader = Reader::default();
    for path in &args.from_logs {
        let file = path.display().to_string();
        if file == "-" {
            reader.read(stdin().lock(), "standard input").map_err(Failure::usage)?;
        } else {
            let opened = File::open(path)
                .map_err(|error| Failure::usage(LogsError::Read { file: file.clone(), error }))?;
            reader.read(BufReader::new(opened), &file).map_err(Failure::usage)?;
        }
    }
    let report = reader.report().map_err(Failure::usage)?;
    told(args, &terminal(&report), &serde_json::to_string_pretty(&report)?)?;
    if let Some(path) = &args.report {
        write(path, &html(&report), "--report")?;
        // Standard output may be the JSON report.
        remark!("written: {}", path.display());
    }
    Ok(())
}
