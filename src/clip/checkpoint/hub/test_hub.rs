//! A hub on loopback for tests, with the faults of hubs, proxies and storages.

use std::collections::BTreeMap;
use std::io;
use std::sync::{Arc, Mutex};

use aws_lc_rs::digest::{SHA1_FOR_LEGACY_USE_ONLY, SHA256, digest};
use axum::Router;
use axum::body::{Body, Bytes};
use axum::extract::{Request, State};
use axum::http::{HeaderMap, StatusCode, header};
use axum::response::Response;
use futures::{StreamExt as _, stream};
use tokio::runtime::Runtime;

use crate::record::to_hex;

pub const COMMIT: &str = "0123456789abcdef0123456789abcdef01234567";
pub const WEIGHTS: &str = "model.safetensors";

/// How the hub answers one request.
pub enum Action {
    /// As a correct hub: the file, or the range that was asked for.
    Serve,
    /// The whole file with status 200, whatever range was asked for.
    ServeAll,
    /// The whole file with status 206 and this `Content-Range`.
    ServeAllAs(Option<String>),
    /// The range that was asked for, but the connection breaks after so many bytes.
    BreakAfter(usize),
    /// The range that was asked for, but nothing comes after so many bytes.
    SilentAfter(usize),
    /// Other bytes, with the headers of the file.
    Send(Vec<u8>),
    /// Says that the file is compressed.
    Compress,
    /// A status without a file, with one header.
    Status(u16, &'static str, String),
    /// A redirect with the headers of the file.
    Redirect(String),
}

/// One request, as the hub sees it.
#[derive(Debug, Clone)]
pub struct SeenRequest {
    pub is_head: bool,
    pub path: String,
    pub range: Option<String>,
    pub authorization: Option<String>,
    pub accept_encoding: Option<String>,
    /// How many requests for the same path and method came before.
    pub earlier: usize,
}

impl SeenRequest {
    /// Whether it asks for the bytes of the weights.
    pub fn is_download(&self) -> bool {
        !self.is_head && self.path.ends_with(WEIGHTS)
    }
}

type Behaviour = dyn Fn(&SeenRequest) -> Action + Send + Sync;

struct HubState {
    files: BTreeMap<String, Vec<u8>>,
    behaviour: Box<Behaviour>,
    seen: Mutex<Vec<SeenRequest>>,
}

/// A hub that serves the same files for every model, branch and commit.
pub struct TestHub {
    pub url: String,
    state: Arc<HubState>,
    _runtime: Runtime,
}

impl TestHub {
    pub fn start(
        files: BTreeMap<String, Vec<u8>>,
        behaviour: impl Fn(&SeenRequest) -> Action + Send + Sync + 'static,
    ) -> Self {
        let runtime = Runtime::new().unwrap();
        let behaviour = Box::new(behaviour);
        let state = Arc::new(HubState { files, behaviour, seen: Mutex::default() });
        let listener = runtime.block_on(tokio::net::TcpListener::bind("127.0.0.1:0")).unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        let app = Router::new().fallback(answer).with_state(state.clone());
        runtime.spawn(async move { axum::serve(listener, app).await.unwrap() });
        Self { url, state, _runtime: runtime }
    }

    /// Returns the requests so far.
    pub fn seen(&self) -> Vec<SeenRequest> {
        self.state.seen.lock().unwrap().clone()
    }

