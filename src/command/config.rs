//! `bsap config`.

use crate::cli::{ConfigArgs, ConfigPrint};
use crate::config::{self, Config, ConfigError};
use crate::source::ImageEvent;

use super::Done;

/// Prints what is asked for; only what is in effect needs a configuration that is right.
pub fn run(args: &ConfigArgs, load: impl FnOnce() -> Result<Config, ConfigError>) -> Done {
    let text = match args.what {
        ConfigPrint::Example => config::example(),
        ConfigPrint::Show => load()?.shown(),
        ConfigPrint::Reference => config::markdown(),
        ConfigPrint::Schema => serde_json::to_string_pretty(&config::schema())? + "\n",
        ConfigPrint::EventSchema => {
            serde_json::to_string_pretty(&schemars::schema_for!(ImageEvent))? + "\n"
        }
    };
    say!("{}", text.trim_end());
    Ok(())
}
