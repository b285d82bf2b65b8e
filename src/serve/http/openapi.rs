//! The OpenAPI 3.1 document of the interface. Routes are listed here; schemas of bodies come from
//! the types that are deserialised and serialised.

use schemars::generate::{Contract, SchemaGenerator, SchemaSettings};
use schemars::{JsonSchema, Schema};
use serde_json::{Map, Value, json};

use super::auth::{SessionResponse, SignInRequest};
use super::body::problem::Problem;
use super::body::request::{ExplainRequest, FeedbackRequest, MAX_NEWEST_IMAGES, SearchRequest};
use super::body::rerank::{RerankRequest, RerankResponse};
use super::body::response::{
    ExplainResponse, ImageInfo, NewestImagesResponse, SampleScoreResponse, SearchResponse,
};
use super::body::state_response::StateResponse;
use super::credentials::session::SESSION_COOKIE_NAME;
use crate::serve::previews::MAX_PREVIEW_SIDE;

/// Collects the schemas of bodies. Requests may omit fields that have a default, responses have all
/// fields.
struct SchemaCollector {
    request_schemas: SchemaGenerator,
    response_schemas: SchemaGenerator,
}

impl SchemaCollector {
    fn new() -> Self {
        let generator = |contract| {
            let mut settings = SchemaSettings::draft2020_12();
            settings.definitions_path = "/components/schemas".into();
            settings.contract = contract;
            settings.into_generator()
        };
        Self {
            request_schemas: generator(Contract::Deserialize),
            response_schemas: generator(Contract::Serialize),
        }
    }

    fn describe_request_body<T: JsonSchema>(&mut self) -> Value {
        json!({ "required": true, "content": json_content(&self.request_schemas.subschema_for::<T>()) })
    }

    fn describe_response<T: JsonSchema>(&mut self, description: &str) -> Value {
        json!({ "description": description, "content": json_content(&self.response_schemas.subschema_for::<T>()) })
    }

    /// Returns all schemas by name. If a request and a response share a name, the response's schema
    /// is taken.
    fn into_definitions(mut self) -> Map<String, Value> {
        let mut all = self.request_schemas.take_definitions(true);
        all.extend(self.response_schemas.take_definitions(true));
        all
    }
}

fn json_content(schema: &Schema) -> Value {
    json!({ "application/json": { "schema": schema } })
}

