//! API keys, and the sessions of the page that they open.

pub mod api_keys;
pub mod session;
