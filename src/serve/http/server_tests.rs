//! Who is answered, over real connections.

use std::time::{Duration, Instant};

use rcgen::{CertifiedKey, generate_simple_self_signed};
use reqwest::{Client, Method, RequestBuilder, Response, StatusCode};
use serde_json::{Value, json};
use tempfile::TempDir;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;
use tokio::task::JoinHandle;
use tokio::time::timeout;

use crate::ingest::{decode, fetch};
use crate::search::testing::{
    HashEncoders, clip_like_embedding, sample_prompt_set, sample_row, sample_serving_snapshot,
};
use crate::search::{self, Engine};
use crate::serve::feedback;
use crate::serve::http::*;
use crate::store::Store;
use crate::table::{SnapshotPart, TableChanges};

const DIMENSION: usize = 16;
const TEST_TIMEOUT: Duration = Duration::from_secs(20);

struct TestServer {
    url: String,
    secrets: Vec<String>,
    client: Client,
    cancel: CancellationToken,
    serve_task: JoinHandle<()>,
}

impl TestServer {
    /// With three images and a key for each of `scopes`.
    async fn start(scopes: &[&[Scope]], options: HttpOptions) -> Self {
        let made =
            scopes.iter().enumerate().map(|(i, scopes)| ApiKey::generate(&format!("k{i}"), scopes));
        let (keys, secrets) = made.unzip();
        let listen = SocketAddr::from(([127, 0, 0, 1], 0));
        let options = HttpOptions { listen, keys, ..options };
        assert_eq!(options.validate(), Vec::<String>::new());
        let listener = super::connections::listen(&options).await.unwrap();
        let served = sample_serving_snapshot(vec![sample_prompt_set("one", DIMENSION)]);
        let engine =
            Engine::new(HashEncoders::new(DIMENSION), served, search::SearchOptions::default())
                .with_attributes_and_decoding([].into(), decode::DecodeOptions::default());
        let rows = (0..3)
            .map(|i| sample_row(&format!("i{i}"), 1, Some(clip_like_embedding(i, DIMENSION))));
        let changes = TableChanges {
            version: 1,
            is_full_snapshot: true,
            part: SnapshotPart::All,
            rows: rows.collect(),
        };
        engine.snapshots().apply_changes(changes).await.unwrap();
        let token = CancellationToken::new();
        let (inbox, writer) = feedback::feedback_channel(&Store::in_memory());
        tokio::spawn(writer.run(token.clone()));
        let app = ServerContext {
            engines: Arc::new(Engines::new(Arc::new(engine))),
            feedback_queue: inbox,
            fetcher: Fetcher::new(&fetch::FetchOptions::default()).unwrap(),
            substitutes: Vec::new(),
            options,
        };
        let url = listener.url().unwrap();
        let ended = tokio::spawn(serve(app, listener, token.clone()));
        Self { url, secrets, client: Client::new(), cancel: token, serve_task: ended }
    }

    fn request(&self, method: Method, path: &str) -> RequestBuilder {
        self.client.request(method, format!("{}{}", self.url, &path[1..]))
    }

