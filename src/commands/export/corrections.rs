//! `bsap export corrections`: α and β of every image.

use std::collections::{BTreeSet, HashMap};
use std::path::{Path, PathBuf};

use clap::Args;
use serde_json::{Value, json};
use tokio_util::sync::CancellationToken;

use crate::balance::normalise::{AffineTransform, Normaliser};
use crate::catalogue::CatalogueState;
use crate::commands::shared::catalogue::open_catalogue;
use crate::commands::shared::configuration::{load_config, with_quiet_logging};
use crate::commands::shared::error::{CommandError, CommandResult, path_error, write_json};
use crate::commands::shared::evaluation::{embed_prompt_sets, load_live_corpus};
use crate::commands::shared::models::{configured_generation, load_configured_model};
use crate::commands::shared::printing::Output;
use crate::commands::shared::query_files::read_text_file;
use crate::commands::shared::runtime::run_with_logging;
use crate::config::Config;
use crate::evaluate::{
    BaseConfiguration, ConfigurationResolver, ConfigurationSpec, Corpus, CorrectionFormat,
    Corrections, RankingConfiguration,
};
use crate::record::ImageId;
use crate::store::Store;
use crate::table::{Follower, TableError};

/// Ids that a message names.
const MAX_NAMED_IDS: usize = 5;

/// `bsap export corrections`.
#[derive(Debug, Args)]
#[command(after_long_help = "\
Examples:
  bsap export corrections --out corrections.parquet
  bsap export corrections --ids ids.txt --out corrections.npy
  bsap export corrections --configuration live --configuration live,normaliser=nnn,weight=1 --out both.csv
  bsap export corrections --since 1842 --out changed.csv --json

The balanced score of an image is alpha · cosine + beta. Both are numbers of the image, the same for every query: \
keep them next to the vectors, and sort by that sum. docs/next-to-your-search.md shows it for pgvector and \
OpenSearch, and says when to export again.

Parquet and CSV have the columns image_id, alpha and beta; with several configurations the name of each follows \
alpha and beta. NPY has the numbers alone, in the order of --ids. An image that the catalogue does not have is null \
(NPY: NaN). A configuration is written as for `bsap evaluate`: live, candidate, or settings that differ from it.")]
pub struct ExportCorrectionsArgs {
    /// File to write: .parquet, .csv or .npy
    #[arg(long, value_name = "FILE")]
    pub out: PathBuf,
    /// Images and their order: a text file with one id per line; by default all images, by id
    #[arg(long, value_name = "FILE")]
    pub ids: Option<PathBuf>,
    /// Only images that were added, changed or deleted after this version of the table; deleted ones are null
    #[arg(long, value_name = "VERSION", conflicts_with = "ids")]
    pub since: Option<u64>,
    /// Configuration to export; several are exported next to each other
    #[arg(long = "configuration", value_name = "SPEC", default_value = "live", value_parser = |text: &str| ConfigurationSpec::try_from(text))]
    pub configurations: Vec<ConfigurationSpec>,
    /// Print what was exported as JSON, or write it into FILE
    #[arg(long, value_name = "FILE", num_args = 0..=1)]
    #[allow(clippy::option_option)]
    pub json: Option<Option<PathBuf>>,
}

/// Writes α and β of the images of the live table.
pub fn run(args: &ExportCorrectionsArgs, config_file: Option<&Path>) -> CommandResult {
    let format = CorrectionFormat::from_path(&args.out).ok_or_else(|| {
        CommandError::usage(format!(
            "--out: {} does not end in .parquet, .csv or .npy; choose one of them",
            args.out.display()
        ))
    })?;
    if format == CorrectionFormat::Npy && args.ids.is_none() {
        return Err(CommandError::usage(
            "--ids: is missing; an .npy file has no ids, so that they must be given",
        ));
    }
    let ids = args.ids.as_deref().map(read_ids).transpose()?;
    let config = with_quiet_logging(load_config(config_file)?);
    run_with_logging(config, |config, token| export(args, format, ids, config, token))
}

