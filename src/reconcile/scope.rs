//! Which images of the table are compared with a listing.

use std::io;
use std::path::Path;

use url::Url;

use super::current_rows::CurrentRows;
use super::images::{IdScheme, TableImage, TableImageStatus};
use super::listing::ListingSource;
use super::sort::{ExternalSorter, SORT_MEMORY_BYTES, SortedPairs, to_json_bytes};
use crate::store::key_of_url;
use crate::table::InventoryEntry;

/// Which images of the table are compared with a listing, and under which keys.
pub(super) enum StoredScope {
    /// Images fetched from below `url`, by their key below it; and images with an id that an object below
    /// `url` would get (`id_prefix` and key), by that key.
    BelowUrl { url: Url, id_prefix: String },
    /// Images whose ids begin with `id_prefix`, by id.
    WithIdPrefix { id_prefix: String },
}

impl StoredScope {
    pub fn new(listing: &ListingSource, id_prefix: &str) -> Self {
        let id_prefix = id_prefix.to_owned();
        match listing {
            ListingSource::Store(store) => Self::BelowUrl { url: store.url().clone(), id_prefix },
            ListingSource::List { .. } => Self::WithIdPrefix { id_prefix },
        }
    }

    /// Sorts the images in scope by the keys under which they are compared, as [`TableImage`]s in JSON.
    pub fn sort_by_compare_key(
        &self,
        rows: CurrentRows,
        folder: &Path,
    ) -> io::Result<(SortedPairs, IdScheme)> {
        let mut sorter = ExternalSorter::new(folder, SORT_MEMORY_BYTES);
        let (mut key_ids, mut custom_ids, mut custom_id_example) = (0u64, 0u64, None);
        for row in rows {
            for (key, image) in self.keyed_images_of_row(&row?) {
                sorter.push(key.as_bytes(), &to_json_bytes(&image))?;
                match self {
                    Self::BelowUrl { id_prefix, .. }
                        if image.status == TableImageStatus::Present =>
                    {
                        if image.image_id.strip_prefix(id_prefix.as_str()) == Some(&key) {
                            key_ids += 1;
                        } else {
                            custom_ids += 1;
                            custom_id_example.get_or_insert((image.image_id, key));
                        }
                    }
                    _ => {}
                }
            }
        }
        let custom_id_example = custom_id_example.filter(|_| custom_ids > key_ids);
        Ok((sorter.finish()?, IdScheme { custom_id_example }))
    }

    /// Returns the keys under which the image of a row is compared, at most two.
    fn keyed_images_of_row(&self, row: &InventoryEntry) -> Vec<(String, TableImage)> {
        let image_with_status = |status| TableImage {
            image_id: row.image_id.clone(),
            status,
            sequence: row.version.sequence.clone(),
            event_time: row.event_time.unwrap_or(row.version.embedded_at),
            has_event_time: row.event_time.is_some(),
            embedded_at: row.version.embedded_at,
            uri: row.uri.clone(),
            size_bytes: row.bytes,
            attributes: row.attributes.clone(),
        };
        let deleted = row.version.deleted;
        match self {
            Self::WithIdPrefix { id_prefix } => {
                let status =
                    if deleted { TableImageStatus::Deleted } else { TableImageStatus::Present };
                let in_scope = row.image_id.starts_with(id_prefix.as_str());
                in_scope
                    .then(|| (row.image_id.clone(), image_with_status(status)))
                    .into_iter()
                    .collect()
            }
            Self::BelowUrl { url, id_prefix } => {
                let key_of_id = row.image_id.strip_prefix(id_prefix.as_str()).map(str::to_owned);
                let uri = row.uri.as_deref().filter(|_| !deleted);
                let key_of_uri = uri.and_then(|uri| key_below_url(url, uri));
                let status = if deleted {
                    TableImageStatus::Deleted
                } else {
                    TableImageStatus::FetchedElsewhere
                };
                let other_key = key_of_id.filter(|key| key_of_uri.as_ref() != Some(key));
                let other = other_key.map(|key| (key, image_with_status(status)));
                key_of_uri
                    .map(|key| (key, image_with_status(TableImageStatus::Present)))
                    .into_iter()
                    .chain(other)
                    .collect()
            }
        }
    }
}

/// Returns the key of `uri` below the URL `base`; `None` if it is not below it.
pub(super) fn key_below_url(base: &Url, uri: &str) -> Option<String> {
    let uri = Url::parse(uri).ok()?;
    let scheme =
        |url: &Url| if url.scheme() == "s3a" { "s3".into() } else { url.scheme().to_owned() };
    if scheme(base) != scheme(&uri) || base.authority() != uri.authority() {
        return None;
    }
    let (mut prefix, key) = (key_of_url(base)?, key_of_url(&uri)?);
    if !prefix.is_empty() && !prefix.ends_with('/') {
        prefix.push('/');
    }
    let key = key.strip_prefix(prefix.as_str())?;
    (!key.is_empty() && !key.ends_with('/')).then(|| key.to_owned())
}
