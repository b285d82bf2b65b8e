//! Decodes images and grids.

use image::RgbImage;
use image::imageops::replace;
use image::metadata::Orientation;

use super::super::deadline::Deadline;
use super::super::error::ImageDecodeError;
use super::super::format::Format;
use super::super::options::DecodeOptions;
use super::super::pixels::{Pixels, onto_white, premultiplied_onto_white};
use super::colour::{frame_to_alpha, frame_to_rgb};
use super::container::Container;
use super::frame::decode_frame;

/// Bytes per pixel that decoding needs: three planes of two bytes, their filtered copies, opacity, and RGB of a tile
/// and of the whole.
const BYTES_PER_PIXEL: u64 = 24;

/// Returns the memory that decoding needs, in bytes.
pub fn estimate_memory_bytes(
    bytes: &[u8],
    options: &DecodeOptions,
) -> Result<u64, ImageDecodeError> {
    let container = Container::read(bytes, options)?;
    let pixels = |width: u32, height: u32| u64::from(width) * u64::from(height);
    let tile = pixels(container.tile_width, container.tile_height);
    Ok(pixels(container.width, container.height).max(tile) * BYTES_PER_PIXEL)
}

/// Decodes an AVIF file; of an animation the first image. Returns how it must be turned.
pub fn decode(
    bytes: &[u8],
    options: &DecodeOptions,
    deadline: Deadline,
) -> Result<(Pixels, Orientation), ImageDecodeError> {
    let container = Container::read(bytes, options)?;
    let tile_size = (container.tile_width, container.tile_height);
    let decode_tile = |data: &[u8]| {
        deadline.check()?;
        let frame = decode_frame(data, tile_size, container.operating_point)?;
        frame_to_rgb(&frame, container.colour_coding.unwrap_or_else(|| frame.colour_coding()))
    };
    let mut image = match &container.tiles[..] {
        [whole] if tile_size == (container.width, container.height) => decode_tile(whole)?,
        tiles => {
            let mut image = RgbImage::new(container.width, container.height);
            for (tile, index) in tiles.iter().zip(0..) {
                let (column, row) = (index % container.columns, index / container.columns);
                let at = (column * tile_size.0, row * tile_size.1);
                // What exceeds the image is left out.
                replace(&mut image, &decode_tile(tile)?, at.0.into(), at.1.into());
            }
            image
        }
    };
    if let Some(alpha) = container.alpha {
        deadline.check()?;
        let size = (container.width, container.height);
        let alpha = frame_to_alpha(&decode_frame(alpha, size, container.operating_point)?);
        if container.is_animated && alpha.iter().all(|opacity| *opacity == 0) {
            let variant = "an animation whose first image shows nothing";
            return Err(ImageDecodeError::unsupported(Format::Avif.name(), variant));
        }
        let onto = if container.is_premultiplied { premultiplied_onto_white } else { onto_white };
        for (pixel, opacity) in image.pixels_mut().zip(alpha) {
            pixel.0 = pixel.0.map(|colour| onto(colour, opacity));
        }
    }
    Ok((Pixels::whole(image), container.orientation))
}
