//! The table in memory: the newest version of each image, and the configuration that serves it.
//!
//! A [`Snapshot`] is immutable. It consists of chunks of rows (`chunk`: each field is a column, the
//! embeddings are also kept as one-byte codes, `quantise`), of a bitmap of the live rows of each
//! chunk, and of the configuration that answers queries (`serving`). The [`SnapshotStore`] applies
//! each commit of the table, or a changed configuration, to a copy that shares all unchanged chunks
//! with the newest snapshot, and publishes it in one step: readers never wait, and they keep the
//! snapshot that they started with. `memory` says how much memory that takes.

mod chunk;
mod chunk_maintenance;
mod dot_products;
mod facets;
mod memory;
mod quantise;
mod serving;
mod snapshot_store;
mod table_snapshot;

pub(crate) use chunk::{AttributeColumn, Chunk, ChunkData, NO_STATISTICS, ROWS_PER_GROUP};
pub(crate) use dot_products::compute_dot_products;
pub(crate) use facets::count_facets;
pub(crate) use quantise::QuantisedQuery;
pub(crate) use table_snapshot::RowLocation;

pub use chunk::ImageMetadata;
pub use facets::AttributeFacet;
pub use memory::{MemoryLimitExceeded, SnapshotMemory, memory_limit_bytes, memory_required_bytes};
pub use serving::{ServingRole, ServingSnapshot};
pub use snapshot_store::{SnapshotImageChange, SnapshotStore};
pub use table_snapshot::Snapshot;

#[cfg(test)]
mod snapshot_store_tests;
