//! What is stored: the current row of each image, at the places where it is compared.

use std::io;
use std::path::Path;

use futures::StreamExt;
use percent_encoding::percent_decode_str;
use url::Url;

use super::compare::{IdScheme, StoredImage, StoredState};
use super::listing::ListingSource;
use super::sort::{ExternalSorter, SortedPairs, from_json_bytes, to_json_bytes};
use super::{ReconcileError, SORT_MEMORY_BYTES};
use crate::store::Store;
use crate::table::{self, Generation, InventoryEntry};

/// All rows of the table by image.
async fn sort_by_image(
    catalogue: &Store,
    generation: &Generation,
    folder: &Path,
) -> Result<SortedPairs, ReconcileError> {
    let in_folder =
        |source| ReconcileError::TempFolder { folder: folder.display().to_string(), source };
    let mut sorter = ExternalSorter::new(folder, SORT_MEMORY_BYTES);
    let mut batches = table::read_inventory(catalogue, generation).await?;
    while let Some(batch) = batches.next().await {
        for entry in batch? {
            let id = entry.image_id.clone();
            sorter.push(id.as_bytes(), &to_json_bytes(&entry)).map_err(in_folder)?;
        }
    }
    sorter.finish().map_err(in_folder)
}

/// The current row of each image of a table, in the order of the ids.
pub struct CurrentRows(SortedPairs);

/// The current rows of a table. Sorts through files in `folder`.
pub async fn read_current_rows(
    catalogue: &Store,
    generation: &Generation,
    folder: &Path,
) -> Result<CurrentRows, ReconcileError> {
    Ok(CurrentRows(sort_by_image(catalogue, generation, folder).await?))
}

impl Iterator for CurrentRows {
    type Item = io::Result<InventoryEntry>;

    fn next(&mut self) -> Option<Self::Item> {
        let id = self.0.peek_key()?.to_vec();
        self.next_newest_entry(&id).transpose()
    }
}

impl CurrentRows {
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

/// Which images of the table belong to what is listed.
pub(super) enum StoredScope {
    /// Those fetched from below this address, by their key below it.
    BelowUrl { url: Url, id_prefix: String },
    /// Those whose ids begin so.
    WithIdPrefix { id_prefix: String },
}

impl StoredScope {
    pub fn new(side: &ListingSource, id_prefix: &str) -> Self {
        let id_prefix = id_prefix.to_owned();
        match side {
            ListingSource::Store(store) => Self::BelowUrl { url: store.url().clone(), id_prefix },
            ListingSource::List { .. } => Self::WithIdPrefix { id_prefix },
        }
    }

    /// The current row of each image at the places where it is compared, in the order of these.
    pub fn sort_by_compare_key(
        &self,
        rows: CurrentRows,
        folder: &Path,
    ) -> io::Result<(SortedPairs, IdScheme)> {
        let mut sorter = ExternalSorter::new(folder, SORT_MEMORY_BYTES);
        let (mut by_key, mut by_custom_id, mut example) = (0u64, 0u64, None);
        for newest in rows {
            for (key, known) in self.compare_keys(&newest?) {
                sorter.push(key.as_bytes(), &to_json_bytes(&known))?;
                match self {
                    Self::BelowUrl { id_prefix, .. } if known.status == StoredState::Present => {
                        if known.image_id.strip_prefix(id_prefix.as_str()) == Some(&key) {
                            by_key += 1;
                        } else {
                            by_custom_id += 1;
                            example.get_or_insert((known.image_id, key));
                        }
                    }
                    _ => {}
                }
            }
        }
        let custom_id_example = example.filter(|_| by_custom_id > by_key);
        Ok((sorter.finish()?, IdScheme { custom_id_example }))
    }

    fn compare_keys(&self, entry: &InventoryEntry) -> Vec<(String, StoredImage)> {
        let known = |what| StoredImage {
            image_id: entry.image_id.clone(),
            status: what,
            sequence: entry.version.sequence.clone(),
            event_time: entry.event_time.unwrap_or(entry.version.embedded_at),
            has_event_time: entry.event_time.is_some(),
            stored_at: entry.version.embedded_at,
            uri: entry.uri.clone(),
            bytes: entry.bytes,
            attributes: entry.attributes.clone(),
        };
        let deleted = entry.version.deleted;
        match self {
            Self::WithIdPrefix { id_prefix } => {
                let what = if deleted { StoredState::Deleted } else { StoredState::Present };
                let mine = entry.image_id.starts_with(id_prefix.as_str());
                mine.then(|| (entry.image_id.clone(), known(what))).into_iter().collect()
            }
            Self::BelowUrl { url, id_prefix } => {
                let named = entry.image_id.strip_prefix(id_prefix.as_str()).map(str::to_owned);
                let from = entry.uri.as_deref().filter(|_| !deleted);
                let here = from.and_then(|uri| key_below(url, uri));
                let what = if deleted { StoredState::Deleted } else { StoredState::Elsewhere };
                let other = named.filter(|named| here.as_ref() != Some(named));
                let other = other.map(|key| (key, known(what)));
                here.map(|key| (key, known(StoredState::Present)))
                    .into_iter()
                    .chain(other)
                    .collect()
            }
        }
    }
}

/// The key of an address within a place; none where it is not below it.
pub(super) fn key_below(place: &Url, uri: &str) -> Option<String> {
    let uri = Url::parse(uri).ok()?;
    let scheme =
        |url: &Url| if url.scheme() == "s3a" { "s3".into() } else { url.scheme().to_owned() };
    if scheme(place) != scheme(&uri) || place.host_str() != uri.host_str() {
        return None;
    }
    let decoded = |url: &Url| -> Option<Vec<String>> {
        let segment = |s: &str| percent_decode_str(s).decode_utf8().ok().map(Into::into);
        url.path().split('/').skip(1).map(segment).collect()
    };
    let (mut place, uri) = (decoded(place)?, decoded(&uri)?);
    if place.last().is_some_and(String::is_empty) {
        place.pop();
    }
    let rest = uri.strip_prefix(place.as_slice())?;
    (!rest.is_empty() && !rest.iter().any(String::is_empty)).then(|| rest.join("/"))
}
