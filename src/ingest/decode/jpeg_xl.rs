//! JPEG XL, by the crate `jxl`.

use jxl::api::{
    AlphaMode, Endianness, Event, JxlColorEncoding, JxlColorProfile, JxlColorType, JxlDataFormat,
    JxlDecoder, JxlDecoderOptions, JxlOutputBuffer, JxlPixelFormat, JxlTransferFunction,
    ProfileLevel,
};
use jxl::error::Error;
use jxl::image::OwnedRawImage;

use super::deadline::Deadline;
use super::error::ImageDecodeError;
use super::format::Format;
use super::options::DecodeOptions;
use super::pixels::{MAX_FRAMES, Pixels, onto_white, rgb_image};

/// Bytes per pixel that decoding needs: colours as floats, three times on the way through its filters, and RGBA.
const BYTES_PER_PIXEL: u64 = 40;
/// Samples per pixel that are decoded: colours, opacity and what else a file has, such as depth.
const MAX_SAMPLES_PER_PIXEL: u64 = 8;

/// Returns the memory that decoding needs, in bytes.
pub fn estimate_memory_bytes(
    bytes: &[u8],
    options: &DecodeOptions,
) -> Result<u64, ImageDecodeError> {
    let mut input = bytes;
    let decoder = open(&mut input, options)?;
    let (width, height) = dimensions(&decoder, options)?;
    Ok(u64::from(width) * u64::from(height) * BYTES_PER_PIXEL)
}

fn open(input: &mut &[u8], options: &DecodeOptions) -> Result<JxlDecoder, ImageDecodeError> {
    let mut settings = JxlDecoderOptions::default();
    let samples = options.max_pixels.saturating_mul(MAX_SAMPLES_PER_PIXEL);
    settings.sample_limit = Some(usize::try_from(samples).unwrap_or(usize::MAX));
    settings.alpha_mode = AlphaMode::Unpremultiplied;
    settings.max_profile_level = ProfileLevel::Main10;
    let mut decoder = JxlDecoder::new(settings);
    match decoder.process(input, None, None).map_err(convert_error)? {
        Event::BasicInfo => Ok(decoder),
        _ => Err(ends_early()),
    }
}

fn dimensions(
    decoder: &JxlDecoder,
    options: &DecodeOptions,
) -> Result<(u32, u32), ImageDecodeError> {
    let (width, height) = decoder.basic_info().map_or((0, 0), |info| info.size);
    let side = |pixels: usize| u32::try_from(pixels).unwrap_or(u32::MAX);
    options.check_dimensions(side(width), side(height))?;
    Ok((side(width), side(height)))
}

