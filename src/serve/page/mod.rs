//! The page for people: one document, assembled at compile time from the files of this folder.

use axum::http::{HeaderValue, header};
use axum::response::{Html, IntoResponse, Response};

use crate::record::to_hex;

const HTML_TEMPLATE: &str = include_str!("page.html");
const STYLESHEET: &str = include_str!("page.css");
/// One script in this order: the files share a scope.
const SCRIPT: &str = concat!(
    include_str!("base.js"),
    include_str!("session.js"),
    include_str!("query.js"),
    include_str!("filters.js"),
    include_str!("pictures.js"),
    include_str!("search.js"),
    include_str!("cards.js"),
    include_str!("newest.js"),
    include_str!("feedback.js"),
    include_str!("explain.js"),
    include_str!("live.js"),
    include_str!("start.js"),
);

/// `GET /`: returns the page. Its policy allows only the script and the style with this response's
/// nonce.
pub async fn get_page() -> Response {
    let nonce = to_hex(&rand::random::<[u8; 16]>());
    let policy = format!(
        "default-src 'none'; img-src 'self' data:; connect-src 'self'; style-src 'nonce-{nonce}'; script-src 'nonce-{nonce}'; base-uri 'none'; form-action 'self'; frame-ancestors 'none'"
    );
    let page = HTML_TEMPLATE.replace("{{nonce}}", &nonce);
    let page = page.replace("{{style}}", STYLESHEET).replace("{{script}}", SCRIPT);
    let mut response = Html(page).into_response();
    if let Ok(policy) = HeaderValue::from_str(&policy) {
        response.headers_mut().insert(header::CONTENT_SECURITY_POLICY, policy);
    }
    response
}
