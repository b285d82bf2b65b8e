//! Images from web servers.

use std::borrow::Cow;
use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use reqwest::{Client, Response, StatusCode, header, redirect};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use url::{Host, Url};

use super::address::{NotPublicError, PublicOnlyResolver, is_public};
use super::error::{
    FetchError, permanent_error, shorten_uri, transient_error, transient_error_after_response,
    uri_rejected_error,
};
use super::options::FetchOptions;
use crate::diagnosis::describe;

/// Maximum number of hosts with a semaphore; beyond it, all are dropped and counting starts again.
const MAX_HOST_SEMAPHORES: usize = 10_000;

/// Two clients: one that only connects to public addresses, one for the allowed private prefixes.
pub struct HttpClients {
    public_client: Client,
    allowlisted_client: Client,
    allowed_prefixes: Vec<String>,
    max_redirects: u32,
    response_head_timeout: Duration,
    max_requests_per_host: usize,
    host_semaphores: Mutex<HashMap<String, Arc<Semaphore>>>,
}

impl HttpClients {
    pub fn new(options: &FetchOptions) -> Result<Self, FetchError> {
        let timeout = Duration::from_millis(options.idle_timeout_ms);
        // No proxy: it would resolve names itself, past the address check. Redirects are followed in
        // `get`, which checks each target.
        let client = || {
            Client::builder()
                .connect_timeout(timeout)
                .redirect(redirect::Policy::none())
                .no_proxy()
                .pool_max_idle_per_host(options.max_requests_per_host)
                .user_agent(concat!("bsap/", env!("CARGO_PKG_VERSION")))
        };
        let client_error = |e: reqwest::Error| permanent_error("http", describe(&e));
        Ok(Self {
            public_client: client()
                .dns_resolver(Arc::new(PublicOnlyResolver))
                .build()
                .map_err(client_error)?,
            allowlisted_client: client().build().map_err(client_error)?,
            allowed_prefixes: normalise_prefixes(&options.allowed_private_url_prefixes),
            max_redirects: options.max_redirects,
            response_head_timeout: timeout,
            max_requests_per_host: options.max_requests_per_host,
            host_semaphores: Mutex::new(HashMap::new()),
        })
    }

    /// Sends a GET request and follows redirects. Returns the response with status 200 or 203 before its body is
    /// read, and the host's permit, which the caller holds until it has read the body.
    pub async fn get_following_redirects(
        &self,
        url: &Url,
    ) -> Result<(Response, OwnedSemaphorePermit), FetchError> {
        let mut url = url.clone();
        for _ in 0..=self.max_redirects {
            let (response, permit) = self.send_single_request(&url).await?;
            if !response.status().is_redirection() {
                return check_status(&url, response).map(|response| (response, permit));
            }
            url = redirect_target(&url, &response)?;
        }
        let reason = format!("more than fetch.max_redirects = {} redirects", self.max_redirects);
        Err(permanent_error(url.as_str(), reason))
    }

    /// Sends one GET request, once the host has a free permit.
    async fn send_single_request(
        &self,
        url: &Url,
    ) -> Result<(Response, OwnedSemaphorePermit), FetchError> {
        let client = self.client_for(url)?;
        let host = url.host_str().unwrap_or_default();
        let permit = self
            .host_semaphore(host)
            .acquire_owned()
            .await
            .map_err(|_| transient_error(url.as_str(), "shutting down"))?;
        let request =
            tokio::time::timeout(self.response_head_timeout, client.get(url.clone()).send());
        let response = request
            .await
            .map_err(|_| transient_error(url.as_str(), "no response within fetch.idle_timeout_ms"))?
            .map_err(|error| to_fetch_error(url, error))?;
        Ok((response, permit))
    }

