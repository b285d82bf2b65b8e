//! The handlers, one function per route. `auth` has those of `/v1/session`.

use std::convert::Infallible;
use std::sync::Arc;
use std::time::Duration;

use axum::Json;
use axum::extract::rejection::{JsonRejection, QueryRejection};
use axum::extract::{Extension, Query, State};
use axum::http::{HeaderMap, HeaderName, HeaderValue, StatusCode, header};
use axum::response::sse::{Event, KeepAlive, Sse};
use axum::response::{IntoResponse, Response};
use futures::stream::unfold;
use serde::Deserialize;
use serde_json::Value;
use tokio::sync::broadcast::error::RecvError;
use tokio::task::JoinError;
use tokio_util::sync::CancellationToken;
use tracing::error;

use super::auth::Principal;
use super::body::problem::Problem;
use super::body::request::{ExplainRequest, FeedbackRequest, NewestImagesRequest, SearchRequest};
use super::body::rerank::{RerankRequest, RerankResponse};
use super::body::response::{
    ChangeEvent, ExplainResponse, ImageInfo, NewestImagesResponse, RightAnswers,
    SampleScoreResponse, SearchResponse,
};
use super::body::state_response::StateResponse;
use super::concurrency_limit::ConcurrencyPermit;
use super::openapi;
use super::state::HandlerState;
use crate::record;
use crate::search::{self, Engines, ImageMetadata, QueryError};
use crate::serve::feedback::Feedback;
use crate::telemetry::event;

/// How often a stream of the change feed checks, if there are no changes, whether another
/// generation has become live.
const LIVE_GENERATION_CHECK_INTERVAL: Duration = Duration::from_secs(5);

/// How often a stream of the change feed sends a comment if there are no changes: more often than
/// proxies take a silent connection for dead (60 s in nginx).
const HEARTBEAT_INTERVAL: Duration = Duration::from_secs(15);

/// Headers of the change feed: proxies send each event on at once, unchanged. nginx obeys the first.
const STREAM_HEADERS: [(HeaderName, HeaderValue); 2] = [
    (HeaderName::from_static("x-accel-buffering"), HeaderValue::from_static("no")),
    (header::CACHE_CONTROL, HeaderValue::from_static("no-store, no-transform")),
];

type JsonBody<T> = Result<Json<T>, JsonRejection>;
pub type QueryParameters<T> = Result<Query<T>, QueryRejection>;
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
    let mut query = search::Query::try_from(body?.0)?;
    query.trace_and_span_id = trace_and_span_id(&headers);
    query.api_key_name = principal.key_name();
    let cancel = CancellationToken::new();
    // Dropped, and so cancelled, if the client closes the connection.
    let _guard = cancel.clone().drop_guard();
    let judge = shared.context.judge.clone();
    let work = move |engines: &Engines| {
        let results = engines.search(&query, &cancel)?;
        let response = SearchResponse::new(&results);
        let snapshot = engines.live().snapshots().newest();
        let right_answers = judge.and_then(|j| RightAnswers::count(&*j, &query.input, &snapshot));
        Ok(match right_answers {
            Some(right_answers) => response.with_right_answers(&results, &right_answers),
            None => response,
        })
    };
    Ok(Json(run_blocking(&shared, permit, work).await?))
}

/// Returns the ids of the trace and of the span that a request belongs to.
fn trace_and_span_id(headers: &HeaderMap) -> Option<(String, String)> {
    let value = headers.get("traceparent")?.to_str().ok()?;
    let (trace, span) = record::parse_traceparent(value)?;
    Some((trace.to_owned(), span.to_owned()))
}

/// `POST /v1/rerank`: ranks images that the caller has found elsewhere.
pub async fn rerank(
    State(shared): SharedState,
    Extension(principal): Extension<Principal>,
    Extension(permit): Extension<ConcurrencyPermit>,
    headers: HeaderMap,
    body: JsonBody<RerankRequest>,
) -> Result<Json<RerankResponse>, Problem> {
    let (mut query, candidates, explain) = body?.0.into_parts()?;
    query.trace_and_span_id = trace_and_span_id(&headers);
    query.api_key_name = principal.key_name();
    let cancel = CancellationToken::new();
    let _guard = cancel.clone().drop_guard();
    let work = move |engines: &Engines| engines.rerank(&query, candidates, explain, &cancel);
    Ok(Json(run_blocking(&shared, permit, work).await?.into()))
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

/// `GET /v1/openapi.json`: returns the description of this interface.
pub async fn get_openapi(State(shared): SharedState) -> Json<Value> {
    Json(openapi::build_document(&shared.context.options.base_path))
}

/// The parameters of `/v1/images`.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ImageParameters {
    id: String,
}

/// `GET /v1/images/newest?limit=N`: returns the images that were embedded last.
pub async fn list_newest_images(
    State(shared): SharedState,
    Extension(permit): Extension<ConcurrencyPermit>,
    parameters: QueryParameters<NewestImagesRequest>,
) -> Result<Json<NewestImagesResponse>, Problem> {
    let limit = parameters?.0.limit()?;
    let list = move |engines: &Engines| {
        let snapshot = engines.live().snapshots().newest();
        let images = snapshot.newest_images(limit).iter().map(ImageInfo::new).collect();
        Ok(NewestImagesResponse { table_version: snapshot.table_version, images })
    };
    Ok(Json(run_blocking(&shared, permit, list).await?))
}

/// `GET /v1/sample-score`: compares both rankings over queries whose right answers are known.
pub async fn get_sample_score(
    State(shared): SharedState,
    Extension(permit): Extension<ConcurrencyPermit>,
) -> Result<Json<SampleScoreResponse>, Problem> {
    let Some(judge) = shared.context.judge.clone() else {
        return Ok(Json(SampleScoreResponse { known: false, score: None }));
    };
    let score = move |engines: &Engines| judge.score_samples(&engines.live());
    let score = run_blocking(&shared, permit, score).await?;
    Ok(Json(SampleScoreResponse { known: true, score }))
}

/// `GET /v1/images?id=…`: returns what is known of an image.
pub async fn get_image(
    State(shared): SharedState,
    parameters: QueryParameters<ImageParameters>,
) -> Result<Json<ImageInfo>, Problem> {
    Ok(Json(ImageInfo::new(&*find_image(&shared, &parameters?.0.id)?)))
}

/// Returns what is known of a live image.
pub fn find_image(shared: &HandlerState, id: &str) -> Result<Arc<ImageMetadata>, Problem> {
    let engines = &shared.context.engines;
    if !engines.live().snapshots().is_ready() {
        return Err(QueryError::NotReady.into());
    }
    engines.find_image(id).ok_or_else(|| QueryError::ImageNotFound(id.to_owned()).into())
}

/// `GET /v1/events`: streams the changes of the live generation, as server-sent events named
/// `change`. An event `missed` has the number of changes that were skipped because the client read
/// too slowly.
pub async fn stream_events(State(shared): SharedState) -> Result<impl IntoResponse, Problem> {
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
            Some((Ok::<_, Infallible>(event), ((changes, live, permit, cancel), shared)))
        });
    let keep_alive = KeepAlive::new().interval(HEARTBEAT_INTERVAL);
    Ok((STREAM_HEADERS, Sse::new(stream).keep_alive(keep_alive)))
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
