//! Arguments of `bsap demo`.

use std::path::PathBuf;

use clap::{Args, Subcommand};

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

/// `bsap demo evaluate`.
#[derive(Debug, Args)]
pub struct DemoEvaluateArgs {
    /// Pictures of each style
    #[arg(long, default_value_t = 5_000, value_parser = clap::value_parser!(u64).range(1..=1_000_000))]
    pub count: u64,
    /// Queries of each difficulty, where there are as many
    #[arg(long, default_value_t = 150)]
    pub queries: usize,
    /// Decides pictures and queries
    #[arg(long, default_value_t = 2)]
    pub seed: u64,
    /// Another checkpoint than the demo's own: a folder, or a model of the hub
    #[arg(long, value_name = "FOLDER|ID")]
    pub checkpoint: Option<String>,
    /// Print JSON, a line a style, instead of Markdown
    #[arg(long)]
    pub json: bool,
}

/// `bsap demo render`.
#[derive(Debug, Args)]
pub struct DemoRenderArgs {
    /// How many
    #[arg(long, default_value_t = 600, value_parser = clap::value_parser!(u64).range(1..=1_000_000))]
    pub count: u64,
    /// The same seed draws the same pictures
    #[arg(long, default_value_t = 1)]
    pub seed: u64,
    /// How they are taken
    #[arg(long, default_value = "studio")]
    pub style: PhotoStyle,
    /// Width and height in pixels
    #[arg(long, default_value_t = 256, value_parser = clap::value_parser!(u32).range(16..=4096))]
    pub side: u32,
    /// Folder, made where it is missing
    #[arg(long, value_name = "FOLDER")]
    pub out: PathBuf,
}
