//! Reads the texts of queries that people typed, each once, from logs of any length.

use std::collections::BTreeMap;
use std::io::BufRead;

use serde_json::Value;
use sha2::{Digest, Sha256};

use crate::evaluate::log_lines::for_each_line;
use crate::evaluate::text_files::{detect_delimiter, skip_byte_order_mark};
use crate::prompts::MAX_PROMPT_CHARS;
use crate::telemetry::event;

/// Maximum number of distinct texts that are kept of all logs together.
pub const MAX_SAMPLED_TEXTS: usize = 16_384;

/// Why a log of queries cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum QueryTextError {
    /// The log cannot be read.
    #[error("{file}: {error}")]
    Read {
        /// Name of the file.
        file: String,
        /// What failed.
        error: std::io::Error,
    },
    /// The CSV file has no column of texts.
    #[error("{file}: has no column text; name the column of the queries so")]
    NoTextColumn {
        /// Name of the file.
        file: String,
    },
    /// A log of query workers does not have the texts.
    #[error(
        "{file}: {searches} searches are logged without their texts; set log.query_text = true in the query workers, and use a log from then on"
    )]
    TextsNotLogged {
        /// Name of the file.
        file: String,
        /// Number of searches.
        searches: u64,
    },
    /// No line has a text.
    #[error(
        "{file}: no line has a query; a line is a JSON object with `text`, or a `search` event of a query worker{}",
        .problem.as_ref().map(|problem| format!(" (line {problem})")).unwrap_or_default()
    )]
    NoTexts {
        /// Name of the file.
        file: String,
        /// Number of the first line that cannot be used, and why.
        problem: Option<String>,
    },
}

/// Distinct texts, regardless of case: all, or a random sample of [`MAX_SAMPLED_TEXTS`] that depends on the
/// texts alone.
#[derive(Debug, Default)]
pub struct TextSample {
    /// How often each text occurs, by its hash. Those with the smallest hashes are kept: a text that was
    /// dropped once never comes back, so that the counts are exact.
    by_hash: BTreeMap<u64, (String, u64)>,
    /// Whether texts were dropped.
    is_truncated: bool,
}

impl TextSample {
    /// Counts a text. Empty texts and those that are too long for a prompt are skipped.
    pub fn add(&mut self, text: &str) {
        let text = text.trim();
        if text.is_empty() || text.chars().count() > MAX_PROMPT_CHARS {
            return;
        }
        let digest = Sha256::digest(text.to_lowercase().as_bytes());
        let mut first_bytes = [0; 8];
        first_bytes.copy_from_slice(&digest[..8]);
        let hash = u64::from_be_bytes(first_bytes);
        if let Some((_, count)) = self.by_hash.get_mut(&hash) {
            *count += 1;
            return;
        }
        self.by_hash.insert(hash, (text.to_owned(), 1));
        if self.by_hash.len() > MAX_SAMPLED_TEXTS {
            self.by_hash.pop_last();
            self.is_truncated = true;
        }
    }

    /// Returns the number of texts that are kept.
    pub fn len(&self) -> usize {
        self.by_hash.len()
    }

    /// Returns whether no text is kept.
    pub fn is_empty(&self) -> bool {
        self.by_hash.is_empty()
    }

    /// Returns whether there were more than [`MAX_SAMPLED_TEXTS`] texts.
    pub fn is_truncated(&self) -> bool {
        self.is_truncated
    }

    /// Returns the texts that occur at least `min_count` times, in a random order that depends on the texts
    /// alone.
    pub fn into_texts(self, min_count: u64) -> Vec<String> {
        let frequent = self.by_hash.into_values().filter(|(_, count)| *count >= min_count);
        frequent.map(|(text, _)| text).collect()
    }

    /// Adds the queries of a log with one JSON object per line: those with `text`, and the `search` events of
    /// query workers, if these log texts. Other lines are skipped.
    pub fn read_json_lines(&mut self, log: impl BufRead, file: &str) -> Result<(), QueryTextError> {
        let failed = |error| QueryTextError::Read { file: file.to_owned(), error };
        let (mut texts, mut searches_without_text, mut problem) = (0u64, 0u64, None);
        for_each_line(log, failed, |number, line| {
            let Some(line) = line.filter(|line| !line.trim_ascii().is_empty()) else {
                return Ok(());
            };
            match parse_line(line) {
                Ok(ParsedLine::Text(text)) => {
                    texts += 1;
                    self.add(&text);
                }
                Ok(ParsedLine::SearchWithoutText) => searches_without_text += 1,
                Ok(ParsedLine::Other) => {}
                Err(reason) => {
                    problem.get_or_insert_with(|| format!("{number}: {reason}"));
                }
            }
            Ok(())
        })?;
        match (texts, searches_without_text) {
            (0, 0) => Err(QueryTextError::NoTexts { file: file.to_owned(), problem }),
            (0, searches) => {
                Err(QueryTextError::TextsNotLogged { file: file.to_owned(), searches })
            }
            _ => Ok(()),
        }
    }

