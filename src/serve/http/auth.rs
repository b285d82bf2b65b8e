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

use super::HandlerState;
use super::api_keys::{self, ApiKey, Scope};
use super::problem::Problem;
use super::session::COOKIE_NAME;
use crate::telemetry::event;

/// Who asks, of every request that came through a [`Door`]; none where no key is asked for.
#[derive(Clone)]
pub struct Principal(Option<Arc<ApiKey>>);

impl Principal {
    /// The key's name.
    pub fn key_name(&self) -> Option<String> {
        self.0.as_ref().map(|key| key.name.clone())
    }
}

/// What a route needs.
#[derive(Clone)]
pub struct AuthLayer {
    pub state: Arc<HandlerState>,
    /// None: any key.
    pub required_scope: Option<Scope>,
}

/// Lets a request through whose caller may do this, and tells the handler who it is.
pub async fn authorise_request(
    State(auth): State<AuthLayer>,
    mut request: Request,
    next: Next,
) -> Response {
    let caller = authenticate(&auth.state, request.method(), request.headers())
        .and_then(|caller| check_scope(caller, auth.required_scope));
    match caller {
        Ok(caller) => {
            request.extensions_mut().insert(caller);
            next.run(request).await
        }
        Err(problem) => log_refusal(problem).into_response(),
    }
}

/// Logs what may be an attempt to get at something; that a key is missing is how every visit begins.
fn log_refusal(problem: Problem) -> Problem {
    let code = problem.code();
    if code != "missing_api_key" {
        warn!(event = event::ACCESS_DENIED, code, "a request was refused");
    }
    problem
}

fn check_scope(caller: Principal, scope: Option<Scope>) -> Result<Principal, Problem> {
    match (&caller.0, scope) {
        (Some(key), Some(scope)) if !key.allows(scope) => {
            Err(Problem::insufficient_scope(&key.name, scope))
        }
        _ => Ok(caller),
    }
}

fn authenticate(
    shared: &HandlerState,
    method: &Method,
    headers: &HeaderMap,
) -> Result<Principal, Problem> {
    if shared.api_keys.is_empty() {
        return if shared.context.options.allow_unauthenticated || has_loopback_host(headers) {
            Ok(Principal(None))
        } else {
            Err(Problem::new(
                StatusCode::FORBIDDEN,
                "host_not_allowed",
                "no key is asked for, so only this machine is answered, by the name localhost or its address; behind a proxy that authenticates set http.allow_unauthenticated = true",
            ))
        };
    }
    if let Some(secret) = parse_bearer_key(headers) {
        let key = api_keys::find_by_secret(&shared.api_keys, secret?)
            .ok_or_else(Problem::invalid_api_key)?;
        return Ok(Principal(Some(key.clone())));
    }
    let key = parse_session_cookie(headers).and_then(|token| shared.sessions.find_key(token));
    let key = key.ok_or_else(Problem::missing_api_key)?;
    // `SameSite=Strict` says the same, but not of another port or a sibling of this host's name.
    if !method.is_safe() && is_same_origin(headers) != Some(true) {
        return Err(Problem::cross_site_request());
    }
    Ok(Principal(Some(key)))
}

/// Whether the host was asked by a name that only this machine has. A page elsewhere can have its own
/// name resolved to 127.0.0.1 to read answers with its visitor's browser; its requests carry that name.
fn has_loopback_host(headers: &HeaderMap) -> bool {
    let Some(host) = headers.get(header::HOST) else { return true };
    let host = host.to_str().ok().and_then(|host| host.parse::<Uri>().ok());
    let name = host.as_ref().and_then(Uri::host).unwrap_or_default();
    let address = name.trim_start_matches('[').trim_end_matches(']').parse::<std::net::IpAddr>();
    name.eq_ignore_ascii_case("localhost") || address.is_ok_and(|address| address.is_loopback())
}

/// The key in the header `Authorization`, where there is that header.
fn parse_bearer_key(headers: &HeaderMap) -> Option<Result<&str, Problem>> {
    let value = headers.get(header::AUTHORIZATION)?.to_str().ok();
    let parts = value.and_then(|value| value.split_once(' '));
    let key = parts.filter(|(scheme, _)| scheme.eq_ignore_ascii_case("bearer"));
    Some(key.map(|(_, key)| key.trim()).ok_or_else(Problem::invalid_api_key))
}