/// Reads one id per line.
fn read_ids(path: &Path) -> Result<Vec<String>, CommandError> {
    let text = read_text_file(path, "--ids")?;
    let mut problems = Vec::new();
    let mut ids = Vec::new();
    for (line, id) in (1..).zip(text.lines()) {
        match ImageId::new(id.trim()) {
            Ok(id) => ids.push(id.as_str().to_owned()),
            Err(error) => problems.push(format!("line {line}: {error}")),
        }
    }
    if ids.is_empty() && problems.is_empty() {
        problems.push("has no ids".into());
    }
    if problems.is_empty() {
        return Ok(ids);
    }
    let more = problems.len().saturating_sub(MAX_NAMED_IDS);
    problems.truncate(MAX_NAMED_IDS);
    if more > 0 {
        problems.push(format!("and {more} more lines"));
    }
    Err(CommandError::usage(format!("--ids: {}: {}", path.display(), problems.join("; "))))
}

async fn export(
    args: &ExportCorrectionsArgs,
    format: CorrectionFormat,
    ids: Option<Vec<String>>,
    config: Config,
    token: CancellationToken,
) -> CommandResult {
    let output = Output::new(args.json == Some(None));
    let (store, state) = open_catalogue(&config).await?;
    check_specs(args, &state)?;
    let encoders = load_configured_model(&config)?;
    state.live.ensure_compatible(&configured_generation(&config, &*encoders))?;
    let sets = embed_prompt_sets(&state, &*encoders)?;
    let corpus = load_live_corpus(&store, &state, encoders, &token).await?;
    let table_version = corpus.tables.first().map_or(0, |table| table.model_info.table_version);
    let (selected, is_complete) = match (&ids, args.since) {
        (Some(ids), _) => (ids.clone(), true),
        (None, Some(since)) => match changed_ids(&store, &state, since).await? {
            Some(changed) => (changed, false),
            None => {
                output.line(format_args!(
                    "The log no longer has all commits after version {since}: all images are exported."
                ));
                (all_ids(&corpus), true)
            }
        },
        (None, None) => (all_ids(&corpus), true),
    };
    let mut resolver = ConfigurationResolver::new(
        &corpus,
        Some(&state),
        state.serving.clone(),
        sets,
        config.prompts.statistics_settings(),
    );
    let mut corrections = Corrections { image_ids: selected, configurations: Vec::new() };
    let mut described = Vec::new();
    for spec in &args.configurations {
        let configuration = resolver.resolve(spec).map_err(CommandError::usage)?;
        let affines = tokio::task::block_in_place(|| {
            select_affines(&configuration, &mut resolver, &corpus, &corrections.image_ids)
        });
        described.push(describe(&configuration, &state));
        corrections.configurations.push((configuration.name.clone(), affines));
    }
    let unknown = unknown_ids(&corrections);
    corrections.write(&args.out, format).map_err(|e| path_error("--out", &args.out, &e))?;
    let rows = corrections.image_ids.len();
    output.line(format_args!(
        "{rows} images at version {table_version} of the table are written to {}",
        args.out.display()
    ));
    if !unknown.is_empty() {
        let named = unknown[..unknown.len().min(MAX_NAMED_IDS)].join(", ");
        let what = if args.since.is_some() { "were deleted" } else { "are not in the catalogue" };
        output.line(format_args!(
            "{} of them {what} and are null, for example {named}",
            unknown.len()
        ));
    }
    let result = json!({
        "table_version": table_version,
        "state_revision": state.revision,
        "generation": state.live.id,
        "complete": is_complete,
        "rows": rows,
        "unknown": unknown,
        "columns": corrections.columns(),
        "configurations": described,
    });
    write_json(&result, args.json.as_ref())
}

/// Refuses configurations that cannot be exported as the arguments say.
fn check_specs(args: &ExportCorrectionsArgs, state: &CatalogueState) -> Result<(), CommandError> {
    let mut names = BTreeSet::new();
    for spec in &args.configurations {
        let refuse = |reason: &str| {
            Err(CommandError::usage(format!("--configuration {}: {reason}", spec.label())))
        };
        if spec.reads_standby(state) {
            return refuse(
                "reads the standby generation; make model.checkpoint the model of an index, and promote it first",
            );
        }
        if !names.insert(spec.label()) {
            return refuse("is given twice; give each a name of its own (name=…)");
        }
        let candidate = state.candidate.as_ref();
        let serving = match (spec.base, candidate) {
            (Some(BaseConfiguration::Candidate), Some(candidate)) => &candidate.serving,
            _ => &state.serving,
        };
        let normaliser = spec.normaliser.unwrap_or(serving.normaliser);
        let is_frozen = spec.is_unmodified_base() && serving.scale.is_some();
        let depends_on_all = matches!(normaliser, Normaliser::Zscore | Normaliser::Range);
        if args.since.is_some() && depends_on_all && !is_frozen {
            return refuse(
                "its scale constants come from all images, so that a change of some changes α and β of all; export all images, without --since",
            );
        }
    }
    Ok(())
}

