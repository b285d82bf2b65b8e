//! A store that fails on purpose.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use async_trait::async_trait;
use futures::StreamExt;
use futures::stream::BoxStream;
use object_store::memory::InMemory;
use object_store::path::Path;
use object_store::{
    CopyOptions, GetOptions, GetResult, ListResult, MultipartUpload, ObjectMeta, ObjectStore,
    PutMultipartOptions, PutOptions, PutPayload, PutResult, Result,
};

/// When calls fail.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum FaultKind {
    /// Every so many writes, before the store has done it.
    BeforeWrites(usize),
    /// Every so many writes, after the store has done it.
    AfterWrites(usize),
    /// One read in so many, scattered.
    Reads(usize),
    /// Everything from this write or delete on, as when the process is killed before it.
    CrashBeforeWrite(usize),
    /// The same, but this one write is still done.
    CrashAfterWrite(usize),
}

/// A store in memory whose writes fail once it is armed.
#[derive(Debug)]
pub struct FaultyStore {
    inner: Arc<InMemory>,
    kind: FaultKind,
    pub is_armed: AtomicBool,
    call_count: AtomicUsize,
    pub injected_faults: AtomicUsize,
}

impl FaultyStore {
    pub fn new(kind: FaultKind) -> Self {
        Self::wrap(Arc::new(InMemory::new()), kind)
    }

    /// The same objects seen through a fault.
    pub fn wrap(inner: Arc<InMemory>, kind: FaultKind) -> Self {
        Self {
            inner,
            kind,
            is_armed: AtomicBool::new(false),
            call_count: AtomicUsize::new(0),
            injected_faults: AtomicUsize::new(0),
        }
    }

    /// Counts a write; whether it fails, and whether it is done nevertheless.
    fn next_write_outcome(&self) -> (bool, bool) {
        if !self.is_armed.load(Ordering::SeqCst) {
            return (false, true);
        }
        let call = self.call_count.fetch_add(1, Ordering::SeqCst);
        let (fails, done) = match self.kind {
            FaultKind::BeforeWrites(period) => (call.is_multiple_of(period), false),
            FaultKind::AfterWrites(period) => (call.is_multiple_of(period), true),
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
        (call.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 32).is_multiple_of(period as u64)
    }

    /// Whether the process is dead.
    fn has_crashed(&self) -> bool {
        match self.kind {
            FaultKind::CrashBeforeWrite(at) => self.call_count.load(Ordering::SeqCst) > at,
            FaultKind::CrashAfterWrite(at) => self.call_count.load(Ordering::SeqCst) > at,
            FaultKind::BeforeWrites(_) | FaultKind::AfterWrites(_) | FaultKind::Reads(_) => false,
        }
    }
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
        let (fails, done) = self.next_write_outcome();
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
        self.inner.put_multipart_opts(path, options).await
    }
    async fn get_opts(&self, path: &Path, options: GetOptions) -> Result<GetResult> {
        if self.has_crashed() || self.read_fails() {
            return Err(injected_error());
        }
        self.inner.get_opts(path, options).await
    }
    fn delete_stream(
        &self,
        paths: BoxStream<'static, Result<Path>>,
    ) -> BoxStream<'static, Result<Path>> {
        if self.next_write_outcome().0 {
            return futures::stream::once(async { Err(injected_error()) }).boxed();
        }
        self.inner.delete_stream(paths)
    }
    fn list(&self, prefix: Option<&Path>) -> BoxStream<'static, Result<ObjectMeta>> {
        if self.has_crashed() {
            return futures::stream::once(async { Err(injected_error()) }).boxed();
        }
        self.inner.list(prefix)
    }
    async fn list_with_delimiter(&self, prefix: Option<&Path>) -> Result<ListResult> {
        self.inner.list_with_delimiter(prefix).await
    }
    async fn copy_opts(&self, from: &Path, to: &Path, options: CopyOptions) -> Result<()> {
        self.inner.copy_opts(from, to, options).await
    }
}
