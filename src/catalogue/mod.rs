//! The catalogue as a whole: its state, the reports of its query workers, and the removal of generations
//! that it no longer uses. All of it is small JSON objects next to the tables.

pub(crate) mod replicas;
pub(crate) mod retired_generations;
pub(crate) mod state;

pub use replicas::{REPLICA_REPORT_INTERVAL, ReplicaReport, ReplicaReports};
pub use retired_generations::{RetiredGeneration, list_retired_and_remove_expired};
pub use state::{
    CatalogueState, PromptSetRecord, RolloutCandidate, ServingConfig, StandbyGeneration,
    StateChange, StateStore,
};
