//! The previews that were requested last, within a number of bytes.

use std::collections::{BTreeMap, HashMap};

use super::encode::{Preview, PreviewSide};

/// What an entry takes in addition to the bytes of its preview: keys, the entity tag, two nodes.
const ENTRY_OVERHEAD_BYTES: usize = 512;

/// Which preview: the content of the picture, and the side.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct PreviewKey {
    /// SHA-256 of the original, in hexadecimal.
    pub content_hash: String,
    /// Length of the longer side.
    pub side: PreviewSide,
}

/// Keeps previews until they take more than a number of bytes, then drops those whose last request is
/// the longest ago.
#[derive(Debug)]
pub struct PreviewCache {
    max_bytes: usize,
    used_bytes: usize,
    /// Grows with each request, and so orders them.
    clock: u64,
    /// Previews with the time of their last request.
    previews: HashMap<PreviewKey, (Preview, u64)>,
    /// The same keys by the time of their last request.
    by_last_request: BTreeMap<u64, PreviewKey>,
}

impl PreviewCache {
    /// Creates an empty cache; one of 0 bytes keeps nothing.
    pub fn new(max_bytes: usize) -> Self {
        Self {
            max_bytes,
            used_bytes: 0,
            clock: 0,
            previews: HashMap::new(),
            by_last_request: BTreeMap::new(),
        }
    }

    /// Returns a preview if it is kept.
    pub fn get(&mut self, key: &PreviewKey) -> Option<Preview> {
        let (preview, last_request) = self.previews.get_mut(key)?;
        self.clock += 1;
        self.by_last_request.remove(last_request);
        self.by_last_request.insert(self.clock, key.clone());
        *last_request = self.clock;
        Some(preview.clone())
    }

    /// Keeps a preview. One that is larger than the whole cache is not kept.
    pub fn insert(&mut self, key: PreviewKey, preview: Preview) {
        let size = entry_bytes(&preview);
        if size > self.max_bytes {
            return;
        }
        if let Some((replaced, last_request)) = self.previews.remove(&key) {
            self.by_last_request.remove(&last_request);
            self.used_bytes -= entry_bytes(&replaced);
        }
        while self.used_bytes + size > self.max_bytes {
            let Some((_, oldest)) = self.by_last_request.pop_first() else { break };
            if let Some((dropped, _)) = self.previews.remove(&oldest) {
                self.used_bytes -= entry_bytes(&dropped);
            }
        }
        self.clock += 1;
        self.by_last_request.insert(self.clock, key.clone());
        self.previews.insert(key, (preview, self.clock));
        self.used_bytes += size;
    }
}

fn entry_bytes(preview: &Preview) -> usize {
    preview.jpeg.len() + ENTRY_OVERHEAD_BYTES
}

#[cfg(test)]
mod tests {
    use super::*;

    fn key(name: &str) -> PreviewKey {
        PreviewKey { content_hash: name.into(), side: PreviewSide::new(128).unwrap() }
    }

    fn preview(byte: u8, length: usize) -> Preview {
        Preview::from_jpeg(vec![byte; length])
    }

    #[test]
    fn the_previews_requested_last_are_kept_within_the_bytes() {
        let size = 1000 + ENTRY_OVERHEAD_BYTES;
        let mut cache = PreviewCache::new(3 * size);
        for (byte, name) in [(1, "a"), (2, "b"), (3, "c")] {
            cache.insert(key(name), preview(byte, 1000));
        }
        assert_eq!(cache.get(&key("a")).unwrap().jpeg[0], 1);
        cache.insert(key("d"), preview(4, 1000));
        assert!(cache.get(&key("b")).is_none(), "its request is the longest ago");
        for name in ["a", "c", "d"] {
            assert!(cache.get(&key(name)).is_some(), "{name}");
        }
        // The same key with other bytes is counted once.
        cache.insert(key("d"), preview(5, 10));
        assert_eq!(cache.get(&key("d")).unwrap().jpeg[0], 5);
        assert_eq!(cache.used_bytes, 2 * size + 10 + ENTRY_OVERHEAD_BYTES);
        // A large one replaces as many as necessary; one that is too large for the cache none.
        cache.insert(key("e"), preview(6, 2 * size));
        assert!(cache.get(&key("e")).is_some());
        cache.insert(key("f"), preview(7, 3 * size));
        assert!(cache.get(&key("f")).is_none() && cache.get(&key("e")).is_some());
        assert_eq!(cache.previews.len(), cache.by_last_request.len());
        assert!(cache.used_bytes <= 3 * size);
    }

    #[test]
    fn a_cache_of_no_bytes_keeps_nothing() {
        let mut cache = PreviewCache::new(0);
        cache.insert(key("a"), preview(1, 1));
        assert!(cache.get(&key("a")).is_none());
    }
}
