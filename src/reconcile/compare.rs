//! One place of the listing beside what the table knows of it: the rules, without any input.

use chrono::{DateTime, SubsecRound, TimeDelta, Utc};
use serde::{Deserialize, Serialize};

use super::Report;
use crate::ingest::source::ImageEvent;
use crate::publish::{Naming, values};
use crate::record::{AttributeTypes, Attributes, Operation, Ordering, Sequence};

/// What the outside world says of one image.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub enum Listed {
    /// An object of a bucket or a folder.
    Object {
        /// Its address.
        uri: String,
        /// Its last change.
        changed: DateTime<Utc>,
        /// Its size.
        bytes: u64,
        /// Whether its name is one of a picture.
        picture: bool,
    },
    /// An id in a list.
    Id,
    /// An event in a list, with its version by the catalogue's ordering.
    Event(Box<ImageEvent>, Sequence),
}

/// What the table knows of one image, at the place where it is compared.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Known {
    /// Which image.
    pub image_id: String,
    /// What stands here.
    pub what: What,
    /// Its version.
    pub sequence: Sequence,
    /// When the event happened; where it did not say, when the row was made.
    pub at: DateTime<Utc>,
    /// Whether `at` is the event's own.
    pub dated: bool,
    /// When it was stored.
    pub stored: DateTime<Utc>,
    /// Its address.
    pub uri: Option<String>,
    /// Its size.
    pub bytes: Option<u64>,
    /// Its attributes.
    pub attributes: Attributes,
}

/// What stands at a place.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum What {
    /// The image, fetched from here.
    Here,
    /// It was deleted.
    Deleted,
    /// An image of the id that this place would be given, fetched from elsewhere.
    Elsewhere,
}

/// How a difference is told and mended.
#[derive(Debug, Clone)]
pub struct Rules {
    /// When the listing started.
    pub started: DateTime<Utc>,
    /// What is younger than this may still be on its way.
    pub grace: TimeDelta,
    /// How much younger an object may be than the event that brought it.
    pub tolerance: TimeDelta,
    /// How long the table remembers deletes; none: for ever.
    pub remembered: Option<TimeDelta>,
    /// Whether the versions of a catalogue that is ordered by `sequence` are known to be times in
    /// microseconds.
    pub sequence_is_time: bool,
    /// How events are made.
    pub naming: Naming,
    /// Declared attributes.
    pub attributes: AttributeTypes,
}

/// What is known of a place as a whole.
#[derive(Debug, Clone, Default)]
pub struct Place {
    /// An image whose id is not made of its key, and its key, where those are more than the others.
    pub own_names: Option<(String, String)>,
}

/// Which way the two differ.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Kind {
    /// Listed, not stored.
    New,
    /// Stored, and changed since.
    Changed,
    /// Stored, not listed.
    Gone,
}

/// One difference.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Finding {
    /// Which way.
    pub finding: Kind,
    /// Which image.
    pub image_id: String,
    /// Where it is, or was.
    pub uri: Option<String>,
    /// Why this is taken for a difference.
    pub why: String,
    /// The event that mends it.
    pub event: Option<ImageEvent>,
    /// Why there is no such event.
    pub refused: Option<String>,
}

/// Compares what is listed and what is known at one place; counts in `report`.
pub fn compare(
    key: &str,
    listed: Option<Listed>,
    known: &[Known],
    place: &Place,
    rules: &Rules,
    report: &mut Report,
) -> Vec<Finding> {
    let here: Vec<&Known> = known.iter().filter(|k| k.what == What::Here).collect();
    report.stored += here.len() as u64;
    match listed {
        None => here.into_iter().filter_map(|image| gone(image, rules, report)).collect(),
        Some(listed) => {
            report.listed += 1;
            if here.is_empty() {
                return new(key, &listed, known, place, rules, report).into_iter().collect();
            }
            let changed = here.into_iter().filter_map(|image| {
                let finding = changed(&listed, image, rules);
                match &finding {
                    Difference::Same => report.same += 1,
                    Difference::Recent => report.recent += 1,
                    Difference::Found(_) => report.changed += 1,
                }
                finding.found()
            });
            changed.collect()
        }
    }
}

