//! Limits of decoding, and what becomes of damaged images.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::error::ImageDecodeError;
use crate::ingest::metadata::{METADATA_MAX_BYTES_RANGE, MetadataCharset, MetadataField};
use crate::validate;

/// Raised when the same file decodes to other pixels than before, or is accepted where it was rejected.
const DECODER_EDITION: u32 = 1;

/// What becomes of an image of which a part cannot be decoded.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum DamagedImages {
    /// It is rejected as `image_damaged`: nothing that a decoder had to guess is stored.
    #[default]
    Refuse,
    /// It is accepted if at least `min_decoded_share` of its pixels could be decoded; the others are grey.
    Accept,
}

/// Limits of image decoding, and what is read of metadata.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct DecodeOptions {
    /// Maximum width or height, in pixels.
    pub max_side: u32,
    /// Maximum number of pixels.
    pub max_pixels: u64,
    /// Maximum memory of all images that are decoded concurrently, in MiB. An image that needs more than
    /// that by itself is decoded alone.
    pub budget_mib: u32,
    /// Maximum time for decoding one image, in milliseconds. One that takes longer is rejected as `decode_timed_out`;
    /// a photograph takes some 100.
    pub timeout_ms: u64,
    /// What becomes of an image of which a part cannot be decoded, because its file is cut off or overwritten:
    /// `refuse` dead-letters it as `image_damaged`; `accept` stores it if `min_decoded_share` of its pixels could be
    /// decoded. The rule is stored with each row (`decode_rule`).
    pub damaged: DamagedImages,
    /// With `damaged = "accept"`, the share of the pixels that must be decoded, 0.01 to 1; the rest is grey. A format
    /// whose decoder cannot say which part it decoded is rejected all the same.
    pub min_decoded_share: f64,
    /// Fields of the image's own metadata (EXIF, IPTC, XMP) that become attributes of the same name:
    /// `title`, `caption`, `keywords`, `creator`, `date`, `rights`. Each must be declared in `[attributes]`
    /// as `text`, or `date` as `time`. An attribute that the event has is not replaced.
    pub metadata: Vec<MetadataField>,
    /// Maximum size of an attribute from metadata, in bytes; longer texts are cut.
    pub metadata_max_bytes: usize,
    /// How texts in metadata are read that neither say what their character set is nor are UTF-8:
    /// `latin1`, `mac_roman`, or `detect` for the one of these two that gives more letters where words have
    /// letters.
    pub metadata_charset: MetadataCharset,
}

impl Default for DecodeOptions {
    fn default() -> Self {
        Self {
            max_side: 20_000,
            max_pixels: 100_000_000,
            budget_mib: 1024,
            timeout_ms: 60_000,
            damaged: DamagedImages::Refuse,
            min_decoded_share: 0.9,
            metadata: Vec::new(),
            metadata_max_bytes: 1024,
            metadata_charset: MetadataCharset::Detect,
        }
    }
}

impl DecodeOptions {
    /// Returns one line per invalid option.
    pub fn validate(&self) -> Vec<String> {
        let mut problems = Vec::new();
        validate::check_range(&mut problems, "max_side", self.max_side.into(), 16, 65_535);
        validate::check_range(&mut problems, "max_pixels", self.max_pixels, 256, 1_000_000_000);
        validate::check_range(&mut problems, "budget_mib", self.budget_mib.into(), 64, 1 << 20);
        validate::check_range(&mut problems, "timeout_ms", self.timeout_ms, 100, 3_600_000);
        let (min, max) = METADATA_MAX_BYTES_RANGE.into_inner();
        let max_bytes = self.metadata_max_bytes as u64;
        validate::check_range(&mut problems, "metadata_max_bytes", max_bytes, min, max);
        if !(0.01..=1.0).contains(&self.min_decoded_share) {
            problems.push(format!(
                "min_decoded_share = {} is not between 0.01 and 1",
                self.min_decoded_share
            ));
        }
        problems
    }

    /// Returns the rule by which images are decoded, as it is stored with each row: the edition of the decoders,
    /// and what becomes of damaged images.
    pub fn rule(&self) -> String {
        match self.damaged {
            DamagedImages::Refuse => format!("{DECODER_EDITION} refuse"),
            DamagedImages::Accept => {
                format!("{DECODER_EDITION} accept {}", self.min_decoded_share)
            }
        }
    }

    /// Fails if an image has too many pixels, or none.
    pub(super) fn check_dimensions(&self, width: u32, height: u32) -> Result<(), ImageDecodeError> {
        if width == 0 || height == 0 {
            return Err(ImageDecodeError::Damaged("the image has no pixels".into()));
        }
        let pixels = u64::from(width) * u64::from(height);
        if width > self.max_side || height > self.max_side || pixels > self.max_pixels {
            return Err(ImageDecodeError::TooLarge {
                width,
                height,
                max_side: self.max_side,
                max_pixels: self.max_pixels,
            });
        }
        Ok(())
    }

    /// Accepts a part of an image if the rule for damaged images allows it; otherwise returns `damage`.
    pub(super) fn check_share(
        &self,
        share: f64,
        damage: ImageDecodeError,
    ) -> Result<(), ImageDecodeError> {
        if self.accepts_damaged() && share >= self.min_decoded_share {
            return Ok(());
        }
        match damage {
            ImageDecodeError::Damaged(reason) if self.accepts_damaged() => {
                Err(ImageDecodeError::Damaged(format!(
                    "{reason}; {:.0} % of it was decoded, and decode.min_decoded_share is {:.0} %",
                    100.0 * share,
                    100.0 * self.min_decoded_share
                )))
            }
            damage => Err(damage),
        }
    }

    /// Whether a part of a damaged image may be stored.
    pub(super) fn accepts_damaged(&self) -> bool {
        self.damaged == DamagedImages::Accept
    }
}
