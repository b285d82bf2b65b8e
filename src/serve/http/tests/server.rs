//! Requests over connections: keys, sessions, hosts, limits, TLS, shutdown.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use rcgen::{CertifiedKey, generate_simple_self_signed};
use reqwest::{Client, Method, RequestBuilder, Response, StatusCode};
use serde_json::{Value, json};
use tempfile::TempDir;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;
use tokio::task::JoinHandle;
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;

use crate::ingest::decode::DecodeOptions;
use crate::ingest::fetch::{FetchOptions, Fetcher};
use crate::search::testing::{
    HashEncoders, clip_like_embedding, sample_prompt_set, sample_row, sample_serving_snapshot,
};
use crate::search::{Engine, Engines, SearchOptions};
use crate::serve::feedback;
use crate::serve::http::credentials::api_keys::{ApiKey, Scope};
use crate::serve::http::options::HttpOptions;
use crate::serve::http::state::ServerContext;
use crate::serve::http::{connections, serve};
use crate::store::Store;
use crate::table::{SnapshotPart, TableChanges};

const DIMENSION: usize = 16;
const TEST_TIMEOUT: Duration = Duration::from_secs(20);
const LIVEZ_REQUEST: &[u8] = b"GET /livez HTTP/1.1\r\nhost: localhost\r\n\r\n";

struct TestServer {
    url: String,
    secrets: Vec<String>,
    client: Client,
    cancel: CancellationToken,
    serve_task: JoinHandle<()>,
}

impl TestServer {
    /// Starts a server of three images, with one key for each element of `scopes`.
    async fn start(scopes: &[&[Scope]], options: HttpOptions) -> Self {
        let generated =
            scopes.iter().enumerate().map(|(i, scopes)| ApiKey::generate(&format!("k{i}"), scopes));
        let (keys, secrets) = generated.unzip();
        let listen = SocketAddr::from(([127, 0, 0, 1], 0));
        let options = HttpOptions { listen, keys, ..options };
        assert_eq!(options.validate(), Vec::<String>::new());
        let listener = connections::bind_listener(&options).await.unwrap();
        let serving = sample_serving_snapshot(vec![sample_prompt_set("one", DIMENSION)]);
        let engine = Engine::new(HashEncoders::new(DIMENSION), serving, SearchOptions::default())
            .with_attributes_and_decoding([].into(), DecodeOptions::default());
        let rows = (0..3)
            .map(|i| sample_row(&format!("i{i}"), 1, Some(clip_like_embedding(i, DIMENSION))));
        let changes = TableChanges {
            table_version: 1,
            is_full_snapshot: true,
            part: SnapshotPart::All,
            rows: rows.collect(),
        };
        engine.snapshots().apply_changes(changes).await.unwrap();
        let cancel = CancellationToken::new();
        let (feedback_queue, writer) = feedback::feedback_channel(&Store::in_memory());
        tokio::spawn(writer.run(cancel.clone()));
        let context = ServerContext {
            engines: Arc::new(Engines::new(Arc::new(engine))),
            feedback_queue,
            fetcher: Fetcher::new(&FetchOptions::default()).unwrap(),
            decode_options: DecodeOptions::default(),
            substitutes: Vec::new(),
            judge: None,
            options,
        };
        let url = listener.url().unwrap();
        let serve_task = tokio::spawn(serve(context, listener, cancel.clone()));
        Self { url, secrets, client: Client::new(), cancel, serve_task }
    }

    fn request(&self, method: Method, path: &str) -> RequestBuilder {
        self.client.request(method, format!("{}{}", self.url, &path[1..]))
    }

    fn search_request(&self) -> RequestBuilder {
        self.request(Method::POST, "/v1/search")
            .header("content-type", "application/json")
            .body(json!({"text": "a mug", "k": 1}).to_string())
    }

    async fn connect(&self) -> TcpStream {
        let address = self.url.trim_start_matches("http://").trim_end_matches('/');
        TcpStream::connect(address).await.unwrap()
    }
}

