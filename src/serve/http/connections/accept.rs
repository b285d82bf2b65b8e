//! Accepts connections: limits their number and duration, terminates TLS, drains them at shutdown.

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

use super::request_wait::{RequestWaitLimits, limit_request_waits};
use crate::serve::http::body::problem::Problem;
use crate::serve::http::error::ServerStartError;
use crate::serve::http::options::HttpOptions;
use crate::telemetry::event;

/// How long open requests may take to finish at shutdown.
const DRAIN_TIMEOUT: Duration = Duration::from_secs(2);
/// Maximum size of a request's head: its first line and its headers, of which hyper allows 100.
const MAX_REQUEST_HEAD_BYTES: usize = 32 << 10;
/// Maximum number of connections over the limit that get an error response at one time; further
/// ones are closed without a response.
const MAX_CONCURRENT_REJECTIONS: usize = 64;
/// Pause after a connection could not be accepted, in most cases because there are no free file
/// descriptors: open connections release some in the meantime.
const ACCEPT_RETRY_DELAY: Duration = Duration::from_millis(100);

/// A bound port, and TLS for its connections if it is configured.
pub struct Listener {
    tcp_listener: TcpListener,
    tls_acceptor: Option<TlsAcceptor>,
}

impl Listener {
    /// Returns the address of the page.
    pub fn url(&self) -> io::Result<String> {
        let scheme = if self.tls_acceptor.is_some() { "https" } else { "http" };
        Ok(format!("{scheme}://{}/", self.tcp_listener.local_addr()?))
    }
}

/// Binds the port and reads the certificate. Called before the model and the table are loaded, so
/// that mistakes in these options show at once.
pub async fn bind_listener(options: &HttpOptions) -> Result<Listener, ServerStartError> {
    let tls = if options.is_tls_enabled() {
        Some(load_tls_acceptor(&options.tls_cert, &options.tls_key)?)
    } else {
        None
    };
    let address: SocketAddr = options.listen;
    let tcp = TcpListener::bind(address)
        .await
        .map_err(|source| ServerStartError::Listen { address, source })?;
    Ok(Listener { tcp_listener: tcp, tls_acceptor: tls })
}

fn load_tls_acceptor(cert: &Path, key: &Path) -> Result<TlsAcceptor, ServerStartError> {
    let tls_error = |option, file: &Path, reason: String| ServerStartError::Tls {
        option,
        file: file.to_owned(),
        reason,
    };
    let cert_error = |reason| tls_error("http.tls_cert", cert, reason);
    let chain: Result<Vec<_>, _> =
        CertificateDer::pem_file_iter(cert).and_then(|certificates| certificates.collect());
    let chain = chain.map_err(|e| cert_error(e.to_string()))?;
    if chain.is_empty() {
        return Err(cert_error("there is no certificate in it".into()));
    }
    let key_error = |reason| tls_error("http.tls_key", key, reason);
    let secret = PrivateKeyDer::from_pem_file(key).map_err(|e| key_error(e.to_string()))?;
    let config = ServerConfig::builder_with_provider(Arc::new(aws_lc_rs::default_provider()))
        .with_safe_default_protocol_versions()
        .map(|builder| builder.with_no_client_auth())
        .and_then(|builder| builder.with_single_cert(chain, secret))
        .map_err(|e| key_error(e.to_string()))?;
    Ok(TlsAcceptor::from(Arc::new(config)))
}

/// Limits of the connections.
#[derive(Debug, Clone, Copy)]
pub struct ConnectionLimits {
    max_connections: usize,
    /// For a request's head, which is also the limit of the TLS handshake, and between requests.
    request_wait: RequestWaitLimits,
    /// For the client to read a part of the response.
    write_timeout: Duration,
}

impl ConnectionLimits {
    pub fn new(options: &HttpOptions) -> Self {
        Self {
            max_connections: options.max_connections,
            request_wait: RequestWaitLimits {
                head_timeout: Duration::from_millis(options.header_timeout_ms),
                idle_timeout: Duration::from_millis(options.idle_timeout_ms),
            },
            write_timeout: Duration::from_millis(options.write_timeout_ms),
        }
    }
}