enum Difference {
    Same,
    Recent,
    Found(Box<Finding>),
}

impl Difference {
    fn found(self) -> Option<Finding> {
        match self {
            Self::Found(finding) => Some(*finding),
            Self::Same | Self::Recent => None,
        }
    }
}

fn new(
    key: &str,
    listed: &Listed,
    known: &[Known],
    place: &Place,
    rules: &Rules,
    report: &mut Report,
) -> Option<Finding> {
    let deleted = known.iter().find(|k| k.what == What::Deleted);
    if known.iter().any(|k| k.what == What::Elsewhere) {
        report.elsewhere += 1;
        return None;
    }
    let finding = |id: &str, uri: Option<&String>, repair: Result<ImageEvent, String>| {
        let why = match deleted {
            Some(known) => format!("is there again after it was deleted at {}", text(known.at)),
            None => "is not stored".into(),
        };
        Finding::new(Kind::New, id, uri, why, repair)
    };
    let found = match listed {
        Listed::Object { uri, changed, picture, .. } => {
            if !picture {
                report.ignored += 1;
                return None;
            }
            if rules.is_recent(*changed) {
                report.recent += 1;
                return None;
            }
            if deleted.is_some_and(|known| known.at >= changed.trunc_subsecs(6)) {
                report.deleted += 1;
                return None;
            }
            // An older event would be refused by the worker: nobody remembers deletes that long.
            let time = if rules.is_forgotten(*changed) { rules.started } else { *changed };
            let repair = match &place.own_names {
                // Under another id it would stand twice, or come back although it was deleted.
                Some((id, of)) => Err(format!(
                    "ids here are not --id-prefix and key: {of} is {id:?}; give the prefix that makes \
                     them so, or list events by --ids"
                )),
                None => rules.dated(deleted, || rules.naming.upsert(key, uri, time)),
            };
            finding(&format!("{}{key}", rules.naming.id_prefix), Some(uri), repair)
        }
        Listed::Id => {
            if deleted.is_some() {
                report.deleted += 1;
                return None;
            }
            let refused = "the list says nothing but its id; list events (JSON lines)";
            finding(key, None, Err(refused.into()))
        }
        Listed::Event(event, sequence) => {
            if event.event_time.is_some_and(|time| rules.is_recent(time)) {
                report.recent += 1;
                return None;
            }
            if deleted.is_some_and(|known| !rules.is_later(event, sequence, known)) {
                report.deleted += 1;
                return None;
            }
            finding(key, event.uri.as_ref(), rules.as_listed(event))
        }
    };
    report.new += 1;
    Some(found)
}

fn changed(listed: &Listed, image: &Known, rules: &Rules) -> Difference {
    let (why, repair) = match listed {
        Listed::Object { changed, bytes, .. } => {
            let time = changed.trunc_subsecs(6);
            let resized = image.bytes.filter(|stored| stored != bytes);
            let later = time > image.at + rules.tolerance;
            if !later && resized.is_none() {
                return Difference::Same;
            }
            if rules.is_recent(time) || rules.is_recent(image.at) {
                return Difference::Recent;
            }
            let why = match resized {
                Some(stored) => format!("has {bytes} bytes, {stored} are stored"),
                None => format!("changed at {}, stored is {}", text(time), text(image.at)),
            };
            // When the listing started the object was already what it is, so that this time is as
            // true as its last change, where that would lose.
            let loses = time <= image.at || rules.is_forgotten(time);
            let time = if loses { rules.started } else { time };
            let repair = rules.dated(Some(image), || ImageEvent {
                attributes: values(&image.attributes, &rules.attributes),
                ..rules.naming.upsert("", image.uri.as_deref().unwrap_or_default(), time)
            });
            (why, repair)
        }
        Listed::Id => return Difference::Same,
        Listed::Event(event, sequence) => {
            if !rules.is_later(event, sequence, image) {
                return Difference::Same;
            }
            if event.event_time.is_some_and(|time| rules.is_recent(time)) {
                return Difference::Recent;
            }
            ("the list has a later version".into(), rules.as_listed(event))
        }
    };
    let repair = repair.map(|event| ImageEvent { image_id: image.image_id.clone(), ..event });
    let finding = Finding::new(Kind::Changed, &image.image_id, image.uri.as_ref(), why, repair);
    Difference::Found(Box::new(finding))
}

