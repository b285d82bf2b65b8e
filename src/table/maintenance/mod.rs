//! TODO-ROOM

pub(crate) mod compact;
pub(crate) mod lease;
pub mod schedule;
pub mod vacuum;
pub(crate) mod verify;
