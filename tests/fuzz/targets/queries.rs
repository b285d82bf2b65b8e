//! Arbitrary bytes as the files that an evaluation reads: judged queries as JSON lines or CSV, TREC
//! judgements and rankings, logs of query workers. They are read, or rejected with a reason.
//!
//! The first byte chooses the format; the rest is the file.

#![no_main]

use bsap::evaluate::{
    QueryLogReader, TextSample, queries_from_csv, queries_from_json_lines,
    render_query_logs_terminal, trec,
};
use libfuzzer_sys::fuzz_target;

fn check_error_has_message<T>(result: Result<T, impl std::fmt::Display>) {
    if let Err(error) = result {
        assert!(!error.to_string().is_empty());
    }
}

fuzz_target!(|data: &[u8]| {
    let Some((format, content)) = data.split_first() else { return };
    if format % 5 == 4 {
        check_error_has_message(TextSample::default().read_json_lines(content, "log"));
        let mut reader = QueryLogReader::default();
        check_error_has_message(reader.read_log(content, "log"));
        return match reader.into_report() {
            Ok(report) => assert!(!render_query_logs_terminal(&report).is_empty()),
            Err(error) => assert!(!error.to_string().is_empty()),
        };
    }
    let Ok(text) = std::str::from_utf8(content) else { return };
    match format % 5 {
        0 => check_error_has_message(queries_from_json_lines(text, "file")),
        1 => {
            check_error_has_message(queries_from_csv(text, "file"));
            check_error_has_message(TextSample::default().read_csv(content, "file"));
        }
        2 => check_error_has_message(trec::parse_qrels(text, "file")),
        _ => check_error_has_message(trec::parse_run(text, "file")),
    }
});
