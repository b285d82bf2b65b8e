//! Reading the files of a checkpoint, and recognising what is there in the place of one.

use std::io::ErrorKind;
use std::path::Path;

use serde::de::DeserializeOwned;
use serde_json::{Map, Value};

use crate::clip::error::ClipError;

/// What Git LFS leaves in the place of a file that was not fetched begins with this.
const LFS_POINTER_START: &[u8] = b"version https://git-lfs.github.com/spec/";

/// Bytes in which a web page is recognised.
const PAGE_START_BYTES: usize = 256;

/// Reads a file. An error if it is something else than its name says: a Git LFS pointer, a web page.
pub fn read_file(file: &Path) -> Result<Vec<u8>, ClipError> {
    let bytes = std::fs::read(file).map_err(|source| match source.kind() {
        ErrorKind::NotFound => invalid(file, "is missing".into()),
        _ => ClipError::File { file: file.to_owned(), source },
    })?;
    match find_substitute(&bytes) {
        Some(reason) => Err(invalid(file, reason.into())),
        None => Ok(bytes),
    }
}

/// Returns what `bytes` are in the place of a checkpoint's file; `None` if they may be the file.
fn find_substitute(bytes: &[u8]) -> Option<&'static str> {
    if bytes.is_empty() {
        return Some("is empty; download it again");
    }
    if bytes.starts_with(LFS_POINTER_START) {
        return Some("is a Git LFS pointer, not the file itself; fetch it with git lfs pull");
    }
    let start = String::from_utf8_lossy(&bytes[..bytes.len().min(PAGE_START_BYTES)]).to_lowercase();
    let start = start.trim_start_matches('\u{feff}').trim_start();
    let page = ["<!doctype", "<html", "<head", "<?xml"].iter().any(|tag| start.starts_with(tag));
    page.then_some(
        "is a web page, not the file itself: a server answered with a page of its own; download it again",
    )
}

/// Returns an error about the content of `file`.
pub fn invalid(file: &Path, reason: String) -> ClipError {
    ClipError::InvalidCheckpoint { file: file.to_owned(), reason }
}

/// Reads a file that has one JSON object; returns it and its bytes.
pub fn read_object(file: &Path) -> Result<(Map<String, Value>, Vec<u8>), ClipError> {
    let bytes = read_file(file)?;
    let object =
        serde_json::from_slice(&bytes).map_err(|error| invalid(file, error.to_string()))?;
    Ok((object, bytes))
}

/// Converts a part of a JSON file. The error begins with the path of the key that does not fit.
pub fn convert<T: DeserializeOwned>(path: &str, value: Value) -> Result<T, String> {
    serde_path_to_error::deserialize(value).map_err(|error| {
        let (inner, reason) = (error.path().to_string(), error.inner());
        match (path.is_empty(), inner.as_str()) {
            (true, _) => format!("{inner}: {reason}"),
            (false, ".") => format!("{path}: {reason}"),
            (false, _) => format!("{path}.{inner}: {reason}"),
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_in_the_place_of_a_file_is_named() {
        for (bytes, word) in [
            (&b""[..], "empty"),
            (b"version https://git-lfs.github.com/spec/v1\noid sha256:ab\nsize 6\n", "Git LFS"),
            (b"\xef\xbb\xbf\n <!DOCTYPE html><title>404</title>", "web page"),
            (b"<HTML>", "web page"),
            (b"<?xml version='1.0'?><Error><Code>AccessDenied</Code></Error>", "web page"),
        ] {
            assert!(find_substitute(bytes).unwrap().contains(word), "{bytes:?}");
        }
        for bytes in [&b"{\"a\": \"<html>\"}"[..], b"#version: 0.2\n", b"\x08\0\0\0\0\0\0\0{}"] {
            assert_eq!(find_substitute(bytes), None, "{bytes:?}");
        }
    }
}
