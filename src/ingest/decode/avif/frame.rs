//! Decodes AV1.

use re_rav1d::pixel::{MatrixCoefficients, YUVRange};
use re_rav1d::{Decoder, Error, Picture, PixelLayout, PlanarImageComponent, Plane, Settings};

use super::super::error::ImageDecodeError;
use super::super::format::Format;

/// How colours are coded.
#[derive(Debug, Clone, Copy)]
pub struct ColourCoding {
    /// By table 4 of H.273.
    pub matrix_coefficients: u16,
    /// Whether black is 0, and not 16 of 255.
    pub is_full_range: bool,
}

/// Decodes an image of a known size on the caller's thread. It cannot be interrupted: what it may take is bounded by
/// its size.
pub fn decode_frame(
    data: &[u8],
    (width, height): (u32, u32),
    operating_point: u8,
) -> Result<Frame, ImageDecodeError> {
    if data.is_empty() {
        return Err(ImageDecodeError::damaged("an image has no bytes"));
    }
    let mut settings = Settings::new();
    settings.set_n_threads(1);
    settings.set_max_frame_delay(1);
    settings.set_operating_point(operating_point.into());
    // Of several layers the best.
    settings.set_all_layers(false);
    // In pixels; the sides are checked.
    settings.set_frame_size_limit(width.saturating_mul(height));
    let mut decoder = Decoder::with_settings(&settings).map_err(convert_error)?;
    let mut sent = decoder.send_data(data.to_vec(), None, None, None);
    let picture = loop {
        match sent {
            Err(error) if !error.is_again() => return Err(convert_error(error)),
            _ => {}
        }
        match decoder.get_picture() {
            Ok(picture) => break picture,
            // It wants more, and there is some.
            Err(Error::Again) if sent.is_err() => sent = decoder.send_pending_data(),
            Err(Error::Again) => return Err(ImageDecodeError::damaged("it ends early")),
            Err(error) => return Err(convert_error(error)),
        }
    };
    let frame = Frame { picture };
    if (frame.width(), frame.height()) == (width, height) {
        return Ok(frame);
    }
    Err(ImageDecodeError::damaged(format!(
        "it states {width}×{height} pixels and has {}×{}",
        frame.width(),
        frame.height()
    )))
}

/// A decoded frame.
pub struct Frame {
    picture: Picture,
}

impl Frame {
    pub fn width(&self) -> u32 {
        self.picture.width()
    }

    pub fn height(&self) -> u32 {
        self.picture.height()
    }

    /// Bits per sample: 8, 10 or 12.
    pub fn bits(&self) -> usize {
        self.picture.bit_depth()
    }

    /// How many pixels share a colour, across and down; `None` if it is grey.
    pub fn sharing(&self) -> Option<(usize, usize)> {
        match self.picture.pixel_layout() {
            PixelLayout::I400 => None,
            PixelLayout::I420 => Some((2, 2)),
            PixelLayout::I422 => Some((2, 1)),
            PixelLayout::I444 => Some((1, 1)),
        }
    }

    /// How colours are coded, by the header of AV1.
    pub fn colour_coding(&self) -> ColourCoding {
        ColourCoding {
            matrix_coefficients: match self.picture.matrix_coefficients() {
                MatrixCoefficients::Identity => 0,
                MatrixCoefficients::BT709 => 1,
                MatrixCoefficients::Reserved => 3,
                MatrixCoefficients::BT470M => 4,
                MatrixCoefficients::BT470BG => 5,
                MatrixCoefficients::ST170M => 6,
                MatrixCoefficients::ST240M => 7,
                MatrixCoefficients::YCgCo => 8,
                MatrixCoefficients::BT2020NonConstantLuminance => 9,
                MatrixCoefficients::BT2020ConstantLuminance => 10,
                MatrixCoefficients::ST2085 => 11,
                MatrixCoefficients::ChromaticityDerivedNonConstantLuminance => 12,
                MatrixCoefficients::ChromaticityDerivedConstantLuminance => 13,
                MatrixCoefficients::ICtCp => 14,
                MatrixCoefficients::Unspecified => 2,
            },
            is_full_range: self.picture.color_range() == YUVRange::Full,
        }
    }

    pub fn brightness(&self) -> Samples {
        self.samples(PlanarImageComponent::Y)
    }

    /// Both colours of a frame that is not grey.
    pub fn colours(&self) -> [Samples; 2] {
        [self.samples(PlanarImageComponent::U), self.samples(PlanarImageComponent::V)]
    }

    fn samples(&self, component: PlanarImageComponent) -> Samples {
        Samples {
            plane: self.picture.plane(component),
            stride: self.picture.stride(component) as usize,
            is_wide: self.bits() > 8,
        }
    }
}

/// The samples of a plane.
pub struct Samples {
    plane: Plane,
    /// Bytes per row.
    stride: usize,
    is_wide: bool,
}

impl Samples {
    /// Writes the first samples of a row.
    pub fn read_row(&self, y: usize, row: &mut [u16]) {
        let bytes = &self.plane[y * self.stride..];
        if self.is_wide {
            for (sample, pair) in row.iter_mut().zip(bytes.chunks_exact(2)) {
                *sample = u16::from_ne_bytes([pair[0], pair[1]]);
            }
        } else {
            for (sample, byte) in row.iter_mut().zip(bytes) {
                *sample = u16::from(*byte);
            }
        }
    }
}

fn convert_error(error: Error) -> ImageDecodeError {
    match error {
        Error::UnsupportedBitstream => {
            ImageDecodeError::unsupported(Format::Avif.name(), "this kind of AV1")
        }
        Error::NotEnoughMemory => ImageDecodeError::OutOfBounds(error.to_string()),
        error => ImageDecodeError::damaged(error.to_string()),
    }
}
