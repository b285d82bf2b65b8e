//! `bsap config`.

use serde::Serialize;

use crate::cli::{ConfigArgs, ConfigPrint};
use crate::config::{self, Config, ConfigError};
use crate::http;
use crate::metrics;
use crate::reindex::Request;
use crate::source::{BucketNotification, CloudEvent, ImageEvent};
use crate::telemetry::event;

use super::Done;

/// Prints what is asked for; only what is in effect needs a configuration that is right.
pub fn run(args: &ConfigArgs, load: impl FnOnce() -> Result<Config, ConfigError>) -> Done {
    let text = match args.what {
        ConfigPrint::Example => config::example(),
        ConfigPrint::Show => load()?.shown(),
        ConfigPrint::Reference => config::markdown(),
        ConfigPrint::Schema => pretty(&config::schema())?,
        ConfigPrint::EventSchema => pretty(&schemars::schema_for!(ImageEvent))?,
        ConfigPrint::CloudEventSchema => pretty(&schemars::schema_for!(CloudEvent))?,
        ConfigPrint::ControlRequestSchema => pretty(&schemars::schema_for!(Request))?,
        ConfigPrint::BucketNotificationSchema => {
            pretty(&schemars::schema_for!(BucketNotification))?
        }
        ConfigPrint::Openapi => pretty(&http::openapi())?,
        ConfigPrint::LogEvents => event::markdown(),
        ConfigPrint::Metrics => metrics::markdown(),
    };
    say!("{}", text.trim_end());
    Ok(())
}

fn pretty(schema: &impl Serialize) -> serde_json::Result<String> {
    serde_json::to_string_pretty(schema)
}
