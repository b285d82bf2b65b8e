//! What the container of an AVIF says (ISO 23008-12, and the specification of AVIF).
//!
//! Read here, because the parsers that there are copy each property for each item that has it, so that a small file
//! takes gigabytes.

use std::collections::HashMap;

use image::metadata::Orientation;

use super::super::error::ImageDecodeError;
use super::super::format::Format;
use super::super::options::DecodeOptions;
use super::frame::ColourCoding;
use crate::ingest::containers::{Fields, ItemPlace, bmff_boxes, item_entries, read_item_places};

/// Most tiles of a grid: cameras write some 50.
const MAX_TILES: u32 = 1_024;
/// Most properties that all items have together: an item has some five, and tiles of a grid share theirs.
const MAX_PROPERTIES: usize = 65_536;
/// Most auxiliary images: opacity, depth, gain map.
const MAX_AUXILIARY: usize = 64;
/// Names of an auxiliary image that is the opacity.
const ALPHA_KINDS: [&[u8]; 2] =
    [b"urn:mpeg:mpegB:cicp:systems:auxiliary:alpha\0", b"urn:mpeg:hevc:2015:auxid:1\0"];
/// A selected layer that means the best.
const NO_LAYER: u64 = 0xFFFF;

/// An image, or a grid of them.
#[derive(Debug)]
pub struct Container<'a> {
    pub width: u32,
    pub height: u32,
    /// How many tiles are in a row; 1 if it is no grid.
    pub columns: u32,
    pub tile_width: u32,
    pub tile_height: u32,
    /// The coded tiles, from left to right and from top to bottom.
    pub tiles: Vec<&'a [u8]>,
    /// The coded opacity.
    pub alpha: Option<&'a [u8]>,
    /// Whether colours are already multiplied by their opacity.
    pub is_premultiplied: bool,
    /// Whether further images follow the first.
    pub is_animated: bool,
    /// How colours are coded, if the container says it, and not AV1 alone.
    pub colour_coding: Option<ColourCoding>,
    /// How the image must be turned; EXIF does not count.
    pub orientation: Orientation,
    /// Which of several layers are decoded.
    pub operating_point: u8,
}

impl<'a> Container<'a> {
    /// Reads the boxes. Fails if the dimensions exceed the limits, or if something shapes the image that is not
    /// applied here.
    pub fn read(bytes: &'a [u8], options: &DecodeOptions) -> Result<Self, ImageDecodeError> {
        let is_animated = bmff_boxes(bytes).any(|(kind, _)| kind == b"moov");
        let Some((_, meta)) = bmff_boxes(bytes).find(|(kind, _)| *kind == b"meta") else {
            return Err(if is_animated {
                unsupported("an animation without a still image")
            } else {
                damaged("it ends before its images are described")
            });
        };
        let meta = Meta::read(meta, bytes)?;
        let primary = meta.primary;
        let kind = meta.kinds.get(&primary).copied();
        let kind = kind.ok_or_else(|| damaged("its main image is not listed"))?;
        if kind != b"av01" && kind != b"grid" {
            let kind = String::from_utf8_lossy(kind);
            let variant = format!("an image that is made of others ({kind})");
            return Err(ImageDecodeError::unsupported(Format::Avif.name(), variant));
        }
        let properties = Properties::read(&meta, primary)?;
        let (width, height) = properties.size()?;
        options.check_dimensions(width, height)?;
        let alpha = meta.find_alpha()?;
        let mut container = Self {
            width,
            height,
            columns: 1,
            tile_width: width,
            tile_height: height,
            tiles: Vec::new(),
            alpha: alpha.map(|alpha| meta.content(alpha)).transpose()?,
            is_premultiplied: alpha
                .is_some_and(|id| meta.references(b"prem", primary).contains(&id)),
            is_animated,
            colour_coding: properties.colour_coding,
            orientation: properties.orientation(),
            operating_point: properties.operating_point,
        };
        if kind == b"grid" {
            container.read_grid(&meta, options)?;
        } else {
            container.tiles.push(meta.content(primary)?);
        }
        Ok(container)
    }

