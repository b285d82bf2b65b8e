//! Hides secrets in texts that leave the program: logs, errors, answers, dead letters' headers, spans.
//!
//! Two kinds are hidden. Secrets in addresses (the user of `https://user:password@host/`, the signature of a
//! presigned query) are recognised by their place. Values of the configuration and of the environment that are
//! secret by their names are registered when they are read, and hidden wherever they occur.

use std::borrow::Cow;
use std::collections::BTreeSet;
use std::sync::{PoisonError, RwLock};

use percent_encoding::{NON_ALPHANUMERIC, percent_decode_str, utf8_percent_encode};

/// Replaces what is hidden.
pub const HIDDEN: &str = "(hidden)";
/// What follows the scheme of an address.
const SEPARATOR: &str = "://";
/// Shorter values are not registered: they would hide parts of ordinary words.
const MIN_SECRET_BYTES: usize = 6;
/// Values that can be registered: far more than a configuration has.
const MAX_SECRETS: usize = 1_000;

static SECRETS: RwLock<BTreeSet<String>> = RwLock::new(BTreeSet::new());

/// Whether a value of this name is secret: of an option, a variable, a header or a parameter of a query.
pub fn is_secret_name(name: &str) -> bool {
    const SECRET_WORDS: [&str; 12] = [
        "password",
        "passwd",
        "pwd",
        "secret",
        "token",
        "key",
        "credential",
        "signature",
        "jwt",
        "authorization",
        "oauthbearer.config",
        "jaas.config",
    ];
    /// A name with such an end is of a place or an id, not of a secret.
    const PLACES: [&str; 8] =
        ["location", "file", "path", "endpoint", "url", "uri", "_id", "application_credentials"];
    let name = name.to_ascii_lowercase();
    let is_place = PLACES.iter().any(|end| name.ends_with(end));
    !is_place
        && (SECRET_WORDS.iter().any(|word| name.contains(word))
            || matches!(&*name, "sig" | "sas" | "auth"))
}

/// Registers values that [`redact`] hides from now on, in every text.
pub fn register_secrets(values: impl IntoIterator<Item = String>) {
    let mut secrets = SECRETS.write().unwrap_or_else(PoisonError::into_inner);
    for value in values.into_iter().filter(|value| value.len() >= MIN_SECRET_BYTES) {
        if secrets.len() >= MAX_SECRETS {
            return;
        }
        // As a line of the JSON log has it, and as an address has it.
        let json = serde_json::to_string(&value).unwrap_or_default();
        let quoted = json.strip_prefix('"').and_then(|json| json.strip_suffix('"'));
        secrets.extend(quoted.map(ToOwned::to_owned));
        secrets.insert(utf8_percent_encode(&value, NON_ALPHANUMERIC).to_string());
        secrets.insert(value);
    }
}

/// Hides registered secrets, and those in addresses.
pub fn redact(text: &str) -> Cow<'_, str> {
    let secrets = SECRETS.read().unwrap_or_else(PoisonError::into_inner);
    let mut redacted = redact_addresses(text);
    // A longer secret may contain a shorter one.
    let mut found: Vec<&String> =
        secrets.iter().filter(|secret| redacted.contains(secret.as_str())).collect();
    found.sort_by_key(|secret| std::cmp::Reverse(secret.len()));
    for secret in found {
        redacted = redacted.replace(secret.as_str(), HIDDEN).into();
    }
    redacted
}

/// Hides user and password, and secret parameters, of the addresses in a text.
pub fn redact_addresses(text: &str) -> Cow<'_, str> {
    if !text.contains(SEPARATOR) {
        return text.into();
    }
    let (mut redacted, mut rest) = (String::with_capacity(text.len()), text);
    while let Some((before, after)) = rest.split_once(SEPARATOR) {
        redacted.push_str(before);
        redacted.push_str(SEPARATOR);
        let (address, following) = after.split_at(end_of_address(after));
        push_redacted_address(&mut redacted, scheme_at_end(before), address);
        rest = following;
    }
    redacted.push_str(rest);
    redacted.into()
}

/// Returns the scheme of the address whose separator follows `text`.
fn scheme_at_end(text: &str) -> &str {
    let start = text.rfind(|c: char| !c.is_ascii_alphanumeric() && !"+-.".contains(c));
    start.map_or(text, |at| text[at..].trim_start_matches(|c: char| !c.is_ascii_alphanumeric()))
}

/// Returns where the address ends with whose authority `text` begins.
fn end_of_address(text: &str) -> usize {
    // In a path or a list, another address may follow. One in the query ends with it.
    let next = text.find(SEPARATOR).map(|at| &text[..at]);
    match next.filter(|before| !before.contains(|c| ends_address(c) || matches!(c, '?' | '#'))) {
        Some(before) => before.len() - scheme_at_end(before).len(),
        None => text.find(ends_address).unwrap_or(text.len()),
    }
}

/// Whether an address in a text has ended before `c`.
fn ends_address(c: char) -> bool {
    c.is_whitespace() || c.is_control() || matches!(c, '"' | '\'' | '`' | '<' | '>' | '\\')
}

