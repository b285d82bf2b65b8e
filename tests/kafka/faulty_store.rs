//! Workers on a store that fails and is slow. They run inside of the test, because no option of the program
//! makes a store fail.

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use async_trait::async_trait;
use bsap::balance::normalise::Normaliser;
use bsap::catalogue::{ServingConfig, StateStore};
use bsap::clip::{self, ClipModel, Encoders};
use bsap::ingest::dead_letter::{self, DeadLetterWriter};
use bsap::ingest::fetch::{self, Fetcher};
use bsap::ingest::source::{self, Decoder};
use bsap::ingest::{self, Progress, Worker, decode};
use bsap::prompts::{self, ActivePromptSets, EmbeddedPromptSet};
use bsap::record::{AttributeTypes, VersionOrdering};
use bsap::store::Store;
use bsap::table::{self, TableWriter};
use futures::StreamExt;
use futures::stream::BoxStream;
use object_store::path::Path;
use object_store::{
    CopyOptions, Error, GetOptions, GetResult, ListResult, MultipartUpload, ObjectMeta,
    ObjectStore, PutMultipartOptions, PutOptions, PutPayload, PutResult, Result,
};
use rand::RngExt;
use tokio_util::sync::CancellationToken;

use crate::fixture::Fixture;

/// Runs two workers until they have consumed the whole topic; describes how many calls failed.
pub async fn run_workers(fixture: &Fixture) -> String {
    let checkpoint = concat!(env!("CARGO_MANIFEST_DIR"), "/models/demo").to_owned();
    let options = clip::ModelOptions { checkpoint, ..clip::ModelOptions::default() };
    let encoders: Arc<dyn Encoders> = Arc::new(ClipModel::load(&options).unwrap());
    let sets =
        prompts::PromptOptions { sets: vec!["demo".into()], ..prompts::PromptOptions::default() };
    let sets = prompts::load_configured_sets(&sets, &*encoders).unwrap();
    let records: Vec<_> = sets.iter().map(|set| set.to_record()).collect();
    let serving = ServingConfig::new(sets[0].statistics_key.clone(), Normaliser::Softmax, 0.25);
    let state = StateStore::new(&fixture.store());
    state.initialise_or_extend(&fixture.generation, &records, &serving, "test").await.unwrap();

    let faulty = Arc::new(FaultyStore {
        inner: fixture.store().object_store().clone(),
        enabled: AtomicBool::new(false),
        calls: AtomicU64::new(0),
        failed_calls: AtomicU64::new(0),
    });
    let token = CancellationToken::new();
    let mut running = Vec::new();
    for _ in 0..2 {
        let store = Store::from_object_store(faulty.clone());
        let worker = new_worker(fixture, &store, encoders.clone(), sets.clone()).await;
        running.push(tokio::spawn(worker.run(token.clone())));
    }
    faulty.enabled.store(true, Ordering::SeqCst);
    let caught_up = fixture.wait_until_caught_up(&mut []);
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
    format!("{} of {} calls failed", count(&faulty.failed_calls), count(&faulty.calls))
}

async fn new_worker(
    fixture: &Fixture,
    store: &Store,
    encoders: Arc<dyn Encoders>,
    sets: Vec<Arc<EmbeddedPromptSet>>,
) -> Worker {
    let source = source::SourceOptions {
        ordering: VersionOrdering::Sequence,
        session_timeout_ms: 6_000,
        ..source::SourceOptions::default()
    };
    let fetch = fetch::FetchOptions {
        file_roots: vec![fixture.folder.path().join("pictures")],
        ..fetch::FetchOptions::default()
    };
    Worker {
        decoder: Decoder::new(&source, &AttributeTypes::new()),
        kafka_options: fixture.kafka_options(),
        source_options: source,
        dead_letter_writer: DeadLetterWriter::new(
            &fixture.kafka_options(),
            &dead_letter::DeadLetterOptions::default(),
        )
        .unwrap(),
        fetcher: Fetcher::new(&fetch).unwrap(),
        decode_options: decode::DecodeOptions::default(),
        encoders,
        prompt_sets: ActivePromptSets::new(sets),
        table_writer: TableWriter::open(
            store,
            &fixture.generation,
            table::TableOptions::default().max_commit_attempts,
        )
        .await
        .unwrap(),
        ingest_options: ingest::IngestOptions {
            commit_ms: 200,
            ..ingest::IngestOptions::default()
        },
        progress: Arc::new(Progress::default()),
    }
}