    /// Reads an `ImageGrid` and its tiles.
    fn read_grid(
        &mut self,
        meta: &Meta<'a>,
        options: &DecodeOptions,
    ) -> Result<(), ImageDecodeError> {
        if self.alpha.is_some() {
            return Err(unsupported("opacity in a grid"));
        }
        let (rows, columns, width, height) = parse_grid(meta.content(meta.primary)?)
            .ok_or_else(|| damaged("the size of its grid cannot be read"))?;
        if rows * columns > MAX_TILES {
            let text = format!("{columns}×{rows} tiles; at most {MAX_TILES} are decoded");
            return Err(ImageDecodeError::OutOfBounds(text));
        }
        let ids = meta.references(b"dimg", meta.primary);
        if ids.len() != (rows * columns) as usize {
            let text = format!("it has {} of {columns}×{rows} tiles", ids.len());
            return Err(ImageDecodeError::Damaged(text));
        }
        for (index, id) in ids.iter().enumerate() {
            if meta.kinds.get(id) != Some(&b"av01") {
                return Err(unsupported("a grid of images that are made of others"));
            }
            let properties = Properties::read(meta, *id)?;
            let size = properties.size()?;
            if index == 0 {
                options.check_dimensions(size.0, size.1)?;
                (self.tile_width, self.tile_height) = size;
            }
            if size != (self.tile_width, self.tile_height)
                || properties.orientation() != Orientation::NoTransforms
            {
                return Err(unsupported("a grid of tiles that differ in size or are turned"));
            }
            self.tiles.push(meta.content(*id)?);
        }
        // Each row and column shows something, and together they are as large as the image.
        let fits = |tiles: u32, tile: u32, image: u32| {
            let (tiles, tile, image) = (u64::from(tiles), u64::from(tile), u64::from(image));
            (tiles - 1) * tile < image && tiles * tile >= image
        };
        if (width, height) != (self.width, self.height)
            || !fits(columns, self.tile_width, width)
            || !fits(rows, self.tile_height, height)
        {
            return Err(ImageDecodeError::Damaged(format!(
                "{columns}×{rows} tiles of {}×{} are no image of {width}×{height}",
                self.tile_width, self.tile_height
            )));
        }
        self.columns = columns;
        Ok(())
    }
}

/// Reads rows, columns, width and height of an `ImageGrid`.
fn parse_grid(grid: &[u8]) -> Option<(u32, u32, u32, u32)> {
    let mut fields = Fields::new(grid);
    if fields.number(1)? != 0 {
        return None;
    }
    let side_bytes = if fields.number(1)? & 1 == 0 { 2 } else { 4 };
    let (rows, columns) = (fields.number(1)? as u32 + 1, fields.number(1)? as u32 + 1);
    Some((rows, columns, fields.number(side_bytes)? as u32, fields.number(side_bytes)? as u32))
}

/// The box `meta`.
struct Meta<'a> {
    primary: u64,
    kinds: HashMap<u64, &'a [u8; 4]>,
    places: HashMap<u64, ItemPlace<'a>>,
    /// The box `iref`.
    references: &'a [u8],
    /// The kinds and contents of all properties.
    properties: Vec<(&'a [u8], &'a [u8])>,
    /// Which of them each item has, and whether a reader must know it.
    associations: HashMap<u64, Vec<(usize, bool)>>,
}

