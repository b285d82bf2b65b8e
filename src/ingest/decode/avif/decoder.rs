//! Decodes images, grids and the frames of animations.

use image::metadata::Orientation;
use image::{GenericImage as _, RgbImage};

use super::super::deadline::Deadline;
use super::super::error::ImageDecodeError;
use super::super::options::DecodeOptions;
use super::super::pixels::{Pixels, onto_white, premultiplied_onto_white};
use super::colour::{frame_to_alpha, frame_to_rgb};
use super::container::Container;
use super::frame::{Frame, FrameDecoder};

/// Bytes per pixel that decoding needs: three planes of two bytes, their filtered copies, opacity, and RGB of a tile
/// and of the whole.
const BYTES_PER_PIXEL: u64 = 24;

/// Returns the memory that decoding needs, in bytes.
pub fn estimate_memory_bytes(
    bytes: &[u8],
    options: &DecodeOptions,
) -> Result<u64, ImageDecodeError> {
    let layout = Container::read(bytes, options)?.layout;
    let pixels = |width: u32, height: u32| u64::from(width) * u64::from(height);
    let tile = pixels(layout.tile_width, layout.tile_height);
    Ok(pixels(layout.width, layout.height).max(tile) * BYTES_PER_PIXEL)
}

/// Decodes an AVIF file; of an animation the first frame that shows something. Returns how it must be turned.
pub fn decode(
    bytes: &[u8],
    options: &DecodeOptions,
    deadline: Deadline,
) -> Result<(Pixels, Orientation), ImageDecodeError> {
    let container = Container::read(bytes, options)?;
    let new_decoder = || FrameDecoder::new(container.operating_point(), options, deadline);
    let layout = &container.layout;
    let mut image = RgbImage::new(layout.width, layout.height);
    for index in 0..layout.rows * layout.columns {
        let frame = new_decoder()?.decode(&container.tile(index)?)?;
        check_size(&frame, layout.tile_width, layout.tile_height)?;
        let tile = to_rgb(&container, &frame)?;
        let left = index % layout.columns * layout.tile_width;
        let top = index / layout.columns * layout.tile_height;
        if layout.rows * layout.columns == 1 && tile.dimensions() == image.dimensions() {
            image = tile;
        } else {
            let shown_width = layout.tile_width.min(layout.width - left);
            let shown_height = layout.tile_height.min(layout.height - top);
            let shown = image::imageops::crop_imm(&tile, 0, 0, shown_width, shown_height);
            // It fits: the layout is checked.
            let _ = image.copy_from(&*shown, left, top);
        }
    }
    if let Some(alpha) = container.alpha()? {
        let mut alpha = decode_alpha(&mut new_decoder()?, &alpha, &container)?;
        if alpha.iter().all(|opacity| *opacity == 0) {
            let (mut colours, mut opacities) = (new_decoder()?, new_decoder()?);
            for (colour, opacity) in container.frames() {
                let frame = colours.decode(&colour)?;
                alpha = decode_alpha(&mut opacities, &opacity, &container)?;
                if alpha.iter().any(|opacity| *opacity != 0) {
                    check_size(&frame, layout.width, layout.height)?;
                    image = to_rgb(&container, &frame)?;
                    break;
                }
            }
        }
        blend(&mut image, &alpha, container.is_premultiplied());
    }
    Ok((Pixels::whole(image), container.orientation()))
}

fn to_rgb(container: &Container<'_>, frame: &Frame) -> Result<RgbImage, ImageDecodeError> {
    frame_to_rgb(frame, container.colour_coding().unwrap_or_else(|| frame.colour_coding()))
}

fn decode_alpha(
    decoder: &mut FrameDecoder,
    data: &[u8],
    container: &Container<'_>,
) -> Result<Vec<u8>, ImageDecodeError> {
    let frame = decoder.decode(data)?;
    check_size(&frame, container.layout.width, container.layout.height)?;
    Ok(frame_to_alpha(&frame))
}

fn check_size(frame: &Frame, width: u32, height: u32) -> Result<(), ImageDecodeError> {
    if (frame.width(), frame.height()) == (width, height) {
        return Ok(());
    }
    Err(ImageDecodeError::damaged(format!(
        "a part of {}×{} pixels was expected to have {width}×{height}",
        frame.width(),
        frame.height()
    )))
}

/// Blends an image onto white.
fn blend(image: &mut RgbImage, alpha: &[u8], is_premultiplied: bool) {
    let onto = if is_premultiplied { premultiplied_onto_white } else { onto_white };
    for (pixel, opacity) in image.pixels_mut().zip(alpha) {
        pixel.0 = pixel.0.map(|colour| onto(colour, *opacity));
    }
}