    /// Returns the client that may fetch `url`.
    fn client_for(&self, url: &Url) -> Result<&Client, FetchError> {
        if !matches!(url.scheme(), "http" | "https") {
            return Err(uri_rejected_error(url.as_str(), "redirects to another scheme".into()));
        }
        // The parser has normalised the URL, so that `http://host:80/../x` cannot fake a prefix.
        if self.allowed_prefixes.iter().any(|p| url.as_str().starts_with(p)) {
            return Ok(&self.allowlisted_client);
        }
        let literal = match url.host() {
            Some(Host::Ipv4(v4)) => Some(v4.into()),
            Some(Host::Ipv6(v6)) => Some(v6.into()),
            Some(Host::Domain(_)) => None,
            None => return Err(uri_rejected_error(url.as_str(), "names no host".into())),
        };
        match literal {
            Some(address) if !is_public(address) => Err(uri_rejected_error(
                url.as_str(),
                NotPublicError(address.to_string()).to_string(),
            )),
            _ => Ok(&self.public_client),
        }
    }

    /// Returns the semaphore that limits concurrent requests to `host`.
    fn host_semaphore(&self, host: &str) -> Arc<Semaphore> {
        let mut hosts = self.host_semaphores.lock().unwrap_or_else(PoisonError::into_inner);
        if hosts.len() >= MAX_HOST_SEMAPHORES {
            hosts.clear();
        }
        hosts
            .entry(host.to_owned())
            .or_insert_with(|| Arc::new(Semaphore::new(self.max_requests_per_host)))
            .clone()
    }
}

/// Normalises prefixes as the parser normalises URLs: without the default port, the host in lower case.
pub fn normalise_prefixes(prefixes: &[String]) -> Vec<String> {
    let normalise =
        |prefix: &String| Url::parse(prefix).map_or_else(|_| prefix.clone(), Into::into);
    prefixes.iter().map(normalise).collect()
}

/// Returns the response if its status is 200 or 203, otherwise an error by its status.
fn check_status(url: &Url, response: Response) -> Result<Response, FetchError> {
    let status = response.status();
    match status {
        StatusCode::OK | StatusCode::NON_AUTHORITATIVE_INFORMATION => Ok(response),
        StatusCode::FORBIDDEN => Err(FetchError::Forbidden {
            uri: shorten_uri(url.as_str()),
            reason: format!("status {status}"),
        }),
        StatusCode::NOT_FOUND | StatusCode::GONE => {
            Err(FetchError::NotFound { uri: shorten_uri(url.as_str()) })
        }
        StatusCode::REQUEST_TIMEOUT | StatusCode::TOO_MANY_REQUESTS => {
            Err(transient_error_after_response(url.as_str(), format!("status {status}")))
        }
        _ if status.is_server_error() => {
            Err(transient_error(url.as_str(), format!("status {status}")))
        }
        _ => Err(permanent_error(url.as_str(), format!("status {status}"))),
    }
}

/// Returns the URL to which a response redirects.
fn redirect_target(from: &Url, response: &Response) -> Result<Url, FetchError> {
    response
        .headers()
        .get(header::LOCATION)
        .and_then(|location| from.join(&decode_location(location.as_bytes())).ok())
        .ok_or_else(|| permanent_error(from.as_str(), "redirects without a valid location".into()))
}

/// Decodes a location, which should be ASCII but may be UTF-8 or, from old servers, Latin-1.
fn decode_location(location: &[u8]) -> Cow<'_, str> {
    match std::str::from_utf8(location) {
        Ok(text) => text.into(),
        Err(_) => location.iter().copied().map(char::from).collect::<String>().into(),
    }
}

/// Converts an error of the client; finds out whether the resolver rejected the host.
fn to_fetch_error(url: &Url, error: reqwest::Error) -> FetchError {
    let mut source: Option<&dyn std::error::Error> = Some(&error);
    while let Some(inner) = source {
        if let Some(not_public) = inner.downcast_ref::<NotPublicError>() {
            return uri_rejected_error(url.as_str(), not_public.to_string());
        }
        source = inner.source();
    }
    transient_error(url.as_str(), describe(&error.without_url()))
}
