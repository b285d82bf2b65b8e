//! Where a checkpoint is: a folder, or a model of the Hugging Face hub.

use std::path::{Path, PathBuf};

/// Where a checkpoint is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum CheckpointLocation {
    /// A folder on this machine.
    Folder(PathBuf),
    /// `organisation/name` on the hub.
    Hub(String),
}

impl CheckpointLocation {
    /// Returns the name of the model: that on the hub, or that of its folder.
    pub fn model_name(&self) -> String {
        match self {
            Self::Hub(id) => id.clone(),
            Self::Folder(folder) => {
                let folder = folder.canonicalize().unwrap_or_else(|_| folder.clone());
                folder.file_name().map_or_else(|| "clip".into(), |n| n.to_string_lossy().into())
            }
        }
    }

    /// Parses `model.checkpoint`: a folder if one of this name exists, otherwise `organisation/name`
    /// on the hub. The error says what is accepted.
    pub fn parse(checkpoint: &str) -> Result<Self, String> {
        let folder = Path::new(checkpoint);
        if folder.is_dir() {
            return Ok(Self::Folder(folder.to_owned()));
        }
        let legal = |part: &str| {
            let allowed = |c: char| c.is_ascii_alphanumeric() || "-_.".contains(c);
            !part.is_empty() && !part.starts_with(['.', '-']) && part.chars().all(allowed)
        };
        match checkpoint.split_once('/') {
            Some((organisation, name)) if legal(organisation) && legal(name) => {
                Ok(Self::Hub(checkpoint.to_owned()))
            }
            _ => Err(format!(
                "{checkpoint:?} is neither a folder nor a model of the hub such as laion/CLIP-ViT-B-32-laion2B-s34B-b79K"
            )),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn folders_and_hub_models_are_distinguished() {
        let folder = "src/clip";
        assert_eq!(
            CheckpointLocation::parse(folder),
            Ok(CheckpointLocation::Folder(folder.into()))
        );
        let id = "laion/CLIP-ViT-B-32-laion2B-s34B-b79K";
        assert_eq!(CheckpointLocation::parse(id), Ok(CheckpointLocation::Hub(id.into())));
        for invalid in ["", "clip", "/nowhere/clip", "../clip", "a/b/c", "a/", "a b/c"] {
            assert!(CheckpointLocation::parse(invalid).is_err(), "{invalid}");
        }
    }
}
