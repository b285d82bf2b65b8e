//! The rules of the comparison: whether one key differs, and which event repairs it.

use chrono::{DateTime, SubsecRound, TimeDelta, Utc};
use serde::Serialize;

use super::images::{IdScheme, ListedImage, TableImage, TableImageStatus};
use super::report::ReconcileReport;
use crate::ingest::source::ImageEvent;
use crate::publish::{self, EventTemplate, attributes_to_json};
use crate::record::{AttributeTypes, ImageId, Operation, SequenceKey, VersionOrdering};

/// When images count as different, and how repair events are built.
#[derive(Debug, Clone)]
pub struct CompareRules {
    /// When the listing started.
    pub listing_started_at: DateTime<Utc>,
    /// Changes within this time before the start of the listing, or later, are left alone: their events
    /// may still be in transit.
    pub grace_period: TimeDelta,
    /// How much later than its stored event an object may have changed and still count as unchanged.
    pub time_tolerance: TimeDelta,
    /// How long the table remembers deletes; `None`: forever.
    pub tombstone_retention: Option<TimeDelta>,
    /// Whether the sequences of a catalogue that is ordered by `sequence` are times in microseconds.
    pub sequence_is_time: bool,
    /// How repair events are built.
    pub event_template: EventTemplate,
    /// Declared attributes.
    pub attribute_types: AttributeTypes,
}

/// How listing and table differ.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum DifferenceKind {
    /// Listed, but not stored.
    New,
    /// Stored, but changed since then.
    Changed,
    /// Stored, but not listed.
    Removed,
}

/// One difference, with the event that repairs it or the reason why none does.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Finding {
    /// How listing and table differ.
    pub difference: DifferenceKind,
    /// Id of the image.
    pub image_id: String,
    /// Address of the object if it is new, otherwise the stored address.
    pub uri: Option<String>,
    /// Why the image counts as different.
    pub reason: String,
    /// The event that repairs the difference.
    pub event: Option<ImageEvent>,
    /// Why no event repairs it; `None` if there is an event.
    pub unrepairable_reason: Option<String>,
}

/// Compares the listed image of one key with the images that the table knows under it. Adds to the
/// counts of `report`.
pub(super) fn compare_images_under_key(
    key: &str,
    listed: Option<ListedImage>,
    table_images: &[TableImage],
    id_scheme: &IdScheme,
    rules: &CompareRules,
    report: &mut ReconcileReport,
) -> Vec<Finding> {
    let present: Vec<&TableImage> =
        table_images.iter().filter(|image| image.status == TableImageStatus::Present).collect();
    report.stored += present.len() as u64;
    match listed {
        None => present
            .into_iter()
            .filter_map(|image| check_removed_image(image, rules, report))
            .collect(),
        Some(listed) => {
            report.listed += 1;
            if present.is_empty() {
                return check_new_image(key, &listed, table_images, id_scheme, rules, report)
                    .into_iter()
                    .collect();
            }
            let changed = present.into_iter().filter_map(|image| {
                let check = check_changed_image(&listed, image, rules);
                match &check {
                    ChangeCheckResult::Same => report.unchanged += 1,
                    ChangeCheckResult::Recent => report.too_recent += 1,
                    ChangeCheckResult::Changed(_) => report.changed += 1,
                }
                check.into_finding()
            });
            changed.collect()
        }
    }
}

/// Result of comparing a listed image with its stored version.
enum ChangeCheckResult {
    Same,
    Recent,
    Changed(Box<Finding>),
}

impl ChangeCheckResult {
    fn into_finding(self) -> Option<Finding> {
        match self {
            Self::Changed(finding) => Some(*finding),
            Self::Same | Self::Recent => None,
        }
    }
}

