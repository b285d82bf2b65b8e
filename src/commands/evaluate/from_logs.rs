//! `bsap evaluate --from-logs`: what query workers logged.

use std::fs::File;
use std::io::{BufReader, stdin};

use super::arguments::EvaluateArgs;
use super::files::{print_report, write_file};
use crate::commands::shared::error::{CommandError, CommandResult};
use crate::commands::shared::printing::print_note;
use crate::evaluate::QueryLogError;
use crate::evaluate::logs::{QueryLogReader, render_html, render_terminal};

/// Reads the logs, and prints and writes the report.
pub fn evaluate_logs(args: &EvaluateArgs) -> CommandResult {
    let mut reader = QueryLogReader::default();
    for path in &args.from_logs {
        let file = path.display().to_string();
        if file == "-" {
            reader.read_log(stdin().lock(), "standard input").map_err(CommandError::usage)?;
        } else {
            let opened = File::open(path).map_err(|error| {
                CommandError::usage(QueryLogError::Read { file: file.clone(), error })
            })?;
            reader.read_log(BufReader::new(opened), &file).map_err(CommandError::usage)?;
        }
    }
    let report = reader.into_report().map_err(CommandError::usage)?;
    let json = serde_json::to_string_pretty(&report)?;
    print_report(args.json.as_deref(), &render_terminal(&report), &json)?;
    if let Some(path) = &args.report {
        write_file(path, &render_html(&report), "--report")?;
        // Standard output may be the JSON report.
        print_note!("written: {}", path.display());
    }
    Ok(())
}
