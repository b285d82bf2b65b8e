//! A store in memory that fails on purpose and records what is asked of it.

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use async_trait::async_trait;
use futures::StreamExt;
use futures::stream::BoxStream;
use object_store::memory::InMemory;
use object_store::path::Path;
use object_store::{
    CopyOptions, GetOptions, GetResult, ListResult, MultipartUpload, ObjectMeta, ObjectStore,
    PutMultipartOptions, PutOptions, PutPayload, PutResult, Result,
};
use tokio_util::sync::CancellationToken;

/// Which calls fail.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum FaultKind {
    /// One write in this many, before the store has done it.
    BeforeWrites(usize),
    /// One write in this many, after the store has done it.
    AfterWrites(usize),
    /// Every write of a log entry or checkpoint, before the store has done it.
    LogWrites,
    /// One read in this many, scattered.
    Reads(usize),
    /// Everything from this write or delete on, as if the process were killed before it.
    CrashBeforeWrite(usize),
    /// Everything after this write or delete, as if the process were killed after it.
    CrashAfterWrite(usize),
}

/// A store in memory that fails while it is armed.
#[derive(Debug)]
pub struct FaultyStore {
    inner: Arc<InMemory>,
    kind: FaultKind,
    pub is_armed: AtomicBool,
    call_count: AtomicUsize,
    pub injected_faults: AtomicUsize,
    requests: Mutex<Vec<String>>,
}

impl FaultyStore {
    pub fn new(kind: FaultKind) -> Self {
        Self::wrap(Arc::new(InMemory::new()), kind)
    }

    /// The objects of `inner`, behind faults of their own.
    pub fn wrap(inner: Arc<InMemory>, kind: FaultKind) -> Self {
        Self {
            inner,
            kind,
            is_armed: AtomicBool::new(false),
            call_count: AtomicUsize::new(0),
            injected_faults: AtomicUsize::new(0),
            requests: Mutex::default(),
        }
    }

    /// Returns the requests since the last call, such as `GET folder/object`.
    pub fn take_requests(&self) -> Vec<String> {
        std::mem::take(&mut self.requests.lock().unwrap())
    }

    fn record_request(&self, method: &str, path: &str) {
        self.requests.lock().unwrap().push(format!("{method} {path}"));
    }

    /// Counts a write to `path`. Returns whether it fails, and whether it is done nevertheless.
    fn next_write_outcome(&self, path: &str) -> (bool, bool) {
        if !self.is_armed.load(Ordering::SeqCst) {
            return (false, true);
        }
        let call = self.call_count.fetch_add(1, Ordering::SeqCst);
        let (fails, done) = match self.kind {
            FaultKind::BeforeWrites(period) => (call.is_multiple_of(period), false),
            FaultKind::AfterWrites(period) => (call.is_multiple_of(period), true),
            FaultKind::LogWrites => (path.contains("_delta_log"), false),
            FaultKind::Reads(_) => (false, true),
            FaultKind::CrashBeforeWrite(at) => (call >= at, false),
            FaultKind::CrashAfterWrite(at) => (call >= at, call == at),
        };
        self.injected_faults.fetch_add(usize::from(fails), Ordering::SeqCst);
        (fails, done)
    }

    fn read_fails(&self) -> bool {
        let FaultKind::Reads(period) = self.kind else { return false };
        if !self.is_armed.load(Ordering::SeqCst) {
            return false;
        }
        // A fixed rhythm could meet the same step each time.
        let call = self.call_count.fetch_add(1, Ordering::SeqCst) as u64;
        let fails = (call.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 32).is_multiple_of(period as u64);
        self.injected_faults.fetch_add(usize::from(fails), Ordering::SeqCst);
        fails
    }

    fn has_crashed(&self) -> bool {
        match self.kind {
            FaultKind::CrashBeforeWrite(at) | FaultKind::CrashAfterWrite(at) => {
                self.call_count.load(Ordering::SeqCst) > at
            }
            FaultKind::BeforeWrites(_)
            | FaultKind::AfterWrites(_)
            | FaultKind::LogWrites
            | FaultKind::Reads(_) => false,
        }
    }

    /// Arms the store. Returns a token that is cancelled after the second fault, while the code under
    /// test waits for another attempt.
    pub fn arm_and_cancel(self: &Arc<Self>) -> CancellationToken {
        self.is_armed.store(true, Ordering::SeqCst);
        let (store, cancel) = (self.clone(), CancellationToken::new());
        let token = cancel.clone();
        tokio::spawn(async move {
            while store.injected_faults.load(Ordering::SeqCst) < 2 {
                tokio::time::sleep(Duration::from_millis(1)).await;
            }
            token.cancel();
        });
        cancel
    }
}

/// Returns the result of `work`, which retries on a store that always fails until the token of
/// [`FaultyStore::arm_and_cancel`] is cancelled. Panics if it does not stop soon: with as many attempts
/// as these tests allow, it would go on for hours.
pub async fn stops_soon<T>(work: impl Future<Output = T>) -> T {
    tokio::time::timeout(Duration::from_secs(30), work).await.expect("it outlives its token")
}

fn injected_error() -> object_store::Error {
    object_store::Error::Generic { store: "faulty", source: "injected".into() }
}

impl std::fmt::Display for FaultyStore {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("faulty")
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
        self.record_request("PUT", path.as_ref());
        let (fails, done) = self.next_write_outcome(path.as_ref());
        if !fails {
            return self.inner.put_opts(path, payload, options).await;
        }
        if done {
            self.inner.put_opts(path, payload, options).await?;
        }
        Err(injected_error())
    }
    async fn put_multipart_opts(
        &self,
        path: &Path,
        options: PutMultipartOptions,
    ) -> Result<Box<dyn MultipartUpload>> {
        self.record_request("PUT", path.as_ref());
        self.inner.put_multipart_opts(path, options).await
    }
    async fn get_opts(&self, path: &Path, options: GetOptions) -> Result<GetResult> {
        self.record_request("GET", path.as_ref());
        if self.has_crashed() || self.read_fails() {
            return Err(injected_error());
        }
        self.inner.get_opts(path, options).await
    }
    fn delete_stream(
        &self,
        paths: BoxStream<'static, Result<Path>>,
    ) -> BoxStream<'static, Result<Path>> {
        self.record_request("DELETE", "");
        if self.next_write_outcome("").0 {
            return futures::stream::once(async { Err(injected_error()) }).boxed();
        }
        self.inner.delete_stream(paths)
    }
    fn list(&self, prefix: Option<&Path>) -> BoxStream<'static, Result<ObjectMeta>> {
        self.record_request("LIST", prefix.map_or("", |prefix| prefix.as_ref()));
        if self.has_crashed() {
            return futures::stream::once(async { Err(injected_error()) }).boxed();
        }
        self.inner.list(prefix)
    }
    async fn list_with_delimiter(&self, prefix: Option<&Path>) -> Result<ListResult> {
        self.record_request("LIST", prefix.map_or("", |prefix| prefix.as_ref()));
        self.inner.list_with_delimiter(prefix).await
    }
    async fn copy_opts(&self, from: &Path, to: &Path, options: CopyOptions) -> Result<()> {
        self.record_request("COPY", to.as_ref());
        self.inner.copy_opts(from, to, options).await
    }
}
