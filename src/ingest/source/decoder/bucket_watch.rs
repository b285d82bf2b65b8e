//! Notices that the objects of several buckets share image ids.

use std::collections::BTreeSet;
use std::sync::{Arc, Mutex, PoisonError};

use tracing::error;

use crate::telemetry::event;

/// Buckets that are remembered; others are not reported.
const MAX_BUCKETS: usize = 1_000;

/// The buckets whose notifications a worker has decoded. Clones share them.
#[derive(Debug, Clone, Default)]
pub struct BucketWatch {
    seen: Arc<Mutex<SeenBuckets>>,
}

#[derive(Debug, Default)]
struct SeenBuckets {
    first: Option<String>,
    others: BTreeSet<String>,
}

impl BucketWatch {
    /// Reports `bucket` once if it is not the first one and `template` makes no difference between buckets.
    /// Returns whether it was reported.
    pub(super) fn check(&self, bucket: &str, template: &str) -> bool {
        if template.contains("{bucket}") {
            return false;
        }
        let mut seen = self.seen.lock().unwrap_or_else(PoisonError::into_inner);
        let SeenBuckets { first, others } = &mut *seen;
        let first = first.get_or_insert_with(|| bucket.to_owned());
        if first == bucket || others.contains(bucket) || others.len() >= MAX_BUCKETS {
            return false;
        }
        others.insert(bucket.to_owned());
        error!(
            event = event::BUCKETS_SHARE_IDS,
            first_bucket = first,
            bucket,
            "objects with one key in several buckets become one image"
        );
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_second_bucket_is_reported_once_unless_ids_contain_the_bucket() {
        let watch = BucketWatch::default();
        assert!(!watch.check("a", "{key}") && !watch.check("a", "{key}"));
        assert!(watch.check("b", "{key}") && !watch.clone().check("b", "{key}"));
        assert!(!BucketWatch::default().check("b", "{bucket}/{key}"));
        let watch = BucketWatch::default();
        assert!(!watch.check("a", "{bucket}/{key}") && !watch.check("b", "{bucket}/{key}"));
    }
}
