//! Connections: how many there may be, how slow their requests, TLS, and their end.

use std::io;
use std::net::SocketAddr;
use std::path::Path;
use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use axum::http::{HeaderValue, header};
use axum::middleware;
use axum::response::{IntoResponse, Response};
use hyper::server::conn::http1;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::service::TowerToHyperService;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;
use tokio::time::{sleep, timeout};
use tokio_io_timeout::TimeoutStream;
use tokio_rustls::TlsAcceptor;
use tokio_rustls::rustls::ServerConfig;
use tokio_rustls::rustls::crypto::aws_lc_rs;
use tokio_rustls::rustls::pki_types::pem::PemObject as _;
use tokio_rustls::rustls::pki_types::{CertificateDer, PrivateKeyDer};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tracing::{error, warn};

use super::problem::Problem;
use super::{HttpOptions, ServeError};
use crate::telemetry::event;

/// How long open requests may take to finish at shutdown.
const DRAIN_TIMEOUT: Duration = Duration::from_secs(2);
/// Most bytes of a request's head.
const MAX_REQUEST_HEAD_BYTES: usize = 32 << 10;
/// Connections that are told why they are turned away, at one time; more are closed at once.
const MAX_CONCURRENT_REJECTIONS: usize = 64;
/// Rest after a connection could not be taken: files are used up, and soon are not.
const ACCEPT_RETRY_DELAY: Duration = Duration::from_millis(100);

/// An open port.
pub struct Listener {
    tcp_listener: TcpListener,
    tls_acceptor: Option<TlsAcceptor>,
}

impl Listener {
    /// Where the page is.
    pub fn url(&self) -> io::Result<String> {
        let scheme = if self.tls_acceptor.is_some() { "https" } else { "http" };
        Ok(format!("{scheme}://{}/", self.tcp_listener.local_addr()?))
    }
}

/// Opens the port and reads the certificate: what is wrong with them shows before anything expensive
/// is loaded.
pub async fn listen(options: &HttpOptions) -> Result<Listener, ServeError> {
    let tls = if options.is_tls_enabled() {
        Some(load_tls_acceptor(&options.tls_cert, &options.tls_key)?)
    } else {
        None
    };
    let address: SocketAddr = options.listen;
    let tcp = TcpListener::bind(address)
        .await
        .map_err(|source| ServeError::Listen { address, source })?;
    Ok(Listener { tcp_listener: tcp, tls_acceptor: tls })
}

fn load_tls_acceptor(cert: &Path, key: &Path) -> Result<TlsAcceptor, ServeError> {
    let wrong = |option, file: &Path, reason: String| ServeError::Tls {
        option,
        file: file.to_owned(),
        reason,
    };
    let wrong_cert = |reason| wrong("http.tls_cert", cert, reason);
    let chain: Result<Vec<_>, _> =
        CertificateDer::pem_file_iter(cert).and_then(|certificates| certificates.collect());
    let chain = chain.map_err(|e| wrong_cert(e.to_string()))?;
    if chain.is_empty() {
        return Err(wrong_cert("there is no certificate in it".into()));
    }
    let wrong_key = |reason| wrong("http.tls_key", key, reason);
    let secret = PrivateKeyDer::from_pem_file(key).map_err(|e| wrong_key(e.to_string()))?;
    let config = ServerConfig::builder_with_provider(Arc::new(aws_lc_rs::default_provider()))
        .with_safe_default_protocol_versions()
        .map(|builder| builder.with_no_client_auth())
        .and_then(|builder| builder.with_single_cert(chain, secret))
        .map_err(|e| wrong_key(e.to_string()))?;
    Ok(TlsAcceptor::from(Arc::new(config)))
}

/// What connections may take.
#[derive(Debug, Clone, Copy)]
pub struct ConnectionLimits {
    max_connections: usize,
    /// For a request's head, and for the handshake of TLS.
    head_timeout: Duration,
    /// Without a byte being taken of what is sent.
    write_timeout: Duration,
}

impl ConnectionLimits {
    /// As configured.
    pub fn new(options: &HttpOptions) -> Self {
        Self {
            max_connections: options.max_connections,
            head_timeout: Duration::from_millis(options.header_timeout_ms),
            write_timeout: Duration::from_millis(options.write_timeout_ms),
        }
    }
}

