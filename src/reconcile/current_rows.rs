//! The current row of each image of a table, read with bounded memory.

use std::io;
use std::path::Path;

use futures::StreamExt;

use super::error::ReconcileError;
use super::sort::{ExternalSorter, SORT_MEMORY_BYTES, SortedPairs, from_json_bytes, to_json_bytes};
use crate::store::Store;
use crate::table::{self, Generation, InventoryEntry};

/// The current row of each image of a table, in the order of the ids.
pub struct CurrentRows(SortedPairs);

/// Reads the current row of each image. Sorts in unnamed files in `folder`, which need some hundred bytes
/// per row.
pub async fn read_current_rows(
    catalogue: &Store,
    generation: &Generation,
    folder: &Path,
) -> Result<CurrentRows, ReconcileError> {
    let temp_error =
        |source| ReconcileError::TempFolder { folder: folder.display().to_string(), source };
    let mut sorter = ExternalSorter::new(folder, SORT_MEMORY_BYTES);
    let mut batches = table::read_inventory(catalogue, generation).await?;
    while let Some(batch) = batches.next().await {
        for entry in batch? {
            let id = entry.image_id.clone();
            sorter.push(id.as_bytes(), &to_json_bytes(&entry)).map_err(temp_error)?;
        }
    }
    Ok(CurrentRows(sorter.finish().map_err(temp_error)?))
}

impl Iterator for CurrentRows {
    type Item = io::Result<InventoryEntry>;

    fn next(&mut self) -> Option<Self::Item> {
        let id = self.0.peek_key()?.to_vec();
        self.next_newest_entry(&id).transpose()
    }
}

impl CurrentRows {
    /// Reads all rows of the image `id` and returns the newest.
    fn next_newest_entry(&mut self, id: &[u8]) -> io::Result<Option<InventoryEntry>> {
        let mut newest: Option<InventoryEntry> = None;
        for value in self.0.next_values(id)? {
            let entry: InventoryEntry = from_json_bytes(&value)?;
            if newest.as_ref().is_none_or(|known| entry.version > known.version) {
                newest = Some(entry);
            }
        }
        Ok(newest)
    }
}
