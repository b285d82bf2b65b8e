//! `GET /v1/images/picture?id=…`: the original of an image's picture, or a preview of it.

use std::sync::Arc;

use axum::body::Bytes;
use axum::extract::{Extension, Query, State};
use axum::http::{HeaderMap, HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use serde::Deserialize;
use serde::de::IgnoredAny;

use super::body::problem::Problem;
use super::concurrency_limit::ConcurrencyPermit;
use super::routes::{QueryParameters, find_image};
use super::state::HandlerState;
use crate::ingest::decode::{Recognised, recognise};
use crate::record::ImageSource;
use crate::serve::previews::{MAX_PREVIEW_SIDE, Preview, PreviewSide};

/// For an hour, by the browser that requested it: a picture may be deleted.
const CACHE_CONTROL: HeaderValue = HeaderValue::from_static("private, max-age=3600");

/// What the query string of a picture's address may have.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PictureParameters {
    id: String,
    /// Requests a preview whose longer side has about this many pixels.
    side: Option<u32>,
    /// Shows browsers when the picture has changed; the newest is returned in any case.
    #[serde(rename = "v")]
    _content_hash: Option<IgnoredAny>,
}

/// Returns an image's picture, fetched from the address in its event, or with `side` a preview of it.
pub async fn get_picture(
    State(shared): State<Arc<HandlerState>>,
    Extension(permit): Extension<ConcurrencyPermit>,
    parameters: QueryParameters<PictureParameters>,
    headers: HeaderMap,
) -> Result<Response, Problem> {
    let Query(PictureParameters { id, side, .. }) = parameters?;
    let side = side.map(parse_side).transpose()?;
    let image = find_image(&shared, &id)?;
    let uri = image.uri.clone();
    let uri = uri.filter(|_| shared.context.options.serve_pictures).ok_or_else(|| {
        Problem::not_found(
            "there is no picture to show: its bytes came in the event, or http.serve_pictures is off",
        )
    })?;
    if let Some(cached) = side.and_then(|side| {
        // The image is live, and its picture is served.
        shared.preview_maker.find_cached(&image.content_hash, side)
    }) {
        return Ok(preview_response(&cached, &headers));
    }
    let original =
        shared.context.fetcher.fetch(&ImageSource::from_uri(uri), &shared.shutdown_cancel).await?;
    if let Some(side) = side {
        let preview =
            shared.preview_maker.make(original, &image.content_hash, side, permit).await?;
        return Ok(preview_response(&preview, &headers));
    }
    // Anything but a picture, by its content, could be a script that runs in the browser.
    let Recognised::Readable(format) = recognise(&original.bytes) else {
        return Err(Problem::new(
            StatusCode::UNSUPPORTED_MEDIA_TYPE,
            "not_an_image",
            "what was fetched is not a picture of a format that is read",
        ));
    };
    let headers = [
        (header::CONTENT_TYPE, HeaderValue::from_static(format.media_type())),
        (header::CACHE_CONTROL, CACHE_CONTROL),
    ];
    // The bytes count against the budget of downloads until they are sent: a client may read
    // slowly.
    Ok((headers, Bytes::from_owner(original)).into_response())
}

fn parse_side(pixels: u32) -> Result<PreviewSide, Problem> {
    PreviewSide::new(pixels).ok_or_else(|| {
        Problem::invalid_field(
            "side",
            format!("{pixels} is not between 1 and {MAX_PREVIEW_SIDE}; without it, the original is returned"),
        )
    })
}

/// Answers with a preview, or with 304 if the client has it already.
fn preview_response(preview: &Preview, request_headers: &HeaderMap) -> Response {
    let tag = preview.entity_tag.as_str();
    let client_has_it = request_headers
        .get_all(header::IF_NONE_MATCH)
        .iter()
        .filter_map(|value| value.to_str().ok())
        .flat_map(|value| value.split(','))
        .map(|given| given.trim().trim_start_matches("W/"))
        .any(|given| given == tag || given == "*");
    let mut response = if client_has_it {
        StatusCode::NOT_MODIFIED.into_response()
    } else {
        let media_type = HeaderValue::from_static("image/jpeg");
        ([(header::CONTENT_TYPE, media_type)], preview.jpeg.clone()).into_response()
    };
    let headers = response.headers_mut();
    headers.insert(header::CACHE_CONTROL, CACHE_CONTROL);
    if let Ok(tag) = HeaderValue::from_str(tag) {
        headers.insert(header::ETAG, tag);
    }
    response
}