/// Checks a listed image that is not stored under its key.
fn check_new_image(
    key: &str,
    listed: &ListedImage,
    table_images: &[TableImage],
    id_scheme: &IdScheme,
    rules: &CompareRules,
    report: &mut ReconcileReport,
) -> Option<Finding> {
    let deleted = table_images.iter().find(|image| image.status == TableImageStatus::Deleted);
    if table_images.iter().any(|image| image.status == TableImageStatus::FetchedElsewhere) {
        report.id_conflicts += 1;
        return None;
    }
    let new_finding = |id: &str, uri: Option<&String>, repair: Result<ImageEvent, String>| {
        let reason = match deleted {
            Some(image) => {
                format!("exists again after it was deleted at {}", format_time(image.event_time))
            }
            None => "is listed, but not stored".into(),
        };
        Finding::new(DifferenceKind::New, id, uri, reason, repair)
    };
    let finding = match listed {
        ListedImage::Object { uri, modified_at, is_image, .. } => {
            if !is_image {
                report.ignored += 1;
                return None;
            }
            if rules.is_recent(*modified_at) {
                report.too_recent += 1;
                return None;
            }
            if deleted.is_some_and(|image| image.event_time >= modified_at.trunc_subsecs(6)) {
                report.deleted += 1;
                return None;
            }
            // Workers reject upserts that are older than deletes are remembered.
            let event_time = if rules.is_past_tombstone_retention(*modified_at) {
                rules.listing_started_at
            } else {
                *modified_at
            };
            let image_id = format!("{}{key}", rules.event_template.id_prefix);
            let uri = match check_announceable(&image_id, uri) {
                Ok(uri) => uri,
                Err(reason) => {
                    report.unaddressable += 1;
                    report.new += 1;
                    publish::log_skipped_object(&report.target, key, &reason);
                    return Some(new_finding(&image_id, None, Err(reason)));
                }
            };
            let repair = match &id_scheme.custom_id_example {
                // Under a different id the image would be stored twice, or come back although it was
                // deleted.
                Some((id, example_key)) => Err(format!(
                    "ids of this target are not --id-prefix and key: the id of {example_key} is {id:?}; \
                     give the prefix that matches them, or list events with --ids"
                )),
                None => rules.require_time_sequence(deleted, || {
                    rules.event_template.upsert_event(key, uri, event_time)
                }),
            };
            new_finding(&image_id, Some(uri), repair)
        }
        ListedImage::Id => {
            if deleted.is_some() {
                report.deleted += 1;
                return None;
            }
            let reason = "the list contains only its id; list events (JSON lines)";
            new_finding(key, None, Err(reason.into()))
        }
        ListedImage::Event(event, sequence) => {
            if event.event_time.is_some_and(|time| rules.is_recent(time)) {
                report.too_recent += 1;
                return None;
            }
            if deleted.is_some_and(|image| !rules.is_newer(event, sequence, image)) {
                report.deleted += 1;
                return None;
            }
            new_finding(key, event.uri.as_ref(), rules.require_acceptable_event(event))
        }
    };
    report.new += 1;
    Some(finding)
}

/// Returns the address of a listed object if an event can announce it under `image_id`; otherwise why not.
fn check_announceable<'a>(
    image_id: &str,
    uri: &'a Result<String, String>,
) -> Result<&'a String, String> {
    let uri = uri.as_ref().map_err(Clone::clone)?;
    ImageId::new(image_id).map_err(|error| error.to_string())?;
    Ok(uri)
}

