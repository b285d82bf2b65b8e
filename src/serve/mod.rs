//! TODO-ROOM

pub(crate) mod catalogue_follower;
pub mod feedback;
pub mod http;
mod page;

pub use catalogue_follower::CatalogueFollower;
