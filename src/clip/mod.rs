//! CLIP: a checkpoint in the Hugging Face layout, its preprocessing, its tokenizer, its two towers.

mod checkpoint;
pub(crate) mod kernels;
pub(crate) mod model;
pub(crate) mod preprocess;
pub(crate) mod self_test;
mod tokenizer;

use std::path::PathBuf;

use candle_core::{DType, Device};
use image::RgbImage;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

pub use model::ClipModel;
pub use preprocess::Pixels;
pub use self_test::{SelfTestReport, run_self_test};

use crate::record::to_hex;

/// Why the CPU does not take f16.
const CPU_PRECISION_HINT: &str = "the CPU computes in f32 or bf16; set one of them";
/// Texts computed at one time where there are many: memory for activations stays bounded.
const MAX_TEXT_BATCH: usize = 64;

/// What the pipeline needs of a model; a deterministic stand-in may implement it in tests.
pub trait Encoders: Send + Sync {
    /// What the model is.
    fn card(&self) -> &ModelCard;

    /// Resizes and crops a picture to what the image tower reads.
    fn preprocess_image(&self, image: &RgbImage) -> Result<Pixels, ClipError>;

    /// One unit-length embedding of `card().dimension` values per picture, in order.
    fn embed_images(&self, batch: &[Pixels]) -> Result<Vec<Vec<f32>>, ClipError>;

    /// One unit-length embedding of `card().dimension` values per text, in order.
    fn embed_texts(&self, texts: &[&str]) -> Result<Vec<Vec<f32>>, ClipError>;

    /// The same for any number of texts, a batch of [`TEXT_BATCH`] at a time.
    fn embed_texts_in_batches(&self, texts: &[&str]) -> Result<Vec<Vec<f32>>, ClipError> {
        let mut embeddings = Vec::with_capacity(texts.len());
        for batch in texts.chunks(MAX_TEXT_BATCH) {
            embeddings.extend(self.embed_texts(batch)?);
        }
        Ok(embeddings)
    }

    /// Batches of pictures worth computing at one time, by as many threads.
    fn concurrent_batches(&self) -> usize {
        1
    }

    /// Computations that have failed since one last did not. A device that is lost fails all.
    fn consecutive_failures(&self) -> u32 {
        0
    }

    /// Whether the text tower's vocabulary has the script of `text`. Where it has not, the text is
    /// embedded as noise.
    fn supports_script(&self, text: &str) -> bool {
        let _ = text;
        true
    }
}

/// What a model is.
#[derive(Debug, Clone, PartialEq, Serialize, JsonSchema)]
pub struct ModelCard {
    /// Its name: that of its folder, or `organisation/name` on the hub.
    pub name: String,
    /// `clip` or `siglip`.
    pub architecture: String,
    /// SHA-256 over weights, architecture, preprocessing and tokenizer, in hexadecimal. Embeddings
    /// of models with different fingerprints are never compared.
    pub fingerprint: String,
    /// Dimension of an embedding.
    pub dimension: usize,
    /// Side of the square that the image tower reads, in pixels.
    pub image_side: u32,
    /// Longest text in tokens.
    pub context_length: usize,
    /// What becomes of a picture before the tower reads it.
    pub preprocessing: String,
    /// L: exp of the checkpoint's `logit_scale`.
    pub logit_scale: f32,
    /// SigLIP's bias: the probability of a match is σ(L·cosine + bias). It ranks as the cosine
    /// does.
    pub logit_bias: Option<f32>,
    /// Number of parameters.
    pub parameters: u64,
    /// What users must know of the model, from `notice` in its config; for instance that its
    /// weights are random.
    pub notice: Option<String>,
}

impl ModelCard {
    /// The card of towers that have no checkpoint, such as those that benches and tests put in a
    /// model's place: embeddings of `dimension` values, CLIP's logit scale of 100.
    pub fn without_checkpoint(name: &str, dimension: usize) -> Self {
        Self {
            name: name.to_owned(),
            architecture: "none".into(),
            fingerprint: to_hex(&Sha256::digest(name)),
            dimension,
            image_side: 1,
            context_length: 77,
            preprocessing: String::new(),
            logit_scale: 100.0,
            logit_bias: None,
            parameters: 0,
            notice: None,
        }
    }
}

