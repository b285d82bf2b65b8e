//! What the directory of a TIFF says about its first image, and which variants are read.

use std::borrow::Cow;

use super::super::error::ImageDecodeError;
use super::super::options::DecodeOptions;
use super::super::tiff_directory::TiffDirectory;

const NEW_SUBFILE_TYPE: u16 = 254;
const WIDTH: u16 = 256;
const HEIGHT: u16 = 257;
const BITS_PER_SAMPLE: u16 = 258;
const COMPRESSION: u16 = 259;
const PHOTOMETRIC: u16 = 262;
const FILL_ORDER: u16 = 266;
const STRIP_OFFSETS: u16 = 273;
const SAMPLES_PER_PIXEL: u16 = 277;
const ROWS_PER_STRIP: u16 = 278;
const STRIP_BYTE_COUNTS: u16 = 279;
const PLANAR_CONFIGURATION: u16 = 284;
const T4_OPTIONS: u16 = 292;
const T6_OPTIONS: u16 = 293;
const PREDICTOR: u16 = 317;
const COLOUR_MAP: u16 = 320;
const TILE_WIDTH: u16 = 322;
const TILE_HEIGHT: u16 = 323;
const TILE_OFFSETS: u16 = 324;
const TILE_BYTE_COUNTS: u16 = 325;
const SUB_IFDS: u16 = 330;
const EXTRA_SAMPLES: u16 = 338;
const SAMPLE_FORMAT: u16 = 339;
const JPEG_TABLES: u16 = 347;
const YCBCR_COEFFICIENTS: u16 = 529;
const YCBCR_SUBSAMPLING: u16 = 530;
const REFERENCE_BLACK_WHITE: u16 = 532;
const DNG_VERSION: u16 = 50_706;

/// Most strips or tiles; a tile of 16×16 pixels per 256 of the most pixels.
const MAX_CHUNKS: usize = 4_000_000;
/// Largest side of a tile that is larger than its image.
const MAX_TILE_SIDE: u32 = 2_048;
/// Most samples per pixel: four colours and opacity, and some that are ignored.
const MAX_SAMPLES: u64 = 16;

/// How strips and tiles are compressed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Compression {
    None,
    FaxRle,
    FaxG3 { is_two_dimensional: bool },
    FaxG4,
    Lzw,
    Jpeg,
    Deflate,
    PackBits,
}

/// What samples mean.
#[derive(Debug, Clone, PartialEq)]
pub enum Colours {
    WhiteIsZero,
    BlackIsZero,
    Rgb,
    Palette(Vec<[u8; 3]>),
    Cmyk,
    Ycbcr(Ycbcr),
}

/// How brightness and two colours become RGB.
#[derive(Debug, Clone, PartialEq)]
pub struct Ycbcr {
    /// Pixels that share a colour, across and down.
    pub subsampling: (u32, u32),
    /// Shares of red, green and blue in the brightness.
    pub coefficients: [f64; 3],
    /// Black and white of each sample.
    pub references: [f64; 6],
}

/// What the sample behind the colours is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Opacity {
    None,
    Separate,
    Premultiplied,
}

/// Layout of the first image of a file.
#[derive(Debug)]
// Each is a field of the format of its own.
#[allow(clippy::struct_excessive_bools)]
pub struct TiffLayout<'a> {
    pub width: u32,
    pub height: u32,
    pub bits: u32,
    pub samples: usize,
    pub colours: Colours,
    pub opacity: Opacity,
    pub compression: Compression,
    pub has_predictor: bool,
    /// Whether the least significant bit of a byte comes first.
    pub reverses_bits: bool,
    pub is_big_endian: bool,
    /// Whether each sample has strips or tiles of its own.
    pub is_planar: bool,
    pub is_tiled: bool,
    /// Size of a tile; of a strip, its width is that of the image.
    pub chunk_width: u32,
    pub chunk_height: u32,
    /// Offset and size of each strip or tile.
    pub chunks: Vec<(u64, u64)>,
    pub jpeg_tables: Option<&'a [u8]>,
}

fn unsupported(variant: impl Into<Cow<'static, str>>) -> ImageDecodeError {
    ImageDecodeError::unsupported("TIFF", variant)
}

