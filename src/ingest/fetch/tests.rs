use std::path::Path;
use std::sync::Arc;

use bytes::Bytes;
use tokio_util::sync::CancellationToken;
use url::Url;

use super::{FetchError, FetchOptions, Fetcher, shorten_uri};
use crate::record::ImageSource;
use crate::retry::{Classify as _, Disposition};

fn new_fetcher(options: FetchOptions) -> Fetcher {
    Fetcher::new(&FetchOptions { max_attempts: 1, idle_timeout_ms: 500, ..options }).unwrap()
}

async fn fetch_uri(fetcher: &Fetcher, uri: &str) -> Result<Bytes, FetchError> {
    let token = CancellationToken::new();
    let content = ImageSource::from_uri(uri);
    fetcher.fetch(&content, &token).await.map(|f| f.bytes)
}

fn file_url(path: &Path) -> String {
    Url::from_file_path(path).unwrap().into()
}

#[tokio::test]
async fn files_are_fetched_only_from_configured_roots() {
    let folder = tempfile::tempdir().unwrap();
    let (root, outside) = (folder.path().join("root"), folder.path().join("secret"));
    std::fs::create_dir(&root).unwrap();
    std::fs::write(root.join("a.jpg"), b"image").unwrap();
    std::fs::write(&outside, b"secret").unwrap();
    std::os::unix::fs::symlink(&outside, root.join("link.jpg")).unwrap();
    let fetcher =
        new_fetcher(FetchOptions { file_roots: vec![root.clone()], ..FetchOptions::default() });

    assert_eq!(fetch_uri(&fetcher, &file_url(&root.join("a.jpg"))).await.unwrap(), "image");
    let gone = fetch_uri(&fetcher, &file_url(&root.join("b.jpg"))).await.unwrap_err();
    assert_eq!(gone.code(), "image_not_found");
    // The same holds below a root that is a link itself.
    let linked = folder.path().join("linked");
    std::os::unix::fs::symlink(&root, &linked).unwrap();
    let linked_fetcher =
        new_fetcher(FetchOptions { file_roots: vec![linked.clone()], ..FetchOptions::default() });
    assert_eq!(
        fetch_uri(&linked_fetcher, &file_url(&linked.join("a.jpg"))).await.unwrap(),
        "image"
    );
    let gone = fetch_uri(&linked_fetcher, &file_url(&linked.join("b.jpg"))).await.unwrap_err();
    assert_eq!(gone.code(), "image_not_found");
    for hostile in [
        file_url(&outside),
        file_url(&root.join("link.jpg")),
        format!("{}/../secret", file_url(&root)),
        "file:///etc/passwd".into(),
    ] {
        let error = fetch_uri(&fetcher, &hostile).await.unwrap_err();
        assert_eq!(error.code(), "uri_not_allowed", "{hostile}");
    }
}

#[tokio::test]
async fn data_urls_are_decoded_within_the_size_limit() {
    let fetcher = new_fetcher(FetchOptions { max_bytes: 1024, ..FetchOptions::default() });
    assert_eq!(fetch_uri(&fetcher, "data:image/png;base64,QUJD").await.unwrap(), "ABC");
    let large = format!("data:,{}", "x".repeat(2000));
    assert_eq!(fetch_uri(&fetcher, &large).await.unwrap_err().code(), "file_too_large");
}

#[tokio::test]
async fn private_addresses_and_unknown_schemes_are_rejected() {
    let fetcher = new_fetcher(FetchOptions::default());
    for hostile in [
        "http://127.0.0.1/a.jpg",
        "http://localhost/a.jpg",
        "http://[::1]/a.jpg",
        "http://169.254.169.254/latest/meta-data/",
        "http://0x7f.1/a.jpg",
        "http://2130706433/",
        "ftp://example.com/a.jpg",
        "not a uri",
        "s3://bucket/a/../b.jpg",
        "s3://bucket/a.jpg?versionId=1",
    ] {
        let error = fetch_uri(&fetcher, hostile).await.unwrap_err();
        assert_eq!(error.code(), "uri_not_allowed", "{hostile}: {error}");
        assert_eq!(error.disposition(), Disposition::DeadLetter);
    }
}

