use std::collections::BTreeMap;

use bytes::Bytes;
use chrono::DateTime;

use super::Options;
use super::decoder::bucket::BucketNotification;
use super::decoder::cloud_event::CloudEvent;
use super::decoder::format::{Decoder, Rejected};
use super::decoder::json::ImageEvent;
use crate::record::{
    AttributeType, AttributeTypes, Change, Content, Event, Message, Ordering, Partition, Sequence,
};

fn decoder(ordering: Ordering) -> Decoder {
    let options = Options { ordering, object_id: "{bucket}/{key}".into(), ..Options::default() };
    let attributes = AttributeTypes::from([
        ("colour".into(), AttributeType::Text),
        ("price".into(), AttributeType::Number),
    ]);
    Decoder::new(&options, &attributes)
}

fn message(key: Option<&str>, payload: Option<&str>) -> Message {
    Message {
        partition: Partition { topic: "images".into(), number: 0 },
        offset: 7,
        key: key.map(|k| Bytes::copy_from_slice(k.as_bytes())),
        payload: payload.map(|p| Bytes::copy_from_slice(p.as_bytes())),
        headers: Vec::new(),
        timestamp_ms: Some(1_700_000_000_000),
    }
}

fn decode(ordering: Ordering, message: &Message) -> Result<Vec<Event>, Rejected> {
    let now = DateTime::from_timestamp(1_700_000_000, 0).unwrap();
    decoder(ordering).decode(message, now)
}

#[test]
fn an_upsert_with_attributes() {
    let text = r#"{"image_id":"a","uri":"s3://b/a.jpg","sequence":3,
        "attributes":{"colour":"red","price":9.5,"unknown":1},"future_field":true}"#;
    let events = decode(Ordering::Sequence, &message(None, Some(text))).unwrap();
    let Change::Upsert { content, attributes } = &events[0].change else { panic!("not an upsert") };
    assert_eq!(content, &Content::uri("s3://b/a.jpg"));
    assert_eq!(attributes.len(), 2);
    assert_eq!(attributes["price"], "9.5");
    assert_eq!(events[0].sequence, Sequence::from_number(3));
}

#[test]
fn a_null_value_with_a_key_is_a_delete() {
    let events = decode(Ordering::Offset, &message(Some("a"), None)).unwrap();
    assert_eq!(events[0].change, Change::Delete);
    assert_eq!(events[0].sequence, Sequence::from_number(7));
    assert!(decode(Ordering::Offset, &message(None, None)).is_err());
}

