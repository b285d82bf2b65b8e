//! Compares a generation with the live one: which images it lacks, has in an older version, or has
//! in excess. Promotions and roll backs to another generation check this.

use std::cmp::Ordering;
use std::io;
use std::path::Path;

use chrono::{DateTime, Utc};
use serde::Serialize;

use super::error::BackfillError;
use crate::reconcile::read_current_rows;
use crate::store::Store;
use crate::table::{Generation, InventoryEntry};

/// How a generation differs from the live one, in numbers of images.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct GenerationGap {
    /// Images of the live generation.
    pub live: u64,
    /// Live images that the other generation does not have.
    pub missing: u64,
    /// Live images of which the other generation has an older version, or a delete.
    pub outdated: u64,
    /// Deleted images that the other generation still has.
    pub not_deleted: u64,
    /// Images that only the other generation knows: the live table never had them, or has removed
    /// their tombstones.
    pub extra: u64,
    /// Rows of the live table after the cutoff that the other generation lacks. They may still be
    /// on their way, so none of the four numbers above counts them.
    pub too_recent: u64,
    /// Id of an image that one of the four numbers counts.
    pub example: Option<String>,
}

impl GenerationGap {
    /// Compares `other` with `live`; their rows are sorted in temporary files in `folder`. Rows
    /// that were embedded after `cutoff` are not counted as a difference: the other generation may
    /// get them soon.
    pub async fn compare(
        catalogue: &Store,
        live: &Generation,
        other: &Generation,
        folder: &Path,
        cutoff: DateTime<Utc>,
    ) -> Result<Self, BackfillError> {
        let live = read_current_rows(catalogue, live, folder).await?;
        let other = read_current_rows(catalogue, other, folder).await?;
        let compared =
            tokio::task::spawn_blocking(move || Self::compare_sorted_rows(live, other, cutoff));
        let compared =
            compared.await.map_err(|panic| BackfillError::Panicked(panic.to_string()))?;
        compared.map_err(BackfillError::TempFolder)
    }

    fn compare_sorted_rows(
        live: impl Iterator<Item = io::Result<InventoryEntry>>,
        other: impl Iterator<Item = io::Result<InventoryEntry>>,
        cutoff: DateTime<Utc>,
    ) -> io::Result<Self> {
        let mut gap = Self::default();
        for pair in merge_join_by_image(live, other) {
            match pair? {
                (Some(live), other) => gap.count_live_entry(&live, other.as_ref(), cutoff),
                (None, Some(other)) => gap.count_extra_entry(&other, cutoff),
                (None, None) => {}
            }
        }
        Ok(gap)
    }

    /// Counts an image of which the live table has a row, perhaps a delete. `other` is the row of
    /// the other generation.
    fn count_live_entry(
        &mut self,
        live: &InventoryEntry,
        other: Option<&InventoryEntry>,
        cutoff: DateTime<Utc>,
    ) {
        let deleted = live.version.deleted;
        self.live += u64::from(!deleted);
        let differs = match other {
            // A missing delete of an image that the other generation does not have changes nothing.
            None => !deleted,
            Some(other) => {
                version_key(other) < version_key(live) && !(deleted && other.version.deleted)
            }
        };
        if !differs {
            return;
        }
        if live.version.embedded_at > cutoff {
            self.too_recent += 1;
            return;
        }
        match (other, deleted) {
            (None, _) => self.missing += 1,
            (Some(_), false) => self.outdated += 1,
            (Some(_), true) => self.not_deleted += 1,
        }
        self.example.get_or_insert_with(|| live.image_id.clone());
    }

    /// Counts an image of which the live table has no row, not even a delete.
    fn count_extra_entry(&mut self, other: &InventoryEntry, cutoff: DateTime<Utc>) {
        if !other.version.deleted && other.version.embedded_at <= cutoff {
            self.extra += 1;
            self.example.get_or_insert_with(|| other.image_id.clone());
        }
    }

    /// Returns a sentence with the numbers; `id` is the id of the other generation.
    pub fn summary(&self, id: &str) -> String {
        format!(
            "generation {id} lacks {} of {} live images, has {} in an older version, {} that were deleted and {} that the live one does not know (it never had them, or has removed their tombstones), for example {}",
            self.missing,
            self.live,
            self.outdated,
            self.not_deleted,
            self.extra,
            self.example.as_deref().unwrap_or("none")
        )
    }

