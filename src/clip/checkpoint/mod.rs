//! A checkpoint in the Hugging Face layout: where it is, its configuration and its weights.

mod files;
pub(crate) mod hub;
pub(crate) mod location;
mod model_config;
mod preprocessor_config;

pub use files::{Checkpoint, read_json};
pub use model_config::{Activation, Architecture, ModelConfig, TransformerConfig};
pub use preprocessor_config::{PreprocessorConfig, PreprocessorSize};
