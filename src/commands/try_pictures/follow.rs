//! Lists the sources again and again, sends events for what differs, and waits until they are stored.

use std::path::PathBuf;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use futures::stream;
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

use super::display::{DisplayedProgress, ProgressDisplay};
use super::outcome::print_summary;
use crate::commands::shared::in_process::system::LocalSystem;
use crate::commands::shared::printing::Output;
use crate::ingest::source::ImageEvent;
use crate::ingest::{Progress, Rejection, RejectionListener};
use crate::publish::Publisher;
use crate::record::AttributeTypes;
use crate::watch::{
    ImageAction, MAX_EVENTS_IN_TRANSIT, SettledImage, SourceKind, Tracker, WatchError,
    WatchedSource,
};

/// How often events are sent and compared with the table.
const STEP_INTERVAL: Duration = Duration::from_millis(250);
/// How often the progress is shown: counting takes milliseconds per 100,000 files.
const SHOW_INTERVAL: Duration = Duration::from_millis(500);
/// Shortest pause between two passes over local sources.
const LOCAL_PASS_INTERVAL: Duration = Duration::from_secs(2);
/// Shortest pause between two passes if there is a bucket: each costs a request per 1,000 objects.
const BUCKET_PASS_INTERVAL: Duration = Duration::from_secs(30);
/// A pass takes at most this share of the time.
const PASS_TIME_SHARE: u32 = 10;
/// Passes after which `--once` ends even if files still change.
const MAX_PASSES_ONCE: u32 = 5;
/// The command fails if nothing is embedded, stored or rejected for this long although events are on their way.
const STALL_TIMEOUT: Duration = Duration::from_secs(600);
/// Most changes that are printed in one step.
const MAX_PRINTED_CHANGES: usize = 20;
/// Reasons that are shown with the progress.
const SHOWN_REASONS: usize = 3;

/// A tracker that the worker notifies of rejections.
#[derive(Clone)]
pub struct SharedTracker(Arc<Mutex<Tracker>>);

impl SharedTracker {
    /// Creates an empty tracker.
    pub fn new() -> Self {
        Self(Arc::new(Mutex::new(Tracker::default())))
    }

    /// Locks it.
    pub fn lock(&self) -> MutexGuard<'_, Tracker> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Returns counters of a worker that notify this tracker.
    pub fn notified_progress(&self) -> Progress {
        let tracker = self.clone();
        Progress::with_rejection_listener(RejectionListener::new(
            move |rejection: Rejection<'_>| {
                let payload = rejection.message.payload.as_deref().unwrap_or_default();
                let Ok(event) = serde_json::from_slice::<ImageEvent>(payload) else { return };
                let (id, sequence) = (&event.image_id, event.sequence.unwrap_or(0));
                tracker.lock().record_rejection(
                    id,
                    sequence,
                    rejection.code,
                    rejection.explanation,
                );
            },
        ))
    }
}

/// What is followed.
pub struct FollowPlan {
    /// The sources.
    pub sources: Vec<WatchedSource>,
    /// Folders that workers may read.
    pub roots: Vec<PathBuf>,
    /// Folders that are left out of listings.
    pub excluded: Vec<PathBuf>,
    /// Declared attributes.
    pub attribute_types: AttributeTypes,
    /// Whether to end when everything is stored.
    pub once: bool,
}

/// How following ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FollowEnd {
    /// Everything is stored, or skipped for a reason.
    Complete,
    /// The token was cancelled.
    Stopped,
    /// No source contains a picture.
    NoPictures,
}

/// Follows sources.
pub struct Follower<'a> {
    plan: FollowPlan,
    tracker: SharedTracker,
    publisher: Publisher,
    system: &'a mut LocalSystem,
    display: ProgressDisplay,
    output: Output,
    started: Instant,
    /// The pass that runs: whether each source was listed completely.
    pass: Option<JoinHandle<PassResult>>,
    pass_started: Instant,
    next_pass_at: Instant,
    finished_passes: u32,
    /// Whether the last pass found nothing to send.
    is_last_pass_clean: bool,
    table_version: Option<u64>,
    /// Notes about sources that were printed already.
    printed_notes: Vec<String>,
    last_progress: ([u64; 4], Instant),
    shown_at: Instant,
}

/// Of each source, why it could not be listed.
type PassResult = Vec<Result<(), WatchError>>;