impl<'a> Meta<'a> {
    fn read(meta: &'a [u8], file: &'a [u8]) -> Result<Self, ImageDecodeError> {
        // Version and flags come first.
        let children = meta.get(4..).unwrap_or_default();
        let find = |boxes: &'a [u8], wanted: &[u8]| {
            bmff_boxes(boxes).find(|(kind, _)| *kind == wanted).map(|(_, content)| content)
        };
        let child = |wanted: &[u8]| {
            let content = find(children, wanted);
            content.ok_or_else(|| damaged("a box of its description is missing"))
        };
        let mut fields = Fields::new(child(b"pitm")?);
        let primary = fields.number(1).and_then(|version| {
            fields.number(3)?;
            fields.number(if version == 0 { 2 } else { 4 })
        });
        let places = child(b"iloc")?;
        let properties = child(b"iprp")?;
        Ok(Self {
            primary: primary.ok_or_else(|| damaged("its main image is not named"))?,
            kinds: item_entries(child(b"iinf")?)
                .filter_map(|entry| Some((entry.id, entry.kind.try_into().ok()?)))
                .collect(),
            places: read_item_places(places, file, find(children, b"idat").unwrap_or_default()),
            references: find(children, b"iref").unwrap_or_default(),
            properties: bmff_boxes(find(properties, b"ipco").unwrap_or_default()).collect(),
            associations: read_associations(find(properties, b"ipma").unwrap_or_default()),
        })
    }

    fn content(&self, id: u64) -> Result<&'a [u8], ImageDecodeError> {
        match self.places.get(&id) {
            Some(ItemPlace::Whole(content)) => Ok(content),
            Some(ItemPlace::Scattered) => Err(unsupported("an image that is in several pieces")),
            Some(ItemPlace::Missing) => Err(damaged("an image lies behind the end of the file")),
            None => Err(damaged("an image has no place in the file")),
        }
    }

    /// Returns the references of a kind from items to others.
    fn all_references(&self, kind: &'a [u8; 4]) -> impl Iterator<Item = (u64, Fields<'a>, usize)> {
        let id_bytes = if self.references.first() == Some(&0) { 2 } else { 4 };
        let boxes = bmff_boxes(self.references.get(4..).unwrap_or_default());
        boxes.filter(move |(found, _)| *found == kind.as_slice()).filter_map(move |(_, content)| {
            let mut fields = Fields::new(content);
            let from = fields.number(id_bytes)?;
            fields.number(2)?;
            Some((from, fields, id_bytes))
        })
    }

    /// Returns the items to which an item refers, at most one more than tiles are decoded.
    fn references(&self, kind: &'a [u8; 4], from: u64) -> Vec<u64> {
        let own = self.all_references(kind).find(|(source, ..)| *source == from);
        let Some((_, mut fields, id_bytes)) = own else { return Vec::new() };
        let targets = std::iter::from_fn(|| fields.number(id_bytes));
        targets.take(MAX_TILES as usize + 1).collect()
    }

    /// Finds the opacity of the main image.
    fn find_alpha(&self) -> Result<Option<u64>, ImageDecodeError> {
        for (from, mut fields, id_bytes) in self.all_references(b"auxl").take(MAX_AUXILIARY) {
            let mut targets = std::iter::from_fn(|| fields.number(id_bytes));
            if targets.any(|to| to == self.primary) && Properties::read(self, from)?.is_alpha {
                if self.kinds.get(&from) != Some(&b"av01") {
                    return Err(unsupported("opacity in a grid"));
                }
                return Ok(Some(from));
            }
        }
        Ok(None)
    }
}

/// Reads the box `ipma`.
fn read_associations(associations: &[u8]) -> HashMap<u64, Vec<(usize, bool)>> {
    let mut fields = Fields::new(associations);
    let mut found: HashMap<u64, Vec<_>> = HashMap::new();
    let mut count = 0;
    let mut read = || {
        let version = fields.number(1)?;
        let index_bytes = if fields.number(3)? & 1 == 0 { 1 } else { 2 };
        let essential_bit = 1 << (8 * index_bytes - 1);
        for _ in 0..fields.number(4)? {
            let item = fields.number(if version == 0 { 2 } else { 4 })?;
            for _ in 0..fields.number(1)? {
                let association = fields.number(index_bytes)?;
                count += 1;
                if count > MAX_PROPERTIES {
                    return None;
                }
                // 0 is none.
                if let Some(index) = (association & (essential_bit - 1)).checked_sub(1) {
                    let is_essential = association & essential_bit != 0;
                    found.entry(item).or_default().push((index as usize, is_essential));
                }
            }
        }
        Some(())
    };
    // What follows damage is left out.
    let _ = read();
    found
}

/// What the properties of an item say.
#[derive(Default)]
struct Properties {
    size: Option<(u32, u32)>,
    colour_coding: Option<ColourCoding>,
    /// Anticlockwise, in quarters.
    turn: u64,
    /// Which axis is mirrored after that.
    mirror: Option<u64>,
    operating_point: u8,
    is_alpha: bool,
}

