//! `bsap reindex`: statistics for another prompt set, or a generation by another model.

use std::path::Path;

use anyhow::Context;
use chrono::Utc;
use clap::{Args, Subcommand};
use tokio_util::sync::CancellationToken;

use super::shared::catalogue::{actor, open_catalogue};
use super::shared::configuration::{load_config, with_quiet_logging};
use super::shared::error::{CommandError, CommandResult};
use super::shared::models::{configured_generation, load_configured_model};
use super::shared::printing::print_line;
use super::shared::progress::progress_bar;
use super::shared::prompt_statistics::store_statistics;
use super::shared::runtime::run_with_logging;
use crate::backfill::{ReembedPlan, set_up_standby, withdraw_standby};
use crate::balance::statistics::StatisticsSettings;
use crate::catalogue::{CatalogueState, StandbyGeneration};
use crate::config::Config;
use crate::kafka;
use crate::prompts::{EmbeddedPromptSet, PromptSet};
use crate::publish::Publisher;
use crate::reconcile::default_temp_folder;
use crate::record::TopicPartition;
use crate::table::{self, BackfillSource};

/// `bsap reindex`.
#[derive(Debug, Args)]
#[command(after_long_help = "\
Examples:
  bsap reindex statistics --prompt-set mine.toml --dry-run    show what it would do
  bsap reindex statistics --prompt-set mine.toml              do it, while workers run
  bsap reindex model --checkpoint openai/clip-vit-large-patch14   another model, as the standby

Safe to stop at any time and to run again, also on several machines at once: committed work is kept.")]
pub struct ReindexArgs {
    /// What to do.
    #[command(subcommand)]
    pub action: ReindexAction,
}

/// What `bsap reindex` does.
#[derive(Debug, Subcommand)]
pub enum ReindexAction {
    /// Compute the statistics of every stored row for a prompt set, from stored embeddings; no image
    /// is fetched. Workers compute them for new rows as soon as it starts
    Statistics(ReindexStatisticsArgs),
    /// Fill a standby generation by another model: workers of that model consume the live events, and
    /// embed the stored images again
    Model(ReindexModelArgs),
}

/// `bsap reindex statistics`.
#[derive(Debug, Args)]
#[command(after_long_help = "\
The model selects the generation: model.checkpoint is that of the live generation, or that of the \
standby generation (`bsap reindex model`), which has prompt sets of its own.")]
pub struct ReindexStatisticsArgs {
    /// Name of a shipped set, or path of a TOML file
    #[arg(long, value_name = "NAME|FILE")]
    pub prompt_set: String,
    /// How many of the largest scores of an image `nnn` averages; by default prompts.top_k
    #[arg(long, value_parser = clap::value_parser!(u16).range(1..=4096))]
    pub top_k: Option<u16>,
    /// Temperature of `softmax`; by default prompts.temperature
    #[arg(long, value_parser = parse_temperature)]
    pub temperature: Option<f32>,
    /// Print what would be done, and change nothing
    #[arg(long)]
    pub dry_run: bool,
}

/// `bsap reindex model`.
#[derive(Debug, Args)]
#[command(after_long_help = "\
Sets up the generation, then requests on source.reindex_topic that every stored image that it lacks \
be embedded again. Workers with this checkpoint as model.checkpoint do it: start some. Run the command \
again when they are done: it requests what is still missing, and reports what cannot be fetched. Images \
that only the standby generation has are counted and not changed.

The exit code is 1 if stored images cannot be embedded again.")]
pub struct ReindexModelArgs {
    /// The new model: a folder in the Hugging Face layout, or a model of the hub
    #[arg(long, value_name = "FOLDER|ID", required_unless_present = "withdraw")]
    pub checkpoint: Option<String>,
    /// Images requested per second, at most
    #[arg(long, default_value_t = 500, value_parser = clap::value_parser!(u32).range(1..=100_000))]
    pub rate: u32,
    /// Print what is missing; change and send nothing
    #[arg(long)]
    pub dry_run: bool,
    /// Stop filling the standby generation; its table is kept
    #[arg(long, conflicts_with_all = ["checkpoint", "dry_run"])]
    pub withdraw: bool,
    /// Folder for sorting, some hundred bytes per image; by default the system's temporary folder
    #[arg(long, value_name = "FOLDER")]
    pub temp_dir: Option<std::path::PathBuf>,
}

