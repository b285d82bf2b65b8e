//! Arguments that choose a model, for commands that need no configuration file.

use clap::Args;

use crate::clip::{self, DeviceChoice, Precision};

/// Device, precision and revision of a model.
#[derive(Debug, Args)]
pub struct CheckpointArgs {
    /// Device: auto, cpu or cuda:0
    #[arg(long, default_value = "auto", value_parser = |text: &str| DeviceChoice::try_from(text.to_owned()))]
    pub device: DeviceChoice,
    /// Precision of the image and text encoders
    #[arg(long, default_value = "f32")]
    pub dtype: Precision,
    /// Branch, tag or commit of a model of the hub
    #[arg(long, default_value = "main")]
    pub revision: String,
    /// Read a model of the hub from the cache only
    #[arg(long)]
    pub offline: bool,
}

impl CheckpointArgs {
    /// Returns the options of the model in `checkpoint`.
    pub fn to_model_options(&self, checkpoint: &str) -> clip::ModelOptions {
        clip::ModelOptions {
            checkpoint: checkpoint.to_owned(),
            revision: self.revision.clone(),
            offline: self.offline,
            device: self.device,
            dtype: self.dtype,
        }
    }
}
