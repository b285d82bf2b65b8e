//! Authentication and authorisation: by a key in the header `Authorization`, or by a session of the
//! page.

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

use super::body::problem::Problem;
use super::credentials::api_keys::{self, ApiKey, Scope};
use super::credentials::session::SESSION_COOKIE_NAME;
use super::state::HandlerState;
use crate::telemetry::event;

/// Who sent a request: the holder of a key, or `None` if the server requires no key.
/// [`authorise_request`] adds it to the request.
#[derive(Clone)]
pub struct Principal(Option<Arc<ApiKey>>);

impl Principal {
    pub fn key_name(&self) -> Option<String> {
        self.0.as_ref().map(|key| key.name.clone())
    }
}

/// What [`authorise_request`] needs to know about a route.
#[derive(Clone)]
pub struct AuthLayer {
    pub handler_state: Arc<HandlerState>,
    /// `None`: a key with any scope is enough.
    pub required_scope: Option<Scope>,
}

/// Rejects requests whose sender does not have the required scope; passes the [`Principal`] of
/// others to the handler.
pub async fn authorise_request(
    State(auth): State<AuthLayer>,
    mut request: Request,
    next: Next,
) -> Response {
    let principal = authenticate(&auth.handler_state, request.method(), request.headers())
        .and_then(|principal| require_scope(principal, auth.required_scope));
    match principal {
        Ok(principal) => {
            request.extensions_mut().insert(principal);
            next.run(request).await
        }
        Err(problem) => log_denied_request(problem).into_response(),
    }
}

/// Logs a rejected request, which may be an attack. A missing key is not logged: the page sends its
/// first requests without one.
fn log_denied_request(problem: Problem) -> Problem {
    let code = problem.code();
    if code != "missing_api_key" {
        warn!(event = event::ACCESS_DENIED, code, "a request was denied");
    }
    problem
}

fn require_scope(principal: Principal, scope: Option<Scope>) -> Result<Principal, Problem> {
    match (&principal.0, scope) {
        (Some(key), Some(scope)) if !key.allows(scope) => {
            Err(Problem::insufficient_scope(&key.name, scope))
        }
        _ => Ok(principal),
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
                "no key is required, so only requests to localhost or a loopback address are answered; behind a proxy that authenticates set http.allow_unauthenticated = true",
            ))
        };
    }
    if let Some(secret) = parse_bearer_key(headers) {
        let key = api_keys::find_key_by_secret(&shared.api_keys, secret?)
            .ok_or_else(Problem::invalid_api_key)?;
        return Ok(Principal(Some(key.clone())));
    }
    let key = parse_session_cookie(headers)
        .and_then(|token| shared.session_store.find_session_key(token));
    let key = key.ok_or_else(Problem::missing_api_key)?;
    // `SameSite=Strict` does not stop pages of another port, or of another subdomain of the same
    // site.
    if !method.is_safe() && is_same_origin(headers) != Some(true) {
        return Err(Problem::cross_site_request());
    }
    Ok(Principal(Some(key)))
}

/// Returns whether the header `Host` names this machine only. Protects against DNS rebinding:
/// another site can have its name resolved to 127.0.0.1, to read responses by a visitor's browser,
/// but then `Host` is that name.
fn has_loopback_host(headers: &HeaderMap) -> bool {
    let Some(host) = headers.get(header::HOST) else { return true };
    let host = host.to_str().ok().and_then(|host| host.parse::<Uri>().ok());
    let name = host.as_ref().and_then(Uri::host).unwrap_or_default();
    let address = name.trim_start_matches('[').trim_end_matches(']').parse::<std::net::IpAddr>();
    name.eq_ignore_ascii_case("localhost") || address.is_ok_and(|address| address.is_loopback())
}

/// Returns the key in the header `Authorization`; `None` if there is no such header.
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
    pairs.find(|(name, _)| *name == SESSION_COOKIE_NAME).map(|(_, token)| token)
}

