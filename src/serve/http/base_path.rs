//! The path under which a proxy serves this server, `http.base_path`.

use std::sync::Arc;

use axum::Router;
use axum::extract::{Request, State};
use axum::http::uri::PathAndQuery;
use axum::http::{StatusCode, Uri, header};
use axum::middleware::{self, Next};
use axum::response::{IntoResponse, Response};

/// Maximum length of the path.
const MAX_BASE_PATH_BYTES: usize = 200;
/// First segments of paths of the interface itself.
const RESERVED_SEGMENTS: [&str; 3] = ["v1", "livez", "readyz"];

/// Returns why `base_path` cannot be used; `None` if it can.
pub fn validate_base_path(base_path: &str) -> Option<String> {
    let is_segment = |segment: &str| {
        let is_plain = |b: u8| b.is_ascii_alphanumeric() || b"-._~".contains(&b);
        !matches!(segment, "" | "." | "..") && segment.bytes().all(is_plain)
    };
    let mut segments = base_path.split('/');
    let starts_with_slash = segments.next() == Some("");
    let first = segments.clone().next().unwrap_or_default();
    let is_valid = base_path.is_empty()
        || starts_with_slash
            && base_path.len() <= MAX_BASE_PATH_BYTES
            && segments.all(is_segment)
            && !RESERVED_SEGMENTS.contains(&first);
    (!is_valid).then(|| {
        format!(
            "base_path: {base_path:?} is not a path such as /search: a slash before each part, none at the end, parts of letters, digits, -, ., _ and ~, and not one of the server's own ({})",
            RESERVED_SEGMENTS.join(", ")
        )
    })
}

/// Returns `router` so that it also answers requests with `base_path` in front of their path.
pub fn accept_base_path(router: Router, base_path: Arc<str>) -> Router {
    if base_path.is_empty() {
        return router;
    }
    // A layer of `router` itself would run after the route has been chosen.
    Router::new()
        .fallback_service(router)
        .layer(middleware::from_fn_with_state(base_path, remove_base_path))
}

async fn remove_base_path(
    State(base_path): State<Arc<str>>,
    mut request: Request,
    next: Next,
) -> Response {
    let path_and_query = request.uri().path_and_query().map_or("/", PathAndQuery::as_str);
    match path_and_query.strip_prefix(&*base_path) {
        Some(rest) if rest.starts_with('/') => {
            let mut parts = request.uri().clone().into_parts();
            parts.path_and_query = rest.parse().ok();
            if let Ok(uri) = Uri::from_parts(parts) {
                *request.uri_mut() = uri;
            }
        }
        // The page's addresses are relative, so its own address must end with a slash.
        Some(query) if query.is_empty() || query.starts_with('?') => {
            let location = format!("{base_path}/{query}");
            return (StatusCode::PERMANENT_REDIRECT, [(header::LOCATION, location)])
                .into_response();
        }
        _ => {}
    }
    next.run(request).await
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn base_paths_are_plain_and_do_not_hide_routes() {
        for valid in ["", "/search", "/shop/bsap", "/v1.2/x"] {
            assert_eq!(validate_base_path(valid), None, "{valid}");
        }
        let long = format!("/{}", "x".repeat(MAX_BASE_PATH_BYTES));
        for invalid in
            ["/", "search", "/search/", "//search", "/../x", "/a b", "/a%2Fb", "/a?b", "/v1", &long]
        {
            assert!(validate_base_path(invalid).is_some(), "{invalid}");
        }
    }
}
