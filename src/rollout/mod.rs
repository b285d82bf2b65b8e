//! Changes what a catalogue serves, one recorded revision per change: sets a candidate, promotes it
//! after checks, or rolls back to what was live before. [`check_promotion`] lists what forbids a
//! promotion; `commands/rollout/promote.rs` refuses it. Each change is a write to the catalogue's
//! state; query workers follow it and report when they serve it.

mod bank_check;
pub(crate) mod candidate;
mod error;
mod newest_state;
pub(crate) mod promotion;
pub(crate) mod rollback;

#[cfg(test)]
mod model_switch_tests;
#[cfg(test)]
mod tests;

pub use bank_check::describe_measured_bank;
pub use candidate::{CandidateSpec, set_candidate, withdraw_candidate};
pub use error::RolloutError;
pub use promotion::{
    PromotionCheck, PromotionRules, ReplicaReadiness, check_promotion, list_revisions, promote,
    wait_for_replicas,
};
pub use rollback::RollbackPlan;
