//! Requests to the hub: redirects, the token, and what answers mean.

use std::time::Duration;

use percent_encoding::{AsciiSet, CONTROLS, utf8_percent_encode};
use reqwest::header::{self, HeaderMap};
use reqwest::{Client, Method, Response, StatusCode, redirect};
use url::Url;

use super::cache::is_plain_name;
use super::environment::HubEnvironment;
use super::error::HubError;
use crate::diagnosis;

/// Redirects that are followed: the hub to its storage takes one or two.
const MAX_REDIRECTS: usize = 10;
/// Longest pause that an overloaded server may ask for.
const MAX_RETRY_AFTER: Duration = Duration::from_secs(60);
/// What must be escaped in a part of a path, `/` included.
const PATH_PART: &AsciiSet = &CONTROLS
    .add(b' ')
    .add(b'"')
    .add(b'#')
    .add(b'%')
    .add(b'/')
    .add(b'<')
    .add(b'>')
    .add(b'?')
    .add(b'\\')
    .add(b'^')
    .add(b'`')
    .add(b'{')
    .add(b'|')
    .add(b'}');

/// A model of the hub, and how it is asked for its files.
pub struct HubClient<'a> {
    http: Client,
    environment: &'a HubEnvironment,
    /// `organisation/name`.
    id: String,
}

/// What the hub says of a file.
#[derive(Debug, Clone)]
pub struct FileMetadata {
    /// The commit that the file is of.
    pub commit: String,
    /// Names the bytes: their SHA-256, git's id, or something of the server's own.
    pub etag: String,
    /// In bytes; `None` if the hub does not say it.
    pub size: Option<u64>,
}

/// What the hub says about a name.
pub enum FileLookup {
    Found(FileMetadata),
    /// There is no such file; of this commit, if the hub names it.
    Absent(Option<String>),
}

/// Headers that describe the file, gathered on the way from the hub to its storage.
#[derive(Default)]
struct FileHeaders {
    commit: Option<String>,
    linked_etag: Option<String>,
    etag: Option<String>,
    linked_size: Option<u64>,
    size: Option<u64>,
}

impl<'a> HubClient<'a> {
    pub fn new(environment: &'a HubEnvironment, id: &str) -> Result<Self, HubError> {
        // The proxies of HTTPS_PROXY, HTTP_PROXY and NO_PROXY apply, and the certificate authorities
        // of the system or of SSL_CERT_FILE. Redirects are followed in `send`.
        let http = Client::builder()
            .connect_timeout(environment.stall_timeout)
            .redirect(redirect::Policy::none())
            .user_agent(concat!("bsap/", env!("CARGO_PKG_VERSION")))
            .build()
            .map_err(|e| {
                HubError::Refused(format!("the client of the hub: {}", diagnosis::describe(&e)))
            })?;
        Ok(Self { http, environment, id: id.to_owned() })
    }

    /// Asks for the commit, the etag and the size of a file.
    pub async fn look_up(&self, revision: &str, file: &str) -> Result<FileLookup, HubError> {
        let url = self.file_url(revision, file);
        let (mut response, mut headers) = self.send(Method::HEAD, &url, None).await?;
        if is_head_refused(response.status()) {
            // Some mirrors know GET alone.
            (response, headers) = self.send(Method::GET, &url, Some("bytes=0-0")).await?;
        }
        if response.status() == StatusCode::NOT_FOUND {
            return Ok(FileLookup::Absent(headers.commit));
        }
        let missing = |name: &str| {
            HubError::Refused(format!("{} has no usable {name}; is it a hub?", shorten(&url)))
        };
        let etag = headers.linked_etag.or(headers.etag).and_then(|etag| parse_etag(&etag));
        Ok(FileLookup::Found(FileMetadata {
            commit: headers.commit.ok_or_else(|| missing("x-repo-commit"))?,
            etag: etag.ok_or_else(|| missing("etag"))?,
            size: headers.linked_size.or(headers.size),
        }))
    }

    /// Starts a download at a byte. Returns the response with status 200, 206 or 416.
    pub async fn get(
        &self,
        commit: &str,
        file: &str,
        first_byte: u64,
    ) -> Result<Response, HubError> {
        let url = self.file_url(commit, file);
        let range = (first_byte > 0).then(|| format!("bytes={first_byte}-"));
        let (response, _) = self.send(Method::GET, &url, range.as_deref()).await?;
        if response.status() == StatusCode::NOT_FOUND {
            return Err(HubError::Refused(format!("{}: status 404", shorten(&url))));
        }
        Ok(response)
    }