/// Computes statistics of stored rows, or fills a standby generation by another model.
pub fn run(args: &ReindexArgs, config_file: Option<&Path>) -> CommandResult {
    let config = with_quiet_logging(load_config(config_file)?);
    match &args.action {
        ReindexAction::Statistics(args) => {
            run_with_logging(config, |config, token| reindex_statistics(args, config, token))
        }
        ReindexAction::Model(args) => {
            run_with_logging(config, |config, token| reindex_model(args, config, token))
        }
    }
}

/// Computes the statistics of every stored row for a prompt set: of the standby generation if the
/// configured model is that of it, otherwise of the live one.
async fn reindex_statistics(
    args: &ReindexStatisticsArgs,
    config: Config,
    token: CancellationToken,
) -> CommandResult {
    let set = PromptSet::load_builtin_or_file(&args.prompt_set).map_err(CommandError::usage)?;
    let (store, state) = open_catalogue(&config).await?;
    let encoders = load_configured_model(&config)?;
    let generation = configured_generation(&config, &*encoders);
    if state.is_standby(&generation) {
        print_line!("standby generation {} ({}):", generation.id, generation.model_name);
    } else {
        state.live.ensure_compatible(&generation)?;
    }
    if let Some(warning) = set.script_warning(&*encoders) {
        print_line!("WARNING: {warning}");
    }
    let settings = StatisticsSettings {
        top_k: args.top_k.map_or(config.prompts.top_k, usize::from),
        temperature: args.temperature.unwrap_or(config.prompts.temperature),
    };
    let set = set.embed(&*encoders, settings)?;
    let stored = state.prompt_sets_of_generation(&generation.id).unwrap_or_default();
    let is_known = stored.iter().any(|record| record.key == set.statistics_key);
    let (pending, coverage) = BackfillSource::open(&store, &generation)
        .await?
        .list_pending_files_and_coverage(&set.statistics_key)
        .await?;
    print_line!(
        "{}: {} prompts; {} of {} rows have its statistics, {} files are to be measured",
        set.statistics_key,
        set.prompt_set.texts.len(),
        coverage.covered,
        coverage.rows,
        pending.len()
    );
    if args.dry_run {
        if !is_known {
            print_line!(
                "The set would be added to the catalogue, so that new rows have its statistics."
            );
        }
        print_line!("Nothing was changed.");
        return Ok(());
    }
    let command = "bsap reindex statistics";
    store_statistics(&config, &store, &state, &generation, set, command, &token).await?;
    Ok(())
}

/// Sets up a standby generation by another model, and requests the images that it lacks; with
/// `--withdraw` stops filling it.
async fn reindex_model(
    args: &ReindexModelArgs,
    config: Config,
    token: CancellationToken,
) -> CommandResult {
    let (store, mut state) = open_catalogue(&config).await?;
    let changed_by = actor("bsap reindex model");
    let Some(checkpoint) = &args.checkpoint else {
        match withdraw_standby(&store, &changed_by).await? {
            Some(withdrawn) => {
                print_line!("{} is no longer filled; its table is kept", withdrawn.id);
            }
            None => print_line!("there is no standby generation"),
        }
        return Ok(());
    };
    let mut standby_config = config.clone();
    standby_config.model.checkpoint.clone_from(checkpoint);
    standby_config.model.revision.clone_from(&config.search.standby_revision);
    let standby = build_standby_generation(&standby_config, &state)?;
    let standby_generation = &standby.generation;
    let partitions = topic_partitions(&config, &config.source.topic).await?;
    let reembed_partitions = reindex_topic_partitions(&config).await?;
    if !args.dry_run {
        let attempts = config.table.max_commit_attempts;
        state =
            set_up_standby(&store, &standby, &partitions, attempts, &changed_by, &token).await?;
        print_line!(
            "generation {} ({}) is the standby from revision {} of the state on; start workers with \
             model.checkpoint = {checkpoint}",
            standby_generation.id,
            standby_generation.model_name,
            state.revision
        );
    } else if state.standby.is_none() {
        print_line!(
            "generation {} ({}) would be set up as the standby",
            standby_generation.id,
            standby_generation.model_name
        );
        print_line!("Nothing was changed.");
        return Ok(());
    }
    let pending =
        count_pending_messages(&config, &store, &state, &reembed_partitions, &token).await?;
    if pending > 0 {
        print_line!(
            "{pending} messages of {} are not processed yet; run this again when they are",
            config.source.reindex_topic
        );
        return Ok(());
    }
    let folder = args.temp_dir.clone().unwrap_or_else(default_temp_folder);
    let plan = ReembedPlan::from_generations(
        &store,
        &state.live,
        standby_generation,
        &config.attributes,
        &folder,
    )
    .await?;
    print_line!(
        "{} of {} images are up to date in it; {} are to be embedded again, {} to be deleted",
        plan.up_to_date_images,
        plan.live_images,
        plan.images_to_reembed,
        plan.deletes_to_send
    );
    if plan.standby_only_images > 0 {
        print_line!(
            "{} more images are only in it, for example {}: deleted in the live table so long ago that the \
             tombstone is gone (maintenance.tombstone_retention_days), dead-lettered by the live workers \
             (bsap dead-letters), or not processed by them yet. Delete unwanted ones by \
             `bsap publish --delete`",
            plan.standby_only_images,
            plan.standby_only_example_id.as_deref().unwrap_or_default()
        );
    }
    let (expected_messages, inline) =
        (plan.images_to_reembed + plan.deletes_to_send, plan.inline_images);
    let example = plan.inline_example_id.clone().unwrap_or_default();
    if args.dry_run {
        print_line!("Nothing was changed.");
    } else if expected_messages > 0 {
        let publisher = Publisher::new(&config.kafka, &config.source.reindex_topic)?;
        let bar = progress_bar("requested", expected_messages)?;
        let on_sent = |sent| bar.set_position(sent);
        let sent = plan
            .publish_events(&publisher, &standby_generation.id, args.rate, &token, on_sent)
            .await?;
        bar.finish_and_clear();
        print_line!("{sent} messages sent to {}", config.source.reindex_topic);
        if sent < expected_messages {
            return Err(anyhow::anyhow!("interrupted; run it again for the rest").into());
        }
    }
    if inline > 0 {
        return Err(anyhow::anyhow!(
            "{inline} images were sent inline, for example {example}, and cannot be fetched again; publish \
             them again"
        )
        .into());
    }
    Ok(())
}

