//! Every flavour of every format is decoded right or rejected by name: the decoders are compared with the pixels
//! that Pillow sees. `make.py` writes the files and the pixels; BSAP_DECODING_CASES names a larger set.

#![allow(clippy::unwrap_used)]

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Read};
use std::path::Path;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use bsap::ingest::decode::{
    DamagedImages, DecodeOptions, ImageDecodeError, decode_image, decode_with_report,
    estimate_decode_memory_bytes,
};
use flate2::read::{GzDecoder, ZlibDecoder};
use image::RgbImage;
use rand::{RngExt as _, SeedableRng as _};
use rand_chacha::ChaCha8Rng;
use serde::Deserialize;

const CASES: &str = "tests/fixtures/decoding/cases.jsonl.gz";

/// A line of the file: a reference, which has `pixels` and its size, or a case.
#[derive(Deserialize)]
struct Line {
    pixels: Option<String>,
    #[serde(default)]
    width: u32,
    #[serde(default)]
    height: u32,
    #[serde(default)]
    name: String,
    #[serde(default)]
    kind: String,
    data: String,
    expected: Option<String>,
    #[serde(default)]
    must: bool,
    #[serde(default)]
    mean: f64,
    #[serde(default)]
    max: u8,
}

struct Case {
    name: String,
    kind: String,
    bytes: Vec<u8>,
    expected: Option<String>,
    must: bool,
    mean: f64,
    max: u8,
}

struct Cases {
    cases: Vec<Case>,
    references: BTreeMap<String, RgbImage>,
}

fn read_cases() -> Cases {
    let file = std::env::var("BSAP_DECODING_CASES").unwrap_or_else(|_| CASES.into());
    let file = std::fs::File::open(&file).unwrap_or_else(|e| panic!("{file}: {e}"));
    let (mut cases, mut references) = (Vec::new(), BTreeMap::new());
    for line in BufReader::new(GzDecoder::new(file)).lines() {
        let line: Line = serde_json::from_str(&line.unwrap()).unwrap();
        let bytes = STANDARD.decode(line.data).unwrap();
        if let Some(key) = line.pixels {
            let mut rgb = Vec::new();
            ZlibDecoder::new(&bytes[..]).read_to_end(&mut rgb).unwrap();
            references.insert(key, RgbImage::from_raw(line.width, line.height, rgb).unwrap());
        } else {
            let Line { name, kind, expected, must, mean, max, .. } = line;
            cases.push(Case { name, kind, bytes, expected, must, mean, max });
        }
    }
    Cases { cases, references }
}

/// What became of a case, as the table counts it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Outcome {
    Right,
    Refused,
    /// Damage that was noticed.
    Noticed,
    /// Bytes were overwritten in a way that no decoder can notice.
    Unnoticed,
    Wrong,
}

/// Whether this build reads such files at all.
fn is_read(case: &Case) -> bool {
    cfg!(feature = "avif") || Path::new(&case.name).extension().is_none_or(|e| e != "avif")
}

/// Decides about one case; the text says what is wrong.
fn judge(case: &Case, references: &BTreeMap<String, RgbImage>) -> (Outcome, String) {
    let options = DecodeOptions::default();
    let decoded = decode_image(&case.bytes, &options);
    if let Err(error @ ImageDecodeError::Panicked { .. }) = &decoded {
        return (Outcome::Wrong, error.to_string());
    }
    let estimate = estimate_decode_memory_bytes(&case.bytes, &options);
    if decoded.is_ok() && estimate.is_err() {
        return (Outcome::Wrong, format!("its memory cannot be estimated: {estimate:?}"));
    }
    let code = decoded.as_ref().err().map(ImageDecodeError::code);
    let text = decoded.as_ref().err().map(ToString::to_string).unwrap_or_default();
    match (case.kind.as_str(), decoded) {
        ("sound", Ok(image)) => {
            let expected = &references[case.expected.as_ref().unwrap()];
            if image.dimensions() != expected.dimensions() {
                let sizes = (image.dimensions(), expected.dimensions());
                return (Outcome::Wrong, format!("size {sizes:?}"));
            }
            let (mean, max) = difference(&image, expected);
            if mean > case.mean || max > case.max {
                return (Outcome::Wrong, format!("differs by {mean:.2}, at most {max}"));
            }
            (Outcome::Right, String::new())
        }
        (_, Err(_)) if !is_read(case) && text.starts_with("AVIF") => (Outcome::Refused, text),
        ("sound", Err(_)) if case.must => (Outcome::Wrong, format!("must be read: {text}")),
        // Without its end marker, a whole picture cannot be distinguished from a cut one in every format.
        ("sound", Err(_))
            if code == Some("unsupported_format") || case.name.contains("without-") =>
        {
            (Outcome::Refused, text)
        }
        ("damaged" | "overwritten", Err(_))
            if matches!(
                code,
                Some("image_damaged" | "unknown_image_format" | "unsupported_format")
            ) =>
        {
            (Outcome::Noticed, text)
        }
        ("overwritten", Ok(_)) => (Outcome::Unnoticed, String::new()),
        ("foreign", Err(_)) if code == Some("unsupported_format") => (Outcome::Refused, text),
        (kind, Ok(_)) => (Outcome::Wrong, format!("{kind}, and decoded")),
        (kind, Err(_)) => (Outcome::Wrong, format!("{kind}, and rejected as {code:?}: {text}")),
    }
}

