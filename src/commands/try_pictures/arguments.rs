//! Arguments of `bsap try`.

use std::path::PathBuf;

use clap::Args;

/// `bsap try`.
#[derive(Debug, Args)]
#[command(after_long_help = "\
Examples:
  bsap try ~/Pictures                                 every picture in a folder and its subfolders
  bsap try s3://shop/images                           a bucket; credentials from AWS_* variables
  bsap try products.csv                               a list: a column uri, other columns are attributes
  bsap try ~/Pictures --queries judged.jsonl --once   does balancing help on your queries?
  bsap try ~/Pictures --checkpoint ~/clip             a model that you have

Stopped in any way and started again it goes on where it was. Exit codes: 0 everything is stored that is a \
picture, 1 some could not be stored (the end of the output says which and why), 2 nothing was done. \
docs/own-pictures.md is the guide.")]
pub struct TryArgs {
    /// Folders, buckets (s3://, gs://, az://), lists of addresses (.csv, .jsonl), or single pictures
    #[arg(value_name = "PATH", required = true)]
    pub paths: Vec<String>,
    /// Model: a folder, a model of the Hugging Face hub, or `demo` for the demo's, which knows only drawings.
    /// Without one, model.checkpoint
    #[arg(long, value_name = "FOLDER|ID")]
    pub checkpoint: Option<String>,
    /// Folder for the table and the log; by default one per set of paths, in the user's data folder
    #[arg(long, value_name = "FOLDER")]
    pub dir: Option<PathBuf>,
    /// Evaluate on these queries when everything is stored: JSON lines or CSV, as for `bsap evaluate`; images
    /// are named by their files
    #[arg(long, value_name = "FILE")]
    pub queries: Option<PathBuf>,
    /// End when everything is stored, instead of following changes
    #[arg(long)]
    pub once: bool,
    /// Port of the page on 127.0.0.1; 0: any free port. Without one that of http.listen, with --once any
    #[arg(long)]
    pub port: Option<u16>,
    /// Write the configuration for the same thing in production
    #[arg(long, value_name = "FILE")]
    pub write_config: Option<PathBuf>,
    /// At the end print the result as JSON, or write it into FILE
    #[arg(long, value_name = "FILE", num_args = 0..=1)]
    #[allow(clippy::option_option)]
    pub json: Option<Option<PathBuf>>,
}

impl TryArgs {
    /// Whether standard output is for the result in JSON alone.
    pub fn prints_json(&self) -> bool {
        self.json == Some(None)
    }
}
