//! Compares a candidate with the live configuration by the logs of query workers, without a
//! catalogue or a model.
//!
//! A `shadow.compared` line says how the candidate would have answered a query that the live
//! configuration answered; `search` lines say how each configuration answered its own share of the
//! queries. Lines of one query are not independent, so intervals resample queries with all their
//! lines.

mod error;
mod reader;
mod render;
mod report;

pub use error::QueryLogError;
pub use reader::QueryLogReader;
pub use render::{render_html, render_terminal};
pub use report::QueryLogReport;

#[cfg(test)]
mod tests;
