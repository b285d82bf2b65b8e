//! TODO-ROOM

pub(crate) mod bucket_notification;
pub(crate) mod cloud_event;
pub mod format;
pub(crate) mod image_event;
pub mod reembed;
