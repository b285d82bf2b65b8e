//! Stores users' feedback on results, for evaluations.
//!
//! Feedback is stored in `feedback/` in the catalogue's folder, as JSON lines in small objects
//! whose names begin with the time. It is acknowledged only after it is stored; feedback that
//! arrives at the same time shares an object.

use chrono::{DateTime, SecondsFormat, Utc};
use object_store::path::Path;
use object_store::{ObjectStoreExt, PutPayload};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use tokio::sync::{mpsc, oneshot};
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};

use crate::retry::{Backoff, retry};
use crate::store::{Store, StoreError};
use crate::telemetry::{event, metrics};

/// Folder of feedback in the catalogue's folder.
pub const FEEDBACK_FOLDER: &str = "feedback";
/// Maximum number of pieces of feedback that wait to be stored; further ones are rejected.
const QUEUE_CAPACITY: usize = 256;
/// Maximum number of lines in an object.
const MAX_LINES_PER_OBJECT: usize = 256;
/// Attempts to store an object, with growing pauses: about 3 s in all, less than `http.timeout_ms`.
const MAX_STORE_ATTEMPTS: u32 = 5;
/// Maximum length of text and note, in characters.
pub const MAX_TEXT_CHARS: usize = 1_000;

/// A user's verdict on a result.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum FeedbackVerdict {
    /// The image matches the query.
    Right,
    /// The image does not match the query.
    Wrong,
}

impl FeedbackVerdict {
    /// The name in JSON, logs and metrics.
    pub fn name(self) -> &'static str {
        match self {
            Self::Right => "right",
            Self::Wrong => "wrong",
        }
    }
}

/// Feedback on one result, as it is stored. Readers ignore unknown fields.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Feedback {
    /// When it was received; old lines may lack it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub received_at: Option<DateTime<Utc>>,
    /// The text of the query.
    pub text: String,
    /// The image of the result.
    pub image_id: String,
    /// Whether the image matches the query.
    pub verdict: FeedbackVerdict,
    /// The user's reason.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub note: Option<String>,
    /// Name of the configuration that answered.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub configuration: Option<String>,
    /// Name of the API key with which it was sent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub api_key_name: Option<String>,
}

/// Why feedback was not stored. All of these may be temporary: clients may send it again.
#[derive(Debug, thiserror::Error)]
pub enum FeedbackError {
    /// The queue is full.
    #[error("{QUEUE_CAPACITY} pieces of feedback already wait to be stored")]
    QueueFull,
    /// The query worker shuts down.
    #[error("the query worker shuts down")]
    ShuttingDown,
    /// The store returned an error.
    #[error("the feedback was not stored: {0}")]
    Store(String),
}

type PendingFeedback = (Feedback, oneshot::Sender<Result<(), FeedbackError>>);

/// Accepts feedback and waits until it is stored.
#[derive(Debug, Clone)]
pub struct FeedbackQueue(mpsc::Sender<PendingFeedback>);

/// Stores the feedback of a [`FeedbackQueue`].
#[derive(Debug)]
pub struct FeedbackWriter {
    store: Store,
    pending_feedback: mpsc::Receiver<PendingFeedback>,
}

/// Returns a queue for feedback and its writer, which must be run, for the catalogue in the folder
/// `catalogue`.
pub fn feedback_channel(catalogue: &Store) -> (FeedbackQueue, FeedbackWriter) {
    let (sender, pending) = mpsc::channel(QUEUE_CAPACITY);
    (
        FeedbackQueue(sender),
        FeedbackWriter { store: catalogue.subfolder(FEEDBACK_FOLDER), pending_feedback: pending },
    )
}

impl FeedbackQueue {
    /// Returns when the feedback is stored.
    pub async fn submit_and_wait(&self, feedback: Feedback) -> Result<(), FeedbackError> {
        let (result_sender, result) = oneshot::channel();
        self.0.try_send((feedback, result_sender)).map_err(|error| match error {
            mpsc::error::TrySendError::Full(_) => FeedbackError::QueueFull,
            mpsc::error::TrySendError::Closed(_) => FeedbackError::ShuttingDown,
        })?;
        result.await.unwrap_or(Err(FeedbackError::ShuttingDown))
    }
}

impl FeedbackWriter {
    /// Stores feedback until `cancel` is cancelled or every queue is dropped, and until all
    /// accepted feedback is stored.
    pub async fn run(mut self, cancel: CancellationToken) {
        let mut batch = Vec::new();
        loop {
            let received = tokio::select! {
                count = self.pending_feedback.recv_many(&mut batch, MAX_LINES_PER_OBJECT) => count,
                () = cancel.cancelled(), if !self.pending_feedback.is_closed() => {
                    self.pending_feedback.close();
                    continue;
                }
            };
            if received == 0 {
                return;
            }
            let lines: Result<Vec<String>, _> =
                batch.iter().map(|(feedback, _)| serde_json::to_string(feedback)).collect();
            let stored = match lines {
                Ok(lines) => self
                    .store_lines(lines.join("\n") + "\n", &cancel)
                    .await
                    .map_err(|e| e.to_string()),
                Err(error) => Err(error.to_string()),
            };
            for (feedback, result_sender) in batch.drain(..) {
                // The client may have closed its connection.
                let _ = result_sender.send(stored.clone().map_err(FeedbackError::Store));
                let verdict = feedback.verdict.name();
                if let Err(error) = &stored {
                    warn!(
                        event = event::FEEDBACK_FAILED,
                        verdict = verdict,
                        error,
                        "feedback was not stored"
                    );
                    continue;
                }
                metrics::global().feedback.add(&[verdict], 1);
                info!(
                    event = event::FEEDBACK,
                    verdict = verdict,
                    image_id = feedback.image_id,
                    configuration = feedback.configuration,
                    api_key_name = feedback.api_key_name,
                    "feedback was stored"
                );
            }
        }
    }

