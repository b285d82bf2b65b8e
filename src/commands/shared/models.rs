//! Loads CLIP models, and matches them with the generations that they fill.

use std::sync::Arc;

use anyhow::Context;

use crate::catalogue::{CatalogueState, StandbyGeneration};
use crate::clip::{self, ClipError, ClipModel, Encoders, ModelOptions, run_self_test_once};
use crate::config::Config;
use crate::demo::{DEMO_MODEL_FOLDER, write_demo_checkpoint};
use crate::table::Generation;

/// The option that names the model of the standby generation.
pub const STANDBY_CHECKPOINT_KEY: &str = "search.standby_checkpoint";

/// Loads the model of `model.checkpoint`, and tests it unless it passed the test before. Blocks while
/// the weights are read.
pub fn load_configured_model(config: &Config) -> anyhow::Result<Arc<dyn Encoders>> {
    let clip = load_tested_model(&config.model).context("model.checkpoint")?;
    Ok(Arc::new(clip))
}

/// Loads a model, and tests it unless it passed the test before.
fn load_tested_model(options: &ModelOptions) -> Result<ClipModel, ClipError> {
    let clip = ClipModel::load(options)?;
    run_self_test_once(&clip, options)?;
    Ok(clip)
}

/// Returns the generation that a worker with this configuration and model fills.
pub fn configured_generation(config: &Config, encoders: &dyn Encoders) -> Generation {
    let card = encoders.card();
    Generation::new(
        &card.name,
        &card.fingerprint,
        card.dimension,
        card.logit_scale,
        config.source.ordering,
    )
}

/// Loads the models of `model.checkpoint` and, if set, of `search.standby_checkpoint`; returns each with
/// the option that names it.
pub fn load_models(config: &Config) -> anyhow::Result<Vec<(&'static str, Arc<dyn Encoders>)>> {
    let mut models = vec![("model.checkpoint", load_configured_model(config)?)];
    if let Some(options) = standby_model_options(config) {
        let clip = load_tested_model(&options).context(STANDBY_CHECKPOINT_KEY)?;
        models.push((STANDBY_CHECKPOINT_KEY, Arc::new(clip)));
    }
    Ok(models)
}

/// Returns the options of the model of the standby generation; `None` if none is configured.
pub fn standby_model_options(config: &Config) -> Option<clip::ModelOptions> {
    let checkpoint = config.search.standby_checkpoint.clone();
    let revision = config.search.standby_revision.clone();
    (!checkpoint.is_empty()).then(|| clip::ModelOptions {
        checkpoint,
        revision,
        ..config.model.clone()
    })
}

/// Loads the model of the standby generation: the checkpoint that it was set up with, at
/// `search.standby_revision`. An error if that is a different model now.
pub fn load_standby_model(
    config: &Config,
    standby: &StandbyGeneration,
) -> anyhow::Result<Arc<dyn Encoders>> {
    let mut config = config.clone();
    config.model.checkpoint.clone_from(&standby.checkpoint);
    config.model.revision.clone_from(&config.search.standby_revision);
    let encoders = load_configured_model(&config).context("the model of the standby generation")?;
    standby.generation.ensure_compatible(&configured_generation(&config, &*encoders))?;
    Ok(encoders)
}

/// Returns the model among `models` that filled the live generation. An error if there is none, or if
/// one of `models` matches no generation of the catalogue.
pub fn find_live_model(
    config: &Config,
    state: &CatalogueState,
    models: &[(&'static str, Arc<dyn Encoders>)],
) -> anyhow::Result<Arc<dyn Encoders>> {
    let mut live = None;
    for (setting, encoders) in models {
        let generation = configured_generation(config, &**encoders);
        if generation.id == state.live.id {
            live = live.or(Some(encoders.clone()));
        }
        match state.find_generation(&generation.id) {
            Some(stored) => stored.ensure_compatible(&generation).context(*setting)?,
            None if *setting == STANDBY_CHECKPOINT_KEY => {
                let Some(standby) = &state.standby else { continue };
                anyhow::bail!(
                    "{setting}: generation {} (model fingerprint {}) is live and {} ({}) is the standby, but {} has the fingerprint {}. Set {setting} to {}, or leave it empty",
                    state.live.id,
                    state.live.model_fingerprint,
                    standby.generation.id,
                    standby.generation.model_fingerprint,
                    encoders.card().name,
                    encoders.card().fingerprint,
                    standby.checkpoint
                );
            }
            None => {}
        }
    }
    if let Some(live) = live {
        return Ok(live);
    }
    let configured = configured_generation(config, &*models[0].1);
    if state.is_standby(&configured) {
        anyhow::bail!(
            "model.checkpoint: {} fills the standby generation {}; live is {} ({}, model fingerprint {}). Set model.checkpoint to the live model and search.standby_checkpoint to this one, or make it live (bsap candidate set --standby, bsap promote)",
            configured.model_name,
            configured.id,
            state.live.id,
            state.live.model_name,
            state.live.model_fingerprint
        );
    }
    state.live.ensure_compatible(&configured)?;
    Ok(models[0].1.clone())
}

/// Loads `checkpoint`, or the model of the demo if it is `None`.
pub fn load_demo_model(checkpoint: Option<&str>) -> anyhow::Result<ClipModel> {
    let temp_folder = std::env::temp_dir().join(format!("bsap-evaluate-{}", std::process::id()));
    let checkpoint = if let Some(checkpoint) = checkpoint {
        checkpoint.to_owned()
    } else {
        let folder = temp_folder.join(DEMO_MODEL_FOLDER);
        write_demo_checkpoint(&folder)?;
        folder.display().to_string()
    };
    let clip = ClipModel::load(&ModelOptions { checkpoint, ..ModelOptions::default() });
    // It fails if another checkpoint was loaded: then there is no folder.
    let _ = std::fs::remove_dir_all(&temp_folder);
    Ok(clip?)
}
