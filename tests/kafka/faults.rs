//! Workers on a store that fails and takes its time. They run inside the test, because no option of
//! the program makes a store fail.

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use async_trait::async_trait;
use bsap::clip::{self, Clip, Towers};
use bsap::ingest::dead_letter::{self, DeadLetters};
use bsap::ingest::fetch::{self, Fetcher};
use bsap::ingest::{self, Progress, Worker, decode};
use bsap::balance::normalise::Normaliser;
use bsap::prompts::{self, ActiveSets, EmbeddedSet};
use bsap::record::{AttributeTypes, Ordering as Versions};
use bsap::ingest::source::{self, Decoder};
use bsap::store::Store;
use bsap::catalogue::{Serving, StateStore};
use bsap::table::{self, Writer};
use futures::StreamExt;
use futures::stream::BoxStream;
use object_store::path::Path;
use object_store::{CopyOptions, Error, GetOptions, GetResult, ListResult, MultipartUpload, ObjectMeta, ObjectStore, PutMultipartOptions, PutOptions, PutPayload, PutResult, Result};
use rand::RngExt;
use tokio_util::sync::CancellationToken;

use bsap::world::World;

/// What two workers met until they had consumed the whole topic.
pub async fn work(world: &World) -> String {
    let checkpoint = concat!(env!("CARGO_MANIFEST_DIR"), "/models/demo").to_owned();
    let options = clip::Options { checkpoint, ..clip::Options::default() };
    let towers: Arc<dyn Towers> = Arc::new(Clip::load(&options).unwrap());
    let sets = prompts::Options { sets: vec!["demo".into()], ..prompts::Options::default() };
    let sets = prompts::load_all(&sets, &*towers).unwrap();
    let records: Vec<_> = sets.iter().map(|set| set.record()).collect();
    let serving = Serving::new(sets[0].key.clone(), Normaliser::Softmax, 0.25);
    let state = StateStore::new(&world.store());
    state.ensure(&world.generation, &records, &serving, "test").await.unwrap();

    let faulty = Arc::new(Faulty {
        inner: world.store().objects().clone(),
        armed: AtomicBool::new(false),
        calls: AtomicU64::new(0),
        failed: AtomicU64::new(0),
    });
    let token = CancellationToken::new();
    let mut running = Vec::new();
    for _ in 0..2 {
        let store = Store::wrap(faulty.clone());
        let worker = worker(world, &store, towers.clone(), sets.clone()).await;
        running.push(tokio::spawn(worker.run(token.clone())));
    }
    faulty.armed.store(true, Ordering::SeqCst);
    let caught_up = world.caught_up(&mut []);
    tokio::pin!(caught_up);
    loop {
        tokio::select! {
            () = &mut caught_up => break,
            () = tokio::time::sleep(Duration::from_millis(200)) => {
                let ended = running.iter().any(|worker| worker.is_finished());
                assert!(!ended, "a worker gave up: {:?}", running.remove(0).await);
            }
        }
    }
    token.cancel();
    for worker in running {
        worker.await.unwrap().unwrap();
    }
    let count = |counter: &AtomicU64| counter.load(Ordering::SeqCst);
    format!("{} of {} calls failed", count(&faulty.failed), count(&faulty.calls))
}

async fn worker(
    world: &World,
    store: &Store,
    towers: Arc<dyn Towers>,
    sets: Vec<Arc<EmbeddedSet>>,
) -> Worker {
    let source = source::Options {
        ordering: Versions::Sequence,
        session_timeout_ms: 6_000,
        ..source::Options::default()
    };
    let fetch = fetch::Options {
        file_roots: vec![world.folder.path().join("pictures")],
        ..fetch::Options::default()
    };
    Worker {
        decoder: Decoder::new(&source, &AttributeTypes::new()),
        kafka: world.kafka(),
        source,
        dead_letters: DeadLetters::new(&world.kafka(), &dead_letter::Options::default()).unwrap(),
        fetcher: Fetcher::new(&fetch).unwrap(),
        decode: decode::Options::default(),
        towers,
        sets: ActiveSets::new(sets),
        writer: Writer::open(store, &world.generation, table::Options::default().commit_attempts)
            .await
            .unwrap(),
        options: ingest::Options { commit_ms: 200, ..ingest::Options::default() },
        progress: Arc::new(Progress::default()),
    }
}

