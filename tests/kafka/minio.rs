//! A real S3 server on loopback: MinIO, which `tests/run` builds.

use std::collections::BTreeMap;
use std::net::TcpListener;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};

const BUCKET: &str = "bsap";
/// Credentials of a server that ends with the test.
const ACCESS_KEY: &str = "bsap";
const SECRET_KEY: &str = "bsap-on-loopback";

/// A server with one bucket. It keeps its port and its objects across restarts.
pub struct Minio {
    folder: tempfile::TempDir,
    program: PathBuf,
    port: u16,
    server: Option<Child>,
}

impl Minio {
    /// Starts a server; `None` if `BSAP_MINIO` is not set.
    pub fn start() -> Option<Self> {
        let program = std::env::var_os("BSAP_MINIO")?.into();
        let free = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = free.local_addr().unwrap().port();
        drop(free);
        let folder = tempfile::tempdir().unwrap();
        let mut minio = Self { folder, program, port, server: None };
        minio.launch();
        minio.send_signed_request(&["-X", "PUT"]);
        Some(minio)
    }

    /// URL of the bucket.
    pub const BUCKET_URL: &str = "s3://bsap";

    /// Returns the environment variables that clients need.
    pub fn client_variables(&self) -> BTreeMap<String, String> {
        [
            ("AWS_ENDPOINT", format!("http://127.0.0.1:{}", self.port)),
            ("AWS_ALLOW_HTTP", "true".into()),
            ("AWS_REGION", "us-east-1".into()),
            ("AWS_ACCESS_KEY_ID", ACCESS_KEY.into()),
            ("AWS_SECRET_ACCESS_KEY", SECRET_KEY.into()),
        ]
        .map(|(name, value)| (name.to_owned(), value))
        .into()
    }

    /// Starts the server again after it was killed.
    pub fn launch(&mut self) {
        let server = Command::new(&self.program)
            .args(["server", "--quiet", "--address", &format!("127.0.0.1:{}", self.port)])
            .arg(self.folder.path())
            .envs([("MINIO_ROOT_USER", ACCESS_KEY), ("MINIO_ROOT_PASSWORD", SECRET_KEY)])
            .env("MINIO_BROWSER", "off")
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn();
        self.server = Some(server.expect("MinIO starts"));
        let ready = format!("http://127.0.0.1:{}/minio/health/ready", self.port);
        curl_with_retries(&[&ready]);
    }

    /// Kills the server, as a failure of the machine would.
    pub fn kill(&mut self) {
        let mut server = self.server.take().expect("MinIO runs");
        server.kill().unwrap();
        server.wait().unwrap();
    }

    /// Sends a signed request for the bucket.
    fn send_signed_request(&self, arguments: &[&str]) {
        let user = format!("{ACCESS_KEY}:{SECRET_KEY}");
        let bucket = format!("http://127.0.0.1:{}/{BUCKET}", self.port);
        let signed = ["--aws-sigv4", "aws:amz:us-east-1:s3", "--user", &user, &bucket];
        curl_with_retries(&[arguments, &signed].concat());
    }
}

/// Runs curl until the server answers with success, for at most half a minute.
fn curl_with_retries(arguments: &[&str]) {
    let options = ["-sf", "--retry", "60", "--retry-delay", "1", "--retry-max-time", "30"];
    let command =
        Command::new("curl").args(options).arg("--retry-all-errors").args(arguments).output();
    let output = command.expect("curl starts");
    assert!(output.status.success(), "MinIO does not answer: {arguments:?}");
}

impl Drop for Minio {
    fn drop(&mut self) {
        if let Some(mut server) = self.server.take() {
            let _ = server.kill();
            let _ = server.wait();
        }
    }
}
