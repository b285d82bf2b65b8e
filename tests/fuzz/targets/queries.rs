//! What an evaluation reads, any bytes: judged queries as JSON lines or CSV, TREC judgements and
//! rankings, the logs of query workers. Read, or refused with the reason.
//!
//! The first byte says which; the rest is the file.

#![no_main]

use bsap::evaluate::logs::{Reader, terminal};
use bsap::evaluate::{from_csv, from_json_lines, trec};
use libfuzzer_sys::fuzz_target;

fn told<T>(read: Result<T, impl std::fmt::Display>) {
    if let Err(error) = read {
        assert!(!error.to_string().is_empty());
    }
}

fuzz_target!(|data: &[u8]| {
    let Some((which, content)) = data.split_first() else { return };
    if which % 5 == 4 {
        let mut reader = LogReader::default();
        told(reader.read(content, "log"));
        return match reader.report() {
            Ok(report) => assert!(!logs_terminal(&report).is_empty()),
            Err(error) => assert!(!error.to_string().is_empty()),
        };
    }
    let Ok(text) = std::str::from_utf8(content) else { return };
    match which % 5 {
        0 => told(from_json_lines(text, "file")),
        1 => told(from_csv(text, "file")),
        2 => told(trec::qrels(text, "file")),
        _ => told(trec::run(text, "file")),
    }
});
