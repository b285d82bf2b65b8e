//! `preprocessor_config.json`: how a picture is resized, cropped and normalised.

use serde::Deserialize;

/// `preprocessor_config.json`. Sizes are in pixels.
#[derive(Debug, Clone, Deserialize)]
pub struct PreprocessorConfig {
    pub size: PreprocessorSize,
    #[serde(default)]
    pub crop_size: Option<PreprocessorSize>,
    #[serde(default)]
    pub do_center_crop: Option<bool>,
    pub image_mean: [f32; 3],
    pub image_std: [f32; 3],
    #[serde(default = "default_resample")]
    pub resample: u8,
    #[serde(default = "default_rescale_factor")]
    pub rescale_factor: f64,
}

fn default_resample() -> u8 {
    3
}

fn default_rescale_factor() -> f64 {
    1.0 / 255.0
}

/// A size in pixels, as old and new preprocessor configurations write it.
#[derive(Debug, Clone, Copy, Deserialize)]
#[serde(untagged)]
pub enum PreprocessorSize {
    Number(u32),
    Shortest { shortest_edge: u32 },
    Exact { height: u32, width: u32 },
}
