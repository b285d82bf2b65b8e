//! What proxies in front need: a path of their own, compressed answers, addresses that survive them.

use std::io::Read as _;

use axum::Router;
use axum::body::{Body, to_bytes};
use axum::http::{Request, StatusCode};
use axum::response::Response;
use flate2::read::GzDecoder;
use serde_json::{Value, json};
use tower::ServiceExt;

use crate::serve::http::options::HttpOptions;
use crate::serve::http::tests::{post_request, send, start_server};

async fn get(router: &Router, path: &str, headers: &[(&str, &str)]) -> Response {
    let mut request = Request::get(path);
    for (name, value) in headers {
        request = request.header(*name, *value);
    }
    router.clone().oneshot(request.body(Body::empty()).unwrap()).await.unwrap()
}

fn header<'a>(response: &'a Response, name: &str) -> &'a str {
    response.headers().get(name).map_or("", |value| value.to_str().unwrap())
}

#[tokio::test]
async fn requests_are_answered_under_the_base_path_and_without_it() {
    let options = HttpOptions { base_path: "/shop/search".into(), ..HttpOptions::default() };
    let (router, _) = start_server(options).await;
    for path in ["/", "/livez", "/v1/state", "/v1/images?id=image-0"] {
        assert_eq!(get(&router, path, &[]).await.status(), 200, "{path}");
        let prefixed = format!("/shop/search{path}");
        assert_eq!(get(&router, &prefixed, &[]).await.status(), 200, "{prefixed}");
    }
    let body = json!({"text": "a mug", "k": 1});
    assert_eq!(send(&router, post_request("/shop/search/v1/search", &body)).await.0, 200);
    let response = get(&router, "/shop/search?q=a+mug", &[]).await;
    assert_eq!(response.status(), StatusCode::PERMANENT_REDIRECT);
    assert_eq!(header(&response, "location"), "/shop/search/?q=a+mug");
    for other in ["/shop/searching/livez", "/shop/livez", "/shop/search/shop/search/livez"] {
        assert_eq!(get(&router, other, &[]).await.status(), 404, "{other}");
    }
    let document = get(&router, "/shop/search/v1/openapi.json", &[]).await;
    let document = to_bytes(document.into_body(), 1 << 20).await.unwrap();
    let document: Value = serde_json::from_slice(&document).unwrap();
    assert_eq!(document["servers"], json!([{"url": "/shop/search"}]));
}

#[tokio::test]
async fn large_answers_are_compressed_for_clients_that_accept_it() {
    let (router, _) = start_server(HttpOptions::default()).await;
    let plain = get(&router, "/", &[]).await;
    assert_eq!(header(&plain, "content-encoding"), "");
    let compressed = get(&router, "/", &[("accept-encoding", "br, gzip")]).await;
    assert_eq!(header(&compressed, "content-encoding"), "gzip");
    assert!(header(&compressed, "vary").contains("accept-encoding"));
    let bytes = to_bytes(compressed.into_body(), 1 << 20).await.unwrap();
    let mut page = String::new();
    GzDecoder::new(&*bytes).read_to_string(&mut page).unwrap();
    assert!(page.ends_with("</html>\n") && bytes.len() * 3 < page.len(), "{}", bytes.len());
    // An answer that fits one packet is sent as it is, and so is the change feed.
    for path in ["/livez", "/v1/events"] {
        let response = get(&router, path, &[("accept-encoding", "gzip")]).await;
        assert_eq!((response.status().as_u16(), header(&response, "content-encoding")), (200, ""));
    }
}

#[tokio::test]
async fn compressed_bodies_are_refused_with_the_reason() {
    let (router, _) = start_server(HttpOptions::default()).await;
    let send_encoded = async |encoding: &'static str| {
        let mut request = post_request("/v1/search", &json!({"text": "a mug", "k": 1}));
        request.headers_mut().insert("content-encoding", encoding.parse().unwrap());
        let response = router.clone().oneshot(request).await.unwrap();
        let accepted = header(&response, "accept-encoding").to_owned();
        let status = response.status().as_u16();
        let body = to_bytes(response.into_body(), 1 << 20).await.unwrap();
        (status, accepted, serde_json::from_slice::<Value>(&body).unwrap())
    };
    let (status, accepted, problem) = send_encoded("gzip").await;
    assert_eq!((status, accepted.as_str()), (415, "identity"));
    assert_eq!(problem["code"], "compressed_body");
    assert!(problem["detail"].as_str().unwrap().contains("Content-Encoding: gzip"), "{problem}");
    assert_eq!(send_encoded("identity").await.0, 200);
}

#[tokio::test]
async fn parameters_that_cannot_be_used_are_problems() {
    let (router, _) = start_server(HttpOptions::default()).await;
    for (path, status, code) in [
        ("/v1/images", 400, "invalid_query"),
        ("/v1/images?id=image-0&id=image-1", 400, "invalid_query"),
        ("/v1/images?id=image-0&colour=red", 400, "invalid_query"),
        ("/v1/images/picture?v=1", 400, "invalid_query"),
        ("/v1/images?id=%FF", 404, "not_found"),
        ("/v1/images/%FF", 404, "not_found"),
        ("/v1/images/picture?id=a%2Fb%5Cc&v=0", 404, "not_found"),
        ("/%FF", 404, "not_found"),
        ("//", 404, "not_found"),
    ] {
        let response = get(&router, path, &[]).await;
        assert_eq!(header(&response, "content-type"), "application/problem+json", "{path}");
        assert_eq!(response.status().as_u16(), status, "{path}");
        let body = to_bytes(response.into_body(), 1 << 20).await.unwrap();
        assert_eq!(serde_json::from_slice::<Value>(&body).unwrap()["code"], code, "{path}");
    }
}
