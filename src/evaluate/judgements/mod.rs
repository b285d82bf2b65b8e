//! (see lib.rs)

pub(crate) mod asked;
pub(crate) mod probes;
