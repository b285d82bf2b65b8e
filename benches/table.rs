//! The stored table: what writing, tidying, loading and following it cost, in time, bytes and
//! requests. Loading is compared with reading the same bytes, in one run.
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
use bsap::record::{Ordering, Partition, Row};
use bsap::balance::statistics::StatisticsKey;
use bsap::store::Store;
use bsap::table::maintenance::upkeep::{Options, vacuum};
use bsap::table::{Committed, Compactor, Depth, Follower, PartitionBatch, Writer};
use bsap::catalogue::Generation;
use futures::stream::BoxStream;
use futures::{StreamExt, TryStreamExt};
use object_store::path::Path;
use object_store::{CopyOptions, GetOptions, GetResult, ListResult, MultipartUpload, ObjectMeta, ObjectStore, ObjectStoreExt, PutMultipartOptions, PutOptions, PutPayload, PutResult};
use tokio_util::sync::CancellationToken;

type Result<T, E = Box<dyn Error>> = std::result::Result<T, E>;

const DIMENSION: usize = 512;
/// Rows of a commit while the table is filled: the most that a worker puts into one.
const COMMIT: usize = 10_000;
/// Commits between two looks of the compactor.
const TIDY_EVERY: usize = 8;
const ROUNDS: usize = 3;
/// Commits that are followed one by one.
const FOLLOWED: u64 = 40;
/// Files read at one time, as a fresh reader does it.
const FILES_AT_ONCE: usize = 8;

/// A store that counts what would be paid for.
#[derive(Debug)]
struct Counting {
    inner: Arc<dyn ObjectStore>,
    gets: AtomicU64,
    puts: AtomicU64,
    lists: AtomicU64,
}

impl Counting {
    /// GET, PUT and LIST requests since the last call.
    fn take(&self) -> [u64; 3] {
        [&self.gets, &self.puts, &self.lists].map(|n| n.swap(0, Relaxed))
    }
}

impl fmt::Display for Counting {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.inner.fmt(f)
    }
}

