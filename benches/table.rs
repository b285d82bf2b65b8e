//! Measures the stored table: the cost of writing, compacting, loading and following it, in time,
//! bytes and requests. Loading is compared with reading the same bytes in one run.
//!
//!     just bench --bench table [-- ROWS [FOLDER or URL]]

mod rows;

use std::collections::BTreeMap;
use std::error::Error;
use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::{Duration, Instant};

use async_trait::async_trait;
use bsap::balance::statistics::{StatisticsKey, StatisticsSettings};
use bsap::record::{ImageRow, TopicPartition, VersionOrdering};
use bsap::store::Store;
use bsap::table::maintenance::vacuum::vacuum;
use bsap::table::{
    CommitSummary, CompactionMode, Compactor, Follower, Generation, MaintenanceOptions,
    PartitionBatch, TableWriter,
};
use futures::stream::BoxStream;
use futures::{StreamExt, TryStreamExt};
use object_store::path::Path;
use object_store::{
    CopyOptions, GetOptions, GetResult, ListResult, MultipartUpload, ObjectMeta, ObjectStore,
    ObjectStoreExt, PutMultipartOptions, PutOptions, PutPayload, PutResult,
};
use tokio_util::sync::CancellationToken;

type Result<T, E = Box<dyn Error>> = std::result::Result<T, E>;

const DIMENSION: usize = 512;
/// Rows per commit while the table is filled, which is a worker's maximum.
const ROWS_PER_COMMIT: usize = 10_000;
/// Commits between two runs of the compactor.
const COMMITS_PER_COMPACTION: usize = 8;
const MEASURED_ROUNDS: usize = 3;
/// Commits that a loaded reader follows one by one.
const FOLLOWED_COMMITS: u64 = 40;
/// Files read concurrently, as many as a new reader reads.
const CONCURRENT_READS: usize = 8;

/// A store that counts the requests that cloud storage charges for.
#[derive(Debug)]
struct CountingStore {
    inner: Arc<dyn ObjectStore>,
    gets: AtomicU64,
    puts: AtomicU64,
    lists: AtomicU64,
}

impl CountingStore {
    /// Returns the numbers of GET, PUT and LIST requests since the last call.
    fn take_request_counts(&self) -> [u64; 3] {
        [&self.gets, &self.puts, &self.lists].map(|n| n.swap(0, Relaxed))
    }
}

impl fmt::Display for CountingStore {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.inner.fmt(f)
    }
}

#[async_trait]
impl ObjectStore for CountingStore {
    async fn put_opts(
        &self,
        path: &Path,
        payload: PutPayload,
        options: PutOptions,
    ) -> object_store::Result<PutResult> {
        self.puts.fetch_add(1, Relaxed);
        self.inner.put_opts(path, payload, options).await
    }
    async fn put_multipart_opts(
        &self,
        path: &Path,
        options: PutMultipartOptions,
    ) -> object_store::Result<Box<dyn MultipartUpload>> {
        // A start, one part and a completion. Larger files have more parts.
        self.puts.fetch_add(3, Relaxed);
        self.inner.put_multipart_opts(path, options).await
    }
    async fn get_opts(&self, path: &Path, options: GetOptions) -> object_store::Result<GetResult> {
        self.gets.fetch_add(1, Relaxed);
        self.inner.get_opts(path, options).await
    }
    fn delete_stream(
        &self,
        paths: BoxStream<'static, object_store::Result<Path>>,
    ) -> BoxStream<'static, object_store::Result<Path>> {
        self.inner.delete_stream(paths)
    }
    fn list(&self, prefix: Option<&Path>) -> BoxStream<'static, object_store::Result<ObjectMeta>> {
        self.lists.fetch_add(1, Relaxed);
        self.inner.list(prefix)
    }
    fn list_with_offset(
        &self,
        prefix: Option<&Path>,
        offset: &Path,
    ) -> BoxStream<'static, object_store::Result<ObjectMeta>> {
        self.lists.fetch_add(1, Relaxed);
        self.inner.list_with_offset(prefix, offset)
    }
    async fn list_with_delimiter(&self, prefix: Option<&Path>) -> object_store::Result<ListResult> {
        self.lists.fetch_add(1, Relaxed);
        self.inner.list_with_delimiter(prefix).await
    }
    async fn copy_opts(
        &self,
        from: &Path,
        to: &Path,
        options: CopyOptions,
    ) -> object_store::Result<()> {
        self.puts.fetch_add(1, Relaxed);
        self.inner.copy_opts(from, to, options).await
    }
}

