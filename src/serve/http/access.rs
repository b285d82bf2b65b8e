//! Who may ask what: a key in the header `Authorization`, or the session of the page.

use std::sync::Arc;

use axum::extract::rejection::JsonRejection;
use axum::extract::{Extension, Request, State};
use axum::http::{HeaderMap, HeaderName, HeaderValue, Method, StatusCode, Uri, header};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};
use axum::{Json, RequestExt as _};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use tracing::warn;

use super::Shared;
use super::keys::{self, Key, Scope};
use super::problem::Problem;
use super::session::COOKIE;
use crate::telemetry::event;

/// Who asks, of every request that came through a [`Door`]; none where no key is asked for.
#[derive(Clone)]
pub struct Caller(Option<Arc<Key>>);

impl Caller {
    /// The key's name.
    pub fn name(&self) -> Option<String> {
        self.0.as_ref().map(|key| key.name.clone())
    }
}

/// What a route needs.
#[derive(Clone)]
pub struct Door {
    pub shared: Arc<Shared>,
    /// None: any key.
    pub scope: Option<Scope>,
}

/// Lets a request through whose caller may do this, and tells the handler who it is.
pub async fn pass(State(door): State<Door>, mut request: Request, next: Next) -> Response {
    let caller = caller(&door.shared, request.method(), request.headers())
        .and_then(|caller| permit(caller, door.scope));
    match caller {
        Ok(caller) => {
            request.extensions_mut().insert(caller);
            next.run(request).await
        }
        Err(problem) => refused(problem).into_response(),
    }
}

/// Logs what may be an attempt to get at something; that a key is missing is how every visit begins.
fn refused(problem: Problem) -> Problem {
    let code = problem.code();
    if code != "no_key" {
        warn!(event = event::ACCESS_REFUSED, code, "a request was refused");
    }
    problem
}

fn permit(caller: Caller, scope: Option<Scope>) -> Result<Caller, Problem> {
    match (&caller.0, scope) {
        (Some(key), Some(scope)) if !key.may(scope) => {
            Err(Problem::not_permitted(&key.name, scope))
        }
        _ => Ok(caller),
    }
}

fn caller(shared: &Shared, method: &Method, headers: &HeaderMap) -> Result<Caller, Problem> {
    if shared.keys.is_empty() {
        return if shared.app.options.open || local(headers) {
            Ok(Caller(None))
        } else {
            Err(Problem::new(
                StatusCode::FORBIDDEN,
                "host",
                "no key is asked for, so only this machine is answered, by the name localhost or its address; behind a proxy that authenticates set http.open = true",
            ))
        };
    }
    if let Some(secret) = bearer(headers) {
        let key = keys::find(&shared.keys, secret?).ok_or_else(Problem::wrong_key)?;
        return Ok(Caller(Some(key.clone())));
    }
    let key = cookie(headers).and_then(|token| shared.sessions.key(token));
    let key = key.ok_or_else(Problem::no_key)?;
    // `SameSite=Strict` says the same, but not of another port or a sibling of this host's name.
    if !method.is_safe() && from_here(headers) != Some(true) {
        return Err(Problem::cross_site());
    }
    Ok(Caller(Some(key)))
}

/// Whether the host was asked by a name that only this machine has. A page elsewhere can have its own
/// name resolved to 127.0.0.1 to read answers with its visitor's browser; its requests carry that name.
fn local(headers: &HeaderMap) -> bool {
    let Some(host) = headers.get(header::HOST) else { return true };
    let host = host.to_str().ok().and_then(|host| host.parse::<Uri>().ok());
    let name = host.as_ref().and_then(Uri::host).unwrap_or_default();
    let address = name.trim_start_matches('[').trim_end_matches(']').parse::<std::net::IpAddr>();
    name.eq_ignore_ascii_case("localhost") || address.is_ok_and(|address| address.is_loopback())
}

/// The key in the header `Authorization`, where there is that header.
fn bearer(headers: &HeaderMap) -> Option<Result<&str, Problem>> {
    let value = headers.get(header::AUTHORIZATION)?.to_str().ok();
    let parts = value.and_then(|value| value.split_once(' '));
    let key = parts.filter(|(scheme, _)| scheme.eq_ignore_ascii_case("bearer"));
    Some(key.map(|(_, key)| key.trim()).ok_or_else(Problem::wrong_key))
}