fn all_ids(corpus: &Corpus) -> Vec<String> {
    corpus.images.iter().map(|image| image.image_id.to_string()).collect()
}

/// Returns the ids of the images that were changed or deleted after version `since` of the live table, in order;
/// `None` if the log no longer has all commits after it.
async fn changed_ids(
    store: &Store,
    state: &CatalogueState,
    since: u64,
) -> Result<Option<Vec<String>>, CommandError> {
    let follower = Follower::open_after(store, &state.live, since).await;
    let mut follower = follower.map_err(|error| match error {
        error @ TableError::Mismatch { .. } => CommandError::usage(format!("--since: {error}")),
        error => CommandError::from(error),
    })?;
    let mut ids = BTreeSet::new();
    while let Some(changes) = follower.next(&|_, _| {}).await? {
        if changes.is_full_snapshot {
            return Ok(None);
        }
        ids.extend(changes.rows.iter().map(|row| row.image_id.to_string()));
    }
    Ok(Some(ids.into_iter().collect()))
}

/// Returns α and β of the images `ids` under a configuration.
fn select_affines(
    configuration: &RankingConfiguration,
    resolver: &mut ConfigurationResolver<'_>,
    corpus: &Corpus,
    ids: &[String],
) -> Vec<Option<AffineTransform>> {
    let by_image = configuration.prompt_set.as_ref().map(|set| {
        let statistics = resolver.cached_statistics(0, set);
        let scale = set.softmax_scale();
        let affine = |s| configuration.balance.affine_transform(s, scale);
        statistics.iter().map(affine).collect::<Vec<_>>()
    });
    // The live table is the only one, so that its rows are in the order of all images.
    let positions: HashMap<&str, usize> =
        corpus.images.iter().enumerate().map(|(i, image)| (image.image_id.as_str(), i)).collect();
    let of_id = |id: &String| {
        let position = *positions.get(id.as_str())?;
        Some(by_image.as_ref().map_or(AffineTransform::RAW, |affines| affines[position]))
    };
    ids.iter().map(of_id).collect()
}

/// Returns the ids that have no correction, in order.
fn unknown_ids(corrections: &Corrections) -> Vec<String> {
    let Some((_, affines)) = corrections.configurations.first() else { return Vec::new() };
    let ids = corrections.image_ids.iter().zip(affines);
    ids.filter(|(_, affine)| affine.is_none()).map(|(id, _)| id.clone()).collect()
}

fn describe(configuration: &RankingConfiguration, state: &CatalogueState) -> Value {
    let balance = &configuration.balance;
    let set = configuration.prompt_set.as_ref().map(|set| &set.statistics_key);
    json!({
        "name": configuration.name,
        "prompt_set": set.unwrap_or(&state.serving.prompt_set),
        "normaliser": balance.normaliser,
        "weight": balance.weight,
        "lambda": balance.lambda,
        "scale": balance.scale,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_lines_that_are_no_ids_are_named() {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), "a\n\nb\n").unwrap();
        let error = read_ids(file.path()).unwrap_err().to_string();
        assert!(error.contains("line 2: image_id: is empty"), "{error}");
        std::fs::write(file.path(), " a \r\nb\n").unwrap();
        assert_eq!(read_ids(file.path()).unwrap(), ["a", "b"]);
        std::fs::write(file.path(), "").unwrap();
        assert!(read_ids(file.path()).unwrap_err().to_string().contains("has no ids"));
        std::fs::write(file.path(), "\n".repeat(9)).unwrap();
        let error = read_ids(file.path()).unwrap_err().to_string();
        assert!(error.ends_with("and 4 more lines"), "{error}");
    }
}
