//! `bsap status`.

use chrono::{DateTime, Utc};
use comfy_table::Table;
use comfy_table::presets::UTF8_HORIZONTAL_ONLY;
use serde::Serialize;
use serde_json::json;

use super::cli::table::StatusArgs;
use super::upkeep::mib;
use super::{Done, parts};
use crate::catalogue::{Beside, CatalogueState, Generation};
use crate::config::Config;
use crate::kafka;
use crate::record::Partition;
use crate::store::Store;
use crate::table::{self, Coverage, Overview, Stored, TableError};

/// Where one partition stands.
struct Standing {
    number: i32,
    /// The offset after the last stored one.
    position: Option<i64>,
    /// Begin and end of Kafka's log.
    log: (i64, i64),
}

impl Standing {
    /// Messages that are not stored yet.
    fn lag(&self) -> i64 {
        (self.log.1 - self.position.unwrap_or_default().max(self.log.0)).max(0)
    }

    /// Whether more was stored than Kafka has: the topic is another one of the same name.
    fn is_beyond(&self) -> bool {
        self.position.is_some_and(|position| position > self.log.1)
    }
}

/// Prints what is stored, how it is served, and how far ingestion is behind.
pub async fn run(args: &StatusArgs, config: Config) -> Done {
    let (store, state) = parts::catalogue(&config).await?;
    let overview = Overview::of(&store, &state.live, &config.upkeep).await?;
    let coverages = coverages(&store, &state).await?;
    let standings = standings(&config, &store, &state.live, &config.source.topic).await;
    let beside = match &state.beside {
        Some(beside) => Some(BesideStatus::of(&config, &store, beside).await?),
        None => None,
    };
    if args.json {
        let partitions = match &standings {
            Ok(standings) => json!(
                standings
                    .iter()
                    .map(|s| json!({
                        "partition": s.number, "position": s.position,
                        "low": s.log.0, "end": s.log.1, "lag": s.lag(), "beyond_end": s.is_beyond(),
                    }))
                    .collect::<Vec<_>>()
            ),
            Err(_) => json!(null),
        };
        let problem = standings.as_ref().err().map(|e| format!("{e:#}"));
        say!(
            "{}",
            json!({"state": state, "table": overview, "coverage": coverages, "partitions": partitions, "beside": beside, "kafka_error": problem})
        );
        return Ok(());
    }
    show(&config, &store, &state, &overview, &coverages);
    if let (Some(beside), Some(status)) = (&state.beside, &beside) {
        status.show(beside);
    }
    match standings {
        Err(error) => say!("\nlag         unknown: {error:#}"),
        Ok(standings) => {
            let lag: i64 = standings.iter().map(Standing::lag).sum();
            say!("\nlag         {lag} messages of {} are not stored yet", config.source.topic);
            if !config.source.replay.is_empty() {
                say!("            as the replay {} has come (source.replay)", config.source.replay);
            }
            if standings.iter().any(Standing::is_beyond) {
                say!(
                    "            some positions lie beyond Kafka's end: the topic was made anew, and workers refuse it; docs/ingestion.md says what to do"
                );
            }
            let mut table = Table::new();
            table.load_style(UTF8_HORIZONTAL_ONLY);
            table.set_header(["partition", "stored up to", "Kafka has", "lag"]);
            for s in standings {
                let position = s.position.map_or("nothing".into(), |p| p.to_string());
                let log = format!("{} to {}", s.log.0, s.log.1);
                table.add_row([s.number.to_string(), position, log, s.lag().to_string()]);
            }
            say!("{table}");
        }
    }
    Ok(())
}

/// How much of the table has the statistics of each known prompt set.
async fn coverages(store: &Store, state: &CatalogueState) -> Result<Vec<Coverage>, TableError> {
    let mut stored = Stored::open(store, &state.live).await?;
    let mut coverages = Vec::with_capacity(state.prompt_sets.len());
    for set in &state.prompt_sets {
        coverages.push(stored.pending(&set.key).await?.1);
    }
    Ok(coverages)
}

