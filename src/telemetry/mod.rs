//! Logs: how they are written, and the events in them.
//!
//! Every log line of this program carries `event`, one of the names in [`event`], with fields that
//! are declared there; `ops/log-events.md` is written from the same list.

pub mod event;
mod limit;
pub mod metrics;
pub mod otlp;
pub mod watch;

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
pub struct Options {
    /// `json` (a line an event), `text` for people, or `auto`: text on a terminal, else JSON.
    pub format: Format,
    /// Which events: `error`, `warn`, `info`, `debug`, or a filter such as `info,bsap=debug`.
    pub level: String,
    /// File to append to. Empty: standard error.
    pub file: PathBuf,
    /// Warnings and errors of one event in ten seconds; more are held back, and how many were is
    /// told as `log.held_back`. 0: none are held back.
    pub burst: u32,
    /// Whether the text of queries stands in the log; without it, only its hash.
    pub query_text: bool,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            format: Format::Auto,
            level: "info,deltalake_core=error,delta_kernel=error,buoyant_kernel=error".into(),
            file: PathBuf::new(),
            burst: 20,
            query_text: false,
        }
    }
}

impl Options {
    /// What is wrong with these options, a line each.
    pub fn problems(&self) -> Vec<String> {
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
pub enum Format {
    /// Text on a terminal, else JSON.
    #[default]
    Auto,
    /// One JSON object a line.
    Json,
    /// For people.
    Text,
}

static QUERY_TEXT: AtomicBool = AtomicBool::new(false);

/// The text of a query as the log may show it: nothing unless `log.query_text` asks for it.
pub fn query_text(text: &str) -> Option<&str> {
    QUERY_TEXT.load(Ordering::Relaxed).then_some(text)
}

/// Starts logging for the whole process; gives what sends to a collector, where one is named. Fails
/// where the file cannot be opened or the filter is wrong; a second call in one process changes
/// nothing.
pub fn init(options: &Options, otlp: &otlp::Options) -> Result<Option<otlp::Exporter>, String> {
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
        Format::Json => false,
        Format::Text => true,
        Format::Auto => !to_file && std::io::stderr().is_terminal(),
    };
    QUERY_TEXT.store(options.query_text, Ordering::Relaxed);
    let limit = limit::Limit::new(options.burst);
    let filter = filter.and(limit.clone());
    let layer = tracing_subscriber::fmt::layer().with_writer(writer);
    let written = if text {
        layer.with_target(false).compact().with_filter(filter).boxed()
    } else {
        let json = layer.json().flatten_event(true);
        json.with_current_span(false).with_span_list(false).with_filter(filter).boxed()
    };
    let ours = Targets::new().with_target("bsap", LevelFilter::DEBUG);
    let (spans, exporter) = otlp::new(otlp).unzip();
    let spans = spans.map(|spans| spans.with_filter(ours.clone()));
    let started = tracing_subscriber::registry()
        .with(written)
        .with(spans)
        .with(limit::Count.with_filter(ours))
        .try_init();
    // An error means that logging runs already, which tests in one process do.
    if started.is_err() {
        return Ok(None);
    }
    limit.start();
    // An increase of a series that begins with its first event does not see that event.
    for event in event::ALL {
        for level in event.levels {
            metrics::get().log_events.add(&[event.name, level], 0);
        }
    }
    Ok(exporter)
}
