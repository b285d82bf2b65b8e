//! Compares batching, balancing and stored statistics with their simple alternatives. Both sides
//! alternate in one run. Prints medians and their ratio.
//!
//!     just bench

use std::time::{Duration, Instant};

use bsap::balance::normalise::{BalanceParameters, Normaliser, ScaleConstants};
use bsap::balance::statistics::{ScoreStatistics, dot_product, score_prompts};
use bsap::clip::{ClipModel, Encoders, ModelOptions};
use bsap::demo::catalogue::{PhotoStyle, Scene};
use bsap::demo::draw::render_jpeg;

const MEASURED_ROUNDS: usize = 15;
const IMAGES: usize = 20_000;
const DIMENSION: usize = 512;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let checkpoint = concat!(env!("CARGO_MANIFEST_DIR"), "/models/demo").to_owned();
    let clip = ClipModel::load(&ModelOptions { checkpoint, ..ModelOptions::default() })?;

    let images = (0..32)
        .map(|n| {
            let jpeg = render_jpeg(&Scene::sample(1, n, PhotoStyle::Studio), 256)?;
            let image = bsap::ingest::decode::decode_image(
                &jpeg,
                &bsap::ingest::decode::DecodeOptions::default(),
            )?;
            Ok(clip.preprocess_image(&image)?)
        })
        .collect::<Result<Vec<_>, Box<dyn std::error::Error>>>()?;
    compare_medians(
        "32 images embedded",
        ("one by one", || {
            for image in &images {
                consume(clip.embed_images(std::slice::from_ref(image)));
            }
        }),
        ("one batch", || consume(clip.embed_images(&images))),
    );

    let texts: Vec<String> =
        (0..32).map(|n| Scene::sample(1, n, PhotoStyle::Studio).title()).collect();
    let texts: Vec<&str> = texts.iter().map(String::as_str).collect();
    compare_medians(
        "32 texts embedded",
        ("one by one", || {
            for text in &texts {
                consume(clip.embed_texts(&[text]));
            }
        }),
        ("one batch", || consume(clip.embed_texts(&texts))),
    );

    let prompts: Vec<Vec<f32>> = (0..256).map(unit_vector).collect();
    let vectors: Vec<Vec<f32>> = (0..IMAGES).map(|i| unit_vector(i + 1_000)).collect();
    let statistics: Vec<ScoreStatistics> = vectors
        .iter()
        .filter_map(|v| ScoreStatistics::from_scores(&score_prompts(v, &prompts), 100.0, 8))
        .collect();
    let query = unit_vector(7);
    let balance = BalanceParameters {
        normaliser: Normaliser::Softmax,
        weight: 0.25,
        lambda: 1.0,
        scale: ScaleConstants::default(),
    };
    compare_medians(
        "scores of 20,000 images of 512 values",
        ("plain", || consume(vectors.iter().map(|v| dot_product(&query, v)).collect::<Vec<_>>())),
        ("plain and balanced", || {
            let both = vectors.iter().zip(&statistics).map(|(v, s)| {
                let raw = dot_product(&query, v);
                (raw, balance.affine_transform(s, 100.0).apply(raw))
            });
            consume(both.collect::<Vec<_>>());
        }),
    );
    compare_medians(
        "a query answered from stored statistics, 2,000 images, 256 prompts",
        ("statistics computed by the query", || {
            let scores = vectors[..2_000].iter().map(|v| {
                let statistics =
                    ScoreStatistics::from_scores(&score_prompts(v, &prompts), 100.0, 8)?;
                Some(balance.affine_transform(&statistics, 100.0).apply(dot_product(&query, v)))
            });
            consume(scores.collect::<Vec<_>>());
        }),
        ("statistics stored at ingest", || {
            let scores = vectors[..2_000]
                .iter()
                .zip(&statistics)
                .map(|(v, s)| balance.affine_transform(s, 100.0).apply(dot_product(&query, v)));
            consume(scores.collect::<Vec<_>>());
        }),
    );
    Ok(())
}

/// Runs both sides alternately and prints their medians.
fn compare_medians(title: &str, plain: (&str, impl FnMut()), ours: (&str, impl FnMut())) {
    let ((plain_name, mut plain), (our_name, mut ours)) = (plain, ours);
    let (mut plain_times, mut our_times) = (Vec::new(), Vec::new());
    plain();
    ours();
    for _ in 0..MEASURED_ROUNDS {
        plain_times.push(time_once(&mut plain));
        our_times.push(time_once(&mut ours));
    }
    let (plain_median, our_median) = (median(plain_times), median(our_times));
    let ratio = plain_median.as_secs_f64() / our_median.as_secs_f64();
    println!("{title}");
    println!("  {plain_name:<36} {plain_median:>10.2?}");
    println!("  {our_name:<36} {our_median:>10.2?}   ratio {ratio:.2}");
}

fn time_once(work: &mut impl FnMut()) -> Duration {
    let started = Instant::now();
    work();
    started.elapsed()
}

fn median(mut times: Vec<Duration>) -> Duration {
    times.sort_unstable();
    times[times.len() / 2]
}

/// Keeps the compiler from removing the computation of `value`.
fn consume<T>(value: T) {
    std::hint::black_box(value);
}

/// Returns a unit vector that depends on `seed` alone.
fn unit_vector(seed: usize) -> Vec<f32> {
    let values: Vec<f32> =
        (0..DIMENSION).map(|i| ((seed * 7_919 + i * 104_729) as f32 * 0.618).sin()).collect();
    let length = values.iter().map(|v| v * v).sum::<f32>().sqrt();
    values.iter().map(|v| v / length).collect()
}
