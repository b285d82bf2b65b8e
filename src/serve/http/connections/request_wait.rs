//! Two limits for one connection: how long it may be idle between requests, and how long a request's
//! head may take from its first byte on. hyper has one limit for both together.
//!
//! Proxies keep connections open to use them for their next request. If the server closed them
//! first, a request that was just sent would be lost, so the first limit is long and the second short.

use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};
use std::task::{Context, Poll};
use std::time::Duration;

use axum::body::{Body, Bytes};
use axum::http::{Request, Response};
use futures::task::AtomicWaker;
use hyper::body::{Body as HttpBody, Frame, Incoming, SizeHint};
use hyper::service::Service;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::time::{Instant, Sleep, sleep_until};

/// How long a connection may wait for parts of a request.
#[derive(Debug, Clone, Copy)]
pub(super) struct RequestWaitLimits {
    /// From the first byte of a head until it is complete; from the connection on for the first one.
    pub head_timeout: Duration,
    /// From the end of a response until the first byte of the next request.
    pub idle_timeout: Duration,
}

/// What a connection does now; shared by its stream, its service and the bodies of its responses.
#[derive(Clone)]
struct SharedPhase(Arc<PhaseAndReader>);

struct PhaseAndReader {
    phase: AtomicU8,
    /// Wakes the connection, so that it starts to wait for the next request.
    reader: AtomicWaker,
}

/// A request's head is being read.
const READING_HEAD: u8 = 0;
/// A request is being answered.
const ANSWERING: u8 = 1;
/// The last response is complete, and nothing of the next request has come.
const IDLE: u8 = 2;

impl SharedPhase {
    fn get(&self) -> u8 {
        self.0.phase.load(Ordering::Acquire)
    }

    fn set(&self, phase: u8) {
        self.0.phase.store(phase, Ordering::Release);
    }
}

/// Returns `stream` and `service` with the limits: the stream ends when the connection has been idle
/// for too long, and fails if a head takes too long.
pub(super) fn limit_request_waits<S, V>(
    stream: S,
    service: V,
    limits: RequestWaitLimits,
) -> (RequestWaitStream<S>, PhaseService<V>) {
    let phase = SharedPhase(Arc::new(PhaseAndReader {
        phase: AtomicU8::new(READING_HEAD),
        reader: AtomicWaker::new(),
    }));
    let timer = Box::pin(sleep_until(Instant::now() + limits.head_timeout));
    let stream = RequestWaitStream {
        stream,
        limits,
        phase: phase.clone(),
        timed_phase: READING_HEAD,
        timer,
    };
    (stream, PhaseService { service, phase })
}

/// A connection's stream with [`RequestWaitLimits`].
pub(super) struct RequestWaitStream<S> {
    stream: S,
    limits: RequestWaitLimits,
    phase: SharedPhase,
    /// The phase that `timer` was started for.
    timed_phase: u8,
    timer: Pin<Box<Sleep>>,
}

impl<S> RequestWaitStream<S> {
    /// Starts the timer if the phase has changed; returns whether the time of the phase is over.
    fn poll_is_over(&mut self, context: &mut Context<'_>) -> bool {
        let phase = self.phase.get();
        let limit = match phase {
            READING_HEAD => self.limits.head_timeout,
            IDLE => self.limits.idle_timeout,
            _ => {
                self.timed_phase = phase;
                return false;
            }
        };
        if self.timed_phase != phase {
            self.timed_phase = phase;
            self.timer.as_mut().reset(Instant::now() + limit);
        }
        self.timer.as_mut().poll(context).is_ready()
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for RequestWaitStream<S> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        self.phase.0.reader.register(context.waker());
        let is_reading_head = self.phase.get() == READING_HEAD;
        if is_reading_head && self.poll_is_over(context) {
            return Poll::Ready(Err(io::ErrorKind::TimedOut.into()));
        }
        let filled_before = buffer.filled().len();
        let result = Pin::new(&mut self.stream).poll_read(context, buffer);
        if self.phase.get() == IDLE {
            match &result {
                Poll::Ready(_) if buffer.filled().len() > filled_before => {
                    self.phase.set(READING_HEAD);
                    // Starts the timer for the rest of the head.
                    self.timed_phase = IDLE;
                    self.poll_is_over(context);
                }
                // The end of the stream closes the connection.
                Poll::Pending if self.poll_is_over(context) => return Poll::Ready(Ok(())),
                _ => {}
            }
        }
        result
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for RequestWaitStream<S> {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(context, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(context)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        slices: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write_vectored(context, slices)
    }
}

/// Reports to the connection's stream when a request is answered, and when its response is complete.
pub(super) struct PhaseService<V> {
    service: V,
    phase: SharedPhase,
}

impl<V> Service<Request<Incoming>> for PhaseService<V>
where
    V: Service<Request<Incoming>, Response = Response<Body>>,
    V::Future: Send + 'static,
{
    type Response = Response<PhaseBody>;
    type Error = V::Error;
    type Future = Pin<Box<dyn Future<Output = Result<Self::Response, V::Error>> + Send>>;

    fn call(&self, request: Request<Incoming>) -> Self::Future {
        self.phase.set(ANSWERING);
        let (response, phase) = (self.service.call(request), self.phase.clone());
        Box::pin(async move { Ok(response.await?.map(|body| PhaseBody { body, phase })) })
    }
}

/// The body of a response; when hyper drops it, the response has been written.
pub(super) struct PhaseBody {
    body: Body,
    phase: SharedPhase,
}

impl HttpBody for PhaseBody {
    type Data = Bytes;
    type Error = axum::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, axum::Error>>> {
        Pin::new(&mut self.body).poll_frame(context)
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

impl Drop for PhaseBody {
    fn drop(&mut self) {
        self.phase.set(IDLE);
        self.phase.0.reader.wake();
    }
}