    /// Retries until `cancel` is cancelled; the request that sent the feedback then gets the error.
    async fn store_lines(
        &self,
        lines: String,
        cancel: &CancellationToken,
    ) -> Result<(), StoreError> {
        let now = Utc::now().to_rfc3339_opts(SecondsFormat::Micros, true).replace([':', '-'], "");
        let path = Path::from(format!("{now}-{:08x}.jsonl", rand::random::<u32>()));
        let payload = PutPayload::from(lines);
        let log_retry = |attempt, error: &StoreError| {
            info!(event = event::RETRY, stage = "feedback", attempt, %error, "feedback was not stored; trying again");
        };
        retry(Backoff::with_max_attempts(MAX_STORE_ATTEMPTS), cancel, log_retry, || async {
            let put = self.store.object_store().put(&path, payload.clone()).await;
            put.map(drop).map_err(|e| self.store.wrap_error(e))
        })
        .await
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::sync::atomic::Ordering;

    use futures::TryStreamExt;

    use super::*;
    use crate::table::tests::faulty::{FaultKind, FaultyStore, stops_soon};

    fn feedback(image: &str) -> Feedback {
        Feedback {
            received_at: Some(DateTime::UNIX_EPOCH),
            text: "a red mug".into(),
            image_id: image.into(),
            verdict: FeedbackVerdict::Wrong,
            note: None,
            configuration: Some("first".into()),
            api_key_name: None,
        }
    }

    async fn read_stored_feedback(store: &Store) -> Vec<Feedback> {
        let folder = store.subfolder(FEEDBACK_FOLDER);
        let objects: Vec<_> = folder.object_store().list(None).try_collect().await.unwrap();
        let mut lines = Vec::new();
        for object in objects {
            let bytes =
                folder.object_store().get(&object.location).await.unwrap().bytes().await.unwrap();
            let text = String::from_utf8(bytes.to_vec()).unwrap();
            lines.extend(text.lines().map(|line| serde_json::from_str(line).unwrap()));
        }
        lines
    }

    #[tokio::test]
    async fn feedback_is_stored_when_it_is_acknowledged() {
        let store = Store::in_memory();
        let (queue, writer) = feedback_channel(&store);
        let cancel = CancellationToken::new();
        let writer_task = tokio::spawn(writer.run(cancel.clone()));
        queue.submit_and_wait(feedback("a")).await.unwrap();
        assert_eq!(read_stored_feedback(&store).await, [feedback("a")]);
        let all = (0..50).map(|i| {
            let queue = queue.clone();
            async move { queue.submit_and_wait(feedback(&format!("b{i}"))).await }
        });
        futures::future::try_join_all(all).await.unwrap();
        assert_eq!(read_stored_feedback(&store).await.len(), 51);
        let objects: Vec<_> =
            store.subfolder(FEEDBACK_FOLDER).object_store().list(None).try_collect().await.unwrap();
        assert!(objects.len() < 51, "feedback that arrives at the same time shares an object");
        cancel.cancel();
        writer_task.await.unwrap();
        assert!(matches!(
            queue.submit_and_wait(feedback("c")).await,
            Err(FeedbackError::ShuttingDown)
        ));
    }

    #[tokio::test]
    async fn feedback_that_cannot_be_stored_does_not_delay_a_shutdown() {
        let faulty = Arc::new(FaultyStore::new(FaultKind::BeforeWrites(1)));
        let (queue, writer) = feedback_channel(&Store::from_object_store(faulty.clone()));
        let running = tokio::spawn(writer.run(faulty.arm_and_cancel()));
        let result = stops_soon(queue.submit_and_wait(feedback("a"))).await;
        assert!(matches!(result, Err(FeedbackError::Store(_))), "the sender gets the error");
        stops_soon(running).await.unwrap();
        let attempts = faulty.injected_faults.load(Ordering::SeqCst) as u32;
        assert!(attempts < MAX_STORE_ATTEMPTS, "{attempts}");
    }

    #[tokio::test]
    async fn feedback_over_queue_capacity_is_rejected() {
        let (queue, writer) = feedback_channel(&Store::in_memory());
        let waiting: Vec<_> = (0..QUEUE_CAPACITY)
            .map(|_| {
                let queue = queue.clone();
                tokio::spawn(async move { queue.submit_and_wait(feedback("a")).await })
            })
            .collect();
        tokio::task::yield_now().await;
        while queue.0.capacity() > 0 {
            tokio::task::yield_now().await;
        }
        assert!(matches!(
            queue.submit_and_wait(feedback("b")).await,
            Err(FeedbackError::QueueFull)
        ));
        drop(writer);
        for submission in waiting {
            assert!(matches!(submission.await.unwrap(), Err(FeedbackError::ShuttingDown)));
        }
        assert!(matches!(
            queue.submit_and_wait(feedback("c")).await,
            Err(FeedbackError::ShuttingDown)
        ));
    }
}
