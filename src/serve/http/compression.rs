//! Compressed responses, and the refusal of compressed requests.

use std::io::Write as _;

use axum::body::{Body, HttpBody as _, to_bytes};
use axum::extract::Request;
use axum::http::{HeaderMap, HeaderValue, Method, header};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};
use flate2::Compression;
use flate2::write::GzEncoder;

use super::body::problem::Problem;

/// Smallest response that is compressed: a smaller one fits one packet in any case.
const MIN_COMPRESSED_BYTES: u64 = 1024;
/// Largest response that is compressed, because it is compressed as a whole; answers are far smaller.
const MAX_COMPRESSED_BYTES: u64 = 16 << 20;
/// Level of compression: the page and a typical answer take one or two milliseconds; the next levels
/// take twice as long for a few per cent.
const LEVEL: Compression = Compression::new(4);
/// Media types that are compressed. Pictures are compressed already, and the events of the change feed
/// must not wait for others.
const COMPRESSED_TYPES: [&str; 3] = ["application/json", "application/problem+json", "text/html"];

/// Compresses the response by gzip if the client accepts it and it is worthwhile. No response has a
/// secret in its body next to what the request says, so its size reveals none (BREACH).
pub async fn compress_response(request: Request, next: Next) -> Response {
    let is_accepted = accepts_gzip(request.headers()) && request.method() != Method::HEAD;
    let mut response = next.run(request).await;
    let media_type = response.headers().get(header::CONTENT_TYPE).and_then(|t| t.to_str().ok());
    let media_type = media_type.and_then(|t| t.split(';').next()).unwrap_or_default();
    let size = response.body().size_hint().exact().unwrap_or_default();
    if !COMPRESSED_TYPES.contains(&media_type)
        || !(MIN_COMPRESSED_BYTES..=MAX_COMPRESSED_BYTES).contains(&size)
    {
        return response;
    }
    response.headers_mut().append(header::VARY, HeaderValue::from_static("accept-encoding"));
    if !is_accepted {
        return response;
    }
    let (mut head, body) = response.into_parts();
    // The size is known, so the body is in memory and within the limit: neither can fail.
    let Ok(bytes) = to_bytes(body, MAX_COMPRESSED_BYTES as usize).await else {
        return Problem::internal().into_response();
    };
    let mut encoder = GzEncoder::new(Vec::new(), LEVEL);
    let compressed = encoder.write_all(&bytes).and_then(|()| encoder.finish());
    let Ok(compressed) = compressed else { return Response::from_parts(head, bytes.into()) };
    head.headers.remove(header::CONTENT_LENGTH);
    head.headers.insert(header::CONTENT_ENCODING, HeaderValue::from_static("gzip"));
    Response::from_parts(head, Body::from(compressed))
}

/// Returns whether the header `Accept-Encoding` allows gzip (RFC 9110, 12.5.3).
fn accepts_gzip(headers: &HeaderMap) -> bool {
    let values = headers.get_all(header::ACCEPT_ENCODING).iter().filter_map(|v| v.to_str().ok());
    let mut any_other = false;
    for element in values.flat_map(|value| value.split(',')) {
        let mut parts = element.split(';').map(str::trim);
        let coding = parts.next().unwrap_or_default();
        let weight = parts.find_map(|part| part.strip_prefix("q=").or(part.strip_prefix("Q=")));
        let is_allowed = weight.is_none_or(|q| q.parse::<f32>().is_ok_and(|q| q > 0.0));
        if coding.eq_ignore_ascii_case("gzip") || coding.eq_ignore_ascii_case("x-gzip") {
            return is_allowed;
        }
        any_other |= coding == "*" && is_allowed;
    }
    any_other
}

/// Rejects requests whose body is compressed: it could be far larger than the limits of bodies.
pub async fn reject_compressed_body(request: Request, next: Next) -> Response {
    let encodings = request.headers().get_all(header::CONTENT_ENCODING);
    let is_compressed =
        |encoding: &&HeaderValue| !encoding.as_bytes().eq_ignore_ascii_case(b"identity");
    match encodings.iter().find(is_compressed) {
        Some(encoding) => {
            ([(header::ACCEPT_ENCODING, "identity")], Problem::compressed_body(encoding))
                .into_response()
        }
        None => next.run(request).await,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn gzip_is_used_only_if_the_client_accepts_it() {
        let accepts = |value: &str| {
            let headers = [(header::ACCEPT_ENCODING, value.parse().unwrap())];
            accepts_gzip(&headers.into_iter().collect())
        };
        for accepted in ["gzip", "br, GZIP", "deflate, gzip;q=0.5", "*", "br;q=1, *;q=0.1"] {
            assert!(accepts(accepted), "{accepted}");
        }
        for refused in ["", "br", "identity", "gzip;q=0", "gzip; q=0.0, *", "*;q=0", "gzip;q=x"] {
            assert!(!accepts(refused), "{refused}");
        }
        assert!(!accepts_gzip(&HeaderMap::new()));
    }
}