    fn file_url(&self, revision: &str, file: &str) -> Url {
        let mut url = self.environment.endpoint.clone();
        let file: Vec<String> =
            file.split('/').map(|part| utf8_percent_encode(part, PATH_PART).to_string()).collect();
        url.set_path(&format!(
            "{}/{}/resolve/{}/{}",
            url.path().trim_end_matches('/'),
            self.id,
            utf8_percent_encode(revision, PATH_PART),
            file.join("/")
        ));
        url
    }

    /// Sends a request and follows redirects; the token goes to the endpoint only. Returns a response
    /// whose status is a success, 404 or 416, or says that HEAD is not known.
    async fn send(
        &self,
        method: Method,
        from: &Url,
        range: Option<&str>,
    ) -> Result<(Response, FileHeaders), HubError> {
        let mut url = from.clone();
        let mut at_hub = true;
        let mut described = FileHeaders::default();
        for _ in 0..=MAX_REDIRECTS {
            let mut request = self.http.request(method.clone(), url.clone());
            // A compressed answer has another size, and cannot be resumed.
            request = request.header(header::ACCEPT_ENCODING, "identity");
            if let Some(range) = range {
                request = request.header(header::RANGE, range);
            }
            if let Some(token) = self.environment.token.as_ref().filter(|_| at_hub) {
                request = request.header(header::AUTHORIZATION, token.header.clone());
            }
            let silent = || {
                let limit = self.environment.stall_timeout.as_secs();
                HubError::transient(format!("{}: no answer within {limit} s", shorten(&url)))
            };
            let response = tokio::time::timeout(self.environment.stall_timeout, request.send())
                .await
                .map_err(|_| silent())?
                .map_err(|e| HubError::transient(format!("{}: {}", shorten(&url), describe(e))))?;
            described.add(response.headers(), response.status(), at_hub);
            if !response.status().is_redirection() {
                if method != Method::HEAD || !is_head_refused(response.status()) {
                    self.check_status(&url, &response, at_hub)?;
                }
                return Ok((response, described));
            }
            let target = redirect_target(&url, &response)?;
            let same_host = target.origin() == self.environment.endpoint.origin();
            if method == Method::HEAD && !same_host && described.is_complete() {
                // Signed addresses of a storage often allow no HEAD.
                return Ok((response, described));
            }
            at_hub &= same_host;
            url = target;
        }
        Err(HubError::Refused(format!("{}: more than {MAX_REDIRECTS} redirects", shorten(from))))
    }

    /// Turns a status that is no answer into an error that says what to do.
    fn check_status(&self, url: &Url, response: &Response, at_hub: bool) -> Result<(), HubError> {
        let status = response.status();
        let code = header_text(response.headers(), "x-error-code").unwrap_or_default();
        let host = shorten(&self.environment.endpoint);
        let id = &self.id;
        match status {
            _ if status.is_success() => Ok(()),
            StatusCode::RANGE_NOT_SATISFIABLE => Ok(()),
            StatusCode::NOT_FOUND => match code.as_str() {
                "RepoNotFound" => Err(HubError::Refused(format!("{host} has no model {id} (404)"))),
                "RevisionNotFound" => Err(HubError::Refused(format!(
                    "{id} has no such branch, tag or commit on {host} (404); check the revision"
                ))),
                _ => Ok(()),
            },
            StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN if at_hub => {
                Err(HubError::Refused(self.explain_refusal(status, &code)))
            }
            // An address of the storage that has expired: the hub signs another one.
            StatusCode::UNAUTHORIZED
            | StatusCode::FORBIDDEN
            | StatusCode::REQUEST_TIMEOUT
            | StatusCode::TOO_MANY_REQUESTS => Err(transient_status(url, response)),
            _ if status.is_server_error() => Err(transient_status(url, response)),
            _ => Err(HubError::Refused(format!("{}: status {}", shorten(url), status.as_u16()))),
        }
    }

