//! Requests through the router, with encoders that hash instead of a model.

mod pictures;
mod server;

use std::io::Read as _;
use std::sync::Arc;

use axum::Router;
use axum::body::{Body, to_bytes};
use axum::http::{Method, Request, StatusCode};
use axum::response::Response;
use flate2::read::GzDecoder;
use futures::TryStreamExt;
use object_store::ObjectStoreExt;
use serde_json::{Value, json};
use tokio_util::sync::CancellationToken;
use tower::ServiceExt;

use super::options::HttpOptions;
use super::router::build_router;
use super::state::ServerContext;
use super::worker_metrics::WorkerPoller;
use crate::evaluate;
use crate::ingest::decode::DecodeOptions;
use crate::ingest::fetch::{FetchOptions, Fetcher};
use crate::record::ImageRow;
use crate::search::testing::{
    HashEncoders, clip_like_embedding, sample_prompt_set, sample_row, sample_serving_snapshot,
};
use crate::search::{Engine, Engines, ImageMetadata, QueryError, SearchOptions};
use crate::serve::feedback;
use crate::serve::result_judge::{ImageJudge, ResultJudge, SampleScore};
use crate::store::Store;
use crate::table::{SnapshotPart, TableChanges};

const DIMENSION: usize = 16;

/// Returns the router of a query worker with three images, and the store of its feedback.
pub async fn start_server(options: HttpOptions) -> (Router, Store) {
    start_server_with_judge(options, None).await
}

async fn start_server_with_judge(
    options: HttpOptions,
    judge: Option<Arc<dyn ResultJudge>>,
) -> (Router, Store) {
    let rows = (0..3)
        .map(|i| sample_row(&format!("image-{i}"), 1, Some(clip_like_embedding(i, DIMENSION))))
        .collect();
    start_server_with_rows(options, judge, rows, &FetchOptions::default()).await
}

/// Returns the router of a query worker, and the store of its feedback.
async fn start_server_with_rows(
    options: HttpOptions,
    judge: Option<Arc<dyn ResultJudge>>,
    rows: Vec<ImageRow>,
    fetch: &FetchOptions,
) -> (Router, Store) {
    let store = Store::in_memory();
    let (feedback_queue, writer) = feedback::feedback_channel(&store);
    tokio::spawn(writer.run(CancellationToken::new()));
    let engine = Engine::new(
        HashEncoders::new(DIMENSION),
        sample_serving_snapshot(vec![sample_prompt_set("first", DIMENSION)]),
        SearchOptions::default(),
    );
    let changes =
        TableChanges { table_version: 1, is_full_snapshot: true, part: SnapshotPart::All, rows };
    engine.snapshots().apply_changes(changes).await.unwrap();
    let context = ServerContext {
        engines: Arc::new(Engines::new(Arc::new(engine))),
        feedback_queue,
        fetcher: Fetcher::new(fetch).unwrap(),
        decode_options: DecodeOptions::default(),
        substitutes: Vec::new(),
        judge,
        options,
    };
    let worker_poller = Arc::new(WorkerPoller::new(&context.options.worker_metrics_urls));
    (build_router(context, worker_poller, CancellationToken::new()), store)
}

/// Returns the status of the response and its body; `Null` if that is not JSON.
pub async fn send(router: &Router, request: Request<Body>) -> (StatusCode, Value) {
    let response = router.clone().oneshot(request).await.unwrap();
    let status = response.status();
    let bytes = to_bytes(response.into_body(), 1 << 20).await.unwrap();
    (status, serde_json::from_slice(&bytes).unwrap_or(Value::Null))
}

pub fn post_request(path: &str, body: &Value) -> Request<Body> {
    let request = Request::builder().method(Method::POST).uri(path);
    let request = request.header("content-type", "application/json");
    request.body(Body::from(body.to_string())).unwrap()
}