/// Decodes a JPEG XL file, upright; of an animation the first frame that shows something.
pub fn decode(
    bytes: &[u8],
    options: &DecodeOptions,
    deadline: Deadline,
) -> Result<Pixels, ImageDecodeError> {
    let mut input = bytes;
    let mut decoder = open(&mut input, options)?;
    let (width, height) = dimensions(&decoder, options)?;
    let extra_channels = decoder.basic_info().map_or(0, |info| info.extra_channels.len());
    let current = decoder.current_pixel_format().map(|format| format.color_type);
    let is_grey = current.is_some_and(|color| color.is_grayscale());
    if decoder.embedded_color_profile().is_some_and(JxlColorProfile::is_cmyk) {
        return Err(ImageDecodeError::unsupported(Format::JpegXl.name(), "CMYK"));
    }
    let color_type = if is_grey { JxlColorType::GrayscaleAlpha } else { JxlColorType::Rgba };
    let samples = color_type.samples_per_pixel();
    let mut format = JxlPixelFormat {
        color_type,
        color_data_format: Some(JxlDataFormat::U8 { bit_depth: 8 }),
        extra_channel_format: vec![None; extra_channels],
    };
    decoder.set_pixel_format(format.clone()).map_err(convert_error)?;
    let is_linear = check_transfer_function(decoder.output_color_profile())?;
    if is_linear {
        // In 8 bits, dark colours would become one.
        format.color_data_format =
            Some(JxlDataFormat::U16 { endianness: Endianness::native(), bit_depth: 16 });
        decoder.set_pixel_format(format).map_err(convert_error)?;
    }
    let bytes_per_sample = if is_linear { 2 } else { 1 };
    let row_bytes = width as usize * samples * bytes_per_sample;
    let mut frame = OwnedRawImage::new((row_bytes, height as usize)).map_err(convert_error)?;
    for _ in 0..MAX_FRAMES {
        deadline.check()?;
        let has_more = decode_frame(&mut decoder, &mut input, &mut frame)?;
        let alpha_at = (samples - 1) * bytes_per_sample;
        let shows_something = (0..height as usize).any(|y| {
            let mut pixels = frame.row(y).chunks_exact(samples * bytes_per_sample);
            pixels.any(|pixel| pixel[alpha_at..].iter().any(|byte| *byte != 0))
        });
        if shows_something || !has_more {
            break;
        }
    }
    let to_srgb = if is_linear { srgb_table() } else { Vec::new() };
    let mut rgb = Vec::with_capacity(width as usize * height as usize * 3);
    let mut row_samples = Vec::with_capacity(width as usize * samples);
    for y in 0..height as usize {
        row_samples.clear();
        if is_linear {
            let words = frame.row(y).chunks_exact(2);
            let words = words.map(|pair| u16::from_ne_bytes([pair[0], pair[1]]));
            row_samples.extend(words.enumerate().map(|(i, word)| {
                let is_alpha = i % samples == samples - 1;
                if is_alpha { (word >> 8) as u8 } else { to_srgb[usize::from(word)] }
            }));
        } else {
            row_samples.extend_from_slice(frame.row(y));
        }
        for pixel in row_samples.chunks_exact(samples) {
            let alpha = pixel[samples - 1];
            let colour = if is_grey { [pixel[0]; 3] } else { [pixel[0], pixel[1], pixel[2]] };
            rgb.extend(colour.map(|c| onto_white(c, alpha)));
        }
    }
    Ok(Pixels::whole(rgb_image(width, height, rgb)?))
}

/// Decodes the next frame; returns whether there are more.
fn decode_frame(
    decoder: &mut JxlDecoder,
    input: &mut &[u8],
    frame: &mut OwnedRawImage,
) -> Result<bool, ImageDecodeError> {
    loop {
        let mut buffers = [JxlOutputBuffer::from_image_rect_mut(frame.as_rect_mut())];
        match decoder.process(input, Some(&mut buffers), None).map_err(convert_error)? {
            Event::FrameComplete { has_more_frames } => return Ok(has_more_frames),
            Event::Complete => return Ok(false),
            Event::NeedMoreInput { .. } => return Err(ends_early()),
            Event::BasicInfo | Event::FrameHeader => {}
        }
    }
}

/// Checks how brightness is coded; returns whether it is linear, and not coded for a screen.
fn check_transfer_function(profile: Option<&JxlColorProfile>) -> Result<bool, ImageDecodeError> {
    let Some(JxlColorProfile::Simple(
        JxlColorEncoding::RgbColorSpace { transfer_function, .. }
        | JxlColorEncoding::GrayscaleColorSpace { transfer_function, .. },
    )) = profile
    else {
        return Ok(false);
    };
    match transfer_function {
        JxlTransferFunction::Linear => Ok(true),
        JxlTransferFunction::PQ | JxlTransferFunction::HLG => Err(ImageDecodeError::unsupported(
            Format::JpegXl.name(),
            "high dynamic range (PQ, HLG)",
        )),
        _ => Ok(false),
    }
}

/// Returns the sRGB code of each linear brightness of 16 bits.
fn srgb_table() -> Vec<u8> {
    let encode = |linear: f64| {
        if linear <= 0.003_130_8 { 12.92 * linear } else { 1.055 * linear.powf(1.0 / 2.4) - 0.055 }
    };
    (0..=u16::MAX).map(|word| (255.0 * encode(f64::from(word) / 65_535.0) + 0.5) as u8).collect()
}

fn ends_early() -> ImageDecodeError {
    ImageDecodeError::damaged("it ends early")
}

fn convert_error(error: Error) -> ImageDecodeError {
    match error {
        Error::ImageSizeTooLarge(..) | Error::ImageDimensionTooLarge(_) => {
            ImageDecodeError::OutOfBounds(error.to_string())
        }
        error => ImageDecodeError::damaged(error.to_string()),
    }
}
