//! Recognises the format of an image by its content.

use crate::ingest::containers::bmff_brands;

/// Formats that are read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Format {
    /// JPEG.
    Jpeg,
    /// PNG.
    Png,
    /// WebP.
    WebP,
    /// GIF.
    Gif,
    /// BMP.
    Bmp,
    /// TIFF.
    Tiff,
    /// HEIC: HEVC images in a HEIF container.
    Heic,
    /// JPEG XL.
    JpegXl,
    /// AVIF: AV1 images in a HEIF container.
    #[cfg(feature = "avif")]
    Avif,
}

impl Format {
    /// Name in messages.
    pub fn name(self) -> &'static str {
        match self {
            Self::Jpeg => "JPEG",
            Self::Png => "PNG",
            Self::WebP => "WebP",
            Self::Gif => "GIF",
            Self::Bmp => "BMP",
            Self::Tiff => "TIFF",
            Self::Heic => "HEIC",
            Self::JpegXl => "JPEG XL",
            #[cfg(feature = "avif")]
            Self::Avif => "AVIF",
        }
    }

    /// Media type in HTTP.
    pub fn media_type(self) -> &'static str {
        match self {
            Self::Jpeg => "image/jpeg",
            Self::Png => "image/png",
            Self::WebP => "image/webp",
            Self::Gif => "image/gif",
            Self::Bmp => "image/bmp",
            Self::Tiff => "image/tiff",
            Self::Heic => "image/heic",
            Self::JpegXl => "image/jxl",
            #[cfg(feature = "avif")]
            Self::Avif => "image/avif",
        }
    }
}

/// The formats that this build reads, and what decodes each.
pub const READABLE_FORMATS: &[(Format, &str)] = &[
    (Format::Jpeg, "libjpeg-turbo 3.1 (turbojpeg), libjpeg-turbo-rs for 12 bits and damaged files"),
    (Format::Png, "image"),
    (Format::WebP, "image"),
    (Format::Gif, "image"),
    (Format::Bmp, "image"),
    (Format::Tiff, "bsap with weezl, flate2, fax and libjpeg-turbo"),
    (Format::Heic, "heic-decoder"),
    (Format::JpegXl, "jxl"),
    #[cfg(feature = "avif")]
    (Format::Avif, "re_rav1d"),
];

/// What a file is that is AVIF, which only some builds read.
#[cfg(feature = "avif")]
const AVIF: Recognised = Recognised::Readable(Format::Avif);
#[cfg(not(feature = "avif"))]
const AVIF: Recognised = Recognised::Unreadable("AVIF (this build lacks the cargo feature `avif`)");

/// Returns the names of the formats that this build reads.
pub fn describe_readable_formats() -> String {
    let names: Vec<&str> = READABLE_FORMATS.iter().map(|(format, _)| format.name()).collect();
    names.join(", ")
}