fn gone(image: &Known, rules: &Rules, report: &mut Report) -> Option<Finding> {
    // Events may be dated long before they come: what was stored since was not there to be listed.
    if rules.is_recent(image.at) || rules.is_recent(image.stored) {
        report.recent += 1;
        return None;
    }
    report.gone += 1;
    let repair = match rules.naming.ordering {
        Ordering::Offset => Err(
            "the catalogue orders by offset: a delete that is sent now would also be newer than an \
             image that came back meanwhile; delete it by `bsap publish --delete`"
                .into(),
        ),
        _ => rules.dated(Some(image), || {
            let event = rules.naming.event("", Operation::Delete, rules.started);
            ImageEvent { image_id: image.image_id.clone(), ..event }
        }),
    };
    Some(Finding::new(
        Kind::Gone,
        &image.image_id,
        image.uri.as_ref(),
        "is stored, not listed".into(),
        repair,
    ))
}

impl Rules {
    fn is_recent(&self, time: DateTime<Utc>) -> bool {
        time > self.started - self.grace
    }

    /// Whether a listed event is a later version than what is known.
    fn is_later(&self, event: &ImageEvent, sequence: &Sequence, known: &Known) -> bool {
        match self.naming.ordering {
            // The list does not know the offsets.
            Ordering::Offset => event.event_time.is_some_and(|time| time > known.at),
            _ => *sequence > known.sequence,
        }
    }

    fn is_forgotten(&self, time: DateTime<Utc>) -> bool {
        self.remembered.is_some_and(|days| time < self.started - days)
    }

    /// An event whose version is a time, where the catalogue's versions are times.
    fn dated(
        &self,
        known: Option<&Known>,
        event: impl FnOnce() -> ImageEvent,
    ) -> Result<ImageEvent, String> {
        match self.naming.ordering {
            Ordering::EventTime | Ordering::Offset => Ok(event()),
            Ordering::Sequencer => Err(
                "the catalogue orders by sequencer, which only the bucket's own notifications have"
                    .into(),
            ),
            Ordering::Sequence if !self.sequence_is_time => {
                Err("the catalogue orders by sequence, which a listing does not have; say \
                 --sequence-is-time where it is the time in microseconds, as `bsap publish` sets it"
                    .into())
            }
            Ordering::Sequence => match known.filter(|known| !is_time(known)) {
                Some(known) => {
                    Err(format!("its sequence {} is not its time", known.sequence.as_str()))
                }
                None => Ok(event()),
            },
        }
    }

    /// An event as the list has it, unless workers would refuse it.
    fn as_listed(&self, event: &ImageEvent) -> Result<ImageEvent, String> {
        match event.event_time {
            Some(time) if self.is_forgotten(time) => Err(format!(
                "is of {}, older than deletes are remembered (upkeep.tombstone_days); list a later version",
                text(time)
            )),
            _ => Ok(event.clone()),
        }
    }
}

/// Whether an image's version is its time in microseconds.
pub fn is_time(known: &Known) -> bool {
    known.dated && Sequence::from_time(known.at).is_ok_and(|time| time == known.sequence)
}

impl Finding {
    fn new(
        finding: Kind,
        image_id: &str,
        uri: Option<&String>,
        why: String,
        repair: Result<ImageEvent, String>,
    ) -> Self {
        let (event, refused) = match repair {
            Ok(event) => (Some(event), None),
            Err(refused) => (None, Some(refused)),
        };
        Self { finding, image_id: image_id.to_owned(), uri: uri.cloned(), why, event, refused }
    }
}

