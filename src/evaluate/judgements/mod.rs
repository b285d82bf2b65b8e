//! Queries with what is known of their right answers: read from JSON lines or CSV (`query_files`)
//! or from the feedback that users sent (`feedback`), and built-in texts that match no image
//! (`probes`). `query_texts` reads the texts alone, from logs of any length.

mod feedback;
mod judged_query;
mod probes;
mod query_files;
mod query_texts;

pub use feedback::queries_from_feedback;
pub use judged_query::{JudgedQuery, Judgements, MAX_QUERIES, fingerprint_queries};
pub use probes::{NoMatchKind, NoMatchProbe, builtin_no_match_probes};
pub use query_files::{QueryFileError, queries_from_csv, queries_from_json_lines};
pub use query_texts::{MAX_SAMPLED_TEXTS, QueryTextError, TextSample};
