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
    /// Draw pictures without starting anything.
    #[command(subcommand)]
    pub action: Option<DemoAction>,
    /// Folder for pictures, table, model and log; an earlier demo in it is replaced
    #[arg(long, default_value = "./bsap-demo", value_name = "FOLDER")]
    pub dir: PathBuf,
    /// Pictures in the catalogue
    #[arg(long, default_value_t = 600, value_parser = clap::value_parser!(u32).range(1..=10_000))]
    pub images: u32,
    /// Port of the page on 127.0.0.1; 0 takes any free one
    #[arg(long, default_value_t = 8080)]
    pub port: u16,
    /// How the catalogue's pictures are taken; the model was trained on `studio`
    #[arg(long, default_value = "studio")]
    pub style: PhotoStyle,
    /// Ingest all, print sample queries raw and balanced, and end
    #[arg(long)]
    pub once: bool,
}

/// What `bsap demo` does besides.
#[derive(Debug, Subcommand)]
pub enum DemoAction {
    /// Draw pictures and a JSON-lines file that says what is in each
    Render(DemoRenderArgs),
    /// Measure how well a model ranks drawn catalogues, plain and balanced
    Evaluate(DemoEvaluateArgs),
}
