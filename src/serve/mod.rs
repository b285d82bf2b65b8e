//! (see lib.rs)

pub mod feedback;
pub mod http;
mod page;
pub(crate) mod reader;

pub use reader::Reader;
