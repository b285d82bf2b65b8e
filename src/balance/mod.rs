//! (see lib.rs)

pub mod calibration;
pub mod normalise;
pub mod statistics;