fn parse_session_cookie(headers: &HeaderMap) -> Option<&str> {
    let cookies = headers.get_all(header::COOKIE).iter().filter_map(|value| value.to_str().ok());
    let mut pairs =
        cookies.flat_map(|value| value.split(';')).filter_map(|p| p.trim().split_once('='));
    pairs.find(|(name, _)| *name == COOKIE_NAME).map(|(_, token)| token)
}

/// Whether a page of this server sent the request, where a browser says so. Browsers tell other sites
/// by `Sec-Fetch-Site`, or without TLS by `Origin` alone; a page cannot change either.
fn is_same_origin(headers: &HeaderMap) -> Option<bool> {
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
pub struct SessionResponse {
    /// Name of the key; none where no key is asked for.
    api_key_name: Option<String>,
    /// What may be done.
    scopes: Vec<Scope>,
}

impl SessionResponse {
    fn new(caller: &Principal) -> Self {
        let all = [Scope::Search, Scope::Feedback, Scope::Admin];
        let may = |scope: &Scope| caller.0.as_ref().is_none_or(|key| key.allows(*scope));
        Self { api_key_name: caller.key_name(), scopes: all.into_iter().filter(may).collect() }
    }
}

/// Who asks, and what they may do.
pub async fn get_session(Extension(caller): Extension<Principal>) -> Json<SessionResponse> {
    Json(SessionResponse::new(&caller))
}

/// A key to sign in with.
#[derive(Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct SignInRequest {
    /// As `bsap keys new` printed it.
    api_key: String,
}

/// Opens a session for the holder of a key, in the header `Authorization` or the body.
pub async fn sign_in(
    State(shared): State<Arc<HandlerState>>,
    request: Request,
) -> Result<Response, Problem> {
    if shared.api_keys.is_empty() {
        return Err(Problem::new(
            StatusCode::CONFLICT,
            "no_api_keys_configured",
            "no key is asked for (http.keys has none): nobody needs to sign in",
        ));
    }
    let headers = request.headers().clone();
    // Nobody is to be signed in by another site with a key that is not theirs.
    if is_same_origin(&headers) == Some(false) {
        return Err(log_refusal(Problem::cross_site_request()));
    }
    let secret = match parse_bearer_key(&headers) {
        Some(secret) => secret?.to_owned(),
        None => {
            let body: Result<Json<SignInRequest>, JsonRejection> = request.extract().await;
            body?.0.api_key
        }
    };
    let key = api_keys::find_by_secret(&shared.api_keys, secret.trim())
        .ok_or_else(|| log_refusal(Problem::invalid_api_key()))?
        .clone();
    let token = shared.sessions.sign_in(key.clone());
    let answer = Json(SessionResponse::new(&Principal(Some(key))));
    Ok(([(header::SET_COOKIE, build_session_cookie(&shared, &headers, Some(&token))?)], answer)
        .into_response())
}

/// Ends the session.
pub async fn sign_out(
    State(shared): State<Arc<HandlerState>>,
    headers: HeaderMap,
) -> Result<Response, Problem> {
    if let Some(token) = parse_session_cookie(&headers) {
        shared.sessions.sign_out(token);
    }
    let cookie = [(header::SET_COOKIE, build_session_cookie(&shared, &headers, None)?)];
    Ok((StatusCode::NO_CONTENT, cookie).into_response())
}

fn build_session_cookie(
    shared: &HandlerState,
    headers: &HeaderMap,
    token: Option<&str>,
) -> Result<HeaderValue, Problem> {
    const X_FORWARDED_PROTO: HeaderName = HeaderName::from_static("x-forwarded-proto");
    // Whoever lies here harms nobody but themselves: their cookie is not sent without TLS.
    let secure = shared.context.options.is_tls_enabled()
        || headers.get(X_FORWARDED_PROTO).is_some_and(|proto| proto == "https");
    HeaderValue::from_str(&shared.sessions.set_cookie_value(token, secure)).map_err(|_| {
        Problem::new(StatusCode::INTERNAL_SERVER_ERROR, "internal", "the cookie cannot be written")
    })
}