/// Returns the generation of the model of `config`, with the prompt sets of the live one.
fn build_standby_generation(
    config: &Config,
    state: &CatalogueState,
) -> anyhow::Result<StandbyGeneration> {
    let encoders = load_configured_model(config)?;
    let mut prompt_sets = Vec::with_capacity(state.prompt_sets.len());
    for record in &state.prompt_sets {
        prompt_sets.push(EmbeddedPromptSet::from_record(record, &*encoders)?.to_record());
    }
    Ok(StandbyGeneration {
        generation: configured_generation(config, &*encoders),
        checkpoint: config.model.checkpoint.clone(),
        prompt_sets,
        since: Utc::now(),
    })
}

/// Returns all partitions of a topic; none if it does not exist.
async fn topic_partitions(config: &Config, topic: &str) -> anyhow::Result<Vec<TopicPartition>> {
    let watermarks = kafka::fetch_watermarks(&config.kafka, topic).await?;
    Ok(watermarks
        .into_keys()
        .map(|number| TopicPartition { topic: topic.into(), number })
        .collect())
}

/// Returns the partitions of `source.reindex_topic`; an error if it does not exist.
async fn reindex_topic_partitions(config: &Config) -> Result<Vec<TopicPartition>, CommandError> {
    let topic = &config.source.reindex_topic;
    let partitions = topic_partitions(config, topic).await?;
    if partitions.is_empty() {
        return Err(CommandError::usage(format!(
            "source.reindex_topic: there is no topic {topic}; create it, with as many partitions as {}",
            config.source.topic
        )));
    }
    Ok(partitions)
}

/// Returns how many messages of `source.reindex_topic` the standby generation has not stored yet.
async fn count_pending_messages(
    config: &Config,
    store: &crate::store::Store,
    state: &CatalogueState,
    reembed_partitions: &[TopicPartition],
    token: &CancellationToken,
) -> anyhow::Result<i64> {
    let standby = state.standby.as_ref().context("the generation was withdrawn in the meantime")?;
    let attempts = config.table.max_commit_attempts;
    let mut positions = table::open_existing_writer(store, &standby.generation, attempts).await?;
    let watermarks = kafka::fetch_watermarks(&config.kafka, &config.source.reindex_topic).await?;
    let mut pending = 0;
    for partition in reembed_partitions {
        let position = positions.read_position(partition, token).await?.unwrap_or_default();
        let (low, end) = watermarks.get(&partition.number).copied().unwrap_or_default();
        pending += (end - position.max(low)).max(0);
    }
    Ok(pending)
}

fn parse_temperature(text: &str) -> Result<f32, String> {
    let (min, max) = (StatisticsSettings::MIN_TEMPERATURE, StatisticsSettings::MAX_TEMPERATURE);
    let number = text.parse().ok().filter(|t| StatisticsSettings::is_valid_temperature(*t));
    number.ok_or_else(|| format!("{text:?} is not a number from {min} to {max}"))
}
