//! Metadata in the boxes of HEIC and AVIF (ISO 23008-12) and of JPEG XL (ISO 18181-2).

use std::borrow::Cow;

use crate::ingest::containers::{
    ItemPlace, MetadataBlocks, bmff_boxes, item_entries, read_item_places, without_exif_prefix,
};

/// The media type of XMP.
const XMP_TYPE: &[u8] = b"application/rdf+xml";

/// Finds the boxes `Exif` and `xml `, unless they are compressed.
pub fn find_in_jpeg_xl(bytes: &[u8]) -> MetadataBlocks<'_> {
    let mut blocks = MetadataBlocks::default();
    for (kind, content) in bmff_boxes(bytes) {
        match kind {
            b"Exif" => blocks.exif = exif_after_offset(content).map(Cow::Borrowed),
            b"xml " => blocks.xmp = Some(content.into()),
            _ => {}
        }
    }
    blocks
}

/// Finds the items of the types `Exif` and `mime` with XMP.
pub fn find_in_heif(bytes: &[u8]) -> MetadataBlocks<'_> {
    let mut blocks = MetadataBlocks::default();
    let Some((_, meta)) = bmff_boxes(bytes).find(|(kind, _)| *kind == b"meta") else {
        return blocks;
    };
    // Version and flags come first.
    let children = || bmff_boxes(meta.get(4..).unwrap_or_default());
    let child =
        |wanted: &[u8]| children().find(|(kind, _)| *kind == wanted).map(|(_, content)| content);
    let (Some(information), Some(locations)) = (child(b"iinf"), child(b"iloc")) else {
        return blocks;
    };
    let places = read_item_places(locations, bytes, child(b"idat").unwrap_or_default());
    for entry in item_entries(information) {
        let Some(ItemPlace::Whole(content)) = places.get(&entry.id) else { continue };
        match entry.kind {
            b"Exif" => blocks.exif = exif_after_offset(content).map(Cow::Borrowed),
            // Behind its name is the type of its content.
            b"mime" if entry.texts.split(|byte| *byte == 0).nth(1) == Some(XMP_TYPE) => {
                blocks.xmp = Some(Cow::Borrowed(content));
            }
            _ => {}
        }
    }
    blocks
}

/// EXIF in boxes begins with the offset of the TIFF header in what follows.
fn exif_after_offset(content: &[u8]) -> Option<&[u8]> {
    let (offset, rest) = content.split_at_checked(4)?;
    let offset = u32::from_be_bytes(offset.try_into().ok()?) as usize;
    Some(without_exif_prefix(rest.get(offset..)?))
}
