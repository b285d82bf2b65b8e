//! `bsap model`: describes a checkpoint, and tests it.

use std::path::PathBuf;

use anyhow::Context;
use clap::{Args, Subcommand};
use serde_json::{Value, json};

use super::shared::checkpoint_args::CheckpointArgs;
use super::shared::error::CommandResult;
use super::shared::printing::print_line;
use crate::clip::{ClipModel, Encoders, SelfTestReport, run_self_test};

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
    /// Print layout, architecture, sizes, fingerprint and preprocessing, the keys of the checkpoint's files
    /// that embeddings follow, and those that are ignored; and run a self-test
    Inspect {
        /// Folder of the checkpoint, or a model of the hub
        checkpoint: String,
        /// Print the same as JSON, or write it into FILE
        #[arg(long, value_name = "FILE", num_args = 0..=1)]
        #[allow(clippy::option_option)]
        json: Option<Option<PathBuf>>,
        /// Device, precision and revision.
        #[command(flatten)]
        model: CheckpointArgs,
    },
}

/// Prints the properties of a checkpoint, and tests it.
pub fn run(args: &ModelArgs) -> CommandResult {
    let ModelAction::Inspect { checkpoint, json, model } = &args.action;
    let clip = ClipModel::load(&model.to_model_options(checkpoint))?;
    let test = run_self_test(&clip)?;
    match json {
        None => print_properties(&clip, &test),
        Some(None) => print_line!("{}", describe_model(&clip, &test)),
        Some(Some(file)) => {
            let text = format!("{:#}\n", describe_model(&clip, &test));
            std::fs::write(file, text).with_context(|| format!("--json: {}", file.display()))?;
            print_properties(&clip, &test);
        }
    }
    Ok(())
}

fn describe_model(clip: &ClipModel, test: &SelfTestReport) -> Value {
    let (card, keys) = (clip.card(), clip.keys());
    json!({
        "name": card.name,
        "layout": clip.layout(),
        "architecture": card.architecture,
        "dimension": card.dimension,
        "parameters": card.parameters,
        "image_side": card.image_side,
        "preprocessing": card.preprocessing,
        "context_length": card.context_length,
        "logit_scale": card.logit_scale,
        "logit_bias": card.logit_bias,
        "fingerprint": card.fingerprint,
        "notice": card.notice,
        "obeyed": keys.obeyed,
        "ignored": keys.ignored,
        "unknown": keys.unknown,
        "self_test": {
            "passed": true,
            "max_batch_difference": test.max_batch_difference,
            "image_ms": test.single_image_time.as_secs_f64() * 1e3,
            "text_ms": test.single_text_time.as_secs_f64() * 1e3,
        },
    })
}

fn print_properties(clip: &ClipModel, test: &SelfTestReport) {
    let (card, keys) = (clip.card(), clip.keys());
    let memory = |bytes: f64| format!("{:.1} MB", card.parameters as f64 * bytes / 1e6);
    let line = |name: &str, value: String| print_line!("{name:<14} {value}");
    line("name", card.name.clone());
    line("layout", clip.layout().to_owned());
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
    line(
        "keys",
        format!(
            "{} obeyed, {} ignored because they change no embedding (--json lists them)",
            keys.obeyed.len(),
            keys.ignored.len()
        ),
    );
    for key in &keys.unknown {
        line("unknown key", format!("{key}, ignored"));
    }
    line(
        "self-test",
        format!(
            "ok; alone and in a batch differ by {:.1e} at most; one picture {:.1} ms, one text {:.1} ms",
            test.max_batch_difference,
            test.single_image_time.as_secs_f64() * 1e3,
            test.single_text_time.as_secs_f64() * 1e3,
        ),
    );
}
