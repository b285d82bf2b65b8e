//! The weights of a checkpoint: one or several files of safetensors.

use std::collections::{BTreeSet, HashMap};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use candle_core::safetensors::{BufferedSafetensors, Load};
use candle_core::{DType, Device, Error, Result as CandleResult, Shape, Tensor};
use candle_nn::Init;
use candle_nn::var_builder::SimpleBackend;
use safetensors::Dtype;
use safetensors::tensor::TensorView;

use super::encoder_config::TensorNaming;
use super::json_file::{invalid, read_file};
use super::key_report::KeyReport;
use super::tensor_names::{TensorLayout, TensorSource, encoder_prefixes, find_tensor_source};
use crate::clip::error::ClipError;

/// What training tools put before the names of all tensors.
const KNOWN_PREFIXES: [&str; 6] =
    ["module.", "model.", "clip.", "siglip.", "_orig_mod.", "backbone."];

/// Ends of names of buffers that are computed, not learned.
const COMPUTED_BUFFERS: [&str; 2] = ["position_ids", "attn_mask"];

/// Ends of names of what quantised or adapted weights need in addition: without it they are other
/// weights.
const QUANTISATION_ENDS: [&str; 15] = [
    "_scale",
    ".scale",
    ".scales",
    "_scale_inv",
    "_zero_point",
    ".zeros",
    ".qzeros",
    ".qweight",
    ".g_idx",
    ".SCB",
    ".absmax",
    ".quant_map",
    ".weight_packed",
    ".lora_A.weight",
    ".lora_B.weight",
];

/// The header of a safetensors file is preceded by its length in bytes.
const LENGTH_BYTES: usize = 8;

/// All tensors of a checkpoint, and which of them were read.
pub struct Weights {
    files: Vec<(PathBuf, BufferedSafetensors)>,
    /// In which of `files` a tensor is.
    locations: HashMap<String, usize>,
    naming: TensorNaming,
    /// What precedes the name of every tensor.
    prefix: String,
    read: Mutex<BTreeSet<String>>,
}

/// Reads the bytes of a file of weights. The error says what the file is instead, or how much of it is
/// missing.
pub fn read_weights_file(file: &Path) -> Result<Vec<u8>, ClipError> {
    let bytes = read_file(file)?;
    match check_container(&bytes) {
        Ok(()) => Ok(bytes),
        Err(reason) => Err(invalid(file, reason)),
    }
}

fn check_container(bytes: &[u8]) -> Result<(), String> {
    if bytes.starts_with(b"PK\x03\x04") || bytes.starts_with(b"\x80\x02") {
        return Err(
            "is a pickle of PyTorch, whatever its name says; save the weights with safetensors"
                .into(),
        );
    }
    let Some((length, rest)) = bytes.split_first_chunk::<LENGTH_BYTES>() else {
        return Err(format!("has {} bytes only; download it again", bytes.len()));
    };
    let header_length = u64::from_le_bytes(*length);
    let header = usize::try_from(header_length).ok().and_then(|length| rest.get(..length));
    let Some(header) = header else {
        return Err(format!(
            "is cut off, or is no safetensors file: its header has {header_length} bytes, the file {}; download it again",
            bytes.len()
        ));
    };
    let header: HashMap<String, serde_json::Value> = serde_json::from_slice(header)
        .map_err(|error| format!("is no safetensors file: its header is not JSON: {error}"))?;
    let end = header.values().filter_map(|tensor| tensor["data_offsets"][1].as_u64()).max();
    let needed = end.unwrap_or(0).saturating_add(header_length + LENGTH_BYTES as u64);
    if needed > bytes.len() as u64 {
        return Err(format!(
            "is cut off: it has {} of {needed} bytes; download it again",
            bytes.len()
        ));
    }
    Ok(())
}

impl Weights {
    /// Opens files whose bytes were read.
    pub fn open(files: Vec<(PathBuf, Vec<u8>)>, naming: TensorNaming) -> Result<Self, ClipError> {
        let mut opened = Vec::with_capacity(files.len());
        let mut locations = HashMap::new();
        for (index, (file, bytes)) in files.into_iter().enumerate() {
            let tensors = BufferedSafetensors::new(bytes)
                .map_err(|error| invalid(&file, error.to_string()))?;
            locations.extend(tensors.tensors().into_iter().map(|(name, _)| (name, index)));
            opened.push((file, tensors));
        }
        let prefix = find_prefix(naming, &locations);
        let read = Mutex::default();
        Ok(Self { files: opened, locations, naming, prefix, read })
    }

