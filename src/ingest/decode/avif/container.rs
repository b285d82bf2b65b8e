//! What the container of an AVIF says.

use std::borrow::Cow;

use image::metadata::Orientation;
use zenavif_parse::{
    AV1Metadata, AvifParser, CleanAperture, ColorInformation, DecodeConfig, Error, Unstoppable,
};

use super::super::error::ImageDecodeError;
use super::super::format::Format;
use super::super::options::DecodeOptions;
use super::super::pixels::MAX_FRAMES;
use super::colour::ColourCoding;

/// Most tiles of a grid: 256 by 256 are possible, cameras write some 50.
const MAX_TILES: u32 = 1_024;
/// A layer that means all layers.
const ALL_LAYERS: u16 = 0xFFFF;

/// An image, or a grid of them.
pub struct Layout {
    pub width: u32,
    pub height: u32,
    /// Rows and columns of tiles; one if it is no grid.
    pub rows: u32,
    pub columns: u32,
    /// Size of each tile.
    pub tile_width: u32,
    pub tile_height: u32,
}

/// An AVIF file.
pub struct Container<'a> {
    parser: AvifParser<'a>,
    pub layout: Layout,
}

impl<'a> Container<'a> {
    /// Reads the boxes and the headers of AV1; fails if the dimensions exceed the limits, or if something shapes the
    /// image that is not applied here.
    pub fn read(bytes: &'a [u8], options: &DecodeOptions) -> Result<Self, ImageDecodeError> {
        let config =
            DecodeConfig::default().with_max_grid_tiles(MAX_TILES).with_total_megapixels_limit(
                u32::try_from(options.max_pixels.div_ceil(1_000_000)).unwrap_or(u32::MAX),
            );
        let parser = AvifParser::from_bytes_with_config(bytes, &config, &Unstoppable);
        let parser = parser.map_err(convert_error)?;
        if parser.layer_selector().is_some_and(|selector| selector.layer_id != ALL_LAYERS) {
            return Err(unsupported("one of several layers"));
        }
        let layout = read_layout(&parser, options)?;
        if parser.clean_aperture().is_some_and(|crop| !is_whole(crop, &layout)) {
            return Err(unsupported("cropped by its container (clap)"));
        }
        Ok(Self { parser, layout })
    }

    /// Returns the coded tile of this number, from left to right and from top to bottom.
    pub fn tile(&self, index: u32) -> Result<Cow<'_, [u8]>, ImageDecodeError> {
        if self.parser.grid_config().is_none() {
            return first_image(&self.parser);
        }
        self.parser.tile_data(index as usize).map_err(convert_error)
    }

    /// Returns the coded opacity.
    pub fn alpha(&self) -> Result<Option<Cow<'_, [u8]>>, ImageDecodeError> {
        if !has_still_image(&self.parser) {
            return Ok(self.parser.frame(0).map_err(convert_error)?.alpha_data);
        }
        self.parser.alpha_data().transpose().map_err(convert_error)
    }

    /// Whether colours are already multiplied by their opacity.
    pub fn is_premultiplied(&self) -> bool {
        self.parser.premultiplied_alpha()
    }

    /// Which of the spatial layers are decoded.
    pub fn operating_point(&self) -> u8 {
        self.parser.operating_point().map_or(0, |selector| selector.op_index)
    }

    /// Returns the frames of an animation with opacity, coded: colours and opacity.
    pub fn frames(&self) -> impl Iterator<Item = (Cow<'_, [u8]>, Cow<'_, [u8]>)> {
        let frames = (0..MAX_FRAMES).map_while(|index| self.parser.frame(index).ok());
        frames.map_while(|frame| Some((frame.data, frame.alpha_data?)))
    }

    /// How colours are coded, if the container says it, and not AV1.
    pub fn colour_coding(&self) -> Option<ColourCoding> {
        match self.parser.color_info()? {
            ColorInformation::Nclx { matrix_coefficients, full_range, .. } => Some(ColourCoding {
                matrix_coefficients: *matrix_coefficients,
                is_full_range: *full_range,
            }),
            ColorInformation::IccProfile(_) => None,
        }
    }

    /// How the image must be turned: anticlockwise by `irot`, then mirrored by `imir`. EXIF does not count.
    pub fn orientation(&self) -> Orientation {
        use Orientation::{
            FlipHorizontal, FlipVertical, NoTransforms, Rotate90, Rotate90FlipH, Rotate180,
            Rotate270, Rotate270FlipH,
        };
        let angle = self.parser.rotation().map_or(0, |rotation| rotation.angle);
        // Axis 0 exchanges top and bottom, 1 left and right.
        match (angle, self.parser.mirror().map(|mirror| mirror.axis)) {
            (90, None) => Rotate270,
            (90, Some(0)) => Rotate90FlipH,
            (90, Some(_)) => Rotate270FlipH,
            (180, None) => Rotate180,
            (180, Some(0)) => FlipHorizontal,
            (180, Some(_)) => FlipVertical,
            (270, None) => Rotate90,
            (270, Some(0)) => Rotate270FlipH,
            (270, Some(_)) => Rotate90FlipH,
            (_, None) => NoTransforms,
            (_, Some(0)) => FlipVertical,
            (_, Some(_)) => FlipHorizontal,
        }
    }
}