/// Which model, and where it runs.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct ModelOptions {
    /// Folder of a CLIP or SigLIP checkpoint in the Hugging Face layout (`config.json`,
    /// `model.safetensors`, `tokenizer.json`, `preprocessor_config.json`), or a model of the Hugging
    /// Face hub, which is downloaded once (`HF_HOME`, `HF_ENDPOINT` and `HF_TOKEN` hold).
    pub checkpoint: String,
    /// Branch, tag or commit of a model of the hub. Name a commit where the model must not change.
    pub revision: String,
    /// Take a model of the hub from the cache only, and ask no network.
    pub offline: bool,
    /// `auto` (a GPU if this build and machine have one), `cpu`, or `cuda:0`.
    pub device: DeviceChoice,
    /// Precision of the towers: `f32`, `bf16`, or on a GPU `f16`. `bf16` is faster where the machine has
    /// instructions for it, and changes scores slightly: choose it before the first image,
    /// and the same for workers and query workers. On the CPU only products are computed in it.
    pub dtype: Precision,
}

impl Default for ModelOptions {
    fn default() -> Self {
        Self {
            checkpoint: "openai/clip-vit-base-patch32".into(),
            revision: "main".into(),
            offline: false,
            device: DeviceChoice::Auto,
            dtype: Precision::F32,
        }
    }
}

impl ModelOptions {
    /// What is wrong with these options, a line each.
    pub fn validate(&self) -> Vec<String> {
        let mut problems = Vec::new();
        problems.extend(
            checkpoint::hub::CheckpointLocation::parse(&self.checkpoint)
                .err()
                .map(|e| format!("checkpoint: {e}")),
        );
        if self.revision.is_empty() {
            problems.push("revision: is empty; main is the newest".into());
        }
        if self.device == DeviceChoice::Cpu && self.dtype == Precision::F16 {
            problems.push(format!("dtype: {CPU_PRECISION_HINT}"));
        }
        problems
    }
}

/// Where the towers run.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(try_from = "String", into = "String")]
#[schemars(with = "String")]
pub enum DeviceChoice {
    /// A GPU if there is one, else the CPU.
    Auto,
    /// The CPU.
    Cpu,
    /// The GPU of this number, or nothing.
    Cuda(usize),
}

impl TryFrom<String> for DeviceChoice {
    type Error = String;
    fn try_from(text: String) -> Result<Self, String> {
        match text.as_str() {
            "auto" => Ok(Self::Auto),
            "cpu" => Ok(Self::Cpu),
            other => other
                .strip_prefix("cuda:")
                .and_then(|n| n.parse().ok())
                .map(Self::Cuda)
                .ok_or_else(|| format!("{text:?} is not auto, cpu or cuda:<number>")),
        }
    }
}

impl From<DeviceChoice> for String {
    fn from(choice: DeviceChoice) -> Self {
        match choice {
            DeviceChoice::Auto => "auto".into(),
            DeviceChoice::Cpu => "cpu".into(),
            DeviceChoice::Cuda(n) => format!("cuda:{n}"),
        }
    }
}

/// Precision of the towers.
#[derive(
    Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema, clap::ValueEnum,
)]
#[serde(rename_all = "lowercase")]
pub enum Precision {
    /// 32-bit floats.
    F32,
    /// 16-bit floats, on a GPU.
    F16,
    /// bfloat16.
    Bf16,
}

impl Precision {
    /// What tensors are made of on that device: the CPU's are f32, and its weights are rounded later.
    fn tensor_dtype(self, device: &Device) -> DType {
        match self {
            Self::F16 => DType::F16,
            Self::Bf16 if !device.is_cpu() => DType::BF16,
            Self::F32 | Self::Bf16 => DType::F32,
        }
    }
}

/// Why a model cannot be used. All but [`ClipError::Input`] mean that the model or its device is
/// wrong, not the picture or the text.
#[derive(Debug, thiserror::Error)]
pub enum ClipError {
    /// The checkpoint is neither here nor to be had.
    #[error("{checkpoint}: {reason}")]
    CheckpointUnavailable {
        /// As configured.
        checkpoint: String,
        /// Why.
        reason: String,
    },
    /// A file of the checkpoint is missing or cannot be read.
    #[error("{file}: {source}")]
    File {
        /// The file.
        file: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// A file of the checkpoint does not hold what it should.
    #[error("{file}: {reason}")]
    InvalidCheckpoint {
        /// The file.
        file: PathBuf,
        /// What is wrong.
        reason: String,
    },
    /// The device cannot be used.
    #[error("device {device}: {reason}")]
    Device {
        /// As configured.
        device: String,
        /// Why, and what would work.
        reason: String,
    },
    /// This picture or text cannot be embedded.
    #[error("{0}")]
    InvalidInput(String),
    /// The model loads, but what it computes is wrong.
    #[error("the self-test failed: {0}")]
    SelfTest(String),
    /// Computing failed.
    #[error("the towers failed: {0}")]
    Compute(#[from] candle_core::Error),
}