#[async_trait]
impl ObjectStore for Counting {
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
        // Begin, one part, complete; larger files have more parts.
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

/// A worker with one partition.
struct Appender {
    writer: Writer,
    next: Option<i64>,
}

impl Appender {
    async fn append(&mut self, rows: Vec<Row>) -> Result<Committed> {
        let from = self.next.unwrap_or_default();
        let rows: Vec<(i64, Row)> = (from..).zip(rows).collect();
        let partition = Partition { topic: "images".into(), number: 0 };
        let next_offset = from + rows.len() as i64;
        let batch = PartitionBatch { partition, expected: self.next, next_offset, rows };
        self.next = Some(next_offset);
        Ok(self.writer.append(vec![batch]).await?)
    }
}

#[tokio::main]
async fn main() -> Result<()> {
    let mut arguments = std::env::args().skip(1).filter(|a| a != "--bench");
    let count: usize = arguments.next().map_or(Ok(100_000), |text| text.parse())?;
    let folder = tempfile::tempdir()?;
    let url = arguments.next().unwrap_or_else(|| folder.path().display().to_string());
    let place = Store::open(&url, &BTreeMap::new())?;
    let requests = Arc::new(Counting {
        inner: place.objects().clone(),
        gets: AtomicU64::new(0),
        puts: AtomicU64::new(0),
        lists: AtomicU64::new(0),
    });
    let store = Store::wrap(requests.clone());
    let generation =
        Generation::new("random", &"be".repeat(32), DIMENSION, 100.0, Ordering::Sequence);
    let sets = [StatisticsKey::new("bench", 1, &"ab".repeat(32), 100.0, 8)];
    println!("{count} rows, {DIMENSION} dimensions, one prompt set, {url}");

    let writer = Writer::open(&store, &generation, 10).await?;
    let mut appender = Appender { writer, next: None };
    fill(&store, &generation, &sets, &mut appender, count).await?;
    // What compaction has replaced is not read again.
    let later = chrono::Utc::now() + chrono::TimeDelta::days(9);
    vacuum(&store, &generation, &Options::default(), later, false).await?;
    cold(&store, &generation, count).await?;
    follow(&store, &generation, &sets, &mut appender, &requests).await
}

/// Writes all rows in commits of a worker's size, and tidies as a worker would.
async fn fill(
    store: &Store,
    generation: &Generation,
    sets: &[StatisticsKey],
    appender: &mut Appender,
    count: usize,
) -> Result<()> {
    let options = Options::default();
    let mut compactor = Compactor::open(store, generation, &options, 10).await?;
    let (mut writing, mut tidying) = (Duration::ZERO, Duration::ZERO);
    let (mut appended, mut rewritten, mut commits) = (0, 0, 0);
    for from in (0..count).step_by(COMMIT) {
        let rows = (from..(from + COMMIT).min(count)).map(|i| rows::row(i, 1, DIMENSION, sets));
        let rows = rows.collect::<Result<Vec<_>>>()?;
        let started = Instant::now();
        appended += appender.append(rows).await?.bytes;
        writing += started.elapsed();
        commits += 1;
        if commits % TIDY_EVERY == 0 {
            let started = Instant::now();
            let (now, token) = (chrono::Utc::now(), CancellationToken::new());
            rewritten += compactor.run(Depth::Merge, now, &|_, _| {}, &token).await?.bytes_out;
            tidying += started.elapsed();
        }
    }
    let per_second = count as f64 / writing.as_secs_f64();
    println!("written              {writing:>9.2?}  {per_second:.0} rows/s in {commits} commits");
    let bytes = appended as f64 / count as f64;
    let values = (2 * DIMENSION) as f64;
    println!(
        "on disk              {bytes:>9.0} bytes a row; {:.2} × its f16 values",
        bytes / values
    );
    println!(
        "compaction           {tidying:>9.2?}  {:.2} bytes rewritten for each appended, {} files left",
        rewritten as f64 / appended as f64,
        compactor.files().await?
    );
    Ok(())
}

/// A reader that starts with nothing, against reading the same bytes.
async fn cold(store: &Store, generation: &Generation, count: usize) -> Result<()> {
    let mut follower = Follower::open(store, generation).await?;
    let first = follower.next(&|_, _| {}).await?.ok_or("an empty table")?;
    assert_eq!(first.rows.len(), count);
    drop((first, follower));
    let (mut reading, mut loading, mut bytes) = (Vec::new(), Vec::new(), 0);
    for _ in 0..ROUNDS {
        let started = Instant::now();
        bytes = read_all(store).await?;
        reading.push(started.elapsed());
        let started = Instant::now();
        let mut follower = Follower::open(store, generation).await?;
        let whole = follower.next(&|_, _| {}).await?;
        loading.push(started.elapsed());
        drop(whole);
    }
    let (reading, loading) = (median(reading), median(loading));
    println!("reading all files    {reading:>9.2?}  {:.0} MB", bytes as f64 / 1e6);
    println!(
        "loading all rows     {loading:>9.2?}  {:.1} × the time to read the bytes, checksums included",
        loading.as_secs_f64() / reading.as_secs_f64()
    );
    Ok(())
}

async fn read_all(store: &Store) -> Result<usize> {
    let files: Vec<ObjectMeta> = store.objects().list(None).try_collect().await?;
    let data = files.into_iter().filter(|f| f.location.extension() == Some("parquet"));
    let reads = data.map(|file| {
        let objects = store.objects().clone();
        tokio::spawn(async move { objects.get(&file.location).await?.bytes().await })
    });
    let mut reads = futures::stream::iter(reads).buffer_unordered(FILES_AT_ONCE);
    let mut bytes = 0;
    while let Some(read) = reads.next().await {
        bytes += std::hint::black_box(read??).len();
    }
    Ok(bytes)
}

/// New versions of 1,000 images in a table that a reader has loaded.
async fn follow(
    store: &Store,
    generation: &Generation,
    sets: &[StatisticsKey],
    appender: &mut Appender,
    requests: &Counting,
) -> Result<()> {
    let mut follower = Follower::open(store, generation).await?;
    follower.next(&|_, _| {}).await?;
    let (mut committing, mut following) = (Vec::new(), Vec::new());
    let (mut of_commit, mut of_follow) = (Vec::new(), Vec::new());
    // Long enough that a checkpoint is among them.
    for round in 0..FOLLOWED {
        let rows = (0..1000).map(|i| rows::row(i, 2 + round, DIMENSION, sets));
        let rows = rows.collect::<Result<Vec<_>>>()?;
        requests.take();
        let started = Instant::now();
        appender.append(rows).await?;
        committing.push(started.elapsed());
        of_commit.push(requests.take());
        let started = Instant::now();
        let changes = follower.next(&|_, _| {}).await?.ok_or("nothing to follow")?;
        following.push(started.elapsed());
        assert_eq!(changes.rows.len(), 1000);
        of_follow.push(requests.take());
    }
    println!("committing 1,000     {:>9.2?}  {}", median(committing), told(of_commit));
    println!("following 1,000      {:>9.2?}  {}", median(following), told(of_follow));
    assert!(follower.next(&|_, _| {}).await?.is_none());
    println!("nothing new                     {}", told(vec![requests.take()]));
    Ok(())
}

/// The usual numbers of requests, and their mean, in which checkpoints are.
fn told(mut requests: Vec<[u64; 3]>) -> String {
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
