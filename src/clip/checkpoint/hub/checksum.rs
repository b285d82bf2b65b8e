//! Whether a file has the bytes that the hub announced.

use std::fs::File;
use std::io::{self, Read};
use std::path::Path;

use aws_lc_rs::digest::{Context, SHA1_FOR_LEGACY_USE_ONLY, SHA256};

use crate::record::to_hex;

/// Bytes that are read and hashed at a time.
const CHUNK_BYTES: usize = 1 << 20;

/// Whether an etag is a hash of the bytes: the SHA-256 of a large file, or git's id of a small one.
pub fn is_hash(etag: &str) -> bool {
    matches!(etag.len(), 40 | 64) && etag.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'))
}

/// Compares the bytes of `file` with its etag. Returns whether they agree; an etag that is no hash
/// says nothing of the bytes, and agrees with all.
///
/// An etag of 40 digits is git's id of the bytes, or, at mirrors that shorten it, the beginning of
/// their SHA-256.
pub fn matches_etag(file: &Path, etag: &str) -> io::Result<bool> {
    if !is_hash(etag) {
        return Ok(true);
    }
    let mut file = File::open(file)?;
    let mut sha256 = Context::new(&SHA256);
    let mut git = Context::new(&SHA1_FOR_LEGACY_USE_ONLY);
    git.update(format!("blob {}\0", file.metadata()?.len()).as_bytes());
    let mut chunk = vec![0; CHUNK_BYTES];
    loop {
        let count = file.read(&mut chunk)?;
        if count == 0 {
            break;
        }
        sha256.update(&chunk[..count]);
        if etag.len() == 40 {
            git.update(&chunk[..count]);
        }
    }
    Ok(to_hex(sha256.finish().as_ref()).starts_with(etag)
        || (etag.len() == 40 && to_hex(git.finish().as_ref()) == etag))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hashes_of_the_hub_and_of_git_are_compared() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("f");
        std::fs::write(&file, "hello\n").unwrap();
        // `git hash-object` and `sha256sum` of the file.
        let git = "ce013625030ba8dba906f756967f9e9ca394464a";
        let sha256 = "5891b5b522d5df086d0ff0b110fbd9d21bb4fc7163af34d08286a2e846f6be03";
        for etag in [git, sha256, &sha256[..40], "\"opaque\"", "0123abcd"] {
            assert!(matches_etag(&file, etag).unwrap(), "{etag}");
        }
        std::fs::write(&file, "hellO\n").unwrap();
        for etag in [git, sha256, &sha256[..40]] {
            assert!(!matches_etag(&file, etag).unwrap(), "{etag}");
        }
        assert!(matches_etag(&folder.path().join("none"), git).is_err());
    }
}
