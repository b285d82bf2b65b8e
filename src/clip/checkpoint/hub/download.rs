//! Downloading one file: resumed where it broke off, compared with its hash before it gets its name.

use std::fs::{self, File, OpenOptions};
use std::io::Write as _;
use std::path::Path;
use std::time::Duration;

use futures::StreamExt as _;
use reqwest::{Response, StatusCode, header};
use tokio_util::sync::CancellationToken;

use super::cache::{RepoCache, create_parent};
use super::checksum;
use super::client::{FileLookup, FileMetadata, HubClient, describe};
use super::error::HubError;
use super::progress::DownloadProgress;
use crate::retry::{Backoff, Classify as _, Disposition, retry};

/// Attempts in a row that bring no further byte, before the download is given up. An attempt that
/// brings some starts the count again.
const MAX_FRUITLESS_ATTEMPTS: u32 = 5;
/// Whole downloads of a file whose bytes do not match its hash.
const MAX_WRONG_DOWNLOADS: u32 = 2;
/// Largest file that is downloaded: ten times the weights of the largest checkpoint in use.
const MAX_FILE_BYTES: u64 = 64 << 30;

/// What downloads share: the hub, the cache and how long silence may last.
pub struct Downloader<'a> {
    pub client: HubClient<'a>,
    pub cache: &'a RepoCache,
    pub stall_timeout: Duration,
    pub shows_progress: bool,
}

impl Downloader<'_> {
    /// Asks the hub for a file, and again while it fails for a reason that may pass.
    pub async fn look_up(&self, revision: &str, file: &str) -> Result<FileLookup, HubError> {
        let backoff = Backoff::with_max_attempts(MAX_FRUITLESS_ATTEMPTS);
        let look_up = || self.client.look_up(revision, file);
        retry(backoff, &CancellationToken::new(), |_, _| {}, look_up).await
    }

    /// Makes sure that the cache has the bytes of a file, and links them into the snapshot.
    pub async fn fetch(&self, file: &str, metadata: &FileMetadata) -> Result<(), HubError> {
        if metadata.size.is_some_and(|size| size > MAX_FILE_BYTES) {
            return Err(HubError::Refused(format!(
                "{file} has more than {} GiB, the largest file that is downloaded",
                MAX_FILE_BYTES >> 30
            )));
        }
        let blob = self.cache.blob(&metadata.etag);
        if !is_whole(&blob, metadata) {
            create_parent(&blob)?;
            let progress = DownloadProgress::new(file, metadata.size, self.shows_progress);
            let lock = self.cache.lock_blob(&metadata.etag, || progress.show_waiting()).await?;
            // Another process may have finished it while this one waited.
            if !is_whole(&blob, metadata) {
                self.download(file, metadata, &blob, &progress).await?;
            }
            drop(lock);
        }
        self.cache.link_blob(&metadata.commit, file, &metadata.etag)
    }

    /// Downloads a blob that is locked.
    async fn download(
        &self,
        file: &str,
        metadata: &FileMetadata,
        blob: &Path,
        progress: &DownloadProgress,
    ) -> Result<(), HubError> {
        let partial = blob.with_file_name(format!("{}.incomplete", metadata.etag));
        let failed = |e: &std::io::Error| HubError::cache_file(&partial, e);
        for _ in 0..MAX_WRONG_DOWNLOADS {
            self.download_with_retries(file, metadata, &partial, progress).await?;
            if checksum::matches_etag(&partial, &metadata.etag).map_err(|e| failed(&e))? {
                File::open(&partial)
                    .and_then(|file| file.sync_all())
                    .and_then(|()| fs::rename(&partial, blob))
                    .map_err(|e| failed(&e))?;
                return Ok(());
            }
            fs::remove_file(&partial).map_err(|e| failed(&e))?;
        }
        Err(HubError::WrongBytes(format!(
            "{file} was downloaded {MAX_WRONG_DOWNLOADS} times with other bytes than its hash {} says; a proxy or mirror changes it",
            metadata.etag
        )))
    }

    /// Attempts until `partial` has all bytes.
    async fn download_with_retries(
        &self,
        file: &str,
        metadata: &FileMetadata,
        partial: &Path,
        progress: &DownloadProgress,
    ) -> Result<(), HubError> {
        let backoff = Backoff::with_max_attempts(MAX_FRUITLESS_ATTEMPTS);
        let mut fruitless = 0;
        let mut most = 0;
        loop {
            let Err(error) = self.attempt(file, metadata, partial, progress).await else {
                return Ok(());
            };
            if error.disposition() != Disposition::Retry {
                return Err(error);
            }
            let length = fs::metadata(partial).map_or(0, |metadata| metadata.len());
            fruitless = if length > most { 0 } else { fruitless + 1 };
            most = most.max(length);
            if fruitless >= MAX_FRUITLESS_ATTEMPTS
                || !backoff.wait_after(&error, fruitless, &CancellationToken::new()).await
            {
                return Err(error);
            }
        }
    }

    /// Downloads what `partial` lacks, in one request.
    async fn attempt(
        &self,
        file: &str,
        metadata: &FileMetadata,
        partial: &Path,
        progress: &DownloadProgress,
    ) -> Result<(), HubError> {
        let failed = |e: &std::io::Error| HubError::cache_file(partial, e);
        let output = OpenOptions::new().create(true).append(true).open(partial);
        let mut output = output.map_err(|e| failed(&e))?;
        let mut have = output.metadata().map_err(|e| failed(&e))?.len();
        // What is continued must be compared with a hash at the end, and be less than the whole.
        if have > 0
            && (!checksum::is_hash(&metadata.etag) || metadata.size.is_none_or(|s| have > s))
        {
            output.set_len(0).map_err(|e| failed(&e))?;
            have = 0;
        }
        if have > 0 && metadata.size == Some(have) {
            return Ok(());
        }
        let response = self.client.get(&metadata.commit, file, have).await?;
        let continues = begins_at(&response, have, metadata.size);
        if have > 0 && !continues {
            // The server sends all of it again, or other bytes than were asked for.
            output.set_len(0).map_err(|e| failed(&e))?;
            have = 0;
        }
        if !continues && response.status() != StatusCode::OK {
            let status = response.status().as_u16();
            return Err(HubError::transient(format!(
                "{file}: the hub answers a request for a range with status {status} and other bytes"
            )));
        }
        check_encoding(file, &response)?;
        let rest = response.headers().get(header::CONTENT_LENGTH);
        let rest: Option<u64> = rest.and_then(|length| length.to_str().ok()?.parse().ok());
        let size = metadata.size.or_else(|| rest.map(|rest| have + rest));
        progress.start_at(have, size);
        let mut body = response.bytes_stream();
        loop {
            let chunk = tokio::time::timeout(self.stall_timeout, body.next()).await;
            let chunk = chunk.map_err(|_| {
                let limit = self.stall_timeout.as_secs();
                HubError::transient(format!(
                    "{file}: no byte within {limit} s, {have} bytes so far"
                ))
            })?;
            let Some(chunk) = chunk else { break };
            let chunk = chunk.map_err(|e| {
                HubError::transient(format!(
                    "{file}: broke off after {have} bytes: {}",
                    describe(e)
                ))
            })?;
            have += chunk.len() as u64;
            if have > size.unwrap_or(MAX_FILE_BYTES) {
                let announced = size.unwrap_or(MAX_FILE_BYTES);
                output.set_len(0).map_err(|e| failed(&e))?;
                return Err(HubError::WrongBytes(format!(
                    "{file}: the hub sends more than the {announced} bytes that it announced"
                )));
            }
            output.write_all(&chunk).map_err(|e| failed(&e))?;
            progress.advance_to(have);
        }
        match size {
            Some(size) if have < size => {
                Err(HubError::transient(format!("{file}: ended after {have} of {size} bytes")))
            }
            _ => Ok(()),
        }
    }
}

