//! `config.json` of `transformers`.

use serde::Deserialize;
use serde_json::{Map, Value};

use super::encoder_config::{
    Activation, Architecture, ImageEncoderConfig, ModelConfig, TensorNaming, TextCleaning,
    TextEncoderConfig, TransformerConfig,
};
use super::json_file::convert;
use super::key_report::{KeyReport, KeyTable, show_value};
use super::key_tables;

const FILE: &str = "config.json";

/// `text_config` or `vision_config` as written. A missing field has the default of the classes of
/// Hugging Face.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default)]
struct EncoderConfigJson {
    hidden_size: Option<usize>,
    intermediate_size: Option<usize>,
    num_hidden_layers: Option<usize>,
    num_attention_heads: Option<usize>,
    hidden_act: Option<String>,
    layer_norm_eps: Option<f64>,
    vocab_size: Option<usize>,
    max_position_embeddings: Option<usize>,
    eos_token_id: Option<Value>,
    projection_size: Option<usize>,
    image_size: Option<usize>,
    patch_size: Option<usize>,
    num_channels: Option<usize>,
}

impl EncoderConfigJson {
    fn to_transformer_config(
        &self,
        default: TransformerConfig,
    ) -> Result<TransformerConfig, String> {
        let activation = match self.hidden_act.as_deref() {
            None => default.activation,
            Some("quick_gelu") => Activation::QuickGelu,
            Some("gelu") => Activation::Gelu,
            Some("gelu_pytorch_tanh" | "gelu_new") => Activation::GeluTanh,
            Some(other) => {
                return Err(format!(
                    "hidden_act {other:?} is not quick_gelu, gelu or gelu_pytorch_tanh"
                ));
            }
        };
        Ok(TransformerConfig {
            hidden_size: self.hidden_size.unwrap_or(default.hidden_size),
            intermediate_size: self.intermediate_size.unwrap_or(default.intermediate_size),
            layer_count: self.num_hidden_layers.unwrap_or(default.layer_count),
            head_count: self.num_attention_heads.unwrap_or(default.head_count),
            activation,
            layer_norm_eps: self.layer_norm_eps.unwrap_or(default.layer_norm_eps),
        })
    }
}

/// The configuration of one encoder, and the name of the object that it comes from.
struct Encoder {
    path: String,
    written: EncoderConfigJson,
}

/// Reads the object of one encoder. Of CLIP the reference replaces `text_config` by `text_config_dict`,
/// with its defaults, if that is there; likewise for images.
fn read_encoder(
    config: &Map<String, Value>,
    path: &str,
    table: KeyTable,
    keys: &mut KeyReport,
) -> Result<Encoder, String> {
    let object = |path: &str| match config.get(path) {
        None | Some(Value::Null) => Ok(None),
        Some(Value::Object(object)) => Ok(Some(object.clone())),
        Some(other) => Err(format!("{path} is {}, not an object", show_value(other))),
    };
    let replacement = format!("{path}_dict");
    let (path, object) = match object(&replacement)? {
        Some(object) => (replacement, object),
        None => (path.to_owned(), object(path)?.unwrap_or_default()),
    };
    keys.check(FILE, &path, &object, table)?;
    let written = convert(&path, Value::Object(object))?;
    Ok(Encoder { path, written })
}

fn read_architecture(config: &Map<String, Value>) -> Result<Architecture, String> {
    if config.get("auto_map").is_some_and(|code| !code.is_null()) {
        return Err(
            "auto_map: the model is code of its repository, which is not run; only the classes of transformers and the layout of open_clip are supported"
                .into(),
        );
    }
    match config.get("model_type") {
        Some(Value::String(name)) if name == "clip" => Ok(Architecture::Clip),
        Some(Value::String(name)) if name == "siglip" => Ok(Architecture::Siglip),
        Some(other) => Err(format!(
            "model_type {} is not supported; this version reads clip and siglip",
            show_value(other)
        )),
        None => Err("model_type is missing; this version reads clip and siglip".into()),
    }
}

