//! Error responses: problem details of RFC 9457.

use axum::Json;
use axum::extract::rejection::{JsonRejection, QueryRejection};
use axum::http::{HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use schemars::JsonSchema;
use serde::Serialize;
use tracing::error;

use crate::diagnosis::redact::redact;
use crate::ingest::fetch::FetchError;
use crate::retry::{Classify, Disposition};
use crate::search::QueryError;
use crate::serve::feedback::FeedbackError;
use crate::serve::http::credentials::api_keys::Scope;
use crate::serve::previews::PreviewError;
use crate::telemetry::event;

/// The body of an error response.
#[derive(Debug, Serialize, JsonSchema)]
pub struct Problem {
    /// Always `about:blank`: there are no pages about the codes.
    #[serde(rename = "type")]
    kind: &'static str,
    title: &'static str,
    status: u16,
    /// What is wrong, and how to correct it.
    detail: String,
    /// Code for programs; it does not change between versions.
    code: &'static str,
    /// The field of the request that is wrong.
    #[serde(skip_serializing_if = "Option::is_none")]
    field: Option<&'static str>,
    /// Seconds to wait before the request is tried again.
    #[serde(skip_serializing_if = "Option::is_none")]
    retry_after: Option<u32>,
    /// Value of the header `WWW-Authenticate`.
    #[serde(skip)]
    www_authenticate: Option<String>,
}

impl Problem {
    pub fn new(status: StatusCode, code: &'static str, detail: impl Into<String>) -> Self {
        let detail: String = detail.into();
        Self {
            kind: "about:blank",
            title: status.canonical_reason().unwrap_or("Error"),
            status: status.as_u16(),
            detail: redact(&detail).into_owned(),
            code,
            field: None,
            retry_after: None,
            www_authenticate: None,
        }
    }

    pub fn code(&self) -> &'static str {
        self.code
    }

    /// The request has neither a key nor a session.
    pub fn missing_api_key() -> Self {
        Self::with_challenge(
            StatusCode::UNAUTHORIZED,
            "missing_api_key",
            "a key is needed: send it as `Authorization: Bearer <key>`, or sign in on the page",
            "",
        )
    }

    /// The request has a key that `http.keys` does not have.
    pub fn invalid_api_key() -> Self {
        Self::with_challenge(
            StatusCode::UNAUTHORIZED,
            "invalid_api_key",
            "this key is not accepted: it is misspelt, or no longer in http.keys",
            ", error=\"invalid_token\"",
        )
    }

    /// The key called `name` does not have `scope`.
    pub fn insufficient_scope(name: &str, scope: Scope) -> Self {
        let scope = scope.name();
        Self::with_challenge(
            StatusCode::FORBIDDEN,
            "insufficient_scope",
            format!("the key {name} does not have the scope {scope}; use one that has it"),
            &format!(", error=\"insufficient_scope\", scope=\"{scope}\""),
        )
    }

    /// A page of another site had a browser send the request with a session cookie.
    pub fn cross_site_request() -> Self {
        Self::new(
            StatusCode::FORBIDDEN,
            "cross_site",
            "a session is for this server's own page; other programs send a key as `Authorization: Bearer <key>`",
        )
    }

    fn with_challenge(
        status: StatusCode,
        code: &'static str,
        detail: impl Into<String>,
        parameters: &str,
    ) -> Self {
        let www_authenticate = Some(format!("Bearer realm=\"bsap\"{parameters}"));
        Self { www_authenticate, ..Self::new(status, code, detail) }
    }

    /// The limit `limit` is reached. `limited` says, after the number, what is limited and by which
    /// option.
    pub fn too_many_requests(limit: usize, limited: &str) -> Self {
        let detail = format!("{limit} {limited}; try again in a moment");
        let retry_after = Some(1);
        Self {
            retry_after,
            ..Self::new(StatusCode::TOO_MANY_REQUESTS, "too_many_requests", detail)
        }
    }

    /// The body of a request is compressed by `encoding`.
    pub fn compressed_body(encoding: &HeaderValue) -> Self {
        let encoding = String::from_utf8_lossy(encoding.as_bytes());
        let detail = format!(
            "the body is sent with Content-Encoding: {encoding}; send it uncompressed, without this header"
        );
        Self::new(StatusCode::UNSUPPORTED_MEDIA_TYPE, "compressed_body", detail)
    }

    /// The request failed for a reason that is in the log.
    pub fn internal() -> Self {
        let detail = "the request failed; see the server's log";
        Self::new(StatusCode::INTERNAL_SERVER_ERROR, "internal", detail)
    }

    pub fn timeout(limit_ms: u64) -> Self {
        let detail = format!("no answer within http.timeout_ms = {limit_ms}");
        Self::new(StatusCode::GATEWAY_TIMEOUT, "timeout", detail)
    }

    /// A field of the request has a value that it may not have; `reason` says what is allowed.
    pub fn invalid_field(field: &'static str, reason: impl std::fmt::Display) -> Self {
        let detail = format!("{field}: {reason}");
        Self {
            field: Some(field),
            ..Self::new(StatusCode::UNPROCESSABLE_ENTITY, "invalid_field", detail)
        }
    }

    pub fn not_found(detail: impl Into<String>) -> Self {
        Self::new(StatusCode::NOT_FOUND, "not_found", detail)
    }
}