impl<'a> TiffLayout<'a> {
    /// Reads the layout; fails if the image exceeds the limits, or is of a variant that is not read.
    pub fn read(
        directory: &TiffDirectory<'a>,
        options: &DecodeOptions,
    ) -> Result<Self, ImageDecodeError> {
        let number = |tag: u16, default: u64| directory.integer(tag).unwrap_or(default);
        let side = |tag| u32::try_from(number(tag, 0)).unwrap_or(u32::MAX);
        let (width, height) = (side(WIDTH), side(HEIGHT));
        check_raw(directory)?;
        options.check_dimensions(width, height)?;
        let samples = number(SAMPLES_PER_PIXEL, 1);
        if !(1..=MAX_SAMPLES).contains(&samples) {
            return Err(unsupported(format!("{samples} samples per pixel")));
        }
        let bits = read_bits(directory)?;
        let is_planar = match number(PLANAR_CONFIGURATION, 1) {
            2 => samples > 1,
            1 => false,
            other => return Err(unsupported(format!("planar configuration {other}"))),
        };
        let compression = read_compression(directory)?;
        let colours = read_colours(directory, bits, compression)?;
        let opacity = read_opacity(directory, &colours, samples)?;
        let is_subsampled =
            matches!(&colours, Colours::Ycbcr(ycbcr) if ycbcr.subsampling != (1, 1));
        if is_subsampled && compression != Compression::Jpeg && (is_planar || samples != 3) {
            return Err(unsupported("YCbCr in planes"));
        }
        let is_jpeg = compression == Compression::Jpeg;
        let is_fax = matches!(
            compression,
            Compression::FaxRle | Compression::FaxG3 { .. } | Compression::FaxG4
        );
        if is_jpeg && bits != 8 {
            return Err(unsupported(format!("JPEG with samples of {bits} bits")));
        }
        if is_jpeg && !is_planar && samples != colour_samples(&colours) {
            return Err(unsupported(format!("JPEG with {samples} samples per pixel")));
        }
        if is_jpeg && is_planar && matches!(colours, Colours::Ycbcr(_)) {
            return Err(unsupported("JPEG with YCbCr in planes"));
        }
        if is_fax && (bits != 1 || samples != 1) {
            return Err(unsupported("fax compression of more than one bit per pixel"));
        }
        let has_predictor = match number(PREDICTOR, 1) {
            2 if matches!(compression, Compression::Lzw | Compression::Deflate) => {
                if bits < 8 || is_subsampled {
                    return Err(unsupported("differences (predictor 2) of such samples"));
                }
                true
            }
            3 if matches!(compression, Compression::Lzw | Compression::Deflate) => {
                return Err(unsupported("differences of floating-point samples (predictor 3)"));
            }
            _ => false,
        };
        let (is_tiled, chunk_width, chunk_height, chunks) =
            read_chunks(directory, width, height, if is_planar { samples } else { 1 })?;
        Ok(Self {
            width,
            height,
            bits,
            samples: samples as usize,
            colours,
            opacity,
            compression,
            has_predictor,
            reverses_bits: number(FILL_ORDER, 1) == 2 && !is_jpeg,
            is_big_endian: directory.is_big_endian,
            is_planar,
            is_tiled,
            chunk_width,
            chunk_height,
            chunks,
            jpeg_tables: directory.bytes(JPEG_TABLES),
        })
    }
}

/// Refuses files of cameras, whose first image is not the photograph.
fn check_raw(directory: &TiffDirectory<'_>) -> Result<(), ImageDecodeError> {
    let is_reduced = directory.integer(NEW_SUBFILE_TYPE).is_some_and(|kind| kind & 1 == 1);
    if directory.has(DNG_VERSION) {
        return Err(unsupported("camera raw (DNG)"));
    }
    if is_reduced && directory.has(SUB_IFDS) {
        return Err(unsupported("camera raw: its first image is a small preview"));
    }
    Ok(())
}

fn read_bits(directory: &TiffDirectory<'_>) -> Result<u32, ImageDecodeError> {
    let bits = directory.integers(BITS_PER_SAMPLE).unwrap_or_else(|| vec![1]);
    let first = bits.first().copied().unwrap_or(1);
    if bits.iter().any(|n| *n != first) {
        return Err(unsupported(format!("samples of different sizes, {bits:?} bits")));
    }
    match directory.integer(SAMPLE_FORMAT).unwrap_or(1) {
        1 | 4 => {}
        2 => return Err(unsupported(format!("signed samples of {first} bits"))),
        3 => return Err(unsupported(format!("floating-point samples of {first} bits"))),
        _ => return Err(unsupported("complex samples")),
    }
    match first {
        1 | 2 | 4 | 8 | 16 => Ok(first as u32),
        other => Err(unsupported(format!("samples of {other} bits"))),
    }
}

