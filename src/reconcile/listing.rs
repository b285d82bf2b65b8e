//! What is listed: the objects of a place, or the ids and events of a list.

use std::path::Path;

use futures::TryStreamExt;
use tokio::io::{AsyncBufRead, AsyncBufReadExt};

use super::compare::Listed;
use super::sort::{Sorted, Sorter, json};
use super::{ReconcileError, SORT_BYTES};
use crate::ingest::source::{Decoder, ImageEvent};
use crate::publish;
use crate::record::{ImageId, Operation, Ordering, Sequence};
use crate::store::Store;

/// The outside world.
pub enum Side {
    /// Every object below a place, named by its key within it.
    Place(Store),
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

impl Side {
    pub(super) fn name(&self) -> String {
        match self {
            Self::Place(store) => store.url().to_string(),
            Self::List { name, .. } => name.clone(),
        }
    }
}

/// Everything that is listed, in order; of a list only ids that begin with `id_prefix`.
pub(super) async fn list(
    side: Side,
    id_prefix: &str,
    folder: &Path,
) -> Result<Sorted, ReconcileError> {
    let in_folder =
        |source| ReconcileError::Folder { folder: folder.display().to_string(), source };
    let mut sorter = Sorter::new(folder, SORT_BYTES);
    match side {
        Side::Place(store) => {
            let mut objects = publish::objects(store);
            while let Some(object) = objects.try_next().await? {
                let listed = Listed::Object {
                    uri: object.uri.into(),
                    changed: object.changed,
                    bytes: object.bytes,
                    picture: object.picture,
                };
                sorter.push(object.key.as_bytes(), &json(&listed)).map_err(in_folder)?;
            }
        }
        Side::List { name, mut lines, decoder } => {
            let (mut line, mut number) = (String::new(), 0);
            loop {
                line.clear();
                number += 1;
                let wrong = |reason: String| ReconcileError::List {
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
                let (id, listed) = listed(line.trim(), &decoder).map_err(wrong)?;
                if id.starts_with(id_prefix) {
                    sorter.push(id.as_bytes(), &json(&listed)).map_err(in_folder)?;
                }
            }
        }
    }
    sorter.finish().map_err(in_folder)
}

/// A line of a list.
fn listed(line: &str, decoder: &Decoder) -> Result<(String, Listed), String> {
    if !line.starts_with('{') {
        let id = ImageId::new(line).map_err(|e| e.to_string())?;
        return Ok((id.into(), Listed::Id));
    }
    let (event, sequence) = if decoder.ordering == Ordering::Offset {
        // Its version would be made up.
        let event: ImageEvent = serde_json::from_str(line).map_err(|e| e.to_string())?;
        ImageId::new(&event.image_id).map_err(|e| e.to_string())?;
        if event.operation == Operation::Upsert && event.uri.is_none() && event.data.is_none() {
            return Err("uri: is missing".into());
        }
        (event, Sequence::from_number(0))
    } else {
        publish::check(line, decoder)?
    };
    if event.operation == Operation::Delete {
        return Err("operation: is delete; a list has what is there".into());
    }
    Ok((event.image_id.clone(), Listed::Event(Box::new(event), sequence)))
}