/// Serves connections with `router` until `cancel` is cancelled, then lets open requests finish.
pub async fn accept_connections(
    listener: Listener,
    router: Router,
    limits: ConnectionLimits,
    cancel: CancellationToken,
) {
    let permits = Arc::new(Semaphore::new(limits.max_connections));
    let rejection_permits = Arc::new(Semaphore::new(MAX_CONCURRENT_REJECTIONS));
    let rejecting_router = build_rejecting_router(limits.max_connections);
    let tasks = TaskTracker::new();
    loop {
        let accepted = tokio::select! {
            accepted = listener.tcp_listener.accept() => accepted,
            () = cancel.cancelled() => break,
        };
        let stream = match accepted {
            Ok((stream, _)) => stream,
            Err(error) => {
                // The client closed the connection before it was accepted: no fault of this server.
                if error.kind() != io::ErrorKind::ConnectionAborted {
                    error!(event = event::HTTP_ERROR, code = "accept", %error, "a connection could not be accepted");
                    sleep(ACCEPT_RETRY_DELAY).await;
                }
                continue;
            }
        };
        let (permit, service) = if let Ok(permit) = permits.clone().try_acquire_owned() {
            (permit, router.clone())
        } else {
            warn!(
                event = event::REQUEST_REJECTED,
                limit = limits.max_connections,
                "too many connections; one was rejected"
            );
            let Ok(permit) = rejection_permits.clone().try_acquire_owned() else { continue };
            (permit, rejecting_router.clone())
        };
        let (tls, cancel) = (listener.tls_acceptor.clone(), cancel.clone());
        tasks.spawn(async move {
            let _permit = permit;
            // An error ends the connection, so the client sees it.
            let _ = handle_connection(stream, tls, service, limits, &cancel).await;
        });
    }
    tasks.close();
    tasks.wait().await;
}

/// Builds the router for connections over the limit: it answers every request with 429 and closes
/// the connection.
fn build_rejecting_router(limit: usize) -> Router {
    let reject = move || async move {
        Problem::too_many_requests(limit, "connections are open (http.max_connections)")
            .into_response()
    };
    let close = |mut response: Response| async {
        response.headers_mut().insert(header::CONNECTION, HeaderValue::from_static("close"));
        response
    };
    Router::new().fallback(reject).layer(middleware::map_response(close))
}

async fn handle_connection(
    stream: TcpStream,
    tls: Option<TlsAcceptor>,
    service: Router,
    limits: ConnectionLimits,
    cancel: &CancellationToken,
) -> Result<(), Box<dyn std::error::Error + Send + Sync>> {
    // Responses are small: waiting to fill a packet would only delay them.
    stream.set_nodelay(true)?;
    let Some(tls) = tls else { return serve_connection(stream, service, limits, cancel).await };
    let stream = tokio::select! {
        stream = timeout(limits.request_wait.head_timeout, tls.accept(stream)) => stream??,
        () = cancel.cancelled() => return Ok(()),
    };
    serve_connection(stream, service, limits, cancel).await
}

async fn serve_connection(
    stream: impl AsyncRead + AsyncWrite + Unpin + Send + 'static,
    service: Router,
    limits: ConnectionLimits,
    cancel: &CancellationToken,
) -> Result<(), Box<dyn std::error::Error + Send + Sync>> {
    let mut stream = TimeoutStream::new(stream);
    // A client that does not read holds memory: until its response is sent, a picture counts
    // against fetch.budget_mib.
    stream.set_write_timeout(Some(limits.write_timeout));
    let service = TowerToHyperService::new(service);
    let (stream, service) = limit_request_waits(Box::pin(stream), service, limits.request_wait);
    let connection = http1::Builder::new()
        .timer(TokioTimer::new())
        // `limit_request_waits` has the limits in its place.
        .header_read_timeout(None)
        .max_buf_size(MAX_REQUEST_HEAD_BYTES)
        .max_header_size(MAX_REQUEST_HEAD_BYTES)
        .serve_connection(TokioIo::new(stream), service);
    let mut connection = pin!(connection);
    tokio::select! {
        ended = connection.as_mut() => ended?,
        () = cancel.cancelled() => {
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

    /// Requests a response of 1 MiB over a pipe that buffers 64 KiB. Returns the client's end, and
    /// whether the server ended the connection with an error.
    async fn request_large_body() -> (tokio::io::DuplexStream, tokio::task::JoinHandle<bool>) {
        let (mut client, server) = tokio::io::duplex(64 << 10);
        let service = Router::new().route("/", get(|| async { vec![0u8; 1 << 20] }));
        let limits = ConnectionLimits {
            max_connections: 1,
            request_wait: RequestWaitLimits {
                head_timeout: Duration::from_secs(60),
                idle_timeout: Duration::from_secs(60),
            },
            write_timeout: Duration::from_millis(300),
        };
        let cancel = CancellationToken::new();
        let ended_with_error = tokio::spawn(async move {
            serve_connection(server, service, limits, &cancel).await.is_err()
        });
        let request = b"GET / HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n";
        client.write_all(request).await.unwrap();
        (client, ended_with_error)
    }

    #[tokio::test]
    async fn clients_that_do_not_read_are_disconnected() {
        let (client, ended_with_error) = request_large_body().await;
        assert!(ended_with_error.await.unwrap(), "it ends although the client is connected");
        drop(client);
        // A client that reads slowly gets all of the response.
        let (mut client, ended_with_error) = request_large_body().await;
        let (mut part, mut read) = (vec![0; 64 << 10], 0);
        while let Ok(bytes @ 1..) = client.read(&mut part).await {
            read += bytes;
            sleep(Duration::from_millis(50)).await;
        }
        assert!(read > 1 << 20, "{read}");
        assert!(!ended_with_error.await.unwrap());
    }
}