/// Fails one call in five, half of them after they were done, and makes each wait a little.
struct Faulty {
    inner: Arc<dyn ObjectStore>,
    armed: AtomicBool,
    calls: AtomicU64,
    failed: AtomicU64,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Fate {
    Well,
    Before,
    After,
}

impl Faulty {
    async fn call(&self) -> Fate {
        if !self.armed.load(Ordering::SeqCst) {
            return Fate::Well;
        }
        let wait = rand::rng().random_range(0..80);
        tokio::time::sleep(Duration::from_millis(wait)).await;
        self.fate()
    }

    fn fate(&self) -> Fate {
        self.calls.fetch_add(1, Ordering::SeqCst);
        let fate = match rand::rng().random_range(0..10) {
            0 => Fate::Before,
            1 => Fate::After,
            _ => return Fate::Well,
        };
        self.failed.fetch_add(1, Ordering::SeqCst);
        fate
    }

    /// Does `work` as fate will have it.
    async fn fated<T>(&self, work: impl Future<Output = Result<T>>) -> Result<T> {
        let fate = self.call().await;
        if fate == Fate::Before {
            return Err(injected());
        }
        let done = work.await?;
        if fate == Fate::After { Err(injected()) } else { Ok(done) }
    }
}

fn injected() -> Error {
    Error::Generic { store: "faulty", source: "injected".into() }
}

impl fmt::Debug for Faulty {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Faulty")
    }
}

impl fmt::Display for Faulty {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Faulty")
    }
}

#[async_trait]
impl ObjectStore for Faulty {
    async fn put_opts(
        &self,
        path: &Path,
        payload: PutPayload,
        options: PutOptions,
    ) -> Result<PutResult> {
        self.fated(self.inner.put_opts(path, payload, options)).await
    }
    async fn put_multipart_opts(
        &self,
        path: &Path,
        options: PutMultipartOptions,
    ) -> Result<Box<dyn MultipartUpload>> {
        self.fated(self.inner.put_multipart_opts(path, options)).await
    }
    async fn get_opts(&self, path: &Path, options: GetOptions) -> Result<GetResult> {
        self.fated(self.inner.get_opts(path, options)).await
    }
    fn delete_stream(
        &self,
        paths: BoxStream<'static, Result<Path>>,
    ) -> BoxStream<'static, Result<Path>> {
        self.inner.delete_stream(paths)
    }
    fn list(&self, prefix: Option<&Path>) -> BoxStream<'static, Result<ObjectMeta>> {
        if self.armed.load(Ordering::SeqCst) && self.fate() != Fate::Well {
            return futures::stream::once(async { Err(injected()) }).boxed();
        }
        self.inner.list(prefix)
    }
    fn list_with_offset(
        &self,
        prefix: Option<&Path>,
        offset: &Path,
    ) -> BoxStream<'static, Result<ObjectMeta>> {
        if self.armed.load(Ordering::SeqCst) && self.fate() != Fate::Well {
            return futures::stream::once(async { Err(injected()) }).boxed();
        }
        self.inner.list_with_offset(prefix, offset)
    }
    async fn list_with_delimiter(&self, prefix: Option<&Path>) -> Result<ListResult> {
        self.fated(self.inner.list_with_delimiter(prefix)).await
    }
    async fn copy_opts(&self, from: &Path, to: &Path, options: CopyOptions) -> Result<()> {
        self.fated(self.inner.copy_opts(from, to, options)).await
    }
}
