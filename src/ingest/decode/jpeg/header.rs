//! The segments of a JPEG before its first scan.

use std::ops::Range;

use super::super::error::ImageDecodeError;
use crate::ingest::containers::{JpegSegment, jpeg_segments};

/// Most scans of a progressive JPEG: real ones have some ten, and each costs a pass over the image.
pub const MAX_SCANS: u32 = 500;

/// What a decoder needs to know before it reads pixels.
#[derive(Debug)]
pub struct JpegHeader {
    pub width: u32,
    pub height: u32,
    /// Bits per sample.
    pub precision: u8,
    pub process: Process,
    /// Horizontal and vertical sampling factor of each component.
    pub sampling: Vec<(u8, u8)>,
    /// Whether the first scan has all components.
    pub is_interleaved: bool,
    /// Where the segments are that pixels depend on.
    segments: Vec<Range<usize>>,
    /// Where the first scan begins.
    scan_start: usize,
}

/// How a JPEG is coded.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Process {
    pub is_progressive: bool,
    pub is_arithmetic: bool,
    pub is_lossless: bool,
}

impl JpegHeader {
    /// Reads the segments up to the first scan.
    pub fn read(bytes: &[u8]) -> Result<Self, ImageDecodeError> {
        let mut frame = None;
        let mut segments = Vec::new();
        for JpegSegment { marker, payload, range } in jpeg_segments(bytes) {
            match marker {
                0xD8 => {
                    return Err(ImageDecodeError::unsupported("JPEG", "two starts of an image"));
                }
                0xC0..=0xC3 | 0xC5..=0xC7 | 0xC9..=0xCB | 0xCD..=0xCF | 0xDE | 0xF7 => {
                    if frame.is_some() {
                        return Err(ImageDecodeError::unsupported("JPEG", "two frames"));
                    }
                    frame = Some(Frame::read(marker, payload)?);
                }
                0xDA => {
                    let frame = frame.ok_or_else(|| {
                        ImageDecodeError::damaged("a scan precedes the frame that it belongs to")
                    })?;
                    let scan_components = payload.first().copied().unwrap_or_default();
                    return Ok(Self {
                        width: frame.width,
                        height: frame.height,
                        precision: frame.precision,
                        process: frame.process,
                        is_interleaved: usize::from(scan_components) == frame.sampling.len(),
                        sampling: frame.sampling,
                        segments,
                        scan_start: range.start,
                    });
                }
                _ => {}
            }
            // Not comments and data of applications, but for JFIF and Adobe, which say what colours mean.
            if !matches!(marker, 0xE1..=0xED | 0xEF | 0xFE) {
                segments.push(range);
            }
        }
        Err(ends_early())
    }

    /// Returns the file without what pixels do not depend on: bytes between segments, comments, profiles.
    pub fn without_ballast(&self, bytes: &[u8]) -> Vec<u8> {
        let mut kept = Vec::with_capacity(bytes.len());
        kept.extend_from_slice(&bytes[..2]);
        for segment in &self.segments {
            kept.extend_from_slice(&bytes[segment.clone()]);
        }
        kept.extend_from_slice(&bytes[self.scan_start..]);
        kept
    }

    /// Whether one pass over the file decodes one part of the image after the other.
    pub fn is_sequential(&self) -> bool {
        self.is_interleaved && !self.process.is_progressive && !self.process.is_arithmetic
    }
}

struct Frame {
    width: u32,
    height: u32,
    precision: u8,
    process: Process,
    sampling: Vec<(u8, u8)>,
}

impl Frame {
    fn read(marker: u8, payload: &[u8]) -> Result<Self, ImageDecodeError> {
        let unsupported =
            |variant: &'static str| Err(ImageDecodeError::unsupported("JPEG", variant));
        let process = match marker {
            0xC0 | 0xC1 => {
                Process { is_progressive: false, is_arithmetic: false, is_lossless: false }
            }
            0xC2 => Process { is_progressive: true, is_arithmetic: false, is_lossless: false },
            0xC3 => Process { is_progressive: false, is_arithmetic: false, is_lossless: true },
            0xC9 => Process { is_progressive: false, is_arithmetic: true, is_lossless: false },
            0xCA => Process { is_progressive: true, is_arithmetic: true, is_lossless: false },
            0xCB => return unsupported("lossless with arithmetic coding"),
            0xF7 => return unsupported("JPEG-LS"),
            _ => return unsupported("hierarchical"),
        };
        let [precision, h1, h0, w1, w0, components, rest @ ..] = payload else {
            return Err(ends_early());
        };
        let height = u32::from(u16::from_be_bytes([*h1, *h0]));
        if height == 0 {
            return unsupported("its height follows the first scan (DNL)");
        }
        if !matches!(components, 1 | 3 | 4) {
            let variant = format!("{components} components");
            return Err(ImageDecodeError::unsupported("JPEG", variant));
        }
        let sampling: Vec<(u8, u8)> = rest
            .chunks_exact(3)
            .take(usize::from(*components))
            .map(|component| (component[1] >> 4, component[1] & 15))
            .collect();
        let is_valid = |n: u8| (1..=4).contains(&n);
        if sampling.len() != usize::from(*components)
            || !sampling.iter().all(|(h, v)| is_valid(*h) && is_valid(*v))
        {
            return Err(ImageDecodeError::damaged("its sampling factors are invalid"));
        }
        Ok(Self {
            width: u32::from(u16::from_be_bytes([*w1, *w0])),
            height,
            precision: *precision,
            process,
            sampling,
        })
    }
}

fn ends_early() -> ImageDecodeError {
    ImageDecodeError::damaged("it ends before its first scan")
}
