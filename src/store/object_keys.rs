//! Keys of objects, and the forms in which they are written: in addresses, and as paths of `object_store`.
//!
//! A key is any text for a bucket: `a//b.jpg`, `/a.jpg` and `a/../b.jpg` are three objects of their own. A URL
//! parser and `object_store` change some of these texts into the key of another object, so every conversion
//! here is checked by converting it back.

use object_store::path::Path;
use percent_encoding::{AsciiSet, CONTROLS, percent_decode_str, utf8_percent_encode};
use url::Url;

/// Begins the path of a key that `object_store` cannot express as a path; the key follows in hexadecimal digits.
const ESCAPED_KEY_MARKER: &str = "bsap-key-7f3a-";

/// What a key has that is no plain one ([`is_plain_key`]), for messages.
pub(super) const NOT_PLAIN: &str =
    "an empty segment, a control character, or a space or slash at its beginning or end";

/// Characters of a key that are percent-encoded in an address.
const ENCODED_IN_ADDRESS: &AsciiSet = &CONTROLS
    .add(b' ')
    .add(b'"')
    .add(b'#')
    .add(b'%')
    .add(b'<')
    .add(b'>')
    .add(b'?')
    .add(b'\\')
    .add(b'^')
    .add(b'`')
    .add(b'{')
    .add(b'}');

/// Returns the address of the object `key` below `folder`, or why it has none.
pub fn object_url(folder: &Url, key: &str) -> Result<Url, String> {
    if let Some(segment) = key.split('/').find(|segment| is_dot_segment(segment)) {
        return Err(format!(
            "its key has the segment {segment:?}, which every HTTP client removes from an address; rename the object"
        ));
    }
    if key.contains(char::REPLACEMENT_CHARACTER) {
        return Err("the listing does not show all characters of its key; rename the object".into());
    }
    let folder_text = folder.as_str().strip_suffix('/').unwrap_or(folder.as_str());
    let url =
        Url::parse(&format!("{folder_text}/{}", utf8_percent_encode(key, ENCODED_IN_ADDRESS)));
    let prefix = key_of_url(folder).unwrap_or_default();
    let prefix = prefix.strip_suffix('/').unwrap_or(&prefix);
    let expected = if prefix.is_empty() { key.to_owned() } else { format!("{prefix}/{key}") };
    url.ok()
        .filter(|url| key_of_url(url).as_ref() == Some(&expected))
        .ok_or_else(|| "its key cannot be written as an address; rename the object".into())
}

/// Returns the key of an object in its bucket, by its address: what follows the first slash after the bucket,
/// percent-decoded. `None` if that is not UTF-8.
pub fn key_of_url(url: &Url) -> Option<String> {
    let path = url.path();
    let encoded = path.strip_prefix('/').unwrap_or(path);
    percent_decode_str(encoded).decode_utf8().ok().map(Into::into)
}

/// Parses the address of an object in a bucket. Fails if a URL parser would change it into the address of
/// another object.
pub fn parse_object_url(text: &str) -> Result<Url, String> {
    if text.trim_matches(|c: char| c <= ' ') != text || text.contains(['\t', '\n', '\r']) {
        return Err("has a line break or tab, or a space at its beginning or end; percent-encode \
                    it if it belongs to the key"
            .into());
    }
    let path = text.split_once("://").map_or(text, |(_, rest)| rest);
    if let Some(c) = path.chars().find(|c| matches!(c, '?' | '#')) {
        return Err(format!(
            "has a {c:?}, behind which nothing belongs to the key; write %{:02X} if it is part of the key",
            u32::from(c)
        ));
    }
    if let Some(segment) = path.split('/').skip(1).find(|segment| {
        percent_decode_str(segment).decode_utf8().is_ok_and(|segment| is_dot_segment(&segment))
    }) {
        return Err(format!(
            "has the segment {segment:?}, which every HTTP client removes from an address; rename the object"
        ));
    }
    Url::parse(text).map_err(|error| format!("is not a URI: {error}"))
}

