//! Arbitrary bytes as an image: decoded within the limits and preprocessed for the model, or rejected.

#![no_main]

use std::sync::LazyLock;

use bsap::clip::{ClipModel, Encoders, ModelOptions};
use bsap::ingest::decode::{self, DecodeOptions};
use libfuzzer_sys::fuzz_target;

static CLIP: LazyLock<ClipModel> = LazyLock::new(|| {
    let checkpoint = concat!(env!("CARGO_MANIFEST_DIR"), "/../fixtures/clip-gelu").to_owned();
    ClipModel::load(&ModelOptions { checkpoint, ..ModelOptions::default() }).expect("the fixture")
});

fuzz_target!(|data: &[u8]| {
    // Small limits: an image over them is rejected by its header, which costs nothing.
    let options = DecodeOptions { max_side: 4_096, max_pixels: 1 << 20, budget_mib: 64 };
    match decode::decode(data, &options) {
        Ok(image) => {
            assert!(u64::from(image.width()) * u64::from(image.height()) <= options.max_pixels);
            CLIP.preprocess_image(&image).expect("a decoded image can be preprocessed");
        }
        Err(error) => assert!(!error.to_string().is_empty()),
    }
});
