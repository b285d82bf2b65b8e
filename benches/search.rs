//! Measures the exact search of query workers over synthetic vectors that are distributed like
//! CLIP's: images in one cone with clusters and a few dimensions that spread ten times as far,
//! texts in another cone.
//!
//!     just bench --bench search [-- ROWS ...]
//!
//! Compares one query with one pass over as much memory as the codes of all rows take, sixteen
//! concurrent queries with sequential ones, filtered queries with unfiltered ones, and the top 100
//! with scores in f64 over the stored vectors. With BSAP_BENCH_PEERS=FOLDER it writes its vectors
//! there and answers the requests of `benches/peers/search.py` instead.

use std::collections::HashMap;
use std::io::{BufRead, BufWriter, Write};
use std::path::Path;
use std::sync::Arc;
use std::time::Instant;

use bsap::balance::normalise::Normaliser;
use bsap::clip::{ClipError, Encoders, ModelCard, Pixels};
use bsap::search::{Engine, Query, QueryInput, SearchOptions, SearchResults};
use image::RgbImage;
use rayon::prelude::*;
use serde_json::json;

mod vectors;
use vectors::{cone_centre, load_engine, text_vector};

type Result<T, E = Box<dyn std::error::Error>> = std::result::Result<T, E>;

const DIMENSION: usize = 512;
/// k of every query.
const RESULTS_PER_QUERY: usize = 100;
const QUERY_COUNT: u64 = 20;
const CONCURRENT_CALLERS: usize = 16;
const MEASURED_ROUNDS: usize = 9;

fn main() -> Result<()> {
    let sizes: Vec<u64> = std::env::args().filter_map(|a| a.parse().ok()).collect();
    let peers = std::env::var_os("BSAP_BENCH_PEERS");
    for rows in if sizes.is_empty() { vec![100_000] } else { sizes } {
        let engine = load_engine(Arc::new(NoEncoders::new()), rows, SearchOptions::default())?;
        if let Some(folder) = &peers {
            return answer_peers(&engine, Path::new(folder));
        }
        let memory = engine.snapshots().newest().memory_usage();
        println!(
            "{rows} rows of {DIMENSION}: {:.0} bytes per row, {:.0} of them id and attributes",
            memory.total_bytes() as f64 / rows as f64,
            memory.text_bytes as f64 / rows as f64
        );
        compare_with_memory_pass(&engine, rows);
        compare_concurrent(&engine);
        compare_filtered(&engine)?;
        measure_recall(&engine)?;
    }
    Ok(())
}

/// A model that embeds nothing: all queries are vectors.
struct NoEncoders(ModelCard);

impl Encoders for NoEncoders {
    fn card(&self) -> &ModelCard {
        &self.0
    }
    fn preprocess_image(&self, _: &RgbImage) -> Result<Pixels, ClipError> {
        Err(ClipError::InvalidInput("embeds no images".into()))
    }
    fn embed_images(&self, _: &[Pixels]) -> Result<Vec<Vec<f32>>, ClipError> {
        Err(ClipError::InvalidInput("embeds no images".into()))
    }
    fn embed_texts(&self, _: &[&str]) -> Result<Vec<Vec<f32>>, ClipError> {
        Err(ClipError::InvalidInput("embeds no texts".into()))
    }
}

impl NoEncoders {
    fn new() -> Self {
        Self(ModelCard::without_checkpoint("bench", DIMENSION))
    }
}

fn nth_query(number: u64) -> Query {
    let vector = text_vector(number % QUERY_COUNT, &cone_centre(8, DIMENSION));
    Query { input: QueryInput::Vector(vector), k: Some(RESULTS_PER_QUERY), ..Query::default() }
}

fn time_ms<T>(work: impl FnOnce() -> T) -> (f64, T) {
    let started = Instant::now();
    let result = work();
    (started.elapsed().as_secs_f64() * 1e3, result)
}

/// Returns the CPU time of this process over all cores, in milliseconds. If other processes use the
/// machine, ratios of CPU times are more reliable than ratios of wall-clock times.
fn cpu_ms() -> f64 {
    let stat = std::fs::read_to_string("/proc/self/stat").unwrap_or_default();
    let fields = stat.rsplit(')').next().unwrap_or_default();
    let ticks = fields.split_whitespace().skip(11).take(2).filter_map(|t| t.parse::<f64>().ok());
    // Linux counts ticks of 10 ms.
    10.0 * ticks.sum::<f64>()
}

/// Returns the wall-clock time and the CPU time of `work`, in milliseconds.
fn wall_and_cpu_ms(work: impl FnOnce()) -> [f64; 2] {
    let before = cpu_ms();
    let (ms, ()) = time_ms(work);
    [ms, cpu_ms() - before]
}

fn median(mut times: Vec<f64>) -> f64 {
    times.sort_unstable_by(f64::total_cmp);
    times[times.len() / 2]
}

