//! Logs: how they are written, and the events in them.
//!
//! Every log line of this program carries `event`, one of the names in [`event`], with fields that
//! are declared there; `ops/log-events.md` is written from the same list.

pub mod event;

use std::io::IsTerminal;
use std::path::PathBuf;
use std::sync::Mutex;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use tracing_subscriber::EnvFilter;
use tracing_subscriber::fmt::writer::BoxMakeWriter;

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
}

impl Default for Options {
    fn default() -> Self {
        Self {
            format: Format::Auto,
            level: "info,deltalake_core=error,delta_kernel=error,buoyant_kernel=error".into(),
            file: PathBuf::new(),
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

/// Starts logging for the whole process. Fails where the file cannot be opened or the filter is
/// wrong; a second call in one process changes nothing.
pub fn init(options: &Options) -> Result<(), String> {
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
    let builder = tracing_subscriber::fmt().with_env_filter(filter).with_writer(writer);
    // An error means that logging runs already, which tests in one process do.
    let _ = if text {
        builder.with_target(false).compact().try_init()
    } else {
        builder.json().flatten_event(true).with_current_span(false).with_span_list(false).try_init()
    };
    Ok(())
}
