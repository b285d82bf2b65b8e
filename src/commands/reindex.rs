//! `bsap reindex`: statistics for another prompt set, or a generation by another model.

use std::path::Path;
use std::sync::Arc;

use anyhow::Context;
use chrono::Utc;
use clap::{Args, Subcommand};
use tokio_util::sync::CancellationToken;

use super::shared::catalogue::{actor, open_catalogue, reindex_parallelism, set_propagation_delay};
use super::shared::configuration::{load_config, with_quiet_logging};
use super::shared::error::{CommandError, CommandResult};
use super::shared::models::{configured_generation, load_encoders};
use super::shared::printing::print_line;
use super::shared::progress::progress_bar;
use super::shared::runtime::run_with_logging;
use crate::backfill::{
    ReembedPlan, StatisticsBackfill, add_prompt_set, set_up_standby, withdraw_standby,
};
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
  bsap reindex statistics --prompt-set mine.toml --dry-run    what it would do
  bsap reindex statistics --prompt-set mine.toml              do it, beside running workers
  bsap reindex model --checkpoint openai/clip-vit-large-patch14   another model, beside the live one

Safe to stop at any time and to start again, on several machines at once: what is committed stays.")]
pub struct ReindexArgs {
    /// What to do.
    #[command(subcommand)]
    pub action: ReindexAction,
}

/// What `bsap reindex` does.
#[derive(Debug, Subcommand)]
pub enum ReindexAction {
    /// Compute the statistics of every stored row for a prompt set, from stored embeddings; no image
    /// is fetched. Workers carry the set for new rows from the start on
    Statistics(ReindexStatisticsArgs),
    /// Fill a generation by another model beside the live one: live events feed it from the start on,
    /// stored images are embedded again by workers of that model
    Model(ReindexModelArgs),
}

/// `bsap reindex statistics`.
#[derive(Debug, Args)]
#[command(after_long_help = "\
The model says whose rows: model.checkpoint is the live generation's, or that of the one beside it \
(`bsap reindex model`), which has prompt sets of its own.")]
pub struct ReindexStatisticsArgs {
    /// Shipped name or path of a TOML file
    #[arg(long, value_name = "NAME|FILE")]
    pub prompt_set: String,
    /// How many of an image's largest scores `nnn` averages; prompts.top_k unless given
    #[arg(long, value_parser = clap::value_parser!(u16).range(1..=4096))]
    pub top_k: Option<u16>,
    /// Say what would be done, and change nothing
    #[arg(long)]
    pub dry_run: bool,
}

/// `bsap reindex model`.
#[derive(Debug, Args)]
#[command(after_long_help = "\
Sets the generation up, then asks for every stored image that it lacks to be embedded again, on \
source.reindex_topic. Workers with this checkpoint as model.checkpoint do it: start some. Run it again \
once they are done: it asks for what is still missing, and says what cannot be had. Images that only \
the other generation has are counted and left alone.

Ends with code 1 where stored images cannot be embedded again.")]
pub struct ReindexModelArgs {
    /// The new model: a folder in the Hugging Face layout, or a model of the hub
    #[arg(long, value_name = "FOLDER|ID", required_unless_present = "withdraw")]
    pub checkpoint: Option<String>,
    /// Images asked for a second, at most
    #[arg(long, default_value_t = 500, value_parser = clap::value_parser!(u32).range(1..=100_000))]
    pub rate: u32,
    /// Say what is missing, and change and send nothing
    #[arg(long)]
    pub dry_run: bool,
    /// Fill the generation beside the live one no longer; its table stays
    #[arg(long, conflicts_with_all = ["checkpoint", "dry_run"])]
    pub withdraw: bool,
    /// Folder for sorting, some hundred bytes an image; the system's temporary folder, unless given
    #[arg(long, value_name = "FOLDER")]
    pub temp_dir: Option<std::path::PathBuf>,
}

/// Computes statistics, or fills a generation by another model.
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

