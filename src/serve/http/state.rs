//! What request handlers share.

use std::sync::Arc;
use std::time::Duration;

use schemars::JsonSchema;
use serde::Serialize;
use tokio::sync::Semaphore;
use tokio_util::sync::CancellationToken;

use super::credentials::api_keys::ApiKey;
use super::credentials::session::SessionStore;
use super::options::HttpOptions;
use super::worker_metrics::WorkerPoller;
use crate::ingest::decode::DecodeOptions;
use crate::ingest::fetch::Fetcher;
use crate::search::Engines;
use crate::serve::feedback::FeedbackQueue;
use crate::serve::previews::PreviewMaker;
use crate::serve::result_judge::ResultJudge;

/// A part of a demo that replaces a real one.
#[derive(Debug, Clone, Serialize, JsonSchema)]
pub struct Substitute {
    /// Which part is replaced, and by what.
    pub component: String,
    /// The setting that uses the real part.
    pub how_to_replace: String,
}

/// What the query worker gives its HTTP server.
pub struct ServerContext {
    /// Answer the queries.
    pub engines: Arc<Engines>,
    /// Downloads the pictures that are shown.
    pub fetcher: Fetcher,
    /// Limits of decoding the pictures of which previews are made.
    pub decode_options: DecodeOptions,
    /// Accepts feedback for storage.
    pub feedback_queue: FeedbackQueue,
    /// The replaced parts; empty unless this is a demo.
    pub substitutes: Vec<Substitute>,
    /// Knows which results are right; `None` unless this is a demo.
    pub judge: Option<Arc<dyn ResultJudge>>,
    /// Addresses, keys and limits.
    pub options: HttpOptions,
}

/// The state that the router passes to every handler.
pub struct HandlerState {
    pub context: ServerContext,
    pub preview_maker: PreviewMaker,
    /// One permit per listener of the change feed.
    pub event_listener_permits: Arc<Semaphore>,
    pub api_keys: Vec<Arc<ApiKey>>,
    pub session_store: SessionStore,
    pub worker_poller: Arc<WorkerPoller>,
    /// Cancelled at shutdown.
    pub shutdown_cancel: CancellationToken,
}

impl HandlerState {
    pub fn new(
        context: ServerContext,
        worker_poller: Arc<WorkerPoller>,
        cancel: CancellationToken,
    ) -> Self {
        let options = &context.options;
        Self {
            event_listener_permits: Arc::new(Semaphore::new(options.max_event_listeners)),
            api_keys: options.keys.iter().cloned().map(Arc::new).collect(),
            session_store: SessionStore::new(
                options.max_sessions,
                Duration::from_secs(60 * options.session_minutes),
                &options.base_path,
            ),
            preview_maker: PreviewMaker::new(&context.decode_options, options.preview_cache_mib),
            context,
            worker_poller,
            shutdown_cancel: cancel,
        }
    }
}
