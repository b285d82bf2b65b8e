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
use crate::search::testing::{Hashed, embedding, row, served, set};
use crate::search::{self, Engine};
use crate::serve::feedback;
use crate::serve::http::*;
use crate::store::Store;
use crate::table::{Changes, Part};

const DIMENSION: usize = 16;
const LONG: Duration = Duration::from_secs(20);

struct Server {
    url: String,
    secrets: Vec<String>,
    client: Client,
    token: CancellationToken,
    ended: JoinHandle<()>,
}

impl Server {
    /// With three images and a key for each of `scopes`.
    async fn start(scopes: &[&[Scope]], options: Options) -> Self {
        let made = scopes.iter().enumerate().map(|(i, scopes)| Key::mint(&format!("k{i}"), scopes));
        let (keys, secrets) = made.unzip();
        let listen = SocketAddr::from(([127, 0, 0, 1], 0));
        let options = Options { listen, keys, ..options };
        assert_eq!(options.problems(), Vec::<String>::new());
        let listener = super::connections::listen(&options).await.unwrap();
        let served = served(vec![set("one", DIMENSION)]);
        let engine = Engine::new(Hashed::new(DIMENSION), served, search::Options::default())
            .reading([].into(), decode::Options::default());
        let rows = (0..3).map(|i| row(&format!("i{i}"), 1, Some(embedding(i, DIMENSION))));
        let changes = Changes {
            version: 1,
            whole: true,
            part: Part::All,
            rows: rows.collect(),
            statistics: Vec::new(),
        };
        engine.snapshots().apply(changes).await.unwrap();
        let token = CancellationToken::new();
        let (inbox, writer) = feedback::inbox(&Store::memory());
        tokio::spawn(writer.run(token.clone()));
        let app = App {
            engines: Arc::new(Engines::new(Arc::new(engine))),
            feedback: inbox,
            fetcher: Fetcher::new(&fetch::Options::default()).unwrap(),
            stand_ins: Vec::new(),
            options,
        };
        let url = listener.url().unwrap();
        let ended = tokio::spawn(serve(app, listener, token.clone()));
        Self { url, secrets, client: Client::new(), token, ended }
    }

    fn ask(&self, method: Method, path: &str) -> RequestBuilder {
        self.client.request(method, format!("{}{}", self.url, &path[1..]))
    }

    fn search(&self) -> RequestBuilder {
        let ask = self.ask(Method::POST, "/v1/search").header("content-type", "application/json");
        ask.body(json!({"text": "a mug", "k": 1}).to_string())
    }

    async fn connect(&self) -> TcpStream {
        let address = self.url.trim_start_matches("http://").trim_end_matches('/');
        TcpStream::connect(address).await.unwrap()
    }
}

async fn status(request: RequestBuilder) -> StatusCode {
    request.send().await.unwrap().status()
}

async fn problem(request: RequestBuilder) -> (StatusCode, Value, Response) {
    let mut answer = request.send().await.unwrap();
    let body = answer.chunk().await.unwrap().unwrap();
    (answer.status(), serde_json::from_slice(&body).unwrap(), answer)
}

/// Every route but those of probes, page and session.
const ASKED: [(Method, &str); 6] = [
    (Method::POST, "/v1/search"),
    (Method::POST, "/v1/explain"),
    (Method::GET, "/v1/images/i1"),
    (Method::GET, "/v1/images/i1/picture"),
    (Method::GET, "/v1/events"),
    (Method::GET, "/v1/state"),
];

