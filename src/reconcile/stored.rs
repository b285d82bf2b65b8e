//! What is stored: the current row of each image, at the places where it is compared.

use std::io;
use std::path::Path;

use futures::StreamExt;
use percent_encoding::percent_decode_str;
use url::Url;

use super::compare::{Known, Place, What};
use super::listing::Side;
use super::sort::{Sorted, Sorter, json, parsed};
use super::{ReconcileError, SORT_BYTES};
use crate::catalogue::Generation;
use crate::store::Store;
use crate::table::{self, Entry};

/// All rows of the table by image.
async fn by_image(
    catalogue: &Store,
    generation: &Generation,
    folder: &Path,
) -> Result<Sorted, ReconcileError> {
    let in_folder =
        |source| ReconcileError::Folder { folder: folder.display().to_string(), source };
    let mut sorter = Sorter::new(folder, SORT_BYTES);
    let mut batches = table::inventory(catalogue, generation).await?;
    while let Some(batch) = batches.next().await {
        for entry in batch? {
            let id = entry.image_id.clone();
            sorter.push(id.as_bytes(), &json(&entry)).map_err(in_folder)?;
        }
    }
    sorter.finish().map_err(in_folder)
}

/// The current row of each image of a table, in the order of the ids.
pub struct Current(Sorted);

/// The current rows of a table. Sorts through files in `folder`.
pub async fn current(
    catalogue: &Store,
    generation: &Generation,
    folder: &Path,
) -> Result<Current, ReconcileError> {
    Ok(Current(by_image(catalogue, generation, folder).await?))
}

impl Iterator for Current {
    type Item = io::Result<Entry>;

    fn next(&mut self) -> Option<Self::Item> {
        let id = self.0.peek()?.to_vec();
        self.newest(&id).transpose()
    }
}

impl Current {
    fn newest(&mut self, id: &[u8]) -> io::Result<Option<Entry>> {
        let mut newest: Option<Entry> = None;
        for value in self.0.values(id)? {
            let entry: Entry = parsed(&value)?;
            if newest.as_ref().is_none_or(|known| entry.version > known.version) {
                newest = Some(entry);
            }
        }
        Ok(newest)
    }
}

/// Which images of the table belong to what is listed.
pub(super) enum Scope {
    /// Those fetched from below this address, by their key below it.
    Below { url: Url, id_prefix: String },
    /// Those whose ids begin so.
    Ids { id_prefix: String },
}

impl Scope {
    pub fn of(side: &Side, id_prefix: &str) -> Self {
        let id_prefix = id_prefix.to_owned();
        match side {
            Side::Place(store) => Self::Below { url: store.url().clone(), id_prefix },
            Side::List { .. } => Self::Ids { id_prefix },
        }
    }

    /// The current row of each image at the places where it is compared, in the order of these.
    pub fn places(&self, rows: Current, folder: &Path) -> io::Result<(Sorted, Place)> {
        let mut sorter = Sorter::new(folder, SORT_BYTES);
        let (mut by_key, mut by_own_name, mut example) = (0u64, 0u64, None);
        for newest in rows {
            for (key, known) in self.place(&newest?) {
                sorter.push(key.as_bytes(), &json(&known))?;
                match self {
                    Self::Below { id_prefix, .. } if known.what == What::Here => {
                        if known.image_id.strip_prefix(id_prefix.as_str()) == Some(&key) {
                            by_key += 1;
                        } else {
                            by_own_name += 1;
                            example.get_or_insert((known.image_id, key));
                        }
                    }
                    _ => {}
                }
            }
        }
        let own_names = example.filter(|_| by_own_name > by_key);
        Ok((sorter.finish()?, Place { own_names }))
    }

    fn place(&self, entry: &Entry) -> Vec<(String, Known)> {
        let known = |what| Known {
            image_id: entry.image_id.clone(),
            what,
            sequence: entry.version.sequence.clone(),
            at: entry.event_time.unwrap_or(entry.version.embedded_at),
            dated: entry.event_time.is_some(),
            stored: entry.version.embedded_at,
            uri: entry.uri.clone(),
            bytes: entry.bytes,
            attributes: entry.attributes.clone(),
        };
        let deleted = entry.version.deleted;
        match self {
            Self::Ids { id_prefix } => {
                let what = if deleted { What::Deleted } else { What::Here };
                let mine = entry.image_id.starts_with(id_prefix.as_str());
                mine.then(|| (entry.image_id.clone(), known(what))).into_iter().collect()
            }
            Self::Below { url, id_prefix } => {
                let named = entry.image_id.strip_prefix(id_prefix.as_str()).map(str::to_owned);
                let from = entry.uri.as_deref().filter(|_| !deleted);
                let here = from.and_then(|uri| key_below(url, uri));
                let what = if deleted { What::Deleted } else { What::Elsewhere };
                let other = named.filter(|named| here.as_ref() != Some(named));
                let other = other.map(|key| (key, known(what)));
                here.map(|key| (key, known(What::Here))).into_iter().chain(other).collect()
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