    /// Adds the queries of a CSV file with a column `text`, whose fields are separated by commas,
    /// semicolons or tabs. Rows without it are skipped.
    pub fn read_csv(&mut self, mut log: impl BufRead, file: &str) -> Result<(), QueryTextError> {
        let failed = |error: csv::Error| QueryTextError::Read {
            file: file.to_owned(),
            error: std::io::Error::other(error),
        };
        let delimiter = skip_byte_order_mark(&mut log)
            .and_then(|()| Ok(detect_delimiter(log.fill_buf()?, &["text"])))
            .map_err(|error| QueryTextError::Read { file: file.to_owned(), error })?;
        let mut table = csv::ReaderBuilder::new()
            .delimiter(delimiter)
            .trim(csv::Trim::All)
            .flexible(true)
            .from_reader(log);
        let header = table.headers().map_err(failed)?.clone();
        let column = header.iter().position(|name| name == "text");
        let column =
            column.ok_or_else(|| QueryTextError::NoTextColumn { file: file.to_owned() })?;
        let mut record = csv::StringRecord::new();
        let mut texts = 0;
        loop {
            match table.read_record(&mut record) {
                Ok(true) => {}
                Ok(false) => break,
                Err(error) if error.is_io_error() => return Err(failed(error)),
                Err(_) => continue,
            }
            if let Some(text) = record.get(column).filter(|text| !text.is_empty()) {
                texts += 1;
                self.add(text);
            }
        }
        if texts == 0 {
            return Err(QueryTextError::NoTexts { file: file.to_owned(), problem: None });
        }
        Ok(())
    }
}

/// What a line of a log has.
enum ParsedLine {
    /// The text of a query.
    Text(String),
    /// A text query whose text is not logged.
    SearchWithoutText,
    /// Something else.
    Other,
}

fn parse_line(line: &[u8]) -> Result<ParsedLine, &'static str> {
    let value: Value = serde_json::from_slice(line).map_err(|_| "is not JSON")?;
    let object = value.as_object().ok_or("is not a JSON object")?;
    let text = |field: &str| object.get(field).and_then(Value::as_str).map(str::to_owned);
    match text("event") {
        None => text("text").map(ParsedLine::Text).ok_or("has no text"),
        // A later page repeats the query, and a picture or vector has no text.
        Some(name)
            if name == event::SEARCH
                && text("input").as_deref() == Some("text")
                && object.get("offset").and_then(Value::as_u64) == Some(0) =>
        {
            Ok(text("query").map_or(ParsedLine::SearchWithoutText, ParsedLine::Text))
        }
        Some(_) => Ok(ParsedLine::Other),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(log: &str) -> Result<TextSample, QueryTextError> {
        let mut sample = TextSample::default();
        sample.read_json_lines(log.as_bytes(), "log").map(|()| sample)
    }

    #[test]
    fn logs_of_query_workers_and_plain_files_give_each_text_once() {
        let log = r#"{"event":"search","input":"text","offset":0,"query":"a red mug"}
{"event":"search","input":"text","offset":24,"query":"a red mug"}
{"event":"search","input":"image","offset":0,"query":"picture 0ff"}
{"event":"heartbeat"}
not JSON
{"event":"search","input":"text","offset":0,"query":"A Red Mug "}
{"event":"search","input":"text","offset":0,"query":"a hat"}"#;
        let mut sample = read(log).unwrap();
        assert_eq!(sample.len(), 2);
        sample.read_csv("id,text\n1,a hat\n2\n3,\"shoes, red\"\n".as_bytes(), "q.csv").unwrap();
        sample.read_csv("\u{feff}id;text\r\n1;a hat\r\n2;shoes, red\r\n".as_bytes(), "q").unwrap();
        sample.read_json_lines("{\"text\":\"a hat\",\"group\":\"x\"}".as_bytes(), "q").unwrap();
        let mut texts = sample.into_texts(1);
        texts.sort();
        assert_eq!(texts, ["a hat", "a red mug", "shoes, red"]);
    }

    #[test]
    fn rare_texts_can_be_left_out() {
        let log = "{\"text\":\"a\"}\n{\"text\":\"b\"}\n{\"text\":\"B\"}\n";
        assert_eq!(read(log).unwrap().into_texts(2), ["b"]);
    }

    #[test]
    fn a_log_without_texts_is_refused_with_the_remedy() {
        let hidden = r#"{"event":"search","input":"text","offset":0,"query_hash":"1"}"#;
        let error = read(hidden).unwrap_err().to_string();
        assert!(error.contains("1 searches") && error.contains("log.query_text"), "{error}");
        let error = read("\n{\"txt\":1}\n").unwrap_err().to_string();
        assert!(error.contains("no line has a query") && error.contains("line 2"), "{error}");
        let csv = |text: &str| TextSample::default().read_csv(text.as_bytes(), "q.csv");
        assert!(csv("query\na\n").unwrap_err().to_string().contains("no column text"));
        assert!(csv("text\n").is_err());
    }

    #[test]
    fn a_long_log_becomes_a_sample_that_does_not_depend_on_its_order() {
        let texts: Vec<String> =
            (0..MAX_SAMPLED_TEXTS + 500).map(|i| format!("text {i}")).collect();
        let sample = |texts: &mut dyn Iterator<Item = &String>| {
            let mut sample = TextSample::default();
            texts.for_each(|text| sample.add(text));
            assert!(sample.is_truncated());
            sample.into_texts(1)
        };
        let forward = sample(&mut texts.iter());
        assert_eq!(forward.len(), MAX_SAMPLED_TEXTS);
        assert_eq!(forward, sample(&mut texts.iter().rev()));
    }
}
