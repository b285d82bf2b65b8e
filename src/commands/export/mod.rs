//! `bsap export`: what others need of a catalogue.

mod corrections;

use std::path::Path;

use clap::{Args, Subcommand};

use super::shared::error::CommandResult;

/// `bsap export`.
#[derive(Debug, Args)]
pub struct ExportArgs {
    /// What to export.
    #[command(subcommand)]
    pub action: ExportAction,
}

/// What `bsap export` writes.
#[derive(Debug, Subcommand)]
pub enum ExportAction {
    /// α and β of every image, so that an index of your own computes the balanced score
    Corrections(corrections::ExportCorrectionsArgs),
}

/// Writes what the arguments name.
pub fn run(args: &ExportArgs, config_file: Option<&Path>) -> CommandResult {
    match &args.action {
        ExportAction::Corrections(args) => corrections::run(args, config_file),
    }
}
