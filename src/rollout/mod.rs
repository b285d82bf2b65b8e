//! TODO-ROOM

pub(crate) mod candidate;
pub(crate) mod promotion;
pub(crate) mod rollback;

#[cfg(test)]
mod model_switch_tests;
#[cfg(test)]
mod tests;

pub use candidate::{CandidateSpec, set_candidate, withdraw_candidate};
pub use promotion::{
    PromotionCheck, PromotionRules, ReplicaReadiness, check_promotion, list_revisions, promote,
    wait_for_replicas,
};
pub use rollback::RollbackPlan;
