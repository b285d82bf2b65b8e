//! What is asked.

mod embedder;
mod filter;
mod filter_mask;
mod request;

pub(crate) use embedder::QueryEmbedder;
pub(crate) use filter::ValidatedFilter;
pub(crate) use filter_mask::FilterCache;

pub use filter::Filter;
pub use request::{CalibratedThreshold, MinScore, Query, QueryInput, WeightedText};
