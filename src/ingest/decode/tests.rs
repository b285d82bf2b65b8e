//! Tests of the decoders by formats that are encoded here; `tests/decoding` compares with stored pixels.

use super::*;
use image::{DynamicImage, ImageFormat, Rgba, RgbaImage};
use std::io::Cursor;

fn encode_image(image: &DynamicImage, format: ImageFormat) -> Vec<u8> {
    let mut bytes = Cursor::new(Vec::new());
    image.write_to(&mut bytes, format).unwrap();
    bytes.into_inner()
}

#[test]
fn every_format_is_detected_from_its_content() {
    for (file, size) in [
        ("small.jpeg", (9, 7)),
        ("9x7.png", (9, 7)),
        ("small.webp", (9, 7)),
        ("small.gif", (9, 7)),
        ("small.bmp", (9, 7)),
        ("small.tiff", (9, 7)),
    ] {
        let bytes = std::fs::read(format!("tests/fuzz/corpus/picture/{file}")).unwrap();
        let decoded = decode_image(&bytes, &DecodeOptions::default()).unwrap();
        assert_eq!(decoded.dimensions(), size, "{file}");
        assert!(estimate_decode_memory_bytes(&bytes, &DecodeOptions::default()).unwrap() > 0);
    }
}

#[test]
fn transparent_pixels_are_blended_onto_white() {
    let mut image = RgbaImage::from_pixel(2, 1, Rgba([0, 0, 0, 0]));
    image.put_pixel(1, 0, Rgba([0, 0, 0, 128]));
    let decoded =
        decode_image(&encode_image(&image.into(), ImageFormat::Png), &DecodeOptions::default())
            .unwrap();
    assert_eq!(decoded.get_pixel(0, 0).0, [255; 3]);
    assert_eq!(decoded.get_pixel(1, 0).0, [127; 3]);
}

#[test]
fn a_decompression_bomb_is_rejected_by_its_header() {
    // A PNG that claims 50,000 × 50,000 pixels and has none.
    let mut png = encode_image(&DynamicImage::new_rgb8(1, 1), ImageFormat::Png);
    png[16..20].copy_from_slice(&50_000u32.to_be_bytes());
    png[20..24].copy_from_slice(&50_000u32.to_be_bytes());
    let crc = crc32(&png[12..29]);
    png[29..33].copy_from_slice(&crc.to_be_bytes());
    let error = decode_image(&png, &DecodeOptions::default()).unwrap_err();
    assert_eq!(error.code(), "image_too_large");
}

#[test]
fn decoders_that_can_be_interrupted_end_at_the_deadline() {
    let over = deadline::Deadline::start(0);
    let options = DecodeOptions::default();
    let read = |file: &str| std::fs::read(format!("tests/fuzz/corpus/picture/{file}")).unwrap();
    for (file, format) in [
        ("9x7.png", Format::Png),
        ("small.webp", Format::WebP),
        ("small.gif", Format::Gif),
        ("small.bmp", Format::Bmp),
    ] {
        assert!(raster::decode(&read(file), format, &options, over).is_err(), "{file}");
    }
    let error = tiff::decode(&read("small.tiff"), &options, over).unwrap_err();
    assert_eq!(error.code(), "decode_timed_out");
    let error = jpeg_xl::decode(&read("small.jxl"), &options, over).unwrap_err();
    assert_eq!(error.code(), "decode_timed_out");
}

#[test]
fn non_images_are_rejected() {
    for (bytes, code) in [
        (&b""[..], "unknown_image_format"),
        (b"hello", "unknown_image_format"),
        (b"\x89PNG\r\n\x1a\n", "image_damaged"),
        (b"\xff\xd8\xff\xe0", "image_damaged"),
        (b"GIF89a\x01\0\0\0\0\0\0", "image_damaged"),
    ] {
        assert_eq!(decode_image(bytes, &DecodeOptions::default()).unwrap_err().code(), code);
    }
}

fn crc32(bytes: &[u8]) -> u32 {
    let mut crc = u32::MAX;
    for byte in bytes {
        crc ^= u32::from(*byte);
        for _ in 0..8 {
            crc = (crc >> 1) ^ (0xEDB8_8320 * (crc & 1));
        }
    }
    !crc
}
