//! Embeddings that others have computed: NumPy, Parquet, the folders of clip-retrieval, and JSON.
//!
//! `source` finds an array that an argument names, and `npy` and `parquet` read it into an
//! [`EmbeddingArray`], whose rows are normalised in f64 and not rounded. `json_embedding` reads the single embeddings
//! of requests and events.

mod embeddings;
mod error;
mod json_embedding;
mod npy;
mod parquet;
mod source;

pub use embeddings::{EmbeddingArray, MAX_VALUES, RowFault, Values};
pub use error::ArrayError;
pub use json_embedding::JsonEmbedding;
pub use npy::write_npy;
pub use parquet::read_value_columns;
pub use source::{
    ArrayRole, list_metadata_files, read_array, read_array_with_faults, split_member,
};