    /// Returns the number of parameters.
    pub fn count_parameters(&self) -> u64 {
        let tensors = self.files.iter().flat_map(|(_, file)| file.tensors());
        tensors.map(|(_, tensor)| tensor.shape().iter().product::<usize>() as u64).sum()
    }

    /// Returns an error about the file of weights; of several, about the first.
    pub fn error(&self, reason: String) -> ClipError {
        let file = self.files.first().map(|(file, _)| file.clone()).unwrap_or_default();
        ClipError::InvalidCheckpoint { file, reason }
    }

    /// Files the tensors that nothing read. An error if one of them belongs to the encoders, or to
    /// weights that are quantised.
    pub fn check_unread(&self, keys: &mut KeyReport) -> Result<(), ClipError> {
        let read = self.read.lock().unwrap_or_else(PoisonError::into_inner);
        let unread: BTreeSet<&String> =
            self.locations.keys().filter(|name| !read.contains(*name)).collect();
        for name in unread {
            let ends_with = |ends: &[&str]| ends.iter().any(|end| name.ends_with(end));
            if ends_with(&QUANTISATION_ENDS) {
                return Err(self.error(format!(
                    "the tensor {name} scales or replaces other weights, which are quantised or adapted; only weights that stand by themselves are supported: save the merged weights in f32, f16 or bf16"
                )));
            }
            let short = name.strip_prefix(&self.prefix).unwrap_or(name);
            let belongs =
                encoder_prefixes(self.naming).iter().any(|start| short.starts_with(start));
            if belongs && !ends_with(&COMPUTED_BUFFERS) {
                return Err(self.error(format!(
                    "the tensor {name} belongs to no layer that the configuration describes"
                )));
            }
            let file = self.locations.get(name).and_then(|index| self.files.get(*index));
            let file = file.and_then(|(file, _)| file.file_name()).unwrap_or_default();
            keys.ignored.push(format!("{}:{name}", file.to_string_lossy()));
        }
        Ok(())
    }

    fn view(&self, name: &str) -> CandleResult<TensorView<'_>> {
        let full_name = format!("{}{name}", self.prefix);
        let Some(index) = self.locations.get(&full_name) else {
            let is_same = |other: &&String| {
                other.strip_suffix(name).is_some_and(|prefix| prefix.ends_with('.'))
            };
            return Err(Error::Msg(match self.locations.keys().filter(is_same).min() {
                Some(other) => format!(
                    "has no tensor {full_name}, only {other}: remove the prefix {} from all names",
                    other.strip_suffix(name).unwrap_or_default()
                ),
                None => format!("has no tensor {full_name}"),
            }));
        };
        let view = self.files[*index].1.get(&full_name)?;
        let is_finite = match view.dtype() {
            Dtype::F32 => all_finite(view.data(), |b: [u8; 4]| f32::from_le_bytes(b).is_finite()),
            // Finite as f32 too, in which it is computed.
            Dtype::F64 => {
                all_finite(view.data(), |b: [u8; 8]| (f64::from_le_bytes(b) as f32).is_finite())
            }
            Dtype::F16 => all_finite(view.data(), |b| half::f16::from_le_bytes(b).is_finite()),
            Dtype::BF16 => all_finite(view.data(), |b| half::bf16::from_le_bytes(b).is_finite()),
            other => {
                return Err(Error::Msg(format!(
                    "the tensor {full_name} has the type {other:?}, not F32, F16, BF16 or F64: quantised weights are not supported"
                )));
            }
        };
        if !is_finite {
            return Err(Error::Msg(format!(
                "the tensor {full_name} has a value that is not finite (NaN or infinite): the weights are broken"
            )));
        }
        let mut read = self.read.lock().unwrap_or_else(PoisonError::into_inner);
        read.insert(full_name);
        Ok(view)
    }

    fn load(&self, name: &str, dtype: DType, device: &Device) -> CandleResult<Tensor> {
        let TensorSource { names, layout } = find_tensor_source(self.naming, name);
        let load = |name: &String| self.view(name)?.load(device)?.to_dtype(dtype);
        let mut parts = names.iter().map(load).collect::<CandleResult<Vec<_>>>()?;
        let tensor = match parts.len() {
            1 => parts.remove(0),
            _ => Tensor::cat(&parts, 0)?,
        };
        match layout {
            TensorLayout::Whole => Ok(tensor),
            TensorLayout::Transposed => tensor.t()?.contiguous(),
            TensorLayout::Third(part) => {
                let length = tensor.dim(0)? / 3;
                tensor.narrow(0, part * length, length)?.contiguous()
            }
        }
    }
}

