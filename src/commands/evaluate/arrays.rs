//! `bsap evaluate arrays`: embeddings that somebody has already.

use std::path::{Path, PathBuf};

use anyhow::Context;
use clap::Args;
use serde_json::json;

use super::files::{print_report, write_file, write_rankings};
use crate::commands::shared::error::{CommandError, CommandResult};
use crate::commands::shared::printing::print_note;
use crate::commands::shared::progress::progress_bar;
use crate::commands::shared::query_files::read_text_file;
use crate::evaluate::arrays::{
    ArrayEvaluation, ArrayInputs, evaluate_arrays, parse_pairs, write_transforms,
};
use crate::evaluate::{self, ConfigurationSpec, ThumbnailUris};
use crate::record::arrays::{ArrayRole, EmbeddingArray, read_array};

/// `bsap evaluate arrays`.
#[derive(Debug, Args)]
#[command(after_long_help = "\
Examples:
  bsap evaluate arrays --images images.npy --queries queries.npy --prompts prompts.npy \\
      --relevant pairs.csv
  bsap evaluate arrays --images set.npz:images --queries set.npz:texts --prompts nouns.npy \\
      --relevant pairs.csv --configuration normaliser=softmax,temperature=0.5,weight=0.5,name=softmax

An array is FILE.npy, FILE.npz:NAME, FILE.parquet:COLUMN (a column of lists) or a folder that \
clip-retrieval wrote (img_emb/*.npy for --images, text_emb/*.npy for all others, metadata/*.parquet), of \
floats of 16, 32 or 64 bits; rows are normalised. Without --configuration, plain CLIP (raw) is compared with what \
is proposed for the bank of prompts (default). docs/evaluation.md has more.")]
pub struct EvaluateArraysArgs {
    /// Embeddings of the images, one per row
    #[arg(long, value_name = "ARRAY")]
    pub images: String,
    /// Embeddings of the queries, by the same model
    #[arg(long, value_name = "ARRAY")]
    pub queries: String,
    /// Embeddings of the auxiliary prompts, by the same model
    #[arg(long, value_name = "ARRAY")]
    pub prompts: String,
    /// Right answers: CSV with the header `query,image` and row numbers from 0. A query without any is not
    /// measured
    #[arg(long, value_name = "FILE")]
    pub relevant: PathBuf,
    /// Embeddings of queries that no image answers: how well do their scores separate them from the others?
    #[arg(long, value_name = "ARRAY")]
    pub unanswerable: Option<String>,
    /// A further configuration to compare: normaliser, weight, lambda, top_k, temperature, name
    #[arg(long = "configuration", value_name = "SPEC", value_parser = |text: &str| ConfigurationSpec::try_from(text))]
    pub configurations: Vec<ConfigurationSpec>,
    /// The model's logit scale, which `softmax` needs: 100 for every CLIP of OpenAI
    #[arg(long, default_value_t = 100.0, value_name = "L", value_parser = parse_logit_scale)]
    pub logit_scale: f32,
    /// Write the report as one self-contained HTML file
    #[arg(long, value_name = "FILE")]
    pub report: Option<PathBuf>,
    /// Write the report as JSON; `-` prints it instead of the tables
    #[arg(long, value_name = "FILE")]
    pub json: Option<PathBuf>,
    /// Write the rankings of every configuration as a TREC run, and the judgements, into this folder
    #[arg(long, value_name = "FOLDER")]
    pub runs: Option<PathBuf>,
    /// Write α and β of every image into this folder, NAME.npy for each configuration but raw: any vector
    /// search that multiplies and adds two numbers per image can serve it
    #[arg(long, value_name = "FOLDER")]
    pub transforms: Option<PathBuf>,
}

/// Compares configurations on arrays, and prints and writes the report.
pub fn evaluate(args: &EvaluateArraysArgs) -> CommandResult {
    let read = |option: &str, text: &str, role: ArrayRole| {
        read_array(text, role).map_err(|error| CommandError::usage(format!("{option}: {error}")))
    };
    let images = read("--images", &args.images, ArrayRole::Images)?;
    let queries = read("--queries", &args.queries, ArrayRole::Texts)?;
    let prompts = read("--prompts", &args.prompts, ArrayRole::Texts)?;
    let unanswerable = args.unanswerable.as_deref();
    let unanswerable =
        unanswerable.map(|text| read("--unanswerable", text, ArrayRole::Texts)).transpose()?;
    let relevant = read_relevant(&args.relevant, &queries, &images)?;
    let inputs = ArrayInputs {
        images,
        queries,
        prompts,
        relevant,
        unanswerable,
        logit_scale: args.logit_scale,
    };
    let bar = progress_bar("ranked", inputs.images.rows() as u64)?;
    let evaluated = evaluate_arrays(&inputs, &args.configurations, &|n| bar.inc(n));
    bar.finish_and_clear();
    write_outputs(args, &evaluated.map_err(CommandError::usage)?)
}

fn read_relevant(
    path: &Path,
    queries: &EmbeddingArray,
    images: &EmbeddingArray,
) -> Result<Vec<Vec<u32>>, CommandError> {
    let text = read_text_file(path, "--relevant")?;
    parse_pairs(&text, &path.display().to_string(), queries.rows(), images.rows())
        .map_err(|error| CommandError::usage(format!("--relevant: {error}")))
}

fn write_outputs(args: &EvaluateArraysArgs, evaluated: &ArrayEvaluation) -> CommandResult {
    let ArrayEvaluation { report, .. } = evaluated;
    let json = json!({
        "runs": evaluated.runs,
        "bank": evaluated.bank,
        "logit_scale": args.logit_scale,
        "report": report,
    });
    let terminal = evaluate::render_terminal(report);
    print_report(args.json.as_deref(), &terminal, &serde_json::to_string_pretty(&json)?)?;
    let names: Vec<&str> = evaluated.runs.iter().map(|run| run.name.as_str()).collect();
    if let Some(folder) = &args.runs {
        let ArrayEvaluation { rankings, image_grades, images, .. } = evaluated;
        write_rankings(folder, &names, rankings, image_grades, images)?;
    }
    if let Some(folder) = &args.transforms {
        std::fs::create_dir_all(folder)
            .with_context(|| format!("--transforms: {}", folder.display()))?;
        write_transforms(folder, evaluated).context("--transforms")?;
    }
    if let Some(path) = &args.report {
        let html = evaluate::render_html(report, &ThumbnailUris::new());
        write_file(path, &html, "--report")?;
        // Standard output may be the JSON report.
        print_note!("written: {}", path.display());
    }
    Ok(())
}

fn parse_logit_scale(text: &str) -> Result<f32, String> {
    let number = text.parse().ok().filter(|scale: &f32| (0.1..=10_000.0).contains(scale));
    number.ok_or_else(|| format!("{text:?} is not a number from 0.1 to 10000"))
}
