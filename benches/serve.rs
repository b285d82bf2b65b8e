//! Measures searches over HTTP from end to end, including the text encoder: latency and throughput
//! for 1, 16 and 64 concurrent callers, each sending one new text after the other, and the share of
//! each phase.
//!
//!     just bench --bench serve [-- ROWS]
//!
//! The text encoder is that of the demo's small model, or of the checkpoint BSAP_BENCH_CHECKPOINT.
//! The vectors of the catalogue are random, with the dimension of the model.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use bsap::clip::{self, ClipModel, Encoders};
use bsap::ingest::decode::DecodeOptions;
use bsap::ingest::fetch::{self, Fetcher};
use bsap::search::{Engines, SearchOptions};
use bsap::serve::feedback;
use bsap::serve::http::{self, SearchResponse, ServerContext};
use bsap::store::Store;
use reqwest::header::CONTENT_TYPE;
use serde_json::json;
use tokio_util::sync::CancellationToken;

mod vectors;

type Result<T, E = Box<dyn std::error::Error + Send + Sync>> = std::result::Result<T, E>;

/// Duration of the measurement for each number of callers.
const MEASURED_TIME: Duration = Duration::from_secs(10);
/// Queries before the measurement starts.
const WARM_UP_QUERIES: u64 = 20;

fn main() -> Result<()> {
    let rows = std::env::args().find_map(|a| a.parse().ok()).unwrap_or(100_000);
    let demo_checkpoint = || concat!(env!("CARGO_MANIFEST_DIR"), "/models/demo").to_owned();
    let checkpoint = std::env::var("BSAP_BENCH_CHECKPOINT").unwrap_or_else(|_| demo_checkpoint());
    let encoders =
        ClipModel::load(&clip::ModelOptions { checkpoint, ..clip::ModelOptions::default() })?;
    let card = encoders.card().clone();
    let engine = vectors::load_engine(Arc::new(encoders), rows, SearchOptions::default());
    let engine = engine.map_err(|e| e.to_string())?;
    println!("{rows} rows of {}, texts by {}", card.dimension, card.name);
    let folder = tempfile::tempdir()?;
    let store = Store::open(&folder.path().to_string_lossy(), &BTreeMap::new())?;
    let context = ServerContext {
        engines: Arc::new(Engines::new(Arc::new(engine))),
        fetcher: Fetcher::new(&fetch::FetchOptions::default())?,
        decode_options: DecodeOptions::default(),
        // No feedback is sent, so the receiver is dropped.
        feedback_queue: feedback::feedback_channel(&store).0,
        substitutes: Vec::new(),
        judge: None,
        options: http::HttpOptions {
            listen: ([127, 0, 0, 1], 0).into(),
            ..http::HttpOptions::default()
        },
    };
    tokio::runtime::Runtime::new()?.block_on(measure_latency(context))
}

async fn measure_latency(context: ServerContext) -> Result<()> {
    let listener = http::bind_listener(&context.options).await?;
    let url = format!("{}v1/search", listener.url()?);
    let token = CancellationToken::new();
    let serving = tokio::spawn(http::serve(context, listener, token.clone()));
    let next_query = Arc::new(AtomicU64::new(0));
    let client = reqwest::Client::new();
    for _ in 0..WARM_UP_QUERIES {
        send_query(&client, &url, &next_query).await?;
    }
    println!(
        "| callers | answers/s | p50 ms | p99 ms | embedding | waiting | scanning | ranking | the rest |"
    );
    println!("| --- | --- | --- | --- | --- | --- | --- | --- | --- |");
    for callers in [1, 16, 64] {
        let until = Instant::now() + MEASURED_TIME;
        let tasks: Vec<_> = (0..callers)
            .map(|_| {
                let (client, url, next_query) = (client.clone(), url.clone(), next_query.clone());
                tokio::spawn(async move {
                    let mut times = Vec::new();
                    while Instant::now() < until {
                        times.push(send_query(&client, &url, &next_query).await?);
                    }
                    Ok::<_, Box<dyn std::error::Error + Send + Sync>>(times)
                })
            })
            .collect();
        let mut times = Vec::new();
        for task in tasks {
            times.extend(task.await??);
        }
        print_row(callers, &mut times);
    }
    token.cancel();
    serving.await?;
    Ok(())
}

/// Total time of a query, and the times of embedding, waiting, scanning and ranking, in
/// milliseconds.
type QueryTimesMs = [f64; 5];

async fn send_query(
    client: &reqwest::Client,
    url: &str,
    next_query: &AtomicU64,
) -> Result<QueryTimesMs> {
    let number = next_query.fetch_add(1, Ordering::Relaxed);
    let body = json!({"text": format!("a red mug on a wooden table {number}")}).to_string();
    let started = Instant::now();
    let response = client.post(url).header(CONTENT_TYPE, "contextlication/json").body(body).send();
    let bytes = response.await?.error_for_status()?.bytes().await?;
    let ms = started.elapsed().as_secs_f64() * 1e3;
    let timings = serde_json::from_slice::<SearchResponse>(&bytes)?.timings;
    Ok([ms, timings.embed_ms, timings.wait_ms, timings.scan_ms, timings.rank_ms])
}

fn print_row(callers: usize, times: &mut [QueryTimesMs]) {
    times.sort_unstable_by(|a, b| a[0].total_cmp(&b[0]));
    let quantile = |share: f64| times[((times.len() - 1) as f64 * share) as usize][0];
    let sum = |phase: usize| times.iter().map(|times| times[phase]).sum::<f64>();
    let shares = [1, 2, 3, 4].map(|phase| 100.0 * sum(phase) / sum(0));
    let [embed, wait, scan, rank] = shares.map(|share| format!("{share:.0} %"));
    println!(
        "| {callers} | {:.0} | {:.1} | {:.1} | {embed} | {wait} | {scan} | {rank} | {:.0} % |",
        times.len() as f64 / MEASURED_TIME.as_secs_f64(),
        quantile(0.5),
        quantile(0.99),
        100.0 - shares.iter().sum::<f64>()
    );
}