#[tokio::test]
async fn each_route_asks_for_its_scope() {
    let scopes: [&[Scope]; 3] = [&[Scope::Search], &[Scope::Feedback], &[Scope::Admin]];
    let server = Server::start(&scopes, Options::default()).await;
    for path in ["/", "/livez", "/readyz"] {
        assert_eq!(status(server.ask(Method::GET, path)).await, 200, "{path}");
    }
    for (method, path) in ASKED {
        let ask = || server.ask(method.clone(), path);
        let (status, body, answer) = problem(ask()).await;
        assert_eq!((status.as_u16(), &body["code"]), (401, &json!("no_key")), "{path}");
        assert_eq!(answer.headers()["www-authenticate"], "Bearer realm=\"bsap\"");
        for wrong in ["bsap_guessed", "", &server.secrets[0][1..]] {
            let (status, body, _) = problem(ask().bearer_auth(wrong)).await;
            assert_eq!((status.as_u16(), &body["code"]), (401, &json!("wrong_key")), "{path}");
        }
        let (status, body, answer) = problem(ask().bearer_auth(&server.secrets[1])).await;
        assert_eq!((status.as_u16(), &body["code"]), (403, &json!("scope")), "{path}");
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
            server.ask(Method::POST, "/v1/feedback").header("content-type", "application/json");
        ask.body(said)
    };
    assert_eq!(status(feedback()).await, 401);
    for (secret, wanted) in server.secrets.iter().zip([403, 204, 204]) {
        assert_eq!(status(feedback().bearer_auth(secret)).await, wanted);
    }
    let basic = server.search().basic_auth("k0", Some(&server.secrets[0]));
    assert_eq!(status(basic).await, 401);
    assert_eq!(status(server.search().bearer_auth(&server.secrets[0])).await, 200);
}

#[tokio::test]
async fn the_page_signs_in_with_a_key_and_asks_with_a_cookie() {
    let server = Server::start(&[&[Scope::Search]], Options::default()).await;
    let session = |method| server.ask(method, "/v1/session");
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

    assert_eq!(status(with(server.ask(Method::GET, "/v1/events"))).await, 200);
    assert_eq!(with(session(Method::GET)).send().await.unwrap().text().await.unwrap(), text);
    // What changes something is taken from this server's own page alone.
    let search = || with(server.search());
    let origin = server.url.trim_end_matches('/');
    assert_eq!(status(search().header("sec-fetch-site", "same-origin")).await, 200);
    assert_eq!(status(search().header("origin", origin)).await, 200);
    for (name, value) in [
        ("sec-fetch-site", "cross-site"),
        ("sec-fetch-site", "same-site"),
        ("origin", "http://127.0.0.1:1"),
        ("origin", "null"),
        ("x-unknown", "1"),
    ] {
        let (status, body, _) = problem(search().header(name, value)).await;
        assert_eq!(
            (status.as_u16(), &body["code"]),
            (403, &json!("cross_site")),
            "{name}: {value}"
        );
        let signed_out = with(session(Method::DELETE)).header(name, value);
        assert_eq!(signed_out.send().await.unwrap().status(), 403, "{name}: {value}");
    }
    let foreign = sign_in().body(body).header("origin", "https://evil.example");
    assert_eq!(status(foreign).await, 403);

    let out = with(session(Method::DELETE)).header("origin", origin).send().await.unwrap();
    assert_eq!(out.status(), 204);
    assert!(out.headers()["set-cookie"].to_str().unwrap().contains("Max-Age=0"));
    assert_eq!(status(with(server.ask(Method::GET, "/v1/state"))).await, 401);

    assert_eq!(status(sign_in().body(json!({"key": "bsap_guessed"}).to_string())).await, 401);
    assert_eq!(status(session(Method::POST)).await, 415);
    let proxied = session(Method::POST).bearer_auth(&server.secrets[0]);
    let answer = proxied.header("x-forwarded-proto", "https").send().await.unwrap();
    assert!(answer.headers()["set-cookie"].to_str().unwrap().ends_with("; Secure"));
}

#[tokio::test]
async fn without_keys_this_machine_is_answered_and_no_other_name() {
    let server = Server::start(&[], Options::default()).await;
    assert_eq!(status(server.search()).await, 200);
    for name in ["localhost:8080", "127.0.0.1", "[::1]:8080"] {
        assert_eq!(status(server.search().header("host", name)).await, 200, "{name}");
    }
    for name in ["evil.example:8080", "127.0.0.1.evil.example", "10.0.0.1"] {
        let (status, body, _) = problem(server.search().header("host", name)).await;
        assert_eq!((status.as_u16(), &body["code"]), (403, &json!("host")), "{name}");
    }
    assert_eq!(status(server.ask(Method::POST, "/v1/session")).await, 409);
    let open = Server::start(&[], Options { open: true, ..Options::default() }).await;
    assert_eq!(status(open.search().header("host", "shop.example")).await, 200);
}

