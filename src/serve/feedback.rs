//! What users say of results: stored beside the table, where evaluations read it.
//!
//! Feedback lies in `feedback/` below the catalogue's folder, as JSON lines in small objects whose
//! names begin with their time. It is acknowledged when it is stored, not before; what arrives at the
//! same time shares an object.

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

/// Folder of the catalogue that feedback is stored in.
pub const FOLDER: &str = "feedback";
/// Feedback that waits to be stored; more is turned away.
const WAITING: usize = 256;
/// Most lines of an object.
const TOGETHER: usize = 256;
/// Tries to store, with growing pauses: about 3 s in all, within a request's time.
const ATTEMPTS: u32 = 5;
/// Longest text and note, in characters.
pub const MAX_CHARS: usize = 1_000;

/// Whether a result was right.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Said {
    /// The image matches the query.
    Right,
    /// It does not.
    Wrong,
}

impl Said {
    /// As in logs and metrics.
    pub fn name(self) -> &'static str {
        match self {
            Self::Right => "right",
            Self::Wrong => "wrong",
        }
    }
}

/// What a user said of one result. Unknown fields are passed over when it is read back.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Feedback {
    /// When it was said; old lines may lack it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub at: Option<DateTime<Utc>>,
    /// The query.
    pub text: String,
    /// The image that was found.
    pub image_id: String,
    /// What was said of it.
    pub verdict: Said,
    /// Why, in the user's words.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub note: Option<String>,
    /// Name of the configuration that answered.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub configuration: Option<String>,
    /// Who said it: the name of the API key.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub by: Option<String>,
}

/// Why feedback was not stored. What may pass is worth sending again.
#[derive(Debug, thiserror::Error)]
pub enum FeedbackError {
    /// As much waits as may.
    #[error("{WAITING} pieces of feedback wait already")]
    Busy,
    /// The query worker stops.
    #[error("the query worker stops")]
    Stopping,
    /// The store did not take it.
    #[error("the feedback was not stored: {0}")]
    Store(String),
}

type Waiting = (Feedback, oneshot::Sender<Result<(), FeedbackError>>);

/// Takes feedback in.
#[derive(Debug, Clone)]
pub struct Inbox(mpsc::Sender<Waiting>);

/// Stores what the inbox takes in.
#[derive(Debug)]
pub struct FeedbackWriter {
    store: Store,
    waiting: mpsc::Receiver<Waiting>,
}

/// An inbox, and who stores what it takes in, for the catalogue at `catalogue`.
pub fn inbox(catalogue: &Store) -> (Inbox, FeedbackWriter) {
    let (sender, waiting) = mpsc::channel(WAITING);
    (Inbox(sender), FeedbackWriter { store: catalogue.child(FOLDER), waiting })
}

impl Inbox {
    /// Returns when the feedback is stored.
    pub async fn put(&self, feedback: Feedback) -> Result<(), FeedbackError> {
        let (stored, answer) = oneshot::channel();
        self.0.try_send((feedback, stored)).map_err(|error| match error {
            mpsc::error::TrySendError::Full(_) => FeedbackError::Busy,
            mpsc::error::TrySendError::Closed(_) => FeedbackError::Stopping,
        })?;
        answer.await.unwrap_or(Err(FeedbackError::Stopping))
    }
}

impl FeedbackWriter {
    /// Stores until `token` is cancelled, or every inbox is gone, and what was taken in is stored.
    pub async fn run(mut self, token: CancellationToken) {
        let mut together = Vec::new();
        loop {
            let taken = tokio::select! {
                taken = self.waiting.recv_many(&mut together, TOGETHER) => taken,
                () = token.cancelled(), if !self.waiting.is_closed() => {
                    self.waiting.close();
                    continue;
                }
            };
            if taken == 0 {
                return;
            }
            let lines: Result<Vec<String>, _> =
                together.iter().map(|(feedback, _)| serde_json::to_string(feedback)).collect();
            let stored = match lines {
                Ok(lines) => self.store(lines.join("\n") + "\n").await.map_err(|e| e.to_string()),
                Err(error) => Err(error.to_string()),
            };
            for (feedback, answer) in together.drain(..) {
                // Who asked may have left.
                let _ = answer.send(stored.clone().map_err(FeedbackError::Store));
                let said = feedback.verdict.name();
                if let Err(error) = &stored {
                    warn!(
                        event = event::FEEDBACK_FAILED,
                        verdict = said,
                        error,
                        "feedback was not stored"
                    );
                    continue;
                }
                metrics::get().feedback.add(&[said], 1);
                info!(
                    event = event::FEEDBACK,
                    verdict = said,
                    image_id = feedback.image_id,
                    configuration = feedback.configuration,
                    by = feedback.by,
                    "feedback was stored"
                );
            }
        }
    }

