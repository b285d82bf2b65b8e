//! Sets up the standby generation of another model and fills it with the images that are stored
//! already.
//!
//! Workers with the new model fill it with live events, from the positions of the live table when
//! it is set up. Images that only the live table has are sent to them as events that keep their
//! versions. Deletes are sent too: otherwise an older event that arrives late would bring a deleted
//! image back.

use std::fs::File;
use std::io::{self, BufRead, BufReader, BufWriter, Seek, Write};
use std::path::Path;
use std::time::Duration;

use futures::future::try_join_all;
use serde::{Deserialize, Serialize};
use tokio::time::{MissedTickBehavior, interval};
use tokio_util::sync::CancellationToken;
use tracing::info;

use super::error::BackfillError;
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

/// The rate of events is divided into this many batches per second.
const SEND_BATCHES_PER_SECOND: u32 = 10;

/// Adds `standby` to the state, and starts its table at the positions that the live table has in
/// `partitions` now. Does nothing if the state has it already.
pub async fn set_up_standby(
    catalogue: &Store,
    standby: &StandbyGeneration,
    partitions: &[TopicPartition],
    max_commit_attempts: u32,
    actor: &str,
    cancel: &CancellationToken,
) -> Result<CatalogueState, BackfillError> {
    let states = StateStore::new(catalogue);
    let id = &standby.generation.id;
    // Whether the state lacks the generation; an error if it cannot be added.
    let is_to_be_added = |state: &CatalogueState| -> Result<bool, BackfillError> {
        if state.live.id == *id {
            return Err(BackfillError::Refused(format!(
                "{} fills the live generation {id} already; name another model",
                standby.checkpoint
            )));
        }
        match &state.standby {
            Some(other) if other.generation.id != *id => Err(BackfillError::Refused(format!(
                "generation {} ({}) is the standby; withdraw it first: bsap reindex model --withdraw",
                other.generation.id, other.generation.model_name
            ))),
            other => Ok(other.is_none()),
        }
    };
    if let Some(state) = states.read_newest().await? {
        if !is_to_be_added(&state)? {
            return Ok(state);
        }
        // Positions before the state: a worker that reads the state must find them.
        let mut live = TableWriter::open(catalogue, &state.live, max_commit_attempts).await?;
        let mut new =
            TableWriter::open(catalogue, &standby.generation, max_commit_attempts).await?;
        for partition in partitions {
            let stored = live.read_stored_position(partition, cancel).await?;
            let new_stored = new.read_stored_position(partition, cancel).await?;
            if let (Some(next_offset), None) = (stored.next_offset, new_stored.next_offset) {
                let batch = PartitionBatch {
                    partition: partition.clone(),
                    // The first log of this table, whichever one it is of the live table.
                    log_number: new_stored.log_number,
                    anchor: stored.anchor,
                    last_message: stored.last_message,
                    expected_position: None,
                    next_offset,
                    rows: Vec::new(),
                };
                new.append(vec![batch], cancel).await?;
            }
        }
    }
    states
        .update(actor, |mut state| {
            if !is_to_be_added(&state)? {
                return Ok(None);
            }
            state.standby = Some(standby.clone());
            state.change = StateChange::Standby { generation: id.clone() };
            Ok(Some(state))
        })
        .await
}

/// Removes the standby generation from the state and returns it; `None` if there is none. Its table
/// remains.
pub async fn withdraw_standby(
    catalogue: &Store,
    actor: &str,
) -> Result<Option<Generation>, BackfillError> {
    let states = StateStore::new(catalogue);
    let standby = states.read_newest().await?.and_then(|state| state.standby);
    let Some(withdrawn) = standby.map(|standby| standby.generation) else { return Ok(None) };
    states
        .update(actor, |mut state| {
            let candidate = state.candidate.as_ref().filter(|c| c.generation == withdrawn.id);
            if let Some(candidate) = candidate {
                return Err(BackfillError::Refused(format!(
                    "candidate {} reads generation {}; withdraw the candidate first",
                    candidate.name, withdrawn.id
                )));
            }
            if state.standby.take().is_none() {
                return Ok(None);
            }
            state.change = StateChange::Standby { generation: withdrawn.id.clone() };
            Ok(Some(state))
        })
        .await?;
    Ok(Some(withdrawn))
}

/// The events that bring the standby generation up to the live one, and their numbers.
#[derive(Debug)]
pub struct ReembedPlan {
    /// Number of images of the live table.
    pub live_images: u64,
    /// Number of those whose version the standby generation has.
    pub up_to_date_images: u64,
    /// Number of the others whose bytes came in the event, so that they cannot be fetched again.
    pub inline_images: u64,
    /// Id of one of these.
    pub inline_example_id: Option<String>,
    /// Number of images to embed again.
    pub images_to_reembed: u64,
    /// Number of deletes that the standby generation lacks.
    pub deletes_to_send: u64,
    /// Number of images that only the standby generation has.
    pub standby_only_images: u64,
    /// Id of one of these.
    pub standby_only_example_id: Option<String>,
    /// One [`ReembedEvent`] per line, JSON.
    event_lines: BufReader<File>,
}

/// An event of a [`ReembedPlan`], with the version that it keeps.
#[derive(Serialize, Deserialize)]
struct ReembedEvent {
    event: ImageEvent,
    sequence: String,
}