/// Returns whether a page of this server sent the request; `None` if the request does not say, as
/// from programs other than browsers. Browsers set `Sec-Fetch-Site`, without TLS only `Origin`, which
/// is compared with `Host` and with the host that a proxy was asked for, `X-Forwarded-Host`; pages of
/// other sites cannot set any of them.
fn is_same_origin(headers: &HeaderMap) -> Option<bool> {
    const SEC_FETCH_SITE: HeaderName = HeaderName::from_static("sec-fetch-site");
    const X_FORWARDED_HOST: HeaderName = HeaderName::from_static("x-forwarded-host");
    if let Some(site) = headers.get(SEC_FETCH_SITE) {
        return Some(site == "same-origin");
    }
    let origin = headers.get(header::ORIGIN)?.to_str().ok().and_then(|o| o.split_once("://"));
    let Some((_, origin)) = origin else { return Some(false) };
    let is_origin = |name: HeaderName| {
        // Each of several proxies adds a host; the first is the one that the browser named.
        let hosts = headers.get(name).and_then(|hosts| hosts.to_str().ok());
        let host = hosts.and_then(|hosts| hosts.split(',').next());
        host.is_some_and(|host| origin.eq_ignore_ascii_case(host.trim()))
    };
    Some(is_origin(header::HOST) || is_origin(X_FORWARDED_HOST))
}

/// Who is authenticated.
#[derive(Debug, Serialize, JsonSchema)]
pub struct SessionResponse {
    /// Name of the key; null if the server requires none.
    api_key_name: Option<String>,
    /// What the key permits.
    scopes: Vec<Scope>,
}

impl SessionResponse {
    fn new(principal: &Principal) -> Self {
        let all = [Scope::Search, Scope::Feedback, Scope::Admin];
        let allowed = |scope: &Scope| principal.0.as_ref().is_none_or(|key| key.allows(*scope));
        Self {
            api_key_name: principal.key_name(),
            scopes: all.into_iter().filter(allowed).collect(),
        }
    }
}

/// `GET /v1/session`: returns who is authenticated.
pub async fn get_session(Extension(principal): Extension<Principal>) -> Json<SessionResponse> {
    Json(SessionResponse::new(&principal))
}

/// The key to sign in with.
#[derive(Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct SignInRequest {
    /// The secret, as `bsap keys new` printed it.
    api_key: String,
}

/// `POST /v1/session`: opens a session for the key in the header `Authorization` or in the body.
pub async fn sign_in(
    State(shared): State<Arc<HandlerState>>,
    request: Request,
) -> Result<Response, Problem> {
    if shared.api_keys.is_empty() {
        return Err(Problem::new(
            StatusCode::CONFLICT,
            "no_api_keys_configured",
            "no key is required (http.keys is empty), so there is nothing to sign in to",
        ));
    }
    let headers = request.headers().clone();
    // Another site must not sign a visitor in with a key that is not the visitor's.
    if is_same_origin(&headers) == Some(false) {
        return Err(log_denied_request(Problem::cross_site_request()));
    }
    let secret = match parse_bearer_key(&headers) {
        Some(secret) => secret?.to_owned(),
        None => {
            let body: Result<Json<SignInRequest>, JsonRejection> = request.extract().await;
            body?.0.api_key
        }
    };
    let key = api_keys::find_key_by_secret(&shared.api_keys, secret.trim())
        .ok_or_else(|| log_denied_request(Problem::invalid_api_key()))?
        .clone();
    let token = shared.session_store.open_session(key.clone());
    let body = Json(SessionResponse::new(&Principal(Some(key))));
    Ok(([(header::SET_COOKIE, build_session_cookie(&shared, &headers, Some(&token))?)], body)
        .into_response())
}

/// `DELETE /v1/session`: ends the session.
pub async fn sign_out(
    State(shared): State<Arc<HandlerState>>,
    headers: HeaderMap,
) -> Result<Response, Problem> {
    if let Some(token) = parse_session_cookie(&headers) {
        shared.session_store.end_session(token);
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
    // A client that forges this header harms only itself: its cookie is then sent by TLS only.
    let secure = shared.context.options.is_tls_enabled()
        || headers.get(X_FORWARDED_PROTO).is_some_and(|proto| proto == "https");
    HeaderValue::from_str(&shared.session_store.session_cookie_header_value(token, secure)).map_err(
        |_| {
            Problem::new(
                StatusCode::INTERNAL_SERVER_ERROR,
                "internal",
                "the cookie cannot be written",
            )
        },
    )
}