#[test]
fn listening_beyond_this_machine_needs_keys_or_that_somebody_says_so() {
    let listen = SocketAddr::from(([0, 0, 0, 0], 8080));
    let beyond = Options { listen, ..Options::default() };
    assert!(beyond.problems()[0].contains("bsap keys new"), "{:?}", beyond.problems());
    let keys = vec![Key::mint("shop", &[Scope::Search]).0];
    for allowed in [Options { keys, ..beyond.clone() }, Options { open: true, ..beyond }] {
        assert_eq!(allowed.problems(), Vec::<String>::new());
    }
    let origins = ["https://shop.example/", "shop.example", "*", "https://shop.example:443"];
    let wrong = Options {
        tls_cert: "cert.pem".into(),
        cors_origins: origins.map(String::from).into(),
        ..Options::default()
    };
    assert_eq!(wrong.problems().len(), 5, "{:?}", wrong.problems());
}

#[tokio::test]
async fn pages_of_other_sites_are_answered_only_where_they_are_named() {
    let named = Options { cors_origins: vec!["https://shop.example".into()], ..Options::default() };
    let server = Server::start(&[&[Scope::Search]], named).await;
    let closed = Server::start(&[&[Scope::Search]], Options::default()).await;
    let preflight = |server: &Server, origin: &str| {
        let ask = server.ask(Method::OPTIONS, "/v1/search").header("origin", origin.to_owned());
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
        closed.search().header("origin", "https://shop.example").bearer_auth(&closed.secrets[0]),
    ] {
        assert_eq!(allowed(&other.send().await.unwrap()), None);
    }
    let asked = server.search().header("origin", "https://shop.example");
    let answer = asked.bearer_auth(&server.secrets[0]).send().await.unwrap();
    assert_eq!((answer.status().as_u16(), allowed(&answer).is_some()), (200, true));
    // The page is told why it may not.
    let refused = server.search().header("origin", "https://shop.example").send().await.unwrap();
    assert_eq!((refused.status().as_u16(), allowed(&refused).is_some()), (401, true));
}

#[tokio::test]
async fn slow_and_endless_heads_are_cut_off() {
    let brief = Options { header_timeout_ms: 200, ..Options::default() };
    let server = Server::start(&[], brief).await;
    for beginning in ["", "GET /livez HTTP/1.1\r\nhost: localhost\r\n"] {
        let mut stream = server.connect().await;
        stream.write_all(beginning.as_bytes()).await.unwrap();
        let mut answer = Vec::new();
        timeout(LONG, stream.read_to_end(&mut answer)).await.unwrap().unwrap();
        assert!(!String::from_utf8_lossy(&answer).contains("200 OK"));
    }
    // One that is idle after an answer as well.
    let mut stream = server.connect().await;
    stream.write_all(b"GET /livez HTTP/1.1\r\nhost: localhost\r\n\r\n").await.unwrap();
    let mut answer = Vec::new();
    timeout(LONG, stream.read_to_end(&mut answer)).await.unwrap().unwrap();
    assert!(String::from_utf8_lossy(&answer).contains("200 OK"));

    let long = server.ask(Method::GET, "/livez").header("x-long", "x".repeat(64 << 10));
    assert!(long.send().await.map_or(true, |answer| answer.status() == 431));
}

#[tokio::test]
async fn more_connections_than_may_be_are_turned_away() {
    let server = Server::start(&[], Options { max_connections: 2, ..Options::default() }).await;
    let held = [server.connect().await, server.connect().await];
    let started = Instant::now();
    let (mut status, mut answer) = (StatusCode::OK, None);
    // The held ones may be taken a moment later.
    while status != 429 && started.elapsed() < LONG {
        let (found, body, response) = problem(server.ask(Method::GET, "/v1/images/none")).await;
        (status, answer) = (found, Some((body, response)));
    }
    let (body, response) = answer.unwrap();
    assert_eq!(body["code"], "busy", "{body}");
    assert!(body["detail"].as_str().unwrap().contains("http.max_connections"));
    assert_eq!(response.headers()["retry-after"], "1");
    drop(held);
    let started = Instant::now();
    while self::status(server.ask(Method::GET, "/livez")).await != 200 {
        assert!(started.elapsed() < LONG);
    }
}