/// Returns the id of end-of-text.
fn read_end_of_text_id(text: &Encoder) -> Result<u32, String> {
    match &text.written.eos_token_id {
        None => Ok(49_407),
        Some(written) => written.as_u64().and_then(|id| u32::try_from(id).ok()).ok_or_else(|| {
            format!("{}.eos_token_id is {}, not one id", text.path, show_value(written))
        }),
    }
}

/// Parses `config.json`, with the defaults of its architecture for missing fields.
pub fn parse_model_config(
    config: &Map<String, Value>,
    keys: &mut KeyReport,
) -> Result<ModelConfig, String> {
    let architecture = read_architecture(config)?;
    let (model_table, text_table, vision_table) = match architecture {
        Architecture::Clip => {
            (key_tables::CLIP_MODEL, key_tables::CLIP_TEXT, key_tables::CLIP_VISION)
        }
        Architecture::Siglip => {
            (key_tables::SIGLIP_MODEL, key_tables::SIGLIP_TEXT, key_tables::SIGLIP_VISION)
        }
    };
    keys.check(FILE, "", config, model_table)?;
    let text = read_encoder(config, "text_config", text_table, keys)?;
    let image = read_encoder(config, "vision_config", vision_table, keys)?;
    let base = TransformerConfig {
        hidden_size: 768,
        intermediate_size: 3072,
        layer_count: 12,
        head_count: 12,
        activation: Activation::QuickGelu,
        layer_norm_eps: 1e-5,
    };
    let siglip =
        TransformerConfig { activation: Activation::GeluTanh, layer_norm_eps: 1e-6, ..base };
    let (text_default, image_default, vocabulary, context, patch) = match architecture {
        Architecture::Clip => {
            let text = TransformerConfig {
                hidden_size: 512,
                intermediate_size: 2048,
                head_count: 8,
                ..base
            };
            (text, base, 49_408, 77, 32)
        }
        Architecture::Siglip => (siglip, siglip, 32_000, 64, 16),
    };
    let in_text = |reason: String| format!("{}: {reason}", text.path);
    let in_image = |reason: String| format!("{}: {reason}", image.path);
    let channels = image.written.num_channels.unwrap_or(3);
    if channels != 3 {
        return Err(in_image(format!("num_channels {channels} is not supported, only 3")));
    }
    let text_transformer = text.written.to_transformer_config(text_default).map_err(in_text)?;
    let image_encoder = ImageEncoderConfig {
        image_side: image.written.image_size.unwrap_or(224),
        patch_side: image.written.patch_size.unwrap_or(patch),
        transformer: image.written.to_transformer_config(image_default).map_err(in_image)?,
    };
    let dimension = match architecture {
        Architecture::Clip => match config.get("projection_dim") {
            None | Some(Value::Null) => 512,
            Some(written) => convert("projection_dim", written.clone())?,
        },
        Architecture::Siglip => image_encoder.transformer.hidden_size,
    };
    let text_projection = text.written.projection_size.unwrap_or(text_transformer.hidden_size);
    if architecture == Architecture::Siglip && text_projection != dimension {
        return Err(in_text(format!(
            "projection_size {text_projection} differs from the image encoder's hidden_size {dimension}"
        )));
    }
    let end_of_text_id = match architecture {
        Architecture::Clip => read_end_of_text_id(&text)?,
        Architecture::Siglip => 0,
    };
    let config = ModelConfig {
        architecture,
        tensor_naming: TensorNaming::Transformers,
        dimension,
        text_encoder: TextEncoderConfig {
            vocabulary_size: text.written.vocab_size.unwrap_or(vocabulary),
            context_length: text.written.max_position_embeddings.unwrap_or(context),
            end_of_text_id,
            cleaning: TextCleaning::ByTokenizerClass,
            transformer: text_transformer,
        },
        image_encoder,
        notice: config.get("notice").and_then(Value::as_str).map(str::to_owned),
    };
    config.validate(&text.path, &image.path)?;
    Ok(config)
}
