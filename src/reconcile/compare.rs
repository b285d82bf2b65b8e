//! One place of the listing beside what the table knows of it: the rules, without any input.

use chrono::{DateTime, SubsecRound, TimeDelta, Utc};
use serde::{Deserialize, Serialize};

use super::ReconcileReport;
use crate::ingest::source::ImageEvent;
use crate::publish::{EventTemplate, attributes_to_json};
use crate::record::{AttributeTypes, Attributes, Operation, SequenceKey, VersionOrdering};

/// What the outside world says of one image.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub enum ListedImage {
    /// An object of a bucket or a folder.
    Object {
        /// Its address.
        uri: String,
        /// Its last change.
        modified_at: DateTime<Utc>,
        /// Its size.
        bytes: u64,
        /// Whether its name is one of a picture.
        is_image: bool,
    },
    /// An id in a list.
    Id,
    /// An event in a list, with its version by the catalogue's ordering.
    Event(Box<ImageEvent>, SequenceKey),
}

/// What the table knows of one image, at the place where it is compared.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct StoredImage {
    /// Which image.
    pub image_id: String,
    /// What stands here.
    pub status: StoredState,
    /// Its version.
    pub sequence: SequenceKey,
    /// When the event happened; where it did not say, when the row was made.
    pub event_time: DateTime<Utc>,
    /// Whether `at` is the event's own.
    pub has_event_time: bool,
    /// When it was stored.
    pub stored_at: DateTime<Utc>,
    /// Its address.
    pub uri: Option<String>,
    /// Its size.
    pub bytes: Option<u64>,
    /// Its attributes.
    pub attributes: Attributes,
}

/// What stands at a place.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum StoredState {
    /// The image, fetched from here.
    Present,
    /// It was deleted.
    Deleted,
    /// An image of the id that this place would be given, fetched from elsewhere.
    Elsewhere,
}

/// How a difference is told and mended.
#[derive(Debug, Clone)]
pub struct CompareRules {
    /// When the listing started.
    pub listing_started_at: DateTime<Utc>,
    /// What is younger than this may still be on its way.
    pub grace_period: TimeDelta,
    /// How much younger an object may be than the event that brought it.
    pub time_tolerance: TimeDelta,
    /// How long the table remembers deletes; none: for ever.
    pub tombstone_retention: Option<TimeDelta>,
    /// Whether the versions of a catalogue that is ordered by `sequence` are known to be times in
    /// microseconds.
    pub sequence_is_time: bool,
    /// How events are made.
    pub event_template: EventTemplate,
    /// Declared attributes.
    pub attribute_types: AttributeTypes,
}

/// What is known of a place as a whole.
#[derive(Debug, Clone, Default)]
pub struct IdScheme {
    /// An image whose id is not made of its key, and its key, where those are more than the others.
    pub custom_id_example: Option<(String, String)>,
}

/// Which way the two differ.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum DifferenceKind {
    /// Listed, not stored.
    New,
    /// Stored, and changed since.
    Changed,
    /// Stored, not listed.
    Removed,
}

/// One difference.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Finding {
    /// Which way.
    pub difference: DifferenceKind,
    /// Which image.
    pub image_id: String,
    /// Where it is, or was.
    pub uri: Option<String>,
    /// Why this is taken for a difference.
    pub reason: String,
    /// The event that mends it.
    pub event: Option<ImageEvent>,
    /// Why there is no such event.
    pub unrepairable_reason: Option<String>,
}

/// Compares what is listed and what is known at one place; counts in `report`.
pub fn compare_key(
    key: &str,
    listed: Option<ListedImage>,
    known: &[StoredImage],
    id_scheme: &IdScheme,
    rules: &CompareRules,
    report: &mut ReconcileReport,
) -> Vec<Finding> {
    let here: Vec<&StoredImage> =
        known.iter().filter(|k| k.status == StoredState::Present).collect();
    report.stored += here.len() as u64;
    match listed {
        None => here.into_iter().filter_map(|image| find_gone(image, rules, report)).collect(),
        Some(listed) => {
            report.listed += 1;
            if here.is_empty() {
                return find_new(key, &listed, known, id_scheme, rules, report)
                    .into_iter()
                    .collect();
            }
            let changed = here.into_iter().filter_map(|image| {
                let finding = check_changed(&listed, image, rules);
                match &finding {
                    ChangeCheck::Same => report.unchanged += 1,
                    ChangeCheck::Recent => report.too_recent += 1,
                    ChangeCheck::Changed(_) => report.changed += 1,
                }
                finding.into_finding()
            });
            changed.collect()
        }
    }
}