/// What the first bytes say.
#[derive(Debug, PartialEq, Eq)]
pub enum Recognised {
    /// A format that is read, though perhaps not every variant of it.
    Readable(Format),
    /// A format that is known and not read.
    Unreadable(&'static str),
    /// Nothing known.
    Unknown,
}

/// First bytes of formats that are known but not read.
const UNREADABLE: &[(&[u8], &str)] = &[
    (b"8BPS", "Photoshop (PSD)"),
    (b"%PDF", "PDF"),
    (b"%!PS", "PostScript"),
    (b"\xc5\xd0\xd3\xc6", "PostScript"),
    (b"\0\0\0\x0cjP  \r\n\x87\n", "JPEG 2000"),
    (b"\xff\x4f\xff\x51", "JPEG 2000"),
    (b"II\xbc\x01", "JPEG XR"),
    (b"\x76\x2f\x31\x01", "OpenEXR"),
    (b"#?RADIANCE", "Radiance HDR"),
    (b"#?RGBE", "Radiance HDR"),
    (b"FUJIFILMCCD-RAW", "camera raw (RAF)"),
    (b"IIRO", "camera raw (ORF)"),
    (b"IIRS", "camera raw (ORF)"),
    (b"MMOR", "camera raw (ORF)"),
    (b"IIU\0", "camera raw (RW2)"),
    (b"FOVb", "camera raw (X3F)"),
    (b"gimp xcf", "GIMP (XCF)"),
    (b"qoif", "QOI"),
    (b"DDS ", "DirectDraw surface (DDS)"),
    (b"FLIF", "FLIF"),
    (b"BPG\xfb", "BPG"),
    (b"\0\0\x01\0", "icon (ICO)"),
    (b"\0\0\x02\0", "cursor (CUR)"),
    (b"\x1a\x45\xdf\xa3", "video (Matroska)"),
    (b"SIMPLE  =", "FITS"),
    (b"\xd7\xcd\xc6\x9a", "Windows metafile"),
    (b"AT&TFORM", "DjVu"),
    (b"P1\n", "PNM"),
    (b"P2\n", "PNM"),
    (b"P3\n", "PNM"),
    (b"P4\n", "PNM"),
    (b"P5\n", "PNM"),
    (b"P6\n", "PNM"),
    (b"P7\n", "PNM"),
];

/// How many bytes of a text are searched for the beginning of an SVG.
const SVG_SEARCH_BYTES: usize = 1_024;

/// Recognises a format by the content of the file.
pub fn recognise(bytes: &[u8]) -> Recognised {
    let readable = if bytes.starts_with(b"\xff\xd8\xff") {
        Some(Format::Jpeg)
    } else if bytes.starts_with(b"\x89PNG\r\n\x1a\n") {
        Some(Format::Png)
    } else if bytes.starts_with(b"RIFF") && bytes.get(8..12) == Some(b"WEBP") {
        Some(Format::WebP)
    } else if bytes.starts_with(b"GIF87a") || bytes.starts_with(b"GIF89a") {
        Some(Format::Gif)
    } else if bytes.starts_with(b"BM") && bytes.len() > 18 {
        Some(Format::Bmp)
    } else if bytes.starts_with(b"II*\0")
        || bytes.starts_with(b"MM\0*")
        || bytes.starts_with(b"II+\0\x08\0\0\0")
        || bytes.starts_with(b"MM\0+\0\x08\0\0")
    {
        Some(Format::Tiff)
    } else if bytes.starts_with(b"\xff\x0a") || bytes.starts_with(b"\0\0\0\x0cJXL \r\n\x87\n") {
        Some(Format::JpegXl)
    } else {
        None
    };
    if let Some(format) = readable {
        return Recognised::Readable(format);
    }
    if let Some(recognised) = recognise_bmff(bytes) {
        return recognised;
    }
    if bytes.starts_with(b"RIFF") && bytes.get(8..12) == Some(b"AVI ") {
        return Recognised::Unreadable("video (AVI)");
    }
    if let Some((_, name)) = UNREADABLE.iter().find(|(start, _)| bytes.starts_with(start)) {
        return Recognised::Unreadable(name);
    }
    if is_preceded_jpeg(bytes) {
        return Recognised::Unreadable("JPEG behind other bytes");
    }
    let head = &bytes[..bytes.len().min(SVG_SEARCH_BYTES)];
    if head.windows(4).any(|w| w == b"<svg") {
        return Recognised::Unreadable("SVG");
    }
    Recognised::Unknown
}

/// Whether a JPEG begins a few bytes after the start: a line break, or a byte order mark.
fn is_preceded_jpeg(bytes: &[u8]) -> bool {
    (1..=8).any(|n| bytes.get(n..n + 3) == Some(b"\xff\xd8\xff"))
}

/// Recognises formats in the ISO base media container by their brands.
fn recognise_bmff(bytes: &[u8]) -> Option<Recognised> {
    let brands = bmff_brands(bytes)?;
    let has = |names: &[&[u8; 4]]| brands.iter().any(|b| names.iter().any(|n| *b == n.as_slice()));
    Some(if has(&[b"avif", b"avis"]) {
        AVIF
    } else if has(&[b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx"]) {
        Recognised::Readable(Format::Heic)
    } else if has(&[b"crx "]) {
        Recognised::Unreadable("camera raw (CR3)")
    } else if has(&[b"mif1", b"msf1", b"mif2"]) {
        // A collection of images whose brands do not say how they are coded.
        Recognised::Readable(Format::Heic)
    } else {
        Recognised::Unreadable("video (MP4)")
    })
}