/// Checks whether a stored image differs from the listed one.
fn check_changed_image(
    listed: &ListedImage,
    image: &TableImage,
    rules: &CompareRules,
) -> ChangeCheckResult {
    let (reason, repair) = match listed {
        ListedImage::Object { modified_at, size_bytes: bytes, .. } => {
            let modified_at = modified_at.trunc_subsecs(6);
            let other_size = image.size_bytes.filter(|stored| stored != bytes);
            let is_later = modified_at > image.event_time + rules.time_tolerance;
            if !is_later && other_size.is_none() {
                return ChangeCheckResult::Same;
            }
            if rules.is_recent(modified_at) || rules.is_recent(image.event_time) {
                return ChangeCheckResult::Recent;
            }
            let reason = match other_size {
                Some(stored) => format!("has {bytes} bytes, but {stored} bytes are stored"),
                None => format!(
                    "changed at {}, but the stored version is of {}",
                    format_time(modified_at),
                    format_time(image.event_time)
                ),
            };
            // An event dated at the last change would be superseded or rejected. The object already had
            // its content when the listing started, so that time is also a true one.
            let would_lose =
                modified_at <= image.event_time || rules.is_past_tombstone_retention(modified_at);
            let event_time = if would_lose { rules.listing_started_at } else { modified_at };
            let repair = rules.require_time_sequence(Some(image), || ImageEvent {
                attributes: attributes_to_json(&image.attributes, &rules.attribute_types),
                ..rules.event_template.upsert_event(
                    "",
                    image.uri.as_deref().unwrap_or_default(),
                    event_time,
                )
            });
            (reason, repair)
        }
        ListedImage::Id => return ChangeCheckResult::Same,
        ListedImage::Event(event, sequence) => {
            if !rules.is_newer(event, sequence, image) {
                return ChangeCheckResult::Same;
            }
            if event.event_time.is_some_and(|time| rules.is_recent(time)) {
                return ChangeCheckResult::Recent;
            }
            ("the list has a later version".into(), rules.require_acceptable_event(event))
        }
    };
    let repair = repair.map(|event| ImageEvent { image_id: image.image_id.clone(), ..event });
    let finding =
        Finding::new(DifferenceKind::Changed, &image.image_id, image.uri.as_ref(), reason, repair);
    ChangeCheckResult::Changed(Box::new(finding))
}

/// Checks a stored image that is not listed.
fn check_removed_image(
    image: &TableImage,
    rules: &CompareRules,
    report: &mut ReconcileReport,
) -> Option<Finding> {
    // Events may be dated long before they arrive: check when the image was stored, too.
    if rules.is_recent(image.event_time) || rules.is_recent(image.embedded_at) {
        report.too_recent += 1;
        return None;
    }
    report.removed += 1;
    let repair = match rules.event_template.ordering {
        VersionOrdering::Offset => Err(
            "the catalogue orders by offset: a delete that is sent now would also be newer than an \
             image that was added again in the meantime; delete it with `bsap publish --delete`"
                .into(),
        ),
        _ => rules.require_time_sequence(Some(image), || {
            let event =
                rules.event_template.event_without_content("", Operation::Delete, rules.listing_started_at);
            ImageEvent { image_id: image.image_id.clone(), ..event }
        }),
    };
    Some(Finding::new(
        DifferenceKind::Removed,
        &image.image_id,
        image.uri.as_ref(),
        "is stored, but not listed".into(),
        repair,
    ))
}

impl CompareRules {
    /// Whether the event of a change at `time` may still be in transit.
    fn is_recent(&self, time: DateTime<Utc>) -> bool {
        time > self.listing_started_at - self.grace_period
    }

    /// Whether a listed event is a later version than the stored one.
    fn is_newer(&self, event: &ImageEvent, sequence: &SequenceKey, stored: &TableImage) -> bool {
        match self.event_template.ordering {
            // A list does not contain offsets.
            VersionOrdering::Offset => {
                event.event_time.is_some_and(|time| time > stored.event_time)
            }
            _ => *sequence > stored.sequence,
        }
    }

    /// Whether workers would reject an upsert dated at `time`.
    fn is_past_tombstone_retention(&self, time: DateTime<Utc>) -> bool {
        self.tombstone_retention.is_some_and(|days| time < self.listing_started_at - days)
    }

    /// Returns `event`, whose version is a time, if the versions of the catalogue and of the `stored`
    /// image are times; otherwise why not.
    fn require_time_sequence(
        &self,
        stored: Option<&TableImage>,
        event: impl FnOnce() -> ImageEvent,
    ) -> Result<ImageEvent, String> {
        match self.event_template.ordering {
            VersionOrdering::EventTime | VersionOrdering::Offset => Ok(event()),
            VersionOrdering::Sequencer => Err(
                "the catalogue orders by sequencer, which only the bucket's own notifications contain"
                    .into(),
            ),
            VersionOrdering::Sequence if !self.sequence_is_time => Err(
                "the catalogue orders by sequence, which a listing does not contain; give \
                 --sequence-is-time if it is the time in microseconds, as `bsap publish` sets it"
                    .into(),
            ),
            VersionOrdering::Sequence => match stored.filter(|image| !image.has_time_sequence()) {
                Some(image) => {
                    Err(format!("its sequence {} is not its time", image.sequence.as_str()))
                }
                None => Ok(event()),
            },
        }
    }

