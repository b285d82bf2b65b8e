//! Logs, metrics, traces and probes of a process.
//!
//! Every log line of this program has the field `event`, one of the names in [`event`], with fields
//! that are declared there; `ops/log-events.md` is generated from the same list, and
//! `ops/metrics.md` from that in [`metrics`].

pub mod admin;
pub mod event;
pub mod event_reference;
mod event_schema;
mod logging;
pub mod metrics;
pub mod otlp;
mod rate_limit;

pub use logging::{LogFormat, LogOptions, init_logging, loggable_query_text};
