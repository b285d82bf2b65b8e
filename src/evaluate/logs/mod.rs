//! What the logs of query workers tell of a candidate beside what is live: no catalogue, no model.
//!
//! `shadow` lines say how the candidate would have answered the very query that the live configuration
//! answered; `search` lines what each configuration answered to its own share of the queries. Lines of
//! one query are not independent, so intervals resample queries with all of their lines.

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
