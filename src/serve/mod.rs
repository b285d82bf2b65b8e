//! The query worker: it follows the catalogue's state and tables, answers searches over HTTP with
//! the engines of [`crate::search`], has a page for people, stores users' feedback on results, and says
//! which results are right where that is known.

pub(crate) mod catalogue_follower;
mod error;
pub mod feedback;
pub mod http;
mod page;
mod previews;
pub mod result_judge;

pub use catalogue_follower::CatalogueFollower;
