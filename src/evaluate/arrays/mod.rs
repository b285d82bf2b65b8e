//! Compares configurations on embeddings that somebody has already: arrays of images, queries and prompts,
//! without a model, a Kafka or a table.
//!
//! `source` finds an array and `npy` and `parquet` read it into an [`EmbeddingArray`]; `pairs` reads which
//! images are right. `bank` computes the statistics of all images, `scan` ranks the queries and keeps what
//! `candidates` says, and `pilot` compares the rankings. `transforms` writes α
//! and β. Embeddings are normalised in f64 and not rounded, and rankings are those of f64.

mod bank;
mod candidates;
mod embeddings;
mod error;
mod npy;
mod pairs;
mod parquet;
mod pilot;
mod runs;
mod scan;
mod source;
mod transforms;

pub use embeddings::{EmbeddingArray, MAX_VALUES};
pub use error::ArrayError;
pub use pairs::parse_pairs;
pub use pilot::{ArrayEvaluation, ArrayEvaluationError, ArrayInputs, RunSummary, evaluate_arrays};
pub use runs::{ArrayRun, RunSpecError};
pub use source::{ArrayRole, read_array};
pub use transforms::write_transforms;
