//! `preprocessor_config.json`, or `image_processor` of `processor_config.json`: how a picture is resized,
//! cropped and normalised.

use serde::Deserialize;
use serde_json::{Map, Value};

use super::encoder_config::Architecture;
use super::json_file::convert;
use super::key_report::{KeyReport, show_value};
use super::key_tables;

/// Means of OpenAI's training data.
pub const OPENAI_MEAN: [f32; 3] = [0.481_454_66, 0.457_827_5, 0.408_210_73];
/// Standard deviations of OpenAI's training data.
pub const OPENAI_STD: [f32; 3] = [0.268_629_54, 0.261_302_6, 0.275_777_1];

/// How a picture becomes the input of the image encoder, with all defaults filled in. Sizes are in
/// pixels.
#[derive(Debug, Clone, PartialEq)]
pub struct PreprocessorConfig {
    pub resize: ResizeMode,
    /// Side of the centre crop; `None`: there is none.
    pub crop_side: Option<u32>,
    pub crop_rounding: CropRounding,
    pub filter: ResampleFilter,
    /// A byte is multiplied by it; 1 if the checkpoint does not rescale.
    pub rescale_factor: f64,
    /// Subtracted after rescaling; 0 if the checkpoint does not normalise.
    pub mean: [f32; 3],
    /// What is divided by then; 1 if the checkpoint does not normalise.
    pub std: [f32; 3],
}

/// The size that a picture is resized to before its centre is cropped; lengths in pixels.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ResizeMode {
    /// The short edge has this length, and the picture keeps its shape.
    ShortEdge(u32),
    /// Both edges have this length: the picture is distorted.
    Square(u32),
}

/// Where the crop starts if the margins on both sides cannot be equal.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum CropRounding {
    /// Half of the margin, rounded down: `transformers`.
    Down,
    /// Half of the margin, rounded to the nearest, and to the even one in between: torchvision, which
    /// `open_clip` uses.
    HalfToEven,
}

/// The filters of Pillow that `resample` names.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ResampleFilter {
    Lanczos,
    Bilinear,
    Bicubic,
    Box,
    Hamming,
}

/// One value for all channels, or one per channel.
#[derive(Debug, Clone, Copy, Deserialize)]
#[serde(untagged)]
pub enum ChannelValues {
    All(f32),
    Each([f32; 3]),
}

impl ChannelValues {
    /// Returns the value of each channel.
    pub fn per_channel(self) -> [f32; 3] {
        match self {
            Self::All(value) => [value; 3],
            Self::Each(values) => values,
        }
    }
}

/// The fields as written.
#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct PreprocessorJson {
    size: Option<SizeJson>,
    crop_size: Option<SizeJson>,
    default_to_square: Option<bool>,
    do_center_crop: Option<bool>,
    do_normalize: Option<bool>,
    do_rescale: Option<bool>,
    image_mean: Option<ChannelValues>,
    image_std: Option<ChannelValues>,
    resample: Option<Value>,
    rescale_factor: Option<f64>,
    image_processor_type: Option<String>,
    feature_extractor_type: Option<String>,
}

/// A size in pixels, as old and new preprocessor configurations write it.
#[derive(Debug, Clone, Copy, Deserialize)]
#[serde(untagged)]
enum SizeJson {
    Number(u32),
    Pair(u32, u32),
    Keys(SizeKeys),
}

#[derive(Debug, Clone, Copy, Deserialize)]
#[serde(deny_unknown_fields)]
struct SizeKeys {
    shortest_edge: Option<u32>,
    longest_edge: Option<u32>,
    height: Option<u32>,
    width: Option<u32>,
}

/// What an image processor of `transformers` does where its file is silent.
struct ImageProcessorDefaults {
    resize: ResizeMode,
    /// Whether one number as `size` is both edges; otherwise it is the short one.
    default_to_square: bool,
    crop_side: Option<u32>,
    filter: ResampleFilter,
    mean: [f32; 3],
    std: [f32; 3],
}

