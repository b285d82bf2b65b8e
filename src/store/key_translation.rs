//! Lets `object_store` list and fetch objects whose keys it cannot express as paths.
//!
//! `object_store` parses every key of a listing as a path: one key that is none ends the listing, and a slash
//! at the beginning or end is dropped, which makes it the key of another object. The client below is
//! between `object_store` and the network. It writes such keys of a listing in the escaped form of
//! [`object_keys`](super::object_keys), and sends a request for an escaped key as one for the key itself, signed
//! again where the signature covers the path.

use std::borrow::Cow;
use std::fmt;
use std::sync::{Arc, OnceLock};

use async_trait::async_trait;
use hyper::Uri;
use hyper::header::{AUTHORIZATION, CONTENT_LENGTH};
use object_store::ClientOptions;
use object_store::aws::{AwsAuthorizer, AwsCredentialProvider};
use object_store::client::{
    HttpClient, HttpConnector, HttpError, HttpErrorKind, HttpRequest, HttpResponse, HttpService,
    ReqwestConnector,
};
use percent_encoding::{AsciiSet, NON_ALPHANUMERIC, percent_decode_str, utf8_percent_encode};

use super::object_keys::{escape_key, is_plain_key, unescape_key};

/// Characters that the path of a signed S3 request has in percent-encoding: all but the unreserved ones and `/`.
const ENCODED_IN_REQUEST: &AsciiSet =
    &NON_ALPHANUMERIC.remove(b'-').remove(b'.').remove(b'_').remove(b'~').remove(b'/');

/// Signs requests to S3 whose path was changed.
pub(super) struct S3Signer {
    /// Credentials of the client.
    pub credentials: AwsCredentialProvider,
    /// Region of the bucket.
    pub region: String,
}

/// Makes HTTP clients that translate keys.
#[derive(Clone, Default)]
pub(super) struct KeyTranslatingConnector {
    /// Set once the store that uses the client is built; stays empty if signatures do not cover paths.
    pub signer: Arc<OnceLock<S3Signer>>,
}

impl fmt::Debug for KeyTranslatingConnector {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("KeyTranslatingConnector")
    }
}

impl HttpConnector for KeyTranslatingConnector {
    fn connect(&self, options: &ClientOptions) -> object_store::Result<HttpClient> {
        let inner = ReqwestConnector::default().connect(options)?;
        Ok(HttpClient::new(KeyTranslatingClient { inner, signer: self.signer.clone() }))
    }
}

struct KeyTranslatingClient {
    inner: HttpClient,
    signer: Arc<OnceLock<S3Signer>>,
}

impl fmt::Debug for KeyTranslatingClient {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("KeyTranslatingClient")
    }
}

#[async_trait]
impl HttpService for KeyTranslatingClient {
    async fn call(&self, mut request: HttpRequest) -> Result<HttpResponse, HttpError> {
        if let Some(uri) = translate_uri(request.uri()) {
            *request.uri_mut() = uri;
            self.sign_again(&mut request).await?;
        }
        let is_listing = request.uri().query().is_some_and(is_listing_query);
        let response = self.inner.execute(request).await?;
        if !is_listing || !response.status().is_success() {
            return Ok(response);
        }
        let (mut parts, body) = response.into_parts();
        let body = body.bytes().await?;
        parts.headers.remove(CONTENT_LENGTH);
        let escaped = std::str::from_utf8(&body).ok().and_then(escape_listed_keys);
        Ok(HttpResponse::from_parts(parts, escaped.map_or_else(|| body.into(), Into::into)))
    }
}

impl KeyTranslatingClient {
    /// Replaces the signature of a request to S3; leaves one without a signature as it is.
    async fn sign_again(&self, request: &mut HttpRequest) -> Result<(), HttpError> {
        let Some(signer) = self.signer.get() else { return Ok(()) };
        if request.headers_mut().remove(AUTHORIZATION).is_none() {
            return Ok(());
        }
        let credential = signer.credentials.get_credential().await;
        let credential =
            credential.map_err(|error| HttpError::new(HttpErrorKind::Unknown, error))?;
        AwsAuthorizer::new(&credential, "s3", &signer.region).authorize(request, None);
        Ok(())
    }
}

/// Whether the query is that of a listing by S3 and GCS, or by Azure.
fn is_listing_query(query: &str) -> bool {
    query.split('&').any(|parameter| matches!(parameter, "list-type=2" | "comp=list"))
}

/// Returns the URI of the object whose escaped key is the last segment of `uri`; `None` if that is no escaped
/// key.
fn translate_uri(uri: &Uri) -> Option<Uri> {
    let (bucket, escaped) = uri.path().rsplit_once('/')?;
    let key = unescape_key(escaped)?;
    let mut path = format!("{bucket}/{}", utf8_percent_encode(&key, ENCODED_IN_REQUEST));
    if let Some(query) = uri.query() {
        path.push('?');
        path.push_str(query);
    }
    let mut parts = uri.clone().into_parts();
    parts.path_and_query = Some(path.parse().ok()?);
    Uri::from_parts(parts).ok()
}

