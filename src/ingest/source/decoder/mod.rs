//! (see lib.rs)

pub mod again;
pub(crate) mod bucket;
pub(crate) mod cloud_event;
pub mod format;
pub(crate) mod json;