/// Whether `is_finite` holds for every value. Every value is looked at, so that the loop has no branch.
fn all_finite<const N: usize>(bytes: &[u8], is_finite: impl Fn([u8; N]) -> bool) -> bool {
    let (values, _) = bytes.as_chunks::<N>();
    values.iter().fold(true, |all, value| all & is_finite(*value))
}

/// Returns what precedes the names of all tensors: one or several of the known prefixes.
fn find_prefix(naming: TensorNaming, locations: &HashMap<String, usize>) -> String {
    // Every checkpoint has it.
    let sample = "text_model.embeddings.token_embedding.weight";
    let source = find_tensor_source(naming, sample);
    let Some(sample) = source.names.first() else { return String::new() };
    let mut prefixes = locations.keys().filter_map(|name| name.strip_suffix(sample.as_str()));
    let is_known = |prefix: &&str| {
        let mut rest = *prefix;
        while let Some(known) = KNOWN_PREFIXES.iter().find_map(|known| rest.strip_prefix(known)) {
            rest = known;
        }
        rest.is_empty()
    };
    prefixes.find(is_known).unwrap_or_default().to_owned()
}

/// Returns the keys of the configuration that decide the shape of the tensor that `transformers` calls
/// `name`; `open_clip` has other words for the same.
fn size_keys(name: &str) -> &'static str {
    for (part, keys) in [
        ("_projection.weight", "projection_dim, hidden_size"),
        ("token_embedding", "vocab_size, hidden_size"),
        ("text_model.embeddings.position", "max_position_embeddings, hidden_size"),
        ("vision_model.embeddings", "image_size, patch_size, hidden_size"),
        ("mlp.", "intermediate_size, hidden_size"),
        ("logit_", "one number"),
    ] {
        if name.contains(part) {
            return keys;
        }
    }
    "hidden_size"
}

/// A shared handle, from which the encoders are built.
#[derive(Clone)]
pub struct SharedWeights(pub Arc<Weights>);

impl SimpleBackend for SharedWeights {
    fn get(
        &self,
        shape: Shape,
        name: &str,
        _: Init,
        dtype: DType,
        device: &Device,
    ) -> CandleResult<Tensor> {
        let tensor = self.0.load(name, dtype, device)?;
        let without_ones = |shape: &Shape| {
            shape.dims().iter().copied().filter(|length| *length != 1).collect::<Vec<_>>()
        };
        if tensor.shape() == &shape {
            Ok(tensor)
        } else if without_ones(tensor.shape()) == without_ones(&shape) {
            tensor.reshape(shape)
        } else {
            let source = find_tensor_source(self.0.naming, name);
            Err(Error::Msg(format!(
                "the tensor {}{} has the shape {:?}, not {:?}, as the configuration says ({})",
                self.0.prefix,
                source.names.join(" + "),
                tensor.dims(),
                shape.dims(),
                size_keys(name)
            )))
        }
    }

    fn get_unchecked(&self, name: &str, dtype: DType, device: &Device) -> CandleResult<Tensor> {
        self.0.load(name, dtype, device)
    }

    fn contains_tensor(&self, name: &str) -> bool {
        let source = find_tensor_source(self.0.naming, name);
        let is_there =
            |name: &String| self.0.locations.contains_key(&format!("{}{name}", self.0.prefix));
        source.names.iter().all(is_there)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn broken_and_foreign_files_are_named() {
        let header = br#"{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}"#;
        let mut whole = (header.len() as u64).to_le_bytes().to_vec();
        whole.extend_from_slice(header);
        whole.extend_from_slice(&[0; 8]);
        assert_eq!(check_container(&whole), Ok(()));
        for (bytes, word) in [
            (&whole[..whole.len() - 1], "is cut off: it has 69 of 70 bytes"),
            (&whole[..20], "is cut off, or is no safetensors file"),
            (&whole[..5], "has 5 bytes only"),
            (b"PK\x03\x04abcdefgh", "pickle"),
            (b"\x80\x02}q\0abcdefgh", "pickle"),
            (b"\x02\0\0\0\0\0\0\0[]", "is no safetensors file"),
        ] {
            let error = check_container(bytes).unwrap_err();
            assert!(error.contains(word), "{error}");
        }
    }

    #[test]
    fn known_prefixes_are_removed_alone_and_together() {
        let sample = "text_model.embeddings.token_embedding.weight";
        for (before, prefix) in
            [("", ""), ("clip.", "clip."), ("module.model.", "module.model."), ("student.", "")]
        {
            let names = HashMap::from([(format!("{before}{sample}"), 0)]);
            assert_eq!(find_prefix(TensorNaming::Transformers, &names), prefix);
        }
    }
}