#[tokio::test]
async fn feedback_is_stored_where_evaluations_read_it() {
    let (router, store) = start_server(HttpOptions::default()).await;
    for (image, verdict) in [("image-0", "right"), ("image-1", "wrong")] {
        let body =
            json!({"text": " a red mug ", "image_id": image, "verdict": verdict, "note": "blue"});
        assert_eq!(
            send(&router, post_request("/v1/feedback", &body)).await.0,
            StatusCode::NO_CONTENT
        );
    }
    let folder = store.subfolder(feedback::FEEDBACK_FOLDER);
    let mut stored: Vec<_> = folder.object_store().list(None).try_collect().await.unwrap();
    stored.sort_by(|a, b| a.location.cmp(&b.location));
    let mut text = String::new();
    for object in stored {
        let bytes =
            folder.object_store().get(&object.location).await.unwrap().bytes().await.unwrap();
        text.push_str(std::str::from_utf8(&bytes).unwrap());
    }
    let (queries, unusable) = evaluate::queries_from_feedback(text.lines());
    assert_eq!((queries.len(), unusable, queries[0].text.as_str()), (1, 0, "a red mug"));
    let evaluate::Judgements::Graded { grades, judged_only } = &queries[0].judgements else {
        panic!("{queries:?}")
    };
    assert!(judged_only);
    assert_eq!(grades.values().copied().collect::<Vec<_>>(), [1.0, 0.0]);
}

#[tokio::test]
async fn found_images_are_ranked_within_a_body_limit_of_their_own() {
    let options = HttpOptions { max_rerank_body_bytes: 2_000, ..HttpOptions::default() };
    let (router, _) = start_server(options).await;
    let request = |candidates: Value| {
        post_request("/v1/rerank", &json!({"text": "a mug", "candidates": candidates}))
    };
    let embedding = clip_like_embedding(7, DIMENSION);
    let candidates = json!([
        {"id": "image-0", "score": 2.5}, {"id": "image-2"}, {"id": "gone"},
        {"id": "mine", "embedding": embedding}
    ]);
    let (status, body) = send(&router, request(candidates)).await;
    assert_eq!(status, StatusCode::OK, "{body}");
    assert_eq!((&body["configuration"], &body["unknown"]), (&json!("live"), &json!(["gone"])));
    let results = body["results"].as_array().unwrap();
    assert_eq!(results.len(), 3);
    for (i, result) in results.iter().enumerate() {
        assert_eq!(result["balanced"]["rank"], json!(i + 1));
        assert_eq!(result["known"], json!(result["id"] != "mine"));
        let own =
            if result["id"] == "image-0" { json!({"score": 2.5, "rank": 1}) } else { Value::Null };
        assert_eq!((&result["own"], &result["explanation"]), (&own, &Value::Null));
        let [raw, balanced, alpha, beta] = [
            &result["raw"]["score"],
            &result["balanced"]["score"],
            &result["alpha"],
            &result["beta"],
        ]
        .map(|number| number.as_f64().unwrap());
        assert!((alpha * raw + beta - balanced).abs() < 1e-5);
    }
    let (status, body) = send(&router, request(json!([{"id": "a", "embedding": [1]}]))).await;
    assert_eq!((status.as_u16(), &body["field"]), (422, &json!("candidates")));
    let large: Vec<Value> = (0..200).map(|i| json!({"id": format!("i{i}")})).collect();
    assert_eq!(send(&router, request(json!(large))).await.0, StatusCode::PAYLOAD_TOO_LARGE);
}

#[tokio::test]
async fn invalid_feedback_is_rejected_by_field() {
    let (router, _) = start_server(HttpOptions::default()).await;
    let valid = json!({"text": "a mug", "image_id": "image-0", "verdict": "right"});
    let with = |key: &str, value: Value| {
        let mut body = valid.clone();
        body[key] = value;
        body
    };
    for (body, status, detail) in [
        (with("text", "  ".into()), 422, "text"),
        (with("note", "n".repeat(1_001).into()), 422, "note"),
        (with("image_id", "nowhere".into()), 404, "nowhere"),
        (with("verdict", "perhaps".into()), 422, "right"),
        (with("verdit", "right".into()), 422, "verdit"),
    ] {
        let (actual, problem) = send(&router, post_request("/v1/feedback", &body)).await;
        assert_eq!(actual.as_u16(), status, "{problem}");
        assert!(problem["detail"].as_str().unwrap().contains(detail), "{problem}");
    }
}

#[tokio::test]
async fn the_newest_images_are_listed_within_bounds() {
    let (router, _) = start_server(HttpOptions::default()).await;
    let get =
        async |path: &str| send(&router, Request::get(path).body(Body::empty()).unwrap()).await;
    for (limit, count) in [(2, 2), (100, 3)] {
        let (status, body) = get(&format!("/v1/images/newest?limit={limit}")).await;
        let images = body["images"].as_array().unwrap();
        assert_eq!(
            (status.as_u16(), images.len(), &body["table_version"]),
            (200, count, &json!(1))
        );
        assert!(images[0]["embedded_at"].is_string(), "{body}");
    }
    for (parameters, expected, code) in [
        ("?limit=0", 422, "invalid_field"),
        ("?limit=101", 422, "invalid_field"),
        ("?limit=many", 400, "invalid_query"),
        ("?oldest=1", 400, "invalid_query"),
        ("", 400, "invalid_query"),
    ] {
        let (status, problem) = get(&format!("/v1/images/newest{parameters}")).await;
        assert_eq!((status.as_u16(), &problem["code"]), (expected, &json!(code)), "{problem}");
        assert!(problem["detail"].as_str().unwrap().contains("limit"), "{problem}");
    }
}

