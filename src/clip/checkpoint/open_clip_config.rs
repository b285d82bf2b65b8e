//! `open_clip_config.json`: architecture, sizes and preprocessing in the words of `open_clip`.

use serde::Deserialize;
use serde_json::{Map, Value};

use super::encoder_config::{
    Activation, Architecture, ImageEncoderConfig, ModelConfig, TensorNaming, TextCleaning,
    TextEncoderConfig, TransformerConfig,
};
use super::json_file::convert;
use super::key_report::{KeyReport, show_value};
use super::key_tables;
use super::preprocessor_config::{
    ChannelValues, CropRounding, OPENAI_MEAN, OPENAI_STD, PreprocessorConfig, ResampleFilter,
    ResizeMode,
};

const FILE: &str = "open_clip_config.json";

/// Width, depth, heads and the ratio of the MLP of the image encoders of SigLIP in `timm`, by the size in
/// their names.
const TIMM_SIGLIP_SIZES: [(&str, usize, usize, usize, f64); 4] = [
    ("base", 768, 12, 12, 4.0),
    ("large", 1024, 24, 16, 4.0),
    ("so400m", 1152, 27, 16, 3.7362),
    ("giantopt", 1536, 40, 16, 4.0),
];

/// A side in pixels, or height and width.
#[derive(Debug, Clone, Copy, Deserialize)]
#[serde(untagged)]
enum Side {
    Number(usize),
    Pair(usize, usize),
}

impl Side {
    /// Returns the side of a square.
    fn square(self, name: &str) -> Result<usize, String> {
        match self {
            Self::Number(side) => Ok(side),
            Self::Pair(height, width) if height == width => Ok(height),
            Self::Pair(height, width) => {
                Err(format!("{name} {height}×{width} (height × width) is not square"))
            }
        }
    }
}

#[derive(Debug, Deserialize)]
struct ModelJson {
    embed_dim: usize,
    #[serde(default)]
    quick_gelu: bool,
    #[serde(default)]
    custom_text: bool,
    vision_cfg: VisionJson,
    text_cfg: TextJson,
}

#[derive(Debug, Deserialize)]
struct VisionJson {
    image_size: Option<Side>,
    patch_size: Option<Side>,
    layers: Option<Value>,
    width: Option<usize>,
    head_width: Option<usize>,
    mlp_ratio: Option<f64>,
    act_kwargs: Option<Value>,
    norm_kwargs: Option<Value>,
    timm_model_name: Option<String>,
    timm_model_kwargs: Option<Map<String, Value>>,
}

