//! `bsap config`.

use serde::Serialize;

use super::cli::{ConfigArgs, ConfigPrint};
use crate::backfill::Request;
use crate::config::{self, Config, ConfigError};
use crate::ingest::source::{BucketNotification, CloudEvent, ImageEvent};
use crate::serve::http;
use crate::telemetry::{event, metrics};

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
