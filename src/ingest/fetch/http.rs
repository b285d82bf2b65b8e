//! Images from web servers.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use reqwest::{Client, Response, StatusCode, header, redirect};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use url::{Host, Url};

use super::address::{NotPublic, PublicOnly, is_public};
use super::{FetchError, Options, passing, permanent, refused, transient};

/// Hosts whose concurrency is counted; past it the counts start anew.
const MAX_HOSTS: usize = 10_000;

/// Two clients: one that only sees public addresses, one for prefixes that the owner allowed.
pub struct Http {
    public: Client,
    allowed: Client,
    prefixes: Vec<String>,
    max_redirects: u32,
    timeout: Duration,
    per_host: usize,
    hosts: Mutex<HashMap<String, Arc<Semaphore>>>,
}

impl Http {
    pub fn new(options: &Options) -> Result<Self, FetchError> {
        let timeout = Duration::from_millis(options.timeout_ms);
        // No proxy: it would resolve names out of sight. Redirects are followed here, each checked.
        let client = || {
            Client::builder()
                .connect_timeout(timeout)
                .redirect(redirect::Policy::none())
                .no_proxy()
                .pool_max_idle_per_host(options.per_host)
                .user_agent(concat!("bsap/", env!("CARGO_PKG_VERSION")))
        };
        let failed = |e: reqwest::Error| permanent("http", e.to_string());
        Ok(Self {
            public: client().dns_resolver(Arc::new(PublicOnly)).build().map_err(failed)?,
            allowed: client().build().map_err(failed)?,
            prefixes: options.allow_http.iter().map(|prefix| normalised(prefix)).collect(),
            max_redirects: options.max_redirects,
            timeout,
            per_host: options.per_host,
            hosts: Mutex::new(HashMap::new()),
        })
    }

    /// The answer with status 200, its body not yet read, and this host's turn, to be held until
    /// the body is.
    pub async fn get(&self, url: &Url) -> Result<(Response, OwnedSemaphorePermit), FetchError> {
        let mut url = url.clone();
        for _ in 0..=self.max_redirects {
            let (response, turn) = self.send(&url).await?;
            if !response.status().is_redirection() {
                return judge(&url, response).map(|response| (response, turn));
            }
            url = target(&url, &response)?;
        }
        let reason = format!("more than fetch.max_redirects = {} redirects", self.max_redirects);
        Err(permanent(url.as_str(), reason))
    }

    async fn send(&self, url: &Url) -> Result<(Response, OwnedSemaphorePermit), FetchError> {
        let client = self.client(url)?;
        let host = url.host_str().unwrap_or_default();
        let turn = self
            .turns(host)
            .acquire_owned()
            .await
            .map_err(|_| transient(url.as_str(), "shutting down"))?;
        let sent = tokio::time::timeout(self.timeout, client.get(url.clone()).send());
        let response = sent
            .await
            .map_err(|_| transient(url.as_str(), "no answer within fetch.timeout_ms"))?
            .map_err(|error| failure(url, error))?;
        Ok((response, turn))
    }

    /// The client that may fetch `url`.
    fn client(&self, url: &Url) -> Result<&Client, FetchError> {
        if !matches!(url.scheme(), "http" | "https") {
            return Err(refused(url.as_str(), "redirects to another scheme".into()));
        }
        // Normalised by the parser: `http://host:80/../x` cannot pretend to a prefix.
        if self.prefixes.iter().any(|p| url.as_str().starts_with(p)) {
            return Ok(&self.allowed);
        }
        let literal = match url.host() {
            Some(Host::Ipv4(v4)) => Some(v4.into()),
            Some(Host::Ipv6(v6)) => Some(v6.into()),
            Some(Host::Domain(_)) => None,
            None => return Err(refused(url.as_str(), "names no host".into())),
        };
        match literal {
            Some(address) if !is_public(address) => {
                Err(refused(url.as_str(), NotPublic(address.to_string()).to_string()))
            }
            _ => Ok(&self.public),
        }
    }

    fn turns(&self, host: &str) -> Arc<Semaphore> {
        let mut hosts = self.hosts.lock().unwrap_or_else(PoisonError::into_inner);
        if hosts.len() >= MAX_HOSTS {
            hosts.clear();
        }
        hosts
            .entry(host.to_owned())
            .or_insert_with(|| Arc::new(Semaphore::new(self.per_host)))
            .clone()
    }
}

/// As the parser writes URLs: without the port that its scheme has anyway, the host in small letters.
fn normalised(prefix: &str) -> String {
    Url::parse(prefix).map_or_else(|_| prefix.to_owned(), Into::into)
}

fn judge(url: &Url, response: Response) -> Result<Response, FetchError> {
    let status = response.status();
    match status {
        StatusCode::OK => Ok(response),
        StatusCode::NOT_FOUND | StatusCode::GONE => {
            Err(FetchError::Gone { uri: super::shorten(url.as_str()) })
        }
        StatusCode::REQUEST_TIMEOUT | StatusCode::TOO_MANY_REQUESTS => {
            Err(passing(url.as_str(), format!("status {status}")))
        }
        _ if status.is_server_error() => Err(transient(url.as_str(), format!("status {status}"))),
        _ => Err(permanent(url.as_str(), format!("status {status}"))),
    }
}

fn target(from: &Url, response: &Response) -> Result<Url, FetchError> {
    response
        .headers()
        .get(header::LOCATION)
        .and_then(|location| location.to_str().ok())
        .and_then(|location| from.join(location).ok())
        .ok_or_else(|| permanent(from.as_str(), "redirects without a usable location".into()))
}

fn failure(url: &Url, error: reqwest::Error) -> FetchError {
    let mut source: Option<&dyn std::error::Error> = Some(&error);
    while let Some(inner) = source {
        if let Some(not_public) = inner.downcast_ref::<NotPublic>() {
            return refused(url.as_str(), not_public.to_string());
        }
        source = inner.source();
    }
    transient(url.as_str(), error.without_url().to_string())
}