impl From<QueryError> for Problem {
    fn from(error: QueryError) -> Self {
        match error {
            QueryError::InvalidField { field, reason } => Self::invalid_field(field, reason),
            QueryError::NotReady => Self {
                retry_after: Some(1),
                ..Self::new(StatusCode::SERVICE_UNAVAILABLE, "not_ready", error.to_string())
            },
            QueryError::PromptSetMissing(_) => {
                error!(event = event::HTTP_ERROR, code = "not_ready", %error, "the served prompt set is missing");
                Self::new(StatusCode::SERVICE_UNAVAILABLE, "not_ready", error.to_string())
            }
            QueryError::QueueFull(_) => Self {
                retry_after: Some(1),
                ..Self::new(StatusCode::TOO_MANY_REQUESTS, "too_many_requests", error.to_string())
            },
            QueryError::Cancelled => Self {
                retry_after: Some(1),
                ..Self::new(StatusCode::SERVICE_UNAVAILABLE, "shutting_down", error.to_string())
            },
            QueryError::CursorExpired { .. } => Self {
                field: Some("cursor"),
                ..Self::new(StatusCode::GONE, "cursor_expired", error.to_string())
            },
            QueryError::ImageNotFound(_) => Self::not_found(error.to_string()),
            QueryError::Model(inner) => {
                error!(event = event::HTTP_ERROR, code = "model_failed", error = %inner, "the model failed");
                Self::new(
                    StatusCode::INTERNAL_SERVER_ERROR,
                    "model_failed",
                    "the query could not be embedded; see the server's log",
                )
            }
        }
    }
}

impl From<FeedbackError> for Problem {
    fn from(error: FeedbackError) -> Self {
        let detail = error.to_string();
        let (status, code, detail) = match error {
            FeedbackError::QueueFull => {
                (StatusCode::TOO_MANY_REQUESTS, "too_many_requests", detail)
            }
            FeedbackError::ShuttingDown => {
                (StatusCode::SERVICE_UNAVAILABLE, "shutting_down", detail)
            }
            // The error names paths of the store, which callers must not see; the writer has logged
            // it.
            FeedbackError::Store(_) => (
                StatusCode::SERVICE_UNAVAILABLE,
                "storage_unavailable",
                "the feedback was not stored; see the server's log".into(),
            ),
        };
        Self { retry_after: Some(1), ..Self::new(status, code, detail) }
    }
}

impl From<FetchError> for Problem {
    fn from(error: FetchError) -> Self {
        let status = match (&error, error.disposition()) {
            (FetchError::NotAnImage { .. }, _) => StatusCode::UNSUPPORTED_MEDIA_TYPE,
            (_, Disposition::DeadLetter) => StatusCode::NOT_FOUND,
            (_, Disposition::Retry | Disposition::Fatal) => StatusCode::BAD_GATEWAY,
        };
        let detail = match &error {
            // Errors of hosts and stores may name addresses that callers must not know.
            FetchError::Permanent { .. }
            | FetchError::Forbidden { .. }
            | FetchError::Transient { .. } => {
                error!(event = event::HTTP_ERROR, code = error.code(), %error, "a picture could not be fetched");
                "the picture's host or store did not return it; see the server's log".to_owned()
            }
            _ => error.to_string(),
        };
        Self::new(status, error.code(), detail)
    }
}

impl From<PreviewError> for Problem {
    fn from(error: PreviewError) -> Self {
        let detail = error.to_string();
        match error {
            PreviewError::Undecodable(inner) => {
                Self::new(StatusCode::UNSUPPORTED_MEDIA_TYPE, inner.code(), detail)
            }
            PreviewError::Internal(_) => {
                let code = "internal";
                error!(
                    event = event::HTTP_ERROR,
                    code,
                    error = detail,
                    "a preview could not be made"
                );
                let shown = "the preview could not be made; see the server's log";
                Self::new(StatusCode::INTERNAL_SERVER_ERROR, code, shown)
            }
        }
    }
}

impl From<JsonRejection> for Problem {
    fn from(rejection: JsonRejection) -> Self {
        Self::new(rejection.status(), "invalid_body", rejection.body_text())
    }
}

impl From<QueryRejection> for Problem {
    fn from(rejection: QueryRejection) -> Self {
        Self::new(rejection.status(), "invalid_query", rejection.body_text())
    }
}

impl IntoResponse for Problem {
    fn into_response(self) -> Response {
        let status = StatusCode::from_u16(self.status).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
        let retry_after = self.retry_after;
        let www_authenticate =
            self.www_authenticate.as_deref().and_then(|value| HeaderValue::from_str(value).ok());
        let mut response = (status, Json(self)).into_response();
        let headers = response.headers_mut();
        headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("application/problem+json"));
        if let Some(seconds) = retry_after {
            headers.insert(header::RETRY_AFTER, seconds.into());
        }
        if let Some(value) = www_authenticate {
            headers.insert(header::WWW_AUTHENTICATE, value);
        }
        response
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::balance::statistics::StatisticsKey;
    use crate::ingest::decode::ImageDecodeError;

    #[test]
    fn a_missing_served_prompt_set_is_named_and_answered_with_503() {
        let key = StatisticsKey::from_stored("mine@2:0123456789ab:L100.0000:k8");
        let problem = Problem::from(QueryError::PromptSetMissing(key));
        assert_eq!((problem.status, problem.code, problem.field), (503, "not_ready", None));
        assert!(problem.detail.contains("prompt set mine@2:"), "{}", problem.detail);
    }

    #[test]
    fn what_is_no_picture_is_answered_with_415_wherever_that_is_noticed() {
        for problem in [
            Problem::from(FetchError::NotAnImage { uri: "http://shop.example/page".into() }),
            Problem::from(PreviewError::Undecodable(ImageDecodeError::UnknownFormat)),
        ] {
            assert_eq!((problem.status, problem.code), (415, "unknown_image_format"));
        }
    }
}
