//! Loading CLIP models, and matching them with the generations that they fill.

use std::sync::Arc;

use anyhow::Context;

use crate::catalogue::{CatalogueState, StandbyGeneration};
use crate::clip::{self, ClipModel, Encoders, ModelOptions};
use crate::config::Config;
use crate::demo::write_checkpoint;
use crate::table::Generation;

/// The setting that names the model of another generation.
pub const STANDBY_CHECKPOINT_KEY: &str = "search.standby_checkpoint";

/// Loads the model. Blocks for as long as reading the weights takes.
pub fn load_encoders(config: &Config) -> anyhow::Result<Arc<dyn Encoders>> {
    let clip = ClipModel::load(&config.model).context("model.checkpoint")?;
    Ok(Arc::new(clip))
}

/// The generation that this configuration fills and reads.
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

/// The models of a query worker, of promotions and of checks, each with the setting that names it.
pub fn load_models(config: &Config) -> anyhow::Result<Vec<(&'static str, Arc<dyn Encoders>)>> {
    let mut models = vec![("model.checkpoint", load_encoders(config)?)];
    if let Some(candidate) = standby_model_options(config) {
        let clip = ClipModel::load(&candidate).context(STANDBY_CHECKPOINT_KEY)?;
        models.push((STANDBY_CHECKPOINT_KEY, Arc::new(clip)));
    }
    Ok(models)
}

/// Where the model of another generation is, if one is named.
pub fn standby_model_options(config: &Config) -> Option<clip::ModelOptions> {
    let checkpoint = config.search.standby_checkpoint.clone();
    let revision = config.search.standby_revision.clone();
    (!checkpoint.is_empty()).then(|| clip::ModelOptions {
        checkpoint,
        revision,
        ..config.model.clone()
    })
}

/// The model that fills the generation beside the live one, by the checkpoint that it was set up with
/// and `search.candidate_revision`. Refused where that is another model now.
pub fn load_standby_model(
    config: &Config,
    standby: &StandbyGeneration,
) -> anyhow::Result<Arc<dyn Encoders>> {
    let mut config = config.clone();
    config.model.checkpoint.clone_from(&standby.checkpoint);
    config.model.revision.clone_from(&config.search.standby_revision);
    let encoders =
        load_encoders(&config).context("the model of the generation beside the live one")?;
    standby.generation.ensure_compatible(&configured_generation(&config, &*encoders))?;
    Ok(encoders)
}

/// That of `models` which filled the live generation. Refused where none did, and where one fits
/// nothing that there is.
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
                    "{setting}: generation {} (model fingerprint {}) is live and {} ({}) stands beside it, but {} has the fingerprint {}. Set {setting} to {}, or leave it empty",
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
            "model.checkpoint: {} fills generation {}, which stands beside the live one, {} ({}, model fingerprint {}). Set model.checkpoint to the live model and search.standby_checkpoint to this one, or make it live (bsap candidate set --beside, bsap promote)",
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

/// The model's folder gives it its name.
const MODEL_FOLDER: &str = "demo-clip";

/// The demo's model, or another checkpoint.
pub fn load_demo_model(checkpoint: Option<&str>) -> anyhow::Result<ClipModel> {
    let scratch = std::env::temp_dir().join(format!("bsap-evaluate-{}", std::process::id()));
    let checkpoint = if let Some(checkpoint) = checkpoint {
        checkpoint.to_owned()
    } else {
        let folder = scratch.join(MODEL_FOLDER);
        write_checkpoint(&folder)?;
        folder.display().to_string()
    };
    let clip = ClipModel::load(&ModelOptions { checkpoint, ..ModelOptions::default() });
    // Only what this made itself; where there is nothing, nothing is left to do.
    let _ = std::fs::remove_dir_all(&scratch);
    Ok(clip?)
}