/// Whether there is an image besides the frames of an animation.
fn has_still_image(parser: &AvifParser<'_>) -> bool {
    parser.primary_data().is_ok_and(|data| !data.is_empty())
}

/// Returns the coded image, or the first frame of an animation that has none besides.
fn first_image<'a>(parser: &'a AvifParser<'_>) -> Result<Cow<'a, [u8]>, ImageDecodeError> {
    if parser.animation_info().is_some() && !has_still_image(parser) {
        return Ok(parser.frame(0).map_err(convert_error)?.data);
    }
    parser.primary_data().map_err(convert_error)
}

fn read_layout(
    parser: &AvifParser<'_>,
    options: &DecodeOptions,
) -> Result<Layout, ImageDecodeError> {
    let size = |data: &[u8]| {
        let header = AV1Metadata::parse_av1_bitstream(data).map_err(convert_error)?;
        let (width, height) = (header.max_frame_width.get(), header.max_frame_height.get());
        options.check_dimensions(width, height)?;
        Ok((width, height))
    };
    if parser.grid_config().is_none() {
        let (width, height) = size(&first_image(parser)?)?;
        return Ok(Layout {
            width,
            height,
            rows: 1,
            columns: 1,
            tile_width: width,
            tile_height: height,
        });
    }
    if parser.alpha_data().is_some() {
        return Err(unsupported("opacity in a grid"));
    }
    let (rows, columns, width, height) = parser
        .primary_data()
        .ok()
        .and_then(|grid| read_grid(&grid))
        .ok_or_else(|| ImageDecodeError::damaged("the size of its grid cannot be read"))?;
    options.check_dimensions(width, height)?;
    if parser.grid_tile_count() != (rows * columns) as usize {
        return Err(ImageDecodeError::damaged(format!(
            "it has {} of {columns}×{rows} tiles",
            parser.grid_tile_count()
        )));
    }
    let (tile_width, tile_height) = size(&parser.tile_data(0).map_err(convert_error)?)?;
    // Each row and column shows something, and together they are as large as the image.
    let fits = |tiles: u32, tile: u32, image: u32| {
        let (tiles, tile, image) = (u64::from(tiles), u64::from(tile), u64::from(image));
        (tiles - 1) * tile < image && tiles * tile >= image
    };
    if !fits(columns, tile_width, width) || !fits(rows, tile_height, height) {
        return Err(ImageDecodeError::damaged(format!(
            "{columns}×{rows} tiles of {tile_width}×{tile_height} are no image of {width}×{height}"
        )));
    }
    Ok(Layout { width, height, rows, columns, tile_width, tile_height })
}

/// Reads an `ImageGrid` (ISO 23008-12, 6.6.2.3.2): rows, columns, width and height.
fn read_grid(grid: &[u8]) -> Option<(u32, u32, u32, u32)> {
    let [0, flags, rows, columns, size @ ..] = grid else { return None };
    let (width, height) = match (flags & 1, size) {
        (0, [w1, w0, h1, h0, ..]) => {
            (u16::from_be_bytes([*w1, *w0]).into(), u16::from_be_bytes([*h1, *h0]).into())
        }
        (1, [w3, w2, w1, w0, h3, h2, h1, h0, ..]) => {
            (u32::from_be_bytes([*w3, *w2, *w1, *w0]), u32::from_be_bytes([*h3, *h2, *h1, *h0]))
        }
        _ => return None,
    };
    Some((u32::from(*rows) + 1, u32::from(*columns) + 1, width, height))
}

/// Whether a crop leaves the whole image.
fn is_whole(crop: &CleanAperture, layout: &Layout) -> bool {
    let equals = |numerator: u32, denominator: u32, side: u32| {
        u64::from(numerator) == u64::from(denominator) * u64::from(side)
    };
    equals(crop.width_n, crop.width_d, layout.width)
        && equals(crop.height_n, crop.height_d, layout.height)
        && crop.horiz_off_n == 0
        && crop.vert_off_n == 0
}

fn unsupported(variant: &'static str) -> ImageDecodeError {
    ImageDecodeError::unsupported(Format::Avif.name(), variant)
}

fn convert_error(error: Error) -> ImageDecodeError {
    match error {
        // These are variants that the parser does not read, whatever it calls them.
        Error::InvalidData("primary_item_id type is not av01 or grid") => {
            unsupported("an image that is made of others (overlay, identity)")
        }
        Error::InvalidData("ftyp must be 'avif' or 'avis'") => {
            unsupported("with another major brand than avif and avis")
        }
        Error::Unsupported(variant) => unsupported(variant),
        Error::ResourceLimitExceeded(_) | Error::OutOfMemory => {
            ImageDecodeError::OutOfBounds(error.to_string())
        }
        error => ImageDecodeError::damaged(error.to_string()),
    }
}