impl ReembedPlan {
    /// Compares two generations; rows and events are stored in temporary files in `folder`.
    pub async fn from_generations(
        catalogue: &Store,
        live: &Generation,
        standby: &Generation,
        attributes: &AttributeTypes,
        folder: &Path,
    ) -> Result<Self, BackfillError> {
        let live = read_current_rows(catalogue, live, folder).await?;
        let standby = read_current_rows(catalogue, standby, folder).await?;
        let (attributes, folder) = (attributes.clone(), folder.to_owned());
        let compared = tokio::task::spawn_blocking(move || {
            let file = tempfile::tempfile_in(folder)?;
            Self::from_sorted_rows(live, standby, &attributes, file)
        });
        let compared =
            compared.await.map_err(|panic| BackfillError::Panicked(panic.to_string()))?;
        compared.map_err(BackfillError::TempFolder)
    }

    /// Compares rows that are sorted by image, and writes the events to `file`.
    fn from_sorted_rows(
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
            inline_example_id: None,
            images_to_reembed: 0,
            deletes_to_send: 0,
            standby_only_images: 0,
            standby_only_example_id: None,
            event_lines: BufReader::new(file),
        };
        for pair in merge_join_by_image(live, standby) {
            let to_send = match pair? {
                (Some(live), standby) => plan.select_entry_to_send(live, standby.as_ref()),
                (None, Some(standby)) if !standby.version.deleted => {
                    plan.standby_only_images += 1;
                    plan.standby_only_example_id.get_or_insert(standby.image_id);
                    None
                }
                (None, _) => None,
            };
            if let Some(entry) = to_send {
                serde_json::to_writer(&mut events, &to_reembed_event(entry, attributes))?;
                events.write_all(b"\n")?;
            }
        }
        events.flush()?;
        plan.event_lines.rewind()?;
        Ok(plan)
    }

    /// Counts a row of the live table, and returns it if it must be sent. `standby` is the row of
    /// the same image in the standby generation.
    fn select_entry_to_send(
        &mut self,
        live: InventoryEntry,
        standby: Option<&InventoryEntry>,
    ) -> Option<InventoryEntry> {
        let deleted = live.version.deleted;
        self.live_images += u64::from(!deleted);
        if standby.is_some_and(|standby| version_key(standby) >= version_key(&live)) {
            self.up_to_date_images += u64::from(!deleted);
            return None;
        }
        if deleted {
            self.deletes_to_send += 1;
        } else if live.uri.is_some() {
            self.images_to_reembed += 1;
        } else {
            self.inline_images += 1;
            self.inline_example_id.get_or_insert(live.image_id);
            return None;
        }
        Some(live)
    }

    /// Sends the events to the workers of `generation`, at most `rate` per second. Returns how many
    /// were sent, which is fewer than all if `cancel` was cancelled. Calls `on_event` with that
    /// number after each batch.
    pub async fn publish_events(
        self,
        publisher: &Publisher,
        generation: &str,
        rate: u32,
        cancel: &CancellationToken,
        mut on_event: impl FnMut(u64),
    ) -> Result<u64, BackfillError> {
        let mut tick = interval(Duration::from_secs(1) / SEND_BATCHES_PER_SECOND);
        tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut lines = self.event_lines.lines();
        let (mut sent, mut due) = (0, 0);
        loop {
            tokio::select! {
                _ = tick.tick() => {}
                () = cancel.cancelled() => break,
            }
            // Rates below one event per batch add up until an event is due.
            due += rate;
            let now = due / SEND_BATCHES_PER_SECOND;
            due %= SEND_BATCHES_PER_SECOND;
            if now == 0 {
                continue;
            }
            let mut batch = Vec::new();
            for line in lines.by_ref().take(now as usize) {
                let line = line.map_err(BackfillError::TempFolder)?;
                let event: ReembedEvent = serde_json::from_str(&line)
                    .map_err(|e| BackfillError::TempFolder(io::Error::from(e)))?;
                batch.push(event);
            }
            if batch.is_empty() {
                break;
            }
            let sends = batch.iter().map(|reembed_event| async move {
                let headers = [
                    (reembed::GENERATION_HEADER, generation),
                    (reembed::SEQUENCE_HEADER, reembed_event.sequence.as_str()),
                ];
                publisher.send_with_headers(&reembed_event.event, &headers).await
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
        embedding: None,
        model: None,
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

    /// The live generation has removed their tombstones, or its workers dead-lettered them: both
    /// are possible.
    #[test]
    fn images_only_in_the_standby_are_counted_and_not_sent() {
        let live = [entry("a", 1, false, 1), entry("c", 2, true, 1)].map(Ok).into_iter();
        let standby = [entry("a", 1, false, 1), entry("b", 7, false, 1), entry("e", 1, true, 1)];
        let standby = standby.map(Ok).into_iter();
        let file = tempfile::tempfile().unwrap();
        let plan =
            ReembedPlan::from_sorted_rows(live, standby, &AttributeTypes::new(), file).unwrap();
        assert_eq!(
            (
                plan.live_images,
                plan.up_to_date_images,
                plan.deletes_to_send,
                plan.standby_only_images
            ),
            (1, 1, 1, 1)
        );
        assert_eq!(plan.standby_only_example_id.as_deref(), Some("b"));
        let events = plan.event_lines.lines().map(|line| {
            let ReembedEvent { event, sequence } = serde_json::from_str(&line.unwrap()).unwrap();
            (event.image_id, event.operation, sequence)
        });
        let sequence = SequenceKey::from_number(2).as_str().to_owned();
        assert_eq!(events.collect::<Vec<_>>(), [("c".to_owned(), Operation::Delete, sequence)]);
    }
}