impl ImageProcessorDefaults {
    fn for_class(class: &str) -> Option<Self> {
        let half = Self {
            resize: ResizeMode::Square(224),
            default_to_square: false,
            crop_side: None,
            filter: ResampleFilter::Bicubic,
            mean: [0.5; 3],
            std: [0.5; 3],
        };
        match class {
            "CLIPImageProcessor" => Some(Self {
                resize: ResizeMode::ShortEdge(224),
                crop_side: Some(224),
                mean: OPENAI_MEAN,
                std: OPENAI_STD,
                ..half
            }),
            "SiglipImageProcessor" => Some(half),
            "ViTImageProcessor" => {
                Some(Self { default_to_square: true, filter: ResampleFilter::Bilinear, ..half })
            }
            _ => None,
        }
    }
}

/// Returns the class of the image processor without what says how it is implemented.
fn image_processor_class(
    json: &PreprocessorJson,
    architecture: Architecture,
) -> Result<String, String> {
    let (key, written) = match (&json.image_processor_type, &json.feature_extractor_type) {
        (Some(class), _) => ("image_processor_type", class.as_str()),
        (None, Some(class)) => ("feature_extractor_type", class.as_str()),
        (None, None) => match architecture {
            Architecture::Clip => ("", "CLIPImageProcessor"),
            Architecture::Siglip => ("", "SiglipImageProcessor"),
        },
    };
    let class = written.replace("FeatureExtractor", "ImageProcessor");
    let class = class.strip_suffix("Fast").or(class.strip_suffix("Pil")).unwrap_or(&class);
    match ImageProcessorDefaults::for_class(class) {
        Some(_) => Ok(class.to_owned()),
        None => Err(format!(
            "{key} {written:?} is not supported, only CLIPImageProcessor, SiglipImageProcessor and ViTImageProcessor"
        )),
    }
}

fn read_size(name: &str, size: SizeJson, one_number_is_square: bool) -> Result<ResizeMode, String> {
    let square = |height, width| {
        if height == width && height > 0 {
            Ok(ResizeMode::Square(height))
        } else {
            Err(format!("{name} {height}×{width} (height × width) is not square"))
        }
    };
    match size {
        SizeJson::Number(side) if one_number_is_square => square(side, side),
        SizeJson::Number(edge) if edge > 0 => Ok(ResizeMode::ShortEdge(edge)),
        SizeJson::Number(_) => Err(format!("{name} is 0")),
        SizeJson::Pair(height, width) => square(height, width),
        SizeJson::Keys(SizeKeys { longest_edge: Some(edge), .. }) => Err(format!(
            "{name}.longest_edge {edge} is not supported, only shortest_edge, or height and width"
        )),
        SizeJson::Keys(SizeKeys {
            shortest_edge: Some(edge), height: None, width: None, ..
        }) if edge > 0 => Ok(ResizeMode::ShortEdge(edge)),
        SizeJson::Keys(SizeKeys {
            shortest_edge: None,
            height: Some(height),
            width: Some(width),
            ..
        }) => square(height, width),
        SizeJson::Keys(_) => {
            Err(format!("{name} has neither shortest_edge alone nor height and width"))
        }
    }
}

fn read_filter(
    resample: Option<&Value>,
    default: ResampleFilter,
) -> Result<ResampleFilter, String> {
    // The numbers of Pillow.
    match resample.map(|written| written.as_u64()) {
        None => Ok(default),
        Some(Some(1)) => Ok(ResampleFilter::Lanczos),
        Some(Some(2)) => Ok(ResampleFilter::Bilinear),
        Some(Some(3)) => Ok(ResampleFilter::Bicubic),
        Some(Some(4)) => Ok(ResampleFilter::Box),
        Some(Some(5)) => Ok(ResampleFilter::Hamming),
        Some(_) => Err(format!(
            "resample {} is not 1 (Lanczos), 2 (bilinear), 3 (bicubic), 4 (box) or 5 (Hamming)",
            show_value(resample.unwrap_or(&Value::Null))
        )),
    }
}