/// Answers by `router` until `token` is cancelled, then lets open requests finish.
pub async fn accept_connections(
    listener: Listener,
    router: Router,
    limits: ConnectionLimits,
    token: CancellationToken,
) {
    let permits = Arc::new(Semaphore::new(limits.max_connections));
    let rejection_permits = Arc::new(Semaphore::new(MAX_CONCURRENT_REJECTIONS));
    let rejecting_router = build_rejecting_router(limits.max_connections);
    let tasks = TaskTracker::new();
    loop {
        let accepted = tokio::select! {
            accepted = listener.tcp_listener.accept() => accepted,
            () = token.cancelled() => break,
        };
        let stream = match accepted {
            Ok((stream, _)) => stream,
            Err(error) => {
                // One that left before it was taken is its own affair.
                if error.kind() != io::ErrorKind::ConnectionAborted {
                    error!(event = event::HTTP_ERROR, code = "accept", %error, "a connection could not be taken");
                    token.run_until_cancelled(sleep(ACCEPT_RETRY_DELAY)).await;
                }
                continue;
            }
        };
        let (turn, service) = if let Ok(turn) = permits.clone().try_acquire_owned() {
            (turn, router.clone())
        } else {
            warn!(
                event = event::REQUEST_REJECTED,
                limit = limits.max_connections,
                "too many connections; one was turned away"
            );
            let Ok(turn) = rejection_permits.clone().try_acquire_owned() else { continue };
            (turn, rejecting_router.clone())
        };
        let (tls, token) = (listener.tls_acceptor.clone(), token.clone());
        tasks.spawn(async move {
            let _turn = turn;
            // What goes wrong on a connection ends it, and is the caller's to see.
            let _ = handle_connection(stream, tls, service, limits, &token).await;
        });
    }
    tasks.close();
    tasks.wait().await;
}

/// Tells everybody that there are too many.
fn build_rejecting_router(limit: usize) -> Router {
    let answer = move || async move {
        Problem::too_many_requests(limit, "connections are open (http.max_connections)")
            .into_response()
    };
    let close = |mut response: Response| async {
        response.headers_mut().insert(header::CONNECTION, HeaderValue::from_static("close"));
        response
    };
    Router::new().fallback(answer).layer(middleware::map_response(close))
}

async fn handle_connection(
    stream: TcpStream,
    tls: Option<TlsAcceptor>,
    service: Router,
    limits: ConnectionLimits,
    token: &CancellationToken,
) -> Result<(), Box<dyn std::error::Error + Send + Sync>> {
    // Answers are small: waiting to fill a packet only delays them.
    stream.set_nodelay(true)?;
    let Some(tls) = tls else { return serve_connection(stream, service, limits, token).await };
    let stream = tokio::select! {
        stream = timeout(limits.head_timeout, tls.accept(stream)) => stream??,
        () = token.cancelled() => return Ok(()),
    };
    serve_connection(stream, service, limits, token).await
}

async fn serve_connection(
    stream: impl AsyncRead + AsyncWrite + Unpin + Send + 'static,
    service: Router,
    limits: ConnectionLimits,
    token: &CancellationToken,
) -> Result<(), Box<dyn std::error::Error + Send + Sync>> {
    let mut stream = TimeoutStream::new(stream);
    // Who does not read keeps what is to be sent: a picture holds its share of fetch.budget_mib.
    stream.set_write_timeout(Some(limits.write_timeout));
    let stream = Box::pin(stream);
    let connection = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(limits.head_timeout)
        .max_buf_size(MAX_REQUEST_HEAD_BYTES)
        .serve_connection(TokioIo::new(stream), TowerToHyperService::new(service));
    let mut connection = pin!(connection);
    tokio::select! {
        ended = connection.as_mut() => ended?,
        () = token.cancelled() => {
            connection.as_mut().graceful_shutdown();
            timeout(DRAIN_TIMEOUT, connection).await??;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use axum::routing::get;
    use tokio::io::{AsyncReadExt, AsyncWriteExt};

    use super::*;

    /// A megabyte for whoever asks, over a pipe that holds a sixteenth of it.
    async fn request_large_body() -> (tokio::io::DuplexStream, tokio::task::JoinHandle<bool>) {
        let (mut caller, server) = tokio::io::duplex(64 << 10);
        let service = Router::new().route("/", get(|| async { vec![0u8; 1 << 20] }));
        let write = Duration::from_millis(300);
        let limits = ConnectionLimits {
            max_connections: 1,
            head_timeout: Duration::from_secs(60),
            write_timeout: write,
        };
        let token = CancellationToken::new();
        let conversation = tokio::spawn(async move {
            serve_connection(server, service, limits, &token).await.is_err()
        });
        let request = b"GET / HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n";
        caller.write_all(request).await.unwrap();
        (caller, conversation)
    }

    #[tokio::test]
    async fn clients_that_do_not_read_are_disconnected() {
        let (caller, conversation) = request_large_body().await;
        assert!(conversation.await.unwrap(), "it ends, though nobody left");
        drop(caller);
        // Slowly is not never.
        let (mut caller, conversation) = request_large_body().await;
        let (mut part, mut read) = (vec![0; 64 << 10], 0);
        while let Ok(bytes @ 1..) = caller.read(&mut part).await {
            read += bytes;
            sleep(Duration::from_millis(50)).await;
        }
        assert!(read > 1 << 20, "{read}");
        assert!(!conversation.await.unwrap());
    }
}