fn show(
    config: &Config,
    store: &Store,
    state: &CatalogueState,
    overview: &Overview,
    coverages: &[Coverage],
) {
    let serving = &state.serving;
    say!("catalogue   {}", store.url());
    say!(
        "state       revision {} of {}, by {}",
        state.revision,
        state.at.format("%Y-%m-%d %H:%M:%S UTC"),
        state.by
    );
    say!(
        "generation  {} ({}, dimension {}, ordered by {})",
        state.live.id,
        state.live.model_name,
        state.live.dimension,
        state.live.ordering.name()
    );
    say!(
        "serving     {} at weight {}, {}",
        serving.normaliser.name(),
        serving.weight,
        serving.prompt_set
    );
    for (set, coverage) in state.prompt_sets.iter().zip(coverages) {
        say!(
            "prompt set  {} ({} prompts, since {}; {} of {} rows have it)",
            set.key,
            set.texts.len(),
            set.since.format("%Y-%m-%d %H:%M UTC"),
            coverage.covered,
            coverage.rows
        );
    }
    let rows = overview.rows.map_or("an unknown number of".into(), |rows| rows.to_string());
    say!(
        "table       version {} (commits since {}), {} files, {}, {rows} rows with superseded ones",
        overview.version,
        overview.oldest_version,
        overview.files,
        mib(overview.bytes)
    );
    say!("newest row  {}", ago(overview.newest_row));
    say!(
        "compaction  {} files wait; last merge {}, last look at every row {}",
        overview.pending_files,
        ago(overview.compacted),
        ago(overview.compacted_deep)
    );
    if config.upkeep.every_seconds == 0 {
        say!("            workers do not compact (upkeep.every_seconds is 0)");
    }
}

fn ago(time: Option<DateTime<Utc>>) -> String {
    let Some(time) = time else { return "never".into() };
    let seconds = (Utc::now() - time).num_seconds().max(0);
    match seconds {
        0..120 => format!("{seconds} s ago"),
        120..7_200 => format!("{} min ago", seconds / 60),
        7_200..172_800 => format!("{} h ago", seconds / 3_600),
        _ => format!("{} days ago", seconds / 86_400),
    }
}

/// How far the generation beside the live one is.
#[derive(Serialize)]
struct BesideStatus {
    table: Overview,
    /// Live events that it has not stored; none where Kafka does not say.
    live_lag: Option<i64>,
    /// Images that it is asked for and has not stored; none where Kafka does not say.
    again_lag: Option<i64>,
}

impl BesideStatus {
    async fn of(config: &Config, store: &Store, beside: &Beside) -> anyhow::Result<Self> {
        let lag = async |topic: &str| {
            let standings = standings(config, store, &beside.generation, topic).await.ok()?;
            Some(standings.iter().map(Standing::lag).sum())
        };
        Ok(Self {
            table: Overview::of(store, &beside.generation, &config.upkeep).await?,
            live_lag: lag(&config.source.topic).await,
            again_lag: lag(&config.source.reindex_topic).await,
        })
    }

    fn show(&self, beside: &Beside) {
        let number = |n: Option<i64>| n.map_or("an unknown number of".into(), |n| n.to_string());
        let rows = self.table.rows.map(|rows| rows as i64);
        say!(
            "beside      {} ({}, since {}), filled by workers with model.checkpoint = {}",
            beside.generation.id,
            beside.generation.model_name,
            beside.since.format("%Y-%m-%d %H:%M UTC"),
            beside.checkpoint
        );
        say!(
            "            {} rows with superseded ones, newest {}; {} live events and {} images to be embedded again wait",
            number(rows),
            ago(self.table.newest_row),
            number(self.live_lag),
            number(self.again_lag)
        );
    }
}

async fn standings(
    config: &Config,
    store: &Store,
    generation: &Generation,
    topic: &str,
) -> anyhow::Result<Vec<Standing>> {
    let logs = kafka::logs(&config.kafka, topic).await?;
    let positions = table::positions(store, generation, config.table.commit_attempts).await?;
    let mut positions = positions.replaying(&config.source.replay);
    let mut standings = Vec::with_capacity(logs.len());
    for (number, log) in logs {
        let partition = Partition { topic: topic.into(), number };
        let position = positions.position(&partition).await?;
        standings.push(Standing { number, position, log });
    }
    Ok(standings)
}
