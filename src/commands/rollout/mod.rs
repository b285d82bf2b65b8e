//! The commands that change what is served: `bsap candidate`, `bsap promote`, `bsap rollback`,
//! `bsap history`.

pub mod candidate;
pub mod history;
pub mod promote;
mod readiness;
pub mod rollback;

pub use candidate::CandidateArgs;
pub use history::HistoryArgs;
pub use promote::PromoteArgs;
pub use rollback::RollbackArgs;
