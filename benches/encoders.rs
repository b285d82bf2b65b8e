//! Times the encoders on request, for `tests/parity/speed.py`, which alternates them with other
//! programs in one run. Each line on standard input is `image N` or `text N`; the answer is the
//! time that one batch of N inputs took, in milliseconds.
//!
//!     cargo bench --bench encoders -- FOLDER [PRECISION [DEVICE]]

use std::error::Error;
use std::io::BufRead;
use std::time::Instant;

use bsap::clip::{ClipModel, DeviceChoice, Encoders, ModelOptions, Precision};
use clap::ValueEnum;
use image::RgbImage;

/// Eight tokens including start and end, about as many as most queries have.
const SAMPLE_TEXT: &str = "a red mug on the table";

fn main() -> Result<(), Box<dyn Error>> {
    // `cargo bench` adds --bench.
    let mut arguments = std::env::args().skip(1).filter(|a| a != "--bench");
    let Some(checkpoint) = arguments.next() else {
        println!("encoders: give the folder of a checkpoint, as `just speed` does");
        return Ok(());
    };
    let dtype =
        arguments.next().map_or(Ok(Precision::F32), |name| Precision::from_str(&name, true))?;
    let device = DeviceChoice::try_from(arguments.next().unwrap_or_else(|| "cpu".into()))?;
    let clip =
        ClipModel::load(&ModelOptions { checkpoint, dtype, device, ..ModelOptions::default() })?;
    let image = RgbImage::from_fn(256, 256, |x, y| image::Rgb([x as u8, y as u8, (x * y) as u8]));
    let pixels = clip.preprocess_image(&image)?;
    for line in std::io::stdin().lock().lines() {
        let line = line?;
        let (kind, count) = line.split_once(' ').ok_or("not `image N` or `text N`")?;
        let count: usize = count.parse()?;
        let started = Instant::now();
        let embedded = match kind {
            "image" => clip.embed_images(&vec![pixels.clone(); count])?,
            _ => clip.embed_texts(&vec![SAMPLE_TEXT; count])?,
        };
        let elapsed = started.elapsed().as_secs_f64() * 1e3;
        std::hint::black_box(embedded);
        println!("{elapsed}");
    }
    Ok(())
}