/// Starts a server on loopback with a fixed response per path; returns its URL prefix.
async fn start_server() -> String {
    use axum::http::{StatusCode, header};
    use axum::response::IntoResponse;
    let app = axum::Router::new()
        .route("/a.jpg", axum::routing::get(|| async { "image" }))
        .route("/gone.jpg", axum::routing::get(|| async { StatusCode::GONE }))
        .route("/busy.jpg", axum::routing::get(|| async { StatusCode::SERVICE_UNAVAILABLE }))
        .route("/no.jpg", axum::routing::get(|| async { StatusCode::FORBIDDEN }))
        .route("/big.jpg", axum::routing::get(|| async { vec![0u8; 5000] }))
        .route(
            "/to-metadata.jpg",
            axum::routing::get(|| async {
                (StatusCode::FOUND, [(header::LOCATION, "http://169.254.169.254/")]).into_response()
            }),
        )
        .route(
            "/loop.jpg",
            axum::routing::get(|| async {
                (StatusCode::FOUND, [(header::LOCATION, "/loop.jpg")]).into_response()
            }),
        );
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn(async move { axum::serve(listener, app).await });
    format!("http://{address}/")
}

#[tokio::test]
async fn allowed_prefixes_are_fetched_and_redirects_to_private_addresses_are_rejected() {
    let base = start_server().await;
    let fetcher = new_fetcher(FetchOptions {
        allowed_private_url_prefixes: vec![base.clone()],
        max_bytes: 1024,
        ..FetchOptions::default()
    });
    let get = async |path: &str| fetch_uri(&fetcher, &format!("{base}{path}")).await;
    assert_eq!(get("a.jpg").await.unwrap(), "image");
    for (path, code) in [
        ("gone.jpg", "image_not_found"),
        ("missing.jpg", "image_not_found"),
        ("no.jpg", "fetch_refused"),
        ("busy.jpg", "fetch_failed"),
        ("big.jpg", "file_too_large"),
        ("to-metadata.jpg", "uri_not_allowed"),
        ("loop.jpg", "fetch_refused"),
    ] {
        assert_eq!(get(path).await.unwrap_err().code(), code, "{path}");
    }
}

#[tokio::test]
async fn an_unresponsive_host_gets_one_attempt_per_image() {
    use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

    use axum::http::StatusCode;
    let (request_count, up) = (Arc::new(AtomicUsize::new(0)), Arc::new(AtomicBool::new(false)));
    let (counter, is_up) = (request_count.clone(), up.clone());
    let app = axum::Router::new().fallback(move || {
        counter.fetch_add(1, Ordering::SeqCst);
        std::future::ready(if is_up.load(Ordering::SeqCst) {
            StatusCode::OK
        } else {
            StatusCode::SERVICE_UNAVAILABLE
        })
    });
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let base = format!("http://{}/", listener.local_addr().unwrap());
    tokio::spawn(async move { axum::serve(listener, app).await });
    let fetcher = Fetcher::new(&FetchOptions {
        max_attempts: 3,
        allowed_private_url_prefixes: vec![base.clone()],
        ..FetchOptions::default()
    })
    .unwrap();
    let get = async |path: &str| {
        let before = request_count.load(Ordering::SeqCst);
        let fetched = fetch_uri(&fetcher, &format!("{base}{path}")).await.is_ok();
        (fetched, request_count.load(Ordering::SeqCst) - before)
    };
    assert_eq!(get("a.jpg").await, (false, 3));
    assert_eq!(get("b.jpg").await, (false, 1), "the host is known to be unresponsive");
    up.store(true, Ordering::SeqCst);
    assert_eq!(get("c.jpg").await, (true, 1));
    up.store(false, Ordering::SeqCst);
    assert_eq!(get("d.jpg").await, (false, 3), "the host has answered since");
}

#[test]
fn shortened_uris_hide_signatures() {
    assert_eq!(shorten_uri("https://h/a.jpg?X-Amz-Signature=abc"), "https://h/a.jpg");
    assert!(shorten_uri(&format!("data:,{}", "x".repeat(9999))).len() < 300);
}