/// Computes the statistics of every stored row for a prompt set: of the live generation, or of the one
/// beside it where the model is that one's.
async fn reindex_statistics(
    args: &ReindexStatisticsArgs,
    config: Config,
    token: CancellationToken,
) -> CommandResult {
    let set = PromptSet::load(&args.prompt_set).map_err(CommandError::usage)?;
    let (store, state) = open_catalogue(&config).await?;
    let encoders = load_encoders(&config)?;
    let generation = configured_generation(&config, &*encoders);
    if state.is_standby(&generation) {
        print_line!(
            "generation {} ({}), beside the live one:",
            generation.id,
            generation.model_name
        );
    } else {
        state.live.ensure_compatible(&generation)?;
    }
    if let Some(warning) = set.script_warning(&*encoders) {
        print_line!("WARNING: {warning}");
    }
    let top_k = args.top_k.map_or(config.prompts.top_k, usize::from);
    let set = set.embed(&*encoders, top_k)?;
    let stored = state.prompt_sets_of_generation(&generation.id).unwrap_or_default();
    let known = stored.iter().any(|record| record.key == set.statistics_key);
    let (pending, coverage) = BackfillSource::open(&store, &generation)
        .await?
        .list_pending_files(&set.statistics_key)
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
        if !known {
            print_line!("The set would be made known to the catalogue, so that new rows carry it.");
        }
        print_line!("Nothing was changed.");
        return Ok(());
    }
    if !known {
        let by = actor("bsap reindex statistics");
        let state = add_prompt_set(&store, &generation, &set, &by).await?;
        print_line!(
            "The set is known from revision {} of the state on: new rows carry it.",
            state.revision
        );
    }
    let job = StatisticsBackfill {
        propagation_delay: set_propagation_delay(&config),
        max_commit_attempts: config.table.max_commit_attempts,
        max_concurrent_files: reindex_parallelism(),
        catalogue: store,
        generation,
        prompt_set: Arc::new(set),
    };
    let bar = progress_bar("rows", coverage.rows as u64)?;
    let progress = |coverage: &crate::table::StatisticsCoverage, _: usize| {
        bar.set_length(coverage.rows as u64);
        bar.set_position(coverage.covered as u64);
    };
    let started = std::time::Instant::now();
    let done = job.run(&progress, &token).await?;
    bar.finish_and_clear();
    print_line!(
        "{} rows in {} files were measured here in {:.1} s",
        done.measured_rows,
        done.measured_files,
        started.elapsed().as_secs_f64()
    );
    if done.complete {
        print_line!("Every stored row has the statistics of {}.", job.prompt_set.statistics_key);
    } else {
        print_line!("interrupted; what is done is done, run it again for the rest");
    }
    Ok(())
}

