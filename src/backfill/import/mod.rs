//! Stores embeddings that files have already in a catalogue, without embedding the images again.
//!
//! `columns` reads ids, addresses and attributes, and `plan` joins them with an array of embeddings to an
//! [`ImportPlan`], in which every row is checked. `agreement` compares some of the embeddings with those that
//! the model computes of the images. `run` stores the rows in commits like those of a worker: the Delta log
//! keeps how far an import came, so that it continues after an interruption and is done only once.

mod agreement;
mod columns;
mod error;
mod plan;
mod run;

pub use agreement::{Agreement, MIN_MEDIAN_COSINE, SAMPLED_IMAGES, measure_agreement};
pub use columns::{Columns, IdColumn};
pub use error::ImportError;
pub use plan::{ImportColumns, ImportPlan, ImportRules};
pub use run::{Import, ImportSummary};

#[cfg(test)]
mod tests;