impl PreprocessorConfig {
    /// Parses the object of an image processor, which is at `path` in `file`.
    pub fn parse(
        file: &str,
        path: &str,
        object: &Map<String, Value>,
        architecture: Architecture,
        keys: &mut KeyReport,
    ) -> Result<Self, String> {
        keys.check(file, path, object, key_tables::PREPROCESSOR)?;
        let json: PreprocessorJson = convert(path, Value::Object(object.clone()))?;
        // Unlike a missing key, `null` is no default for the reference: a step is left out, and a value
        // that a step needs is missing.
        let is_null = |key: &str| object.get(key).is_some_and(Value::is_null);
        let needs = |key: &str, step: &str| {
            if is_null(key) {
                return Err(format!(
                    "{key} is null, but {step} needs it; remove it for its default"
                ));
            }
            Ok(())
        };
        if is_null("do_resize") {
            return Err("do_resize is null, which means false; it can only be true".into());
        }
        needs("size", "do_resize")?;
        needs("resample", "do_resize")?;
        let class = image_processor_class(&json, architecture)?;
        let Some(default) = ImageProcessorDefaults::for_class(&class) else {
            return Err(format!("image_processor_type {class:?} is not supported"));
        };
        let to_square = json.default_to_square.unwrap_or(default.default_to_square);
        let resize = match json.size {
            Some(size) => read_size("size", size, to_square)?,
            None => default.resize,
        };
        let crop_side = match json.crop_size {
            Some(size) => match read_size("crop_size", size, true)? {
                ResizeMode::Square(side) => Some(side),
                ResizeMode::ShortEdge(_) => {
                    return Err("crop_size has no height and width".into());
                }
            },
            None => default.crop_side,
        };
        let crops = json
            .do_center_crop
            .unwrap_or(default.crop_side.is_some() && !is_null("do_center_crop"));
        if crops {
            needs("crop_size", "do_center_crop")?;
        }
        let normalises = json.do_normalize.unwrap_or(!is_null("do_normalize"));
        let rescales = json.do_rescale.unwrap_or(!is_null("do_rescale"));
        if normalises {
            needs("image_mean", "do_normalize")?;
            needs("image_std", "do_normalize")?;
        }
        if rescales {
            needs("rescale_factor", "do_rescale")?;
        }
        if crops && crop_side.is_none() {
            return Err("do_center_crop is true, but crop_size is missing".into());
        }
        let (mean, std) = if normalises {
            (
                json.image_mean.map_or(default.mean, ChannelValues::per_channel),
                json.image_std.map_or(default.std, ChannelValues::per_channel),
            )
        } else {
            ([0.0; 3], [1.0; 3])
        };
        let config = Self {
            resize,
            crop_side: crop_side.filter(|_| crops),
            crop_rounding: CropRounding::Down,
            filter: read_filter(json.resample.as_ref(), default.filter)?,
            rescale_factor: if rescales { json.rescale_factor.unwrap_or(1.0 / 255.0) } else { 1.0 },
            mean,
            std,
        };
        config.validate()?;
        Ok(config)
    }

