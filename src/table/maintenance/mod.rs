//! (see lib.rs)

pub(crate) mod compact;
pub(crate) mod lease;
pub mod schedule;
pub mod upkeep;
pub(crate) mod verify;
