//! `bsap import`: stores embeddings that somebody has already.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, anyhow};
use chrono::{TimeDelta, Utc};
use clap::Args;
use serde_json::json;
use tokio_util::sync::CancellationToken;

use super::shared::catalogue::{actor, open_store};
use super::shared::configuration::{load_config, load_config_without_model, with_quiet_logging};
use super::shared::error::{CommandError, CommandResult, write_json};
use super::shared::models::load_configured_model;
use super::shared::printing::Output;
use super::shared::progress::progress_bar;
use super::shared::query_files::read_text_file;
use super::shared::runtime::run_with_logging;
use super::shared::worker::FilledGeneration;
use crate::backfill;
use crate::backfill::import::{
    Agreement, Columns, IdColumn, Import, ImportColumns, ImportPlan, ImportRules, ImportSummary,
    MIN_MEDIAN_COSINE, SAMPLED_IMAGES, measure_agreement,
};
use crate::clip::Encoders;
use crate::config::Config;
use crate::ingest::fetch::Fetcher;
use crate::record::VersionOrdering;
use crate::record::arrays::{
    ArrayError, ArrayRole, EmbeddingArray, list_metadata_files, read_array_with_faults,
    split_member,
};
use crate::table::TableWriter;

/// Columns that hold the ids if `--ids` does not say which.
const ID_COLUMNS: [&str; 3] = ["image_id", "id", "image_path"];
/// Columns that hold the addresses if `--uri` does not say which.
const URI_COLUMNS: [&str; 2] = ["uri", "url"];
/// Rows with faults that are printed; `--json` has all.
const MAX_PRINTED_FAULTS: usize = 20;

/// `bsap import`.
#[derive(Debug, Args)]
#[command(after_long_help = "\
Examples:
  bsap import --config bsap.toml --images images.npy --ids ids.txt \\
      --checkpoint openai/clip-vit-base-patch32
  bsap import --config bsap.toml --images shop.parquet:embedding --ids sku --uri photo_url
  bsap import --config bsap.toml --images clip-retrieval/ --dry-run

An array is FILE.npy, FILE.npz:NAME, FILE.parquet:COLUMN (a column of lists) or a folder that clip-retrieval \
wrote, of floats of 16, 32 or 64 bits. Metadata is Parquet, CSV or JSON lines with one row per embedding, in the \
same order; without --metadata it is the Parquet file itself, or the metadata of clip-retrieval. Columns that are \
named as declared attributes ([attributes] of the configuration) are stored, others are not.

Every row is checked before anything is stored. If addresses can be read, 64 images are embedded by the checkpoint, \
and embeddings that disagree with it (median cosine below 0.99) are refused.

A row without --sequence has the version of the import's start if the catalogue orders versions by event_time; \
otherwise it is older than every event. The same import again stores nothing, and continues if it was interrupted; \
workers may run in the meantime. Exit code 2 if the input is wrong; then nothing is stored.")]
pub struct ImportArgs {
    /// Embeddings of the images, one per row
    #[arg(long, value_name = "ARRAY")]
    pub images: String,
    /// Ids: a text file with one per line, FILE.parquet:COLUMN, FILE.csv:COLUMN, FILE.tsv:COLUMN, or a column of the metadata; by
    /// default its column image_id, id or image_path
    #[arg(long, value_name = "FILE|COLUMN")]
    pub ids: Option<String>,
    /// Addresses, versions and attributes: Parquet, CSV or JSON lines
    #[arg(long, value_name = "FILE")]
    pub metadata: Option<PathBuf>,
    /// Column of the addresses; by default uri or url
    #[arg(long, value_name = "COLUMN")]
    pub uri: Option<String>,
    /// Column of the versions, as source.ordering orders them: whole numbers, times (RFC 3339) or sequencers
    #[arg(long, value_name = "COLUMN")]
    pub sequence: Option<String>,
    /// The model that computed the embeddings: a folder in the Hugging Face layout, or a model of the hub; by
    /// default model.checkpoint
    #[arg(long, value_name = "FOLDER|ID")]
    pub checkpoint: Option<String>,
    /// Store embeddings although they disagree with what the checkpoint computes
    #[arg(long)]
    pub accept_disagreement: bool,
    /// Leave out rows that cannot be stored, instead of refusing all
    #[arg(long)]
    pub skip_invalid: bool,
    /// Check everything, and store nothing
    #[arg(long)]
    pub dry_run: bool,
    /// Print the result as JSON, or write it into FILE
    #[arg(long, value_name = "FILE", num_args = 0..=1)]
    #[allow(clippy::option_option)]
    pub json: Option<Option<PathBuf>>,
}

