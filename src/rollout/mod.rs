//! (see lib.rs)

pub(crate) mod candidate;
pub(crate) mod govern;
pub(crate) mod rollback;

#[cfg(test)]
mod models_tests;
#[cfg(test)]
mod tests;

pub use candidate::{Wanted, set_candidate, withdraw_candidate};
pub use govern::{Promotion, Rules, Standing, examine, history, promote, wait_for_readers};
pub use rollback::WayBack;
