//! Options of the section `dead_letter`.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::validate;

/// To which topic dead letters are written.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct DeadLetterOptions {
    /// Topic of messages that can never be processed.
    pub topic: String,
}

impl Default for DeadLetterOptions {
    fn default() -> Self {
        Self { topic: "images.dead-letters".into() }
    }
}

impl DeadLetterOptions {
    /// Returns one line per invalid option.
    pub fn validate(&self) -> Vec<String> {
        let mut problems = Vec::new();
        validate::check_topic_name(&mut problems, "topic", &self.topic);
        problems
    }
}
