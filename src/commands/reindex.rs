//! `bsap reindex`.

use std::sync::Arc;

use anyhow::Context;
use chrono::Utc;
use tokio_util::sync::CancellationToken;

use super::cli::reindex::{ReindexModelArgs, StatisticsArgs};
use super::{Done, Failure, parts};
use crate::backfill::{Job, Missing, add_set, set_up, withdraw};
use crate::catalogue::{Beside, CatalogueState};
use crate::config::Config;
use crate::kafka;
use crate::prompts::{EmbeddedSet, PromptSet};
use crate::publish::Publisher;
use crate::reconcile::temporary_folder;
use crate::record::Partition;
use crate::table::{self, Stored};

/// Computes the statistics of every stored row for a prompt set: of the live generation, or of the one
/// beside it where the model is that one's.
pub async fn statistics(args: &StatisticsArgs, config: Config, token: CancellationToken) -> Done {
    let set = PromptSet::load(&args.prompt_set).map_err(Failure::usage)?;
    let (store, state) = parts::catalogue(&config).await?;
    let towers = parts::towers(&config)?;
    let generation = parts::generation(&config, &*towers);
    if state.is_beside(&generation) {
        say!("generation {} ({}), beside the live one:", generation.id, generation.model_name);
    } else {
        state.live.expect(&generation)?;
    }
    if let Some(warning) = set.warning(&*towers) {
        say!("WARNING: {warning}");
    }
    let top_k = args.top_k.map_or(config.prompts.top_k, usize::from);
    let set = set.embed(&*towers, top_k)?;
    let stored = state.sets_of(&generation.id).unwrap_or_default();
    let known = stored.iter().any(|record| record.key == set.key);
    let (pending, coverage) = Stored::open(&store, &generation).await?.pending(&set.key).await?;
    say!(
        "{}: {} prompts; {} of {} rows have its statistics, {} files are to be measured",
        set.key,
        set.set.texts.len(),
        coverage.covered,
        coverage.rows,
        pending.len()
    );
    if args.dry_run {
        if !known {
            say!("The set would be made known to the catalogue, so that new rows carry it.");
        }
        say!("Nothing was changed.");
        return Ok(());
    }
    if !known {
        let by = parts::actor("bsap reindex statistics");
        let state = add_set(&store, &generation, &set, &by).await?;
        say!(
            "The set is known from revision {} of the state on: new rows carry it.",
            state.revision
        );
    }
    let job = Job {
        settle: parts::settle(&config),
        attempts: config.table.commit_attempts,
        lanes: parts::lanes(),
        catalogue: store,
        generation,
        set: Arc::new(set),
    };
    let bar = super::bar("rows", coverage.rows as u64)?;
    let progress = |coverage: &crate::table::Coverage, _: usize| {
        bar.set_length(coverage.rows as u64);
        bar.set_position(coverage.covered as u64);
    };
    let started = std::time::Instant::now();
    let done = job.run(&progress, &token).await?;
    bar.finish_and_clear();
    say!(
        "{} rows in {} files were measured here in {:.1} s",
        done.rows,
        done.files,
        started.elapsed().as_secs_f64()
    );
    if done.complete {
        say!("Every stored row has the statistics of {}.", job.set.key);
    } else {
        say!("interrupted; what is done is done, run it again for the rest");
    }
    Ok(())
}