async fn send_for_status(request: RequestBuilder) -> StatusCode {
    request.send().await.unwrap().status()
}

async fn send_for_problem(request: RequestBuilder) -> (StatusCode, Value, Response) {
    let mut response = request.send().await.unwrap();
    let body = response.chunk().await.unwrap().unwrap();
    (response.status(), serde_json::from_slice(&body).unwrap(), response)
}

/// All routes that require the scope `search`.
const SEARCH_SCOPE_ROUTES: [(Method, &str); 9] = [
    (Method::POST, "/v1/search"),
    (Method::POST, "/v1/explain"),
    (Method::POST, "/v1/rerank"),
    (Method::GET, "/v1/images?id=i1"),
    (Method::GET, "/v1/images/picture?id=i1"),
    (Method::GET, "/v1/images/newest?limit=2"),
    (Method::GET, "/v1/events"),
    (Method::GET, "/v1/sample-score"),
    (Method::GET, "/v1/state"),
];

#[tokio::test]
async fn each_route_requires_its_scope() {
    let scopes: [&[Scope]; 3] = [&[Scope::Search], &[Scope::Feedback], &[Scope::Admin]];
    let server = TestServer::start(&scopes, HttpOptions::default()).await;
    for path in ["/", "/livez", "/readyz"] {
        assert_eq!(send_for_status(server.request(Method::GET, path)).await, 200, "{path}");
    }
    for (method, path) in SEARCH_SCOPE_ROUTES {
        let request = || server.request(method.clone(), path);
        let (status, body, response) = send_for_problem(request()).await;
        assert_eq!((status.as_u16(), &body["code"]), (401, &json!("missing_api_key")), "{path}");
        assert_eq!(response.headers()["www-authenticate"], "Bearer realm=\"bsap\"");
        for wrong in ["bsap_guessed", "", &server.secrets[0][1..]] {
            let (status, body, _) = send_for_problem(request().bearer_auth(wrong)).await;
            assert_eq!(
                (status.as_u16(), &body["code"]),
                (401, &json!("invalid_api_key")),
                "{path}"
            );
        }
        let (status, body, response) =
            send_for_problem(request().bearer_auth(&server.secrets[1])).await;
        assert_eq!((status.as_u16(), &body["code"]), (403, &json!("insufficient_scope")), "{path}");
        let challenge = response.headers()["www-authenticate"].to_str().unwrap();
        assert!(challenge.ends_with("error=\"insufficient_scope\", scope=\"search\""));
        for right in [&server.secrets[0], &server.secrets[2]] {
            let status = send_for_status(request().bearer_auth(right)).await;
            assert!(status != 401 && status != 403, "{path}: {status}");
        }
    }
    let feedback = || {
        server
            .request(Method::POST, "/v1/feedback")
            .header("content-type", "application/json")
            .body(json!({"text": "a mug", "image_id": "i1", "verdict": "right"}).to_string())
    };
    assert_eq!(send_for_status(feedback()).await, 401);
    for (secret, status) in server.secrets.iter().zip([403, 204, 204]) {
        assert_eq!(send_for_status(feedback().bearer_auth(secret)).await, status);
    }
    let basic = server.search_request().basic_auth("k0", Some(&server.secrets[0]));
    assert_eq!(send_for_status(basic).await, 401);
    assert_eq!(send_for_status(server.search_request().bearer_auth(&server.secrets[0])).await, 200);
}

