//! One function a route.

use std::convert::Infallible;
use std::sync::Arc;
use std::time::Duration;

use axum::Json;
use axum::body::Bytes;
use axum::extract::rejection::JsonRejection;
use axum::extract::{Extension, Path, State};
use axum::http::{HeaderMap, HeaderValue, StatusCode, header};
use axum::response::sse::{Event, KeepAlive, Sse};
use axum::response::{IntoResponse, Response};
use futures::Stream;
use futures::stream::unfold;
use tokio::sync::broadcast::error::RecvError;
use tokio::task::JoinError;
use tokio_util::sync::CancellationToken;
use tracing::error;

use super::auth::Principal;
use super::payload::{
    ChangeEvent, ExplainRequest, ExplainResponse, FeedbackRequest, ImageInfo, SearchRequest,
    SearchResponse,
};
use super::problem::Problem;
use super::state_response::StateResponse;
use super::{ConcurrencyPermit, HandlerState};
use crate::ingest::fetch::FetchError;
use crate::record::{self, ImageContent};
use crate::retry::{Classify, Disposition};
use crate::search::{Engines, ImageMetadata, Query, QueryError};
use crate::serve::feedback::Feedback;
use crate::telemetry::event;

/// How often a listener of the change feed looks whether what it listens to is live still, where
/// nothing changes.
const LIVE_GENERATION_CHECK_INTERVAL: Duration = Duration::from_secs(5);

type JsonBody<T> = Result<Json<T>, JsonRejection>;
type SharedState = State<Arc<HandlerState>>;

/// Whether queries are answered.
pub async fn get_readyz(State(shared): SharedState) -> Result<&'static str, Problem> {
    if shared.context.engines.live().snapshots().is_ready() {
        Ok("ready\n")
    } else {
        Err(QueryError::NotReady.into())
    }
}

/// What is served.
pub async fn get_state(State(shared): SharedState) -> Result<Response, Problem> {
    // After a commit, what there is to filter by is looked for in all rows.
    let answer = tokio::task::spawn_blocking(move || {
        let roles = shared.context.engines.roles();
        let snapshot = roles.live.snapshots().newest();
        let workers = shared.worker_poller.latest_summary();
        Json(StateResponse::new(&shared.context, &roles, &snapshot, workers)).into_response()
    });
    answer.await.map_err(|panic| problem_from_panic(&panic))
}

/// Both rankings for a text.
pub async fn search(
    State(shared): SharedState,
    Extension(caller): Extension<Principal>,
    Extension(permit): Extension<ConcurrencyPermit>,
    headers: HeaderMap,
    body: JsonBody<SearchRequest>,
) -> Result<Json<SearchResponse>, Problem> {
    let mut query = Query::try_from(body?.0)?;
    let parent = |value: &HeaderValue| {
        let (trace, span) = record::parse_traceparent(value.to_str().ok()?)?;
        Some((trace.to_owned(), span.to_owned()))
    };
    query.trace_ids = headers.get("traceparent").and_then(parent);
    query.api_key_name = caller.key_name();
    let cancel = CancellationToken::new();
    // A caller who goes away drops this.
    let _guard = cancel.clone().drop_guard();
    let results =
        run_blocking(&shared, permit, move |engines| engines.search(&query, &cancel)).await?;
    Ok(Json(SearchResponse::new(&results)))
}

/// Why an image ranks where it does.
pub async fn explain(
    State(shared): SharedState,
    Extension(permit): Extension<ConcurrencyPermit>,
    body: JsonBody<ExplainRequest>,
) -> Result<Json<ExplainResponse>, Problem> {
    let (query, image_id) = body?.0.into_query_and_image_id()?;
    let cancel = CancellationToken::new();
    let _guard = cancel.clone().drop_guard();
    let work = move |engines: &Engines| engines.explain(&query, &image_id, &cancel);
    let explanation = run_blocking(&shared, permit, work).await?;
    Ok(Json(explanation.into()))
}

/// What a user says of a result; answered when it is stored.
pub async fn post_feedback(
    State(shared): SharedState,
    Extension(caller): Extension<Principal>,
    Extension(_permit): Extension<ConcurrencyPermit>,
    body: JsonBody<FeedbackRequest>,
) -> Result<StatusCode, Problem> {
    let feedback = Feedback { api_key_name: caller.key_name(), ..body?.0.try_into_feedback()? };
    find_entry(&shared, &feedback.image_id)?;
    shared.context.feedback_queue.submit(feedback).await?;
    Ok(StatusCode::NO_CONTENT)
}

/// Runs `work` on a thread that may block; it holds `turn` until it is done, whether or not somebody
/// waits for it.
async fn run_blocking<T: Send + 'static>(
    shared: &HandlerState,
    permit: ConcurrencyPermit,
    work: impl FnOnce(&Engines) -> Result<T, QueryError> + Send + 'static,
) -> Result<T, Problem> {
    let engines = shared.context.engines.clone();
    let work = move || {
        let _turn = permit;
        work(&engines)
    };
    match tokio::task::spawn_blocking(work).await {
        Ok(result) => result.map_err(Problem::from),
        Err(panic) => Err(problem_from_panic(&panic)),
    }
}

