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

use super::access::Caller;
use super::answer::{
    ChangeAnswer, ExplainAnswer, ExplainRequest, FeedbackRequest, ImageAnswer, SearchAnswer,
    SearchRequest,
};
use super::problem::Problem;
use super::state::StateAnswer;
use super::{Shared, Turn};
use crate::ingest::fetch::FetchError;
use crate::record::{self, Content};
use crate::retry::{Decide, Verdict};
use crate::search::{Engines, Entry, Query, QueryError};
use crate::serve::feedback::Feedback;
use crate::telemetry::event;

/// How often a listener of the change feed looks whether what it listens to is live still, where
/// nothing changes.
const FEED_LOOK: Duration = Duration::from_secs(5);

type Body<T> = Result<Json<T>, JsonRejection>;
type App = State<Arc<Shared>>;

/// Whether queries are answered.
pub async fn ready(State(shared): App) -> Result<&'static str, Problem> {
    if shared.app.engines.live().snapshots().ready() {
        Ok("ready\n")
    } else {
        Err(QueryError::NotReady.into())
    }
}

/// What is served.
pub async fn state(State(shared): App) -> Result<Response, Problem> {
    // After a commit, what there is to filter by is looked for in all rows.
    let answer = tokio::task::spawn_blocking(move || {
        let roles = shared.app.engines.roles();
        let snapshot = roles.live.snapshots().newest();
        let workers = shared.workers.told();
        Json(StateAnswer::new(&shared.app, &roles, &snapshot, workers)).into_response()
    });
    answer.await.map_err(|panic| failed(&panic))
}

/// Both rankings for a text.
pub async fn search(
    State(shared): App,
    Extension(caller): Extension<Caller>,
    Extension(turn): Extension<Turn>,
    headers: HeaderMap,
    body: Body<SearchRequest>,
) -> Result<Json<SearchAnswer>, Problem> {
    let mut query = Query::try_from(body?.0)?;
    let parent = |value: &HeaderValue| {
        let (trace, span) = record::trace_parent(value.to_str().ok()?)?;
        Some((trace.to_owned(), span.to_owned()))
    };
    query.trace = headers.get("traceparent").and_then(parent);
    query.by = caller.name();
    let left = CancellationToken::new();
    // A caller who goes away drops this.
    let _guard = left.clone().drop_guard();
    let results = compute(&shared, turn, move |engines| engines.search(&query, &left)).await?;
    Ok(Json(SearchAnswer::new(&results)))
}

/// Why an image ranks where it does.
pub async fn explain(
    State(shared): App,
    Extension(turn): Extension<Turn>,
    body: Body<ExplainRequest>,
) -> Result<Json<ExplainAnswer>, Problem> {
    let (query, image_id) = body?.0.split()?;
    let left = CancellationToken::new();
    let _guard = left.clone().drop_guard();
    let work = move |engines: &Engines| engines.explain(&query, &image_id, &left);
    let explanation = compute(&shared, turn, work).await?;
    Ok(Json(explanation.into()))
}

/// What a user says of a result; answered when it is stored.
pub async fn feedback(
    State(shared): App,
    Extension(caller): Extension<Caller>,
    Extension(_turn): Extension<Turn>,
    body: Body<FeedbackRequest>,
) -> Result<StatusCode, Problem> {
    let feedback = Feedback { by: caller.name(), ..body?.0.checked()? };
    entry(&shared, &feedback.image_id)?;
    shared.app.feedback.put(feedback).await?;
    Ok(StatusCode::NO_CONTENT)
}

/// Runs `work` on a thread that may block; it holds `turn` until it is done, whether or not somebody
/// waits for it.
async fn compute<T: Send + 'static>(
    shared: &Shared,
    turn: Turn,
    work: impl FnOnce(&Engines) -> Result<T, QueryError> + Send + 'static,
) -> Result<T, Problem> {
    let engines = shared.app.engines.clone();
    let work = move || {
        let _turn = turn;
        work(&engines)
    };
    match tokio::task::spawn_blocking(work).await {
        Ok(result) => result.map_err(Problem::from),
        Err(panic) => Err(failed(&panic)),
    }
}

