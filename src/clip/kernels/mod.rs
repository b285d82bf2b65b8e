//! (see lib.rs)

pub(crate) mod lanes;
pub(crate) mod ops;
pub(crate) mod product;
pub(crate) mod reduced;
