//! Decodes images: from bytes to pixels.
//!
//! The format is recognised by the content, never by a name. Dimensions are checked before pixels are
//! allocated. The orientation that EXIF or XMP state is applied, and transparent pixels are blended onto white:
//! the reference preprocessing of CLIP does neither, but people see the image that way. Colour profiles (ICC) and
//! gamma are ignored, as the reference ignores them.
//!
//! An image is decoded right or rejected by the name of its format and variant: a decoder is only given what
//! the comparison with reference pixels (`tests/decoding`) has shown that it decodes right.

#[cfg(feature = "avif")]
mod avif;
mod deadline;
mod decoder;
mod error;
mod format;
mod heic;
mod jpeg;
mod jpeg_xl;
mod options;
mod orientation;
mod permits;
mod pixels;
mod raster;
mod text;
mod tiff;
mod tiff_directory;

pub use decoder::{DecodedImage, decode_image, decode_with_report, estimate_decode_memory_bytes};
pub use error::ImageDecodeError;
pub use format::{Format, READABLE_FORMATS, Recognised, describe_readable_formats, recognise};
pub use options::{DamagedImages, DecodeOptions};
pub use permits::{DecodePermit, DecodePermits};
pub use text::{decode_base64, decode_data_url, decode_image_text, is_data_url};

#[cfg(test)]
mod tests;