    fn search_request(&self) -> RequestBuilder {
        let ask =
            self.request(Method::POST, "/v1/search").header("content-type", "application/json");
        ask.body(json!({"text": "a mug", "k": 1}).to_string())
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
    let mut answer = request.send().await.unwrap();
    let body = answer.chunk().await.unwrap().unwrap();
    (answer.status(), serde_json::from_slice(&body).unwrap(), answer)
}

/// Every route but those of probes, page and session.
const SEARCH_SCOPE_ROUTES: [(Method, &str); 6] = [
    (Method::POST, "/v1/search"),
    (Method::POST, "/v1/explain"),
    (Method::GET, "/v1/images/i1"),
    (Method::GET, "/v1/images/i1/picture"),
    (Method::GET, "/v1/events"),
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
        let ask = || server.request(method.clone(), path);
        let (status, body, answer) = send_for_problem(ask()).await;
        assert_eq!((status.as_u16(), &body["code"]), (401, &json!("missing_api_key")), "{path}");
        assert_eq!(answer.headers()["www-authenticate"], "Bearer realm=\"bsap\"");
        for wrong in ["bsap_guessed", "", &server.secrets[0][1..]] {
            let (status, body, _) = send_for_problem(ask().bearer_auth(wrong)).await;
            assert_eq!(
                (status.as_u16(), &body["code"]),
                (401, &json!("invalid_api_key")),
                "{path}"
            );
        }
        let (status, body, answer) = send_for_problem(ask().bearer_auth(&server.secrets[1])).await;
        assert_eq!((status.as_u16(), &body["code"]), (403, &json!("insufficient_scope")), "{path}");
        let challenge = answer.headers()["www-authenticate"].to_str().unwrap();
        assert!(challenge.ends_with("error=\"insufficient_scope\", scope=\"search\""));
        for right in [&server.secrets[0], &server.secrets[2]] {
            let answer = ask().bearer_auth(right).send().await.unwrap().status();
            assert!(answer != 401 && answer != 403, "{path}: {answer}");
        }
    }
    let feedback = || {
        let said = json!({"text": "a mug", "image_id": "i1", "verdict": "right"}).to_string();
        let ask =
            server.request(Method::POST, "/v1/feedback").header("content-type", "application/json");
        ask.body(said)
    };
    assert_eq!(send_for_status(feedback()).await, 401);
    for (secret, wanted) in server.secrets.iter().zip([403, 204, 204]) {
        assert_eq!(send_for_status(feedback().bearer_auth(secret)).await, wanted);
    }
    let basic = server.search_request().basic_auth("k0", Some(&server.secrets[0]));
    assert_eq!(send_for_status(basic).await, 401);
    assert_eq!(send_for_status(server.search_request().bearer_auth(&server.secrets[0])).await, 200);
}

