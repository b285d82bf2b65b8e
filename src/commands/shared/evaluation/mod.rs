//! What commands that print reports of evaluations have in common.

pub mod thumbnails;