#[derive(Debug, Deserialize)]
struct TextJson {
    context_length: Option<usize>,
    vocab_size: Option<usize>,
    width: Option<usize>,
    heads: Option<usize>,
    layers: Option<usize>,
    mlp_ratio: Option<f64>,
    act_kwargs: Option<Value>,
    norm_kwargs: Option<Value>,
    tokenizer_kwargs: Option<Map<String, Value>>,
    no_causal_mask: Option<bool>,
    proj_bias: Option<bool>,
    pool_type: Option<String>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct TimmSizesJson {
    embed_dim: Option<usize>,
    depth: Option<usize>,
    num_heads: Option<usize>,
    mlp_ratio: Option<f64>,
    img_size: Option<usize>,
    patch_size: Option<usize>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct PreprocessJson {
    mean: Option<ChannelValues>,
    std: Option<ChannelValues>,
    interpolation: Option<String>,
    resize_mode: Option<String>,
    size: Option<Side>,
}

/// Parses `open_clip_config.json`.
pub fn parse_open_clip_config(
    file: &Map<String, Value>,
    keys: &mut KeyReport,
) -> Result<(ModelConfig, PreprocessorConfig), String> {
    keys.check(FILE, "", file, key_tables::OPEN_CLIP)?;
    let object = |parent: &Map<String, Value>, path: &str| {
        let key = path.rsplit('.').next().unwrap_or(path);
        match parent.get(key) {
            Some(Value::Object(object)) => Ok(object.clone()),
            Some(other) => Err(format!("{path} is {}, not an object", show_value(other))),
            None => Err(format!("{path} is missing")),
        }
    };
    let model = object(file, "model_cfg")?;
    keys.check(FILE, "model_cfg", &model, key_tables::OPEN_CLIP_MODEL)?;
    let vision = object(&model, "model_cfg.vision_cfg")?;
    keys.check(FILE, "model_cfg.vision_cfg", &vision, key_tables::OPEN_CLIP_VISION)?;
    let text = object(&model, "model_cfg.text_cfg")?;
    keys.check(FILE, "model_cfg.text_cfg", &text, key_tables::OPEN_CLIP_TEXT)?;
    if let Some(Value::Object(timm)) = vision.get("timm_model_kwargs") {
        keys.check(FILE, "model_cfg.vision_cfg.timm_model_kwargs", timm, key_tables::TIMM_MODEL)?;
    }
    let preprocess = match file.get("preprocess_cfg") {
        None | Some(Value::Null) => Map::new(),
        Some(_) => object(file, "preprocess_cfg")?,
    };
    keys.check(FILE, "preprocess_cfg", &preprocess, key_tables::OPEN_CLIP_PREPROCESS)?;
    let model: ModelJson = convert("model_cfg", Value::Object(model))?;
    let config = build_model_config(model)?;
    config.validate("model_cfg.text_cfg", "model_cfg.vision_cfg")?;
    let preprocess: PreprocessJson = convert("preprocess_cfg", Value::Object(preprocess))?;
    let preprocess = build_preprocessor(&preprocess, config.image_encoder.image_side)?;
    Ok((config, preprocess))
}

fn build_model_config(model: ModelJson) -> Result<ModelConfig, String> {
    let ModelJson { embed_dim, quick_gelu, custom_text, vision_cfg: vision, text_cfg: text } =
        model;
    let architecture = read_architecture(&vision, &text)?;
    let side = |side: Option<Side>, name: &str, default: usize| {
        let path = format!("model_cfg.vision_cfg.{name}");
        side.map_or(Ok(default), |side| side.square(&path))
    };
    let image_side = side(vision.image_size, "image_size", 224)?;
    let (image, patch_side) = match &vision.timm_model_name {
        Some(name) => {
            if quick_gelu {
                // It would apply to the text encoder alone.
                return Err(
                    "model_cfg.quick_gelu true is not supported with a timm_model_name".into()
                );
            }
            let TimmModel { transformer, image_side: timm_side, patch_side } =
                read_timm_model(name, vision.timm_model_kwargs.unwrap_or_default())?;
            if timm_side != image_side {
                return Err(format!(
                    "model_cfg.vision_cfg.image_size {image_side} differs from the {timm_side} of timm_model_name {name}"
                ));
            }
            if transformer.hidden_size != embed_dim {
                return Err(format!(
                    "model_cfg.embed_dim {embed_dim} differs from the width {} of timm_model_name {name}, and timm_proj is none",
                    transformer.hidden_size
                ));
            }
            (transformer, patch_side)
        }
        None => {
            let path = "model_cfg.vision_cfg";
            let layers = match vision.layers {
                None => 12,
                Some(Value::Number(count)) => convert("model_cfg.vision_cfg.layers", count.into())?,
                Some(other) => {
                    return Err(format!(
                        "{path}.layers is {}: an image encoder of convolutions (ResNet) is not supported",
                        show_value(&other)
                    ));
                }
            };
            let (width, head_width) =
                (vision.width.unwrap_or(768), vision.head_width.unwrap_or(64));
            let transformer = TransformerConfig {
                hidden_size: width,
                intermediate_size: scale_width(path, width, vision.mlp_ratio)?,
                layer_count: layers,
                head_count: width.checked_div(head_width).unwrap_or_default(),
                activation: read_activation(path, quick_gelu, vision.act_kwargs)?,
                layer_norm_eps: read_eps(path, vision.norm_kwargs)?,
            };
            (transformer, side(vision.patch_size, "patch_size", 16)?)
        }
    };
    let path = "model_cfg.text_cfg";
    let width = text.width.unwrap_or(512);
    let text_transformer = TransformerConfig {
        hidden_size: width,
        intermediate_size: scale_width(path, width, text.mlp_ratio)?,
        layer_count: text.layers.unwrap_or(12),
        head_count: text.heads.unwrap_or(8),
        activation: read_activation(path, quick_gelu, text.act_kwargs)?,
        layer_norm_eps: read_eps(path, text.norm_kwargs)?,
    };
    check_cleaning(architecture, text.tokenizer_kwargs)?;
    Ok(ModelConfig {
        architecture,
        tensor_naming: match architecture {
            Architecture::Clip => TensorNaming::OpenClip { custom_text },
            Architecture::Siglip => TensorNaming::OpenClipTimm,
        },
        dimension: embed_dim,
        text_encoder: TextEncoderConfig {
            vocabulary_size: text.vocab_size.unwrap_or(49_408),
            context_length: text.context_length.unwrap_or(77),
            // The largest id.
            end_of_text_id: 2,
            cleaning: TextCleaning::OpenClip,
            transformer: text_transformer,
        },
        image_encoder: ImageEncoderConfig { image_side, patch_side, transformer: image },
        notice: None,
    })
}

/// Decides by the text encoder and the image encoder, of which only two combinations are supported.
fn read_architecture(vision: &VisionJson, text: &TextJson) -> Result<Architecture, String> {
    let (no_mask, bias) = (text.no_causal_mask.unwrap_or(false), text.proj_bias.unwrap_or(false));
    let pool = text.pool_type.as_deref().unwrap_or("argmax");
    match (&vision.timm_model_name, no_mask, bias, pool) {
        (None, false, false, "argmax") => Ok(Architecture::Clip),
        (Some(_), true, true, "last") => Ok(Architecture::Siglip),
        (timm, ..) => Err(format!(
            "model_cfg: text_cfg with no_causal_mask {no_mask}, proj_bias {bias} and pool_type {pool:?}, with vision_cfg.timm_model_name {}, is neither CLIP (false, false, \"argmax\", null) nor SigLIP (true, true, \"last\", a name)",
            timm.as_deref().unwrap_or("null")
        )),
    }
}

/// An image encoder of `timm`; sides in pixels.
struct TimmModel {
    transformer: TransformerConfig,
    image_side: usize,
    patch_side: usize,
}

/// Returns the sizes of an image encoder of `timm`.
fn read_timm_model(name: &str, overrides: Map<String, Value>) -> Result<TimmModel, String> {
    let unsupported = || {
        format!(
            "model_cfg.vision_cfg.timm_model_name {name:?} is not supported, only those of SigLIP, such as vit_base_patch16_siglip_224"
        )
    };
    // vit_base_patch16_siglip_224, without what follows: the data that it was trained on.
    let model = name.split('.').next().unwrap_or(name);
    let parts: Vec<&str> = model.split('_').collect();
    let &["vit", size, patch, "siglip", side] = parts.as_slice() else { return Err(unsupported()) };
    let number = |text: &str| text.parse::<usize>().map_err(|_| unsupported());
    let patch = number(patch.strip_prefix("patch").unwrap_or_default())?;
    let known = TIMM_SIGLIP_SIZES.iter().find(|known| known.0 == size);
    let (_, width, depth, heads, ratio) = *known.ok_or_else(unsupported)?;
    let path = "model_cfg.vision_cfg.timm_model_kwargs";
    let overrides: TimmSizesJson = convert(path, Value::Object(overrides))?;
    let width = overrides.embed_dim.unwrap_or(width);
    let transformer = TransformerConfig {
        hidden_size: width,
        intermediate_size: scale_width(path, width, overrides.mlp_ratio.or(Some(ratio)))?,
        layer_count: overrides.depth.unwrap_or(depth),
        head_count: overrides.num_heads.unwrap_or(heads),
        activation: Activation::Gelu,
        layer_norm_eps: 1e-6,
    };
    Ok(TimmModel {
        transformer,
        image_side: overrides.img_size.map_or_else(|| number(side), Ok)?,
        patch_side: overrides.patch_size.unwrap_or(patch),
    })
}

/// Returns the width between the two products of an MLP, rounded down as the reference does.
fn scale_width(path: &str, width: usize, ratio: Option<f64>) -> Result<usize, String> {
    let ratio = ratio.unwrap_or(4.0);
    if ratio > 0.0 && ratio < 1e3 {
        Ok((width as f64 * ratio) as usize)
    } else {
        Err(format!("{path}.mlp_ratio {ratio} is not supported"))
    }
}

fn read_activation(
    path: &str,
    quick_gelu: bool,
    arguments: Option<Value>,
) -> Result<Activation, String> {
    #[derive(Deserialize)]
    #[serde(deny_unknown_fields)]
    struct ActivationJson {
        approximate: Option<String>,
    }
    let path = format!("{path}.act_kwargs");
    let arguments: Option<ActivationJson> =
        arguments.map(|value| convert(&path, value)).transpose()?;
    let approximate = arguments.and_then(|arguments| arguments.approximate);
    match (quick_gelu, approximate.as_deref()) {
        (true, None) => Ok(Activation::QuickGelu),
        (false, None | Some("none")) => Ok(Activation::Gelu),
        (false, Some("tanh")) => Ok(Activation::GeluTanh),
        (_, Some(other)) => Err(format!(
            "{path}.approximate {other:?} with quick_gelu {quick_gelu} is not supported"
        )),
    }
}

fn read_eps(path: &str, arguments: Option<Value>) -> Result<f64, String> {
    #[derive(Deserialize)]
    #[serde(deny_unknown_fields)]
    struct NormJson {
        eps: Option<f64>,
    }
    let path = format!("{path}.norm_kwargs");
    let arguments: Option<NormJson> = arguments.map(|value| convert(&path, value)).transpose()?;
    Ok(arguments.and_then(|arguments| arguments.eps).unwrap_or(1e-5))
}

/// Checks that texts are cleaned as the tokenizers of `open_clip` do it for this architecture.
fn check_cleaning(
    architecture: Architecture,
    arguments: Option<Map<String, Value>>,
) -> Result<(), String> {
    let mut arguments = arguments.unwrap_or_default();
    let clean = arguments.remove("clean").unwrap_or_default();
    if let Some((key, _)) = arguments.iter().next() {
        return Err(format!("model_cfg.text_cfg.tokenizer_kwargs.{key} is not supported"));
    }
    match (architecture, clean.as_str()) {
        (Architecture::Siglip, Some("canonicalize"))
        | (Architecture::Clip, None | Some("lower")) => Ok(()),
        _ => Err(format!(
            "model_cfg.text_cfg.tokenizer_kwargs.clean is {}; only lower for CLIP and canonicalize for SigLIP are supported",
            show_value(&clean)
        )),
    }
}

fn build_preprocessor(
    json: &PreprocessJson,
    image_side: usize,
) -> Result<PreprocessorConfig, String> {
    if let Some(size) = json.size {
        let size = size.square("preprocess_cfg.size")?;
        if size != image_side {
            return Err(format!(
                "preprocess_cfg.size {size} differs from model_cfg.vision_cfg.image_size {image_side}"
            ));
        }
    }
    let side = image_side as u32;
    let squash = json.resize_mode.as_deref() == Some("squash");
    let config = PreprocessorConfig {
        resize: if squash { ResizeMode::Square(side) } else { ResizeMode::ShortEdge(side) },
        crop_side: (!squash).then_some(side),
        crop_rounding: CropRounding::HalfToEven,
        filter: match json.interpolation.as_deref() {
            Some("bilinear") => ResampleFilter::Bilinear,
            _ => ResampleFilter::Bicubic,
        },
        rescale_factor: 1.0 / 255.0,
        mean: json.mean.map_or(OPENAI_MEAN, ChannelValues::per_channel),
        std: json.std.map_or(OPENAI_STD, ChannelValues::per_channel),
    };
    config.validate().map_err(|reason| format!("preprocess_cfg: {reason}"))?;
    Ok(config)
}
