//! `bsap demo render`: drawn pictures as files.

use std::path::PathBuf;

use anyhow::Context;
use clap::Args;

use crate::commands::shared::error::{CommandError, CommandResult};
use crate::commands::shared::printing::print_line;
use crate::commands::shared::progress::progress_bar;
use crate::demo::catalogue::PhotoStyle;
use crate::demo::shop::render_catalogue;

/// `bsap demo render`.
#[derive(Debug, Args)]
pub struct DemoRenderArgs {
    /// Number of pictures
    #[arg(long, default_value_t = 600, value_parser = clap::value_parser!(u64).range(1..=1_000_000))]
    pub count: u64,
    /// The same seed draws the same pictures
    #[arg(long, default_value_t = 1)]
    pub seed: u64,
    /// Style of the pictures
    #[arg(long, default_value = "studio")]
    pub style: PhotoStyle,
    /// Width and height in pixels
    #[arg(long, default_value_t = 256, value_parser = clap::value_parser!(u32).range(16..=4096))]
    pub side: u32,
    /// Folder, created if it is missing
    #[arg(long, value_name = "FOLDER")]
    pub out: PathBuf,
}

/// Draws pictures into a folder.
pub fn run(args: &DemoRenderArgs) -> CommandResult {
    std::fs::create_dir_all(&args.out)
        .with_context(|| format!("--out: {}", args.out.display()))
        .map_err(CommandError::Usage)?;
    let bar = progress_bar("drawn", args.count)?;
    render_catalogue(&args.out, args.seed, args.count, args.style, args.side, |n| bar.inc(n))?;
    bar.finish_and_clear();
    print_line!("{} pictures and truth.jsonl in {}", args.count, args.out.display());
    Ok(())
}