impl<'a> Follower<'a> {
    /// Creates a follower; `started` is when the command started.
    pub fn new(
        plan: FollowPlan,
        tracker: SharedTracker,
        publisher: Publisher,
        system: &'a mut LocalSystem,
        output: Output,
        started: Instant,
    ) -> anyhow::Result<Self> {
        let now = Instant::now();
        Ok(Self {
            plan,
            tracker,
            publisher,
            system,
            display: ProgressDisplay::new()?,
            output,
            started,
            pass: None,
            pass_started: now,
            next_pass_at: now,
            finished_passes: 0,
            is_last_pass_clean: false,
            table_version: None,
            printed_notes: Vec::new(),
            last_progress: ([0; 4], now),
            shown_at: now,
        })
    }

    /// Follows until everything is stored for the first time; when it is called again, until `token` is
    /// cancelled.
    pub async fn run(&mut self, token: &CancellationToken) -> anyhow::Result<FollowEnd> {
        let is_first_run = self.finished_passes == 0;
        loop {
            tokio::select! {
                // When the token is cancelled, all parts end: that is no failure.
                biased;
                () = token.cancelled() => {
                    self.display.clear();
                    return Ok(FollowEnd::Stopped);
                }
                ended = self.system.wait_for_end() => {
                    self.display.clear();
                    return ended.map(|()| FollowEnd::Stopped);
                }
                () = tokio::time::sleep(STEP_INTERVAL) => {}
            }
            if self.finish_pass_if_listed().await? == Some(FollowEnd::NoPictures) {
                self.display.clear();
                return Ok(FollowEnd::NoPictures);
            }
            if self.pass.is_none() && Instant::now() >= self.next_pass_at {
                self.start_pass();
            }
            self.send_events(token).await?;
            let settled = self.settle();
            let rejected = self.tracker.lock().take_new_rejections();
            if !is_first_run {
                self.print_changes(&settled, &rejected);
            }
            self.check_stall()?;
            self.show_progress();
            if is_first_run && self.is_complete() {
                self.display.clear();
                print_summary(
                    &self.tracker.lock(),
                    self.started.elapsed().as_secs_f64(),
                    self.output,
                );
                return Ok(FollowEnd::Complete);
            }
        }
    }

    /// Whether everything is stored. With `--once`, files that changed since they were listed are not missed.
    fn is_complete(&mut self) -> bool {
        if self.finished_passes == 0 || !self.tracker.lock().is_settled() {
            return false;
        }
        if self.is_last_pass_clean || !self.plan.once || self.finished_passes >= MAX_PASSES_ONCE {
            return true;
        }
        self.next_pass_at = Instant::now();
        false
    }

    fn start_pass(&mut self) {
        self.pass_started = Instant::now();
        self.tracker.lock().begin_pass();
        let (sources, tracker) = (self.plan.sources.clone(), self.tracker.clone());
        let (roots, excluded) = (self.plan.roots.clone(), self.plan.excluded.clone());
        let types = self.plan.attribute_types.clone();
        self.pass = Some(tokio::spawn(async move {
            let mut results = Vec::with_capacity(sources.len());
            for (index, source) in sources.iter().enumerate() {
                let tracker = tracker.clone();
                let on_item = move |item| tracker.lock().observe(index, item);
                results.push(source.list(&roots, &excluded, &types, on_item).await);
            }
            results
        }));
    }

    /// Ends the pass if all sources are listed.
    async fn finish_pass_if_listed(&mut self) -> anyhow::Result<Option<FollowEnd>> {
        let Some(pass) = self.pass.take_if(|pass| pass.is_finished()) else { return Ok(None) };
        let results = pass.await?;
        let is_first = self.finished_passes == 0;
        let mut completeness = Vec::with_capacity(results.len());
        for (result, source) in results.into_iter().zip(&self.plan.sources) {
            completeness.push((result.is_ok(), source.id_prefix.clone()));
            match result {
                Err(error) if is_first => return Err(error.into()),
                Err(error) => print_once(
                    &mut self.printed_notes,
                    &self.display,
                    self.output,
                    &error.to_string(),
                ),
                Ok(()) => {}
            }
        }
        let states: Vec<(bool, &str)> =
            completeness.iter().map(|(complete, prefix)| (*complete, prefix.as_str())).collect();
        let (emptied, has_pictures, is_clean) = {
            let mut tracker = self.tracker.lock();
            let emptied = tracker.finish_pass(&states)?;
            (emptied, tracker.has_pictures(), tracker.is_settled())
        };
        for source in emptied {
            let target = &self.plan.sources[source].target;
            let note = format!(
                "{target} contains nothing any more, as if it were not mounted; its pictures stay until it contains something again"
            );
            print_once(&mut self.printed_notes, &self.display, self.output, &note);
        }
        self.finished_passes += 1;
        self.is_last_pass_clean = is_clean;
        let has_bucket =
            self.plan.sources.iter().any(|source| matches!(source.kind, SourceKind::Bucket(_)));
        let shortest = if has_bucket { BUCKET_PASS_INTERVAL } else { LOCAL_PASS_INTERVAL };
        let pause = shortest.max(self.pass_started.elapsed() * PASS_TIME_SHARE);
        self.next_pass_at = Instant::now() + pause;
        Ok((is_first && !has_pictures).then_some(FollowEnd::NoPictures))
    }