/// Builds the OpenAPI document, `/v1/openapi.json`, of a server with this `http.base_path`.
pub fn build_document(base_path: &str) -> Value {
    let mut schemas = SchemaCollector::new();
    let problem = json!({
        "description": "The request failed; `code` does not change between versions.",
        "content": { "application/problem+json": { "schema": schemas.response_schemas.subschema_for::<Problem>() } },
    });
    let parameter = |name: &str, required: bool, description: &str| {
        json!({
            "name": name, "in": "query", "required": required,
            "description": description, "schema": { "type": "string" },
        })
    };
    let id = parameter("id", true, "An image's id.");
    let version = parameter(
        "v",
        false,
        "A hash of the picture's content, so that browsers may cache the picture. The newest is returned in any case.",
    );
    let side = json!({
        "name": "side", "in": "query",
        "description": "Requests an upright JPEG whose longer side has 128, 256, 512 or 1024 pixels: the least of these that is not below this number.",
        "schema": { "type": "integer", "minimum": 1, "maximum": MAX_PREVIEW_SIDE },
    });
    let text = |description: &str| json!({ "description": description, "content": { "text/plain": { "schema": { "type": "string" } } } });
    let search = schemas.describe_request_body::<SearchRequest>();
    let search_response = schemas.describe_response::<SearchResponse>("The hits of both rankings.");
    let explain = schemas.describe_request_body::<ExplainRequest>();
    let explain_response = schemas.describe_response::<ExplainResponse>("The explanation.");
    let rerank = schemas.describe_request_body::<RerankRequest>();
    let rerank_response = schemas.describe_response::<RerankResponse>("The candidates, ranked.");
    let image = schemas.describe_response::<ImageInfo>("The image.");
    let newest = json!({
        "name": "limit", "in": "query", "required": true, "description": "Maximum number of images.",
        "schema": { "type": "integer", "minimum": 1, "maximum": MAX_NEWEST_IMAGES },
    });
    let newest_images =
        schemas.describe_response::<NewestImagesResponse>("The images, newest first.");
    let sample_score = schemas.describe_response::<SampleScoreResponse>("The score.");
    let feedback = schemas.describe_request_body::<FeedbackRequest>();
    let state = schemas.describe_response::<StateResponse<'static>>("The state.");
    let sign_in = schemas.describe_request_body::<SignInRequest>();
    let session =
        schemas.describe_response::<SessionResponse>("The name of the key, and its scopes.");
    let mut paths = json!({
        "/v1/search": { "post": {
            "operationId": "search", "summary": "Searches for images; returns the rankings by plain CLIP and by balanced scores",
            "requestBody": search, "responses": { "200": search_response },
        } },
        "/v1/explain": { "post": {
            "operationId": "explain", "summary": "Explains why an image has its rank",
            "requestBody": explain, "responses": { "200": explain_response },
        } },
        "/v1/rerank": { "post": {
            "operationId": "rerank", "summary": "Ranks images that were found elsewhere, by plain CLIP and by balanced scores",
            "requestBody": rerank, "responses": { "200": rerank_response },
        } },
        "/v1/images/newest": { "get": {
            "operationId": "newestImages", "summary": "Returns the images that were embedded last",
            "parameters": [newest], "responses": { "200": newest_images },
        } },
        "/v1/images": { "parameters": [id], "get": {
            "operationId": "image", "summary": "Returns an image's attributes and origin", "responses": { "200": image },
        } },
        "/v1/images/picture": { "parameters": [id], "get": {
            "operationId": "picture", "summary": "Returns an image's picture, fetched from the address in its event, or a preview of it",
            "parameters": [side, version],
            "responses": {
                "200": { "description": "The original, or with `side` a JPEG.", "content": { "image/*": {} } },
                "304": { "description": "The client has this preview: `If-None-Match` names its `ETag`." },
            },
        } },
        "/v1/feedback": { "post": {
            "operationId": "feedback", "summary": "Stores a user's verdict on a result",
            "requestBody": feedback, "responses": { "204": { "description": "The feedback is stored." } },
        } },
        "/v1/session": {
            "get": {
                "operationId": "session", "summary": "Returns who is authenticated", "responses": { "200": session },
            },
            "post": {
                "operationId": "signIn", "summary": "Opens a session of the page",
                "requestBody": sign_in, "responses": { "200": session },
            },
            "delete": {
                "operationId": "signOut", "summary": "Ends the session",
                "responses": { "204": { "description": "The session has ended." } },
            },
        },
        "/v1/state": { "get": {
            "operationId": "state", "summary": "Returns what this query worker serves", "responses": { "200": state },
        } },
        "/v1/sample-score": { "get": {
            "operationId": "sampleScore", "summary": "Compares both rankings over queries whose right answers are known",
            "responses": { "200": sample_score },
        } },
        "/v1/events": { "get": {
            "operationId": "events", "summary": "Streams changes of the catalogue",
            "responses": { "200": {
                "description": "Server-sent events; the stream ends only at shutdown and when another generation becomes live.",
                "content": { "text/event-stream": { "schema": { "type": "string" } } },
            } },
        } },
        "/livez": { "get": {
            "operationId": "alive", "summary": "Succeeds if the process answers", "responses": { "200": text("`alive`.") },
        } },
        "/readyz": { "get": {
            "operationId": "ready", "summary": "Succeeds if the whole table is in memory",
            "responses": { "200": text("`ready`.") },
        } },
    });
    for operation in operations_mut(&mut paths) {
        operation["responses"]["default"] = problem.clone();
    }
    let mut document = json!({
        "openapi": "3.1.0",
        "info": {
            "title": "bsap",
            "version": "1",
            "summary": "Text→image search with balanced scores",
            "description": "docs/api.md explains the fields.",
            "license": { "name": "Apache-2.0 OR MIT", "identifier": "Apache-2.0 OR MIT" },
        },
        // A server without keys requires none.
        "security": [{}, { "key": [] }, { "session": [] }],
        "paths": paths,
        "components": {
            "schemas": schemas.into_definitions(),
            "securitySchemes": {
                "key": { "type": "http", "scheme": "bearer" },
                "session": { "type": "apiKey", "in": "cookie", "name": SESSION_COOKIE_NAME },
            },
        },
    });
    // By default the paths are those of the host that the document is read from.
    if !base_path.is_empty() {
        document["servers"] = json!([{ "url": base_path }]);
    }
    document
}

fn operations_mut(paths: &mut Value) -> impl Iterator<Item = &mut Value> {
    let items = paths.as_object_mut().into_iter().flat_map(|paths| paths.values_mut());
    let methods = items.filter_map(Value::as_object_mut).flat_map(|item| item.iter_mut());
    methods.filter(|(name, _)| *name != "parameters").map(|(_, operation)| operation)
}
