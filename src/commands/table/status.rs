//! `bsap status`: what is stored, how it is served, and how far ingestion is behind.

use std::path::Path;

use chrono::{DateTime, Utc};
use clap::Args;
use serde::Serialize;
use serde_json::json;
use tokio_util::sync::CancellationToken;

use super::formatting::{format_mebibytes, merge_objects};
use super::ingestion::{IngestionStatus, read_lag_messages};
use crate::catalogue::{CatalogueState, StandbyGeneration};
use crate::commands::shared::catalogue::open_catalogue;
use crate::commands::shared::configuration::{load_config_without_model, with_quiet_logging};
use crate::commands::shared::error::CommandResult;
use crate::commands::shared::printing::print_line;
use crate::commands::shared::runtime::run_with_logging;
use crate::config::Config;
use crate::diagnosis::redact::redact;
use crate::store::Store;
use crate::table::{BackfillSource, StatisticsCoverage, TableError, TableOverview};

/// `bsap status`.
#[derive(Debug, Args)]
pub struct StatusArgs {
    /// Print one JSON object
    #[arg(long)]
    pub json: bool,
}

/// Prints what is stored, how it is served, and how far ingestion is behind.
pub fn run(args: &StatusArgs, config_file: Option<&Path>) -> CommandResult {
    let config = with_quiet_logging(load_config_without_model(config_file)?);
    run_with_logging(config, |config, token| show_status(args, config, token))
}

/// Prints what is stored, how it is served, and how far ingestion is behind. Fails with the exit code of the
/// state if messages are not consumed.
async fn show_status(args: &StatusArgs, config: Config, token: CancellationToken) -> CommandResult {
    let (store, state) = open_catalogue(&config).await?;
    let overview = TableOverview::from_log(&store, &state.live, &config.maintenance).await?;
    let coverages = read_statistics_coverages(&store, &state).await?;
    let ingestion = IngestionStatus::load(&config, &store, &state.live, &token).await?;
    let standby = match &state.standby {
        Some(standby) => Some(StandbyStatus::load(&config, &store, standby, &token).await?),
        None => None,
    };
    if args.json {
        let status = json!({
            "catalogue": state, "table": overview, "coverage": coverages, "standby": standby,
        });
        print_line!("{}", merge_objects(status, ingestion.to_json()));
    } else {
        print_catalogue(&config, &store, &state, &overview, &coverages);
        if let (Some(standby), Some(status)) = (&state.standby, &standby) {
            status.print(standby);
        }
        ingestion.print(&config);
    }
    ingestion.into_result()
}

/// Returns how many rows of the table have the statistics of each prompt set, in the order of the
/// state.
async fn read_statistics_coverages(
    store: &Store,
    state: &CatalogueState,
) -> Result<Vec<StatisticsCoverage>, TableError> {
    let mut stored = BackfillSource::open(store, &state.live).await?;
    let mut coverages = Vec::with_capacity(state.prompt_sets.len());
    for set in &state.prompt_sets {
        coverages.push(stored.list_pending_files_and_coverage(&set.key).await?.1);
    }
    Ok(coverages)
}

/// Prints the catalogue state and its live table.
fn print_catalogue(
    config: &Config,
    store: &Store,
    state: &CatalogueState,
    overview: &TableOverview,
    coverages: &[StatisticsCoverage],
) {
    let serving = &state.serving;
    print_line!("catalogue   {}", redact(store.url().as_str()));
    print_line!(
        "state       revision {} of {}, by {}",
        state.revision,
        state.created_at.format("%Y-%m-%d %H:%M:%S UTC"),
        state.actor
    );
    print_line!(
        "generation  {} ({}, dimension {}, ordered by {})",
        state.live.id,
        state.live.model_name,
        state.live.dimension,
        state.live.ordering.as_str()
    );
    print_line!(
        "serving     {} at weight {}, {}",
        serving.normaliser.name(),
        serving.weight,
        serving.prompt_set
    );
    for (set, coverage) in state.prompt_sets.iter().zip(coverages) {
        print_line!(
            "prompt set  {} ({} prompts, since {}; {} of {} rows have it)",
            set.key,
            set.texts.len(),
            set.since.format("%Y-%m-%d %H:%M UTC"),
            coverage.covered,
            coverage.rows
        );
    }
    let rows = overview.rows.map_or("an unknown number of".into(), |rows| rows.to_string());
    print_line!(
        "table       version {} (commits since {}), {} files, {}, {rows} rows with superseded ones",
        overview.version,
        overview.oldest_version,
        overview.files,
        format_mebibytes(overview.bytes)
    );
    print_line!("newest row  {}", format_age(overview.newest_row_at));
    print_line!(
        "compaction  {} files to merge; last merge {}, last full compaction {}",
        overview.files_to_merge,
        format_age(overview.compacted_at),
        format_age(overview.fully_compacted_at)
    );
    if config.maintenance.interval_seconds == 0 {
        print_line!("            workers do not compact (maintenance.interval_seconds is 0)");
    }
}

/// Formats how long ago a time was; `None` is "never".
fn format_age(time: Option<DateTime<Utc>>) -> String {
    let Some(time) = time else { return "never".into() };
    let seconds = (Utc::now() - time).num_seconds().max(0);
    match seconds {
        0..120 => format!("{seconds} s ago"),
        120..7_200 => format!("{} min ago", seconds / 60),
        7_200..172_800 => format!("{} h ago", seconds / 3_600),
        _ => format!("{} days ago", seconds / 86_400),
    }
}

/// How far workers have filled the standby generation.
#[derive(Serialize)]
struct StandbyStatus {
    table: TableOverview,
    /// Live events that it has not stored yet; `None` if Kafka cannot be reached.
    live_lag_messages: Option<i64>,
    /// Requested images that it has not stored yet; `None` if Kafka cannot be reached.
    reembed_lag_messages: Option<i64>,
}

impl StandbyStatus {
    async fn load(
        config: &Config,
        store: &Store,
        standby: &StandbyGeneration,
        token: &CancellationToken,
    ) -> anyhow::Result<Self> {
        let lag = async |topic: &str| {
            read_lag_messages(config, store, &standby.generation, topic, token).await.ok()
        };
        Ok(Self {
            table: TableOverview::from_log(store, &standby.generation, &config.maintenance).await?,
            live_lag_messages: lag(&config.source.topic).await,
            reembed_lag_messages: lag(&config.source.reindex_topic).await,
        })
    }

    fn print(&self, standby: &StandbyGeneration) {
        let format_count =
            |n: Option<i64>| n.map_or("an unknown number of".into(), |n| n.to_string());
        let rows = self.table.rows.map(|rows| rows as i64);
        print_line!(
            "standby     {} ({}, since {}), filled by workers with model.checkpoint = {}",
            standby.generation.id,
            standby.generation.model_name,
            standby.since.format("%Y-%m-%d %H:%M UTC"),
            standby.checkpoint
        );
        print_line!(
            "            {} rows with superseded ones, newest {}; {} live events and {} images to be embedded again are not stored yet",
            format_count(rows),
            format_age(self.table.newest_row_at),
            format_count(self.live_lag_messages),
            format_count(self.reembed_lag_messages)
        );
    }
}
