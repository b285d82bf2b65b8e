//! Another model: a generation of its own, filled beside the live one.
//!
//! Workers that are given the new model feed it with live events, from where the live table stands
//! when it is set up. What the live table has and the new one lacks is sent to them as events that keep
//! their versions, deletes included: an old event that comes late must not bring back what was
//! deleted.

use std::fs::File;
use std::io::{self, BufRead, BufReader, BufWriter, Seek, Write};
use std::path::Path;
use std::time::Duration;

use futures::future::try_join_all;
use serde::{Deserialize, Serialize};
use tokio::time::{MissedTickBehavior, interval};
use tokio_util::sync::CancellationToken;
use tracing::info;

use super::ReindexError;
use super::generation_gap::{merge_join_by_image, version_key};
use crate::catalogue::{CatalogueState, StandbyGeneration, StateChange, StateStore};
use crate::ingest::source::ImageEvent;
use crate::ingest::source::decoder::reembed;
use crate::publish::{Publisher, attributes_to_json};
use crate::reconcile::read_current_rows;
use crate::record::{AttributeTypes, Operation, TopicPartition};
use crate::store::Store;
use crate::table::{Generation, InventoryEntry, PartitionBatch, TableWriter};
use crate::telemetry::event;

/// How often events are sent within a second.
const TICKS_PER_SECOND: u32 = 10;

/// Makes `beside` a generation that live events feed, from where the live table stands now in each of
/// `partitions`. Safe to be called again.
pub async fn set_up_standby(
    catalogue: &Store,
    standby: &StandbyGeneration,
    partitions: &[TopicPartition],
    attempts: u32,
    by: &str,
    cancel: &CancellationToken,
) -> Result<CatalogueState, ReindexError> {
    let states = StateStore::new(catalogue);
    let id = &standby.generation.id;
    let fits = |state: &CatalogueState| -> Result<bool, ReindexError> {
        if state.live.id == *id {
            return Err(ReindexError::Refused(format!(
                "{} fills the live generation {id} already; name another model",
                standby.checkpoint
            )));
        }
        match &state.standby {
            Some(other) if other.generation.id != *id => Err(ReindexError::Refused(format!(
                "generation {} ({}) stands beside the live one; withdraw it first: bsap reindex model --withdraw",
                other.generation.id, other.generation.model_name
            ))),
            other => Ok(other.is_none()),
        }
    };
    if let Some(state) = states.read_newest().await? {
        if !fits(&state)? {
            return Ok(state);
        }
        // Before the state says so: a worker that starts must find the positions.
        let mut live = TableWriter::open(catalogue, &state.live, attempts).await?;
        let mut new = TableWriter::open(catalogue, &standby.generation, attempts).await?;
        for partition in partitions {
            let (from, known) = (
                live.read_position(partition, cancel).await?,
                new.read_position(partition, cancel).await?,
            );
            if let (Some(next_offset), None) = (from, known) {
                let partition = partition.clone();
                let rows = Vec::new();
                let batch =
                    PartitionBatch { partition, expected_position: None, next_offset, rows };
                new.append(vec![batch], cancel).await?;
            }
        }
    }
    states
        .update(by, |mut state| {
            if !fits(&state)? {
                return Ok(None);
            }
            state.standby = Some(standby.clone());
            state.change = StateChange::Standby { generation: id.clone() };
            Ok(Some(state))
        })
        .await
}

/// Takes the generation beside the live one out of the state. Its table stays.
pub async fn withdraw_standby(
    catalogue: &Store,
    by: &str,
) -> Result<Option<Generation>, ReindexError> {
    let states = StateStore::new(catalogue);
    let before = states.read_newest().await?.and_then(|state| state.standby);
    let Some(before) = before.map(|beside| beside.generation) else { return Ok(None) };
    states
        .update(by, |mut state| {
            let candidate = state.candidate.as_ref().filter(|c| c.generation == before.id);
            if let Some(candidate) = candidate {
                return Err(ReindexError::Refused(format!(
                    "candidate {} reads generation {}; withdraw the candidate first",
                    candidate.name, before.id
                )));
            }
            if state.standby.take().is_none() {
                return Ok(None);
            }
            state.change = StateChange::Standby { generation: before.id.clone() };
            Ok(Some(state))
        })
        .await?;
    Ok(Some(before))
}

