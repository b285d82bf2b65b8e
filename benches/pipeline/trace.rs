//! Traces how the pipeline overlaps decoding and resizing with the model.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde::Deserialize;
use tracing_chrome::ChromeLayerBuilder;
use tracing_subscriber::filter::{LevelFilter, Targets};
use tracing_subscriber::prelude::*;

use super::{Result, ingest_all, load_clip};

/// Duration of the part of the trace that is drawn.
const DRAWN_MICROSECONDS: f64 = 2e6;
/// Number of characters per drawn line.
const DRAWN_COLUMNS: usize = 100;

/// The fields of an event in Chrome's trace format that are used.
#[derive(Deserialize)]
struct TraceEvent {
    ph: String,
    #[serde(default)]
    name: String,
    #[serde(default)]
    ts: f64,
    tid: u64,
}

/// Start and end in microseconds.
type TimeSpan = (f64, f64);

/// Ingests `files` with the model of `checkpoint`, writes the trace to `file` and prints a summary.
pub fn trace_pipeline(files: &[PathBuf], checkpoint: &str, file: &Path) -> Result<()> {
    let (layer, flush_guard) = ChromeLayerBuilder::new().file(file).build();
    let ingest_spans = Targets::new().with_target("bsap::ingest", LevelFilter::TRACE);
    tracing_subscriber::registry().with(layer.with_filter(ingest_spans)).try_init()?;
    let encoders = Arc::new(load_clip(checkpoint)?);
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    let rate = runtime.block_on(ingest_all(files, encoders))?;
    drop(flush_guard);
    let [encoder_spans, decode_spans] = read_spans(file)?;
    let (Some(first), Some(last)) = (encoder_spans.first(), encoder_spans.last()) else {
        return Err("no batch was traced".into());
    };
    // Before the first batch is complete, the model must wait, however good the pipeline is.
    let (from, to) = (first.0, last.1);
    let busy = total_duration(&encoder_spans);
    let overlapping: f64 = decode_spans
        .iter()
        .map(|span| encoder_spans.iter().map(|t| overlap_duration(*t, *span)).sum::<f64>())
        .sum();
    println!("{rate:.1} pictures/s with {checkpoint}; {} batches", encoder_spans.len());
    println!(
        "the model computed {:.1} % of the time and waited {:.1} %",
        100.0 * busy / (to - from),
        100.0 - 100.0 * busy / (to - from)
    );
    println!(
        "decoding and resizing took {:.1} ms per picture, {:.0} % of it while the model computed",
        total_duration(&decode_spans) / 1e3 / decode_spans.len() as f64,
        100.0 * overlapping / total_duration(&decode_spans)
    );
    let middle = f64::midpoint(from, to);
    println!(
        "{:.0} seconds of the trace, {:.0} ms per column; █ ▒ ·: busy for all, half, little of the time; a digit: that many at once:",
        DRAWN_MICROSECONDS / 1e6,
        DRAWN_MICROSECONDS / 1e3 / DRAWN_COLUMNS as f64
    );
    for (name, spans) in [("model", &encoder_spans), ("decode", &decode_spans)] {
        let columns: String =
            (0..DRAWN_COLUMNS).map(|column| column_symbol(spans, middle, column)).collect();
        println!("{name} {columns}");
    }
    println!("written to {}; open it at https://ui.perfetto.dev", file.display());
    Ok(())
}

/// Reads the spans of a trace in the order of their ends: those of the model, and those of
/// decoding.
fn read_spans(file: &Path) -> Result<[Vec<TimeSpan>; 2]> {
    let lines: Vec<TraceEvent> = serde_json::from_slice(&std::fs::read(file)?)?;
    // A thread has at most one open span of a name.
    let mut open: BTreeMap<(String, u64), f64> = BTreeMap::new();
    let (mut encoder_spans, mut decode_spans) = (Vec::new(), Vec::new());
    for line in lines {
        let spans = match line.name.as_str() {
            "model" => &mut encoder_spans,
            "decode" => &mut decode_spans,
            _ => continue,
        };
        let key = (line.name, line.tid);
        if line.ph == "B" {
            open.insert(key, line.ts);
        } else if let Some(start) = open.remove(&key) {
            spans.push((start, line.ts));
        }
    }
    Ok([encoder_spans, decode_spans])
}

fn total_duration(spans: &[TimeSpan]) -> f64 {
    spans.iter().map(|(from, to)| to - from).sum()
}

fn overlap_duration(a: TimeSpan, b: TimeSpan) -> f64 {
    (a.1.min(b.1) - a.0.max(b.0)).max(0.0)
}

/// Returns the character for how much of a column's time is within spans.
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