    /// Returns the ranges of the requests for the bytes of the weights.
    pub fn ranges(&self) -> Vec<Option<String>> {
        self.seen().into_iter().filter(SeenRequest::is_download).map(|r| r.range).collect()
    }
}

/// Returns the files of a small checkpoint, with weights of so many bytes.
pub fn checkpoint_files(weight_bytes: usize) -> BTreeMap<String, Vec<u8>> {
    let mut files: BTreeMap<String, Vec<u8>> =
        ["config.json", "preprocessor_config.json", "tokenizer.json"]
            .map(|name| (name.to_owned(), format!("{{\"of\": \"{name}\"}}").into_bytes()))
            .into();
    files.insert(WEIGHTS.to_owned(), safetensors_file(weight_bytes));
    files
}

/// Returns a safetensors file with one tensor of so many bytes.
pub fn safetensors_file(tensor_bytes: usize) -> Vec<u8> {
    let header = format!(
        r#"{{"t":{{"dtype":"U8","shape":[{tensor_bytes}],"data_offsets":[0,{tensor_bytes}]}}}}"#
    );
    let mut file = (header.len() as u64).to_le_bytes().to_vec();
    file.extend_from_slice(header.as_bytes());
    file.extend((0..tensor_bytes).map(|i| (i * i / 7) as u8));
    file
}

/// Returns the etag of the hub: the SHA-256 of weights, git's id of small files.
pub fn etag(name: &str, bytes: &[u8]) -> String {
    if name.ends_with(".safetensors") {
        return to_hex(digest(&SHA256, bytes).as_ref());
    }
    let object = [format!("blob {}\0", bytes.len()).as_bytes(), bytes].concat();
    to_hex(digest(&SHA1_FOR_LEGACY_USE_ONLY, &object).as_ref())
}

async fn answer(State(hub): State<Arc<HubState>>, request: Request) -> Response {
    let text = |headers: &HeaderMap, name| {
        headers.get(name).map(|value| value.to_str().unwrap().to_owned())
    };
    let is_head = request.method() == "HEAD";
    let path = request.uri().path().to_owned();
    let request = {
        let mut seen = hub.seen.lock().unwrap();
        let earlier = seen.iter().filter(|r| r.path == path && r.is_head == is_head).count();
        let headers = request.headers();
        seen.push(SeenRequest {
            is_head,
            range: text(headers, header::RANGE),
            authorization: text(headers, header::AUTHORIZATION),
            accept_encoding: text(headers, header::ACCEPT_ENCODING),
            path,
            earlier,
        });
        seen.last().unwrap().clone()
    };
    let name = request.path.rsplit('/').next().unwrap();
    let action = (hub.behaviour)(&request);
    if let Action::Status(status, header, value) = &action {
        let response = Response::builder().status(*status).header(*header, value);
        return response.body(Body::empty()).unwrap();
    }
    let file =
        request.path.split_once(&format!("/{COMMIT}/")).or(request.path.split_once("/main/"));
    let Some(bytes) = file.and_then(|(_, file)| hub.files.get(file)) else {
        let response = Response::builder().status(404).header("x-error-code", "EntryNotFound");
        return response.header("x-repo-commit", COMMIT).body(Body::empty()).unwrap();
    };
    let size = bytes.len();
    let first = request.range.as_ref().map(|range| {
        let (first, _) = range.strip_prefix("bytes=").unwrap().split_once('-').unwrap();
        first.parse::<usize>().unwrap()
    });
    let mut response = Response::builder()
        .header("x-repo-commit", COMMIT)
        .header("etag", format!("\"{}\"", etag(name, bytes)));
    if let Action::Redirect(location) = action {
        let response = response.status(302).header("location", location);
        let response = response.header("x-linked-size", size.to_string());
        return response.body(Body::empty()).unwrap();
    }
    let rest = match (&action, first) {
        (Action::Serve | Action::BreakAfter(_) | Action::SilentAfter(_), Some(first)) => {
            if first >= size {
                return Response::builder().status(416).body(Body::empty()).unwrap();
            }
            let range = format!("bytes {first}-{}/{size}", size - 1);
            response = response.status(StatusCode::PARTIAL_CONTENT).header("content-range", range);
            bytes[first..].to_vec()
        }
        (Action::Send(other), _) => other.clone(),
        _ => bytes.clone(),
    };
    if let Action::ServeAllAs(range) = &action {
        response = response.status(StatusCode::PARTIAL_CONTENT);
        if let Some(range) = range {
            response = response.header("content-range", range);
        }
    }
    if matches!(action, Action::Compress) {
        response = response.header("content-encoding", "gzip");
    }
    response = response.header("content-length", rest.len().to_string());
    let part = |count: usize| {
        let start = Bytes::copy_from_slice(&rest[..count.min(rest.len())]);
        stream::iter([Ok::<_, io::Error>(start)])
    };
    let body = match action {
        _ if request.is_head => Body::empty(),
        Action::BreakAfter(count) => {
            // The pause lets what was sent arrive before the connection is reset.
            let broken = stream::once(async {
                tokio::time::sleep(std::time::Duration::from_millis(50)).await;
                Err(io::Error::other("broken by the test"))
            });
            Body::from_stream(part(count).chain(broken))
        }
        Action::SilentAfter(count) => Body::from_stream(part(count).chain(stream::pending())),
        _ => Body::from(rest),
    };
    response.body(body).unwrap()
}