    fn explain_refusal(&self, status: StatusCode, code: &str) -> String {
        let (id, status) = (&self.id, status.as_u16());
        let host = shorten(&self.environment.endpoint);
        let terms = if code == "GatedRepo" {
            format!("accept its terms at {host}/{id} and ")
        } else {
            String::new()
        };
        match &self.environment.token {
            None => format!(
                "{host} refuses {id} without a token ({status}): it is private, gated or not there; {terms}set HF_TOKEN to a token that may read it"
            ),
            Some(token) => format!(
                "{host} refuses {id} with the token of {} ({status}): it is expired or may not read this model; {terms}set HF_TOKEN to a token that may",
                token.source
            ),
        }
    }
}

impl FileHeaders {
    fn add(&mut self, headers: &HeaderMap, status: StatusCode, at_hub: bool) {
        let text = |name: &str| header_text(headers, name);
        let number = |name: &str| text(name)?.parse().ok();
        if at_hub {
            self.commit =
                self.commit.take().or_else(|| text("x-repo-commit").filter(|c| is_plain_name(c)));
            self.linked_etag = self.linked_etag.take().or_else(|| text("x-linked-etag"));
            self.linked_size = self.linked_size.or_else(|| number("x-linked-size"));
        }
        // The hub's own word counts more than that of its storage.
        if at_hub || self.etag.is_none() {
            self.etag = text("etag").or_else(|| self.etag.take());
        }
        if status == StatusCode::PARTIAL_CONTENT {
            let range = text("content-range").unwrap_or_default();
            self.size = range.rsplit_once('/').and_then(|(_, total)| total.parse().ok());
        } else if status.is_success() && text("content-encoding").is_none() {
            self.size = number("content-length");
        }
    }

    fn is_complete(&self) -> bool {
        self.commit.is_some() && (self.linked_etag.is_some() || self.etag.is_some())
    }
}

fn is_head_refused(status: StatusCode) -> bool {
    matches!(status, StatusCode::METHOD_NOT_ALLOWED | StatusCode::NOT_IMPLEMENTED)
}

/// Returns an etag without quotes and without the mark of a weak one; `None` if it cannot be the name
/// of a file.
fn parse_etag(etag: &str) -> Option<String> {
    let etag = etag.trim();
    let etag = etag.strip_prefix("W/").unwrap_or(etag).trim_matches('"');
    is_plain_name(etag).then(|| etag.to_owned())
}

fn header_text(headers: &HeaderMap, name: &str) -> Option<String> {
    headers.get(name)?.to_str().ok().map(str::to_owned)
}

fn transient_status(url: &Url, response: &Response) -> HubError {
    let seconds = header_text(response.headers(), "retry-after").and_then(|s| s.parse().ok());
    HubError::Transient {
        reason: format!("{}: status {}", shorten(url), response.status().as_u16()),
        retry_after: seconds.map(|s| Duration::from_secs(s).min(MAX_RETRY_AFTER)),
    }
}

/// Returns the address to which a response redirects.
fn redirect_target(from: &Url, response: &Response) -> Result<Url, HubError> {
    header_text(response.headers(), "location")
        .and_then(|location| from.join(&location).ok())
        .filter(|target| matches!(target.scheme(), "http" | "https"))
        .ok_or_else(|| {
            HubError::Refused(format!("{} redirects without a valid location", shorten(from)))
        })
}

/// Returns an address without user, password, query and fragment, which may be secret.
pub fn shorten(url: &Url) -> String {
    let path = url.path().trim_end_matches('/');
    format!("{}{path}", url.origin().ascii_serialization())
}

/// Describes an error of the client with its causes, without the address.
pub fn describe(error: reqwest::Error) -> String {
    diagnosis::describe(&error.without_url())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_etag_is_the_name_of_a_file_or_refused() {
        for (written, parsed) in [
            ("\"0a1b\"", Some("0a1b")),
            ("W/\"0a1b-gzip\"", Some("0a1b-gzip")),
            ("0a1b", Some("0a1b")),
            ("\"../../x\"", None),
            ("\"..\"", None),
            ("\"a/b\"", None),
            ("\"\"", None),
        ] {
            assert_eq!(parse_etag(written).as_deref(), parsed, "{written}");
        }
        assert_eq!(parse_etag(&"a".repeat(1_000)), None);
    }

    #[test]
    fn addresses_in_messages_have_no_secrets() {
        let url = Url::parse("https://user:pass@h:8443/hub/a?X-Signature=secret#f").unwrap();
        assert_eq!(shorten(&url), "https://h:8443/hub/a");
    }
}