    async fn store(&self, lines: String) -> Result<(), StoreError> {
        let now = Utc::now().to_rfc3339_opts(SecondsFormat::Micros, true).replace([':', '-'], "");
        let place = Path::from(format!("{now}-{:08x}.jsonl", rand::random::<u32>()));
        let payload = PutPayload::from(lines);
        // It ends by itself soon enough, also at shutdown.
        let never = CancellationToken::new();
        let again = |attempt, error: &StoreError| {
            info!(event = event::RETRY, stage = "feedback", attempt, %error, "feedback was not stored; trying again");
        };
        retry(Backoff::times(ATTEMPTS), &never, again, || async {
            let put = self.store.objects().put(&place, payload.clone()).await;
            put.map(drop).map_err(|e| self.store.error(e))
        })
        .await
    }
}

#[cfg(test)]
mod tests {
    use futures::TryStreamExt;

    use super::*;

    fn feedback(image: &str) -> Feedback {
        Feedback {
            at: Some(DateTime::UNIX_EPOCH),
            text: "a red mug".into(),
            image_id: image.into(),
            verdict: Said::Wrong,
            note: None,
            configuration: Some("first".into()),
            by: None,
        }
    }

    async fn stored(store: &Store) -> Vec<Feedback> {
        let folder = store.child(FOLDER);
        let found: Vec<_> = folder.objects().list(None).try_collect().await.unwrap();
        let mut lines = Vec::new();
        for object in found {
            let bytes =
                folder.objects().get(&object.location).await.unwrap().bytes().await.unwrap();
            let text = String::from_utf8(bytes.to_vec()).unwrap();
            lines.extend(text.lines().map(|line| serde_json::from_str(line).unwrap()));
        }
        lines
    }

    #[tokio::test]
    async fn feedback_is_stored_when_it_is_acknowledged() {
        let store = Store::memory();
        let (inbox, writer) = inbox(&store);
        let token = CancellationToken::new();
        let running = tokio::spawn(writer.run(token.clone()));
        inbox.put(feedback("a")).await.unwrap();
        assert_eq!(stored(&store).await, [feedback("a")]);
        let all = (0..50).map(|i| {
            let inbox = inbox.clone();
            async move { inbox.put(feedback(&format!("b{i}"))).await }
        });
        futures::future::try_join_all(all).await.unwrap();
        assert_eq!(stored(&store).await.len(), 51);
        let objects: Vec<_> = store.child(FOLDER).objects().list(None).try_collect().await.unwrap();
        assert!(objects.len() < 51, "what comes together shares an object");
        token.cancel();
        running.await.unwrap();
        assert!(matches!(inbox.put(feedback("c")).await, Err(FeedbackError::Stopping)));
    }

    #[tokio::test]
    async fn more_than_may_wait_is_turned_away() {
        let (inbox, writer) = inbox(&Store::memory());
        let waiting: Vec<_> = (0..WAITING)
            .map(|_| {
                let inbox = inbox.clone();
                tokio::spawn(async move { inbox.put(feedback("a")).await })
            })
            .collect();
        tokio::task::yield_now().await;
        while inbox.0.capacity() > 0 {
            tokio::task::yield_now().await;
        }
        assert!(matches!(inbox.put(feedback("b")).await, Err(FeedbackError::Busy)));
        drop(writer);
        for one in waiting {
            assert!(matches!(one.await.unwrap(), Err(FeedbackError::Stopping)));
        }
        assert!(matches!(inbox.put(feedback("c")).await, Err(FeedbackError::Stopping)));
    }
}
