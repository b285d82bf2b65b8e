//! Where the time of an image goes: decoding and resizing beside the towers.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde::Deserialize;
use tracing_chrome::ChromeLayerBuilder;
use tracing_subscriber::filter::{LevelFilter, Targets};
use tracing_subscriber::prelude::*;

use super::{Result, ingest_all, load_clip};

/// Of the drawn part of the trace, in microseconds, and its columns.
const DRAWN_MICROSECONDS: f64 = 2e6;
const DRAWN_COLUMNS: usize = 100;

/// What a line of the trace holds.
#[derive(Deserialize)]
struct TraceEvent {
    ph: String,
    #[serde(default)]
    name: String,
    #[serde(default)]
    ts: f64,
    tid: u64,
}

/// From when to when, in microseconds.
type TimeSpan = (f64, f64);

/// Ingests `files` with the towers of `checkpoint`, writes the trace to `file` and tells what it says.
pub fn trace_pipeline(files: &[PathBuf], checkpoint: &str, file: &Path) -> Result<()> {
    let (layer, writing) = ChromeLayerBuilder::new().file(file).build();
    let ours = Targets::new().with_target("bsap::ingest", LevelFilter::TRACE);
    tracing_subscriber::registry().with(layer.with_filter(ours)).try_init()?;
    let encoders = Arc::new(load_clip(checkpoint)?);
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    let rate = runtime.block_on(ingest_all(files, encoders))?;
    drop(writing);
    let [encoder_spans, decoded] = read_spans(file)?;
    let (Some(first), Some(last)) = (encoder_spans.first(), encoder_spans.last()) else {
        return Err("no batch was traced".into());
    };
    // Until the first batch is there, the towers have nothing to do whatever the pipeline is like.
    let (from, to) = (first.0, last.1);
    let busy = total_duration(&encoder_spans);
    let overlapping: f64 = decoded
        .iter()
        .map(|span| encoder_spans.iter().map(|t| overlap_duration(*t, *span)).sum::<f64>())
        .sum();
    println!("{rate:.1} pictures/s with {checkpoint}; {} batches", encoder_spans.len());
    println!(
        "the towers computed {:.1} % of the time and waited {:.1} %",
        100.0 * busy / (to - from),
        100.0 - 100.0 * busy / (to - from)
    );
    println!(
        "decoding and resizing took {:.1} ms a picture, {:.0} % of it while the towers computed",
        total_duration(&decoded) / 1e3 / decoded.len() as f64,
        100.0 * overlapping / total_duration(&decoded)
    );
    let middle = f64::midpoint(from, to);
    println!(
        "{:.0} seconds of it, a column {:.0} ms; █ ▒ ·: all, half, little of it; a digit: so many at once:",
        DRAWN_MICROSECONDS / 1e6,
        DRAWN_MICROSECONDS / 1e3 / DRAWN_COLUMNS as f64
    );
    for (name, spans) in [("model", &encoder_spans), ("decode", &decoded)] {
        let columns: String =
            (0..DRAWN_COLUMNS).map(|column| column_symbol(spans, middle, column)).collect();
        println!("{name} {columns}");
    }
    println!("written to {}; open it at https://ui.perfetto.dev", file.display());
    Ok(())
}

/// The spans of a trace in the order of their ends: of the towers, and of decoding.
fn read_spans(file: &Path) -> Result<[Vec<TimeSpan>; 2]> {
    let lines: Vec<TraceEvent> = serde_json::from_slice(&std::fs::read(file)?)?;
    // A thread has one of a name open at a time.
    let mut open: BTreeMap<(String, u64), f64> = BTreeMap::new();
    let (mut encoder_spans, mut decoded) = (Vec::new(), Vec::new());
    for line in lines {
        let spans = match line.name.as_str() {
            "model" => &mut encoder_spans,
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
    Ok([encoder_spans, decoded])
}

fn total_duration(spans: &[TimeSpan]) -> f64 {
    spans.iter().map(|(from, to)| to - from).sum()
}

fn overlap_duration(a: TimeSpan, b: TimeSpan) -> f64 {
    (a.1.min(b.1) - a.0.max(b.0)).max(0.0)
}

/// How much of a column's time lies in spans.
fn column_symbol(spans: &[TimeSpan], from: f64, column: usize) -> char {
    let width = DRAWN_MICROSECONDS / DRAWN_COLUMNS as f64;
    let from = from + width * column as f64;
    let part: f64 = spans.iter().map(|span| overlap_duration(*span, (from, from + width))).sum();
    match part / width {
        part if part > 1.5 => char::from_digit(part.round().min(9.0) as u32, 10).unwrap_or('9'),
        part if part > 0.75 => '█',
        part if part > 0.25 => '▒',
        part if part > 0.02 => '·',
        _ => ' ',
    }
}
