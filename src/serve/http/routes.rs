//! The handlers, one function per route. `auth` has those of `/v1/session`.

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
use super::body::problem::Problem;
use super::body::request::{ExplainRequest, FeedbackRequest, SearchRequest};
use super::body::response::{ChangeEvent, ExplainResponse, ImageInfo, SearchResponse};
use super::body::state_response::StateResponse;
use super::concurrency_limit::ConcurrencyPermit;
use super::state::HandlerState;
use crate::ingest::fetch::FetchError;
use crate::record::{self, ImageSource};
use crate::retry::{Classify, Disposition};
use crate::search::{Engines, ImageMetadata, Query, QueryError};
use crate::serve::feedback::Feedback;
use crate::telemetry::event;

/// How often a stream of the change feed checks, if there are no changes, whether another
/// generation has become live.
const LIVE_GENERATION_CHECK_INTERVAL: Duration = Duration::from_secs(5);

type JsonBody<T> = Result<Json<T>, JsonRejection>;
type SharedState = State<Arc<HandlerState>>;

/// `GET /readyz`: succeeds if queries can be answered.
pub async fn get_readyz(State(shared): SharedState) -> Result<&'static str, Problem> {
    if shared.context.engines.live().snapshots().is_ready() {
        Ok("ready\n")
    } else {
        Err(QueryError::NotReady.into())
    }
}

/// `GET /v1/state`: returns what this query worker serves.
pub async fn get_state(State(shared): SharedState) -> Result<Response, Problem> {
    // May block: the first response after a commit counts the attribute values of all rows.
    let response = tokio::task::spawn_blocking(move || {
        let roles = shared.context.engines.roles();
        let snapshot = roles.live.snapshots().newest();
        let workers = shared.worker_poller.latest_summary();
        Json(StateResponse::new(&shared.context, &roles, &snapshot, workers)).into_response()
    });
    response.await.map_err(|panic| problem_from_panic(&panic))
}

/// `POST /v1/search`: returns the rankings by plain CLIP and by balanced scores.
pub async fn search(
    State(shared): SharedState,
    Extension(principal): Extension<Principal>,
    Extension(permit): Extension<ConcurrencyPermit>,
    headers: HeaderMap,
    body: JsonBody<SearchRequest>,
) -> Result<Json<SearchResponse>, Problem> {
    let mut query = Query::try_from(body?.0)?;
    let parse_trace_ids = |value: &HeaderValue| {
        let (trace, span) = record::parse_traceparent(value.to_str().ok()?)?;
        Some((trace.to_owned(), span.to_owned()))
    };
    query.trace_and_span_id = headers.get("traceparent").and_then(parse_trace_ids);
    query.api_key_name = principal.key_name();
    let cancel = CancellationToken::new();
    // Dropped, and so cancelled, if the client closes the connection.
    let _guard = cancel.clone().drop_guard();
    let results =
        run_blocking(&shared, permit, move |engines| engines.search(&query, &cancel)).await?;
    Ok(Json(SearchResponse::new(&results)))
}

/// `POST /v1/explain`: explains why an image has its rank.
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

/// `POST /v1/feedback`: stores a user's verdict on a result, then responds.
pub async fn post_feedback(
    State(shared): SharedState,
    Extension(principal): Extension<Principal>,
    Extension(_permit): Extension<ConcurrencyPermit>,
    body: JsonBody<FeedbackRequest>,
) -> Result<StatusCode, Problem> {
    let feedback = Feedback { api_key_name: principal.key_name(), ..body?.0.try_into_feedback()? };
    find_image(&shared, &feedback.image_id)?;
    shared.context.feedback_queue.submit_and_wait(feedback).await?;
    Ok(StatusCode::NO_CONTENT)
}