enum ChangeCheck {
    Same,
    Recent,
    Changed(Box<Finding>),
}

impl ChangeCheck {
    fn into_finding(self) -> Option<Finding> {
        match self {
            Self::Changed(finding) => Some(*finding),
            Self::Same | Self::Recent => None,
        }
    }
}

fn find_new(
    key: &str,
    listed: &ListedImage,
    known: &[StoredImage],
    id_scheme: &IdScheme,
    rules: &CompareRules,
    report: &mut ReconcileReport,
) -> Option<Finding> {
    let deleted = known.iter().find(|k| k.status == StoredState::Deleted);
    if known.iter().any(|k| k.status == StoredState::Elsewhere) {
        report.id_conflicts += 1;
        return None;
    }
    let finding = |id: &str, uri: Option<&String>, repair: Result<ImageEvent, String>| {
        let why = match deleted {
            Some(known) => {
                format!("is there again after it was deleted at {}", format_time(known.event_time))
            }
            None => "is not stored".into(),
        };
        Finding::new(DifferenceKind::New, id, uri, why, repair)
    };
    let found = match listed {
        ListedImage::Object { uri, modified_at: changed, is_image: picture, .. } => {
            if !picture {
                report.ignored += 1;
                return None;
            }
            if rules.is_recent(*changed) {
                report.too_recent += 1;
                return None;
            }
            if deleted.is_some_and(|known| known.event_time >= changed.trunc_subsecs(6)) {
                report.deleted += 1;
                return None;
            }
            // An older event would be refused by the worker: nobody remembers deletes that long.
            let time = if rules.is_past_tombstone_retention(*changed) {
                rules.listing_started_at
            } else {
                *changed
            };
            let repair = match &id_scheme.custom_id_example {
                // Under another id it would stand twice, or come back although it was deleted.
                Some((id, of)) => Err(format!(
                    "ids here are not --id-prefix and key: {of} is {id:?}; give the prefix that makes \
                     them so, or list events by --ids"
                )),
                None => rules.require_time_sequence(deleted, || {
                    rules.event_template.upsert_event(key, uri, time)
                }),
            };
            finding(&format!("{}{key}", rules.event_template.id_prefix), Some(uri), repair)
        }
        ListedImage::Id => {
            if deleted.is_some() {
                report.deleted += 1;
                return None;
            }
            let refused = "the list says nothing but its id; list events (JSON lines)";
            finding(key, None, Err(refused.into()))
        }
        ListedImage::Event(event, sequence) => {
            if event.event_time.is_some_and(|time| rules.is_recent(time)) {
                report.too_recent += 1;
                return None;
            }
            if deleted.is_some_and(|known| !rules.is_newer(event, sequence, known)) {
                report.deleted += 1;
                return None;
            }
            finding(key, event.uri.as_ref(), rules.listed_event(event))
        }
    };
    report.new += 1;
    Some(found)
}

fn check_changed(listed: &ListedImage, image: &StoredImage, rules: &CompareRules) -> ChangeCheck {
    let (why, repair) = match listed {
        ListedImage::Object { modified_at: changed, bytes, .. } => {
            let time = changed.trunc_subsecs(6);
            let resized = image.bytes.filter(|stored| stored != bytes);
            let later = time > image.event_time + rules.time_tolerance;
            if !later && resized.is_none() {
                return ChangeCheck::Same;
            }
            if rules.is_recent(time) || rules.is_recent(image.event_time) {
                return ChangeCheck::Recent;
            }
            let why = match resized {
                Some(stored) => format!("has {bytes} bytes, {stored} are stored"),
                None => format!(
                    "changed at {}, stored is {}",
                    format_time(time),
                    format_time(image.event_time)
                ),
            };
            // When the listing started the object was already what it is, so that this time is as
            // true as its last change, where that would lose.
            let loses = time <= image.event_time || rules.is_past_tombstone_retention(time);
            let time = if loses { rules.listing_started_at } else { time };
            let repair = rules.require_time_sequence(Some(image), || ImageEvent {
                attributes: attributes_to_json(&image.attributes, &rules.attribute_types),
                ..rules.event_template.upsert_event(
                    "",
                    image.uri.as_deref().unwrap_or_default(),
                    time,
                )
            });
            (why, repair)
        }
        ListedImage::Id => return ChangeCheck::Same,
        ListedImage::Event(event, sequence) => {
            if !rules.is_newer(event, sequence, image) {
                return ChangeCheck::Same;
            }
            if event.event_time.is_some_and(|time| rules.is_recent(time)) {
                return ChangeCheck::Recent;
            }
            ("the list has a later version".into(), rules.listed_event(event))
        }
    };
    let repair = repair.map(|event| ImageEvent { image_id: image.image_id.clone(), ..event });
    let finding =
        Finding::new(DifferenceKind::Changed, &image.image_id, image.uri.as_ref(), why, repair);
    ChangeCheck::Changed(Box::new(finding))
}

