//! Arguments of the commands about models: `embed`, `model`.

use std::path::PathBuf;

use clap::{Args, Subcommand};

use crate::clip::{self, DeviceChoice, Precision};

/// Which model, for commands that need no configuration file.
#[derive(Debug, Args)]
pub struct CheckpointArgs {
    /// Where it runs: auto, cpu or cuda:0
    #[arg(long, default_value = "auto", value_parser = |text: &str| DeviceChoice::try_from(text.to_owned()))]
    pub device: DeviceChoice,
    /// Precision of the towers
    #[arg(long, default_value = "f32")]
    pub dtype: Precision,
    /// Branch, tag or commit of a model of the hub
    #[arg(long, default_value = "main")]
    pub revision: String,
    /// Take a model of the hub from the cache only
    #[arg(long)]
    pub offline: bool,
}

impl CheckpointArgs {
    /// As options of the model in `checkpoint`.
    pub fn to_options(&self, checkpoint: &str) -> clip::ModelOptions {
        clip::ModelOptions {
            checkpoint: checkpoint.to_owned(),
            revision: self.revision.clone(),
            offline: self.offline,
            device: self.device,
            dtype: self.dtype,
        }
    }
}

/// `bsap embed`.
#[derive(Debug, Args)]
#[command(after_long_help = "\
Prints a JSON line an input, texts first: kind, input, tokens of a text, embedding (unit length).

Example:
  bsap embed --checkpoint clip-vit-base-patch32 --text 'a red mug' --image mug.jpg")]
pub struct EmbedArgs {
    /// Folder of the checkpoint, in the Hugging Face layout, or a model of the hub
    #[arg(long, value_name = "FOLDER|ID")]
    pub checkpoint: String,
    /// A text
    #[arg(long, value_name = "TEXT")]
    pub text: Vec<String>,
    /// File with a JSON string a line, each a text; `-` reads standard input
    #[arg(long, value_name = "FILE")]
    pub texts: Option<PathBuf>,
    /// An image file
    #[arg(long, value_name = "FILE")]
    pub image: Vec<PathBuf>,
    /// Write the square that the image tower reads of each image into this folder, as PNG named
    /// by its place among the images: 0.png, 1.png
    #[arg(long, value_name = "FOLDER")]
    pub pixels: Option<PathBuf>,
    /// Most inputs computed at one time
    #[arg(long, default_value_t = 32, value_parser = clap::value_parser!(u16).range(1..=1024))]
    pub batch: u16,
    /// Where and how exactly.
    #[command(flatten)]
    pub model: CheckpointArgs,
}

/// `bsap model`.
#[derive(Debug, Args)]
pub struct ModelArgs {
    /// What to do.
    #[command(subcommand)]
    pub action: ModelAction,
}

/// What `bsap model` does.
#[derive(Debug, Subcommand)]
pub enum ModelAction {
    /// Print architecture, sizes, fingerprint and preprocessing, and run a self-test
    Inspect {
        /// Folder of the checkpoint, in the Hugging Face layout, or a model of the hub
        checkpoint: String,
        /// Where and how exactly.
        #[command(flatten)]
        model: CheckpointArgs,
    },
}
