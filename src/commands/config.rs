//! `bsap config`: prints the configuration, and the generated reference pages and schemas.

use std::path::Path;

use clap::{Args, ValueEnum};
use serde::Serialize;

use super::shared::configuration::load_config;
use super::shared::error::CommandResult;
use super::shared::printing::print_line;
use crate::backfill::ControlRequest;
use crate::config;
use crate::ingest::source::{BucketNotification, CloudEvent, ImageEvent};
use crate::serve::http;
use crate::telemetry::{event_reference, metrics};

/// `bsap config`.
#[derive(Debug, Args)]
pub struct ConfigArgs {
    /// What to print
    #[arg(value_enum)]
    pub what: ConfigOutput,
}

/// What `bsap config` prints.
#[derive(Debug, Clone, Copy, ValueEnum)]
pub enum ConfigOutput {
    /// A commented file with every option at its default
    Example,
    /// The effective configuration, with secrets hidden
    Show,
    /// The reference of all options, as Markdown
    Reference,
    /// The JSON schema of the file, for editors
    Schema,
    /// The JSON schema of new-image events
    EventSchema,
    /// The JSON schema of CloudEvents that contain them
    CloudEventSchema,
    /// The JSON schema of bucket notifications
    BucketNotificationSchema,
    /// The HTTP interface as OpenAPI 3.1
    Openapi,
    /// The reference of all log events, as Markdown
    LogEvents,
    /// The JSON schema of requests on the control topic
    ControlRequestSchema,
    /// The reference of all metrics, as Markdown
    Metrics,
}

/// Prints what the argument names. Only `show` reads the configuration.
pub fn run(args: &ConfigArgs, config_file: Option<&Path>) -> CommandResult {
    let text = match args.what {
        ConfigOutput::Example => config::example_toml(),
        ConfigOutput::Show => load_config(config_file)?.to_redacted_toml(),
        ConfigOutput::Reference => config::render_config_reference(),
        ConfigOutput::Schema => to_pretty_json(&config::config_json_schema())?,
        ConfigOutput::EventSchema => to_pretty_json(&schemars::schema_for!(ImageEvent))?,
        ConfigOutput::CloudEventSchema => to_pretty_json(&schemars::schema_for!(CloudEvent))?,
        ConfigOutput::ControlRequestSchema => {
            to_pretty_json(&schemars::schema_for!(ControlRequest))?
        }
        ConfigOutput::BucketNotificationSchema => {
            to_pretty_json(&schemars::schema_for!(BucketNotification))?
        }
        ConfigOutput::Openapi => to_pretty_json(&http::openapi(""))?,
        ConfigOutput::LogEvents => event_reference::render_log_event_reference(),
        ConfigOutput::Metrics => metrics::render_metric_reference(),
    };
    print_line!("{}", text.trim_end());
    Ok(())
}

fn to_pretty_json(document: &impl Serialize) -> serde_json::Result<String> {
    serde_json::to_string_pretty(document)
}