fn failed(panic: &JoinError) -> Problem {
    error!(event = event::HTTP_ERROR, code = "panic", error = %panic, "a query panicked");
    let told = "the query failed; see the server's log";
    Problem::new(StatusCode::INTERNAL_SERVER_ERROR, "internal", told)
}

/// What is known of an image.
pub async fn image(
    State(shared): App,
    Path(id): Path<String>,
) -> Result<Json<ImageAnswer>, Problem> {
    Ok(Json(ImageAnswer::new(&*entry(&shared, &id)?)))
}

fn entry(shared: &Shared, id: &str) -> Result<Arc<Entry>, Problem> {
    let engines = &shared.app.engines;
    if !engines.live().snapshots().ready() {
        return Err(QueryError::NotReady.into());
    }
    engines.image(id).ok_or_else(|| QueryError::NoImage(id.to_owned()).into())
}

/// An image's picture, fetched from where it was announced.
pub async fn picture(
    State(shared): App,
    Extension(_turn): Extension<Turn>,
    Path(id): Path<String>,
) -> Result<Response, Problem> {
    let entry = entry(&shared, &id)?;
    let uri = entry.uri.clone();
    let uri = uri.filter(|_| shared.app.options.pictures).ok_or_else(|| {
        Problem::not_found(
            "there is no picture to show: its bytes came in the event, or http.pictures is off",
        )
    })?;
    let fetched = shared.app.fetcher.fetch(&Content::uri(uri), &shared.token).await;
    let fetched = fetched.map_err(|error| {
        let status = match error.verdict() {
            Verdict::DeadLetter => StatusCode::NOT_FOUND,
            Verdict::Retry | Verdict::Fatal => StatusCode::BAD_GATEWAY,
        };
        let told = match &error {
            // What others answer may name more than callers are to know.
            FetchError::Permanent { .. } | FetchError::Transient { .. } => {
                error!(event = event::HTTP_ERROR, code = error.code(), %error, "a picture was not to be had");
                "the picture's host or store did not give it; see the server's log".to_owned()
            }
            _ => error.to_string(),
        };
        Problem::new(status, error.code(), told)
    })?;
    // Only what is a picture by its content is passed on: anything else might run in the browser.
    let format = image::guess_format(&fetched.bytes).map_err(|_| {
        Problem::new(
            StatusCode::UNSUPPORTED_MEDIA_TYPE,
            "no_picture",
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
pub async fn events(
    State(shared): App,
) -> Result<Sse<impl Stream<Item = Result<Event, Infallible>>>, Problem> {
    let limit = shared.app.options.max_listeners;
    let turn = shared.listeners.clone().try_acquire_owned();
    let turn =
        turn.map_err(|_| Problem::busy(limit, "listeners are served (http.max_listeners)"))?;
    let live = shared.app.engines.live();
    let changes = live.snapshots().subscribe();
    let token = shared.token.clone();
    let state = (changes, live, turn, token);
    let stream = unfold((state, shared), |((mut changes, live, turn, token), shared)| async move {
        let change = loop {
            let change = tokio::select! {
                change = changes.recv() => Some(change),
                () = tokio::time::sleep(FEED_LOOK) => None,
                () = token.cancelled() => return None,
            };
            // Another generation has become live: a listener comes back to that one.
            if !Arc::ptr_eq(&live, &shared.app.engines.live()) {
                return None;
            }
            if let Some(change) = change {
                break change;
            }
        };
        let event = match change {
            Ok(change) => {
                Event::default().event("change").json_data(ChangeAnswer::from(&change)).ok()?
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
pub async fn unknown() -> Problem {
    Problem::not_found("there is no such route; see docs/api.md")
}

/// The route wants another method.
pub async fn wrong_method() -> Problem {
    Problem::new(
        StatusCode::METHOD_NOT_ALLOWED,
        "method",
        "this route wants another method; see docs/api.md",
    )
}