/// Sets up a generation by another model, and asks for what it lacks.
pub async fn model(args: &ReindexModelArgs, config: Config, token: CancellationToken) -> Done {
    let (store, mut state) = parts::catalogue(&config).await?;
    let by = parts::actor("bsap reindex model");
    let Some(checkpoint) = &args.checkpoint else {
        match withdraw(&store, &by).await? {
            Some(before) => say!("{} is filled no longer; its table stays", before.id),
            None => say!("no generation stands beside the live one"),
        }
        return Ok(());
    };
    let mut of_new = config.clone();
    of_new.model.checkpoint.clone_from(checkpoint);
    of_new.model.revision.clone_from(&config.search.candidate_revision);
    let beside = beside(&of_new, &state)?;
    let new = &beside.generation;
    let partitions = partitions(&config, &config.source.topic).await?;
    let again = partitions_of_reindex(&config).await?;
    if !args.dry_run {
        let attempts = config.table.commit_attempts;
        state = set_up(&store, &beside, &partitions, attempts, &by).await?;
        say!(
            "generation {} ({}) stands beside the live one from revision {} of the state on; start \
             workers with model.checkpoint = {checkpoint}",
            new.id,
            new.model_name,
            state.revision
        );
    } else if state.beside.is_none() {
        say!("generation {} ({}) would be set up beside the live one", new.id, new.model_name);
        say!("Nothing was changed.");
        return Ok(());
    }
    let waiting = waiting(&config, &store, &state, &again).await?;
    if waiting > 0 {
        say!(
            "{waiting} messages of {} still wait; run this again when they are done",
            config.source.reindex_topic
        );
        return Ok(());
    }
    let folder = args.temp.clone().unwrap_or_else(temporary_folder);
    let missing = Missing::of(&store, &state.live, new, &config.attributes, &folder).await?;
    say!(
        "{} of {} images stand in it; {} are to be embedded again, {} deletes to be told",
        missing.same,
        missing.live,
        missing.images,
        missing.deletes
    );
    if missing.alone > 0 {
        say!(
            "{} more stand in it alone, for example {}: deleted in the live table and forgotten since \
             (upkeep.tombstone_days), put aside by its workers (bsap dead-letters), or not yet come to. What \
             is to go, delete by `bsap publish --delete`",
            missing.alone,
            missing.alone_example.as_deref().unwrap_or_default()
        );
    }
    let (wanted, inline) = (missing.images + missing.deletes, missing.inline);
    let example = missing.inline_example.clone().unwrap_or_default();
    if args.dry_run {
        say!("Nothing was changed.");
    } else if wanted > 0 {
        let publisher = Publisher::new(&config.kafka, &config.source.reindex_topic)?;
        let bar = super::bar("asked for", wanted)?;
        let sent =
            missing.send(&publisher, &new.id, args.rate, &token, |sent| bar.set_position(sent));
        let sent = sent.await?;
        bar.finish_and_clear();
        say!("{sent} messages sent to {}", config.source.reindex_topic);
        if sent < wanted {
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
fn beside(config: &Config, state: &CatalogueState) -> anyhow::Result<Beside> {
    let towers = parts::towers(config)?;
    let mut prompt_sets = Vec::with_capacity(state.prompt_sets.len());
    for record in &state.prompt_sets {
        prompt_sets.push(EmbeddedSet::from_record(record, &*towers)?.record());
    }
    Ok(Beside {
        generation: parts::generation(config, &*towers),
        checkpoint: config.model.checkpoint.clone(),
        prompt_sets,
        since: Utc::now(),
    })
}

async fn partitions(config: &Config, topic: &str) -> anyhow::Result<Vec<Partition>> {
    let logs = kafka::logs(&config.kafka, topic).await?;
    Ok(logs.into_keys().map(|number| Partition { topic: topic.into(), number }).collect())
}

async fn partitions_of_reindex(config: &Config) -> Result<Vec<Partition>, Failure> {
    let topic = &config.source.reindex_topic;
    let found = partitions(config, topic).await?;
    if found.is_empty() {
        return Err(Failure::usage(format!(
            "source.reindex_topic: there is no topic {topic}; create it, with as many partitions as {}",
            config.source.topic
        )));
    }
    Ok(found)
}

/// Messages of the topic of images to be embedded again that the new generation has not stored.
async fn waiting(
    config: &Config,
    store: &crate::store::Store,
    state: &CatalogueState,
    again: &[Partition],
) -> anyhow::Result<i64> {
    let beside = state.beside.as_ref().context("the generation was withdrawn meanwhile")?;
    let attempts = config.table.commit_attempts;
    let mut positions = table::positions(store, &beside.generation, attempts).await?;
    let logs = kafka::logs(&config.kafka, &config.source.reindex_topic).await?;
    let mut waiting = 0;
    for partition in again {
        let position = positions.position(partition).await?.unwrap_or_default();
        let (low, end) = logs.get(&partition.number).copied().unwrap_or_default();
        waiting += (end - position.max(low)).max(0);
    }
    Ok(waiting)
}
