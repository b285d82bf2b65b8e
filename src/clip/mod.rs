//! CLIP: reads a checkpoint in one of the layouts of the wild, and embeds images and texts with it.
//!
//! A picture becomes the square that the image encoder reads (`preprocess`), a text becomes token
//! ids (`tokenizer`); `model` turns both into embeddings of unit length, with the CPU
//! `kernels`. Everything else uses a model through the trait [`Encoders`].

mod checkpoint;
mod encoders;
mod error;
pub(crate) mod kernels;
pub(crate) mod model;
mod model_card;
mod options;
pub(crate) mod preprocess;
pub(crate) mod self_test;
mod self_test_cache;
mod tokenizer;
mod unread_text;

pub use checkpoint::{CheckpointOrigin, KeyReport, locate_checkpoint};
pub use encoders::Encoders;
pub use error::ClipError;
pub use model::ClipModel;
pub use model_card::ModelCard;
pub use options::{DeviceChoice, ModelOptions, Precision};
pub use preprocess::Pixels;
pub use self_test::{SelfTestReport, run_self_test};
pub use self_test_cache::run_self_test_once;
pub use unread_text::UnreadText;