fn text(time: DateTime<Utc>) -> String {
    time.to_rfc3339_opts(chrono::SecondsFormat::AutoSi, true)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::record::AttributeType;

    fn at(seconds: i64) -> DateTime<Utc> {
        DateTime::from_timestamp(1_700_000_000 + seconds, 0).unwrap()
    }

    fn rules(ordering: Ordering) -> Rules {
        Rules {
            started: at(10_000),
            grace: TimeDelta::seconds(100),
            tolerance: TimeDelta::zero(),
            remembered: None,
            sequence_is_time: false,
            naming: Naming { id_prefix: "shop/".into(), ordering, ..Naming::default() },
            attributes: [("size".to_owned(), AttributeType::Integer)].into(),
        }
    }

    fn known(what: What, seconds: i64) -> Known {
        Known {
            image_id: "shop/a.jpg".into(),
            what,
            sequence: Sequence::from_time(at(seconds)).unwrap(),
            at: at(seconds),
            dated: true,
            stored: at(seconds),
            uri: Some("s3://b/a.jpg".into()),
            bytes: Some(7),
            attributes: [("size".to_owned(), "3".to_owned())].into(),
        }
    }

    #[expect(clippy::unnecessary_wraps, reason = "stands where nothing may be listed")]
    fn object(seconds: i64, bytes: u64) -> Option<Listed> {
        let uri = "s3://b/a.jpg".to_owned();
        Some(Listed::Object { uri, changed: at(seconds), bytes, picture: true })
    }

    fn one(listed: Option<Listed>, known: &[Known], rules: &Rules) -> (Option<Finding>, Report) {
        let mut report = Report::default();
        let mut found = compare("a.jpg", listed, known, &Place::default(), rules, &mut report);
        assert!(found.len() <= 1);
        (found.pop(), report)
    }

    fn event(listed: Option<Listed>, known: &[Known], rules: &Rules) -> ImageEvent {
        one(listed, known, rules).0.unwrap().event.unwrap()
    }

    #[test]
    fn what_is_the_same_is_left_alone() {
        let rules = rules(Ordering::EventTime);
        for changed in [0, 50] {
            let (found, report) = one(object(changed, 7), &[known(What::Here, 50)], &rules);
            assert_eq!((found, report.same), (None, 1));
        }
    }

    #[test]
    fn events_carry_the_last_change_and_deletes_the_start_of_the_listing() {
        let rules = rules(Ordering::EventTime);
        let new = event(object(5, 7), &[], &rules);
        assert_eq!((new.image_id.as_str(), new.event_time), ("shop/a.jpg", Some(at(5))));
        let changed = event(object(60, 7), &[known(What::Here, 50)], &rules);
        assert_eq!(changed.event_time, Some(at(60)));
        assert_eq!(changed.attributes["size"], 3, "attributes are kept, in their type");
        let gone = event(None, &[known(What::Here, 50)], &rules);
        assert_eq!((gone.operation, gone.event_time), (Operation::Delete, Some(at(10_000))));
    }

    #[test]
    fn another_size_is_a_change_whose_event_wins() {
        let rules = rules(Ordering::EventTime);
        let changed = event(object(40, 8), &[known(What::Here, 50)], &rules);
        assert_eq!(changed.event_time, Some(at(10_000)), "its last change would lose");
    }

    #[test]
    fn what_may_be_on_its_way_is_left_alone() {
        let rules = rules(Ordering::EventTime);
        for (listed, stored) in [
            (object(9_950, 7), vec![]),
            (object(9_950, 7), vec![known(What::Here, 50)]),
            (None, vec![known(What::Here, 9_950)]),
            // Dated long ago, and stored after the listing began.
            (None, vec![Known { stored: at(10_001), ..known(What::Here, 50) }]),
            // The event of the next version came while the old one was listed.
            (object(40, 8), vec![known(What::Here, 9_950)]),
        ] {
            let (found, report) = one(listed, &stored, &rules);
            assert_eq!((found, report.recent), (None, 1));
        }
    }

    #[test]
    fn a_delete_stands_until_the_object_changes() {
        let rules = rules(Ordering::EventTime);
        let (found, report) = one(object(40, 7), &[known(What::Deleted, 50)], &rules);
        assert_eq!((found, report.deleted), (None, 1));
        assert_eq!(
            event(object(60, 7), &[known(What::Deleted, 50)], &rules).event_time,
            Some(at(60))
        );
    }

    #[test]
    fn an_id_that_is_elsewhere_is_not_taken_over() {
        let (found, report) =
            one(object(60, 7), &[known(What::Elsewhere, 50)], &rules(Ordering::EventTime));
        assert_eq!((found, report.elsewhere), (None, 1));
    }

    #[test]
    fn where_ids_are_not_keys_nothing_new_is_named() {
        let place = Place { own_names: Some(("SKU-1".into(), "b.jpg".into())) };
        let rules = rules(Ordering::EventTime);
        let found =
            compare("a.jpg", object(5, 7), &[], &place, &rules, &mut Report::default()).remove(0);
        assert_eq!((found.finding, found.event), (Kind::New, None));
        let refused = found.refused.unwrap();
        assert!(refused.contains("SKU-1") && refused.contains("--id-prefix"), "{refused}");
    }

    #[test]
    fn an_image_added_again_is_new_where_offsets_order() {
        let rules = rules(Ordering::Offset);
        let listed = |seconds| {
            let event = ImageEvent {
                uri: Some("s3://b/a.jpg".into()),
                ..rules.naming.event("a", Operation::Upsert, at(seconds))
            };
            Some(Listed::Event(Box::new(event), Sequence::from_number(0)))
        };
        let deleted = [known(What::Deleted, 50)];
        assert_eq!(event(listed(60), &deleted, &rules).event_time, Some(at(60)));
        assert_eq!(one(listed(40), &deleted, &rules).1.deleted, 1);
    }

    #[test]
    fn what_is_too_old_for_workers_is_dated_at_the_start() {
        let rules =
            Rules { remembered: Some(TimeDelta::seconds(1_000)), ..rules(Ordering::EventTime) };
        assert_eq!(event(object(5, 7), &[], &rules).event_time, Some(at(10_000)));
    }

    #[test]
    fn versions_are_never_guessed() {
        let refused = |ordering, listed, known: &[Known]| {
            one(listed, known, &rules(ordering)).0.unwrap().refused.unwrap_or_default()
        };
        assert!(refused(Ordering::Sequencer, object(5, 7), &[]).contains("sequencer"));
        assert!(refused(Ordering::Sequence, object(5, 7), &[]).contains("--sequence-is-time"));
        assert!(refused(Ordering::Offset, None, &[known(What::Here, 5)]).contains("offset"));
        assert_eq!(refused(Ordering::Offset, object(5, 7), &[]), "");
        let times = Rules { sequence_is_time: true, ..rules(Ordering::Sequence) };
        let micros = at(5).timestamp_micros() as u64;
        assert_eq!(event(object(5, 7), &[], &times).sequence, Some(micros));
        let counted = Known { sequence: Sequence::from_number(3), ..known(What::Here, 5) };
        assert!(one(None, &[counted], &times).0.unwrap().refused.unwrap().contains("not its time"));
    }

    #[test]
    fn lists_bring_their_own_versions() {
        let rules = rules(Ordering::Sequence);
        let listed = |sequence| {
            let event = ImageEvent {
                uri: Some("s3://b/a.jpg".into()),
                sequence: Some(sequence),
                ..rules.naming.event("a", Operation::Upsert, at(60))
            };
            Some(Listed::Event(Box::new(event), Sequence::from_number(sequence)))
        };
        let stored = Known { sequence: Sequence::from_number(3), ..known(What::Here, 5) };
        assert_eq!(event(listed(4), std::slice::from_ref(&stored), &rules).sequence, Some(4));
        assert_eq!(one(listed(3), &[stored], &rules).1.same, 1);
        assert_eq!(event(listed(1), &[], &rules).sequence, Some(1));
        let nameless = one(Some(Listed::Id), &[], &rules).0.unwrap();
        assert!(nameless.refused.unwrap().contains("JSON lines"));
    }
}
