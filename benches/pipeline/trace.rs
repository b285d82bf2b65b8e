//! Where the time of an image goes: decoding and resizing beside the towers.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde::Deserialize;
use tracing_chrome::ChromeLayerBuilder;
use tracing_subscriber::filter::{LevelFilter, Targets};
use tracing_subscriber::prelude::*;

use super::{Result, ingest_all, load};

/// Of the drawn part of the trace, in microseconds, and its columns.
const DRAWN: f64 = 2e6;
const COLUMNS: usize = 100;

/// What a line of the trace holds.
#[derive(Deserialize)]
struct Line {
    ph: String,
    #[serde(default)]
    name: String,
    #[serde(default)]
    ts: f64,
    tid: u64,
}

/// From when to when, in microseconds.
type Interval = (f64, f64);

/// Ingests `files` with the towers of `checkpoint`, writes the trace to `file` and tells what it says.
pub fn run(files: &[PathBuf], checkpoint: &str, file: &Path) -> Result<()> {
    let (layer, writing) = ChromeLayerBuilder::new().file(file).build();
    let ours = Targets::new().with_target("bsap::ingest", LevelFilter::TRACE);
    tracing_subscriber::registry().with(layer.with_filter(ours)).try_init()?;
    let towers = Arc::new(load(checkpoint)?);
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    let rate = runtime.block_on(ingest_all(files, towers))?;
    drop(writing);
    let [towers, decoded] = read(file)?;
    let (Some(first), Some(last)) = (towers.first(), towers.last()) else {
        return Err("no batch was traced".into());
    };
    // Until the first batch is there, the towers have nothing to do whatever the pipeline is like.
    let (from, to) = (first.0, last.1);
    let busy = sum(&towers);
    let beside: f64 =
        decoded.iter().map(|span| towers.iter().map(|t| common(*t, *span)).sum::<f64>()).sum();
    println!("{rate:.1} pictures/s with {checkpoint}; {} batches", towers.len());
    println!(
        "the towers computed {:.1} % of the time and waited {:.1} %",
        100.0 * busy / (to - from),
        100.0 - 100.0 * busy / (to - from)
    );
    println!(
        "decoding and resizing took {:.1} ms a picture, {:.0} % of it while the towers computed",
        sum(&decoded) / 1e3 / decoded.len() as f64,
        100.0 * beside / sum(&decoded)
    );
    let middle = f64::midpoint(from, to);
    println!(
        "{:.0} seconds of it, a column {:.0} ms; █ ▒ ·: all, half, little of it; a digit: so many at once:",
        DRAWN / 1e6,
        DRAWN / 1e3 / COLUMNS as f64
    );
    for (name, spans) in [("towers", &towers), ("decode", &decoded)] {
        let columns: String = (0..COLUMNS).map(|column| shade(spans, middle, column)).collect();
        println!("{name} {columns}");
    }
    println!("written to {}; open it at https://ui.perfetto.dev", file.display());
    Ok(())
}

/// The spans of a trace in the order of their ends: of the towers, and of decoding.
fn read(file: &Path) -> Result<[Vec<Interval>; 2]> {
    let lines: Vec<Line> = serde_json::from_slice(&std::fs::read(file)?)?;
    // A thread has one of a name open at a time.
    let mut open: BTreeMap<(String, u64), f64> = BTreeMap::new();
    let (mut towers, mut decoded) = (Vec::new(), Vec::new());
    for line in lines {
        let spans = match line.name.as_str() {
            "towers" => &mut towers,
            "decode" => &mut decoded,
            _ => continue,
        };
        let key = (line.name, line.tid);
        if line.ph == "B" {
            open.insert(key, line.ts);
        } else if let Some(began) = open.remove(&key) {
            spans.push((began, line.ts));
        }
    }
    Ok([towers, decoded])
}

fn sum(spans: &[Interval]) -> f64 {
    spans.iter().map(|(from, to)| to - from).sum()
}

fn common(a: Interval, b: Interval) -> f64 {
    (a.1.min(b.1) - a.0.max(b.0)).max(0.0)
}

/// How much of a column's time lies in spans.
fn shade(spans: &[Interval], from: f64, column: usize) -> char {
    let width = DRAWN / COLUMNS as f64;
    let from = from + width * column as f64;
    let part: f64 = spans.iter().map(|span| common(*span, (from, from + width))).sum();
    match part / width {
        part if part > 1.5 => char::from_digit(part.round().min(9.0) as u32, 10).unwrap_or('9'),
        part if part > 0.75 => '█',
        part if part > 0.25 => '▒',
        part if part > 0.02 => '·',
        _ => ' ',
    }
}