impl Properties {
    fn read(meta: &Meta<'_>, id: u64) -> Result<Self, ImageDecodeError> {
        let mut properties = Self::default();
        let mut crop = None;
        for (index, is_essential) in meta.associations.get(&id).into_iter().flatten() {
            let Some((kind, content)) = meta.properties.get(*index).copied() else { continue };
            let mut fields = Fields::new(content);
            let mut number =
                |bytes| fields.number(bytes).ok_or_else(|| damaged("a property is cut off"));
            match kind {
                b"ispe" => {
                    number(4)?;
                    properties.size = Some((number(4)? as u32, number(4)? as u32));
                }
                b"colr" if content.starts_with(b"nclx") => {
                    // Behind the primaries and the transfer function.
                    number(8)?;
                    properties.colour_coding.get_or_insert(ColourCoding {
                        matrix_coefficients: number(2)? as u16,
                        is_full_range: number(1)? & 0x80 != 0,
                    });
                }
                b"irot" => properties.turn = number(1)? & 3,
                b"imir" => properties.mirror = Some(number(1)? & 1),
                b"clap" => crop = Some(content),
                b"a1op" => properties.operating_point = number(1)? as u8,
                b"lsel" if number(2)? != NO_LAYER => {
                    return Err(unsupported("one of several layers"));
                }
                b"auxC" => {
                    let name = content.get(4..).unwrap_or_default();
                    properties.is_alpha = ALPHA_KINDS.iter().any(|kind| name.starts_with(kind));
                }
                b"av1C" | b"pixi" | b"colr" | b"pasp" | b"a1lx" | b"lsel" | b"clli" | b"mdcv" => {}
                other if *is_essential => {
                    let variant = format!("the property {}", String::from_utf8_lossy(other));
                    return Err(ImageDecodeError::unsupported(Format::Avif.name(), variant));
                }
                _ => {}
            }
        }
        if let (Some(crop), Some(size)) = (crop, properties.size)
            && !is_whole(crop, size)
        {
            return Err(unsupported("cropped by its container (clap)"));
        }
        Ok(properties)
    }

    fn size(&self) -> Result<(u32, u32), ImageDecodeError> {
        self.size.ok_or_else(|| damaged("the size of an image is missing"))
    }

    /// Returns how an image must be turned by `irot` and then mirrored by `imir`, of which axis 0 exchanges top and
    /// bottom, 1 left and right.
    fn orientation(&self) -> Orientation {
        match (self.turn, self.mirror) {
            (0, None) => Orientation::NoTransforms,
            (0, Some(0)) | (2, Some(1)) => Orientation::FlipVertical,
            (0, Some(_)) | (2, Some(_)) => Orientation::FlipHorizontal,
            (2, None) => Orientation::Rotate180,
            (1, None) => Orientation::Rotate270,
            (1, Some(0)) | (3, Some(1)) => Orientation::Rotate90FlipH,
            (1, Some(_)) | (_, Some(_)) => Orientation::Rotate270FlipH,
            (_, None) => Orientation::Rotate90,
        }
    }
}

/// Whether a crop leaves an image whole.
fn is_whole(crop: &[u8], (width, height): (u32, u32)) -> bool {
    let mut fields = Fields::new(crop);
    let mut ratio = || Some((fields.number(4)?, fields.number(4)?));
    let (Some(shown_width), Some(shown_height)) = (ratio(), ratio()) else { return false };
    let (Some((x, _)), Some((y, _))) = (ratio(), ratio()) else { return false };
    let equals = |(numerator, denominator), side: u32| numerator == denominator * u64::from(side);
    equals(shown_width, width) && equals(shown_height, height) && x == 0 && y == 0
}

fn unsupported(variant: &'static str) -> ImageDecodeError {
    ImageDecodeError::unsupported(Format::Avif.name(), variant)
}

fn damaged(reason: &'static str) -> ImageDecodeError {
    ImageDecodeError::damaged(reason)
}
