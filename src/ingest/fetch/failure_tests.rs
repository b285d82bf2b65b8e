//! Real failures of connections: each has words and a remedy of its own.

use std::net::SocketAddr;
use std::sync::Arc;

use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, IsCa, KeyPair, date_time_ymd};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};
use tokio_rustls::TlsAcceptor;
use tokio_rustls::rustls::ServerConfig;
use tokio_rustls::rustls::pki_types::PrivateKeyDer;

use crate::diagnosis::describe;

/// How a server treats each connection.
#[derive(Clone)]
enum Behaviour {
    /// TLS with this certificate.
    Tls(TlsAcceptor),
    /// HTTP without TLS.
    PlainHttp,
    /// Closes the connection after the request.
    Close,
    /// Never answers.
    Silent,
}

async fn start(behaviour: Behaviour) -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn(async move {
        loop {
            let (connection, _) = listener.accept().await.unwrap();
            tokio::spawn(serve(connection, behaviour.clone()));
        }
    });
    address
}

async fn serve(mut connection: TcpStream, behaviour: Behaviour) {
    let mut request = [0; 16 << 10];
    match behaviour {
        Behaviour::Tls(acceptor) => drop(acceptor.accept(connection).await),
        Behaviour::PlainHttp => {
            let _ = connection.read(&mut request).await;
            let answer = b"HTTP/1.1 400 Bad Request\r\ncontent-length: 0\r\n\r\n";
            let _ = connection.write_all(answer).await;
        }
        Behaviour::Close => drop(connection.read(&mut request).await),
        Behaviour::Silent => std::future::pending().await,
    }
}

/// The test's own authority.
fn authority() -> CertifiedIssuer<'static, KeyPair> {
    let mut parameters = CertificateParams::new(Vec::new()).unwrap();
    parameters.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    CertifiedIssuer::self_signed(parameters, KeyPair::generate().unwrap()).unwrap()
}

/// TLS with a certificate for `name` that is valid until the given year.
fn tls(issuer: &CertifiedIssuer<'static, KeyPair>, name: &str, last_year: i32) -> Behaviour {
    let key = KeyPair::generate().unwrap();
    let mut parameters = CertificateParams::new(vec![name.to_owned()]).unwrap();
    parameters.not_before = date_time_ymd(2020, 1, 1);
    parameters.not_after = date_time_ymd(last_year, 1, 1);
    let certificate = parameters.signed_by(&key, issuer).unwrap();
    let private_key = PrivateKeyDer::try_from(key.serialize_der()).unwrap();
    let provider = Arc::new(tokio_rustls::rustls::crypto::aws_lc_rs::default_provider());
    let config = ServerConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_no_client_auth()
        .with_single_cert(vec![certificate.der().clone()], private_key)
        .unwrap();
    Behaviour::Tls(TlsAcceptor::from(Arc::new(config)))
}

#[tokio::test]
async fn each_failure_of_a_connection_has_words_and_a_remedy_of_its_own() {
    let issuer = authority();
    let root = reqwest::Certificate::from_pem(issuer.pem().as_bytes()).unwrap();
    let builder = || reqwest::Client::builder().no_proxy();
    let stranger = builder().build().unwrap();
    let trusting = builder().tls_certs_only([root]).build().unwrap();
    let impatient = builder().timeout(std::time::Duration::from_millis(200)).build().unwrap();
    let valid = start(tls(&issuer, "localhost", 2100)).await.port();
    let expired = start(tls(&issuer, "localhost", 2021)).await.port();
    let of_another = start(tls(&issuer, "other.example", 2100)).await.port();
    let plain = start(Behaviour::PlainHttp).await.port();
    let closing = start(Behaviour::Close).await.port();
    let silent = start(Behaviour::Silent).await.port();
    let refused = TcpListener::bind("127.0.0.1:0").await.unwrap().local_addr().unwrap().port();
    let mut seen = Vec::new();
    for (client, url, cause, remedy) in [
        (&stranger, format!("https://localhost:{valid}/"), "UnknownIssuer", "SSL_CERT_FILE"),
        (&trusting, format!("https://localhost:{expired}/"), "expired", "renew it"),
        (
            &trusting,
            format!("https://localhost:{of_another}/"),
            "not valid for name",
            "of another host",
        ),
        (&trusting, format!("https://localhost:{plain}/"), "corrupt message", "use http://"),
        (&trusting, format!("http://localhost:{valid}/"), "HTTP", "use https://"),
        (
            &trusting,
            format!("http://127.0.0.1:{refused}/"),
            "Connection refused",
            "nothing listens",
        ),
        (&trusting, "http://no-such-host.invalid/".into(), "dns error", "name is not known"),
        (&impatient, format!("http://127.0.0.1:{silent}/"), "timed out", "no answer in time"),
        (
            &trusting,
            format!("http://127.0.0.1:{closing}/"),
            "connection closed",
            "before it answered",
        ),
    ] {
        let error = client.get(&url).send().await.unwrap_err().without_url();
        let text = describe(&error);
        assert!(text.contains(cause) && text.contains(remedy), "{url}: {text}");
        assert!(!text.contains('\n'), "{text}");
        for part in text.split(": ") {
            assert_eq!(text.matches(part).count(), 1, "{part:?} is repeated: {text}");
        }
        seen.push(text.rsplit("; ").next().unwrap().to_owned());
    }
    let count = seen.len();
    seen.sort();
    seen.dedup();
    assert_eq!(seen.len(), count, "every failure has a remedy of its own: {seen:#?}");
}
