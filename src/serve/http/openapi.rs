//! The interface as OpenAPI 3.1 has it: routes from here, bodies from the types that are read and
//! written.

use schemars::generate::{Contract, SchemaGenerator, SchemaSettings};
use schemars::{JsonSchema, Schema};
use serde_json::{Map, Value, json};

use super::auth::{SessionResponse, SignInRequest};
use super::payload::{
    ExplainRequest, ExplainResponse, FeedbackRequest, ImageInfo, SearchRequest, SearchResponse,
};
use super::problem::Problem;
use super::session::COOKIE_NAME;
use super::state_response::StateResponse;

/// Collects the schemas of bodies: what is read may leave out what has a default, what is written
/// has it all.
struct SchemaCollector {
    request_schemas: SchemaGenerator,
    response_schemas: SchemaGenerator,
}

impl SchemaCollector {
    fn new() -> Self {
        let settings = |contract| {
            let mut settings = SchemaSettings::draft2020_12();
            settings.definitions_path = "/components/schemas".into();
            settings.contract = contract;
            settings.into_generator()
        };
        Self {
            request_schemas: settings(Contract::Deserialize),
            response_schemas: settings(Contract::Serialize),
        }
    }

    fn request_body<T: JsonSchema>(&mut self) -> Value {
        json!({ "required": true, "content": json_content(&self.request_schemas.subschema_for::<T>()) })
    }

    fn response<T: JsonSchema>(&mut self, about: &str) -> Value {
        json!({ "description": about, "content": json_content(&self.response_schemas.subschema_for::<T>()) })
    }

    /// Where both have a schema of the same name, what is written is meant.
    fn into_definitions(mut self) -> Map<String, Value> {
        let mut all = self.request_schemas.take_definitions(true);
        all.extend(self.response_schemas.take_definitions(true));
        all
    }
}

fn json_content(schema: &Schema) -> Value {
    json!({ "application/json": { "schema": schema } })
}

/// The document.
pub fn build_document() -> Value {
    let mut schemas = SchemaCollector::new();
    let problem = json!({
        "description": "Why not; `code` is stable.",
        "content": { "application/problem+json": { "schema": schemas.response_schemas.subschema_for::<Problem>() } },
    });
    let id = json!({
        "name": "id", "in": "path", "required": true,
        "description": "An image's id, percent-encoded.", "schema": { "type": "string", "minLength": 1 },
    });
    let text = |about: &str| json!({ "description": about, "content": { "text/plain": { "schema": { "type": "string" } } } });
    let search = schemas.request_body::<SearchRequest>();
    let found = schemas.response::<SearchResponse>("Both rankings.");
    let explain = schemas.request_body::<ExplainRequest>();
    let explained = schemas.response::<ExplainResponse>("Why.");
    let image = schemas.response::<ImageInfo>("What is known of it.");
    let feedback = schemas.request_body::<FeedbackRequest>();
    let state = schemas.response::<StateResponse<'static>>("What is served.");
    let sign_in = schemas.request_body::<SignInRequest>();
    let session = schemas.response::<SessionResponse>("Who asks, and what they may do.");
    let mut paths = json!({
        "/v1/search": { "post": {
            "operationId": "search", "summary": "Both rankings, plain and balanced",
            "requestBody": search, "responses": { "200": found },
        } },
        "/v1/explain": { "post": {
            "operationId": "explain", "summary": "Why an image ranks where it does",
            "requestBody": explain, "responses": { "200": explained },
        } },
        "/v1/images/{id}": { "parameters": [id], "get": {
            "operationId": "image", "summary": "What is known of an image", "responses": { "200": image },
        } },
        "/v1/images/{id}/picture": { "parameters": [id], "get": {
            "operationId": "picture", "summary": "An image's picture, fetched from where it was announced",
            "responses": { "200": { "description": "The picture.", "content": { "image/*": {} } } },
        } },
        "/v1/feedback": { "post": {
            "operationId": "feedback", "summary": "What a user says of a result",
            "requestBody": feedback, "responses": { "204": { "description": "It is stored." } },
        } },
        "/v1/session": {
            "get": {
                "operationId": "session", "summary": "Who asks", "responses": { "200": session },
            },
            "post": {
                "operationId": "signIn", "summary": "Opens a session of the page",
                "requestBody": sign_in, "responses": { "200": session },
            },
            "delete": {
                "operationId": "signOut", "summary": "Ends it",
                "responses": { "204": { "description": "It has ended." } },
            },
        },
        "/v1/state": { "get": {
            "operationId": "state", "summary": "What is served", "responses": { "200": state },
        } },
        "/v1/events": { "get": {
            "operationId": "events", "summary": "Changes of the catalogue as they come",
            "responses": { "200": {
                "description": "Server-sent events without end.",
                "content": { "text/event-stream": { "schema": { "type": "string" } } },
            } },
        } },
        "/livez": { "get": {
            "operationId": "alive", "summary": "Whether the process answers", "responses": { "200": text("It does.") },
        } },
        "/readyz": { "get": {
            "operationId": "ready", "summary": "Whether the whole table is in memory",
            "responses": { "200": text("It is.") },
        } },
    });
    for operation in operations_mut(&mut paths) {
        operation["responses"]["default"] = problem.clone();
    }
    json!({
        "openapi": "3.1.0",
        "info": {
            "title": "bsap",
            "version": "1",
            "summary": "Text→image search with balanced scores",
            "description": "docs/api.md says what the fields mean.",
            "license": { "name": "Apache-2.0 OR MIT", "identifier": "Apache-2.0 OR MIT" },
        },
        // Where there are no keys, none is asked for.
        "security": [{}, { "key": [] }, { "session": [] }],
        "paths": paths,
        "components": {
            "schemas": schemas.into_definitions(),
            "securitySchemes": {
                "key": { "type": "http", "scheme": "bearer" },
                "session": { "type": "apiKey", "in": "cookie", "name": COOKIE_NAME },
            },
        },
    })
}

fn operations_mut(paths: &mut Value) -> impl Iterator<Item = &mut Value> {
    let items = paths.as_object_mut().into_iter().flat_map(|paths| paths.values_mut());
    let methods = items.filter_map(Value::as_object_mut).flat_map(|item| item.iter_mut());
    methods.filter(|(name, _)| *name != "parameters").map(|(_, operation)| operation)
}
