use std::path::Path;
use std::sync::Arc;

use bytes::Bytes;
use futures::StreamExt as _;
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
        .route(
            "/203.jpg",
            axum::routing::get(|| async { (StatusCode::NON_AUTHORITATIVE_INFORMATION, "image") }),
        )
        .route(
            "/to-utf8.jpg",
            axum::routing::get(|| async {
                let location = header::HeaderValue::from_bytes("/blå.jpg".as_bytes()).unwrap();
                (StatusCode::FOUND, [(header::LOCATION, location)]).into_response()
            }),
        )
        .route("/bl%C3%A5.jpg", axum::routing::get(|| async { "image" }))
        .route("/gzip.jpg", axum::routing::get(|| async { compressed("gzip", b"image") }))
        .route("/deflate.jpg", axum::routing::get(|| async { compressed("deflate", b"image") }))
        .route("/bomb.jpg", axum::routing::get(|| async { compressed("gzip", &vec![0; 100_000]) }))
        .route(
            "/no-gzip.jpg",
            axum::routing::get(|| async { [(header::CONTENT_ENCODING, "gzip")].into_response() }),
        )
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

fn compressed(encoding: &'static str, content: &[u8]) -> axum::response::Response {
    use std::io::Write as _;

    use axum::response::IntoResponse as _;
    use flate2::Compression;
    use flate2::write::{GzEncoder, ZlibEncoder};
    let bytes = if encoding == "gzip" {
        let mut encoder = GzEncoder::new(Vec::new(), Compression::default());
        encoder.write_all(content).unwrap();
        encoder.finish().unwrap()
    } else {
        let mut encoder = ZlibEncoder::new(Vec::new(), Compression::default());
        encoder.write_all(content).unwrap();
        encoder.finish().unwrap()
    };
    ([(axum::http::header::CONTENT_ENCODING, encoding)], bytes).into_response()
}

#[tokio::test]
async fn a_large_file_that_is_no_picture_is_not_downloaded() {
    use std::sync::atomic::{AtomicUsize, Ordering};

    use axum::body::Body;
    let sent = Arc::new(AtomicUsize::new(0));
    let counter = sent.clone();
    let app = axum::Router::new().fallback(move || {
        let counter = counter.clone();
        let chunks = futures::stream::iter(0..1_000).map(move |_| {
            counter.fetch_add(1, Ordering::SeqCst);
            Ok::<_, std::io::Error>(Bytes::from(vec![b'x'; 32 << 10]))
        });
        std::future::ready(axum::response::Response::new(Body::from_stream(chunks)))
    });
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let base = format!("http://{}/", listener.local_addr().unwrap());
    tokio::spawn(async move { axum::serve(listener, app).await });
    let fetcher = new_fetcher(FetchOptions {
        allowed_private_url_prefixes: vec![base.clone()],
        idle_timeout_ms: 10_000,
        ..FetchOptions::default()
    });
    let error = fetch_uri(&fetcher, &format!("{base}video.mp4")).await.unwrap_err();
    assert_eq!(error.code(), "unknown_image_format", "{error}");
    assert!(sent.load(Ordering::SeqCst) < 500, "most of it was not sent");
}

#[tokio::test]
async fn forbidden_means_missing_where_the_options_say_so() {
    let base = start_server().await;
    let fetcher = |prefixes: Vec<String>| {
        new_fetcher(FetchOptions {
            allowed_private_url_prefixes: vec![base.clone()],
            missing_if_forbidden: prefixes,
            ..FetchOptions::default()
        })
    };
    let uri = format!("{base}no.jpg");
    for (prefixes, code) in [
        (vec![base.clone()], "image_not_found"),
        (vec![base.replace("http:", "HTTP:")], "image_not_found"),
        (vec![format!("{base}other/")], "fetch_forbidden"),
        (vec![], "fetch_forbidden"),
    ] {
        assert_eq!(fetch_uri(&fetcher(prefixes), &uri).await.unwrap_err().code(), code);
    }
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
    for path in ["a.jpg", "203.jpg", "to-utf8.jpg", "gzip.jpg", "deflate.jpg"] {
        assert_eq!(get(path).await.unwrap(), "image", "{path}");
    }
    for (path, code) in [
        ("bomb.jpg", "file_too_large"),
        ("no-gzip.jpg", "fetch_refused"),
        ("gone.jpg", "image_not_found"),
        ("missing.jpg", "image_not_found"),
        ("no.jpg", "fetch_forbidden"),
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
    assert_eq!(shorten_uri("https://me:s3cret@h/a.jpg"), "https://(hidden)@h/a.jpg");
    assert!(shorten_uri(&format!("data:,{}", "x".repeat(9999))).len() < 300);
}
