//! Which options are secret, and the configuration without them.

use std::collections::BTreeMap;

use rdkafka::ClientConfig;
use rdkafka::error::KafkaError;
use rdkafka::types::RDKafkaConfRes;

use super::Config;
use crate::diagnosis::redact::{HIDDEN, is_secret_name, redact_addresses};
use crate::store;

/// A section and a key whose value is a table of options of a library, and whether an option of it is secret.
pub(super) type SecretMap = (&'static str, &'static str, fn(&str) -> bool);

/// All tables of options of libraries.
pub(super) const SECRET_MAPS: [SecretMap; 3] = [
    ("kafka", "properties", is_secret_kafka_property),
    ("table", "store_options", is_secret_store_option),
    ("fetch", "store_options", is_secret_store_option),
];

/// A name that librdkafka does not know may be the misspelt one of a secret.
fn is_secret_kafka_property(name: &str) -> bool {
    let set = ClientConfig::new().set(name, "").create_native_config();
    let is_unknown =
        matches!(set, Err(KafkaError::ClientConfig(RDKafkaConfRes::RD_KAFKA_CONF_UNKNOWN, ..)));
    is_unknown || is_secret_name(name)
}

/// A name that no store knows may be the misspelt one of a secret.
fn is_secret_store_option(name: &str) -> bool {
    !store::is_known_option(name) || is_secret_name(name)
}

impl Config {
    /// Returns the configuration as TOML, with secrets hidden.
    pub fn to_redacted_toml(&self) -> String {
        let mut shown = self.clone();
        hide_values(&mut shown.kafka.properties, is_secret_kafka_property);
        hide_values(&mut shown.table.store_options, is_secret_store_option);
        hide_values(&mut shown.fetch.store_options, is_secret_store_option);
        match toml::to_string(&shown) {
            Ok(text) => redact_addresses(&text).into_owned(),
            Err(error) => format!("# cannot be shown: {error}\n"),
        }
    }
}

fn hide_values(options: &mut BTreeMap<String, String>, is_secret: fn(&str) -> bool) {
    for (_, value) in
        options.iter_mut().filter(|(name, value)| is_secret(name) && !value.is_empty())
    {
        *value = HIDDEN.into();
    }
}