/// The mean and the largest difference of the samples of two images of one size.
fn difference(a: &RgbImage, b: &RgbImage) -> (f64, u8) {
    let differences = a.as_raw().iter().zip(b.as_raw()).map(|(a, b)| a.abs_diff(*b));
    let sum: u64 = differences.clone().map(u64::from).sum();
    (sum as f64 / a.as_raw().len() as f64, differences.max().unwrap_or(0))
}

/// Judges all cases on all cores.
fn judge_all(cases: &Cases) -> Vec<(Outcome, String)> {
    let next = AtomicUsize::new(0);
    let workers = std::thread::available_parallelism().map_or(1, usize::from);
    let mut judged: Vec<(usize, (Outcome, String))> = std::thread::scope(|scope| {
        let work = || {
            let mut judged = Vec::new();
            while let Some((i, case)) = {
                let i = next.fetch_add(1, Ordering::Relaxed);
                cases.cases.get(i).map(|case| (i, case))
            } {
                judged.push((i, judge(case, &cases.references)));
            }
            judged
        };
        let threads: Vec<_> = (0..workers).map(|_| scope.spawn(work)).collect();
        threads.into_iter().flat_map(|thread| thread.join().unwrap()).collect()
    });
    judged.sort_by_key(|(i, _)| *i);
    judged.into_iter().map(|(_, judgement)| judgement).collect()
}

#[test]
fn no_picture_decodes_wrongly_in_silence() {
    let cases = read_cases();
    assert!(cases.cases.len() > 500, "only {} cases", cases.cases.len());
    let mut table: BTreeMap<&str, BTreeMap<Outcome, usize>> = BTreeMap::new();
    let mut wrong = Vec::new();
    for (case, (outcome, text)) in cases.cases.iter().zip(judge_all(&cases)) {
        let extension = Path::new(&case.name).extension().and_then(|e| e.to_str()).unwrap_or("");
        let format = if case.name.starts_with("other.") { "other" } else { extension };
        *table.entry(format).or_default().entry(outcome).or_default() += 1;
        match outcome {
            Outcome::Wrong => wrong.push(format!("{}: {text}", case.name)),
            Outcome::Refused => println!("refused {}: {text}", case.name),
            _ => {}
        }
    }
    println!("{:8} right refused noticed unnoticed wrong", "");
    for (format, counts) in &table {
        let count = |outcome| counts.get(&outcome).copied().unwrap_or(0);
        println!(
            "{format:8} {:5} {:7} {:7} {:9} {:5}",
            count(Outcome::Right),
            count(Outcome::Refused),
            count(Outcome::Noticed),
            count(Outcome::Unnoticed),
            count(Outcome::Wrong)
        );
    }
    assert!(
        wrong.is_empty(),
        "{} of {} files:\n{}",
        wrong.len(),
        cases.cases.len(),
        wrong.join("\n")
    );
}

#[test]
fn a_part_of_a_damaged_picture_is_accepted_only_by_rule_and_says_how_much_it_is() {
    let cases = read_cases();
    let options = |min_decoded_share| DecodeOptions {
        damaged: DamagedImages::Accept,
        min_decoded_share,
        ..DecodeOptions::default()
    };
    for name in [
        "420-cut-80.jpg",
        "444-cut-50.jpg",
        "png-cut-80.png",
        "bmp-cut-80.bmp",
        "tif-strips-cut-80.tif",
    ] {
        let case = cases.cases.iter().find(|case| case.name == name).expect(name);
        let refused = decode_image(&case.bytes, &DecodeOptions::default()).unwrap_err();
        assert_eq!(refused.code(), "image_damaged", "{name}");
        let part = decode_with_report(&case.bytes, &options(0.01)).expect(name);
        assert!(
            part.decoded_share > 0.0 && part.decoded_share < 1.0,
            "{name}: {}",
            part.decoded_share
        );
        let refused = decode_image(&case.bytes, &options(1.0)).unwrap_err();
        assert_eq!(refused.code(), "image_damaged", "{name}");
    }
    let must_be_read = |case: &&Case| case.kind == "sound" && case.must && is_read(case);
    for case in cases.cases.iter().filter(must_be_read) {
        let whole = decode_with_report(&case.bytes, &options(0.5)).unwrap();
        assert_eq!(whole.decoded_share, 1.0, "{}", case.name);
    }
}