/// A certificate for this machine, as files and as a client trusts it.
fn certificate() -> (TempDir, Options, Client) {
    let CertifiedKey { cert, signing_key } =
        generate_simple_self_signed(["127.0.0.1".to_owned()]).unwrap();
    let folder = tempfile::tempdir().unwrap();
    let [tls_cert, tls_key] = ["cert.pem", "key.pem"].map(|name| folder.path().join(name));
    std::fs::write(&tls_cert, cert.pem()).unwrap();
    std::fs::write(&tls_key, signing_key.serialize_pem()).unwrap();
    let trusted = reqwest::Certificate::from_pem(cert.pem().as_bytes()).unwrap();
    let client = Client::builder().tls_certs_only([trusted]).build().unwrap();
    (folder, Options { tls_cert, tls_key, ..Options::default() }, client)
}

#[tokio::test]
async fn connections_are_encrypted_where_there_is_a_certificate() {
    let (folder, options, client) = certificate();
    let brief = Options { header_timeout_ms: 500, ..options.clone() };
    let mut server = Server::start(&[&[Scope::Search]], brief).await;
    server.client = client;
    assert!(server.url.starts_with("https://"));
    assert_eq!(status(server.search().bearer_auth(&server.secrets[0])).await, 200);
    let answer = server.ask(Method::POST, "/v1/session").bearer_auth(&server.secrets[0]).send();
    assert!(answer.await.unwrap().headers()["set-cookie"].to_str().unwrap().ends_with("; Secure"));
    // Neither a plain request nor a handshake that never comes is waited for.
    for beginning in ["", "GET /livez HTTP/1.1\r\nhost: localhost\r\n\r\n"] {
        let address = server.url.trim_start_matches("https://").trim_end_matches('/');
        let mut stream = TcpStream::connect(address).await.unwrap();
        stream.write_all(beginning.as_bytes()).await.unwrap();
        let mut answer = Vec::new();
        let _ = timeout(LONG, stream.read_to_end(&mut answer)).await.unwrap();
        assert!(!String::from_utf8_lossy(&answer).contains("alive"));
    }
    let swapped =
        Options { tls_cert: options.tls_key.clone(), tls_key: options.tls_cert.clone(), ..options };
    let missing = Options { tls_cert: folder.path().join("none.pem"), ..swapped.clone() };
    for wrong in [swapped, missing] {
        let listen = SocketAddr::from(([127, 0, 0, 1], 0));
        let error =
            super::connections::listen(&Options { listen, ..wrong }).await.map(|_| ()).unwrap_err();
        assert!(error.to_string().starts_with("http.tls_cert: "), "{error}");
    }
}

#[tokio::test]
async fn open_requests_are_finished_at_the_end() {
    let (_folder, tls, client) = certificate();
    for (options, client) in [(Options::default(), Client::new()), (tls, client)] {
        let mut server = Server::start(&[], options).await;
        server.client = client;
        // Of one search, the body is on its way; a feed would last for ever.
        let feed = server.ask(Method::GET, "/v1/events").send().await.unwrap();
        let (sender, body) = futures::channel::mpsc::unbounded::<Result<&[u8], std::io::Error>>();
        sender.unbounded_send(Ok(b"{\"text\":")).unwrap();
        let search = server.ask(Method::POST, "/v1/search");
        let search = search.header("content-type", "application/json");
        let search = tokio::spawn(search.body(reqwest::Body::wrap_stream(body)).send());
        // Long enough that it has been taken up on a busy machine too.
        tokio::time::sleep(Duration::from_secs(1)).await;
        server.token.cancel();
        tokio::time::sleep(Duration::from_millis(100)).await;
        sender.unbounded_send(Ok(b"\"a mug\"}")).unwrap();
        drop(sender);
        let answer = search.await.unwrap().unwrap();
        assert_eq!(answer.status(), 200);
        timeout(LONG, feed.bytes()).await.unwrap().unwrap();
        timeout(LONG, server.ended).await.unwrap().unwrap();
    }
}