    /// Returns a listed event unchanged; if workers would reject it, why.
    fn require_acceptable_event(&self, event: &ImageEvent) -> Result<ImageEvent, String> {
        match event.event_time {
            Some(time) if self.is_past_tombstone_retention(time) => Err(format!(
                "is dated {}, before the time for which deletes are remembered (maintenance.tombstone_retention_days); list a later version",
                format_time(time)
            )),
            _ => Ok(event.clone()),
        }
    }
}

impl Finding {
    fn new(
        difference: DifferenceKind,
        image_id: &str,
        uri: Option<&String>,
        reason: String,
        repair: Result<ImageEvent, String>,
    ) -> Self {
        let (event, unrepairable_reason) = match repair {
            Ok(event) => (Some(event), None),
            Err(reason) => (None, Some(reason)),
        };
        Self {
            difference,
            image_id: image_id.to_owned(),
            uri: uri.cloned(),
            reason,
            event,
            unrepairable_reason,
        }
    }
}

fn format_time(time: DateTime<Utc>) -> String {
    time.to_rfc3339_opts(chrono::SecondsFormat::AutoSi, true)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::record::AttributeType;

    fn time_at(seconds: i64) -> DateTime<Utc> {
        DateTime::from_timestamp(1_700_000_000 + seconds, 0).unwrap()
    }

    fn compare_rules(ordering: VersionOrdering) -> CompareRules {
        CompareRules {
            listing_started_at: time_at(10_000),
            grace_period: TimeDelta::seconds(100),
            time_tolerance: TimeDelta::zero(),
            tombstone_retention: None,
            sequence_is_time: false,
            event_template: EventTemplate {
                id_prefix: "shop/".into(),
                ordering,
                ..EventTemplate::default()
            },
            attribute_types: [("size".to_owned(), AttributeType::Integer)].into(),
        }
    }

    fn table_image(status: TableImageStatus, seconds: i64) -> TableImage {
        TableImage {
            image_id: "shop/a.jpg".into(),
            status,
            sequence: SequenceKey::from_time(time_at(seconds)).unwrap(),
            event_time: time_at(seconds),
            has_event_time: true,
            embedded_at: time_at(seconds),
            uri: Some("s3://b/a.jpg".into()),
            size_bytes: Some(7),
            attributes: [("size".to_owned(), "3".to_owned())].into(),
        }
    }

    #[expect(clippy::unnecessary_wraps, reason = "tests pass it as the optional listed image")]
    fn listed_object(seconds: i64, bytes: u64) -> Option<ListedImage> {
        let uri = "s3://b/a.jpg".to_owned();
        Some(ListedImage::Object {
            uri: Ok(uri),
            modified_at: time_at(seconds),
            size_bytes: bytes,
            is_image: true,
        })
    }

    fn compare_one(
        listed: Option<ListedImage>,
        table_images: &[TableImage],
        rules: &CompareRules,
    ) -> (Option<Finding>, ReconcileReport) {
        let mut report = ReconcileReport::default();
        let id_scheme = IdScheme::default();
        let mut findings =
            compare_images_under_key("a.jpg", listed, table_images, &id_scheme, rules, &mut report);
        assert!(findings.len() <= 1);
        (findings.pop(), report)
    }

    fn repair_event(
        listed: Option<ListedImage>,
        table_images: &[TableImage],
        rules: &CompareRules,
    ) -> ImageEvent {
        compare_one(listed, table_images, rules).0.unwrap().event.unwrap()
    }

    #[test]
    fn unchanged_images_are_not_findings() {
        let rules = compare_rules(VersionOrdering::EventTime);
        for modified in [0, 50] {
            let (finding, report) = compare_one(
                listed_object(modified, 7),
                &[table_image(TableImageStatus::Present, 50)],
                &rules,
            );
            assert_eq!((finding, report.unchanged), (None, 1));
        }
    }

    #[test]
    fn upserts_are_dated_at_the_last_change_and_deletes_at_the_start_of_the_listing() {
        let rules = compare_rules(VersionOrdering::EventTime);
        let new = repair_event(listed_object(5, 7), &[], &rules);
        assert_eq!((new.image_id.as_str(), new.event_time), ("shop/a.jpg", Some(time_at(5))));
        let changed = repair_event(
            listed_object(60, 7),
            &[table_image(TableImageStatus::Present, 50)],
            &rules,
        );
        assert_eq!(changed.event_time, Some(time_at(60)));
        assert_eq!(changed.attributes["size"], 3, "attributes are kept, in their type");
        let removed = repair_event(None, &[table_image(TableImageStatus::Present, 50)], &rules);
        assert_eq!(
            (removed.operation, removed.event_time),
            (Operation::Delete, Some(time_at(10_000)))
        );
    }

    #[test]
    fn an_object_of_other_size_gets_an_event_that_supersedes_the_stored_one() {
        let rules = compare_rules(VersionOrdering::EventTime);
        let changed = repair_event(
            listed_object(40, 8),
            &[table_image(TableImageStatus::Present, 50)],
            &rules,
        );
        assert_eq!(
            changed.event_time,
            Some(time_at(10_000)),
            "an event dated at its last change would be superseded"
        );
    }

    #[test]
    fn recent_changes_are_not_findings() {
        let rules = compare_rules(VersionOrdering::EventTime);
        for (listed, stored) in [
            (listed_object(9_950, 7), vec![]),
            (listed_object(9_950, 7), vec![table_image(TableImageStatus::Present, 50)]),
            (None, vec![table_image(TableImageStatus::Present, 9_950)]),
            // Dated long ago, but stored after the listing started.
            (
                None,
                vec![TableImage {
                    embedded_at: time_at(10_001),
                    ..table_image(TableImageStatus::Present, 50)
                }],
            ),
            // The event of the next version arrived while the old one was listed.
            (listed_object(40, 8), vec![table_image(TableImageStatus::Present, 9_950)]),
        ] {
            let (finding, report) = compare_one(listed, &stored, &rules);
            assert_eq!((finding, report.too_recent), (None, 1));
        }
    }

    #[test]
    fn a_deleted_image_is_new_only_if_its_object_changed_later() {
        let rules = compare_rules(VersionOrdering::EventTime);
        let (finding, report) = compare_one(
            listed_object(40, 7),
            &[table_image(TableImageStatus::Deleted, 50)],
            &rules,
        );
        assert_eq!((finding, report.deleted), (None, 1));
        assert_eq!(
            repair_event(
                listed_object(60, 7),
                &[table_image(TableImageStatus::Deleted, 50)],
                &rules
            )
            .event_time,
            Some(time_at(60))
        );
    }

    #[test]
    fn an_id_of_an_image_from_another_address_is_a_conflict() {
        let (finding, report) = compare_one(
            listed_object(60, 7),
            &[table_image(TableImageStatus::FetchedElsewhere, 50)],
            &compare_rules(VersionOrdering::EventTime),
        );
        assert_eq!((finding, report.id_conflicts), (None, 1));
    }

    #[test]
    fn new_objects_are_unrepairable_when_most_ids_are_custom() {
        let id_scheme = IdScheme { custom_id_example: Some(("SKU-1".into(), "b.jpg".into())) };
        let rules = compare_rules(VersionOrdering::EventTime);
        let finding = compare_images_under_key(
            "a.jpg",
            listed_object(5, 7),
            &[],
            &id_scheme,
            &rules,
            &mut ReconcileReport::default(),
        )
        .remove(0);
        assert_eq!((finding.difference, finding.event), (DifferenceKind::New, None));
        let reason = finding.unrepairable_reason.unwrap();
        assert!(reason.contains("SKU-1") && reason.contains("--id-prefix"), "{reason}");
    }

    #[test]
    fn with_offset_ordering_event_times_decide_whether_a_deleted_image_is_new() {
        let rules = compare_rules(VersionOrdering::Offset);
        let listed = |seconds| {
            let event = ImageEvent {
                uri: Some("s3://b/a.jpg".into()),
                ..rules.event_template.event_without_content(
                    "a",
                    Operation::Upsert,
                    time_at(seconds),
                )
            };
            Some(ListedImage::Event(Box::new(event), SequenceKey::from_number(0)))
        };
        let deleted = [table_image(TableImageStatus::Deleted, 50)];
        assert_eq!(repair_event(listed(60), &deleted, &rules).event_time, Some(time_at(60)));
        assert_eq!(compare_one(listed(40), &deleted, &rules).1.deleted, 1);
    }

    #[test]
    fn events_that_workers_would_reject_are_dated_at_the_start_of_the_listing() {
        let rules = CompareRules {
            tombstone_retention: Some(TimeDelta::seconds(1_000)),
            ..compare_rules(VersionOrdering::EventTime)
        };
        assert_eq!(
            repair_event(listed_object(5, 7), &[], &rules).event_time,
            Some(time_at(10_000))
        );
    }

    #[test]
    fn differences_without_a_known_version_are_unrepairable() {
        let unrepairable_reason = |ordering, listed, table_images: &[TableImage]| {
            compare_one(listed, table_images, &compare_rules(ordering))
                .0
                .unwrap()
                .unrepairable_reason
                .unwrap_or_default()
        };
        assert!(
            unrepairable_reason(VersionOrdering::Sequencer, listed_object(5, 7), &[])
                .contains("sequencer")
        );
        assert!(
            unrepairable_reason(VersionOrdering::Sequence, listed_object(5, 7), &[])
                .contains("--sequence-is-time")
        );
        assert!(
            unrepairable_reason(
                VersionOrdering::Offset,
                None,
                &[table_image(TableImageStatus::Present, 5)]
            )
            .contains("offset")
        );
        assert_eq!(unrepairable_reason(VersionOrdering::Offset, listed_object(5, 7), &[]), "");
        let time_rules =
            CompareRules { sequence_is_time: true, ..compare_rules(VersionOrdering::Sequence) };
        let micros = time_at(5).timestamp_micros() as u64;
        assert_eq!(repair_event(listed_object(5, 7), &[], &time_rules).sequence, Some(micros));
        let counter_sequence = TableImage {
            sequence: SequenceKey::from_number(3),
            ..table_image(TableImageStatus::Present, 5)
        };
        assert!(
            compare_one(None, &[counter_sequence], &time_rules)
                .0
                .unwrap()
                .unrepairable_reason
                .unwrap()
                .contains("not its time")
        );
    }

    #[test]
    fn listed_events_keep_their_own_versions() {
        let rules = compare_rules(VersionOrdering::Sequence);
        let listed = |sequence| {
            let event = ImageEvent {
                uri: Some("s3://b/a.jpg".into()),
                sequence: Some(sequence),
                ..rules.event_template.event_without_content("a", Operation::Upsert, time_at(60))
            };
            Some(ListedImage::Event(Box::new(event), SequenceKey::from_number(sequence)))
        };
        let stored = TableImage {
            sequence: SequenceKey::from_number(3),
            ..table_image(TableImageStatus::Present, 5)
        };
        assert_eq!(
            repair_event(listed(4), std::slice::from_ref(&stored), &rules).sequence,
            Some(4)
        );
        assert_eq!(compare_one(listed(3), &[stored], &rules).1.unchanged, 1);
        assert_eq!(repair_event(listed(1), &[], &rules).sequence, Some(1));
        let id_only = compare_one(Some(ListedImage::Id), &[], &rules).0.unwrap();
        assert!(id_only.unrepairable_reason.unwrap().contains("JSON lines"));
    }
}
