//! What archives write into their pictures: title, caption, keywords, creator, date and rights.
//!
//! `container` finds the blocks of a file that have metadata, whatever its format; `exif`, `iptc`
//! and `xmp` read them, with `charset` and `date` for the old forms of texts and times. The three
//! standards overlap: `reconcile` decides between them as the guidelines of the Metadata Working Group
//! say, and `attributes` makes attributes of the result.
//!
//! Metadata never fail an image: what cannot be read is not there. Everything that is read has a bound,
//! since the files come from anywhere.

mod attributes;
mod boxes;
mod charset;
mod container;
mod date;
mod exif;
mod iptc;
mod reconcile;
mod xmp;

pub use attributes::{
    METADATA_MAX_BYTES_RANGE, MetadataField, check_declarations, metadata_attributes,
};
pub use charset::MetadataCharset;
pub use reconcile::{PhotoMetadata, read_metadata};

#[cfg(test)]
mod tests;
