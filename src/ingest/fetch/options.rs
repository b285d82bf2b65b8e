//! Options of the section `fetch`.

use std::collections::BTreeMap;
use std::path::PathBuf;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use url::Url;

use crate::{store, validate};

/// How images are fetched.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct FetchOptions {
    /// Folders below which `file://` images may be read. Empty: `file://` is rejected.
    pub file_roots: Vec<PathBuf>,
    /// URL prefixes that may be fetched although their host has a loopback, private or link-local
    /// address, for example `http://images.internal:8080/`. Each must end with a slash.
    pub allowed_private_url_prefixes: Vec<String>,
    /// Maximum size of an image in bytes, as downloaded.
    pub max_bytes: u64,
    /// Maximum memory for the downloaded bytes of all images together, in MiB.
    pub budget_mib: u32,
    /// How long connecting, the head of the response, or a pause within the body may take, in
    /// milliseconds.
    pub idle_timeout_ms: u64,
    /// How long the body of one image may take, in milliseconds. Does not count waiting for a share of
    /// `budget_mib`.
    pub body_timeout_ms: u64,
    /// Maximum number of redirects followed for one image.
    pub max_redirects: u32,
    /// Maximum number of attempts when a fetch fails with a transient error, with growing pauses between
    /// them: 8 attempts wait 6 s on average, 13 s at most. After a host or bucket has failed in all
    /// attempts, it gets one attempt per image until it answers again.
    pub max_attempts: u32,
    /// Maximum number of concurrent requests to one http host.
    pub max_requests_per_host: usize,
    /// URL prefixes below which the answer "forbidden" (403) means that there is no such image, for example
    /// `s3://shop/`: a store answers so if the role may read objects but not list the bucket. Each must end
    /// with a slash. Elsewhere a forbidden image is dead-lettered.
    pub missing_if_forbidden: Vec<String>,
    /// Options of image buckets, like those of the table's store, for example `aws_region`.
    pub store_options: BTreeMap<String, String>,
}

impl Default for FetchOptions {
    fn default() -> Self {
        Self {
            file_roots: Vec::new(),
            allowed_private_url_prefixes: Vec::new(),
            max_bytes: 32 << 20,
            budget_mib: 256,
            idle_timeout_ms: 10_000,
            body_timeout_ms: 60_000,
            max_redirects: 5,
            max_attempts: 8,
            max_requests_per_host: 32,
            missing_if_forbidden: Vec::new(),
            store_options: BTreeMap::new(),
        }
    }
}

impl FetchOptions {
    /// Returns one line per invalid option.
    pub fn validate(&self) -> Vec<String> {
        let mut problems = Vec::new();
        let p = &mut problems;
        validate::check_range(p, "max_bytes", self.max_bytes, 1024, 2 << 30);
        validate::check_range(p, "budget_mib", self.budget_mib.into(), 1, 1 << 20);
        validate::check_range(p, "idle_timeout_ms", self.idle_timeout_ms, 10, 600_000);
        validate::check_range(p, "body_timeout_ms", self.body_timeout_ms, 10, 3_600_000);
        validate::check_range(p, "max_redirects", self.max_redirects.into(), 0, 20);
        validate::check_range(p, "max_attempts", self.max_attempts.into(), 1, 20);
        validate::check_range(
            p,
            "max_requests_per_host",
            self.max_requests_per_host as u64,
            1,
            1000,
        );
        if u64::from(self.budget_mib) << 20 < self.max_bytes {
            problems.push(format!(
                "budget_mib: {} MiB is less than one image of max_bytes ({} bytes)",
                self.budget_mib, self.max_bytes
            ));
        }
        problems.extend(store::validate_options(&self.store_options));
        for root in &self.file_roots {
            if !root.is_dir() {
                problems.push(format!(
                    "file_roots: {} is not a folder; create it or remove it",
                    root.display()
                ));
            }
        }
        for prefix in &self.allowed_private_url_prefixes {
            if !prefix.starts_with("http") || !prefix.ends_with('/') || Url::parse(prefix).is_err()
            {
                problems.push(format!(
                    "allowed_private_url_prefixes: {prefix:?} is not a URL prefix such as http://images.internal:8080/"
                ));
            }
        }
        for prefix in &self.missing_if_forbidden {
            if !prefix.ends_with('/') || Url::parse(prefix).is_err() {
                problems.push(format!(
                    "missing_if_forbidden: {prefix:?} is not a URL prefix such as s3://shop/"
                ));
            }
        }
        problems
    }
}
