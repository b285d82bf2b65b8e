//! A query before it is scanned: its fields, its embedding, and the rows that its filter allows.
//!
//! A [`Query`] says what is looked for (text, weighted texts, an image of the catalogue, a picture, or a
//! vector) and may override how it is ranked (`request`). The [`QueryEmbedder`] turns the input into a
//! unit vector and caches recent ones (`embedder`). A [`Filter`] is validated against the declared
//! attributes (`filter`; `filter_json` reads it) and evaluated into one bitmap per chunk (`filter_mask`).

mod embedder;
mod filter;
mod filter_json;
mod filter_mask;
mod request;

pub(crate) use embedder::QueryEmbedder;
pub(crate) use filter::ValidatedFilter;
pub(crate) use filter_mask::FilterCache;

pub use filter::Filter;
pub use request::{CalibratedThreshold, MinScore, Query, QueryInput, WeightedText};