/// What the live table has and the generation beside it lacks.
#[derive(Debug)]
pub struct ReembedPlan {
    /// Images that are there in the live table.
    pub live_images: u64,
    /// Of them, those whose version the other generation has.
    pub up_to_date_images: u64,
    /// Of them, those that came inline: nobody can fetch them again.
    pub inline_images: u64,
    /// One of these.
    pub inline_example: Option<String>,
    /// Images to be embedded again.
    pub images_to_reembed: u64,
    /// Deletes that the other generation does not know.
    pub deletes_to_send: u64,
    /// Images that the other generation alone has.
    pub standby_only_images: u64,
    /// One of them.
    pub standby_only_example: Option<String>,
    event_lines: BufReader<File>,
}

/// An event of [`Missing`], with the version that it keeps.
#[derive(Serialize, Deserialize)]
struct ReembedEvent {
    event: ImageEvent,
    sequence: String,
}

impl ReembedPlan {
    /// Compares two generations, in the order of the ids, through files in `folder`.
    pub async fn compare(
        catalogue: &Store,
        live: &Generation,
        standby: &Generation,
        attributes: &AttributeTypes,
        folder: &Path,
    ) -> Result<Self, ReindexError> {
        let live = read_current_rows(catalogue, live, folder).await?;
        let beside = read_current_rows(catalogue, standby, folder).await?;
        let (attributes, folder) = (attributes.clone(), folder.to_owned());
        let compared = tokio::task::spawn_blocking(move || {
            let file = tempfile::tempfile_in(folder)?;
            Self::compare_sorted(live, beside, &attributes, file)
        });
        let compared = compared.await.map_err(|panic| ReindexError::Panicked(panic.to_string()))?;
        compared.map_err(ReindexError::TempFolder)
    }

    /// The events are written to `file`.
    fn compare_sorted(
        live: impl Iterator<Item = io::Result<InventoryEntry>>,
        standby: impl Iterator<Item = io::Result<InventoryEntry>>,
        attributes: &AttributeTypes,
        file: File,
    ) -> io::Result<Self> {
        let mut events = BufWriter::new(file.try_clone()?);
        let mut plan = Self {
            live_images: 0,
            up_to_date_images: 0,
            inline_images: 0,
            inline_example: None,
            images_to_reembed: 0,
            deletes_to_send: 0,
            standby_only_images: 0,
            standby_only_example: None,
            event_lines: BufReader::new(file),
        };
        for pair in merge_join_by_image(live, standby) {
            let to_send = match pair? {
                (Some(wanted), known) => plan.plan_entry(wanted, known.as_ref()),
                (None, Some(known)) if !known.version.deleted => {
                    plan.standby_only_images += 1;
                    plan.standby_only_example.get_or_insert(known.image_id);
                    None
                }
                (None, _) => None,
            };
            if let Some(told) = to_send {
                serde_json::to_writer(&mut events, &to_reembed_event(told, attributes))?;
                events.write_all(b"\n")?;
            }
        }
        events.flush()?;
        plan.event_lines.rewind()?;
        Ok(plan)
    }

    /// What is to be told of an image of the live table, of which the other one has `known`.
    fn plan_entry(
        &mut self,
        wanted: InventoryEntry,
        known: Option<&InventoryEntry>,
    ) -> Option<InventoryEntry> {
        let deleted = wanted.version.deleted;
        self.live_images += u64::from(!deleted);
        if known.is_some_and(|known| version_key(known) >= version_key(&wanted)) {
            self.up_to_date_images += u64::from(!deleted);
            return None;
        }
        if deleted {
            self.deletes_to_send += 1;
        } else if wanted.uri.is_some() {
            self.images_to_reembed += 1;
        } else {
            self.inline_images += 1;
            self.inline_example.get_or_insert(wanted.image_id);
            return None;
        }
        Some(wanted)
    }

