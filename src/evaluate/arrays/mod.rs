//! Compares configurations on embeddings that somebody has already: arrays of images, queries and prompts,
//! without a model, a Kafka or a table.
//!
//! `pairs` reads which images are right. `bank` computes the statistics of all images, `scan` ranks the
//! queries and keeps what `candidates` says, and `pilot` compares the rankings. `transforms` writes α
//! and β. Rankings are those of f64.

mod bank;
mod candidates;
mod pairs;
mod pilot;
mod runs;
mod scan;
mod transforms;

pub use pairs::parse_pairs;
pub use pilot::{ArrayEvaluation, ArrayEvaluationError, ArrayInputs, RunSummary, evaluate_arrays};
pub use runs::{ArrayRun, RunSpecError};
pub use transforms::write_transforms;