#[tokio::test]
async fn the_page_signs_in_with_a_key_and_sends_a_session_cookie() {
    let server = TestServer::start(&[&[Scope::Search]], HttpOptions::default()).await;
    let session = |method| server.request(method, "/v1/session");
    let body = json!({"api_key": server.secrets[0]}).to_string();
    let sign_in = || session(Method::POST).header("content-type", "application/json");
    let response = sign_in().body(body.clone()).send().await.unwrap();
    let set_cookie = response.headers()["set-cookie"].to_str().unwrap().to_owned();
    for part in ["; HttpOnly", "; SameSite=Strict", "; Path=/", "; Max-Age=43200"] {
        assert!(set_cookie.contains(part), "{set_cookie}");
    }
    assert!(!set_cookie.contains("Secure"), "{set_cookie}");
    assert!(!set_cookie.contains(&server.secrets[0]), "{set_cookie}");
    let text = response.text().await.unwrap();
    assert_eq!(text, r#"{"api_key_name":"k0","scopes":["search"]}"#);
    let cookie = set_cookie.split(';').next().unwrap().to_owned();
    let with_cookie =
        |request: RequestBuilder| request.header("cookie", format!("other=1; {cookie}"));

    assert_eq!(send_for_status(with_cookie(server.request(Method::GET, "/v1/events"))).await, 200);
    assert_eq!(with_cookie(session(Method::GET)).send().await.unwrap().text().await.unwrap(), text);
    // With a session, only this server's page may send requests other than GET.
    let search = || with_cookie(server.search_request());
    let origin = server.url.trim_end_matches('/');
    assert_eq!(send_for_status(search().header("sec-fetch-site", "same-origin")).await, 200);
    assert_eq!(send_for_status(search().header("origin", origin)).await, 200);
    // Behind a proxy that names another host than the browser did.
    for (forwarded_host, status) in [
        ("shop.example", 200),
        ("shop.example, inner.example", 200),
        ("inner.example, shop.example", 403),
    ] {
        let proxied = search().header("origin", "https://shop.example");
        let proxied = proxied.header("x-forwarded-host", forwarded_host);
        assert_eq!(send_for_status(proxied).await, status, "{forwarded_host}");
    }
    for (name, value) in [
        ("sec-fetch-site", "cross-site"),
        ("sec-fetch-site", "same-site"),
        ("origin", "http://127.0.0.1:1"),
        ("origin", "null"),
        ("origin", "file://"),
        ("x-unknown", "1"),
    ] {
        let (status, body, _) = send_for_problem(search().header(name, value)).await;
        assert_eq!(
            (status.as_u16(), &body["code"]),
            (403, &json!("cross_site")),
            "{name}: {value}"
        );
        let sign_out = with_cookie(session(Method::DELETE)).header(name, value);
        assert_eq!(send_for_status(sign_out).await, 403, "{name}: {value}");
    }
    let foreign = sign_in().body(body).header("origin", "https://evil.example");
    assert_eq!(send_for_status(foreign).await, 403);

    let sign_out = with_cookie(session(Method::DELETE)).header("origin", origin);
    let response = sign_out.send().await.unwrap();
    assert_eq!(response.status(), 204);
    assert!(response.headers()["set-cookie"].to_str().unwrap().contains("Max-Age=0"));
    assert_eq!(send_for_status(with_cookie(server.request(Method::GET, "/v1/state"))).await, 401);

    assert_eq!(
        send_for_status(sign_in().body(json!({"api_key": "bsap_guessed"}).to_string())).await,
        401
    );
    assert_eq!(send_for_status(session(Method::POST)).await, 415);
    let proxied = session(Method::POST).bearer_auth(&server.secrets[0]);
    let response = proxied.header("x-forwarded-proto", "https").send().await.unwrap();
    assert!(response.headers()["set-cookie"].to_str().unwrap().ends_with("; Secure"));
}

#[tokio::test]
async fn without_keys_only_loopback_hosts_are_answered() {
    let server = TestServer::start(&[], HttpOptions::default()).await;
    assert_eq!(send_for_status(server.search_request()).await, 200);
    for name in ["localhost:8080", "127.0.0.1", "[::1]:8080"] {
        assert_eq!(
            send_for_status(server.search_request().header("host", name)).await,
            200,
            "{name}"
        );
    }
    for name in ["evil.example:8080", "127.0.0.1.evil.example", "10.0.0.1"] {
        let (status, body, _) =
            send_for_problem(server.search_request().header("host", name)).await;
        assert_eq!((status.as_u16(), &body["code"]), (403, &json!("host_not_allowed")), "{name}");
    }
    assert_eq!(send_for_status(server.request(Method::POST, "/v1/session")).await, 409);
    let unauthenticated = TestServer::start(
        &[],
        HttpOptions { allow_unauthenticated: true, ..HttpOptions::default() },
    )
    .await;
    assert_eq!(
        send_for_status(unauthenticated.search_request().header("host", "shop.example")).await,
        200
    );
}

#[test]
fn public_listen_address_requires_keys_or_allow_unauthenticated() {
    let listen = SocketAddr::from(([0, 0, 0, 0], 8080));
    let public = HttpOptions { listen, ..HttpOptions::default() };
    assert!(public.validate()[0].contains("bsap keys new"), "{:?}", public.validate());
    let keys = vec![ApiKey::generate("shop", &[Scope::Search]).0];
    for allowed in [
        HttpOptions { keys, ..public.clone() },
        HttpOptions { allow_unauthenticated: true, ..public },
    ] {
        assert_eq!(allowed.validate(), Vec::<String>::new());
    }
    let origins = ["https://shop.example/", "shop.example", "*", "https://shop.example:443"];
    let wrong = HttpOptions {
        tls_cert: "cert.pem".into(),
        cors_origins: origins.map(String::from).into(),
        ..HttpOptions::default()
    };
    assert_eq!(wrong.validate().len(), 5, "{:?}", wrong.validate());
}

#[tokio::test]
async fn cors_allows_only_configured_origins() {
    let with_origin =
        HttpOptions { cors_origins: vec!["https://shop.example".into()], ..HttpOptions::default() };
    let server = TestServer::start(&[&[Scope::Search]], with_origin).await;
    let without_origins = TestServer::start(&[&[Scope::Search]], HttpOptions::default()).await;
    let preflight = |server: &TestServer, origin: &str| {
        server
            .request(Method::OPTIONS, "/v1/search")
            .header("origin", origin.to_owned())
            .header("access-control-request-method", "POST")
            .header("access-control-request-headers", "authorization,content-type")
    };
    let allowed_origin = |response: &Response| {
        response
            .headers()
            .get("access-control-allow-origin")
            .map(|v| v.to_str().unwrap().to_owned())
    };
    let response = preflight(&server, "https://shop.example").send().await.unwrap();
    assert_eq!(response.status(), 200);
    assert_eq!(allowed_origin(&response).as_deref(), Some("https://shop.example"));
    assert!(!response.headers().contains_key("access-control-allow-credentials"));
    for other in [
        preflight(&server, "https://evil.example"),
        preflight(&without_origins, "https://shop.example"),
        without_origins
            .search_request()
            .header("origin", "https://shop.example")
            .bearer_auth(&without_origins.secrets[0]),
    ] {
        assert_eq!(allowed_origin(&other.send().await.unwrap()), None);
    }
    let search = || server.search_request().header("origin", "https://shop.example");
    let response = search().bearer_auth(&server.secrets[0]).send().await.unwrap();
    assert_eq!((response.status().as_u16(), allowed_origin(&response).is_some()), (200, true));
    // The other site's page can read the error too.
    let response = search().send().await.unwrap();
    assert_eq!((response.status().as_u16(), allowed_origin(&response).is_some()), (401, true));
}

#[tokio::test]
async fn slow_and_oversized_request_heads_are_rejected() {
    let short_head = HttpOptions {
        header_timeout_ms: 200,
        idle_timeout_ms: 3_600_000,
        ..HttpOptions::default()
    };
    let server = TestServer::start(&[], short_head).await;
    for beginning in ["", "GET /livez HTTP/1.1\r\nhost: localhost\r\n"] {
        let mut stream = server.connect().await;
        stream.write_all(beginning.as_bytes()).await.unwrap();
        let mut response = Vec::new();
        timeout(TEST_TIMEOUT, stream.read_to_end(&mut response)).await.unwrap().unwrap();
        assert!(!String::from_utf8_lossy(&response).contains("200 OK"));
    }
    // Between requests a connection may be idle for longer than a head may take; each head has the limit.
    let mut stream = server.connect().await;
    let mut part = [0; 4096];
    for _ in 0..2 {
        stream.write_all(LIVEZ_REQUEST).await.unwrap();
        let read = stream.read(&mut part).await.unwrap();
        assert!(part[..read].starts_with(b"HTTP/1.1 200 OK"), "{:?}", &part[..read]);
        tokio::time::sleep(Duration::from_millis(600)).await;
    }
    stream.write_all(&LIVEZ_REQUEST[..20]).await.unwrap();
    let ended = timeout(TEST_TIMEOUT, stream.read(&mut part)).await.unwrap();
    assert!(matches!(ended, Ok(0) | Err(_)), "{ended:?}");

    for (kibibytes, is_accepted) in [(31, true), (33, false), (40, false), (64, false)] {
        let long = server.request(Method::GET, "/livez").header("x", "x".repeat(kibibytes << 10));
        let status = long.send().await.map_or(431, |response| response.status().as_u16());
        assert_eq!(status, if is_accepted { 200 } else { 431 }, "{kibibytes} KiB");
    }
    for (headers, expected) in [(90, 200), (101, 431)] {
        let mut many = server.request(Method::GET, "/livez");
        for number in 0..headers {
            many = many.header(format!("x-{number}"), "1");
        }
        assert_eq!(send_for_status(many).await, expected, "{headers} headers");
    }
}

#[tokio::test]
async fn idle_connections_are_closed_after_their_own_limit() {
    let short_idle =
        HttpOptions { header_timeout_ms: 600_000, idle_timeout_ms: 300, ..HttpOptions::default() };
    let server = TestServer::start(&[], short_idle).await;
    let mut stream = server.connect().await;
    let started = Instant::now();
    stream.write_all(LIVEZ_REQUEST).await.unwrap();
    let mut response = Vec::new();
    timeout(TEST_TIMEOUT, stream.read_to_end(&mut response)).await.unwrap().unwrap();
    assert!(String::from_utf8_lossy(&response).contains("200 OK"));
    assert!(started.elapsed() >= Duration::from_millis(300), "{:?}", started.elapsed());
}

#[tokio::test]
async fn a_response_that_takes_longer_than_the_limits_of_requests_is_complete() {
    let options =
        HttpOptions { header_timeout_ms: 100, idle_timeout_ms: 100, ..HttpOptions::default() };
    let server = TestServer::start(&[], options).await;
    let mut feed = server.request(Method::GET, "/v1/events").send().await.unwrap();
    assert_eq!(feed.headers()["x-accel-buffering"], "no");
    assert!(!feed.headers().contains_key("content-encoding"));
    let chunk = timeout(Duration::from_millis(800), feed.chunk()).await;
    assert!(
        chunk.is_err(),
        "the feed of a catalogue without changes is open and silent: {chunk:?}"
    );
}

#[tokio::test]
async fn connections_over_the_limit_are_rejected() {
    let server =
        TestServer::start(&[], HttpOptions { max_connections: 2, ..HttpOptions::default() }).await;
    let held = [server.connect().await, server.connect().await];
    let started = Instant::now();
    // The server may accept the held connections a moment later.
    let (body, response) = loop {
        let (status, body, response) =
            send_for_problem(server.request(Method::GET, "/v1/images?id=none")).await;
        if status == 429 || started.elapsed() >= TEST_TIMEOUT {
            break (body, response);
        }
    };
    assert_eq!(body["code"], "too_many_requests", "{body}");
    assert!(body["detail"].as_str().unwrap().contains("http.max_connections"));
    assert_eq!(response.headers()["retry-after"], "1");
    drop(held);
    let started = Instant::now();
    while send_for_status(server.request(Method::GET, "/livez")).await != 200 {
        assert!(started.elapsed() < TEST_TIMEOUT);
    }
}

/// Returns a certificate for 127.0.0.1: the folder of its files, options that name them, and a
/// client that trusts it.
fn self_signed_certificate() -> (TempDir, HttpOptions, Client) {
    let CertifiedKey { cert, signing_key } =
        generate_simple_self_signed(["127.0.0.1".to_owned()]).unwrap();
    let folder = tempfile::tempdir().unwrap();
    let [tls_cert, tls_key] = ["cert.pem", "key.pem"].map(|name| folder.path().join(name));
    std::fs::write(&tls_cert, cert.pem()).unwrap();
    std::fs::write(&tls_key, signing_key.serialize_pem()).unwrap();
    let trusted = reqwest::Certificate::from_pem(cert.pem().as_bytes()).unwrap();
    let client = Client::builder().tls_certs_only([trusted]).build().unwrap();
    (folder, HttpOptions { tls_cert, tls_key, ..HttpOptions::default() }, client)
}

#[tokio::test]
async fn connections_use_tls_if_a_certificate_is_configured() {
    let (folder, options, client) = self_signed_certificate();
    let short_timeout = HttpOptions { header_timeout_ms: 500, ..options.clone() };
    let mut server = TestServer::start(&[&[Scope::Search]], short_timeout).await;
    server.client = client;
    assert!(server.url.starts_with("https://"));
    assert_eq!(send_for_status(server.search_request().bearer_auth(&server.secrets[0])).await, 200);
    let sign_in = server.request(Method::POST, "/v1/session").bearer_auth(&server.secrets[0]);
    assert!(
        sign_in.send().await.unwrap().headers()["set-cookie"]
            .to_str()
            .unwrap()
            .ends_with("; Secure")
    );
    // A connection without a TLS handshake is closed, whether it sends a plain request or nothing.
    for beginning in ["", "GET /livez HTTP/1.1\r\nhost: localhost\r\n\r\n"] {
        let address = server.url.trim_start_matches("https://").trim_end_matches('/');
        let mut stream = TcpStream::connect(address).await.unwrap();
        stream.write_all(beginning.as_bytes()).await.unwrap();
        let mut response = Vec::new();
        let _ = timeout(TEST_TIMEOUT, stream.read_to_end(&mut response)).await.unwrap();
        assert!(!String::from_utf8_lossy(&response).contains("alive"));
    }
    let swapped = HttpOptions {
        tls_cert: options.tls_key.clone(),
        tls_key: options.tls_cert.clone(),
        ..options
    };
    let missing = HttpOptions { tls_cert: folder.path().join("none.pem"), ..swapped.clone() };
    for wrong in [swapped, missing] {
        let listen = SocketAddr::from(([127, 0, 0, 1], 0));
        let error = connections::bind_listener(&HttpOptions { listen, ..wrong })
            .await
            .map(|_| ())
            .unwrap_err();
        assert!(error.to_string().starts_with("http.tls_cert: "), "{error}");
    }
}

#[tokio::test]
async fn open_requests_finish_at_shutdown() {
    let (_folder, tls, client) = self_signed_certificate();
    for (options, client) in [(HttpOptions::default(), Client::new()), (tls, client)] {
        let mut server = TestServer::start(&[], options).await;
        server.client = client;
        // Two open requests: a search whose body is not sent completely, and an endless feed.
        let feed = server.request(Method::GET, "/v1/events").send().await.unwrap();
        let (sender, body) = futures::channel::mpsc::unbounded::<Result<&[u8], std::io::Error>>();
        sender.unbounded_send(Ok(b"{\"text\":")).unwrap();
        let search = server.request(Method::POST, "/v1/search");
        let search = search.header("content-type", "application/json");
        let search = tokio::spawn(search.body(reqwest::Body::wrap_stream(body)).send());
        // Long enough for the server to start the search on a busy machine too.
        tokio::time::sleep(Duration::from_secs(1)).await;
        server.cancel.cancel();
        tokio::time::sleep(Duration::from_millis(100)).await;
        sender.unbounded_send(Ok(b"\"a mug\"}")).unwrap();
        drop(sender);
        let response = search.await.unwrap().unwrap();
        assert_eq!(response.status(), 200);
        timeout(TEST_TIMEOUT, feed.bytes()).await.unwrap().unwrap();
        timeout(TEST_TIMEOUT, server.serve_task).await.unwrap().unwrap();
    }
}