/// Appends rows as a worker of one partition does.
struct PartitionAppender {
    writer: TableWriter,
    next_offset: Option<i64>,
}

impl PartitionAppender {
    async fn append(&mut self, rows: Vec<ImageRow>) -> Result<CommitSummary> {
        let from = self.next_offset.unwrap_or_default();
        let rows: Vec<(i64, ImageRow)> = (from..).zip(rows).collect();
        let partition = TopicPartition { topic: "images".into(), number: 0 };
        let next_offset = from + rows.len() as i64;
        let batch = PartitionBatch {
            log_number: 0,
            anchor: None,
            last_message: None,
            partition,
            expected_position: self.next_offset,
            next_offset,
            rows,
        };
        self.next_offset = Some(next_offset);
        Ok(self.writer.append(vec![batch], &CancellationToken::new()).await?)
    }
}

#[tokio::main]
async fn main() -> Result<()> {
    let mut arguments = std::env::args().skip(1).filter(|a| a != "--bench");
    let count: usize = arguments.next().map_or(Ok(100_000), |text| text.parse())?;
    let folder = tempfile::tempdir()?;
    let url = arguments.next().unwrap_or_else(|| folder.path().display().to_string());
    let inner_store = Store::open(&url, &BTreeMap::new())?;
    let requests = Arc::new(CountingStore {
        inner: inner_store.object_store().clone(),
        gets: AtomicU64::new(0),
        puts: AtomicU64::new(0),
        lists: AtomicU64::new(0),
    });
    let store = Store::from_object_store(requests.clone());
    let generation =
        Generation::new("random", &"be".repeat(32), DIMENSION, 100.0, VersionOrdering::Sequence);
    let sets = [StatisticsKey::new(
        "bench",
        1,
        &"ab".repeat(32),
        100.0,
        StatisticsSettings::with_top_k(8),
    )];
    println!("{count} rows, {DIMENSION} dimensions, one prompt set, {url}");

    let writer = TableWriter::open(&store, &generation, 10).await?;
    let mut appender = PartitionAppender { writer, next_offset: None };
    fill_table(&store, &generation, &sets, &mut appender, count).await?;
    // Removes the files that compaction has replaced.
    let later = chrono::Utc::now() + chrono::TimeDelta::days(9);
    vacuum(&store, &generation, &MaintenanceOptions::default(), later, false).await?;
    measure_cold_load(&store, &generation, count).await?;
    measure_following(&store, &generation, &sets, &mut appender, &requests).await
}

/// Writes all rows in commits, and compacts the table in between as a worker does.
async fn fill_table(
    store: &Store,
    generation: &Generation,
    sets: &[StatisticsKey],
    appender: &mut PartitionAppender,
    count: usize,
) -> Result<()> {
    let options = MaintenanceOptions::default();
    let mut compactor = Compactor::open(store, generation, &options, 10).await?;
    let (mut writing, mut compacting) = (Duration::ZERO, Duration::ZERO);
    let (mut appended, mut rewritten, mut commits) = (0, 0, 0);
    for from in (0..count).step_by(ROWS_PER_COMMIT) {
        let rows = (from..(from + ROWS_PER_COMMIT).min(count))
            .map(|i| rows::random_row(i, 1, DIMENSION, sets));
        let rows = rows.collect::<Result<Vec<_>>>()?;
        let started = Instant::now();
        appended += appender.append(rows).await?.written_bytes;
        writing += started.elapsed();
        commits += 1;
        if commits % COMMITS_PER_COMPACTION == 0 {
            let started = Instant::now();
            let (now, token) = (chrono::Utc::now(), CancellationToken::new());
            rewritten +=
                compactor.run(CompactionMode::Merge, now, &|_, _| {}, &token).await?.bytes_out;
            compacting += started.elapsed();
        }
    }
    let per_second = count as f64 / writing.as_secs_f64();
    println!("written              {writing:>9.2?}  {per_second:.0} rows/s in {commits} commits");
    let bytes = appended as f64 / count as f64;
    let values = (2 * DIMENSION) as f64;
    println!(
        "on disk              {bytes:>9.0} bytes per row; {:.2} × its f16 values",
        bytes / values
    );
    println!(
        "compaction           {compacting:>9.2?}  {:.2} bytes rewritten per appended byte, {} files",
        rewritten as f64 / appended as f64,
        compactor.count_files().await?
    );
    Ok(())
}