    /// Returns the number of images for which the other generation does not have the live table's
    /// newest version.
    pub fn out_of_date_count(&self) -> u64 {
        self.missing + self.outdated + self.not_deleted
    }
}

/// Joins the current rows of two tables, both sorted by image: returns the row of the left table,
/// of the right table, or both, per image.
pub(crate) fn merge_join_by_image(
    left: impl Iterator<Item = io::Result<InventoryEntry>>,
    right: impl Iterator<Item = io::Result<InventoryEntry>>,
) -> impl Iterator<Item = io::Result<(Option<InventoryEntry>, Option<InventoryEntry>)>> {
    let (mut left, mut right) = (left.peekable(), right.peekable());
    std::iter::from_fn(move || {
        let order = match (left.peek(), right.peek()) {
            (None, None) => return None,
            (Some(Ok(left)), Some(Ok(right))) => left.image_id.cmp(&right.image_id),
            // Advance the side that has an error, so that it is returned.
            (Some(Err(_)), _) | (Some(_), None) => Ordering::Less,
            (_, Some(_)) => Ordering::Greater,
        };
        let left = if order.is_le() { left.next() } else { None };
        let right = if order.is_ge() { right.next() } else { None };
        Some(left.transpose().and_then(|left| Ok((left, right.transpose()?))))
    })
}

/// Returns what orders the versions of an image: sequence, then delete. Unlike the order within a
/// table it ignores when rows were embedded, which differs between generations.
pub(crate) fn version_key(entry: &InventoryEntry) -> (&str, bool) {
    (entry.version.sequence.as_str(), entry.version.deleted)
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use crate::record::{Attributes, RowVersion, SequenceKey};

    /// A current row that was embedded `embedded_at` seconds after 1970.
    pub fn entry(id: &str, sequence: u64, deleted: bool, embedded_at: i64) -> InventoryEntry {
        InventoryEntry {
            image_id: id.into(),
            version: RowVersion {
                sequence: SequenceKey::from_number(sequence),
                deleted,
                embedded_at: DateTime::from_timestamp(embedded_at, 0).unwrap(),
            },
            event_time: None,
            uri: None,
            bytes: None,
            attributes: Attributes::new(),
        }
    }

    fn gap_between(live: Vec<InventoryEntry>, other: Vec<InventoryEntry>) -> GenerationGap {
        let cutoff = DateTime::from_timestamp(100, 0).unwrap();
        GenerationGap::compare_sorted_rows(
            live.into_iter().map(Ok),
            other.into_iter().map(Ok),
            cutoff,
        )
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
        let gap = gap_between(live, other);
        let expected = GenerationGap {
            live: 4,
            missing: 1,
            outdated: 1,
            not_deleted: 1,
            extra: 1,
            too_recent: 1,
            example: Some("b".into()),
        };
        assert_eq!(gap, expected);
        assert_eq!(gap.out_of_date_count(), 3);
    }

    #[test]
    fn images_unknown_to_the_live_table_are_counted_as_extra() {
        let live = vec![entry("b", 1, false, 1)];
        let other = vec![
            entry("a", 1, false, 1),
            entry("b", 1, false, 1),
            entry("c", 1, true, 1),
            entry("d", 1, false, 100),
            entry("e", 1, false, 101),
        ];
        let gap = gap_between(live, other);
        let example = Some("a".into());
        assert_eq!(gap, GenerationGap { live: 1, extra: 2, example, ..GenerationGap::default() });
        let summary = gap.summary("ab12");
        assert!(
            summary.contains("ab12") && summary.contains("2 that the live one does not know"),
            "{summary}"
        );
    }

    #[test]
    fn an_error_of_either_table_is_returned() {
        for live_fails in [true, false] {
            let error = || Err(io::Error::other("torn"));
            let row = || Ok(entry("a", 1, false, 1));
            let (live, other) = if live_fails { (error(), row()) } else { (row(), error()) };
            let cutoff = DateTime::from_timestamp(100, 0).unwrap();
            let result =
                GenerationGap::compare_sorted_rows([live].into_iter(), [other].into_iter(), cutoff);
            assert!(result.unwrap_err().to_string().contains("torn"));
        }
    }

    #[test]
    fn newer_versions_and_deletes_in_both_generations_are_no_gap() {
        let live = vec![entry("a", 1, false, 1), entry("b", 3, true, 1)];
        let other = vec![entry("a", 2, true, 1), entry("b", 2, true, 1)];
        assert_eq!(gap_between(live, other), GenerationGap { live: 1, ..GenerationGap::default() });
    }
}
