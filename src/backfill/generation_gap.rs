//! What a generation lacks of what the live one has, before it becomes live.

use std::cmp::Ordering;
use std::io;
use std::path::Path;

use chrono::{DateTime, Utc};
use serde::Serialize;

use super::ReindexError;
use crate::reconcile::read_current_rows;
use crate::store::Store;
use crate::table::{Generation, InventoryEntry};

/// How a generation covers the live images.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct GenerationGap {
    /// Live images.
    pub live: u64,
    /// Of them, those that it does not have at all.
    pub missing: u64,
    /// Of them, those of which it has an older version, or that it takes to be deleted.
    pub outdated: u64,
    /// Images that it has, and that were deleted in the live table.
    pub not_deleted: u64,
    /// Images that it alone has: deleted in the live table, which has forgotten it, or never there.
    pub extra: u64,
    /// Of the live table's newest rows, which are younger than others may be: they are counted in none
    /// of the four.
    pub too_recent: u64,
    /// An image that is counted in one of the four.
    pub example: Option<String>,
}

impl GenerationGap {
    /// Compares `other` with `live`, in the order of the ids, through files in `folder`. What one
    /// of them took in after `before` may still be on its way to the other.
    pub async fn compare(
        catalogue: &Store,
        live: &Generation,
        other: &Generation,
        folder: &Path,
        cutoff: DateTime<Utc>,
    ) -> Result<Self, ReindexError> {
        let live = read_current_rows(catalogue, live, folder).await?;
        let other = read_current_rows(catalogue, other, folder).await?;
        let compared =
            tokio::task::spawn_blocking(move || Self::compare_sorted(live, other, cutoff));
        let compared = compared.await.map_err(|panic| ReindexError::Panicked(panic.to_string()))?;
        compared.map_err(ReindexError::TempFolder)
    }

    fn compare_sorted(
        live: impl Iterator<Item = io::Result<InventoryEntry>>,
        other: impl Iterator<Item = io::Result<InventoryEntry>>,
        cutoff: DateTime<Utc>,
    ) -> io::Result<Self> {
        let mut gap = Self::default();
        for pair in merge_join_by_image(live, other) {
            match pair? {
                (Some(entry), theirs) => gap.count_live_entry(&entry, theirs.as_ref(), cutoff),
                (None, Some(theirs)) => gap.count_unknown_entry(&theirs, cutoff),
                (None, None) => {}
            }
        }
        Ok(gap)
    }

    fn count_live_entry(
        &mut self,
        entry: &InventoryEntry,
        theirs: Option<&InventoryEntry>,
        cutoff: DateTime<Utc>,
    ) {
        let deleted = entry.version.deleted;
        self.live += u64::from(!deleted);
        let lacks = match theirs {
            // Nothing is lost where a delete is not known of an image that is not there.
            None => !deleted,
            Some(theirs) => {
                version_key(theirs) < version_key(entry) && !(deleted && theirs.version.deleted)
            }
        };
        if !lacks {
            return;
        }
        if entry.version.embedded_at > cutoff {
            self.too_recent += 1;
            return;
        }
        match (theirs, deleted) {
            (None, _) => self.missing += 1,
            (Some(_), false) => self.outdated += 1,
            (Some(_), true) => self.not_deleted += 1,
        }
        self.example.get_or_insert_with(|| entry.image_id.clone());
    }

    /// An image of which the live table knows nothing, not even that it was deleted.
    fn count_unknown_entry(&mut self, theirs: &InventoryEntry, cutoff: DateTime<Utc>) {
        if !theirs.version.deleted && theirs.version.embedded_at <= cutoff {
            self.extra += 1;
            self.example.get_or_insert_with(|| theirs.image_id.clone());
        }
    }

    /// The counts in words, of the generation `id`.
    pub fn summary(&self, id: &str) -> String {
        format!(
            "generation {id} lacks {} of {} live images, has {} in an older version, {} that were deleted and {} that the live one does not know (deleted and forgotten, or never there), for example {}",
            self.missing,
            self.live,
            self.outdated,
            self.not_deleted,
            self.extra,
            self.example.as_deref().unwrap_or("none")
        )
    }

    /// Images of which it does not say what the live table says; those that it alone has are not among
    /// them.
    pub fn out_of_date_count(&self) -> u64 {
        self.missing + self.outdated + self.not_deleted
    }
}