/// Checks and stores embeddings.
pub fn run(args: &ImportArgs, config_file: Option<&Path>) -> CommandResult {
    let mut config = match args.checkpoint {
        Some(_) => load_config_without_model(config_file)?,
        None => load_config(config_file)?,
    };
    if let Some(checkpoint) = &args.checkpoint {
        config.model.checkpoint.clone_from(checkpoint);
    }
    run_with_logging(with_quiet_logging(config), |config, token| import(args, config, token))
}

async fn import(args: &ImportArgs, config: Config, token: CancellationToken) -> CommandResult {
    let output = Output::new(args.json == Some(None));
    let inputs = Inputs::read(args)?;
    let encoders = load_configured_model(&config)?;
    let plan = make_plan(inputs, &config, &*encoders)?;
    report_plan(&plan, output);
    let faults: Vec<_> =
        plan.faults.iter().map(|f| json!({ "row": f.row, "reason": f.reason })).collect();
    let write_result = |summary: &ImportSummary, agreement: Option<&Agreement>| {
        let result = json!({
            "read": plan.rows.len(),
            "stored": summary.stored,
            "already_stored": summary.already_stored,
            "skipped": faults,
            "sampled": agreement.map_or(0, |agreement| agreement.sampled),
            "compared": agreement.map_or(0, |agreement| agreement.cosines.len()),
            "median_cosine": agreement.and_then(Agreement::median),
        });
        write_json(&result, args.json.as_ref())
    };
    let nothing = ImportSummary { stored: 0, already_stored: 0, is_complete: false };
    if !plan.faults.is_empty() && (!args.skip_invalid || plan.storable_rows() == 0) {
        write_result(&nothing, None)?;
        return Err(refuse_faults(&plan));
    }
    let agreement = compare_with_model(&plan, &config, &encoders, output, &token).await?;
    if token.is_cancelled() {
        return Err(anyhow!("interrupted; nothing was stored").into());
    }
    if let Some(median) = agreement.median().filter(|median| *median < MIN_MEDIAN_COSINE)
        && !args.accept_disagreement
    {
        write_result(&nothing, Some(&agreement))?;
        return Err(CommandError::usage(format!(
            "--checkpoint: the embeddings in {} are not those of {}: the median cosine of {} images is {median:.4}, below {MIN_MEDIAN_COSINE}; give the checkpoint that computed them, or --accept-disagreement. Nothing was stored",
            plan.images.name(),
            encoders.card().name,
            agreement.cosines.len()
        )));
    }
    if args.dry_run {
        output.line(format_args!(
            "{} rows would be stored. Nothing was changed.",
            plan.storable_rows()
        ));
        return write_result(&nothing, Some(&agreement));
    }
    let summary = store(&plan, &config, &encoders, output, &token).await?;
    write_result(&summary, Some(&agreement))?;
    if !summary.is_complete {
        return Err(
            anyhow!("interrupted; committed work is kept, run it again for the rest").into()
        );
    }
    Ok(())
}

/// What the arguments name, read and not yet joined.
struct Inputs {
    images: EmbeddingArray,
    ids: IdColumn,
    metadata: Option<Columns>,
    columns: ImportColumns,
}

impl Inputs {
    /// Reads all files. The error has what is wrong with each of them.
    fn read(args: &ImportArgs) -> Result<Self, CommandError> {
        let usage = |option: &str| {
            let option = option.to_owned();
            move |error: ArrayError| format!("{option}: {error}")
        };
        let images = read_array_with_faults(&args.images, ArrayRole::Images);
        let images = images.map_err(usage("--images"));
        let metadata = read_metadata(args);
        let mut problems = Vec::new();
        let images = images.map_err(|problem| problems.push(problem)).ok();
        let metadata = metadata.map_err(|problem| problems.push(problem)).ok();
        let ids = metadata.as_ref().and_then(|metadata| {
            read_ids(args, metadata.as_ref()).map_err(|problem| problems.push(problem)).ok()
        });
        let (Some(images), Some(metadata), Some(ids)) = (images, metadata, ids) else {
            return Err(CommandError::usage(problems.join("\n")));
        };
        let usual = |names: &[&str]| {
            let metadata = metadata.as_ref()?;
            names.iter().find(|name| metadata.column(name).is_some()).map(|name| (*name).to_owned())
        };
        let columns = ImportColumns {
            uri: args.uri.clone().or_else(|| usual(&URI_COLUMNS)),
            sequence: args.sequence.clone(),
        };
        Ok(Self { images, ids, metadata, columns })
    }
}

