//! `bsap` run against a hub on loopback that has the fixtures as its models: variables, proxies,
//! certificate authorities. The faults of hubs are tested where the client is.

use std::net::SocketAddr;
use std::path::Path;
use std::process::Output;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use axum::Router;
use axum::extract::{Path as UrlPath, State};
use axum::http::{HeaderMap, StatusCode};
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, IsCa, KeyPair};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};
use tokio_rustls::TlsAcceptor;
use tokio_rustls::rustls::ServerConfig;
use tokio_rustls::rustls::pki_types::{PrivateKeyDer, PrivatePkcs8KeyDer};
use tokio_rustls::server::TlsStream;

use super::fixture_folder;

const COMMIT: &str = "0123456789abcdef0123456789abcdef01234567";

/// How a hub answers, and how many requests it got.
#[derive(Default)]
struct Hub {
    /// Without it every request is refused.
    token: Option<&'static str>,
    request_count: AtomicUsize,
}

async fn serve_file(
    State(hub): State<Arc<Hub>>,
    UrlPath((name, revision, file)): UrlPath<(String, String, String)>,
    headers: HeaderMap,
) -> Response {
    hub.request_count.fetch_add(1, Ordering::Relaxed);
    let token = headers.get("authorization").map(|value| value.to_str().unwrap().to_owned());
    if hub.token.is_some_and(|expected| token != Some(format!("Bearer {expected}"))) {
        return (StatusCode::UNAUTHORIZED, [("x-error-code", "GatedRepo")]).into_response();
    }
    if !["v1", COMMIT].contains(&revision.as_str()) {
        return StatusCode::NOT_FOUND.into_response();
    }
    let Ok(bytes) = std::fs::read(fixture_folder().join(name).join(&file)) else {
        return (StatusCode::NOT_FOUND, [("x-repo-commit", COMMIT)]).into_response();
    };
    ([("x-repo-commit", COMMIT.to_owned()), ("etag", format!("\"{file}\""))], bytes).into_response()
}

fn router(hub: &Arc<Hub>) -> Router {
    Router::new()
        .route("/test/{name}/resolve/{revision}/{file}", get(serve_file))
        .with_state(hub.clone())
}

async fn start_hub(hub: Hub) -> (String, Arc<Hub>) {
    let hub = Arc::new(hub);
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("http://{}", listener.local_addr().unwrap());
    let app = router(&hub);
    tokio::spawn(async move { axum::serve(listener, app).await.unwrap() });
    (url, hub)
}

/// Runs `bsap` with these variables of the hub and of proxies alone.
async fn run_bsap(arguments: &[&str], variables: &[(&str, &str)]) -> Output {
    let mut command = tokio::process::Command::new(env!("CARGO_BIN_EXE_bsap"));
    for (name, _) in std::env::vars_os() {
        let name = name.to_string_lossy().into_owned();
        let upper = name.to_uppercase();
        let others = ["SSL_CERT_FILE", "SSL_CERT_DIR", "XDG_CACHE_HOME", "TRANSFORMERS_OFFLINE"];
        if upper.starts_with("HF_") || upper.ends_with("_PROXY") || others.contains(&upper.as_str())
        {
            command.env_remove(name);
        }
    }
    command.args(arguments).envs(variables.iter().copied()).output().await.unwrap()
}

#[track_caller]
fn assert_output(output: &Output, code: i32, words: &[&str]) -> String {
    let text = String::from_utf8_lossy(&output.stdout).into_owned()
        + &String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(code), "{text}");
    for word in words {
        assert!(text.contains(word), "{word} is not in {text}");
    }
    text
}

const INSPECT: [&str; 5] = ["model", "inspect", "test/siglip", "--revision", "v1"];

fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_model_of_the_hub_is_downloaded_once_and_found_offline() {
    let (url, hub) = start_hub(Hub::default()).await;
    let home = tempfile::tempdir().unwrap();
    let variables = [("HF_ENDPOINT", url.as_str()), ("HF_HOME", text(home.path()))];
    let count = || hub.request_count.load(Ordering::Relaxed);
    let offline = [&INSPECT[..], &["--offline"]].concat();
    let by_variable = [&variables[..], &[("HF_HUB_OFFLINE", "1")]].concat();
    let output = run_bsap(&offline, &variables).await;
    assert_output(&output, 1, &["config.json", "model.offline", text(home.path())]);
    let output = run_bsap(&INSPECT, &by_variable).await;
    assert_output(&output, 1, &["config.json", "HF_HUB_OFFLINE"]);
    assert_eq!(count(), 0);
    let output = run_bsap(&INSPECT, &variables).await;
    let words = ["test/siglip", "siglip", "logit bias     -12.9", "self-test      ok"];
    assert_output(&output, 0, &words);
    assert!(home.path().join("hub/models--test--siglip/refs/v1").is_file());
    let after_download = count();
    assert!(after_download >= 5, "{after_download}");
    assert_output(&run_bsap(&INSPECT, &variables).await, 0, &["self-test      ok"]);
    assert_output(&run_bsap(&offline, &variables).await, 0, &["self-test      ok"]);
    assert_output(&run_bsap(&INSPECT, &by_variable).await, 0, &["self-test      ok"]);
    assert_eq!(count(), after_download, "the cache is used");
    let other = run_bsap(&INSPECT[..3], &variables).await;
    assert_output(&other, 1, &["test/siglip", "config.json", "main", "404"]);
    let nobody =
        run_bsap(&["model", "inspect", "test/nobody", "--revision", "v1"], &variables).await;
    assert_output(&nobody, 1, &["test/nobody", "config.json", "404"]);
    let invalid = run_bsap(&["model", "inspect", "no such folder"], &variables).await;
    assert_output(&invalid, 1, &["neither a folder nor"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_token_is_needed_and_never_printed() {
    let (url, _hub) = start_hub(Hub { token: Some("hf_good"), ..Hub::default() }).await;
    let cache = tempfile::tempdir().unwrap();
    let variables = [("HF_ENDPOINT", url.as_str()), ("HF_HUB_CACHE", text(cache.path()))];
    let without = run_bsap(&INSPECT, &[&variables[..], &[("HF_HOME", "/nowhere")]].concat()).await;
    assert_output(&without, 1, &["401", "set HF_TOKEN", "terms"]);
    let wrong = run_bsap(&INSPECT, &[&variables[..], &[("HF_TOKEN", "hf_wrong")]].concat()).await;
    let printed = assert_output(&wrong, 1, &["401", "HF_TOKEN"]);
    assert!(!printed.contains("hf_wrong"), "{printed}");
    let good = run_bsap(&INSPECT, &[&variables[..], &[("HF_TOKEN", "hf_good")]].concat()).await;
    let printed = assert_output(&good, 0, &["self-test      ok"]);
    assert!(!printed.contains("hf_good"), "{printed}");
    assert!(
        cache.path().join("models--test--siglip").is_dir(),
        "HF_HUB_CACHE is the folder itself"
    );
}

#[tokio::test]
async fn a_cache_that_cannot_be_used_is_one_sentence() {
    let (url, _hub) = start_hub(Hub::default()).await;
    for (variables, words) in [
        // An account of its own would be asked where HOME is not set.
        (&[("HOME", "nowhere")][..], &["HOME", "HF_HOME", "HF_HUB_CACHE"][..]),
        (&[("HF_HUB_CACHE", "/dev/null/cache")], &["/dev/null/cache", "set HF_HUB_CACHE"]),
        (&[("HF_HUB_CACHE", "/proc/cache")], &["/proc/cache", "set HF_HUB_CACHE"]),
        (&[("HF_ENDPOINT", "huggingface.co")], &["HF_ENDPOINT"]),
    ] {
        let variables = [&[("HF_ENDPOINT", url.as_str())], variables].concat();
        let printed = assert_output(&run_bsap(&INSPECT, &variables).await, 1, words);
        assert_eq!(printed.lines().count(), 1, "{printed}");
    }
}

/// Accepts TLS connections.
struct TlsListener(TcpListener, TlsAcceptor);

impl axum::serve::Listener for TlsListener {
    type Io = TlsStream<TcpStream>;
    type Addr = SocketAddr;

    async fn accept(&mut self) -> (Self::Io, Self::Addr) {
        loop {
            let (stream, address) = self.0.accept().await.unwrap();
            // It fails if the client does not trust the certificate.
            if let Ok(stream) = self.1.accept(stream).await {
                return (stream, address);
            }
        }
    }

    fn local_addr(&self) -> std::io::Result<SocketAddr> {
        self.0.local_addr()
    }
}

/// Starts a hub named `hub.invalid` with a certificate of an authority of its own. Returns its address
/// and the authority's certificate.
async fn start_tls_hub(hub: &Arc<Hub>) -> (SocketAddr, String) {
    let mut authority = CertificateParams::new(vec![]).unwrap();
    authority.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    let authority = CertifiedIssuer::self_signed(authority, KeyPair::generate().unwrap()).unwrap();
    let key = KeyPair::generate().unwrap();
    let names = ["hub.invalid".to_owned(), "127.0.0.1".to_owned()];
    let leaf = CertificateParams::new(names).unwrap().signed_by(&key, &authority).unwrap();
    let key = PrivateKeyDer::Pkcs8(PrivatePkcs8KeyDer::from(key.serialize_der()));
    let provider = Arc::new(tokio_rustls::rustls::crypto::aws_lc_rs::default_provider());
    let config = ServerConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_no_client_auth()
        .with_single_cert(vec![leaf.der().clone()], key)
        .unwrap();
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let listener = TlsListener(listener, TlsAcceptor::from(Arc::new(config)));
    let app = router(hub);
    tokio::spawn(async move { axum::serve(listener, app).await.unwrap() });
    (address, authority.pem())
}

/// Starts a proxy that connects every tunnel to `target`. Returns its URL and the requests that it got.
async fn start_proxy(target: SocketAddr) -> (String, Arc<std::sync::Mutex<Vec<String>>>) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("http://user:pass@{}", listener.local_addr().unwrap());
    let requests = Arc::new(std::sync::Mutex::new(Vec::new()));
    let seen = requests.clone();
    tokio::spawn(async move {
        loop {
            let (mut client, _) = listener.accept().await.unwrap();
            let mut head = Vec::new();
            while !head.ends_with(b"\r\n\r\n") {
                head.push(client.read_u8().await.unwrap());
            }
            let head = String::from_utf8(head).unwrap();
            seen.lock().unwrap().push(head.lines().next().unwrap().to_owned());
            tokio::spawn(async move {
                let mut server = TcpStream::connect(target).await.unwrap();
                if head.starts_with("CONNECT ") {
                    client.write_all(b"HTTP/1.1 200 OK\r\n\r\n").await.unwrap();
                } else {
                    // The first request of a connection names the address, which servers accept.
                    server.write_all(head.as_bytes()).await.unwrap();
                }
                let _ = tokio::io::copy_bidirectional(&mut client, &mut server).await;
            });
        }
    });
    (url, requests)
}

#[tokio::test(flavor = "multi_thread")]
async fn proxies_and_certificate_authorities_are_those_of_the_variables() {
    let hub = Arc::new(Hub::default());
    let (address, authority) = start_tls_hub(&hub).await;
    let (proxy, proxied) = start_proxy(address).await;
    let folder = tempfile::tempdir().unwrap();
    let certificate = folder.path().join("ca.pem");
    std::fs::write(&certificate, authority).unwrap();
    let run = async |cache: &str, variables: &[(&str, &str)]| {
        let cache = folder.path().join(cache);
        run_bsap(&INSPECT, &[&[("HF_HUB_CACHE", text(&cache))], variables].concat()).await
    };
    let trusted = ("SSL_CERT_FILE", text(&certificate));
    let by_name = ("HF_ENDPOINT", "https://hub.invalid");
    let by_address = format!("https://{address}");
    let by_address = ("HF_ENDPOINT", by_address.as_str());
    let through = ("HTTPS_PROXY", proxy.as_str());

    // Only the proxy knows where the name leads.
    assert_output(&run("a", &[by_name, trusted, through]).await, 0, &["self-test      ok"]);
    let requests = proxied.lock().unwrap().clone();
    assert!(!requests.is_empty() && requests.iter().all(|r| r.contains("hub.invalid:443")));
    let excepted = [by_name, trusted, through, ("NO_PROXY", "hub.invalid")];
    assert_output(&run("b", &excepted).await, 1, &["hub.invalid"]);
    assert_eq!(proxied.lock().unwrap().len(), requests.len(), "NO_PROXY is obeyed");

    let direct = [by_address, trusted, through, ("NO_PROXY", "127.0.0.1")];
    assert_output(&run("c", &direct).await, 0, &["self-test      ok"]);
    assert_eq!(proxied.lock().unwrap().len(), requests.len());
    let before = hub.request_count.load(Ordering::Relaxed);
    let printed = assert_output(&run("d", &[by_address]).await, 1, &["certificate"]);
    assert!(!printed.contains("pass@"), "{printed}");
    assert_eq!(hub.request_count.load(Ordering::Relaxed), before);
}

#[tokio::test]
async fn embeddings_are_printed_one_line_per_input() {
    let model = fixture_folder().join("clip-gelu");
    let picture = fixture_folder().join("pictures/9x7.png");
    let home = tempfile::tempdir().unwrap();
    let pixels = home.path().join("pixels");
    let long = "mug ".repeat(200) + "hat";
    let arguments = [
        "embed",
        "--checkpoint",
        text(&model),
        "--text",
        "a red mug",
        "--text",
        &long,
        "--image",
        text(&picture),
        "--pixels",
        text(&pixels),
    ];
    // A folder needs neither a hub nor a cache.
    let variables = [("HF_ENDPOINT", "nowhere"), ("HOME", "")];
    let output = run_bsap(&arguments, &variables).await;
    let printed = String::from_utf8(output.stdout).unwrap();
    let lines: Vec<serde_json::Value> =
        printed.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    assert_eq!(lines.len(), 3);
    assert_eq!(
        (&lines[0]["kind"], &lines[0]["unread"]),
        (&"text".into(), &serde_json::Value::Null)
    );
    assert_eq!(lines[0]["tokens"], super::load_expected_outputs("clip-gelu")["texts"][0]["tokens"]);
    let unread = lines[1]["unread"].as_str().unwrap();
    assert!(unread.contains("tokens") && unread.contains("mug mug"), "{unread}");
    assert_eq!((&lines[2]["kind"], &lines[2]["input"]), (&"image".into(), &text(&picture).into()));
    assert_eq!(lines[2]["embedding"].as_array().unwrap().len(), 24);
    assert!(pixels.join("0.png").exists());
    let without_inputs = run_bsap(&arguments[..3], &variables).await;
    assert_eq!(without_inputs.status.code(), Some(2));
}
