//! A checkpoint in one of the layouts of the wild: where it is, its configuration and its weights.

mod encoder_config;
mod files;
pub(crate) mod hub;
mod json_file;
mod key_report;
mod key_tables;
mod layout;
pub(crate) mod location;
mod model_config;
mod open_clip_config;
mod preprocessor_config;
mod tensor_names;
mod tokenizer_config;
mod weights;

pub use encoder_config::{Activation, Architecture, ModelConfig, TextCleaning, TransformerConfig};
pub use files::Checkpoint;
pub use hub::{CheckpointOrigin, locate_checkpoint};
pub use key_report::KeyReport;
pub use preprocessor_config::{CropRounding, PreprocessorConfig, ResampleFilter, ResizeMode};
pub use tokenizer_config::{
    TokenizerClass, TokenizerConfig, TokenizerFiles, Vocabulary, token_content,
};