/// Fails one call in five, half of them after they were executed, and delays each call by up to 80 ms.
struct FaultyStore {
    inner: Arc<dyn ObjectStore>,
    enabled: AtomicBool,
    calls: AtomicU64,
    failed_calls: AtomicU64,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum CallOutcome {
    Succeed,
    FailBefore,
    FailAfter,
}

impl FaultyStore {
    async fn delay_and_draw_outcome(&self) -> CallOutcome {
        if !self.enabled.load(Ordering::SeqCst) {
            return CallOutcome::Succeed;
        }
        let wait = rand::rng().random_range(0..80);
        tokio::time::sleep(Duration::from_millis(wait)).await;
        self.draw_outcome()
    }

    fn draw_outcome(&self) -> CallOutcome {
        self.calls.fetch_add(1, Ordering::SeqCst);
        let outcome = match rand::rng().random_range(0..10) {
            0 => CallOutcome::FailBefore,
            1 => CallOutcome::FailAfter,
            _ => return CallOutcome::Succeed,
        };
        self.failed_calls.fetch_add(1, Ordering::SeqCst);
        outcome
    }

    /// Runs `work` with a random outcome.
    async fn run_with_faults<T>(&self, work: impl Future<Output = Result<T>>) -> Result<T> {
        let outcome = self.delay_and_draw_outcome().await;
        if outcome == CallOutcome::FailBefore {
            return Err(injected_error());
        }
        let done = work.await?;
        if outcome == CallOutcome::FailAfter { Err(injected_error()) } else { Ok(done) }
    }
}

fn injected_error() -> Error {
    Error::Generic { store: "faulty", source: "injected".into() }
}

impl fmt::Debug for FaultyStore {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Faulty")
    }
}

impl fmt::Display for FaultyStore {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Faulty")
    }
}

#[async_trait]
impl ObjectStore for FaultyStore {
    async fn put_opts(
        &self,
        path: &Path,
        payload: PutPayload,
        options: PutOptions,
    ) -> Result<PutResult> {
        self.run_with_faults(self.inner.put_opts(path, payload, options)).await
    }
    async fn put_multipart_opts(
        &self,
        path: &Path,
        options: PutMultipartOptions,
    ) -> Result<Box<dyn MultipartUpload>> {
        self.run_with_faults(self.inner.put_multipart_opts(path, options)).await
    }
    async fn get_opts(&self, path: &Path, options: GetOptions) -> Result<GetResult> {
        self.run_with_faults(self.inner.get_opts(path, options)).await
    }
    fn delete_stream(
        &self,
        paths: BoxStream<'static, Result<Path>>,
    ) -> BoxStream<'static, Result<Path>> {
        self.inner.delete_stream(paths)
    }
    fn list(&self, prefix: Option<&Path>) -> BoxStream<'static, Result<ObjectMeta>> {
        if self.enabled.load(Ordering::SeqCst) && self.draw_outcome() != CallOutcome::Succeed {
            return futures::stream::once(async { Err(injected_error()) }).boxed();
        }
        self.inner.list(prefix)
    }
    fn list_with_offset(
        &self,
        prefix: Option<&Path>,
        offset: &Path,
    ) -> BoxStream<'static, Result<ObjectMeta>> {
        if self.enabled.load(Ordering::SeqCst) && self.draw_outcome() != CallOutcome::Succeed {
            return futures::stream::once(async { Err(injected_error()) }).boxed();
        }
        self.inner.list_with_offset(prefix, offset)
    }
    async fn list_with_delimiter(&self, prefix: Option<&Path>) -> Result<ListResult> {
        self.run_with_faults(self.inner.list_with_delimiter(prefix)).await
    }
    async fn copy_opts(&self, from: &Path, to: &Path, options: CopyOptions) -> Result<()> {
        self.run_with_faults(self.inner.copy_opts(from, to, options)).await
    }
}