fn is_dot_segment(segment: &str) -> bool {
    matches!(segment, "." | "..")
}

/// Whether `object_store` reads and writes `key` as it is.
pub(super) fn is_plain_key(key: &str) -> bool {
    key.trim() == key
        && !key.contains(ESCAPED_KEY_MARKER)
        && Path::parse(key).is_ok_and(|path| path.as_ref() == key)
}

/// Returns the path under which `object_store` handles `key`. If the key is not a plain one, the path is an
/// escaped form that only a client with [`super::key_translation`] sends as the key that it means.
pub(super) fn key_to_path(key: &str) -> Path {
    match Path::parse(key) {
        Ok(path) if is_plain_key(key) => path,
        _ => Path::from(escape_key(key)),
    }
}

/// Returns the key that a path of [`key_to_path`] means.
pub(super) fn path_to_key(path: &Path) -> String {
    unescape_key(path.as_ref()).unwrap_or_else(|| path.to_string())
}

/// Returns `key` in letters, digits and hyphens.
pub(super) fn escape_key(key: &str) -> String {
    let digits: String = key.bytes().map(|byte| format!("{byte:02x}")).collect();
    format!("{ESCAPED_KEY_MARKER}{digits}")
}

/// Returns the key that `escaped` means; `None` if it is not an escaped key.
pub(super) fn unescape_key(escaped: &str) -> Option<String> {
    let digits = escaped.strip_prefix(ESCAPED_KEY_MARKER)?.as_bytes();
    let bytes = digits.chunks(2).map(|pair| {
        let pair = std::str::from_utf8(pair).ok().filter(|pair| pair.len() == 2)?;
        u8::from_str_radix(pair, 16).ok()
    });
    String::from_utf8(bytes.collect::<Option<_>>()?).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Keys that a listing may contain and that a URL parser or `object_store` would change.
    const ODD_KEYS: [&str; 9] = [
        "a//b.jpg",
        "/a.jpg",
        "a/",
        "a\u{1}b.jpg",
        "a\nb.jpg",
        " a.jpg",
        "a.jpg ",
        "//",
        "bsap-key-7f3a-61",
    ];

    #[test]
    fn every_key_has_a_path_and_an_address_of_its_own() {
        let folders = ["s3://bucket", "s3://bucket/", "s3://bucket/a%20b/c/"];
        let plain = ["a.jpg", "ü b/100%.png", "a?b#c.jpg", "a\\b.jpg", "{x}^`\"<>.jpg", "a%2Fb"];
        for key in ODD_KEYS.into_iter().chain(plain) {
            assert_eq!(path_to_key(&key_to_path(key)), key);
            for folder in folders {
                let url = object_url(&Url::parse(folder).unwrap(), key).unwrap();
                let prefix = if folder.contains("a%20b") { "a b/c/" } else { "" };
                assert_eq!(key_of_url(&url).unwrap(), format!("{prefix}{key}"), "{url}");
                assert_eq!(parse_object_url(url.as_str()).unwrap(), url);
            }
        }
        for key in ODD_KEYS {
            assert!(!is_plain_key(key), "{key:?}");
        }
        assert!(plain.into_iter().all(is_plain_key));
    }

    #[test]
    fn a_key_that_no_address_can_name_is_refused() {
        let folder = Url::parse("s3://bucket/a").unwrap();
        for key in ["../b.jpg", "a/./b.jpg", "..", "a\u{fffd}.jpg"] {
            assert!(object_url(&folder, key).is_err(), "{key:?}");
        }
        for address in [
            "s3://bucket/a/../b.jpg",
            "s3://bucket/a/%2E%2e/b.jpg",
            "s3://bucket/a.jpg?versionId=1",
            "s3://bucket/a#1.jpg",
            "s3://bucket/a.jpg ",
            "s3://bucket/a\nb.jpg",
        ] {
            assert!(parse_object_url(address).is_err(), "{address:?}");
        }
    }
}