/// Whether a blob is in the cache with the size and the hash that the hub announces.
fn is_whole(blob: &Path, metadata: &FileMetadata) -> bool {
    let length = fs::metadata(blob).map(|metadata| metadata.len()).ok();
    length.is_some_and(|length| metadata.size.is_none_or(|size| size == length))
        && checksum::matches_etag(blob, &metadata.etag).unwrap_or(false)
}

/// Whether the body of a response begins at this byte, and is of a file of this size.
fn begins_at(response: &Response, first_byte: u64, size: Option<u64>) -> bool {
    if response.status() == StatusCode::OK {
        return first_byte == 0;
    }
    if response.status() != StatusCode::PARTIAL_CONTENT {
        return false;
    }
    let range = response.headers().get(header::CONTENT_RANGE).and_then(|range| range.to_str().ok());
    let parse = |range: &str| {
        let (bytes, total) = range.strip_prefix("bytes ")?.split_once('/')?;
        let (first, last) = bytes.split_once('-')?;
        Some((first.parse().ok()?, last.parse().ok()?, total.parse().ok()))
    };
    let Some((first, last, total)): Option<(u64, u64, Option<u64>)> = range.and_then(parse) else {
        return false;
    };
    first == first_byte
        && last >= first
        && (total.is_none() || size.is_none() || total == size)
        && size.is_none_or(|size| last < size)
}

/// Refuses a compressed body: it was not asked for, and its bytes are not those of the file.
fn check_encoding(file: &str, response: &Response) -> Result<(), HubError> {
    match response.headers().get(header::CONTENT_ENCODING).and_then(|e| e.to_str().ok()) {
        None | Some("identity") => Ok(()),
        Some(encoding) => Err(HubError::WrongBytes(format!(
            "{file}: the hub or a proxy compresses it ({encoding}), although identity was asked for"
        ))),
    }
}
