//! Why bytes cannot be decoded as an image.

use std::borrow::Cow;

/// Why bytes cannot be decoded as an image. Permanent: the same bytes fail again (if they take
/// too long, unless the machine was busy).
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ImageDecodeError {
    /// Not an image of a known format.
    #[error("not an image of a known format ({})", super::format::describe_readable_formats())]
    UnknownFormat,
    /// A known format, or a variant of one, that is not read.
    #[error(
        "{format}{}{variant} is not supported; convert the image to JPEG or PNG",
        if variant.is_empty() { "" } else { ", " }
    )]
    Unsupported {
        /// The format, for example `TIFF`.
        format: &'static str,
        /// What about it is not read; empty if nothing of the format is.
        variant: Cow<'static, str>,
    },
    /// The image has more pixels than allowed.
    #[error(
        "{width}×{height} pixels are more than decode.max_side = {max_side} or decode.max_pixels = {max_pixels}"
    )]
    TooLarge {
        /// Width in pixels.
        width: u32,
        /// Height in pixels.
        height: u32,
        /// `decode.max_side`.
        max_side: u32,
        /// `decode.max_pixels`.
        max_pixels: u64,
    },
    /// Decoding needs more of something than allowed: scans, frames or memory.
    #[error("decoding takes too much: {0}")]
    OutOfBounds(String),
    /// The file is damaged or incomplete.
    #[error("the image is damaged: {0}")]
    Damaged(String),
    /// Decoding takes longer than allowed.
    #[error(
        "decoding takes longer than decode.timeout_ms = {timeout_ms}; convert the image, or raise the limit"
    )]
    TimedOut {
        /// `decode.timeout_ms`.
        timeout_ms: u64,
    },
    /// The decoder failed in a way that it should not.
    #[error("the decoder of {format} failed: {message}")]
    Panicked {
        /// The format.
        format: &'static str,
        /// What the decoder said.
        message: String,
    },
}

impl ImageDecodeError {
    /// Stable code for headers, logs and metrics.
    pub fn code(&self) -> &'static str {
        match self {
            Self::UnknownFormat => "unknown_image_format",
            Self::Unsupported { .. } => "unsupported_format",
            Self::TooLarge { .. } | Self::OutOfBounds(_) => "image_too_large",
            Self::Damaged(_) => "image_damaged",
            Self::TimedOut { .. } => "decode_timed_out",
            Self::Panicked { .. } => "decoder_panicked",
        }
    }

    /// Names a variant of a format that is not read.
    pub(super) fn unsupported(format: &'static str, variant: impl Into<Cow<'static, str>>) -> Self {
        Self::Unsupported { format, variant: variant.into() }
    }

    /// Says what is damaged.
    pub(super) fn damaged(reason: impl Into<String>) -> Self {
        Self::Damaged(reason.into())
    }
}
