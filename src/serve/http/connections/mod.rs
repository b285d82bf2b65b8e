//! Accepts connections (`accept`), and limits how long each may wait for a request's head and be idle
//! (`request_wait`).

mod accept;
mod request_wait;

pub use accept::{ConnectionLimits, Listener, accept_connections, bind_listener};