/// Reads the metadata: the file that the argument names, or what belongs to the embeddings, if anything.
fn read_metadata(args: &ImportArgs) -> Result<Option<Columns>, String> {
    if let Some(path) = &args.metadata {
        return read_columns(path, "--metadata").map(Some);
    }
    let of_images = |error: ArrayError| format!("--images: {error}");
    let (path, _) = split_member(&args.images);
    if has_extension(&path, "parquet") {
        let name = path.display().to_string();
        return Columns::from_parquet(&name, &[path]).map(Some).map_err(of_images);
    }
    let files = list_metadata_files(&args.images).map_err(of_images)?;
    if files.is_empty() {
        return Ok(None);
    }
    let name = format!("{}/metadata", args.images.trim_end_matches('/'));
    Columns::from_parquet(&name, &files).map(Some).map_err(of_images)
}

/// Reads a file of columns; `option` names it in errors.
fn read_columns(path: &Path, option: &str) -> Result<Columns, String> {
    let name = path.display().to_string();
    let columns = if has_extension(path, "parquet") {
        Columns::from_parquet(&name, &[path.to_owned()])
    } else {
        let text = read_text_file(path, option).map_err(|error| error.to_string())?;
        if has_extension(path, "csv") || has_extension(path, "tsv") {
            Columns::from_csv(&name, &text)
        } else {
            Columns::from_json_lines(&name, &text)
        }
    };
    columns.map_err(|error| format!("{option}: {error}"))
}

fn read_ids(args: &ImportArgs, metadata: Option<&Columns>) -> Result<IdColumn, String> {
    let of_ids = |error: ArrayError| format!("--ids: {error}");
    let Some(text) = &args.ids else {
        let metadata = metadata.ok_or("--ids: is missing; give a file with one id per line")?;
        let usual = ID_COLUMNS.into_iter().find(|name| metadata.column(name).is_some());
        let column = usual.ok_or_else(|| {
            format!("--ids: is missing; name a column: {}", metadata.missing(ID_COLUMNS[0]))
        })?;
        return metadata.ids(column).map_err(of_ids);
    };
    let (path, column) = split_member(text);
    if let (Some(metadata), false) = (metadata, path.exists()) {
        return metadata.ids(text).map_err(of_ids);
    }
    if ["parquet", "csv", "tsv"].iter().any(|extension| has_extension(&path, extension)) {
        let columns = read_columns(&path, "--ids")?;
        let names: Vec<&str> = columns.names().collect();
        let column = match (column, names.as_slice()) {
            (Some(column), _) => column,
            (None, [only]) => only,
            _ => {
                return Err(format!(
                    "--ids: name one of its columns as FILE:COLUMN; it has {}",
                    names.join(", ")
                ));
            }
        };
        return columns.ids(column).map_err(of_ids);
    }
    let lines = read_text_file(&path, "--ids").map_err(|error| error.to_string())?;
    Ok(IdColumn::from_lines(text, &lines))
}

fn has_extension(path: &Path, extension: &str) -> bool {
    path.extension().is_some_and(|found| found.eq_ignore_ascii_case(extension))
}

fn make_plan(
    inputs: Inputs,
    config: &Config,
    encoders: &dyn Encoders,
) -> Result<ImportPlan, CommandError> {
    let Inputs { images, ids, metadata, columns } = inputs;
    let rules = ImportRules {
        dimension: encoders.card().dimension,
        ordering: config.source.ordering,
        attribute_types: &config.attributes,
        max_clock_skew: TimeDelta::seconds(config.source.max_clock_skew_seconds.into()),
        now: Utc::now(),
    };
    ImportPlan::new(images, &ids, metadata.as_ref(), &columns, &rules).map_err(|errors| {
        let lines: Vec<String> = errors.iter().map(ToString::to_string).collect();
        CommandError::usage(lines.join("\n"))
    })
}

/// Prints what was read.
fn report_plan(plan: &ImportPlan, output: Output) {
    let ImportPlan { images, unused_columns, .. } = plan;
    output.line(format_args!(
        "{}: {} embeddings of {} values",
        images.name(),
        images.rows(),
        images.dimension()
    ));
    let not_unit = images.count_not_unit();
    if not_unit > 0 {
        output.line(format_args!("{not_unit} embeddings were not of length 1 and are normalised."));
    }
    if !unused_columns.is_empty() {
        output.line(format_args!(
            "Columns that are not stored, because [attributes] does not declare them: {}",
            unused_columns.join(", ")
        ));
    }
}

