//! The table in memory: the newest version of each image, and how it is served.

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
pub use memory::{MemoryLimitExceeded, SnapshotMemory, limit_bytes, required_bytes};
pub use serving::{Route, ServingSnapshot};
pub use snapshot_store::{SnapshotChange, SnapshotStore};
pub use table_snapshot::Snapshot;

#[cfg(test)]
mod snapshot_store_tests;
