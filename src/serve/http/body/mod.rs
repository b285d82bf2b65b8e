//! The JSON bodies of requests and responses.

pub mod problem;
pub mod request;
pub mod rerank;
pub mod response;
pub mod state_response;