/// Returns the error of rows that cannot be stored.
fn refuse_faults(plan: &ImportPlan) -> CommandError {
    let mut text = format!(
        "{}: {} of {} rows cannot be stored, and nothing was; correct them, or leave them out with --skip-invalid",
        plan.images.name(),
        plan.faults.len(),
        plan.rows.len()
    );
    for fault in plan.faults.iter().take(MAX_PRINTED_FAULTS) {
        text = format!("{text}\n  row {}: {}", fault.row, fault.reason);
    }
    if plan.faults.len() > MAX_PRINTED_FAULTS {
        let more = plan.faults.len() - MAX_PRINTED_FAULTS;
        text = format!("{text}\n  and {more} more; --json lists all of them");
    }
    CommandError::usage(text)
}

/// Embeds a sample of the images again, and prints how far it agrees.
async fn compare_with_model(
    plan: &ImportPlan,
    config: &Config,
    encoders: &Arc<dyn Encoders>,
    output: Output,
    token: &CancellationToken,
) -> Result<Agreement, CommandError> {
    let fetcher = Fetcher::new(&config.fetch).context("fetch").map_err(CommandError::Usage)?;
    let with_address = plan.rows.iter().flatten().filter(|image| image.uri.is_some()).count();
    let bar = progress_bar("compared", with_address.min(SAMPLED_IMAGES) as u64)?;
    let progress = || bar.inc(1);
    let agreement =
        measure_agreement(plan, encoders, &fetcher, &config.decode, &progress, token).await?;
    bar.finish_and_clear();
    let model = &encoders.card().name;
    match (agreement.median(), agreement.cosines.first()) {
        (Some(median), Some((row, least))) => output.line(format_args!(
            "Compared with what {model} computes of {} of {} sampled images: median cosine {median:.4}, least {least:.4} (row {row})",
            agreement.cosines.len(),
            agreement.sampled
        )),
        _ if agreement.sampled > 0 => output.line(format_args!(
            "NOT compared with {model}: none of {} sampled images could be read, for example {}",
            agreement.sampled,
            agreement.unreadable.as_deref().unwrap_or("none")
        )),
        _ => output.line(format_args!(
            "NOT compared with {model}: no row has an address (--uri)"
        )),
    }
    Ok(agreement)
}

/// Stores the rows of a plan, and prints how many.
async fn store(
    plan: &ImportPlan,
    config: &Config,
    encoders: &Arc<dyn Encoders>,
    output: Output,
    token: &CancellationToken,
) -> Result<ImportSummary, CommandError> {
    let store = open_store(config).await?;
    let FilledGeneration { generation, active_sets, .. } =
        FilledGeneration::open(config, &store, &**encoders, &actor("bsap import")).await?;
    let mut writer =
        TableWriter::open(&store, &generation, config.table.max_commit_attempts).await?;
    // Prompt sets that are added in the meantime are followed, as workers do it.
    let followed = tokio::spawn(backfill::follow_prompt_sets(
        store.clone(),
        generation.id.clone(),
        active_sets.clone(),
        encoders.clone(),
        Duration::from_millis(config.table.state_poll_ms),
        token.child_token(),
    ));
    let row_bytes = plan.images.dimension() * size_of::<f32>();
    let import = Import {
        plan,
        ordering: config.source.ordering,
        prompt_sets: active_sets,
        rows_per_commit: config
            .ingest
            .commit_rows
            .min((config.ingest.commit_mib << 20) / row_bytes)
            .max(1),
    };
    let bar = progress_bar("stored", plan.rows.len() as u64)?;
    let summary = import.run(&mut writer, &|done| bar.set_position(done as u64), token).await;
    bar.finish_and_clear();
    followed.abort();
    let summary = summary?;
    output.line(format_args!(
        "{} rows are stored in generation {} ({}){}",
        summary.stored,
        generation.id,
        generation.model_name,
        match summary.already_stored {
            0 => String::new(),
            n => format!("; {n} were stored before"),
        }
    ));
    if import.plan.rows.iter().flatten().any(|row| row.version.is_none()) {
        output.line(format_args!("{}", describe_start_version(config.source.ordering)));
    }
    Ok(summary)
}

/// Says which version rows without one have.
fn describe_start_version(ordering: VersionOrdering) -> &'static str {
    match ordering {
        VersionOrdering::EventTime => {
            "Their version is the time of the import's start: later events replace them."
        }
        VersionOrdering::Sequence | VersionOrdering::Offset | VersionOrdering::Sequencer => {
            "They are older than every event, because only a time can be compared with the import's start."
        }
    }
}
