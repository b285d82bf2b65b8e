//! What is listed: the objects of a place, or the ids and events of a list.

use std::path::Path;

use futures::TryStreamExt;
use tokio::io::{AsyncBufRead, AsyncBufReadExt};

use super::compare::ListedImage;
use super::sort::{ExternalSorter, SortedPairs, to_json_bytes};
use super::{ReconcileError, SORT_MEMORY_BYTES};
use crate::ingest::source::{Decoder, ImageEvent};
use crate::publish;
use crate::record::{ImageId, Operation, SequenceKey, VersionOrdering};
use crate::store::Store;

/// The outside world.
pub enum ListingSource {
    /// Every object below a place, named by its key within it.
    Store(Store),
    /// A list of all ids that there are, a line each: an id, or an event as JSON.
    List {
        /// The file, for messages.
        name: String,
        /// Its lines.
        lines: Box<dyn AsyncBufRead + Send + Unpin>,
        /// How events are read.
        decoder: Box<Decoder>,
    },
}

impl ListingSource {
    pub(super) fn name(&self) -> String {
        match self {
            Self::Store(store) => store.url().to_string(),
            Self::List { name, .. } => name.clone(),
        }
    }
}

/// Everything that is listed, in order; of a list only ids that begin with `id_prefix`.
pub(super) async fn read_sorted_listing(
    side: ListingSource,
    id_prefix: &str,
    folder: &Path,
) -> Result<SortedPairs, ReconcileError> {
    let in_folder =
        |source| ReconcileError::TempFolder { folder: folder.display().to_string(), source };
    let mut sorter = ExternalSorter::new(folder, SORT_MEMORY_BYTES);
    match side {
        ListingSource::Store(store) => {
            let mut objects = publish::list_objects(store);
            while let Some(object) = objects.try_next().await? {
                let listed = ListedImage::Object {
                    uri: object.uri.into(),
                    modified_at: object.last_modified,
                    bytes: object.size_bytes,
                    is_image: object.is_image,
                };
                sorter.push(object.key.as_bytes(), &to_json_bytes(&listed)).map_err(in_folder)?;
            }
        }
        ListingSource::List { name, mut lines, decoder } => {
            let (mut line, mut number) = (String::new(), 0);
            loop {
                line.clear();
                number += 1;
                let wrong = |reason: String| ReconcileError::InvalidList {
                    name: name.clone(),
                    line: number,
                    reason,
                };
                if lines.read_line(&mut line).await.map_err(|e| wrong(e.to_string()))? == 0 {
                    break;
                }
                if line.trim().is_empty() {
                    continue;
                }
                let (id, listed) = parse_list_line(line.trim(), &decoder).map_err(wrong)?;
                if id.starts_with(id_prefix) {
                    sorter.push(id.as_bytes(), &to_json_bytes(&listed)).map_err(in_folder)?;
                }
            }
        }
    }
    sorter.finish().map_err(in_folder)
}

/// A line of a list.
fn parse_list_line(line: &str, decoder: &Decoder) -> Result<(String, ListedImage), String> {
    if !line.starts_with('{') {
        let id = ImageId::new(line).map_err(|e| e.to_string())?;
        return Ok((id.into(), ListedImage::Id));
    }
    let (event, sequence) = if decoder.ordering() == VersionOrdering::Offset {
        // Its version would be made up.
        let event: ImageEvent = serde_json::from_str(line).map_err(|e| e.to_string())?;
        ImageId::new(&event.image_id).map_err(|e| e.to_string())?;
        if event.operation == Operation::Upsert && event.uri.is_none() && event.data.is_none() {
            return Err("uri: is missing".into());
        }
        (event, SequenceKey::from_number(0))
    } else {
        publish::parse_line(line, decoder)?
    };
    if event.operation == Operation::Delete {
        return Err("operation: is delete; a list has what is there".into());
    }
    Ok((event.image_id.clone(), ListedImage::Event(Box::new(event), sequence)))
}
