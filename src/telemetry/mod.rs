//! Logs: how they are written, and the events in them.
//!
//! Every log line of this program carries `event`, one of the names in [`event`], with fields that
//! are declared there; `ops/log-events.md` is written from the same list.

pub mod admin;
pub mod event;
pub mod metrics;
pub mod otlp;
mod rate_limit;

use std::io::IsTerminal;
use std::path::PathBuf;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use tracing::level_filters::LevelFilter;
use tracing_subscriber::filter::{FilterExt as _, Targets};
use tracing_subscriber::fmt::writer::BoxMakeWriter;
use tracing_subscriber::layer::SubscriberExt as _;
use tracing_subscriber::util::SubscriberInitExt as _;
use tracing_subscriber::{EnvFilter, Layer as _};

/// How logs are written.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct LogOptions {
    /// `json` (a line an event), `text` for people, or `auto`: text on a terminal, else JSON.
    pub format: LogFormat,
    /// Which events: `error`, `warn`, `info`, `debug`, or a filter such as `info,bsap=debug`.
    pub level: String,
    /// File to append to. Empty: standard error.
    pub file: PathBuf,
    /// Warnings and errors of one event in ten seconds; more are held back, and how many were is
    /// told as `log.suppressed`. 0: none are held back.
    pub burst: u32,
    /// Whether the text of queries stands in the log; without it, only its hash.
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
    /// What is wrong with these options, a line each.
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
    /// Text on a terminal, else JSON.
    #[default]
    Auto,
    /// One JSON object a line.
    Json,
    /// For people.
    Text,
}

static LOG_QUERY_TEXT: AtomicBool = AtomicBool::new(false);

/// The text of a query as the log may show it: nothing unless `log.query_text` asks for it.
pub fn loggable_query_text(text: &str) -> Option<&str> {
    LOG_QUERY_TEXT.load(Ordering::Relaxed).then_some(text)
}

/// Starts logging for the whole process; gives what sends to a collector, where one is named. Fails
/// where the file cannot be opened or the filter is wrong; a second call in one process changes
/// nothing.
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
        BoxMakeWriter::new(Mutex::new(file))
    } else {
        BoxMakeWriter::new(std::io::stderr)
    };
    let text = match options.format {
        LogFormat::Json => false,
        LogFormat::Text => true,
        LogFormat::Auto => !to_file && std::io::stderr().is_terminal(),
    };
    LOG_QUERY_TEXT.store(options.query_text, Ordering::Relaxed);
    let limit = rate_limit::EventRateLimit::new(options.burst);
    let filter = filter.and(limit.clone());
    let layer = tracing_subscriber::fmt::layer().with_writer(writer);
    let written = if text {
        layer.with_target(false).compact().with_filter(filter).boxed()
    } else {
        let json = layer.json().flatten_event(true);
        json.with_current_span(false).with_span_list(false).with_filter(filter).boxed()
    };
    let own_targets = Targets::new().with_target("bsap", LevelFilter::DEBUG);
    let (spans, exporter) = otlp::build_layer_and_exporter(otlp).unzip();
    let spans = spans.map(|spans| spans.with_filter(own_targets.clone()));
    let started = tracing_subscriber::registry()
        .with(written)
        .with(spans)
        .with(rate_limit::EventCounter.with_filter(own_targets))
        .try_init();
    // An error means that logging runs already, which tests in one process do.
    if started.is_err() {
        return Ok(None);
    }
    limit.spawn_reporter();
    // An increase of a series that begins with its first event does not see that event.
    for event in event::EVENT_DEFINITIONS {
        for level in event.levels {
            metrics::global().log_events.add(&[event.name, level], 0);
        }
    }
    Ok(exporter)
}
