//! Reads a listing: the objects below a URL, or a list of ids and events.

use std::path::Path;

use futures::TryStreamExt;
use tokio::io::{AsyncBufRead, AsyncBufReadExt};

use super::error::ReconcileError;
use super::images::ListedImage;
use super::sort::{ExternalSorter, SORT_MEMORY_BYTES, SortedPairs, to_json_bytes};
use crate::diagnosis::redact::redact;
use crate::ingest::source::{Decoder, ImageEvent};
use crate::publish;
use crate::record::{ImageId, Operation, SequenceKey, VersionOrdering};
use crate::store::ImageStore;

/// What the table is compared with.
pub enum ListingSource {
    /// Every object below a URL, identified by its key below it.
    Store(ImageStore),
    /// A list of all existing images, one per line: an id, or an image event as JSON.
    List {
        /// Name of the file, for messages.
        name: String,
        /// The lines of the list.
        lines: Box<dyn AsyncBufRead + Send + Unpin>,
        /// Checks events as workers do.
        decoder: Box<Decoder>,
    },
}

impl ListingSource {
    /// Returns the URL or file name, for messages and the report.
    pub(super) fn name(&self) -> String {
        match self {
            Self::Store(store) => redact(store.url().as_str()).into_owned(),
            Self::List { name, .. } => name.clone(),
        }
    }
}

/// Reads and sorts a listing by key or id, as [`ListedImage`]s in JSON. From a list, reads only ids that
/// begin with `id_prefix`.
pub(super) async fn read_sorted_listing(
    listing: ListingSource,
    id_prefix: &str,
    folder: &Path,
) -> Result<SortedPairs, ReconcileError> {
    let temp_error =
        |source| ReconcileError::TempFolder { folder: folder.display().to_string(), source };
    let mut sorter = ExternalSorter::new(folder, SORT_MEMORY_BYTES);
    match listing {
        ListingSource::Store(store) => {
            let mut objects = store.list();
            while let Some(object) = objects.try_next().await? {
                let listed = ListedImage::Object {
                    uri: object.uri.map(Into::into),
                    modified_at: object.last_modified,
                    size_bytes: object.size_bytes,
                    is_image: publish::has_image_extension(&object.key),
                };
                sorter.push(&object.key, &to_json_bytes(&listed)).map_err(temp_error)?;
            }
        }
        ListingSource::List { name, mut lines, decoder } => {
            let (mut line, mut number) = (String::new(), 0);
            loop {
                line.clear();
                number += 1;
                let invalid_list = |reason: String| ReconcileError::InvalidList {
                    name: name.clone(),
                    line: number,
                    reason,
                };
                if lines.read_line(&mut line).await.map_err(|e| invalid_list(e.to_string()))? == 0 {
                    break;
                }
                if line.trim().is_empty() {
                    continue;
                }
                let (id, listed) = parse_list_line(line.trim(), &decoder).map_err(invalid_list)?;
                if id.starts_with(id_prefix) {
                    sorter.push(id.as_bytes(), &to_json_bytes(&listed)).map_err(temp_error)?;
                }
            }
        }
    }
    sorter.finish().map_err(temp_error)
}

/// Parses a line of a list: returns the id and what is listed of it.
fn parse_list_line(line: &str, decoder: &Decoder) -> Result<(String, ListedImage), String> {
    if !line.starts_with('{') {
        let id = ImageId::new(line).map_err(|e| e.to_string())?;
        return Ok((id.into(), ListedImage::Id));
    }
    let (event, sequence) = if decoder.ordering() == VersionOrdering::Offset {
        // Do not derive a version: a line has no offset.
        let event: ImageEvent = serde_json::from_str(line).map_err(|e| e.to_string())?;
        ImageId::new(&event.image_id).map_err(|e| e.to_string())?;
        if event.operation == Operation::Upsert && event.uri.is_none() && event.data.is_none() {
            return Err("uri: is missing".into());
        }
        (event, SequenceKey::from_number(0))
    } else {
        publish::parse_event_line(line, decoder)?
    };
    if event.operation == Operation::Delete {
        return Err("operation: is delete; a list contains only existing images".into());
    }
    Ok((event.image_id.clone(), ListedImage::Event(Box::new(event), sequence)))
}