/// Sets up a generation by another model, and asks for what it lacks.
async fn reindex_model(
    args: &ReindexModelArgs,
    config: Config,
    token: CancellationToken,
) -> CommandResult {
    let (store, mut state) = open_catalogue(&config).await?;
    let by = actor("bsap reindex model");
    let Some(checkpoint) = &args.checkpoint else {
        match withdraw_standby(&store, &by).await? {
            Some(before) => print_line!("{} is filled no longer; its table stays", before.id),
            None => print_line!("no generation stands beside the live one"),
        }
        return Ok(());
    };
    let mut standby_config = config.clone();
    standby_config.model.checkpoint.clone_from(checkpoint);
    standby_config.model.revision.clone_from(&config.search.standby_revision);
    let standby = standby_generation(&standby_config, &state)?;
    let new = &standby.generation;
    let partitions = topic_partitions(&config, &config.source.topic).await?;
    let reembed_partitions = reindex_topic_partitions(&config).await?;
    if !args.dry_run {
        let attempts = config.table.max_commit_attempts;
        state = set_up_standby(&store, &standby, &partitions, attempts, &by, &token).await?;
        print_line!(
            "generation {} ({}) stands beside the live one from revision {} of the state on; start \
             workers with model.checkpoint = {checkpoint}",
            new.id,
            new.model_name,
            state.revision
        );
    } else if state.standby.is_none() {
        print_line!(
            "generation {} ({}) would be set up beside the live one",
            new.id,
            new.model_name
        );
        print_line!("Nothing was changed.");
        return Ok(());
    }
    let pending = pending_messages(&config, &store, &state, &reembed_partitions, &token).await?;
    if pending > 0 {
        print_line!(
            "{pending} messages of {} still wait; run this again when they are done",
            config.source.reindex_topic
        );
        return Ok(());
    }
    let folder = args.temp_dir.clone().unwrap_or_else(default_temp_folder);
    let missing =
        ReembedPlan::compare(&store, &state.live, new, &config.attributes, &folder).await?;
    print_line!(
        "{} of {} images stand in it; {} are to be embedded again, {} deletes to be told",
        missing.up_to_date_images,
        missing.live_images,
        missing.images_to_reembed,
        missing.deletes_to_send
    );
    if missing.standby_only_images > 0 {
        print_line!(
            "{} more stand in it alone, for example {}: deleted in the live table and forgotten since \
             (maintenance.tombstone_retention_days), put aside by its workers (bsap dead-letters), or not yet come to. What \
             is to go, delete by `bsap publish --delete`",
            missing.standby_only_images,
            missing.standby_only_example.as_deref().unwrap_or_default()
        );
    }
    let (expected_messages, inline) =
        (missing.images_to_reembed + missing.deletes_to_send, missing.inline_images);
    let example = missing.inline_example.clone().unwrap_or_default();
    if args.dry_run {
        print_line!("Nothing was changed.");
    } else if expected_messages > 0 {
        let publisher = Publisher::new(&config.kafka, &config.source.reindex_topic)?;
        let bar = progress_bar("asked for", expected_messages)?;
        let sent =
            missing.publish(&publisher, &new.id, args.rate, &token, |sent| bar.set_position(sent));
        let sent = sent.await?;
        bar.finish_and_clear();
        print_line!("{sent} messages sent to {}", config.source.reindex_topic);
        if sent < expected_messages {
            return Err(anyhow::anyhow!("interrupted; run it again for the rest").into());
        }
    }
    if inline > 0 {
        return Err(anyhow::anyhow!(
            "{inline} images came inline, for example {example}: nobody can fetch them again; publish \
             them anew"
        )
        .into());
    }
    Ok(())
}

/// The generation of the model of `config`, with the prompt sets of the live one.
fn standby_generation(
    config: &Config,
    state: &CatalogueState,
) -> anyhow::Result<StandbyGeneration> {
    let encoders = load_encoders(config)?;
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

async fn topic_partitions(config: &Config, topic: &str) -> anyhow::Result<Vec<TopicPartition>> {
    let logs = kafka::fetch_watermarks(&config.kafka, topic).await?;
    Ok(logs.into_keys().map(|number| TopicPartition { topic: topic.into(), number }).collect())
}

async fn reindex_topic_partitions(config: &Config) -> Result<Vec<TopicPartition>, CommandError> {
    let topic = &config.source.reindex_topic;
    let found = topic_partitions(config, topic).await?;
    if found.is_empty() {
        return Err(CommandError::usage(format!(
            "source.reindex_topic: there is no topic {topic}; create it, with as many partitions as {}",
            config.source.topic
        )));
    }
    Ok(found)
}

/// Messages of the topic of images to be embedded again that the new generation has not stored.
async fn pending_messages(
    config: &Config,
    store: &crate::store::Store,
    state: &CatalogueState,
    reembed_partitions: &[TopicPartition],
    token: &CancellationToken,
) -> anyhow::Result<i64> {
    let standby = state.standby.as_ref().context("the generation was withdrawn meanwhile")?;
    let attempts = config.table.max_commit_attempts;
    let mut positions = table::open_existing_writer(store, &standby.generation, attempts).await?;
    let logs = kafka::fetch_watermarks(&config.kafka, &config.source.reindex_topic).await?;
    let mut pending = 0;
    for partition in reembed_partitions {
        let position = positions.read_position(partition, token).await?.unwrap_or_default();
        let (low, end) = logs.get(&partition.number).copied().unwrap_or_default();
        pending += (end - position.max(low)).max(0);
    }
    Ok(pending)
}
