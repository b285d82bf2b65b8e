//! Errors of starting the HTTP server.

use std::net::SocketAddr;
use std::path::PathBuf;

/// Why the HTTP server cannot start.
#[derive(Debug, thiserror::Error)]
pub enum ServerStartError {
    /// The address cannot be listened on.
    #[error("http.listen: {address}: {source}; choose a free port, or stop what uses it")]
    Listen {
        /// Value of `http.listen`.
        address: SocketAddr,
        /// What the operating system reported.
        source: std::io::Error,
    },
    /// The certificate or its key cannot be used.
    #[error("{option}: {}: {reason}; it must be PEM, as `openssl` and ACME clients write it", .file.display())]
    Tls {
        /// The option that names the file.
        option: &'static str,
        /// Path of the file.
        file: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
}
