//! Previews: small, upright JPEGs of pictures, which every browser can show whatever the format of
//! the original is. `encode` makes them, `cache` keeps the ones that were requested last, and
//! `maker` puts both together with the limits of decoding.

mod cache;
mod encode;
mod maker;

pub use encode::{MAX_PREVIEW_SIDE, Preview, PreviewSide};
pub use maker::{PreviewError, PreviewMaker};
