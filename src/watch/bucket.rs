//! Lists a bucket, or a prefix of one.

use std::collections::BTreeMap;

use futures::TryStreamExt;

use super::error::WatchError;
use super::file_kind::{KindByName, kind_by_name, no_picture};
use super::item::{FoundItem, FoundPicture, ItemVersion, SkipReason, image_id_from_key};
use crate::store::{ImageStore, ListedObject};

/// Calls `on_item` for every object, until it returns false. Objects are told apart by their names: reading
/// the first bytes of each would cost a request.
pub async fn list_bucket(
    store: &ImageStore,
    id_prefix: &str,
    on_item: &mut (dyn FnMut(FoundItem) -> bool + Send),
) -> Result<(), WatchError> {
    let mut objects = store.list();
    while let Some(object) = objects.try_next().await? {
        let content = match kind_by_name(&object.key_text()) {
            KindByName::Picture => picture_from_object(&object, id_prefix),
            KindByName::UnreadPicture(reason) => Err(reason),
            KindByName::Unknown => Err(no_picture()),
        };
        let path = match &object.uri {
            Ok(uri) => uri.to_string(),
            Err(_) => format!("{}: {:?}", store.url(), object.key_text()),
        };
        if !on_item(FoundItem { path, content }) {
            return Ok(());
        }
    }
    Ok(())
}

fn picture_from_object(object: &ListedObject, id_prefix: &str) -> Result<FoundPicture, SkipReason> {
    let uri = object
        .uri
        .as_ref()
        .map_err(|reason| SkipReason::failure("a key that no address can have", reason.clone()))?;
    Ok(FoundPicture {
        image_id: image_id_from_key(id_prefix, &object.key_text())?,
        uri: uri.to_string(),
        version: ItemVersion::new(Some(object.last_modified), object.size_bytes),
        attributes: BTreeMap::new(),
    })
}
