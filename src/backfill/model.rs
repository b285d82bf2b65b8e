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
use super::coverage::{paired, version};
use crate::catalogue::{Beside, CatalogueState, Change, Generation, StateStore};
use crate::ingest::source::ImageEvent;
use crate::ingest::source::decoder::again;
use crate::publish::{Publisher, values};
use crate::reconcile::current;
use crate::record::{AttributeTypes, Operation, Partition};
use crate::store::Store;
use crate::table::{Entry, PartitionBatch, Writer};
use crate::telemetry::event;

/// How often events are sent within a second.
const TICKS: u32 = 10;

/// Makes `beside` a generation that live events feed, from where the live table stands now in each of
/// `partitions`. Safe to be called again.
pub async fn set_up(
    catalogue: &Store,
    beside: &Beside,
    partitions: &[Partition],
    attempts: u32,
    by: &str,
) -> Result<CatalogueState, ReindexError> {
    let states = StateStore::new(catalogue);
    let id = &beside.generation.id;
    let fits = |state: &CatalogueState| -> Result<bool, ReindexError> {
        if state.live.id == *id {
            return Err(ReindexError::Refused(format!(
                "{} fills the live generation {id} already; name another model",
                beside.checkpoint
            )));
        }
        match &state.beside {
            Some(other) if other.generation.id != *id => Err(ReindexError::Refused(format!(
                "generation {} ({}) stands beside the live one; withdraw it first: bsap reindex model --withdraw",
                other.generation.id, other.generation.model_name
            ))),
            other => Ok(other.is_none()),
        }
    };
    if let Some(state) = states.newest().await? {
        if !fits(&state)? {
            return Ok(state);
        }
        // Before the state says so: a worker that starts must find the positions.
        let mut live = Writer::open(catalogue, &state.live, attempts).await?;
        let mut new = Writer::open(catalogue, &beside.generation, attempts).await?;
        for partition in partitions {
            let (from, known) = (live.position(partition).await?, new.position(partition).await?);
            if let (Some(next_offset), None) = (from, known) {
                let partition = partition.clone();
                let rows = Vec::new();
                new.append(vec![PartitionBatch { partition, expected: None, next_offset, rows }])
                    .await?;
            }
        }
    }
    states
        .change(by, |mut state| {
            if !fits(&state)? {
                return Ok(None);
            }
            state.beside = Some(beside.clone());
            state.change = Change::Beside { generation: id.clone() };
            Ok(Some(state))
        })
        .await
}

/// Takes the generation beside the live one out of the state. Its table stays.
pub async fn withdraw(catalogue: &Store, by: &str) -> Result<Option<Generation>, ReindexError> {
    let states = StateStore::new(catalogue);
    let before = states.newest().await?.and_then(|state| state.beside);
    let Some(before) = before.map(|beside| beside.generation) else { return Ok(None) };
    states
        .change(by, |mut state| {
            let candidate = state.candidate.as_ref().filter(|c| c.generation == before.id);
            if let Some(candidate) = candidate {
                return Err(ReindexError::Refused(format!(
                    "candidate {} reads generation {}; withdraw the candidate first",
                    candidate.name, before.id
                )));
            }
            if state.beside.take().is_none() {
                return Ok(None);
            }
            state.change = Change::Beside { generation: before.id.clone() };
            Ok(Some(state))
        })
        .await?;
    Ok(Some(before))
}

/// What the live table has and the generation beside it lacks.
#[derive(Debug)]
pub struct Missing {
    /// Images that are there in the live table.
    pub live: u64,
    /// Of them, those whose version the other generation has.
    pub same: u64,
    /// Of them, those that came inline: nobody can fetch them again.
    pub inline: u64,
    /// One of these.
    pub inline_example: Option<String>,
    /// Images to be embedded again.
    pub images: u64,
    /// Deletes that the other generation does not know.
    pub deletes: u64,
    /// Images that the other generation alone has.
    pub alone: u64,
    /// One of them.
    pub alone_example: Option<String>,
    events: BufReader<File>,
}

/// An event of [`Missing`], with the version that it keeps.
#[derive(Serialize, Deserialize)]
struct Wanted {
    event: ImageEvent,
    sequence: String,
}

impl Missing {
    /// Compares two generations, in the order of the ids, through files in `folder`.
    pub async fn of(
        catalogue: &Store,
        live: &Generation,
        beside: &Generation,
        attributes: &AttributeTypes,
        folder: &Path,
    ) -> Result<Self, ReindexError> {
        let live = current(catalogue, live, folder).await?;
        let beside = current(catalogue, beside, folder).await?;
        let (attributes, folder) = (attributes.clone(), folder.to_owned());
        let compared = tokio::task::spawn_blocking(move || {
            let file = tempfile::tempfile_in(folder)?;
            Self::between(live, beside, &attributes, file)
        });
        let compared = compared.await.map_err(|panic| ReindexError::Broken(panic.to_string()))?;
        compared.map_err(ReindexError::Folder)
    }

