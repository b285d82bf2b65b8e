//! How the log is written: format, level, file, and the limit of repeated lines.

use std::io::{self, IsTerminal as _, Write};
use std::path::PathBuf;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use tracing::error;
use tracing::level_filters::LevelFilter;
use tracing_subscriber::filter::{FilterExt as _, Targets};
use tracing_subscriber::fmt::writer::BoxMakeWriter;
use tracing_subscriber::layer::SubscriberExt as _;
use tracing_subscriber::util::SubscriberInitExt as _;
use tracing_subscriber::{EnvFilter, Layer as _};

use super::{event, metrics, otlp, rate_limit};
use crate::diagnosis::redact::redact;

/// How logs are written.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct LogOptions {
    /// `json` (one line per event), `text` for people, or `auto`: text on a terminal, otherwise JSON.
    pub format: LogFormat,
    /// Which events are written: `error`, `warn`, `info`, `debug`, or a filter such as
    /// `info,bsap=debug`.
    pub level: String,
    /// File to append to. Empty: standard error.
    pub file: PathBuf,
    /// How many warnings and errors of one event are written within ten seconds; further ones are
    /// suppressed, and their number is logged as `log.suppressed`. 0: none are suppressed.
    pub burst: u32,
    /// Whether the log has the text of queries; otherwise it has only the hash of each text.
    pub query_text: bool,
}

impl Default for LogOptions {
    fn default() -> Self {
        Self {
            format: LogFormat::Auto,
            level: "info,deltalake_core=error,delta_kernel=error,buoyant_kernel=error".into(),
            file: PathBuf::new(),
            burst: 20,
            query_text: false,
        }
    }
}

impl LogOptions {
    /// Returns one line per invalid option.
    pub fn validate(&self) -> Vec<String> {
        match EnvFilter::try_new(&self.level) {
            Ok(_) => Vec::new(),
            Err(error) => vec![format!(
                "level: {:?} is not a filter: {error}; use error, warn, info or debug",
                self.level
            )],
        }
    }
}

/// The form of a log line.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum LogFormat {
    /// Text on a terminal, otherwise JSON.
    #[default]
    Auto,
    /// One JSON object per line.
    Json,
    /// Text for people.
    Text,
}

/// Writes lines without secrets, whoever logged them.
struct RedactingWriter<W>(W);

impl<W: Write> Write for RedactingWriter<W> {
    /// Writes a whole line, as the layer passes it.
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        self.0.write_all(redact(&String::from_utf8_lossy(line)).as_bytes())?;
        Ok(line.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        self.0.flush()
    }
}

static LOG_QUERY_TEXT: AtomicBool = AtomicBool::new(false);

/// Returns the text of a query as the log may have it: `None` unless `log.query_text` is set.
pub fn loggable_query_text(text: &str) -> Option<&str> {
    LOG_QUERY_TEXT.load(Ordering::Relaxed).then_some(text)
}

/// Logs a panic, in place of the text that the standard library would write between the lines of the log.
fn log_panic(panic: &std::panic::PanicHookInfo<'_>) {
    let error = panic.payload_as_str().unwrap_or("no message");
    let location = panic.location().map(ToString::to_string);
    error!(event = event::PANIC, error, location, "a part of the program failed unexpectedly");
}

/// Starts logging for the whole process; returns the exporter if a collector is configured. An error
/// says that the file cannot be opened or the filter is invalid. A second call in one process has no
/// effect.
pub fn init_logging(
    options: &LogOptions,
    otlp: &otlp::OtlpOptions,
) -> Result<Option<otlp::OtlpExporter>, String> {
    let filter = EnvFilter::try_new(&options.level).map_err(|e| format!("log.level: {e}"))?;
    let to_file = !options.file.as_os_str().is_empty();
    let writer = if to_file {
        let file = std::fs::OpenOptions::new()
            .create(true)
            .append(true)
            .open(&options.file)
            .map_err(|e| format!("log.file: {}: {e}", options.file.display()))?;
        BoxMakeWriter::new(Mutex::new(RedactingWriter(file)))
    } else {
        BoxMakeWriter::new(|| RedactingWriter(std::io::stderr()))
    };
    let as_text = match options.format {
        LogFormat::Json => false,
        LogFormat::Text => true,
        LogFormat::Auto => !to_file && std::io::stderr().is_terminal(),
    };
    LOG_QUERY_TEXT.store(options.query_text, Ordering::Relaxed);
    let rate_limit = rate_limit::LogEventRateLimit::new(options.burst);
    let filter = filter.and(rate_limit.clone());
    let layer = tracing_subscriber::fmt::layer().with_writer(writer);
    let lines = if as_text {
        layer.with_target(false).compact().with_filter(filter).boxed()
    } else {
        let json = layer.json().flatten_event(true);
        json.with_current_span(false).with_span_list(false).with_filter(filter).boxed()
    };
    let own_targets = Targets::new().with_target("bsap", LevelFilter::DEBUG);
    let (spans, exporter) = otlp::build_layer_and_exporter(otlp).unzip();
    let spans = spans.map(|spans| spans.with_filter(own_targets.clone()));
    let installed = tracing_subscriber::registry()
        .with(lines)
        .with(spans)
        .with(rate_limit::LogEventCounter.with_filter(own_targets))
        .try_init();
    // An error means that logging is initialised already, as by another test of the process.
    if installed.is_err() {
        return Ok(None);
    }
    rate_limit.spawn_reporter();
    std::panic::set_hook(Box::new(log_panic));
    // PromQL's `increase` ignores the first sample of a series: each series starts at 0, so that the
    // first event counts.
    for event in event::EVENT_DEFINITIONS {
        for level in event.levels {
            metrics::global().log_events.add(&[event.name, level], 0);
        }
    }
    Ok(exporter)
}