#[test]
fn every_decoder_rejects_an_image_that_is_too_large_by_its_header() {
    let cases = read_cases();
    let small = DecodeOptions { max_side: 16, ..DecodeOptions::default() };
    for name in [
        "drawn-2x2.jpg",
        "rgb-8.png",
        "lossy.webp",
        "plain.gif",
        "24.bmp",
        "rgb-lzw.tif",
        "plain.heic",
        "lossy.jxl",
        #[cfg(feature = "avif")]
        "plain.avif",
        #[cfg(feature = "avif")]
        "grid.avif",
    ] {
        let case = cases.cases.iter().find(|case| case.name == name).expect(name);
        for error in [
            decode_image(&case.bytes, &small).map(|_| ()).unwrap_err(),
            estimate_decode_memory_bytes(&case.bytes, &small).map(|_| ()).unwrap_err(),
        ] {
            assert_eq!(error.code(), "image_too_large", "{name}");
        }
    }
}

/// Decoders that can be interrupted end at the deadline; what the others return after it is rejected.
#[test]
fn every_decoder_has_to_end_in_time() {
    let cases = read_cases();
    let none = DecodeOptions { timeout_ms: 0, ..DecodeOptions::default() };
    let mut extensions = std::collections::BTreeSet::new();
    for case in cases.cases.iter().filter(|case| case.kind == "sound" && case.must && is_read(case))
    {
        let extension = case.name.rsplit('.').next().unwrap();
        if extensions.insert(extension) {
            let error = decode_image(&case.bytes, &none).unwrap_err();
            assert_eq!(error.code(), "decode_timed_out", "{}: {error}", case.name);
        }
    }
    assert!(extensions.len() >= 8, "{extensions:?}");
}

/// Changes some bytes of a file, cuts it, or puts a part of another file into it.
fn mutate(bytes: &[u8], other: &[u8], random: &mut ChaCha8Rng) -> Vec<u8> {
    let mut mutated = bytes.to_vec();
    match random.random_range(0..10) {
        0 => mutated.truncate(random.random_range(0..bytes.len())),
        1 => {
            let from = random.random_range(0..other.len());
            let part = &other[from..other.len().min(from + random.random_range(1..64))];
            let at = random.random_range(0..bytes.len());
            mutated.splice(at..at, part.iter().copied());
        }
        _ => {
            // Headers are short, and more depends on them.
            let end = if random.random_bool(0.5) { bytes.len().min(512) } else { bytes.len() };
            for _ in 0..random.random_range(1..=8) {
                let byte = &mut mutated[random.random_range(0..end)];
                *byte = match random.random_range(0..4) {
                    0 => 0,
                    1 => 255,
                    2 => *byte ^ (1 << random.random_range(0..8)),
                    _ => random.random(),
                };
            }
        }
    }
    mutated
}

/// `just decoding` tries many more; the same seed changes the same bytes.
#[test]
fn no_changed_file_panics_a_decoder_or_exceeds_the_limits() {
    let number = |name: &str, default| {
        std::env::var(name).map_or(default, |text| text.parse().expect("a number"))
    };
    let (files, seed) = (number("BSAP_DECODING_FILES", 500), number("BSAP_DECODING_SEED", 1));
    let cases = read_cases().cases;
    let mut random = ChaCha8Rng::seed_from_u64(seed);
    let mut decoded = 0;
    let mut slowest = (Duration::ZERO, String::new());
    for file in 0..files {
        let case = &cases[random.random_range(0..cases.len())];
        let other = &cases[random.random_range(0..cases.len())];
        let bytes = mutate(&case.bytes, &other.bytes, &mut random);
        let options = DecodeOptions {
            max_side: 4_096,
            max_pixels: 1 << 20,
            damaged: if file % 2 == 0 { DamagedImages::Refuse } else { DamagedImages::Accept },
            min_decoded_share: 0.01,
            ..DecodeOptions::default()
        };
        let started = Instant::now();
        let estimate = estimate_decode_memory_bytes(&bytes, &options);
        match decode_image(&bytes, &options) {
            Ok(image) => {
                assert!(estimate.is_ok(), "file {file}, of {}: no estimate", case.name);
                let pixels = u64::from(image.width()) * u64::from(image.height());
                assert!(pixels <= options.max_pixels, "file {file}, of {}: {pixels}", case.name);
                decoded += 1;
            }
            Err(error) => {
                assert_ne!(
                    error.code(),
                    "decoder_panicked",
                    "file {file}, of {}: {error}",
                    case.name
                );
            }
        }
        slowest = slowest.max((started.elapsed(), case.name.clone()));
    }
    println!("{decoded} of {files} changed files are decoded; slowest: {slowest:?}");
}