    /// Sends them for `generation`, at most `rate` a second. Returns how many were sent: fewer than
    /// all where `token` was cancelled.
    pub async fn publish(
        self,
        publisher: &Publisher,
        generation: &str,
        rate: u32,
        token: &CancellationToken,
        mut on_event: impl FnMut(u64),
    ) -> Result<u64, ReindexError> {
        let mut tick = interval(Duration::from_secs(1) / TICKS_PER_SECOND);
        tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut lines = self.event_lines.lines();
        let (mut sent, mut due) = (0, 0);
        loop {
            tokio::select! {
                _ = tick.tick() => {}
                () = token.cancelled() => break,
            }
            // Tenths that are too small for an event add up.
            due += rate;
            let now = due / TICKS_PER_SECOND;
            due %= TICKS_PER_SECOND;
            if now == 0 {
                continue;
            }
            let mut batch = Vec::new();
            for line in lines.by_ref().take(now as usize) {
                let line = line.map_err(ReindexError::TempFolder)?;
                let wanted: ReembedEvent = serde_json::from_str(&line)
                    .map_err(|e| ReindexError::TempFolder(io::Error::from(e)))?;
                batch.push(wanted);
            }
            if batch.is_empty() {
                break;
            }
            let sends = batch.iter().map(|wanted| async move {
                let headers = [
                    (reembed::GENERATION_HEADER, generation),
                    (reembed::SEQUENCE_HEADER, wanted.sequence.as_str()),
                ];
                publisher.send_with_headers(&wanted.event, &headers).await
            });
            try_join_all(sends).await?;
            sent += batch.len() as u64;
            on_event(sent);
        }
        info!(event = event::PUBLISH, published = sent, skipped = 0_u64, "events published");
        Ok(sent)
    }
}

fn to_reembed_event(entry: InventoryEntry, types: &AttributeTypes) -> ReembedEvent {
    let deleted = entry.version.deleted;
    let event = ImageEvent {
        image_id: entry.image_id,
        operation: if deleted { Operation::Delete } else { Operation::Upsert },
        uri: entry.uri.filter(|_| !deleted),
        data: None,
        sequence: None,
        event_time: entry.event_time,
        attributes: attributes_to_json(&entry.attributes, types),
    };
    ReembedEvent { event, sequence: entry.version.sequence.as_str().to_owned() }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backfill::generation_gap::tests::entry;
    use crate::record::SequenceKey;

    /// Whether it was deleted and forgotten, or put aside by the live generation's workers, nobody knows.
    #[test]
    fn images_only_in_the_standby_are_counted_and_not_sent() {
        let live = [entry("a", 1, false, 1), entry("c", 2, true, 1)].map(Ok).into_iter();
        let beside = [entry("a", 1, false, 1), entry("b", 7, false, 1), entry("e", 1, true, 1)];
        let beside = beside.map(Ok).into_iter();
        let file = tempfile::tempfile().unwrap();
        let found =
            ReembedPlan::compare_sorted(live, beside, &AttributeTypes::new(), file).unwrap();
        assert_eq!(
            (
                found.live_images,
                found.up_to_date_images,
                found.deletes_to_send,
                found.standby_only_images
            ),
            (1, 1, 1, 1)
        );
        assert_eq!(found.standby_only_example.as_deref(), Some("b"));
        let told = found.event_lines.lines().map(|line| {
            let told: ReembedEvent = serde_json::from_str(&line.unwrap()).unwrap();
            (told.event.image_id, told.event.operation, told.sequence)
        });
        let sequence = SequenceKey::from_number(2).as_str().to_owned();
        assert_eq!(told.collect::<Vec<_>>(), [("c".to_owned(), Operation::Delete, sequence)]);
    }
}