fn problem_from_panic(panic: &JoinError) -> Problem {
    error!(event = event::HTTP_ERROR, code = "panic", error = %panic, "a query panicked");
    let detail = "the query failed; see the server's log";
    Problem::new(StatusCode::INTERNAL_SERVER_ERROR, "internal", detail)
}

/// What is known of an image.
pub async fn get_image(
    State(shared): SharedState,
    Path(id): Path<String>,
) -> Result<Json<ImageInfo>, Problem> {
    Ok(Json(ImageInfo::new(&*find_entry(&shared, &id)?)))
}

fn find_entry(shared: &HandlerState, id: &str) -> Result<Arc<ImageMetadata>, Problem> {
    let engines = &shared.context.engines;
    if !engines.live().snapshots().is_ready() {
        return Err(QueryError::NotReady.into());
    }
    engines.find_image(id).ok_or_else(|| QueryError::ImageNotFound(id.to_owned()).into())
}

/// An image's picture, fetched from where it was announced.
pub async fn get_picture(
    State(shared): SharedState,
    Extension(_permit): Extension<ConcurrencyPermit>,
    Path(id): Path<String>,
) -> Result<Response, Problem> {
    let entry = find_entry(&shared, &id)?;
    let uri = entry.uri.clone();
    let uri = uri.filter(|_| shared.context.options.serve_pictures).ok_or_else(|| {
        Problem::not_found(
            "there is no picture to show: its bytes came in the event, or http.serve_pictures is off",
        )
    })?;
    let fetched = shared.context.fetcher.fetch(&ImageContent::from_uri(uri), &shared.cancel).await;
    let fetched = fetched.map_err(|error| {
        let status = match error.disposition() {
            Disposition::DeadLetter => StatusCode::NOT_FOUND,
            Disposition::Retry | Disposition::Fatal => StatusCode::BAD_GATEWAY,
        };
        let detail = match &error {
            // What others answer may name more than callers are to know.
            FetchError::Permanent { .. } | FetchError::Transient { .. } => {
                error!(event = event::HTTP_ERROR, code = error.code(), %error, "a picture was not to be had");
                "the picture's host or store did not give it; see the server's log".to_owned()
            }
            _ => error.to_string(),
        };
        Problem::new(status, error.code(), detail)
    })?;
    // Only what is a picture by its content is passed on: anything else might run in the browser.
    let format = image::guess_format(&fetched.bytes).map_err(|_| {
        Problem::new(
            StatusCode::UNSUPPORTED_MEDIA_TYPE,
            "not_an_image",
            "what was fetched is not a picture",
        )
    })?;
    let headers = [
        (header::CONTENT_TYPE, HeaderValue::from_static(format.to_mime_type())),
        (header::CACHE_CONTROL, HeaderValue::from_static("private, max-age=3600")),
    ];
    // They count against the budget until they are sent: a caller may read slowly.
    Ok((headers, Bytes::from_owner(fetched)).into_response())
}

/// The feed of changes, as server-sent events named `change`; `missed` tells a listener that was
/// too slow how many it did not get.
pub async fn stream_events(
    State(shared): SharedState,
) -> Result<Sse<impl Stream<Item = Result<Event, Infallible>>>, Problem> {
    let limit = shared.context.options.max_event_listeners;
    let permit = shared.event_listener_permits.clone().try_acquire_owned();
    let turn = permit.map_err(|_| {
        Problem::too_many_requests(limit, "listeners are served (http.max_event_listeners)")
    })?;
    let live = shared.context.engines.live();
    let changes = live.snapshots().subscribe();
    let token = shared.cancel.clone();
    let state = (changes, live, turn, token);
    let stream = unfold((state, shared), |((mut changes, live, turn, token), shared)| async move {
        let change = loop {
            let change = tokio::select! {
                change = changes.recv() => Some(change),
                () = tokio::time::sleep(LIVE_GENERATION_CHECK_INTERVAL) => None,
                () = token.cancelled() => return None,
            };
            // Another generation has become live: a listener comes back to that one.
            if !Arc::ptr_eq(&live, &shared.context.engines.live()) {
                return None;
            }
            if let Some(change) = change {
                break change;
            }
        };
        let event = match change {
            Ok(change) => {
                Event::default().event("change").json_data(ChangeEvent::from(&change)).ok()?
            }
            Err(RecvError::Lagged(missed)) => {
                Event::default().event("missed").data(missed.to_string())
            }
            Err(RecvError::Closed) => return None,
        };
        Some((Ok(event), ((changes, live, turn, token), shared)))
    });
    let alive = KeepAlive::new().interval(Duration::from_secs(15));
    Ok(Sse::new(stream).keep_alive(alive))
}

/// No such route.
pub async fn route_not_found() -> Problem {
    Problem::not_found("there is no such route; see docs/api.md")
}

/// The route wants another method.
pub async fn method_not_allowed() -> Problem {
    Problem::new(
        StatusCode::METHOD_NOT_ALLOWED,
        "method_not_allowed",
        "this route wants another method; see docs/api.md",
    )
}
