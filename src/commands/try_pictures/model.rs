//! Which model is used, and what is said about it.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use anyhow::anyhow;
use indicatif::ProgressBar;
use tokio_util::sync::CancellationToken;

use crate::clip::{CheckpointOrigin, ClipError, Encoders, ModelOptions, locate_checkpoint};
use crate::commands::shared::error::{CommandError, path_error};
use crate::commands::shared::models::load_configured_model;
use crate::commands::shared::printing::Output;
use crate::config::Config;
use crate::demo::{DEMO_MODEL_FOLDER, write_demo_checkpoint};

/// Value of `--checkpoint` for the model of the demo.
pub const DEMO_CHECKPOINT: &str = "demo";
/// How often the spinner moves while the weights are read.
const SPINNER_INTERVAL: Duration = Duration::from_millis(100);
/// Why the default model is the default, with its size and licence.
const DEFAULT_MODEL_REASON: &str = "CLIP ViT-B/32, trained on two billion captioned photographs (LAION-2B), the \
     smallest of the usual models for photographs: 151 million parameters, 605 MB, licence MIT";

/// Sets `model.checkpoint` to `--checkpoint`, if given; writes the demo's model into `folder` if it is that.
pub fn set_checkpoint(
    checkpoint: Option<&str>,
    folder: &Path,
    config: &mut Config,
) -> Result<(), CommandError> {
    match checkpoint {
        None => {}
        Some(DEMO_CHECKPOINT) => {
            let model = folder.join(DEMO_MODEL_FOLDER);
            write_demo_checkpoint(&model).map_err(|e| path_error("--dir", &model, &e))?;
            config.model.checkpoint = model.display().to_string();
        }
        Some(checkpoint) => checkpoint.clone_into(&mut config.model.checkpoint),
    }
    Ok(())
}

/// Loads the model, after it was said which one it is and where it comes from. `None` if `token` was
/// cancelled before.
pub async fn load_model(
    config: &Config,
    is_demo: bool,
    output: Output,
    token: &CancellationToken,
) -> Result<Option<Arc<dyn Encoders>>, CommandError> {
    let (checkpoint, revision) = (&config.model.checkpoint, &config.model.revision);
    let origin = locate_checkpoint(checkpoint, revision)
        .map_err(|reason| CommandError::usage(format!("--checkpoint: {reason}")))?;
    let is_default = *checkpoint == ModelOptions::default().checkpoint;
    let reason = if is_default { format!(": {DEFAULT_MODEL_REASON}") } else { String::new() };
    match &origin {
        CheckpointOrigin::Folder(_) if is_demo => output.line(format_args!(
            "Model: the demo's, which knows only the demo's drawings. On your pictures its results mean nothing; \
             it shows how files are read, counted and followed"
        )),
        CheckpointOrigin::Folder(folder) => {
            output.line(format_args!("Model: {}", folder.display()));
        }
        CheckpointOrigin::Cached(cache) => output.line(format_args!(
            "Model: {checkpoint}{reason}; from the cache {}",
            cache.display()
        )),
        CheckpointOrigin::Hub(cache) => output.line(format_args!(
            "Model: {checkpoint}{reason}; downloaded once into {}",
            cache.display()
        )),
    }
    // A download has a bar of its own.
    let is_local = !matches!(origin, CheckpointOrigin::Hub(_));
    let spinner = is_local.then(|| {
        let spinner = ProgressBar::new_spinner().with_message("loading the model");
        spinner.enable_steady_tick(SPINNER_INTERVAL);
        spinner
    });
    let config = config.clone();
    let loading = tokio::task::spawn_blocking(move || load_configured_model(&config));
    let loaded = tokio::select! {
        loaded = loading => loaded.map_err(anyhow::Error::from)?,
        // What is downloaded stays in the cache.
        () = token.cancelled() => return Ok(None),
    };
    if let Some(spinner) = spinner {
        spinner.finish_and_clear();
    }
    loaded.map(Some).map_err(|error| match error.downcast_ref() {
        Some(ClipError::CheckpointUnavailable { .. }) => anyhow!(
            "{error:#}. Connect this machine to the hub once, or name a folder that has a checkpoint: --checkpoint FOLDER"
        )
        .into(),
        _ => error.into(),
    })
}