/// Compares loading the table in a new reader with reading the same bytes.
async fn measure_cold_load(store: &Store, generation: &Generation, count: usize) -> Result<()> {
    let mut follower = Follower::open(store, generation).await?;
    let first = follower.next(&|_, _| {}).await?.ok_or("an empty table")?;
    assert_eq!(first.rows.len(), count);
    drop((first, follower));
    let (mut reading, mut loading, mut bytes) = (Vec::new(), Vec::new(), 0);
    for _ in 0..MEASURED_ROUNDS {
        let started = Instant::now();
        bytes = read_all_files(store).await?;
        reading.push(started.elapsed());
        let started = Instant::now();
        let mut follower = Follower::open(store, generation).await?;
        let snapshot = follower.next(&|_, _| {}).await?;
        loading.push(started.elapsed());
        drop(snapshot);
    }
    let (reading, loading) = (median(reading), median(loading));
    println!("reading all files    {reading:>9.2?}  {:.0} MB", bytes as f64 / 1e6);
    println!(
        "loading all rows     {loading:>9.2?}  {:.1} × the time to read the bytes, checksums included",
        loading.as_secs_f64() / reading.as_secs_f64()
    );
    Ok(())
}

async fn read_all_files(store: &Store) -> Result<usize> {
    let files: Vec<ObjectMeta> = store.object_store().list(None).try_collect().await?;
    let data = files.into_iter().filter(|f| f.location.extension() == Some("parquet"));
    let reads = data.map(|file| {
        let objects = store.object_store().clone();
        tokio::spawn(async move { objects.get(&file.location).await?.bytes().await })
    });
    let mut reads = futures::stream::iter(reads).buffer_unordered(CONCURRENT_READS);
    let mut bytes = 0;
    while let Some(read) = reads.next().await {
        bytes += std::hint::black_box(read??).len();
    }
    Ok(bytes)
}

/// Commits new versions of 1,000 images, and follows each commit in a reader that has loaded the
/// table.
async fn measure_following(
    store: &Store,
    generation: &Generation,
    sets: &[StatisticsKey],
    appender: &mut PartitionAppender,
    requests: &CountingStore,
) -> Result<()> {
    let mut follower = Follower::open(store, generation).await?;
    follower.next(&|_, _| {}).await?;
    let (mut committing, mut following) = (Vec::new(), Vec::new());
    let (mut commit_requests, mut follow_requests) = (Vec::new(), Vec::new());
    // There are enough commits that one writes a checkpoint of the log.
    for round in 0..FOLLOWED_COMMITS {
        let rows = (0..1000).map(|i| rows::random_row(i, 2 + round, DIMENSION, sets));
        let rows = rows.collect::<Result<Vec<_>>>()?;
        requests.take_request_counts();
        let started = Instant::now();
        appender.append(rows).await?;
        committing.push(started.elapsed());
        commit_requests.push(requests.take_request_counts());
        let started = Instant::now();
        let changes = follower.next(&|_, _| {}).await?.ok_or("nothing to follow")?;
        following.push(started.elapsed());
        assert_eq!(changes.rows.len(), 1000);
        follow_requests.push(requests.take_request_counts());
    }
    println!(
        "committing 1,000     {:>9.2?}  {}",
        median(committing),
        format_request_counts(commit_requests)
    );
    println!(
        "following 1,000      {:>9.2?}  {}",
        median(following),
        format_request_counts(follow_requests)
    );
    assert!(follower.next(&|_, _| {}).await?.is_none());
    println!(
        "nothing new                     {}",
        format_request_counts(vec![requests.take_request_counts()])
    );
    Ok(())
}

/// Formats the median numbers of requests, and their means, which include checkpoints.
fn format_request_counts(mut requests: Vec<[u64; 3]>) -> String {
    requests.sort_unstable();
    let [gets, puts, lists] = requests[requests.len() / 2];
    let mean = |i: usize| requests.iter().map(|r| r[i] as f64).sum::<f64>() / requests.len() as f64;
    format!(
        "{gets} GET, {puts} PUT, {lists} LIST; on average {:.1}, {:.1}, {:.1}",
        mean(0),
        mean(1),
        mean(2)
    )
}

fn median(mut times: Vec<Duration>) -> Duration {
    times.sort();
    times[times.len() / 2]
}