/// The current rows of two tables, by image, from the one, the other, or both.
pub(crate) fn merge_join_by_image(
    one: impl Iterator<Item = io::Result<InventoryEntry>>,
    other: impl Iterator<Item = io::Result<InventoryEntry>>,
) -> impl Iterator<Item = io::Result<(Option<InventoryEntry>, Option<InventoryEntry>)>> {
    let (mut one, mut other) = (one.peekable(), other.peekable());
    std::iter::from_fn(move || {
        let order = match (one.peek(), other.peek()) {
            (None, None) => return None,
            (Some(Ok(one)), Some(Ok(other))) => one.image_id.cmp(&other.image_id),
            // An error comes out of the side on which it stands.
            (Some(Err(_)), _) | (Some(_), None) => Ordering::Less,
            (_, Some(_)) => Ordering::Greater,
        };
        let one = if order.is_le() { one.next() } else { None };
        let other = if order.is_ge() { other.next() } else { None };
        Some(one.transpose().and_then(|one| Ok((one, other.transpose()?))))
    })
}

/// Sequence, then delete: what of a version does not depend on when a row was made.
pub(crate) fn version_key(entry: &InventoryEntry) -> (&str, bool) {
    (entry.version.sequence.as_str(), entry.version.deleted)
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use crate::record::{Attributes, RowVersion, SequenceKey};

    /// A current row that was made `at` seconds after 1970.
    pub fn entry(id: &str, sequence: u64, deleted: bool, at: i64) -> InventoryEntry {
        InventoryEntry {
            image_id: id.into(),
            version: RowVersion {
                sequence: SequenceKey::from_number(sequence),
                deleted,
                embedded_at: DateTime::from_timestamp(at, 0).unwrap(),
            },
            event_time: None,
            uri: None,
            bytes: None,
            attributes: Attributes::new(),
        }
    }

    fn gap_between(live: Vec<InventoryEntry>, other: Vec<InventoryEntry>) -> GenerationGap {
        let before = DateTime::from_timestamp(100, 0).unwrap();
        GenerationGap::compare_sorted(live.into_iter().map(Ok), other.into_iter().map(Ok), before)
            .unwrap()
    }

    #[test]
    fn missing_outdated_and_undeleted_images_are_counted_and_recent_ones_are_not() {
        let live = vec![
            entry("a", 1, false, 1),
            entry("b", 2, false, 1),
            entry("c", 2, true, 1),
            entry("d", 2, true, 1),
            entry("e", 9, false, 101),
            entry("f", 1, false, 1),
        ];
        let other = vec![
            entry("a", 1, false, 500),
            entry("b", 1, false, 1),
            entry("c", 1, false, 1),
            entry("g", 1, false, 1),
        ];
        let found = gap_between(live, other);
        let wanted = GenerationGap {
            live: 4,
            missing: 1,
            outdated: 1,
            not_deleted: 1,
            extra: 1,
            too_recent: 1,
            example: Some("b".into()),
        };
        assert_eq!(found, wanted);
        assert_eq!(found.out_of_date_count(), 3);
    }

    #[test]
    fn an_image_that_the_live_table_has_forgotten_would_come_back() {
        let live = vec![entry("b", 1, false, 1)];
        let other = vec![
            entry("a", 1, false, 1),
            entry("b", 1, false, 1),
            entry("c", 1, true, 1),
            entry("d", 1, false, 100),
            entry("e", 1, false, 101),
        ];
        let found = gap_between(live, other);
        let example = Some("a".into());
        assert_eq!(found, GenerationGap { live: 1, extra: 2, example, ..GenerationGap::default() });
        let told = found.summary("ab12");
        assert!(
            told.contains("ab12") && told.contains("2 that the live one does not know"),
            "{told}"
        );
    }

    #[test]
    fn an_error_of_either_table_is_returned() {
        for live_fails in [true, false] {
            let fails = || Err(io::Error::other("torn"));
            let good = || Ok(entry("a", 1, false, 1));
            let (live, other) = if live_fails { (fails(), good()) } else { (good(), fails()) };
            let before = DateTime::from_timestamp(100, 0).unwrap();
            let found =
                GenerationGap::compare_sorted([live].into_iter(), [other].into_iter(), before);
            assert!(found.unwrap_err().to_string().contains("torn"));
        }
    }

    #[test]
    fn a_newer_version_and_a_delete_known_twice_are_no_gap() {
        let live = vec![entry("a", 1, false, 1), entry("b", 3, true, 1)];
        let other = vec![entry("a", 2, true, 1), entry("b", 2, true, 1)];
        assert_eq!(gap_between(live, other), GenerationGap { live: 1, ..GenerationGap::default() });
    }
}