fn cookie(headers: &HeaderMap) -> Option<&str> {
    let cookies = headers.get_all(header::COOKIE).iter().filter_map(|value| value.to_str().ok());
    let mut pairs =
        cookies.flat_map(|value| value.split(';')).filter_map(|p| p.trim().split_once('='));
    pairs.find(|(name, _)| *name == COOKIE).map(|(_, token)| token)
}

/// Whether a page of this server sent the request, where a browser says so. Browsers tell other sites
/// by `Sec-Fetch-Site`, or without TLS by `Origin` alone; a page cannot change either.
fn from_here(headers: &HeaderMap) -> Option<bool> {
    const SEC_FETCH_SITE: HeaderName = HeaderName::from_static("sec-fetch-site");
    if let Some(site) = headers.get(SEC_FETCH_SITE) {
        return Some(site == "same-origin");
    }
    let origin = headers.get(header::ORIGIN)?.to_str().ok().and_then(|o| o.split_once("://"));
    let host = headers.get(header::HOST).and_then(|host| host.to_str().ok());
    Some(origin.zip(host).is_some_and(|((_, origin), host)| origin.eq_ignore_ascii_case(host)))
}

/// Who is signed in.
#[derive(Debug, Serialize, JsonSchema)]
pub struct SessionAnswer {
    /// Name of the key; none where no key is asked for.
    key: Option<String>,
    /// What may be done.
    scopes: Vec<Scope>,
}

impl SessionAnswer {
    fn new(caller: &Caller) -> Self {
        let all = [Scope::Search, Scope::Feedback, Scope::Admin];
        let may = |scope: &Scope| caller.0.as_ref().is_none_or(|key| key.may(*scope));
        Self { key: caller.name(), scopes: all.into_iter().filter(may).collect() }
    }
}

/// Who asks, and what they may do.
pub async fn session(Extension(caller): Extension<Caller>) -> Json<SessionAnswer> {
    Json(SessionAnswer::new(&caller))
}

/// A key to sign in with.
#[derive(Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct SignIn {
    /// As `bsap keys new` printed it.
    key: String,
}

/// Opens a session for the holder of a key, in the header `Authorization` or the body.
pub async fn sign_in(
    State(shared): State<Arc<Shared>>,
    request: Request,
) -> Result<Response, Problem> {
    if shared.keys.is_empty() {
        return Err(Problem::new(
            StatusCode::CONFLICT,
            "no_keys",
            "no key is asked for (http.keys has none): nobody needs to sign in",
        ));
    }
    let headers = request.headers().clone();
    // Nobody is to be signed in by another site with a key that is not theirs.
    if from_here(&headers) == Some(false) {
        return Err(refused(Problem::cross_site()));
    }
    let secret = match bearer(&headers) {
        Some(secret) => secret?.to_owned(),
        None => {
            let body: Result<Json<SignIn>, JsonRejection> = request.extract().await;
            body?.0.key
        }
    };
    let key = keys::find(&shared.keys, secret.trim())
        .ok_or_else(|| refused(Problem::wrong_key()))?
        .clone();
    let token = shared.sessions.sign_in(key.clone());
    let answer = Json(SessionAnswer::new(&Caller(Some(key))));
    Ok(([(header::SET_COOKIE, set(&shared, &headers, Some(&token))?)], answer).into_response())
}

/// Ends the session.
pub async fn sign_out(
    State(shared): State<Arc<Shared>>,
    headers: HeaderMap,
) -> Result<Response, Problem> {
    if let Some(token) = cookie(&headers) {
        shared.sessions.sign_out(token);
    }
    let cookie = [(header::SET_COOKIE, set(&shared, &headers, None)?)];
    Ok((StatusCode::NO_CONTENT, cookie).into_response())
}

fn set(shared: &Shared, headers: &HeaderMap, token: Option<&str>) -> Result<HeaderValue, Problem> {
    const FORWARDED: HeaderName = HeaderName::from_static("x-forwarded-proto");
    // Whoever lies here harms nobody but themselves: their cookie is not sent without TLS.
    let secure =
        shared.app.options.tls() || headers.get(FORWARDED).is_some_and(|proto| proto == "https");
    HeaderValue::from_str(&shared.sessions.cookie(token, secure)).map_err(|_| {
        Problem::new(StatusCode::INTERNAL_SERVER_ERROR, "internal", "the cookie cannot be written")
    })
}
