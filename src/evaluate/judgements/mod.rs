//! TODO-ROOM

pub(crate) mod judged_queries;
pub(crate) mod probes;
