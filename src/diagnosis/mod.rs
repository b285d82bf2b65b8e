//! Describes errors of libraries: with all of their causes, each once, in one line, and what to do about them.
//!
//! A library's own text is often only the outermost layer ("error sending request"), or repeats its causes.
//! Every error type of this program that wraps such an error formats it with [`describe`].

pub mod redact;

use std::error::Error;
use std::io;

use rdkafka::ClientConfig;
use rdkafka::error::KafkaError;
use tokio_rustls::rustls::{self, AlertDescription, CertificateError};

use self::redact::{HIDDEN, redact};

/// Causes that are followed; real chains have fewer than ten.
const MAX_CAUSES: usize = 32;

/// Returns the text of an error and of its causes in one line, each once and without secrets, then what to do
/// about it if that is known.
pub fn describe(error: &(dyn Error + 'static)) -> String {
    let mut text = String::new();
    let mut remedy = None;
    let mut next = Some(error);
    for _ in 0..MAX_CAUSES {
        let Some(cause) = next else { break };
        let part = describe_alone(cause);
        if text.is_empty() {
            text = part;
        } else if !text.contains(&part) {
            text = format!("{text}: {part}");
        }
        // A deeper cause says more.
        remedy = known_remedy(cause).or(remedy);
        next = next_cause(cause);
    }
    match remedy {
        Some(remedy) if !text.contains(remedy) => format!("{text}; {remedy}"),
        _ => text,
    }
}

/// Returns the text of an error of this program, which may have several lines, and of its causes as
/// [`describe`] does.
pub fn describe_in_lines(error: &(dyn Error + 'static)) -> String {
    let own_text = error.to_string();
    let causes = describe(error);
    let own_lines = redact(without_backtrace(&own_text).trim_end());
    match causes.strip_prefix(&*redact(&to_one_line(&own_text))) {
        Some(causes) => format!("{own_lines}{causes}"),
        None => causes,
    }
}

/// Returns the cause of an error. What `io::Error` wraps is its cause, too, so that its type can be examined.
fn next_cause<'a>(error: &'a (dyn Error + 'static)) -> Option<&'a (dyn Error + 'static)> {
    if let Some(wrapped) = error.downcast_ref::<io::Error>().and_then(io::Error::get_ref) {
        return Some(wrapped);
    }
    error.source()
}

/// Returns the text of an error without its causes.
fn describe_alone(error: &(dyn Error + 'static)) -> String {
    let text = match error.downcast_ref::<KafkaError>() {
        Some(KafkaError::ClientConfig(_, problem, property, value)) => {
            describe_property_problem(problem, property, value)
        }
        _ => error.to_string(),
    };
    redact(&to_one_line(&text)).into_owned()
}

/// Joins the lines of a text; leaves out a backtrace.
fn to_one_line(text: &str) -> String {
    let lines = without_backtrace(text).lines().map(str::trim).filter(|line| !line.is_empty());
    lines.collect::<Vec<_>>().join(" ")
}

/// Returns what comes before the backtrace that some libraries append to their texts if `RUST_BACKTRACE` is set:
/// before the line of its first frame.
fn without_backtrace(text: &str) -> &str {
    let breaks = text.match_indices('\n');
    let mut frame =
        breaks.filter(|(at, _)| text[at + 1..].trim_start_matches(' ').starts_with("0: "));
    let message = frame.next().map_or(text, |(at, _)| &text[..at]);
    let message = message.trim_end();
    message.strip_suffix("stack backtrace:").unwrap_or(message).trim_end()
}

/// Returns what is wrong with a property of librdkafka; `None` if it is known and accepts the value. The text
/// does not contain the value, which may be a secret with a misspelt name.
pub fn check_kafka_property(property: &str, value: &str) -> Option<String> {
    match ClientConfig::new().set(property, value).create_native_config() {
        Ok(_) => None,
        Err(KafkaError::ClientConfig(_, problem, _, _)) => {
            Some(hide_value(&to_one_line(&problem), value))
        }
        Err(_) => Some("contains a null character".into()),
    }
}

fn describe_property_problem(problem: &str, property: &str, value: &str) -> String {
    format!("kafka.properties.\"{property}\": {}", hide_value(problem, value))
}

fn hide_value(text: &str, value: &str) -> String {
    if value.is_empty() { text.to_owned() } else { text.replace(value, HIDDEN) }
}

/// Returns what to do about an error of a library, if it is one of those that operators often meet.
fn known_remedy(error: &(dyn Error + 'static)) -> Option<&'static str> {
    if let Some(error) = error.downcast_ref::<rustls::Error>() {
        return tls_remedy(error);
    }
    if let Some(error) = error.downcast_ref::<hyper::Error>() {
        return http_remedy(error);
    }
    if let Some(error) = error.downcast_ref::<reqwest::Error>() {
        return error
            .is_timeout()
            .then_some("there was no answer in time: check that the host is up, and the network");
    }
    io_remedy(error.downcast_ref::<io::Error>()?)
}

fn tls_remedy(error: &rustls::Error) -> Option<&'static str> {
    use CertificateError as Certificate;
    Some(match error {
        rustls::Error::InvalidCertificate(problem) => match problem {
            Certificate::UnknownIssuer => {
                "no authority that this machine knows has signed the certificate: if the authority is your own, put it into the file that SSL_CERT_FILE names"
            }
            Certificate::Expired | Certificate::ExpiredContext { .. } => {
                "the certificate has expired: renew it, or correct the clock of this machine"
            }
            Certificate::NotValidYet | Certificate::NotValidYetContext { .. } => {
                "the certificate is not valid yet: correct the clock of this machine or of the one that made it"
            }
            Certificate::NotValidForName | Certificate::NotValidForNameContext { .. } => {
                "the certificate is of another host: use a name that it contains"
            }
            Certificate::Revoked => "the certificate is revoked: renew it",
            _ => "the certificate is not accepted: replace it",
        },
        rustls::Error::InvalidMessage(_) => {
            "the port does not speak TLS: use http:// instead of https://, or the port for TLS"
        }
        rustls::Error::AlertReceived(AlertDescription::CertificateRequired) => {
            "the server requires a certificate of its clients, which is not supported"
        }
        rustls::Error::PeerIncompatible(_)
        | rustls::Error::AlertReceived(
            AlertDescription::ProtocolVersion | AlertDescription::HandshakeFailure,
        ) => {
            "the server and this program have no version of TLS in common: it must offer TLS 1.2 or 1.3"
        }
        _ => return None,
    })
}

fn http_remedy(error: &hyper::Error) -> Option<&'static str> {
    if error.is_parse() {
        Some("the port does not speak HTTP: use https:// instead of http://, or the port for HTTP")
    } else if error.is_incomplete_message() {
        Some("the server closed the connection before it answered: look at its log")
    } else {
        None
    }
}

fn io_remedy(error: &io::Error) -> Option<&'static str> {
    use io::ErrorKind as Kind;
    match error.kind() {
        Kind::ConnectionRefused => {
            Some("nothing listens there: check host and port, and that the server runs")
        }
        Kind::TimedOut => {
            Some("there was no answer in time: check that the host is up, and the network")
        }
        Kind::HostUnreachable | Kind::NetworkUnreachable => {
            Some("no route leads there: check the address and the network of this machine")
        }
        Kind::ConnectionReset | Kind::ConnectionAborted => {
            Some("the connection was cut off: look at the server's log, and at proxies between")
        }
        Kind::StorageFull => Some("the disk is full: free some space"),
        Kind::ReadOnlyFilesystem => Some("the file system is read-only: choose another place"),
        _ if error.to_string().starts_with("failed to lookup address information") => Some(
            "the host's name is not known: check its spelling, and the name server of this machine",
        ),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug, thiserror::Error)]
    #[error("outer: {source}")]
    struct Outer {
        source: Inner,
    }

    #[derive(Debug, thiserror::Error)]
    #[error("inner")]
    struct Inner {
        #[source]
        cause: io::Error,
    }

    #[test]
    fn every_cause_is_named_once_and_the_deepest_remedy_is_given() {
        let cause =
            io::Error::other("error at http://me:s3cret@host/\nstack backtrace:\n   0: a\n");
        let error = Outer { source: Inner { cause } };
        assert_eq!(describe(&error), "outer: inner: error at http://(hidden)@host/");
        let refused = io::Error::from(io::ErrorKind::ConnectionRefused);
        let error = Outer { source: Inner { cause: refused } };
        let text = describe(&error);
        assert!(text.starts_with("outer: inner: connection refused; nothing listens"), "{text}");
        // An error that already describes its causes does not repeat them, nor the remedy.
        let wrapped = io::Error::other(text.clone());
        assert_eq!(describe(&wrapped), text);
    }

    #[test]
    fn lines_of_an_own_message_are_kept() {
        let error = io::Error::other("two problems:\n  a\n  b");
        assert_eq!(describe_in_lines(&error), "two problems:\n  a\n  b");
        assert_eq!(describe(&error), "two problems: a b");
    }

    #[test]
    fn values_of_kafka_properties_are_never_shown() {
        for (property, value) in [
            ("sasl.pasword", "s3cret"),
            ("security.protocol", "s3cret"),
            ("socket.timeout.ms", "s3cret"),
            ("group.id\0", "s3cret"),
        ] {
            let problem = check_kafka_property(property, value).unwrap();
            assert!(!problem.contains("s3cret"), "{problem}");
            let error = ClientConfig::new().set(property, value).create_native_config();
            let text = describe(&error.err().unwrap());
            assert!(!text.contains("s3cret"), "{text}");
        }
        assert_eq!(check_kafka_property("sasl.password", "s3cret"), None);
    }
}