/// Only the images called `image-1` are right, and only to the text that was asked.
struct OneRightImage;

impl ResultJudge for OneRightImage {
    fn judge_text(&self, text: &str) -> Option<ImageJudge> {
        (text == "known").then(|| -> ImageJudge {
            Box::new(|image: &ImageMetadata| image.image_id.as_str() == "image-1")
        })
    }
    fn score_samples(&self, _: &Engine) -> Result<Option<SampleScore>, QueryError> {
        Ok(None)
    }
}

#[tokio::test]
async fn hits_are_marked_only_where_the_right_answers_are_known() {
    let (unknowing, _) = start_server(HttpOptions::default()).await;
    let (knowing, _) =
        start_server_with_judge(HttpOptions::default(), Some(Arc::new(OneRightImage))).await;
    let search = async |router: &Router, body: Value| {
        let (status, answer) = send(router, post_request("/v1/search", &body)).await;
        assert_eq!(status, StatusCode::OK, "{answer}");
        answer
    };
    let answer = search(&knowing, json!({"text": "known"})).await;
    assert_eq!(answer["right_images"], 1);
    for hit in
        [&answer["hits"], &answer["raw_hits"]].into_iter().flat_map(|h| h.as_array().unwrap())
    {
        assert_eq!(hit["right"], json!(hit["image_id"] == "image-1"), "{hit}");
    }
    for (router, body) in [
        (&knowing, json!({"text": "unknown"})),
        (&knowing, json!({"image_id": "image-0"})),
        (&unknowing, json!({"text": "known"})),
    ] {
        let answer = search(router, body).await;
        let fields = answer.as_object().unwrap();
        assert!(!fields.contains_key("right_images"), "{answer}");
        assert_eq!(answer["hits"][0].get("right"), None);
    }
    for (router, known) in [(&knowing, true), (&unknowing, false)] {
        let request = Request::get("/v1/sample-score").body(Body::empty()).unwrap();
        let (status, body) = send(router, request).await;
        assert_eq!((status, body), (StatusCode::OK, json!({"known": known, "score": null})));
    }
}

/// Every documented route exists, and every reference in the document is defined.
#[tokio::test]
async fn openapi_document_matches_routes() {
    let (router, _) = start_server(HttpOptions::default()).await;
    let (status, document) =
        send(&router, Request::get("/v1/openapi.json").body(Body::empty()).unwrap()).await;
    assert_eq!(status, StatusCode::OK);
    let text = document.to_string();
    let schemas = document["components"]["schemas"].as_object().unwrap();
    let mut references = 0;
    for part in text.split("\"$ref\":\"#/components/schemas/").skip(1) {
        let name = part.split('"').next().unwrap();
        assert!(schemas.contains_key(name), "{name}");
        references += 1;
    }
    assert!(references > 10);
    for (path, item) in document["paths"].as_object().unwrap() {
        let method = if item.get("post").is_some() { Method::POST } else { Method::GET };
        let has_id = path.starts_with("/v1/images");
        let uri = if has_id { format!("{path}?id=image-0") } else { path.clone() };
        let request = Request::builder().method(method).uri(uri);
        let response = router.clone().oneshot(request.body(Body::empty()).unwrap()).await.unwrap();
        assert_ne!(response.status(), StatusCode::METHOD_NOT_ALLOWED, "{path}");
        let not_found = response.status() == StatusCode::NOT_FOUND;
        assert!(!not_found || path.ends_with("/picture"), "{path}");
    }
    let generated = serde_json::to_string_pretty(&document).unwrap() + "\n";
    let file = std::fs::read_to_string("schemas/openapi.json").unwrap_or_default();
    assert!(file == generated, "schemas/openapi.json is not current: run `just generate`");
}

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
    assert!(page.ends_with("</html>\n") && bytes.len() * 2 < page.len(), "{}", bytes.len());
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
