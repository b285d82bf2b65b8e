//! Loads the configuration, as each kind of command needs it.

use std::path::Path;

use crate::config::{self, Config, ConfigError};
use crate::telemetry::otlp::ENDPOINT_OFF;

/// Loads the configuration from `file` and the environment.
pub fn load_config(file: Option<&Path>) -> Result<Config, ConfigError> {
    config::load_valid_config(file, std::env::vars())
}

/// Loads the configuration for a command that loads no model: `model.checkpoint` is not validated.
pub fn load_config_without_model(file: Option<&Path>) -> Result<Config, ConfigError> {
    const CHECKPOINT_VAR: &str = "BSAP_MODEL__CHECKPOINT";
    let others = std::env::vars().filter(|(name, _)| name != CHECKPOINT_VAR);
    let environment = others.chain([(CHECKPOINT_VAR.to_owned(), ".".to_owned())]);
    config::load_valid_config(file, environment)
}

/// Returns the configuration of a command whose results are printed: the terminal gets only warnings,
/// a log file gets everything, and nothing is exported to a collector.
pub fn with_quiet_logging(mut config: Config) -> Config {
    config.otlp.endpoint = ENDPOINT_OFF.into();
    if !config.log.file.as_os_str().is_empty() {
        return config;
    }
    // The kernel logs a missing table as an error; the command reports it with a remedy.
    config.log.level = "warn,deltalake_core=error,delta_kernel=off,buoyant_kernel=off".into();
    config
}