#[tokio::test]
async fn the_page_signs_in_with_a_key_and_sends_a_session_cookie() {
    let server = TestServer::start(&[&[Scope::Search]], HttpOptions::default()).await;
    let session = |method| server.request(method, "/v1/session");
    let body = json!({"key": server.secrets[0]}).to_string();
    let sign_in = || session(Method::POST).header("content-type", "application/json");
    let answer = sign_in().body(body.clone()).send().await.unwrap();
    let set = answer.headers()["set-cookie"].to_str().unwrap().to_owned();
    for part in ["; HttpOnly", "; SameSite=Strict", "; Path=/", "; Max-Age=43200"] {
        assert!(set.contains(part), "{set}");
    }
    assert!(!set.contains("Secure") && !set.contains(&server.secrets[0]), "{set}");
    let text = answer.text().await.unwrap();
    assert_eq!(text, r#"{"key":"k0","scopes":["search"]}"#);
    let cookie = set.split(';').next().unwrap().to_owned();
    let with = |ask: RequestBuilder| ask.header("cookie", format!("other=1; {cookie}"));

    assert_eq!(send_for_status(with(server.request(Method::GET, "/v1/events"))).await, 200);
    assert_eq!(with(session(Method::GET)).send().await.unwrap().text().await.unwrap(), text);
    // What changes something is taken from this server's own page alone.
    let search = || with(server.search_request());
    let origin = server.url.trim_end_matches('/');
    assert_eq!(send_for_status(search().header("sec-fetch-site", "same-origin")).await, 200);
    assert_eq!(send_for_status(search().header("origin", origin)).await, 200);
    for (name, value) in [
        ("sec-fetch-site", "cross-site"),
        ("sec-fetch-site", "same-site"),
        ("origin", "http://127.0.0.1:1"),
        ("origin", "null"),
        ("x-unknown", "1"),
    ] {
        let (status, body, _) = send_for_problem(search().header(name, value)).await;
        assert_eq!(
            (status.as_u16(), &body["code"]),
            (403, &json!("cross_site")),
            "{name}: {value}"
        );
        let signed_out = with(session(Method::DELETE)).header(name, value);
        assert_eq!(signed_out.send().await.unwrap().status(), 403, "{name}: {value}");
    }
    let foreign = sign_in().body(body).header("origin", "https://evil.example");
    assert_eq!(send_for_status(foreign).await, 403);

    let out = with(session(Method::DELETE)).header("origin", origin).send().await.unwrap();
    assert_eq!(out.status(), 204);
    assert!(out.headers()["set-cookie"].to_str().unwrap().contains("Max-Age=0"));
    assert_eq!(send_for_status(with(server.request(Method::GET, "/v1/state"))).await, 401);

    assert_eq!(
        send_for_status(sign_in().body(json!({"key": "bsap_guessed"}).to_string())).await,
        401
    );
    assert_eq!(send_for_status(session(Method::POST)).await, 415);
    let proxied = session(Method::POST).bearer_auth(&server.secrets[0]);
    let answer = proxied.header("x-forwarded-proto", "https").send().await.unwrap();
    assert!(answer.headers()["set-cookie"].to_str().unwrap().ends_with("; Secure"));
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
    let open = TestServer::start(
        &[],
        HttpOptions { allow_unauthenticated: true, ..HttpOptions::default() },
    )
    .await;
    assert_eq!(send_for_status(open.search_request().header("host", "shop.example")).await, 200);
}

#[test]
fn public_listen_address_requires_keys_or_allow_unauthenticated() {
    let listen = SocketAddr::from(([0, 0, 0, 0], 8080));
    let beyond = HttpOptions { listen, ..HttpOptions::default() };
    assert!(beyond.validate()[0].contains("bsap keys new"), "{:?}", beyond.validate());
    let keys = vec![ApiKey::generate("shop", &[Scope::Search]).0];
    for allowed in [
        HttpOptions { keys, ..beyond.clone() },
        HttpOptions { allow_unauthenticated: true, ..beyond },
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
    let named =
        HttpOptions { cors_origins: vec!["https://shop.example".into()], ..HttpOptions::default() };
    let server = TestServer::start(&[&[Scope::Search]], named).await;
    let closed = TestServer::start(&[&[Scope::Search]], HttpOptions::default()).await;
    let preflight = |server: &TestServer, origin: &str| {
        let ask = server.request(Method::OPTIONS, "/v1/search").header("origin", origin.to_owned());
        ask.header("access-control-request-method", "POST")
            .header("access-control-request-headers", "authorization,content-type")
    };
    let allowed = |answer: &Response| {
        answer.headers().get("access-control-allow-origin").map(|v| v.to_str().unwrap().to_owned())
    };
    let answer = preflight(&server, "https://shop.example").send().await.unwrap();
    assert_eq!(answer.status(), 200);
    assert_eq!(allowed(&answer).as_deref(), Some("https://shop.example"));
    assert!(!answer.headers().contains_key("access-control-allow-credentials"));
    for other in [
        preflight(&server, "https://evil.example"),
        preflight(&closed, "https://shop.example"),
        closed
            .search_request()
            .header("origin", "https://shop.example")
            .bearer_auth(&closed.secrets[0]),
    ] {
        assert_eq!(allowed(&other.send().await.unwrap()), None);
    }
    let asked = server.search_request().header("origin", "https://shop.example");
    let answer = asked.bearer_auth(&server.secrets[0]).send().await.unwrap();
    assert_eq!((answer.status().as_u16(), allowed(&answer).is_some()), (200, true));
    // The page is told why it may not.
    let refused =
        server.search_request().header("origin", "https://shop.example").send().await.unwrap();
    assert_eq!((refused.status().as_u16(), allowed(&refused).is_some()), (401, true));
}

#[tokio::test]
async fn slow_and_oversized_request_heads_are_rejected() {
    let brief = HttpOptions { header_timeout_ms: 200, ..HttpOptions::default() };
    let server = TestServer::start(&[], brief).await;
    for beginning in ["", "GET /livez HTTP/1.1\r\nhost: localhost\r\n"] {
        let mut stream = server.connect().await;
        stream.write_all(beginning.as_bytes()).await.unwrap();
        let mut answer = Vec::new();
        timeout(TEST_TIMEOUT, stream.read_to_end(&mut answer)).await.unwrap().unwrap();
        assert!(!String::from_utf8_lossy(&answer).contains("200 OK"));
    }
    // One that is idle after an answer as well.
    let mut stream = server.connect().await;
    stream.write_all(b"GET /livez HTTP/1.1\r\nhost: localhost\r\n\r\n").await.unwrap();
    let mut answer = Vec::new();
    timeout(TEST_TIMEOUT, stream.read_to_end(&mut answer)).await.unwrap().unwrap();
    assert!(String::from_utf8_lossy(&answer).contains("200 OK"));

    let long = server.request(Method::GET, "/livez").header("x-long", "x".repeat(64 << 10));
    assert!(long.send().await.map_or(true, |answer| answer.status() == 431));
}

#[tokio::test]
async fn connections_over_the_limit_are_rejected() {
    let server =
        TestServer::start(&[], HttpOptions { max_connections: 2, ..HttpOptions::default() }).await;
    let held = [server.connect().await, server.connect().await];
    let started = Instant::now();
    let (mut status, mut answer) = (StatusCode::OK, None);
    // The held ones may be taken a moment later.
    while status != 429 && started.elapsed() < TEST_TIMEOUT {
        let (found, body, response) =
            send_for_problem(server.request(Method::GET, "/v1/images/none")).await;
        (status, answer) = (found, Some((body, response)));
    }
    let (body, response) = answer.unwrap();
    assert_eq!(body["code"], "too_many_requests", "{body}");
    assert!(body["detail"].as_str().unwrap().contains("http.max_connections"));
    assert_eq!(response.headers()["retry-after"], "1");
    drop(held);
    let started = Instant::now();
    while self::send_for_status(server.request(Method::GET, "/livez")).await != 200 {
        assert!(started.elapsed() < TEST_TIMEOUT);
    }
}

/// A certificate for this machine, as files and as a client trusts it.
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
    let brief = HttpOptions { header_timeout_ms: 500, ..options.clone() };
    let mut server = TestServer::start(&[&[Scope::Search]], brief).await;
    server.client = client;
    assert!(server.url.starts_with("https://"));
    assert_eq!(send_for_status(server.search_request().bearer_auth(&server.secrets[0])).await, 200);
    let answer = server.request(Method::POST, "/v1/session").bearer_auth(&server.secrets[0]).send();
    assert!(answer.await.unwrap().headers()["set-cookie"].to_str().unwrap().ends_with("; Secure"));
    // Neither a plain request nor a handshake that never comes is waited for.
    for beginning in ["", "GET /livez HTTP/1.1\r\nhost: localhost\r\n\r\n"] {
        let address = server.url.trim_start_matches("https://").trim_end_matches('/');
        let mut stream = TcpStream::connect(address).await.unwrap();
        stream.write_all(beginning.as_bytes()).await.unwrap();
        let mut answer = Vec::new();
        let _ = timeout(TEST_TIMEOUT, stream.read_to_end(&mut answer)).await.unwrap();
        assert!(!String::from_utf8_lossy(&answer).contains("alive"));
    }
    let swapped = HttpOptions {
        tls_cert: options.tls_key.clone(),
        tls_key: options.tls_cert.clone(),
        ..options
    };
    let missing = HttpOptions { tls_cert: folder.path().join("none.pem"), ..swapped.clone() };
    for wrong in [swapped, missing] {
        let listen = SocketAddr::from(([127, 0, 0, 1], 0));
        let error = super::connections::listen(&HttpOptions { listen, ..wrong })
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
        // Of one search, the body is on its way; a feed would last for ever.
        let feed = server.request(Method::GET, "/v1/events").send().await.unwrap();
        let (sender, body) = futures::channel::mpsc::unbounded::<Result<&[u8], std::io::Error>>();
        sender.unbounded_send(Ok(b"{\"text\":")).unwrap();
        let search = server.request(Method::POST, "/v1/search");
        let search = search.header("content-type", "application/json");
        let search = tokio::spawn(search.body(reqwest::Body::wrap_stream(body)).send());
        // Long enough that it has been taken up on a busy machine too.
        tokio::time::sleep(Duration::from_secs(1)).await;
        server.cancel.cancel();
        tokio::time::sleep(Duration::from_millis(100)).await;
        sender.unbounded_send(Ok(b"\"a mug\"}")).unwrap();
        drop(sender);
        let answer = search.await.unwrap().unwrap();
        assert_eq!(answer.status(), 200);
        timeout(TEST_TIMEOUT, feed.bytes()).await.unwrap().unwrap();
        timeout(TEST_TIMEOUT, server.serve_task).await.unwrap().unwrap();
    }
}
