//! Brings statistics and embeddings to images that are stored already: statistics of a new prompt
//! set, computed from stored embeddings, and a standby generation of a new model, filled by events
//! that have the images embedded again. Requests for statistics come from the command line or from
//! the control topic. [`import`] stores embeddings that files have already.

mod claims;
pub(crate) mod control_topic;
mod error;
pub(crate) mod generation_gap;
pub mod import;
mod prompt_set_follower;
mod prompt_sets;
pub(crate) mod standby_generation;
pub(crate) mod statistics_backfill;

pub use control_topic::{ControlConsumer, ControlRequest};
pub use error::BackfillError;
pub use generation_gap::GenerationGap;
pub use prompt_set_follower::follow_prompt_sets;
pub use prompt_sets::{add_prompt_set, retire_prompt_set};
pub use standby_generation::{ReembedPlan, set_up_standby, withdraw_standby};
pub use statistics_backfill::{StatisticsBackfill, StatisticsBackfillResult};