fn read_compression(directory: &TiffDirectory<'_>) -> Result<Compression, ImageDecodeError> {
    let options = |tag| directory.integer(tag).unwrap_or(0);
    Ok(match directory.integer(COMPRESSION).unwrap_or(1) {
        1 => Compression::None,
        2 => Compression::FaxRle,
        3 if options(T4_OPTIONS) & 2 != 0 => {
            return Err(unsupported("Fax G3 with uncompressed parts"));
        }
        3 => Compression::FaxG3 { is_two_dimensional: options(T4_OPTIONS) & 1 != 0 },
        4 if options(T6_OPTIONS) & 2 != 0 => {
            return Err(unsupported("Fax G4 with uncompressed parts"));
        }
        4 => Compression::FaxG4,
        5 => Compression::Lzw,
        6 => return Err(unsupported("JPEG of before 1995 (compression 6)")),
        7 => Compression::Jpeg,
        8 | 32_946 => Compression::Deflate,
        32_773 => Compression::PackBits,
        other => {
            let name = match other {
                9 | 10 | 34_661 => "JBIG",
                32_766 => "NeXT",
                32_771 => "fax RLE in words",
                32_809 => "ThunderScan",
                34_676 | 34_677 => "SGI Log",
                34_712 | 33_003 | 33_004 | 33_005 => "JPEG 2000",
                34_887 => "LERC",
                34_892 => "lossy JPEG of DNG",
                34_925 => "LZMA",
                50_000 => "Zstandard",
                50_001 => "WebP",
                50_002 | 52_546 => "JPEG XL",
                _ => "",
            };
            return Err(unsupported(if name.is_empty() {
                Cow::Owned(format!("compression {other}"))
            } else {
                Cow::Borrowed(name)
            }));
        }
    })
}

fn read_colours(
    directory: &TiffDirectory<'_>,
    bits: u32,
    compression: Compression,
) -> Result<Colours, ImageDecodeError> {
    let photometric = directory.integer(PHOTOMETRIC).ok_or_else(|| {
        ImageDecodeError::damaged("its directory does not say what its samples mean")
    })?;
    let colours = match photometric {
        0 => Colours::WhiteIsZero,
        1 => Colours::BlackIsZero,
        2 => Colours::Rgb,
        3 => Colours::Palette(read_palette(directory, bits)?),
        5 => Colours::Cmyk,
        6 => Colours::Ycbcr(read_ycbcr(directory, bits)?),
        4 => return Err(unsupported("transparency mask")),
        8 => return Err(unsupported("CIE L*a*b*")),
        9 => return Err(unsupported("ICC L*a*b*")),
        10 => return Err(unsupported("ITU L*a*b*")),
        32_803 => return Err(unsupported("camera raw (colour filter array)")),
        34_892 => return Err(unsupported("camera raw (linear)")),
        32_844 | 32_845 => return Err(unsupported("SGI Log")),
        other => return Err(unsupported(format!("photometric interpretation {other}"))),
    };
    let samples = directory.integer(SAMPLES_PER_PIXEL).unwrap_or(1);
    if samples < colour_samples(&colours) {
        return Err(ImageDecodeError::damaged(
            "it has fewer samples per pixel than its colours need",
        ));
    }
    if matches!(colours, Colours::Palette(_)) && compression == Compression::Jpeg {
        return Err(unsupported("JPEG with a palette"));
    }
    Ok(colours)
}

/// Samples of each pixel that are colours.
pub fn colour_samples(colours: &Colours) -> u64 {
    match colours {
        Colours::WhiteIsZero | Colours::BlackIsZero | Colours::Palette(_) => 1,
        Colours::Rgb | Colours::Ycbcr(_) => 3,
        Colours::Cmyk => 4,
    }
}

fn read_palette(
    directory: &TiffDirectory<'_>,
    bits: u32,
) -> Result<Vec<[u8; 3]>, ImageDecodeError> {
    if bits > 8 {
        return Err(unsupported(format!("palette with {bits} bits per pixel")));
    }
    let map = directory.integers(COLOUR_MAP).unwrap_or_default();
    let size = 1usize << bits;
    if map.len() < 3 * size {
        return Err(ImageDecodeError::damaged("its palette is too short"));
    }
    // Some writers store values of 8 bits where 16 are required.
    let shift = if map.iter().any(|value| *value > 255) { 8 } else { 0 };
    let value = |at: usize| (map[at] >> shift).min(255) as u8;
    Ok((0..size).map(|i| [value(i), value(size + i), value(2 * size + i)]).collect())
}

