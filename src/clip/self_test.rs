//! A self-test of a loaded model: embeds a few pictures and texts, alone and in a batch.

use std::time::{Duration, Instant};

use image::{Rgb, RgbImage};

use super::encoders::Encoders;
use super::error::ClipError;
use crate::balance::statistics::dot_product;

/// Largest allowed difference between an embedding computed alone and in a batch; f16 and bf16 round
/// more than f32.
const BATCH_TOLERANCE: f32 = 5e-3;
/// Largest allowed difference of the length of an embedding from 1.
const LENGTH_TOLERANCE: f32 = 1e-3;

/// Largest difference and times measured by the self-test.
#[derive(Debug, Clone, Copy)]
pub struct SelfTestReport {
    /// Largest difference of a value between an embedding computed alone and in a batch.
    pub max_batch_difference: f32,
    /// Time for one picture alone, after the first ones warmed up.
    pub single_image_time: Duration,
    /// Time for one text alone, likewise.
    pub single_text_time: Duration,
}

/// Embeds test patterns and texts and checks that embeddings are of unit length, differ between
/// inputs, and are the same alone and in a batch.
pub fn run_self_test(encoders: &dyn Encoders) -> Result<SelfTestReport, ClipError> {
    let pictures = [0, 1, 2]
        .map(|kind| encoders.preprocess_image(&test_pattern(kind)))
        .into_iter()
        .collect::<Result<Vec<_>, _>>()?;
    let texts = ["a red mug", "two green chairs on a wooden floor", "a dog"];
    let (images, image_time) = embed_one_by_one(&pictures, |picture| {
        encoders.embed_images(std::slice::from_ref(picture))
    })?;
    let (words, text_time) = embed_one_by_one(&texts, |text| encoders.embed_texts(&[text]))?;
    let mut batch_difference = 0f32;
    let batches =
        [(images, encoders.embed_images(&pictures)?), (words, encoders.embed_texts(&texts)?)];
    for (alone, batch) in &batches {
        for (a, b) in alone.iter().zip(batch) {
            // A difference from NaN is NaN, which no comparison finds.
            if !a.iter().chain(b).all(|value| value.is_finite()) {
                return Err(ClipError::SelfTest("an embedding is not finite".into()));
            }
            let length = dot_product(a, a).sqrt();
            let unit = (length - 1.0).abs() < LENGTH_TOLERANCE;
            if a.len() != encoders.card().dimension || !unit {
                return Err(ClipError::SelfTest(format!(
                    "an embedding has {} values and the length {length}, not {} and 1",
                    a.len(),
                    encoders.card().dimension
                )));
            }
            let difference = a.iter().zip(b).map(|(x, y)| (x - y).abs()).fold(0.0, f32::max);
            batch_difference = batch_difference.max(difference);
        }
        if alone[0] == alone[1] || alone[1] == alone[2] {
            return Err(ClipError::SelfTest("different inputs have the same embedding".into()));
        }
    }
    if batch_difference > BATCH_TOLERANCE {
        return Err(ClipError::SelfTest(format!(
            "an embedding alone and in a batch differ by {batch_difference}"
        )));
    }
    Ok(SelfTestReport {
        max_batch_difference: batch_difference,
        single_image_time: image_time,
        single_text_time: text_time,
    })
}

/// Embeds each input alone; returns the embeddings and the time of the last one.
fn embed_one_by_one<T>(
    inputs: &[T],
    embed: impl Fn(&T) -> Result<Vec<Vec<f32>>, ClipError>,
) -> Result<(Vec<Vec<f32>>, Duration), ClipError> {
    let mut embedded = Vec::with_capacity(inputs.len());
    let mut time = Duration::ZERO;
    for input in inputs {
        let started = Instant::now();
        embedded.extend(embed(input)?);
        time = started.elapsed();
    }
    Ok((embedded, time))
}

/// Returns a picture of stripes (0), squares (1) or a ramp.
fn test_pattern(kind: u32) -> RgbImage {
    RgbImage::from_fn(320, 240, |x, y| match kind {
        0 => Rgb([if x / 16 % 2 == 0 { 230 } else { 20 }, 60, 90]),
        1 => Rgb([40, if (x / 24 + y / 24) % 2 == 0 { 200 } else { 90 }, 160]),
        _ => Rgb([(x / 2) as u8, y as u8, 120]),
    })
}
