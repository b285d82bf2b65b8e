//! TODO-ROOM

pub mod calibration;
pub mod normalise;
pub mod statistics;
