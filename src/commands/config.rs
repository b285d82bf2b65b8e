//! `bsap config`.

use serde::Serialize;

use super::cli::{ConfigArgs, ConfigOutput};
use crate::backfill::ControlRequest;
use crate::config::{self, Config, ConfigError};
use crate::ingest::source::{BucketNotification, CloudEvent, ImageEvent};
use crate::serve::http;
use crate::telemetry::{event, metrics};

use super::CommandResult;

/// Prints what is asked for; only what is in effect needs a configuration that is right.
pub fn run(args: &ConfigArgs, load: impl FnOnce() -> Result<Config, ConfigError>) -> CommandResult {
    let text = match args.what {
        ConfigOutput::Example => config::example_toml(),
        ConfigOutput::Show => load()?.to_redacted_toml(),
        ConfigOutput::Reference => config::render_markdown(),
        ConfigOutput::Schema => to_pretty_json(&config::json_schema())?,
        ConfigOutput::EventSchema => to_pretty_json(&schemars::schema_for!(ImageEvent))?,
        ConfigOutput::CloudEventSchema => to_pretty_json(&schemars::schema_for!(CloudEvent))?,
        ConfigOutput::ControlRequestSchema => {
            to_pretty_json(&schemars::schema_for!(ControlRequest))?
        }
        ConfigOutput::BucketNotificationSchema => {
            to_pretty_json(&schemars::schema_for!(BucketNotification))?
        }
        ConfigOutput::Openapi => to_pretty_json(&http::openapi())?,
        ConfigOutput::LogEvents => event::render_markdown(),
        ConfigOutput::Metrics => metrics::render_markdown(),
    };
    say!("{}", text.trim_end());
    Ok(())
}

fn to_pretty_json(schema: &impl Serialize) -> serde_json::Result<String> {
    serde_json::to_string_pretty(schema)
}