fn read_ycbcr(directory: &TiffDirectory<'_>, bits: u32) -> Result<Ycbcr, ImageDecodeError> {
    if bits != 8 {
        return Err(unsupported(format!("YCbCr with samples of {bits} bits")));
    }
    let subsampling = match directory.integers(YCBCR_SUBSAMPLING).as_deref() {
        None => (2, 2),
        Some([h @ (1 | 2 | 4), v @ (1 | 2 | 4), ..]) => (*h as u32, *v as u32),
        Some(other) => return Err(unsupported(format!("YCbCr subsampled by {other:?}"))),
    };
    let mut coefficients = [0.299, 0.587, 0.114];
    let mut references = [0.0, 255.0, 128.0, 255.0, 128.0, 255.0];
    copy_fractions(directory, YCBCR_COEFFICIENTS, &mut coefficients);
    copy_fractions(directory, REFERENCE_BLACK_WHITE, &mut references);
    Ok(Ycbcr { subsampling, coefficients, references })
}

/// Copies as many fractions as there are places, if the tag has so many.
fn copy_fractions(directory: &TiffDirectory<'_>, tag: u16, places: &mut [f64]) {
    if let Some(values) = directory.fractions(tag)
        && let Some(values) = values.get(..places.len())
    {
        places.copy_from_slice(values);
    }
}

fn read_opacity(
    directory: &TiffDirectory<'_>,
    colours: &Colours,
    samples: u64,
) -> Result<Opacity, ImageDecodeError> {
    let extra = samples.saturating_sub(colour_samples(colours));
    if extra == 0 {
        return Ok(Opacity::None);
    }
    let kinds = directory.integers(EXTRA_SAMPLES).unwrap_or_default();
    let opacity = match kinds.first() {
        Some(1) => Opacity::Premultiplied,
        Some(2) => Opacity::Separate,
        Some(0 | 999) => Opacity::None,
        // RGB with a fourth sample of which nothing is said: opacity, as Pillow and others take it.
        None if *colours == Colours::Rgb && extra == 1 => Opacity::Separate,
        _ => return Err(unsupported("samples of an unknown meaning")),
    };
    match (opacity, colours) {
        // Samples of fewer bits are not scaled next to a palette.
        (Opacity::Separate, Colours::Palette(palette)) if palette.len() == 256 => Ok(opacity),
        (Opacity::None, _)
        | (_, Colours::WhiteIsZero | Colours::BlackIsZero | Colours::Rgb | Colours::Cmyk) => {
            Ok(opacity)
        }
        _ => Err(unsupported("opacity with such colours")),
    }
}

type Chunks = (bool, u32, u32, Vec<(u64, u64)>);

/// Finds the strips or tiles.
fn read_chunks(
    directory: &TiffDirectory<'_>,
    width: u32,
    height: u32,
    planes: u64,
) -> Result<Chunks, ImageDecodeError> {
    let is_tiled = directory.has(TILE_WIDTH) && directory.has(TILE_OFFSETS);
    let (offsets, sizes) = if is_tiled {
        (TILE_OFFSETS, TILE_BYTE_COUNTS)
    } else {
        (STRIP_OFFSETS, STRIP_BYTE_COUNTS)
    };
    let side = |tag, default: u32| {
        directory.integer(tag).map_or(default, |n| u32::try_from(n).unwrap_or(u32::MAX))
    };
    let (chunk_width, chunk_height) = if is_tiled {
        (side(TILE_WIDTH, 0), side(TILE_HEIGHT, 0))
    } else {
        (width, side(ROWS_PER_STRIP, height).min(height))
    };
    let is_valid = |chunk: u32, image: u32| chunk > 0 && chunk <= image.max(MAX_TILE_SIDE);
    if !is_valid(chunk_width, width) || !is_valid(chunk_height, height) {
        return Err(ImageDecodeError::damaged("its strips or tiles have no valid size"));
    }
    let count =
        u64::from(width.div_ceil(chunk_width)) * u64::from(height.div_ceil(chunk_height)) * planes;
    if count > MAX_CHUNKS as u64 {
        return Err(ImageDecodeError::OutOfBounds(format!("{count} strips or tiles")));
    }
    let offsets = directory.integers(offsets).unwrap_or_default();
    let mut sizes = directory.integers(sizes).unwrap_or_default();
    if sizes.is_empty() && offsets.len() == 1 {
        // Early writers left it out; then the strip reaches to the end of the file.
        sizes.push(u64::MAX);
    }
    if (offsets.len() as u64) < count || (sizes.len() as u64) < count {
        return Err(ImageDecodeError::damaged("it has fewer strips or tiles than its size needs"));
    }
    let chunks = offsets.into_iter().zip(sizes).take(count as usize).collect();
    Ok((is_tiled, chunk_width, chunk_height, chunks))
}