/// Alternates sequential queries with passes over as much memory as the codes of all rows take.
fn compare_with_memory_pass(engine: &Engine, rows: u64) {
    let memory = vec![1u64; rows as usize * DIMENSION / 8];
    let pass = || memory.par_chunks(1 << 16).map(|part| part.iter().sum::<u64>()).sum::<u64>();
    let (mut queries, mut passes) = (Vec::new(), Vec::new());
    for _ in 0..MEASURED_ROUNDS {
        passes.push(wall_and_cpu_ms(|| {
            for _ in 0..QUERY_COUNT {
                std::hint::black_box(pass());
            }
        }));
        queries.push(wall_and_cpu_ms(|| search_one_by_one(engine)));
    }
    let [query, query_cpu] = median_per_query(&queries, QUERY_COUNT);
    let [pass, pass_cpu] = median_per_query(&passes, QUERY_COUNT);
    println!(
        "  one query           {query:8.2} ms, CPU {query_cpu:.2}; one pass over its codes' memory {pass:.2}, CPU {pass_cpu:.2}: ratio {:.2}, CPU {:.2}",
        query / pass,
        query_cpu / pass_cpu
    );
}

/// Returns the medians per query of measurements of `query_count` queries each.
fn median_per_query(measured: &[[f64; 2]], query_count: u64) -> [f64; 2] {
    [0, 1].map(|i| median(measured.iter().map(|m| m[i]).collect()) / query_count as f64)
}

fn search_one_by_one(engine: &Engine) {
    for number in 0..QUERY_COUNT {
        std::hint::black_box(engine.search(&nth_query(number)).map(|r| r.matched_image_count)).ok();
    }
}

/// Alternates concurrent queries with sequential ones.
fn compare_concurrent(engine: &Engine) {
    let (mut sequential, mut concurrent) = (Vec::new(), Vec::new());
    for _ in 0..MEASURED_ROUNDS {
        sequential.push(wall_and_cpu_ms(|| search_one_by_one(engine)));
        concurrent.push(wall_and_cpu_ms(|| search_concurrently(engine, 4)));
    }
    let [sequential, sequential_cpu] = median_per_query(&sequential, QUERY_COUNT);
    let [concurrent, concurrent_cpu] = median_per_query(&concurrent, CONCURRENT_CALLERS as u64 * 4);
    println!(
        "  {CONCURRENT_CALLERS} callers at once    {concurrent:8.2} ms per query, CPU {concurrent_cpu:.2}; one after the other {sequential:.2}, CPU {sequential_cpu:.2}: {:.1} times the throughput, by CPU {:.1}",
        sequential / concurrent,
        sequential_cpu / concurrent_cpu
    );
}

fn search_concurrently(engine: &Engine, queries_per_caller: usize) {
    std::thread::scope(|scope| {
        for caller in 0..CONCURRENT_CALLERS as u64 {
            scope.spawn(move || {
                for n in 0..queries_per_caller as u64 {
                    std::hint::black_box(
                        engine.search(&nth_query(caller + n)).map(|r| r.matched_image_count),
                    )
                    .ok();
                }
            });
        }
    });
}

/// Alternates filtered queries with unfiltered ones. The first query with a filter evaluates it.
fn compare_filtered(engine: &Engine) -> Result<()> {
    for part in [500, 100, 10, 1] {
        let filtered_query = |number: u64| -> Result<Query> {
            let filter = json!({"lt": {"part": part}});
            Ok(Query { filter: Some(serde_json::from_value(filter)?), ..nth_query(number) })
        };
        let (first_ms, results) = time_ms(|| engine.search(&filtered_query(0)?).map_err(Box::from));
        let results: Result<SearchResults> = results;
        let matched = results?.matched_image_count;
        let (mut unfiltered_times, mut filtered_times) = (Vec::new(), Vec::new());
        for number in 0..QUERY_COUNT {
            let (unfiltered, filtered) = (nth_query(number), filtered_query(number)?);
            unfiltered_times.push(time_ms(|| engine.search(&unfiltered)).0);
            let (ms, results) = time_ms(|| engine.search(&filtered));
            filtered_times.push(ms);
            assert_eq!(results?.hits.len(), RESULTS_PER_QUERY.min(matched));
        }
        let (unfiltered_ms, filtered_ms) = (median(unfiltered_times), median(filtered_times));
        println!(
            "  filter, {:5.1} %      {filtered_ms:8.2} ms, {first_ms:.2} the first time ({matched} match); no filter {unfiltered_ms:.2} ms: ratio {:.2}",
            f64::from(part) / 10.0,
            filtered_ms / unfiltered_ms
        );
    }
    Ok(())
}