fn find_gone(
    image: &StoredImage,
    rules: &CompareRules,
    report: &mut ReconcileReport,
) -> Option<Finding> {
    // Events may be dated long before they come: what was stored since was not there to be listed.
    if rules.is_recent(image.event_time) || rules.is_recent(image.stored_at) {
        report.too_recent += 1;
        return None;
    }
    report.removed += 1;
    let repair = match rules.event_template.ordering {
        VersionOrdering::Offset => Err(
            "the catalogue orders by offset: a delete that is sent now would also be newer than an \
             image that came back meanwhile; delete it by `bsap publish --delete`"
                .into(),
        ),
        _ => rules.require_time_sequence(Some(image), || {
            let event = rules.event_template.base_event("", Operation::Delete, rules.listing_started_at);
            ImageEvent { image_id: image.image_id.clone(), ..event }
        }),
    };
    Some(Finding::new(
        DifferenceKind::Removed,
        &image.image_id,
        image.uri.as_ref(),
        "is stored, not listed".into(),
        repair,
    ))
}

impl CompareRules {
    fn is_recent(&self, time: DateTime<Utc>) -> bool {
        time > self.listing_started_at - self.grace_period
    }

    /// Whether a listed event is a later version than what is known.
    fn is_newer(&self, event: &ImageEvent, sequence: &SequenceKey, known: &StoredImage) -> bool {
        match self.event_template.ordering {
            // The list does not know the offsets.
            VersionOrdering::Offset => event.event_time.is_some_and(|time| time > known.event_time),
            _ => *sequence > known.sequence,
        }
    }

    fn is_past_tombstone_retention(&self, time: DateTime<Utc>) -> bool {
        self.tombstone_retention.is_some_and(|days| time < self.listing_started_at - days)
    }

    /// An event whose version is a time, where the catalogue's versions are times.
    fn require_time_sequence(
        &self,
        known: Option<&StoredImage>,
        event: impl FnOnce() -> ImageEvent,
    ) -> Result<ImageEvent, String> {
        match self.event_template.ordering {
            VersionOrdering::EventTime | VersionOrdering::Offset => Ok(event()),
            VersionOrdering::Sequencer => Err(
                "the catalogue orders by sequencer, which only the bucket's own notifications have"
                    .into(),
            ),
            VersionOrdering::Sequence if !self.sequence_is_time => {
                Err("the catalogue orders by sequence, which a listing does not have; say \
                 --sequence-is-time where it is the time in microseconds, as `bsap publish` sets it"
                    .into())
            }
            VersionOrdering::Sequence => match known.filter(|known| !has_time_sequence(known)) {
                Some(known) => {
                    Err(format!("its sequence {} is not its time", known.sequence.as_str()))
                }
                None => Ok(event()),
            },
        }
    }

    /// An event as the list has it, unless workers would refuse it.
    fn listed_event(&self, event: &ImageEvent) -> Result<ImageEvent, String> {
        match event.event_time {
            Some(time) if self.is_past_tombstone_retention(time) => Err(format!(
                "is of {}, older than deletes are remembered (maintenance.tombstone_retention_days); list a later version",
                format_time(time)
            )),
            _ => Ok(event.clone()),
        }
    }
}

/// Whether an image's version is its time in microseconds.
pub fn has_time_sequence(known: &StoredImage) -> bool {
    known.has_event_time
        && SequenceKey::from_time(known.event_time).is_ok_and(|time| time == known.sequence)
}