    /// Checks that every byte becomes a finite number.
    pub fn validate(&self) -> Result<(), String> {
        let finite = |values: [f32; 3]| values.iter().all(|value| value.is_finite());
        if !finite(self.mean) {
            return Err(format!("image_mean {:?} is not finite", self.mean));
        }
        if !finite(self.std.map(f32::recip)) {
            return Err(format!("image_std {:?} would divide by 0", self.std));
        }
        if !(self.rescale_factor as f32).is_finite() {
            return Err(format!("rescale_factor {} is not finite", self.rescale_factor));
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(written: &str, architecture: Architecture) -> Result<PreprocessorConfig, String> {
        let object: Map<String, Value> = serde_json::from_str(written).unwrap();
        PreprocessorConfig::parse("p.json", "", &object, architecture, &mut KeyReport::default())
    }

    #[test]
    fn missing_keys_have_the_defaults_of_their_class() {
        let clip = parse("{}", Architecture::Clip).unwrap();
        assert_eq!((clip.resize, clip.crop_side), (ResizeMode::ShortEdge(224), Some(224)));
        assert_eq!((clip.mean, clip.filter), (OPENAI_MEAN, ResampleFilter::Bicubic));
        let siglip = parse(r#"{"do_convert_rgb": null}"#, Architecture::Siglip).unwrap();
        assert_eq!((siglip.resize, siglip.crop_side), (ResizeMode::Square(224), None));
        let vit = r#"{"feature_extractor_type": "ViTFeatureExtractor", "size": 64}"#;
        let vit = parse(vit, Architecture::Clip).unwrap();
        assert_eq!((vit.resize, vit.filter), (ResizeMode::Square(64), ResampleFilter::Bilinear));
        let fast =
            r#"{"image_processor_type": "CLIPImageProcessorFast", "size": 64, "crop_size": 64}"#;
        let fast = parse(fast, Architecture::Siglip).unwrap();
        assert_eq!((fast.resize, fast.crop_side), (ResizeMode::ShortEdge(64), Some(64)));
    }

    #[test]
    fn steps_are_left_out_and_values_are_taken_as_written() {
        let raw = parse(r#"{"do_rescale": false, "do_normalize": false}"#, Architecture::Clip);
        let raw = raw.unwrap();
        assert_eq!((raw.rescale_factor, raw.mean, raw.std), (1.0, [0.0; 3], [1.0; 3]));
        let scalar = r#"{"image_mean": 0.5, "image_std": 0.25, "rescale_factor": 0.5}"#;
        let scalar = parse(scalar, Architecture::Clip).unwrap();
        assert_eq!((scalar.rescale_factor, scalar.mean, scalar.std), (0.5, [0.5; 3], [0.25; 3]));
        let no_crop = r#"{"do_center_crop": false, "size": {"height": 9, "width": 9}}"#;
        let no_crop = parse(no_crop, Architecture::Clip).unwrap();
        assert_eq!((no_crop.resize, no_crop.crop_side), (ResizeMode::Square(9), None));
        let null = r#"{"do_rescale": null, "do_normalize": null, "image_mean": null}"#;
        let null = parse(null, Architecture::Clip).unwrap();
        assert_eq!((null.rescale_factor, null.mean), (1.0, [0.0; 3]));
    }

    #[test]
    fn what_is_not_supported_is_refused_by_the_name_of_its_key() {
        for (written, key) in [
            (r#"{"do_resize": false}"#, "do_resize"),
            (r#"{"do_convert_rgb": false}"#, "do_convert_rgb"),
            (r#"{"do_pad": true}"#, "do_pad"),
            (r#"{"crop_pct": 0.9}"#, "crop_pct"),
            (r#"{"resample": 0}"#, "resample"),
            (r#"{"resample": null}"#, "resample"),
            (r#"{"size": null}"#, "size"),
            (r#"{"image_mean": null}"#, "image_mean"),
            (r#"{"resample": "bicubic"}"#, "resample"),
            (r#"{"size": {"longest_edge": 64}}"#, "longest_edge"),
            (r#"{"size": {"shortest_edge": 64, "longest_edge": 128}}"#, "longest_edge"),
            (r#"{"size": {"height": 64, "width": 80}}"#, "size"),
            (r#"{"crop_size": {"shortest_edge": 64}}"#, "crop_size"),
            (r#"{"image_std": [0, 0.5, 0.5]}"#, "image_std"),
            (r#"{"image_mean": "x"}"#, "image_mean"),
            (r#"{"image_processor_type": "TimmWrapperImageProcessor"}"#, "image_processor_type"),
            (r#"{"image_processor_type": "Siglip2ImageProcessor"}"#, "image_processor_type"),
            (r#"{"auto_map": {"AutoImageProcessor": "a.B"}}"#, "auto_map"),
        ] {
            let error = parse(written, Architecture::Clip).unwrap_err();
            assert!(error.contains(key), "{written}: {error}");
        }
        let error = parse(r#"{"do_center_crop": true}"#, Architecture::Siglip).unwrap_err();
        assert!(error.contains("crop_size"), "{error}");
    }
}
