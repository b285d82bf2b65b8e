//! What the pipeline's batching and the snapshot's single scan are worth, each against its plain
//! alternative, alternating in one run. Prints medians and their ratio.
//!
//!     just bench

use std::time::{Duration, Instant};

use bsap::clip::{Clip, Options, Towers};
use bsap::demo::catalogue::{Scene, Style};
use bsap::demo::draw::render;
use bsap::balance::normalise::{Balance, Normaliser, Scale};
use bsap::balance::statistics::{Statistics, auxiliary_scores, dot};

const ROUNDS: usize = 15;
const IMAGES: usize = 20_000;
const DIMENSION: usize = 512;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let checkpoint = concat!(env!("CARGO_MANIFEST_DIR"), "/models/demo").to_owned();
    let clip = Clip::load(&Options { checkpoint, ..Options::default() })?;

    let pictures = (0..32)
        .map(|n| {
            let jpeg = render(&Scene::sample(1, n, Style::Studio), 256)?;
            let picture = bsap::ingest::decode::decode(&jpeg, &bsap::ingest::decode::Options::default())?;
            Ok(clip.prepare(&picture)?)
        })
        .collect::<Result<Vec<_>, Box<dyn std::error::Error>>>()?;
    compare(
        "32 pictures through the image tower",
        ("one by one", || {
            for picture in &pictures {
                keep(clip.embed_images(std::slice::from_ref(picture)));
            }
        }),
        ("one batch", || keep(clip.embed_images(&pictures))),
    );

    let texts: Vec<String> = (0..32).map(|n| Scene::sample(1, n, Style::Studio).title()).collect();
    let texts: Vec<&str> = texts.iter().map(String::as_str).collect();
    compare(
        "32 texts through the text tower",
        ("one by one", || {
            for text in &texts {
                keep(clip.embed_texts(&[text]));
            }
        }),
        ("one batch", || keep(clip.embed_texts(&texts))),
    );

    let prompts: Vec<Vec<f32>> = (0..256).map(vector).collect();
    let vectors: Vec<Vec<f32>> = (0..IMAGES).map(|i| vector(i + 1_000)).collect();
    let statistics: Vec<Statistics> = vectors
        .iter()
        .filter_map(|v| Statistics::of(&auxiliary_scores(v, &prompts), 100.0, 8))
        .collect();
    let query = vector(7);
    let balance = Balance {
        normaliser: Normaliser::Softmax,
        weight: 0.25,
        lambda: 1.0,
        scale: Scale::default(),
    };
    compare(
        "scores of 20,000 images of 512 values",
        ("plain", || keep(vectors.iter().map(|v| dot(&query, v)).collect::<Vec<_>>())),
        ("plain and balanced", || {
            let both = vectors.iter().zip(&statistics).map(|(v, s)| {
                let raw = dot(&query, v);
                (raw, balance.affine(s, 100.0).score(raw))
            });
            keep(both.collect::<Vec<_>>());
        }),
    );
    compare(
        "a query answered from stored statistics, 2,000 images, 256 prompts",
        ("statistics computed by the query", || {
            let scores = vectors[..2_000].iter().map(|v| {
                let statistics = Statistics::of(&auxiliary_scores(v, &prompts), 100.0, 8)?;
                Some(balance.affine(&statistics, 100.0).score(dot(&query, v)))
            });
            keep(scores.collect::<Vec<_>>());
        }),
        ("statistics stored at ingest", || {
            let scores = vectors[..2_000]
                .iter()
                .zip(&statistics)
                .map(|(v, s)| balance.affine(s, 100.0).score(dot(&query, v)));
            keep(scores.collect::<Vec<_>>());
        }),
    );
    Ok(())
}

/// Runs both sides in turn and prints their medians.
fn compare(what: &str, plain: (&str, impl FnMut()), ours: (&str, impl FnMut())) {
    let ((plain_name, mut plain), (our_name, mut ours)) = (plain, ours);
    let (mut plain_times, mut our_times) = (Vec::new(), Vec::new());
    plain();
    ours();
    for _ in 0..ROUNDS {
        plain_times.push(time(&mut plain));
        our_times.push(time(&mut ours));
    }
    let (a, b) = (median(plain_times), median(our_times));
    println!("{what}");
    println!("  {plain_name:<36} {a:>10.2?}");
    println!("  {our_name:<36} {b:>10.2?}   ratio {:.2}", a.as_secs_f64() / b.as_secs_f64());
}

fn time(work: &mut impl FnMut()) -> Duration {
    let started = Instant::now();
    work();
    started.elapsed()
}

fn median(mut times: Vec<Duration>) -> Duration {
    times.sort_unstable();
    times[times.len() / 2]
}

fn keep<T>(value: T) {
    std::hint::black_box(value);
}

/// A unit vector that follows from `seed`.
fn vector(seed: usize) -> Vec<f32> {
    let values: Vec<f32> =
        (0..DIMENSION).map(|i| ((seed * 7_919 + i * 104_729) as f32 * 0.618).sin()).collect();
    let length = values.iter().map(|v| v * v).sum::<f32>().sqrt();
    values.iter().map(|v| v / length).collect()
}