    async fn send_events(&mut self, token: &CancellationToken) -> anyhow::Result<()> {
        let events = self.tracker.lock().take_events(MAX_EVENTS_IN_TRANSIT);
        if events.is_empty() {
            return Ok(());
        }
        let inputs = stream::iter(events.into_iter().map(|event| Ok(Ok(event))));
        self.publisher
            .send_all(inputs, token, |_| {})
            .await
            .context("the broker in this process")?;
        Ok(())
    }

    /// Compares what was sent with what can be searched, if the table has changed.
    fn settle(&mut self) -> Vec<SettledImage> {
        let snapshot = self.system.engine.snapshots().newest();
        let version = Some(snapshot.table_version);
        if self.table_version == version {
            return Vec::new();
        }
        self.table_version = version;
        let stored = |id: &str| Some(snapshot.metadata(id)?.version.sequence.clone());
        self.tracker.lock().settle(stored)
    }

    fn print_changes(&self, settled: &[SettledImage], rejected: &[(String, String)]) {
        let time = chrono::Local::now().format("%H:%M:%S");
        let changes = settled.iter().map(|image| {
            let action = match image.action {
                ImageAction::Added => "added",
                ImageAction::Changed => "changed",
                ImageAction::Removed => "removed",
            };
            format!("{time} {action:8} {}", image.image_id)
        });
        let skipped =
            rejected.iter().map(|(path, reason)| format!("{time} skipped  {path}: {reason}"));
        for line in changes.chain(skipped).take(MAX_PRINTED_CHANGES) {
            self.display.line(self.output, &line);
        }
        let count = settled.len() + rejected.len();
        if count > MAX_PRINTED_CHANGES {
            let more = count - MAX_PRINTED_CHANGES;
            self.display.line(self.output, &format!("{time} and {more} more"));
        }
    }

    /// Shows the progress, if it was not shown a moment ago.
    fn show_progress(&mut self) {
        if self.shown_at.elapsed() < SHOW_INTERVAL {
            return;
        }
        self.shown_at = Instant::now();
        let progress = &self.system.progress;
        let count = |counter: &std::sync::atomic::AtomicU64| counter.load(Ordering::Relaxed);
        let worked = count(&progress.embedded_images) + count(&progress.stored_deletes);
        let in_commit = worked.saturating_sub(count(&progress.stored_rows)) as usize;
        let (counts, reasons) = {
            let tracker = self.tracker.lock();
            let mut reasons = tracker.count_reasons();
            reasons.truncate(SHOWN_REASONS);
            (tracker.counts(), reasons)
        };
        let is_listing = self.finished_passes == 0;
        if counts.pending == 0 && !is_listing {
            self.display.clear();
            return;
        }
        self.display.show(&DisplayedProgress { counts, in_commit, is_listing, reasons: &reasons });
    }

    fn check_stall(&mut self) -> anyhow::Result<()> {
        let progress = &self.system.progress;
        let counters = [
            &progress.embedded_images,
            &progress.stored_deletes,
            &progress.dead_lettered_messages,
            &progress.stored_rows,
        ];
        let counters = counters.map(|counter| counter.load(Ordering::Relaxed));
        if counters != self.last_progress.0 || self.tracker.lock().is_settled() {
            self.last_progress = (counters, Instant::now());
        } else if self.last_progress.1.elapsed() > STALL_TIMEOUT {
            bail!(
                "no picture was stored for {} s although some are on their way; the log says what happened. The same command goes on where it was",
                STALL_TIMEOUT.as_secs()
            );
        }
        Ok(())
    }
}

/// Prints a note unless it was printed already.
fn print_once(printed: &mut Vec<String>, display: &ProgressDisplay, output: Output, note: &str) {
    if !printed.iter().any(|known| known == note) {
        display.line(output, note);
        printed.push(note.to_owned());
    }
}