/// Compares the results of each query with the scores of all images in f64.
fn measure_recall(engine: &Engine) -> Result<()> {
    let snapshot = engine.snapshots().newest();
    let settings = [
        (Normaliser::Raw, 0.0),
        (Normaliser::Softmax, 0.25),
        (Normaliser::Zscore, 1.0),
        (Normaliser::Nnn, 0.5),
    ];
    let mut answers: Vec<(Vec<f64>, SearchResults)> = Vec::new();
    for number in 0..QUERY_COUNT / 2 {
        for (normaliser, weight) in settings {
            let query =
                Query { normaliser: Some(normaliser), weight: Some(weight), ..nth_query(number) };
            let QueryInput::Vector(values) = &query.input else { continue };
            // Scaled to unit length and rounded to f32 as the engine does it.
            let exact: Vec<f64> = values.iter().map(|v| f64::from(*v)).collect();
            let norm = exact.iter().map(|v| v * v).sum::<f64>().sqrt();
            let unit = exact.into_iter().map(|v| f64::from((v / norm) as f32)).collect();
            answers.push((unit, engine.search(&query)?));
        }
    }
    let scored: Vec<(String, Vec<f64>)> = snapshot
        .images_with_embeddings()
        .par_bridge()
        .map(|(entry, embedding)| {
            let id = entry.image_id.as_str();
            let score = |(query, results): &(Vec<f64>, SearchResults)| {
                let products = query.iter().zip(embedding.values());
                let raw: f64 = products.map(|(q, v)| q * f64::from(*v)).sum();
                let statistics = snapshot.statistics(id, &results.prompt_set.statistics_key);
                let affine = statistics.map(|s| results.balance.affine_transform(&s, 100.0));
                affine.map_or(raw, |a| f64::from(a.alpha) * raw + f64::from(a.beta))
            };
            (id.to_owned(), answers.iter().map(score).collect())
        })
        .collect();
    let (mut correct, mut total) = (0, 0);
    for (index, (_, results)) in answers.iter().enumerate() {
        let mut scores: Vec<f64> = scored.iter().map(|(_, scores)| scores[index]).collect();
        let last = RESULTS_PER_QUERY.min(scores.len()) - 1;
        let (_, kth_score, _) = scores.select_nth_unstable_by(last, |a, b| b.total_cmp(a));
        // Sums in another order differ by less than this, so that nearer scores count as ties.
        let min_score = *kth_score - 1e-12;
        let best: HashMap<&str, f64> = scored
            .iter()
            .filter(|(_, scores)| scores[index] >= min_score)
            .map(|(id, scores)| (id.as_str(), scores[index]))
            .collect();
        correct += results
            .hits
            .iter()
            .filter(|h| best.contains_key(h.image_metadata.image_id.as_str()))
            .count();
        total += last + 1;
    }
    println!(
        "  recall@{RESULTS_PER_QUERY}          {:8.4} of {total} results, compared with f64",
        correct as f64 / total as f64
    );
    Ok(())
}

/// Writes vectors and queries for other programs to search, as f32: α·v and β of each row, so that
/// its balanced score is the dot product with the query followed by a 1. Then, for each line of
/// standard input, answers all queries once and prints their times and results.
fn answer_peers(engine: &Engine, folder: &Path) -> Result<()> {
    let snapshot = engine.snapshots().newest();
    let first = engine.search(&nth_query(0))?;
    let file = |name: &str| {
        Ok::<_, std::io::Error>(BufWriter::new(std::fs::File::create(folder.join(name))?))
    };
    let mut rows = file("rows.f32")?;
    let mut ids = file("ids.u32")?;
    for (entry, embedding) in snapshot.images_with_embeddings() {
        let id = entry.image_id.as_str();
        let statistics =
            snapshot.statistics(id, &first.prompt_set.statistics_key).ok_or("no statistics")?;
        let affine = first.balance.affine_transform(&statistics, 100.0);
        for value in embedding.values().iter().map(|v| affine.alpha * v).chain([affine.beta]) {
            rows.write_all(&value.to_le_bytes())?;
        }
        ids.write_all(&id.parse::<u32>()?.to_le_bytes())?;
    }
    rows.flush()?;
    ids.flush()?;
    let mut queries = file("queries.f32")?;
    for number in 0..QUERY_COUNT {
        for value in text_vector(number, &cone_centre(8, DIMENSION)).into_iter().chain([1.0]) {
            queries.write_all(&value.to_le_bytes())?;
        }
    }
    queries.flush()?;
    println!(
        "{}",
        json!({"rows": snapshot.len(), "width": DIMENSION + 1, "queries": QUERY_COUNT, "k": RESULTS_PER_QUERY})
    );
    for line in std::io::stdin().lock().lines() {
        if line? == "together" {
            let (ms, ()) = time_ms(|| search_concurrently(engine, 4));
            println!("{}", json!({"ms": ms / (CONCURRENT_CALLERS * 4) as f64}));
            continue;
        }
        let (mut times, mut ids_by_query) = (Vec::new(), Vec::new());
        for number in 0..QUERY_COUNT {
            let query = nth_query(number);
            let (ms, results) = time_ms(|| engine.search(&query));
            times.push(ms);
            let ids = results?
                .hits
                .iter()
                .map(|h| h.image_metadata.image_id.as_str().parse::<u32>())
                .collect::<Result<Vec<_>, _>>()?;
            ids_by_query.push(ids);
        }
        println!("{}", json!({"ms": times, "ids": ids_by_query}));
    }
    Ok(())
}
