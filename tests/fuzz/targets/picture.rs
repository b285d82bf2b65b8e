//! Decodes any bytes as an image: it must be within the limits and ready for the model, or rejected.

#![no_main]

use std::sync::LazyLock;

use bsap::clip::{ClipModel, Encoders, ModelOptions};
use bsap::ingest::decode::{self, DamagedImages, ImageDecodeError};
use libfuzzer_sys::fuzz_target;

static MODEL: LazyLock<ClipModel> = LazyLock::new(|| {
    let checkpoint = concat!(env!("CARGO_MANIFEST_DIR"), "/../fixtures/clip-gelu").to_owned();
    ClipModel::load(&ModelOptions { checkpoint, ..ModelOptions::default() }).expect("the fixture")
});

fuzz_target!(|data: &[u8]| {
    // Small limits, so that large dimensions in a header are rejected at once.
    let options = decode::DecodeOptions {
        max_side: 4_096,
        max_pixels: 1 << 20,
        budget_mib: 64,
        // What is accepted in part goes through every recovery of the decoders.
        damaged: if data.len() % 2 == 0 { DamagedImages::Refuse } else { DamagedImages::Accept },
        min_decoded_share: 0.01,
        ..decode::DecodeOptions::default()
    };
    let estimate = decode::estimate_decode_memory_bytes(data, &options);
    match decode::decode_image(data, &options) {
        Ok(image) => {
            assert!(estimate.is_ok(), "what is decoded has an estimate");
            assert!(u64::from(image.width()) * u64::from(image.height()) <= options.max_pixels);
            MODEL.preprocess_image(&image).expect("a decoded image can be preprocessed");
        }
        // A panic is reported, not raised: it would be hidden here.
        Err(ImageDecodeError::Panicked { message, .. }) => panic!("{message}"),
        Err(error) => assert!(!error.to_string().is_empty()),
    }
});
