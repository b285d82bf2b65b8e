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
use super::coverage::version;
use crate::publish::{Publisher, values};
use crate::reconcile::current;
use crate::record::{AttributeTypes, Operation, Partition};
use crate::source::{ImageEvent, again};
use crate::store::Store;
use crate::table::{
    Beside, CatalogueState, Change, Entry, Generation, PartitionBatch, StateStore, Writer,
};
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
        let mut live = current(catalogue, live, folder).await?;
        let mut beside = current(catalogue, beside, folder).await?;
        let (attributes, folder) = (attributes.clone(), folder.to_owned());
        let compared = tokio::task::spawn_blocking(move || -> io::Result<Self> {
            let mut events = BufWriter::new(tempfile::tempfile_in(folder)?);
            let (mut images, mut deletes, mut same, mut all) = (0, 0, 0, 0);
            let (mut inline, mut inline_example) = (0, None);
            let mut known = beside.next().transpose()?;
            for wanted in &mut live {
                let wanted = wanted?;
                while known.as_ref().is_some_and(|known| known.image_id < wanted.image_id) {
                    known = beside.next().transpose()?;
                }
                let known = known.as_ref().filter(|known| known.image_id == wanted.image_id);
                let is_known = known.is_some_and(|known| version(known) >= version(&wanted));
                let deleted = wanted.version.deleted;
                all += u64::from(!deleted);
                match (is_known, deleted, &wanted.uri) {
                    (true, ..) => {
                        same += u64::from(!deleted);
                        continue;
                    }
                    (false, true, _) => deletes += 1,
                    (false, false, Some(_)) => images += 1,
                    (false, false, None) => {
                        inline += 1;
                        inline_example.get_or_insert(wanted.image_id);
                        continue;
                    }
                }
                serde_json::to_writer(&mut events, &again_of(wanted, &attributes))?;
                events.write_all(b"\n")?;
            }
            let mut events = events.into_inner().map_err(io::IntoInnerError::into_error)?;
            events.rewind()?;
            let events = BufReader::new(events);
            Ok(Self { live: all, same, inline, inline_example, images, deletes, events })
        });
        let compared = compared.await.map_err(|panic| ReindexError::Broken(panic.to_string()))?;
        compared.map_err(ReindexError::Folder)
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