/// Escapes the keys of a listing that `object_store` cannot express as paths; `None` if there is none.
fn escape_listed_keys(listing: &str) -> Option<String> {
    let plain = |text: &str| Some(unescape_xml(text).into_owned());
    // Azure percent-encodes names that XML cannot contain.
    let encoded =
        |text: &str| Some(percent_decode_str(&unescape_xml(text)).decode_utf8().ok()?.into_owned());
    let mut changed = false;
    let mut listing = Cow::Borrowed(listing);
    for (open, tag, decode) in [
        ("<Key>", "Key", &plain as &dyn Fn(&str) -> Option<String>),
        ("<Name>", "Name", &plain),
        ("<Name Encoded=\"true\">", "Name", &encoded),
    ] {
        if let Some(escaped) = escape_elements(&listing, open, tag, decode) {
            (listing, changed) = (Cow::Owned(escaped), true);
        }
    }
    changed.then(|| listing.into_owned())
}

/// Escapes the keys that are the content of elements whose opening tag is `open`; `None` if there is none.
fn escape_elements(
    listing: &str,
    open: &str,
    tag: &str,
    decode: &dyn Fn(&str) -> Option<String>,
) -> Option<String> {
    let close = format!("</{tag}>");
    let (mut escaped, mut rest, mut changed) = (String::new(), listing, false);
    while let Some((before, after)) = rest.split_once(open) {
        let Some((content, after)) = after.split_once(&close) else { break };
        escaped.push_str(before);
        match decode(content).filter(|key| !key.is_empty() && !is_plain_key(key)) {
            Some(key) => {
                changed = true;
                for part in ["<", tag, ">", &escape_key(&key), &close] {
                    escaped.push_str(part);
                }
            }
            None => {
                for part in [open, content, &close] {
                    escaped.push_str(part);
                }
            }
        }
        rest = after;
    }
    escaped.push_str(rest);
    changed.then_some(escaped)
}

/// Replaces the references of XML by their characters. Unlike XML itself, stores refer to control characters
/// too (`&#x1;`).
fn unescape_xml(text: &str) -> Cow<'_, str> {
    if !text.contains('&') {
        return text.into();
    }
    let (mut plain, mut rest) = (String::with_capacity(text.len()), text);
    while let Some((before, after)) = rest.split_once('&') {
        plain.push_str(before);
        let reference = after.split_once(';');
        match reference.and_then(|(name, after)| Some((referenced_character(name)?, after))) {
            Some((character, after)) => {
                plain.push(character);
                rest = after;
            }
            None => {
                plain.push('&');
                rest = after;
            }
        }
    }
    plain.push_str(rest);
    plain.into()
}

fn referenced_character(name: &str) -> Option<char> {
    let number = |digits: &str, radix| u32::from_str_radix(digits, radix).ok();
    match name {
        "amp" => Some('&'),
        "lt" => Some('<'),
        "gt" => Some('>'),
        "quot" => Some('"'),
        "apos" => Some('\''),
        _ => {
            let digits = name.strip_prefix('#')?;
            let code = match digits.strip_prefix(['x', 'X']) {
                Some(digits) => number(digits, 16)?,
                None => number(digits, 10)?,
            };
            char::from_u32(code)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_keys_that_are_no_paths_are_escaped() {
        let listing = "<ListBucketResult><Name>bucket</Name><Contents><Key>a/b &amp; c.jpg</Key>\
                       <Size>1</Size></Contents><Contents><Key>%</Key></Contents></ListBucketResult>";
        let odd = [("a//b.jpg", "a//b.jpg"), ("a&#x1;b &amp;&#10;", "a\u{1}b &\n"), ("/a", "/a")];
        for (written, key) in odd {
            let escaped = escape_listed_keys(&listing.replace('%', written)).unwrap();
            assert_eq!(escaped, listing.replace('%', &escape_key(key)));
        }
        assert_eq!(escape_listed_keys(&listing.replace('%', "a/b.jpg")), None);
        let azure = "<Blob><Name Encoded=\"true\">a%EF%BF%BFb%01.jpg</Name></Blob>";
        let escaped = escape_listed_keys(azure).unwrap();
        assert_eq!(
            escaped,
            format!("<Blob><Name>{}</Name></Blob>", escape_key("a\u{ffff}b\u{1}.jpg"))
        );
    }

    #[test]
    fn a_request_for_an_escaped_key_is_sent_for_the_key() {
        let escaped = escape_key("/a//b ü.jpg");
        let uri = format!("http://host/bucket/{escaped}?versionId=1").parse().unwrap();
        let translated = translate_uri(&uri).unwrap().to_string();
        assert_eq!(translated, "http://host/bucket//a//b%20%C3%BC.jpg?versionId=1");
        assert_eq!(translate_uri(&"http://host/bucket/a.jpg".parse().unwrap()), None);
    }
}
