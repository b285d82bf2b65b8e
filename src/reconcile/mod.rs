//! Compares the table with a bucket, a folder or a list, and repairs what lost events left behind. In the
//! order of the work:
//!
//! 1. `listing` reads what exists, `current_rows` what is stored, and `scope` selects the stored
//!    images that the listing covers; each side is brought into the order of its keys by `sort`;
//! 2. `comparison` reads both sides in parallel, so that memory does not grow with their size, and
//!    compares each key by the rules in `difference`;
//! 3. the events that repair differences are written to a file, and sent only after everything was
//!    compared: if a listing lacks too much, the fault is probably in the listing.

mod comparison;
mod current_rows;
mod difference;
mod error;
mod images;
mod listing;
mod report;
mod scope;
mod sort;

pub use comparison::{Comparison, compare_with_listing};
pub use current_rows::{CurrentRows, read_current_rows};
pub use difference::{CompareRules, DifferenceKind, Finding};
pub use error::ReconcileError;
pub use listing::ListingSource;
pub use report::ReconcileReport;
pub use sort::default_temp_folder;

#[cfg(test)]
mod tests;
