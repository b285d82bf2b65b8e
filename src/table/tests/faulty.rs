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
pub enum Fault {
    /// Every so many writes, before the store has done it.
    Before(usize),
    /// Every so many writes, after the store has done it.
    After(usize),
    /// One read in so many, scattered.
    Reads(usize),
    /// Everything from this write or delete on, as when the process is killed before it.
    Crash(usize),
    /// The same, but this one write is still done.
    CrashAfter(usize),
}

/// A store in memory whose writes fail once it is armed.
#[derive(Debug)]
pub struct Faulty {
    inner: Arc<InMemory>,
    kind: Fault,
    pub armed: AtomicBool,
    calls: AtomicUsize,
    pub injected: AtomicUsize,
}

impl Faulty {
    pub fn new(kind: Fault) -> Self {
        Self::over(Arc::new(InMemory::new()), kind)
    }

    /// The same objects seen through a fault.
    pub fn over(inner: Arc<InMemory>, kind: Fault) -> Self {
        Self {
            inner,
            kind,
            armed: AtomicBool::new(false),
            calls: AtomicUsize::new(0),
            injected: AtomicUsize::new(0),
        }
    }

    /// Counts a write; whether it fails, and whether it is done nevertheless.
    fn write(&self) -> (bool, bool) {
        if !self.armed.load(Ordering::SeqCst) {
            return (false, true);
        }
        let call = self.calls.fetch_add(1, Ordering::SeqCst);
        let (fails, done) = match self.kind {
            Fault::Before(period) => (call.is_multiple_of(period), false),
            Fault::After(period) => (call.is_multiple_of(period), true),
            Fault::Reads(_) => (false, true),
            Fault::Crash(at) => (call >= at, false),
            Fault::CrashAfter(at) => (call >= at, call == at),
        };
        self.injected.fetch_add(usize::from(fails), Ordering::SeqCst);
        (fails, done)
    }

    fn read_fails(&self) -> bool {
        let Fault::Reads(period) = self.kind else { return false };
        if !self.armed.load(Ordering::SeqCst) {
            return false;
        }
        // A fixed rhythm could meet the same step each time.
        let call = self.calls.fetch_add(1, Ordering::SeqCst) as u64;
        (call.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 32).is_multiple_of(period as u64)
    }

    /// Whether the process is dead.
    fn crashed(&self) -> bool {
        match self.kind {
            Fault::Crash(at) => self.calls.load(Ordering::SeqCst) > at,
            Fault::CrashAfter(at) => self.calls.load(Ordering::SeqCst) > at,
            Fault::Before(_) | Fault::After(_) | Fault::Reads(_) => false,
        }
    }
}

fn fault() -> object_store::Error {
    object_store::Error::Generic { store: "faulty", source: "injected".into() }
}

impl std::fmt::Display for Faulty {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("faulty")
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
        let (fails, done) = self.write();
        if !fails {
            return self.inner.put_opts(path, payload, options).await;
        }
        if done {
            self.inner.put_opts(path, payload, options).await?;
        }
        Err(fault())
    }
    async fn put_multipart_opts(
        &self,
        path: &Path,
        options: PutMultipartOptions,
    ) -> Result<Box<dyn MultipartUpload>> {
        self.inner.put_multipart_opts(path, options).await
    }
    async fn get_opts(&self, path: &Path, options: GetOptions) -> Result<GetResult> {
        if self.crashed() || self.read_fails() {
            return Err(fault());
        }
        self.inner.get_opts(path, options).await
    }
    fn delete_stream(
        &self,
        paths: BoxStream<'static, Result<Path>>,
    ) -> BoxStream<'static, Result<Path>> {
        if self.write().0 {
            return futures::stream::once(async { Err(fault()) }).boxed();
        }
        self.inner.delete_stream(paths)
    }
    fn list(&self, prefix: Option<&Path>) -> BoxStream<'static, Result<ObjectMeta>> {
        if self.crashed() {
            return futures::stream::once(async { Err(fault()) }).boxed();
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
