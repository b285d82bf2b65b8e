//! Any bytes as a picture: decoded within the limits and prepared for the model, or refused.

#![no_main]

use std::sync::LazyLock;

use bsap::clip::{Clip, Options, Towers};
use bsap::ingest::decode;
use libfuzzer_sys::fuzz_target;

static CLIP: LazyLock<Clip> = LazyLock::new(|| {
    let checkpoint = concat!(env!("CARGO_MANIFEST_DIR"), "/../fixtures/clip-gelu").to_owned();
    Clip::load(&Options { checkpoint, ..Options::default() }).expect("the fixture")
});

fuzz_target!(|data: &[u8]| {
    // Small limits: what they refuse costs nothing, whatever the header says.
    let options = decode::Options { max_side: 4_096, max_pixels: 1 << 20, budget_mib: 64 };
    match decode::decode(data, &options) {
        Ok(picture) => {
            assert!(u64::from(picture.width()) * u64::from(picture.height()) <= options.max_pixels);
            CLIP.prepare(&picture).expect("a decoded picture can be prepared");
        }
        Err(error) => assert!(!error.to_string().is_empty()),
    }
});