impl Finding {
    fn new(
        finding: DifferenceKind,
        image_id: &str,
        uri: Option<&String>,
        why: String,
        repair: Result<ImageEvent, String>,
    ) -> Self {
        let (event, refused) = match repair {
            Ok(event) => (Some(event), None),
            Err(refused) => (None, Some(refused)),
        };
        Self {
            difference: finding,
            image_id: image_id.to_owned(),
            uri: uri.cloned(),
            reason: why,
            event,
            unrepairable_reason: refused,
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

    fn stored_image(what: StoredState, seconds: i64) -> StoredImage {
        StoredImage {
            image_id: "shop/a.jpg".into(),
            status: what,
            sequence: SequenceKey::from_time(time_at(seconds)).unwrap(),
            event_time: time_at(seconds),
            has_event_time: true,
            stored_at: time_at(seconds),
            uri: Some("s3://b/a.jpg".into()),
            bytes: Some(7),
            attributes: [("size".to_owned(), "3".to_owned())].into(),
        }
    }

    #[expect(clippy::unnecessary_wraps, reason = "stands where nothing may be listed")]
    fn listed_object(seconds: i64, bytes: u64) -> Option<ListedImage> {
        let uri = "s3://b/a.jpg".to_owned();
        Some(ListedImage::Object { uri, modified_at: time_at(seconds), bytes, is_image: true })
    }

    fn compare_one(
        listed: Option<ListedImage>,
        known: &[StoredImage],
        rules: &CompareRules,
    ) -> (Option<Finding>, ReconcileReport) {
        let mut report = ReconcileReport::default();
        let mut found =
            compare_key("a.jpg", listed, known, &IdScheme::default(), rules, &mut report);
        assert!(found.len() <= 1);
        (found.pop(), report)
    }

    fn repair_event(
        listed: Option<ListedImage>,
        known: &[StoredImage],
        rules: &CompareRules,
    ) -> ImageEvent {
        compare_one(listed, known, rules).0.unwrap().event.unwrap()
    }

    #[test]
    fn unchanged_images_are_left_alone() {
        let rules = compare_rules(VersionOrdering::EventTime);
        for changed in [0, 50] {
            let (found, report) = compare_one(
                listed_object(changed, 7),
                &[stored_image(StoredState::Present, 50)],
                &rules,
            );
            assert_eq!((found, report.unchanged), (None, 1));
        }
    }

    #[test]
    fn events_carry_the_last_change_and_deletes_the_start_of_the_listing() {
        let rules = compare_rules(VersionOrdering::EventTime);
        let new = repair_event(listed_object(5, 7), &[], &rules);
        assert_eq!((new.image_id.as_str(), new.event_time), ("shop/a.jpg", Some(time_at(5))));
        let changed =
            repair_event(listed_object(60, 7), &[stored_image(StoredState::Present, 50)], &rules);
        assert_eq!(changed.event_time, Some(time_at(60)));
        assert_eq!(changed.attributes["size"], 3, "attributes are kept, in their type");
        let gone = repair_event(None, &[stored_image(StoredState::Present, 50)], &rules);
        assert_eq!((gone.operation, gone.event_time), (Operation::Delete, Some(time_at(10_000))));
    }

    #[test]
    fn another_size_is_a_change_whose_event_wins() {
        let rules = compare_rules(VersionOrdering::EventTime);
        let changed =
            repair_event(listed_object(40, 8), &[stored_image(StoredState::Present, 50)], &rules);
        assert_eq!(changed.event_time, Some(time_at(10_000)), "its last change would lose");
    }

    #[test]
    fn recent_changes_are_left_alone() {
        let rules = compare_rules(VersionOrdering::EventTime);
        for (listed, stored) in [
            (listed_object(9_950, 7), vec![]),
            (listed_object(9_950, 7), vec![stored_image(StoredState::Present, 50)]),
            (None, vec![stored_image(StoredState::Present, 9_950)]),
            // Dated long ago, and stored after the listing began.
            (
                None,
                vec![StoredImage {
                    stored_at: time_at(10_001),
                    ..stored_image(StoredState::Present, 50)
                }],
            ),
            // The event of the next version came while the old one was listed.
            (listed_object(40, 8), vec![stored_image(StoredState::Present, 9_950)]),
        ] {
            let (found, report) = compare_one(listed, &stored, &rules);
            assert_eq!((found, report.too_recent), (None, 1));
        }
    }

    #[test]
    fn a_delete_holds_until_the_object_changes() {
        let rules = compare_rules(VersionOrdering::EventTime);
        let (found, report) =
            compare_one(listed_object(40, 7), &[stored_image(StoredState::Deleted, 50)], &rules);
        assert_eq!((found, report.deleted), (None, 1));
        assert_eq!(
            repair_event(listed_object(60, 7), &[stored_image(StoredState::Deleted, 50)], &rules)
                .event_time,
            Some(time_at(60))
        );
    }

    #[test]
    fn an_id_that_is_elsewhere_is_not_taken_over() {
        let (found, report) = compare_one(
            listed_object(60, 7),
            &[stored_image(StoredState::Elsewhere, 50)],
            &compare_rules(VersionOrdering::EventTime),
        );
        assert_eq!((found, report.id_conflicts), (None, 1));
    }

    #[test]
    fn no_new_ids_are_made_up_when_ids_are_not_keys() {
        let place = IdScheme { custom_id_example: Some(("SKU-1".into(), "b.jpg".into())) };
        let rules = compare_rules(VersionOrdering::EventTime);
        let found = compare_key(
            "a.jpg",
            listed_object(5, 7),
            &[],
            &place,
            &rules,
            &mut ReconcileReport::default(),
        )
        .remove(0);
        assert_eq!((found.difference, found.event), (DifferenceKind::New, None));
        let refused = found.unrepairable_reason.unwrap();
        assert!(refused.contains("SKU-1") && refused.contains("--id-prefix"), "{refused}");
    }

    #[test]
    fn an_image_added_again_is_new_where_offsets_order() {
        let rules = compare_rules(VersionOrdering::Offset);
        let listed = |seconds| {
            let event = ImageEvent {
                uri: Some("s3://b/a.jpg".into()),
                ..rules.event_template.base_event("a", Operation::Upsert, time_at(seconds))
            };
            Some(ListedImage::Event(Box::new(event), SequenceKey::from_number(0)))
        };
        let deleted = [stored_image(StoredState::Deleted, 50)];
        assert_eq!(repair_event(listed(60), &deleted, &rules).event_time, Some(time_at(60)));
        assert_eq!(compare_one(listed(40), &deleted, &rules).1.deleted, 1);
    }

    #[test]
    fn what_is_too_old_for_workers_is_dated_at_the_start() {
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
    fn versions_are_never_guessed() {
        let refused = |ordering, listed, known: &[StoredImage]| {
            compare_one(listed, known, &compare_rules(ordering))
                .0
                .unwrap()
                .unrepairable_reason
                .unwrap_or_default()
        };
        assert!(
            refused(VersionOrdering::Sequencer, listed_object(5, 7), &[]).contains("sequencer")
        );
        assert!(
            refused(VersionOrdering::Sequence, listed_object(5, 7), &[])
                .contains("--sequence-is-time")
        );
        assert!(
            refused(VersionOrdering::Offset, None, &[stored_image(StoredState::Present, 5)])
                .contains("offset")
        );
        assert_eq!(refused(VersionOrdering::Offset, listed_object(5, 7), &[]), "");
        let times =
            CompareRules { sequence_is_time: true, ..compare_rules(VersionOrdering::Sequence) };
        let micros = time_at(5).timestamp_micros() as u64;
        assert_eq!(repair_event(listed_object(5, 7), &[], &times).sequence, Some(micros));
        let counted = StoredImage {
            sequence: SequenceKey::from_number(3),
            ..stored_image(StoredState::Present, 5)
        };
        assert!(
            compare_one(None, &[counted], &times)
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
                ..rules.event_template.base_event("a", Operation::Upsert, time_at(60))
            };
            Some(ListedImage::Event(Box::new(event), SequenceKey::from_number(sequence)))
        };
        let stored = StoredImage {
            sequence: SequenceKey::from_number(3),
            ..stored_image(StoredState::Present, 5)
        };
        assert_eq!(
            repair_event(listed(4), std::slice::from_ref(&stored), &rules).sequence,
            Some(4)
        );
        assert_eq!(compare_one(listed(3), &[stored], &rules).1.unchanged, 1);
        assert_eq!(repair_event(listed(1), &[], &rules).sequence, Some(1));
        let nameless = compare_one(Some(ListedImage::Id), &[], &rules).0.unwrap();
        assert!(nameless.unrepairable_reason.unwrap().contains("JSON lines"));
    }
}
