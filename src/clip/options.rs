//! The options of a model: which checkpoint, on which device, in which precision.

use candle_core::{DType, Device};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::checkpoint::location::CheckpointLocation;

/// The remedy if f16 is configured for the CPU.
pub const CPU_PRECISION_HINT: &str = "the CPU computes in f32 or bf16; set one of them";

/// Which model, and where it runs.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct ModelOptions {
    /// Folder of a CLIP or SigLIP checkpoint as transformers, sentence-transformers or open_clip save it
    /// (`docs/checkpoints.md`), or a model of the Hugging Face hub, which is downloaded once; the variables of
    /// Hugging Face apply (`docs/hub.md`).
    pub checkpoint: String,
    /// Branch, tag or commit of a model of the hub. Name a commit if the model must not change.
    pub revision: String,
    /// Whether a model of the hub is read from the cache only, without any network request.
    pub offline: bool,
    /// `auto` (a GPU if this build and machine have one), `cpu`, or `cuda:0`.
    pub device: DeviceChoice,
    /// Precision of the image and text encoders: `f32`, `bf16`, or on a GPU `f16`. `bf16` is faster
    /// if the machine has instructions for it, and changes scores slightly: choose it before the
    /// first image, and the same for workers and query workers. On the CPU only matrix products are
    /// computed in `bf16`.
    pub dtype: Precision,
}

impl Default for ModelOptions {
    fn default() -> Self {
        Self {
            checkpoint: "laion/CLIP-ViT-B-32-laion2B-s34B-b79K".into(),
            revision: "main".into(),
            offline: false,
            device: DeviceChoice::Auto,
            dtype: Precision::F32,
        }
    }
}

impl ModelOptions {
    /// Returns one line per invalid option.
    pub fn validate(&self) -> Vec<String> {
        let mut problems = Vec::new();
        problems.extend(
            CheckpointLocation::parse(&self.checkpoint).err().map(|e| format!("checkpoint: {e}")),
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

/// Where the model runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(try_from = "String", into = "String")]
#[schemars(with = "String")]
pub enum DeviceChoice {
    /// The first GPU if there is one, else the CPU.
    Auto,
    /// The CPU.
    Cpu,
    /// The GPU of this number, counted from 0; an error if it cannot be used.
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

/// Precision of the image and text encoders.
#[derive(
    Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema, clap::ValueEnum,
)]
#[serde(rename_all = "lowercase")]
pub enum Precision {
    /// 32-bit floats.
    F32,
    /// 16-bit floats, on a GPU only.
    F16,
    /// bfloat16: the range of f32 with 8 bits of precision.
    Bf16,
}

impl Precision {
    /// Returns the type of tensors on `device`. On the CPU they are f32 for `bf16` too: there only
    /// weights and the inputs of products are rounded, by [`super::kernels::bf16_weights`].
    pub(super) fn tensor_dtype(self, device: &Device) -> DType {
        match self {
            Self::F16 => DType::F16,
            Self::Bf16 if !device.is_cpu() => DType::BF16,
            Self::F32 | Self::Bf16 => DType::F32,
        }
    }
}