#[test]
fn what_is_wrong_is_named() {
    let cases = [
        (Ordering::Sequence, r#"{"image_id":"a","uri":"u"}"#, "sequence"),
        (Ordering::EventTime, r#"{"image_id":"a","uri":"u","sequence":1}"#, "event_time"),
        (
            Ordering::EventTime,
            r#"{"image_id":"a","uri":"u","event_time":"2033-01-01T00:00:00Z"}"#,
            "event_time",
        ),
        (Ordering::Sequence, r#"{"image_id":"a","sequence":1}"#, "uri"),
        (Ordering::Sequence, r#"{"image_id":"a","uri":"u","data":"QQ==","sequence":1}"#, "data"),
        (Ordering::Sequence, r#"{"image_id":"a","data":"@","sequence":1}"#, "data"),
        (Ordering::Sequence, r#"{"image_id":"","uri":"u","sequence":1}"#, "image_id"),
        (Ordering::Sequence, r#"{"uri":"u","sequence":1}"#, "image_id"),
        (Ordering::Sequence, r#"{"image_id":"a","uri":"u","sequence":-1}"#, "sequence"),
        (Ordering::Offset, r#"{"image_id":"b","uri":"u"}"#, "key"),
        (
            Ordering::Sequence,
            r#"{"image_id":"a","uri":"u","sequence":1,"attributes":{"price":"x"}}"#,
            "attributes.price",
        ),
        (
            Ordering::Sequence,
            r#"{"image_id":"a","uri":"u","sequence":1,"operation":"merge"}"#,
            "operation",
        ),
    ];
    for (ordering, text, field) in cases {
        match decode(ordering, &message(Some("a"), Some(text))) {
            Err(Rejected::Field(invalid)) => assert_eq!(invalid.field, field, "{text}"),
            other => panic!("{text}: {other:?}"),
        }
    }
}

#[test]
fn what_is_no_event_is_no_event() {
    for text in ["", "null", "[]", "hello", "{\"a\":", "\u{0}"] {
        let rejected = decode(Ordering::Sequence, &message(None, Some(text))).unwrap_err();
        assert_eq!(rejected.code(), "unknown_format", "{text}");
    }
}

/// An example of `schemas/examples` as a message, and what its file says it is.
fn example(name: &str) -> Message {
    let file = format!("schemas/examples/{name}.json");
    let text = std::fs::read_to_string(file).unwrap();
    let value: serde_json::Value = serde_json::from_str(&text).unwrap();
    let Some(headers) = value.get("headers") else { return message(None, Some(&text)) };
    let headers = headers.as_object().unwrap().iter().map(|(name, value)| {
        (name.clone(), Some(Bytes::copy_from_slice(value.as_str().unwrap().as_bytes())))
    });
    Message { headers: headers.collect(), ..message(None, Some(&value["value"].to_string())) }
}

fn with(text: &str, changes: &[(&str, &str)]) -> String {
    changes.iter().fold(text.to_owned(), |text, (from, to)| {
        assert!(text.contains(from), "{from}");
        text.replace(from, to)
    })
}

const S3: &str = r#"{"Records":[{"eventVersion":"2.1","eventName":"ObjectCreated:Put",
    "eventTime":"2023-11-14T22:13:20.123Z","s3":{"bucket":{"name":"photos"},
    "object":{"key":"red+mugs/a%26b%2B%C3%A9.jpg","size":7,"versionId":"v1","sequencer":"0055AED6DC"}}}]}"#;

#[test]
fn a_bucket_says_what_came_and_what_went() {
    let one = |text: &str| {
        let mut events = decode(Ordering::Sequencer, &message(None, Some(text))).unwrap();
        assert_eq!(events.len(), 1);
        events.remove(0)
    };
    let uri = "s3://photos/red%20mugs/a&b+%C3%A9.jpg";
    let created = one(S3);
    assert_eq!(created.image_id.as_str(), "photos/red mugs/a&b+é.jpg");
    assert_eq!(created.sequence, Sequence::from_sequencer("0055AED6DC00").unwrap());
    let Change::Upsert { content, .. } = created.change else { panic!("not an upsert") };
    assert_eq!(content, Content::Uri { uri: uri.into(), version: Some("v1".into()) });

    // MinIO puts `s3:` before the name, and says `null` where the bucket keeps no versions.
    let plain = [("ObjectCreated:Put", "s3:ObjectRemoved:Delete"), ("\"v1\"", "\"null\"")];
    assert_eq!(one(&with(S3, &plain)).change, Change::Delete);
    let marker = [("ObjectCreated:Put", "ObjectRemoved:DeleteMarkerCreated")];
    assert_eq!(one(&with(S3, &marker)).change, Change::Delete);
    // One version of several was removed for good: the newest may well be another.
    let version = [("ObjectCreated:Put", "LifecycleExpiration:Delete")];
    assert_eq!(one(&with(S3, &version)).change, Change::Recheck { content: Content::uri(uri) });

    let folder = with(S3, &[("a%26b%2B%C3%A9.jpg", "")]);
    for nothing in [folder.as_str(), r#"{"Service":"Amazon S3","Event":"s3:TestEvent"}"#] {
        assert_eq!(decode(Ordering::Sequencer, &message(None, Some(nothing))), Ok(Vec::new()));
    }
}

#[test]
fn one_record_that_is_wrong_spoils_its_message_and_is_named() {
    let record = S3.trim_start_matches("{\"Records\":[").trim_end_matches("]}");
    let cases = [
        ("ObjectCreated:Put", "ObjectRestore:Completed", "unknown_kind"),
        ("\"key\"", "\"clef\"", "invalid_field"),
        ("red+mugs", "..", "invalid_field"),
        ("0055AED6DC", "noon", "invalid_field"),
        ("%C3%A9", "%C3", "invalid_field"),
        ("\"photos\"", "\"a/b\"", "invalid_field"),
    ];
    for (from, to, code) in cases {
        let text = format!("{{\"Records\":[{record},{}]}}", with(record, &[(from, to)]));
        let rejected = decode(Ordering::Sequencer, &message(None, Some(&text))).unwrap_err();
        assert_eq!((rejected.code(), rejected.record()), (code, Some(1)), "{to}");
    }
    let lacks = decode(Ordering::Sequence, &message(None, Some(S3))).unwrap_err();
    assert_eq!(lacks.to_string().split(':').nth(1), Some(" sequence"), "{lacks}");
    let missing = with(S3, &[("\"name\"", "\"nom\"")]);
    let missing = decode(Ordering::Sequencer, &message(None, Some(&missing))).unwrap_err();
    assert_eq!(missing.to_string(), "record 0: s3.bucket.name: is missing");
}

const STRUCTURED: &str = r#"{"specversion":"1.0","type":"bsap.image.upsert","source":"/shop","id":"1",
    "subject":"mug-1","time":"2023-11-14T22:13:20Z","sequence":"12","data":{"uri":"s3://b/a.jpg"}}"#;

#[test]
fn a_cloud_event_is_one_in_either_mode() {
    let structured = decode(Ordering::Sequence, &message(None, Some(STRUCTURED))).unwrap();
    let header =
        |name: &str, value: &str| (name.to_owned(), Some(Bytes::copy_from_slice(value.as_bytes())));
    let mut binary = message(None, Some(r#"{"uri":"s3://b/a.jpg"}"#));
    binary.headers = vec![
        header("ce_specversion", "1.0"),
        header("ce_type", "bsap.image.upsert"),
        header("ce_source", "/shop"),
        header("ce_id", "1"),
        header("ce_subject", "mug-1"),
        header("ce_time", "2023-11-14T22:13:20Z"),
        header("ce_sequence", "12"),
        header("content-type", "application/json"),
    ];
    assert_eq!(decode(Ordering::Sequence, &binary).unwrap(), structured);
    assert_eq!(structured[0].image_id.as_str(), "mug-1");
    assert_eq!(structured[0].sequence, Sequence::from_number(12));
    assert_eq!(structured[0].event_time, DateTime::from_timestamp(1_700_000_000, 0));

    // The value may be the picture itself, and nothing at all where the image is gone.
    binary.headers[7].1 = Some(Bytes::from_static(b"image/jpeg"));
    let inline = Content::Inline(binary.payload.clone().unwrap());
    let event = decode(Ordering::Sequence, &binary).unwrap().remove(0);
    let Change::Upsert { content, .. } = event.change else { panic!("not an upsert") };
    assert_eq!(content, inline);
    binary.headers[1].1 = Some(Bytes::from_static(b"bsap.image.delete"));
    binary.payload = None;
    assert_eq!(decode(Ordering::Sequence, &binary).unwrap()[0].change, Change::Delete);
    let picture = with(
        STRUCTURED,
        &[(
            "\"data\":{\"uri\":\"s3://b/a.jpg\"}",
            "\"datacontenttype\":\"image/png\",\"data_base64\":\"QUI=\"",
        )],
    );
    let event = decode(Ordering::Sequence, &message(None, Some(&picture))).unwrap().remove(0);
    let Change::Upsert { content, .. } = event.change else { panic!("not an upsert") };
    assert_eq!(content, Content::Inline("AB".into()));
}

#[test]
fn cloud_events_that_cannot_be_used_are_told_why() {
    let cases = [
        ("bsap.image.upsert", "com.example.sold", "unknown_kind", "source.cloud_event_types"),
        ("\"1.0\"", "\"0.3\"", "invalid_field", "specversion"),
        ("\"12\"", "\"twelve\"", "invalid_field", "sequence"),
        ("\"subject\"", "\"topic\"", "invalid_field", "image_id"),
        ("\"uri\":", "\"operation\":\"delete\",\"uri\":", "invalid_field", "data.operation"),
        ("2023-11-14", "yesterday", "invalid_field", "time"),
    ];
    for (from, to, code, named) in cases {
        let text = with(STRUCTURED, &[(from, to)]);
        let rejected = decode(Ordering::Sequence, &message(None, Some(&text))).unwrap_err();
        assert_eq!(rejected.code(), code, "{to}");
        assert!(rejected.to_string().contains(named), "{rejected}");
    }
    let mut avro = message(None, Some("{}"));
    avro.headers =
        vec![("content-type".into(), Some(Bytes::from_static(b"application/cloudevents+avro")))];
    assert!(decode(Ordering::Sequence, &avro).is_err());
}

#[test]
fn every_example_is_read_and_fits_its_schema() {
    let examples: BTreeMap<&str, (&str, Ordering)> = BTreeMap::from([
        ("image-event-upsert", ("image-event", Ordering::Sequence)),
        ("image-event-inline", ("image-event", Ordering::EventTime)),
        ("image-event-delete", ("image-event", Ordering::EventTime)),
        ("cloud-event-structured", ("cloud-event", Ordering::EventTime)),
        ("cloud-event-binary", ("cloud-event", Ordering::Sequence)),
        ("s3-notification", ("bucket-notification", Ordering::Sequencer)),
        ("minio-notification", ("bucket-notification", Ordering::Sequencer)),
    ]);
    let folder = "schemas/examples";
    let files = std::fs::read_dir(folder).unwrap().count();
    assert_eq!(files, examples.len(), "an example has no test, or a test no example");
    for (name, (schema, ordering)) in examples {
        let events = decode(ordering, &example(name)).unwrap_or_else(|e| panic!("{name}: {e}"));
        assert!(!events.is_empty(), "{name}");
        let read = |file: String| {
            let text = std::fs::read_to_string(file).unwrap();
            serde_json::from_str::<serde_json::Value>(&text).unwrap()
        };
        let schema = read(format!("schemas/{schema}.schema.json"));
        let mut instance = read(format!("{folder}/{name}.json"));
        if name == "cloud-event-binary" {
            // As it would stand in structured mode.
            let mut whole = serde_json::json!({"data": instance["value"]});
            for (header, value) in instance["headers"].as_object().unwrap() {
                let attribute = header.strip_prefix("ce_").unwrap_or("datacontenttype");
                whole[attribute] = value.clone();
            }
            instance = whole;
        }
        let checked = jsonschema::validate(&schema, &instance);
        assert!(checked.is_ok(), "{name}: {checked:?}");
    }
}

#[test]
fn schemas_are_current() {
    let wanted = [
        ("image-event", schemars::schema_for!(ImageEvent)),
        ("cloud-event", schemars::schema_for!(CloudEvent)),
        ("bucket-notification", schemars::schema_for!(BucketNotification)),
    ];
    for (name, schema) in wanted {
        let file = format!("schemas/{name}.schema.json");
        let found = std::fs::read_to_string(&file).unwrap_or_default();
        let wanted = serde_json::to_string_pretty(&schema).unwrap() + "\n";
        assert!(found == wanted, "{file} is not current: run `just generate`");
    }
}

#[test]
fn what_could_bring_back_a_forgotten_image_is_refused() {
    let decoder = decoder(Ordering::Sequence).remembering(30);
    let upsert = message(None, Some(r#"{"image_id":"a","uri":"u","sequence":1}"#));
    let delete = r#"{"image_id":"a","sequence":2,"operation":"delete"}"#;
    let after = |days: i64| DateTime::from_timestamp(1_700_000_000 + days * 86_400, 0).unwrap();
    assert!(decoder.decode(&upsert, after(29)).is_ok());
    assert_eq!(decoder.decode(&upsert, after(31)).unwrap_err().code(), "too_old");
    assert!(decoder.decode(&message(None, Some(delete)), after(31)).is_ok());
}