/// Appends an address without its scheme.
fn push_redacted_address(redacted: &mut String, scheme: &str, address: &str) {
    let head_end = address.find(['?', '#']).unwrap_or(address.len());
    let (head, tail) = address.split_at(head_end);
    let authority_end = head.find('/').unwrap_or(head.len());
    let mut user_end = head[..authority_end].rfind('@');
    // A password may contain a slash, which it should not: what follows the colon is no port then.
    let port = head[..authority_end].rsplit_once(':').map(|(_, port)| port);
    let is_port = |text: &str| text.ends_with(']') || text.bytes().all(|b| b.is_ascii_digit());
    if user_end.is_none() && port.is_some_and(|port| !is_port(port)) {
        user_end = head.rfind('@');
    }
    // abfss://container@account: the container is no user.
    let names_container =
        |user: &str| scheme.to_ascii_lowercase().starts_with("abfs") && !user.contains(':');
    match user_end {
        Some(at) if !names_container(&head[..at]) => {
            redacted.push_str(HIDDEN);
            redacted.push_str(&head[at..]);
        }
        _ => redacted.push_str(head),
    }
    let mut rest = tail;
    while !rest.is_empty() {
        let end = rest.find(['&', ';', '?', '#']).unwrap_or(rest.len());
        let (parameter, following) = rest.split_at(end);
        match parameter.split_once('=') {
            Some((name, value)) if !value.is_empty() && is_secret_parameter(name) => {
                redacted.push_str(name);
                redacted.push('=');
                redacted.push_str(HIDDEN);
            }
            // The value may be an address itself.
            _ => redacted.push_str(&redact_addresses(parameter)),
        }
        let mut characters = following.chars();
        redacted.extend(characters.next());
        rest = characters.as_str();
    }
}

fn is_secret_parameter(name: &str) -> bool {
    is_secret_name(&percent_decode_str(name).decode_utf8_lossy())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn secrets_in_addresses_are_hidden_and_the_rest_stays() {
        for (text, expected) in [
            ("https://me:s3cret@host:8443/a.jpg?x=1", "https://(hidden)@host:8443/a.jpg?x=1"),
            ("GET http://t0ken@host/a failed", "GET http://(hidden)@host/a failed"),
            ("http://me:s3/cret@host/a", "http://(hidden)@host/a"),
            (
                "https://h/a?X-Amz-Signature=s3cret&X-Amz-Date=1#f",
                "https://h/a?X-Amz-Signature=(hidden)&X-Amz-Date=1#f",
            ),
            ("https://h/a?X%2DGoog-Signature=s3cret", "https://h/a?X%2DGoog-Signature=(hidden)"),
            ("az://c/a?sv=1&sig=s3cret%3D", "az://c/a?sv=1&sig=(hidden)"),
            ("{\"uri\":\"https://h/?token=s3cret\"}", "{\"uri\":\"https://h/?token=(hidden)\"}"),
            ("https://h/cb#access_token=s3cret", "https://h/cb#access_token=(hidden)"),
            (
                "https://h/a?b=http://u:s3cret@i/&c=1 and ftp://x:s3cret@j/",
                "https://h/a?b=http://(hidden)@i/&c=1 and ftp://(hidden)@j/",
            ),
            ("https://proxy/http://u:s3cret@h/a", "https://proxy/http://(hidden)@h/a"),
            (
                "https://proxy/a/https://h/?sig=s3cret&x=1",
                "https://proxy/a/https://h/?sig=(hidden)&x=1",
            ),
            (
                "http://u:s3cret@h,https://u:s3cret@i/,http://j",
                "http://(hidden)@h,https://(hidden)@i/,http://j",
            ),
            ("abfss://container@account.host/a", "abfss://container@account.host/a"),
            ("s3://bucket/a@b:c.jpg", "s3://bucket/a@b:c.jpg"),
            ("http://[::1]:80/a@b", "http://[::1]:80/a@b"),
            ("http://[::1]/a@b", "http://[::1]/a@b"),
            ("a://", "a://"),
            ("no address: s3cret@host", "no address: s3cret@host"),
        ] {
            assert_eq!(redact_addresses(text), expected);
        }
    }

    #[test]
    fn registered_secrets_are_hidden_in_every_form() {
        let secret = "registered \"secret\" 4711";
        let quoted = "registered \"4712\"";
        register_secrets([secret, quoted, "short"].map(ToOwned::to_owned));
        for secret in [secret, quoted] {
            assert_eq!(redact(&format!("a {secret}, short")), "a (hidden), short");
            let json = serde_json::json!({ "error": secret }).to_string();
            assert_eq!(redact(&json), "{\"error\":\"(hidden)\"}");
            let query = secret.replace(' ', "%20").replace('"', "%22");
            assert_eq!(redact(&format!("?q={query}&k=1")), "?q=(hidden)&k=1");
        }
    }

    #[test]
    fn names_of_places_are_not_secret() {
        for secret in ["sasl.password", "AWS_SECRET_ACCESS_KEY", "azure_storage_sas_token", "sig"] {
            assert!(is_secret_name(secret), "{secret}");
        }
        for place in [
            "ssl.key.location",
            "aws_web_identity_token_file",
            "aws_access_key_id",
            "sasl.username",
        ] {
            assert!(!is_secret_name(place), "{place}");
        }
    }
}