    /// The events are written to `file`.
    fn between(
        live: impl Iterator<Item = io::Result<Entry>>,
        beside: impl Iterator<Item = io::Result<Entry>>,
        attributes: &AttributeTypes,
        file: File,
    ) -> io::Result<Self> {
        let mut events = BufWriter::new(file.try_clone()?);
        let mut missing = Self {
            live: 0,
            same: 0,
            inline: 0,
            inline_example: None,
            images: 0,
            deletes: 0,
            alone: 0,
            alone_example: None,
            events: BufReader::new(file),
        };
        for pair in paired(live, beside) {
            let told = match pair? {
                (Some(wanted), known) => missing.count(wanted, known.as_ref()),
                (None, Some(known)) if !known.version.deleted => {
                    missing.alone += 1;
                    missing.alone_example.get_or_insert(known.image_id);
                    None
                }
                (None, _) => None,
            };
            if let Some(told) = told {
                serde_json::to_writer(&mut events, &again_of(told, attributes))?;
                events.write_all(b"\n")?;
            }
        }
        events.flush()?;
        missing.events.rewind()?;
        Ok(missing)
    }

    /// What is to be told of an image of the live table, of which the other one has `known`.
    fn count(&mut self, wanted: Entry, known: Option<&Entry>) -> Option<Entry> {
        let deleted = wanted.version.deleted;
        self.live += u64::from(!deleted);
        if known.is_some_and(|known| version(known) >= version(&wanted)) {
            self.same += u64::from(!deleted);
            return None;
        }
        if deleted {
            self.deletes += 1;
        } else if wanted.uri.is_some() {
            self.images += 1;
        } else {
            self.inline += 1;
            self.inline_example.get_or_insert(wanted.image_id);
            return None;
        }
        Some(wanted)
    }

    /// Sends them for `generation`, at most `rate` a second. Returns how many were sent: fewer than
    /// all where `token` was cancelled.
    pub async fn send(
        self,
        publisher: &Publisher,
        generation: &str,
        rate: u32,
        token: &CancellationToken,
        mut on_event: impl FnMut(u64),
    ) -> Result<u64, ReindexError> {
        let mut tick = interval(Duration::from_secs(1) / TICKS);
        tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut lines = self.events.lines();
        let (mut sent, mut due) = (0, 0);
        loop {
            tokio::select! {
                _ = tick.tick() => {}
                () = token.cancelled() => break,
            }
            // Tenths that are too small for an event add up.
            due += rate;
            let now = due / TICKS;
            due %= TICKS;
            if now == 0 {
                continue;
            }
            let mut batch = Vec::new();
            for line in lines.by_ref().take(now as usize) {
                let line = line.map_err(ReindexError::Folder)?;
                let wanted: Wanted = serde_json::from_str(&line)
                    .map_err(|e| ReindexError::Folder(io::Error::from(e)))?;
                batch.push(wanted);
            }
            if batch.is_empty() {
                break;
            }
            let sends = batch.iter().map(|wanted| async move {
                let headers =
                    [(again::GENERATION, generation), (again::SEQUENCE, wanted.sequence.as_str())];
                publisher.send_with(&wanted.event, &headers).await
            });
            try_join_all(sends).await?;
            sent += batch.len() as u64;
            on_event(sent);
        }
        info!(event = event::PUBLISH, published = sent, skipped = 0_u64, "events published");
        Ok(sent)
    }
}

fn again_of(entry: Entry, types: &AttributeTypes) -> Wanted {
    let deleted = entry.version.deleted;
    let event = ImageEvent {
        image_id: entry.image_id,
        operation: if deleted { Operation::Delete } else { Operation::Upsert },
        uri: entry.uri.filter(|_| !deleted),
        data: None,
        sequence: None,
        event_time: entry.event_time,
        attributes: values(&entry.attributes, types),
    };
    Wanted { event, sequence: entry.version.sequence.as_str().to_owned() }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backfill::coverage::tests::entry;
    use crate::record::Sequence;

    /// Whether it was deleted and forgotten, or put aside by the live generation's workers, nobody knows.
    #[test]
    fn what_the_live_table_does_not_know_is_counted_and_left_alone() {
        let live = [entry("a", 1, false, 1), entry("c", 2, true, 1)].map(Ok).into_iter();
        let beside = [entry("a", 1, false, 1), entry("b", 7, false, 1), entry("e", 1, true, 1)];
        let beside = beside.map(Ok).into_iter();
        let file = tempfile::tempfile().unwrap();
        let found = Missing::between(live, beside, &AttributeTypes::new(), file).unwrap();
        assert_eq!((found.live, found.same, found.deletes, found.alone), (1, 1, 1, 1));
        assert_eq!(found.alone_example.as_deref(), Some("b"));
        let told = found.events.lines().map(|line| {
            let told: Wanted = serde_json::from_str(&line.unwrap()).unwrap();
            (told.event.image_id, told.event.operation, told.sequence)
        });
        let sequence = Sequence::from_number(2).as_str().to_owned();
        assert_eq!(told.collect::<Vec<_>>(), [("c".to_owned(), Operation::Delete, sequence)]);
    }
}
