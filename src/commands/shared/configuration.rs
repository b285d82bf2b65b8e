//! The configuration as the commands load it.

use std::path::Path;

use crate::config::{self, Config, ConfigError};
use crate::telemetry::otlp::ENDPOINT_OFF;

/// Loads the configuration from `file` and the environment.
pub fn load_config(file: Option<&Path>) -> Result<Config, ConfigError> {
    config::load(file, std::env::vars())
}

/// Loads the configuration for a command that loads no model: `model.checkpoint` need not be valid.
pub fn load_config_without_model(file: Option<&Path>) -> Result<Config, ConfigError> {
    const CHECKPOINT_VAR: &str = "BSAP_MODEL__CHECKPOINT";
    let others = std::env::vars().filter(|(name, _)| name != CHECKPOINT_VAR);
    let environment = others.chain([(CHECKPOINT_VAR.to_owned(), ".".to_owned())]);
    config::load(file, environment)
}

/// For a command whose answer stands on the terminal: what it logs goes there only where it warns. A file has
/// all.
pub fn with_quiet_logging(mut config: Config) -> Config {
    config.otlp.endpoint = ENDPOINT_OFF.into();
    if !config.log.file.as_os_str().is_empty() {
        return config;
    }
    // The kernel logs as an error that a table is not there, which is told better by who asked for it.
    config.log.level = "warn,deltalake_core=error,delta_kernel=off,buoyant_kernel=off".into();
    config
}
