//! (see lib.rs)

pub(crate) mod readers;
pub(crate) mod retired;
pub(crate) mod state;

pub use readers::{REPORT_EVERY, Readers, Report};
pub use retired::{Retired, retired};
pub use state::{
    Beside, Candidate, CatalogueState, Change, Generation, PromptSetRecord, Serving, StateStore,
};