/// Runs `work` on a thread that may block. `permit` is held until it is done, even if the client
/// has closed the connection.
async fn run_blocking<T: Send + 'static>(
    shared: &HandlerState,
    permit: ConcurrencyPermit,
    work: impl FnOnce(&Engines) -> Result<T, QueryError> + Send + 'static,
) -> Result<T, Problem> {
    let engines = shared.context.engines.clone();
    let work = move || {
        let _permit = permit;
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

/// `GET /v1/images/{id}`: returns what is known of an image.
pub async fn get_image(
    State(shared): SharedState,
    Path(id): Path<String>,
) -> Result<Json<ImageInfo>, Problem> {
    Ok(Json(ImageInfo::new(&*find_image(&shared, &id)?)))
}

fn find_image(shared: &HandlerState, id: &str) -> Result<Arc<ImageMetadata>, Problem> {
    let engines = &shared.context.engines;
    if !engines.live().snapshots().is_ready() {
        return Err(QueryError::NotReady.into());
    }
    engines.find_image(id).ok_or_else(|| QueryError::ImageNotFound(id.to_owned()).into())
}

/// `GET /v1/images/{id}/picture`: returns an image's picture, fetched from the address in its
/// event.
pub async fn get_picture(
    State(shared): SharedState,
    Extension(_permit): Extension<ConcurrencyPermit>,
    Path(id): Path<String>,
) -> Result<Response, Problem> {
    let uri = find_image(&shared, &id)?.uri.clone();
    let uri = uri.filter(|_| shared.context.options.serve_pictures).ok_or_else(|| {
        Problem::not_found(
            "there is no picture to show: its bytes came in the event, or http.serve_pictures is off",
        )
    })?;
    let fetched =
        shared.context.fetcher.fetch(&ImageSource::from_uri(uri), &shared.shutdown_cancel).await;
    let fetched = fetched.map_err(|error| {
        let status = match error.disposition() {
            Disposition::DeadLetter => StatusCode::NOT_FOUND,
            Disposition::Retry | Disposition::Fatal => StatusCode::BAD_GATEWAY,
        };
        let detail = match &error {
            // Errors of hosts and stores may name addresses that callers must not know.
            FetchError::Permanent { .. }
            | FetchError::Forbidden { .. }
            | FetchError::Transient { .. } => {
                error!(event = event::HTTP_ERROR, code = error.code(), %error, "a picture could not be fetched");
                "the picture's host or store did not return it; see the server's log".to_owned()
            }
            _ => error.to_string(),
        };
        Problem::new(status, error.code(), detail)
    })?;
    // Anything but a picture, by its content, could be a script that runs in the browser.
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
    // The bytes count against the budget of downloads until they are sent: a client may read
    // slowly.
    Ok((headers, Bytes::from_owner(fetched)).into_response())
}

/// `GET /v1/events`: streams the changes of the live generation, as server-sent events named
/// `change`. An event `missed` has the number of changes that were skipped because the client read
/// too slowly.
pub async fn stream_events(
    State(shared): SharedState,
) -> Result<Sse<impl Stream<Item = Result<Event, Infallible>>>, Problem> {
    let limit = shared.context.options.max_event_listeners;
    let permit = shared.event_listener_permits.clone().try_acquire_owned().map_err(|_| {
        Problem::too_many_requests(limit, "listeners are served (http.max_event_listeners)")
    })?;
    let live = shared.context.engines.live();
    let changes = live.snapshots().subscribe();
    let cancel = shared.shutdown_cancel.clone();
    let state = (changes, live, permit, cancel);
    let stream =
        unfold((state, shared), |((mut changes, live, permit, cancel), shared)| async move {
            let change = loop {
                let change = tokio::select! {
                    change = changes.recv() => Some(change),
                    () = tokio::time::sleep(LIVE_GENERATION_CHECK_INTERVAL) => None,
                    () = cancel.cancelled() => return None,
                };
                // Another generation has become live: clients reconnect, and get the changes of
                // that one.
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
            Some((Ok(event), ((changes, live, permit, cancel), shared)))
        });
    let keep_alive = KeepAlive::new().interval(Duration::from_secs(15));
    Ok(Sse::new(stream).keep_alive(keep_alive))
}

/// Answers requests for unknown routes.
pub async fn route_not_found() -> Problem {
    Problem::not_found("there is no such route; see docs/api.md")
}

/// Answers requests with a method that their route does not have.
pub async fn method_not_allowed() -> Problem {
    Problem::new(
        StatusCode::METHOD_NOT_ALLOWED,
        "method_not_allowed",
        "this route does not have this method; see docs/api.md",
    )
}
