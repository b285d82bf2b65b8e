//! Requests through the router, with encoders that hash instead of a model.

use std::sync::Arc;

use axum::Router;
use axum::body::{Body, to_bytes};
use axum::http::{Method, Request, StatusCode};
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
use crate::ingest::fetch::{FetchOptions, Fetcher};
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
    let store = Store::in_memory();
    let (feedback_queue, writer) = feedback::feedback_channel(&store);
    tokio::spawn(writer.run(CancellationToken::new()));
    let engine = Engine::new(
        HashEncoders::new(DIMENSION),
        sample_serving_snapshot(vec![sample_prompt_set("first", DIMENSION)]),
        SearchOptions::default(),
    );
    let rows = (0..3)
        .map(|i| sample_row(&format!("image-{i}"), 1, Some(clip_like_embedding(i, DIMENSION))))
        .collect();
    let changes =
        TableChanges { table_version: 1, is_full_snapshot: true, part: SnapshotPart::All, rows };
    engine.snapshots().apply_changes(changes).await.unwrap();
    let context = ServerContext {
        engines: Arc::new(Engines::new(Arc::new(engine))),
        feedback_queue,
        fetcher: Fetcher::new(&FetchOptions::default()).unwrap(),
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
        let (status, body) = get(&format!("/v1/images?newest={limit}")).await;
        let images = body["images"].as_array().unwrap();
        assert_eq!(
            (status.as_u16(), images.len(), &body["table_version"]),
            (200, count, &json!(1))
        );
        assert!(images[0]["embedded_at"].is_string(), "{body}");
    }
    for (parameters, expected, code) in [
        ("?newest=0", 422, "invalid_field"),
        ("?newest=101", 422, "invalid_field"),
        ("?newest=many", 400, "invalid_parameters"),
        ("?oldest=1", 400, "invalid_parameters"),
        ("", 400, "invalid_parameters"),
    ] {
        let (status, problem) = get(&format!("/v1/images{parameters}")).await;
        assert_eq!((status.as_u16(), &problem["code"]), (expected, &json!(code)), "{problem}");
        assert!(problem["detail"].as_str().unwrap().contains("newest"), "{problem}");
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
        let request = Request::builder().method(method).uri(path.replace("{id}", "image-0"));
        let response = router.clone().oneshot(request.body(Body::empty()).unwrap()).await.unwrap();
        assert_ne!(response.status(), StatusCode::METHOD_NOT_ALLOWED, "{path}");
        let not_found = response.status() == StatusCode::NOT_FOUND;
        assert!(!not_found || path.ends_with("/picture"), "{path}");
    }
    let generated = serde_json::to_string_pretty(&document).unwrap() + "\n";
    let file = std::fs::read_to_string("schemas/openapi.json").unwrap_or_default();
    assert!(file == generated, "schemas/openapi.json is not current: run `just generate`");
}
