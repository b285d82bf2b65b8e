//! The files of a checkpoint: configuration, weights and the fingerprint over all of them.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use candle_core::{DType, Device};
use candle_nn::VarBuilder;
use serde_json::Value;
use sha2::{Digest, Sha256};

use super::encoder_config::{Architecture, ModelConfig, TextCleaning};
use super::json_file::{invalid, read_object};
use super::key_report::KeyReport;
use super::key_tables;
use super::layout::{Layout, find_layout, find_weights};
use super::model_config::parse_model_config;
use super::open_clip_config::parse_open_clip_config;
use super::preprocessor_config::PreprocessorConfig;
use super::tokenizer_config::TokenizerFiles;
use super::weights::{SharedWeights, Weights, read_weights_file};
use crate::clip::error::ClipError;
use crate::diagnosis::describe;
use crate::record::to_hex;

/// Part of the fingerprint of checkpoints in the layout of `open_clip`: raise it when the cleaning of texts
/// in this program changes an embedding.
const OPEN_CLIP_CLEANING_VERSION: &[u8] = b"open_clip cleaning 1";

/// A checkpoint with its configuration parsed and its weights in memory.
pub struct Checkpoint {
    pub layout: Layout,
    /// The file that says how pictures are preprocessed.
    pub preprocessor_file: PathBuf,
    pub model_config: ModelConfig,
    pub preprocessor_config: PreprocessorConfig,
    pub tokenizer: TokenizerFiles,
    pub fingerprint: String,
    /// What became of every key.
    pub keys: KeyReport,
    weights: Arc<Weights>,
}

impl Checkpoint {
    /// Reads and hashes the files of `folder`, each once.
    pub fn read(folder: &Path) -> Result<Self, ClipError> {
        let mut keys = KeyReport::default();
        let (layout, folder) = find_layout(folder, &mut keys)?;
        let file = folder.join(layout.model_config_file());
        let (object, config_bytes) = read_object(&file)?;
        let mut contents = vec![config_bytes];
        let (model_config, preprocessor_file, preprocessor_config) = match layout {
            Layout::Transformers | Layout::SentenceTransformers => {
                let model = parse_model_config(&object, &mut keys)
                    .map_err(|reason| invalid(&file, reason))?;
                let (file, bytes, preprocessor) =
                    read_preprocessor(&folder, model.architecture, &mut keys)?;
                contents.push(bytes);
                (model, file, preprocessor)
            }
            Layout::OpenClip => {
                let (model, preprocessor) = parse_open_clip_config(&object, &mut keys)
                    .map_err(|reason| invalid(&file, reason))?;
                (model, file, preprocessor)
            }
        };
        if model_config.text_encoder.cleaning == TextCleaning::OpenClip {
            contents.push(OPEN_CLIP_CLEANING_VERSION.into());
        }
        let mut tokenizer = TokenizerFiles::read(&folder, &model_config, &mut keys)?;
        let mut tokenizer_contents = std::mem::take(&mut tokenizer.contents).into_iter();
        contents.extend(tokenizer_contents.next());
        let mut weights = Vec::new();
        for file in find_weights(layout, &folder)? {
            let bytes = read_weights_file(&file)?;
            weights.push((file, bytes));
        }
        let mut hasher = Sha256::new();
        let mut add = |part: &[u8]| {
            hasher.update((part.len() as u64).to_le_bytes());
            hasher.update(part);
        };
        for part in contents.iter().chain(weights.iter().map(|(_, bytes)| bytes)) {
            add(part);
        }
        for part in tokenizer_contents {
            add(&part);
        }
        let fingerprint = to_hex(&hasher.finalize());
        let weights = Arc::new(Weights::open(weights, model_config.tensor_naming)?);
        Ok(Self {
            layout,
            preprocessor_file,
            model_config,
            preprocessor_config,
            tokenizer,
            fingerprint,
            keys,
            weights,
        })
    }

    /// Returns the tensors for building the encoders.
    pub fn tensors(&self, dtype: DType, device: &Device) -> VarBuilder<'static> {
        let weights = SharedWeights(self.weights.clone());
        VarBuilder::from_backend(Box::new(weights), dtype, device.clone())
    }

    /// Returns the number of parameters.
    pub fn count_parameters(&self) -> u64 {
        self.weights.count_parameters()
    }

    /// Files the tensors that the encoders did not read. An error if they should have.
    pub fn check_unread_tensors(&mut self) -> Result<(), ClipError> {
        self.weights.check_unread(&mut self.keys)
    }

    /// Returns an error about the weights.
    pub fn weights_error(&self, error: &candle_core::Error) -> ClipError {
        self.weights.error(describe(error))
    }
}

/// Reads `image_processor` of `processor_config.json` if that has one, otherwise
/// `preprocessor_config.json`, as the reference does. Returns the file and its bytes too.
fn read_preprocessor(
    folder: &Path,
    architecture: Architecture,
    keys: &mut KeyReport,
) -> Result<(PathBuf, Vec<u8>, PreprocessorConfig), ClipError> {
    let processor = folder.join("processor_config.json");
    if processor.is_file() {
        let (object, bytes) = read_object(&processor)?;
        if let Some(image) = object.get("image_processor") {
            let refused = |reason: String| invalid(&processor, reason);
            let name = "processor_config.json";
            keys.check(name, "", &object, key_tables::PROCESSOR).map_err(refused)?;
            let Value::Object(image) = image else {
                return Err(refused("image_processor is not an object".into()));
            };
            let config =
                PreprocessorConfig::parse(name, "image_processor", image, architecture, keys)
                    .map_err(refused)?;
            return Ok((processor, bytes, config));
        }
    }
    let file = folder.join("preprocessor_config.json");
    let (object, bytes) = read_object(&file)?;
    let config =
        PreprocessorConfig::parse("preprocessor_config.json", "", &object, architecture, keys)
            .map_err(|reason| invalid(&file, reason))?;
    Ok((file, bytes, config))
}
