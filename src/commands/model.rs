//! `bsap model`: describes a checkpoint, and tests it.

use clap::{Args, Subcommand};

use super::shared::checkpoint_args::CheckpointArgs;
use super::shared::error::CommandResult;
use super::shared::printing::print_line;
use crate::clip::{ClipModel, Encoders, ModelOptions, run_self_test};

/// `bsap model`.
#[derive(Debug, Args)]
pub struct ModelArgs {
    /// What to do.
    #[command(subcommand)]
    pub action: ModelAction,
}

/// What `bsap model` does.
#[derive(Debug, Subcommand)]
pub enum ModelAction {
    /// Print architecture, sizes, fingerprint and preprocessing, and run a self-test
    Inspect {
        /// Folder of the checkpoint, in the Hugging Face layout, or a model of the hub
        checkpoint: String,
        /// Device, precision and revision.
        #[command(flatten)]
        model: CheckpointArgs,
    },
}

/// Inspects a checkpoint.
pub fn run(args: &ModelArgs) -> CommandResult {
    let ModelAction::Inspect { checkpoint, model } = &args.action;
    inspect_model(&model.to_model_options(checkpoint))
}

/// Prints the properties of a checkpoint, and tests it.
pub fn inspect_model(options: &ModelOptions) -> CommandResult {
    let clip = ClipModel::load(options)?;
    let card = clip.card();
    let memory = |bytes: f64| format!("{:.1} MB", card.parameters as f64 * bytes / 1e6);
    let line = |name: &str, value: String| print_line!("{name:<14} {value}");
    line("name", card.name.clone());
    line("architecture", card.architecture.clone());
    line("dimension", card.dimension.to_string());
    line(
        "parameters",
        format!("{}: {} in f32, {} in f16 or bf16", card.parameters, memory(4.0), memory(2.0)),
    );
    line("image", card.preprocessing.clone());
    line("text", format!("up to {} tokens", card.context_length));
    line("logit scale", format!("{:.4}", card.logit_scale));
    if let Some(bias) = card.logit_bias {
        line("logit bias", format!("{bias:.4}"));
    }
    line("fingerprint", card.fingerprint.clone());
    if let Some(notice) = &card.notice {
        line("notice", notice.clone());
    }
    let test = run_self_test(&clip)?;
    line(
        "self-test",
        format!(
            "ok; alone and in a batch differ by {:.1e} at most; one picture {:.1} ms, one text {:.1} ms",
            test.max_batch_difference,
            test.single_image_time.as_secs_f64() * 1e3,
            test.single_text_time.as_secs_f64() * 1e3,
        ),
    );
    Ok(())
}
