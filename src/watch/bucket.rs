//! Lists a bucket, or a prefix of one.

use futures::TryStreamExt;

use super::error::WatchError;
use super::file_kind::{KindByName, kind_by_name, no_picture};
use super::item::{FoundItem, FoundPicture, ItemVersion, SkipReason, image_id_from_key};
use crate::publish::{self, ListedObject};
use crate::store::Store;

/// Calls `on_item` for every object, until it returns false. Objects are told apart by their names: reading
/// the first bytes of each would cost a request.
pub async fn list_bucket(
    store: &Store,
    id_prefix: &str,
    on_item: &mut (dyn FnMut(FoundItem) -> bool + Send),
) -> Result<(), WatchError> {
    let mut objects = publish::list_objects(store.clone());
    while let Some(object) = objects.try_next().await? {
        let content = match kind_by_name(&object.key) {
            KindByName::Picture => picture_from_object(&object, id_prefix),
            KindByName::UnreadPicture(reason) => Err(reason),
            KindByName::Unknown => Err(no_picture()),
        };
        if !on_item(FoundItem { path: object.uri.to_string(), content }) {
            return Ok(());
        }
    }
    Ok(())
}

fn picture_from_object(object: &ListedObject, id_prefix: &str) -> Result<FoundPicture, SkipReason> {
    Ok(FoundPicture {
        image_id: image_id_from_key(id_prefix, &object.key)?,
        uri: object.uri.to_string(),
        version: ItemVersion::new(Some(object.last_modified), object.size_bytes),
        attributes: std::collections::BTreeMap::new(),
    })
}
