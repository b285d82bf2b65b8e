//! Exact ranking of a snapshot.

mod batch_scanner;
mod bounds;
mod exact_dot_product;
mod hit;
mod no_match;
mod pass;
mod rank;
mod request;
mod task;
mod top_scores;

pub(crate) use batch_scanner::{BatchScanner, ScanGoal, ScanReply};
pub(crate) use hit::TopK;
pub(crate) use request::ScanRequest;
#[cfg(test)]
pub(crate) use {
    pass::scan_snapshot,
    rank::ExactRanker,
    task::{BACKGROUND_GROUP_STRIDE, split_into_tasks},
};

pub use hit::Hit;
pub use no_match::NoMatchVerdict;
