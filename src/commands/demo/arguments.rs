//! Arguments of `bsap demo`.

use std::path::PathBuf;

use clap::{Args, Subcommand};

use super::evaluate::DemoEvaluateArgs;
use super::render::DemoRenderArgs;
use crate::demo::catalogue::PhotoStyle;

/// `bsap demo`.
#[derive(Debug, Args)]
#[command(args_conflicts_with_subcommands = true)]
pub struct DemoArgs {
    /// Another action than running the demo.
    #[command(subcommand)]
    pub action: Option<DemoAction>,
    /// Folder for pictures, table, model and log; an earlier demo in it is replaced
    #[arg(long, default_value = "./bsap-demo", value_name = "FOLDER")]
    pub dir: PathBuf,
    /// Pictures in the catalogue
    #[arg(long, default_value_t = 600, value_parser = clap::value_parser!(u32).range(1..=10_000))]
    pub images: u32,
    /// Port of the page on 127.0.0.1; 0: any free port
    #[arg(long, default_value_t = 8080)]
    pub port: u16,
    /// Style of the pictures; the model was trained on `studio`
    #[arg(long, default_value = "studio")]
    pub style: PhotoStyle,
    /// Ingest everything, print the results of example queries raw and balanced, and exit
    #[arg(long)]
    pub once: bool,
}

/// Actions of `bsap demo` that start nothing.
#[derive(Debug, Subcommand)]
pub enum DemoAction {
    /// Draw pictures, and write a JSON-lines file that says what is in each
    Render(DemoRenderArgs),
    /// Measure how well a model ranks synthetic catalogues, raw and balanced
    Evaluate(DemoEvaluateArgs),
}
