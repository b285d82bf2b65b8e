use std::collections::BTreeMap;

use bytes::Bytes;
use chrono::DateTime;

use super::{
    BucketNotification, CloudEvent, Decoder, EventDecodeError, ImageEvent, canonical_attribute_text,
};
use crate::ingest::source::SourceOptions;
use crate::record::arrays::JsonEmbedding;
use crate::record::{
    AcceptedEvent, AttributeType, AttributeTypes, ImageChange, ImageSource, KafkaMessage,
    SequenceKey, TopicPartition, VersionOrdering,
};

fn new_decoder(ordering: VersionOrdering) -> Decoder {
    let options = SourceOptions {
        ordering,
        image_id_template: "{bucket}/{key}".into(),
        ..SourceOptions::default()
    };
    let attributes = AttributeTypes::from([
        ("colour".into(), AttributeType::Text),
        ("price".into(), AttributeType::Number),
    ]);
    Decoder::new(&options, &attributes)
}

fn message(key: Option<&str>, payload: Option<&str>) -> KafkaMessage {
    KafkaMessage {
        partition: TopicPartition { topic: "images".into(), number: 0 },
        log_number: 0,
        offset: 7,
        key: key.map(|k| Bytes::copy_from_slice(k.as_bytes())),
        payload: payload.map(|p| Bytes::copy_from_slice(p.as_bytes())),
        headers: Vec::new(),
        timestamp_ms: Some(1_700_000_000_000),
    }
}

fn decode_with_ordering(
    ordering: VersionOrdering,
    message: &KafkaMessage,
) -> Result<Vec<AcceptedEvent>, EventDecodeError> {
    let now = DateTime::from_timestamp(1_700_000_000, 0).unwrap();
    new_decoder(ordering).decode(message, now)
}

#[test]
fn declared_attributes_are_stored_as_text() {
    let text = r#"{"image_id":"a","uri":"s3://b/a.jpg","sequence":3,
        "attributes":{"colour":"red","price":9.5,"unknown":1},"future_field":true}"#;
    let events =
        decode_with_ordering(VersionOrdering::Sequence, &message(None, Some(text))).unwrap();
    let ImageChange::Upsert { content, attributes } = &events[0].change else {
        panic!("not an upsert")
    };
    assert_eq!(content, &ImageSource::from_uri("s3://b/a.jpg"));
    assert_eq!(attributes.len(), 2);
    assert_eq!(attributes["price"], "9.5");
    assert_eq!(events[0].sequence, SequenceKey::from_number(3));
}

#[test]
fn a_null_value_with_a_key_is_a_delete() {
    let events = decode_with_ordering(VersionOrdering::Offset, &message(Some("a"), None)).unwrap();
    assert_eq!(events[0].change, ImageChange::Delete);
    assert_eq!(events[0].sequence, SequenceKey::from_number(7));
    assert!(decode_with_ordering(VersionOrdering::Offset, &message(None, None)).is_err());
}

#[test]
fn errors_name_the_invalid_field() {
    let cases = [
        (VersionOrdering::Sequence, r#"{"image_id":"a","uri":"u"}"#, "sequence"),
        (VersionOrdering::EventTime, r#"{"image_id":"a","uri":"u","sequence":1}"#, "event_time"),
        (
            VersionOrdering::EventTime,
            r#"{"image_id":"a","uri":"u","event_time":"2033-01-01T00:00:00Z"}"#,
            "event_time",
        ),
        (VersionOrdering::Sequence, r#"{"image_id":"a","sequence":1}"#, "uri"),
        (
            VersionOrdering::Sequence,
            r#"{"image_id":"a","uri":"u","data":"QQ==","sequence":1}"#,
            "data",
        ),
        (VersionOrdering::Sequence, r#"{"image_id":"a","data":"@","sequence":1}"#, "data"),
        (VersionOrdering::Sequence, r#"{"image_id":"","uri":"u","sequence":1}"#, "image_id"),
        (VersionOrdering::Sequence, r#"{"uri":"u","sequence":1}"#, "image_id"),
        (VersionOrdering::Sequence, r#"{"image_id":"a","uri":"u","sequence":-1}"#, "sequence"),
        (VersionOrdering::Offset, r#"{"image_id":"b","uri":"u"}"#, "key"),
        (
            VersionOrdering::Sequence,
            r#"{"image_id":"a","uri":"u","sequence":1,"attributes":{"price":"x"}}"#,
            "attributes.price",
        ),
        (
            VersionOrdering::Sequence,
            r#"{"image_id":"a","uri":"u","sequence":1,"operation":"merge"}"#,
            "operation",
        ),
    ];
    for (ordering, text, field) in cases {
        match decode_with_ordering(ordering, &message(Some("a"), Some(text))) {
            Err(EventDecodeError::InvalidField(invalid)) => {
                assert_eq!(invalid.field, field, "{text}");
            }
            other => panic!("{text}: {other:?}"),
        }
    }
}

#[test]
fn an_embedding_comes_with_its_model_and_without_bytes() {
    let decode =
        |text: &str| decode_with_ordering(VersionOrdering::Sequence, &message(None, Some(text)));
    let text =
        r#"{"image_id":"a","sequence":1,"embedding":[1,2],"model":"ab","uri":"s3://b/a.jpg"}"#;
    let events = decode(text).unwrap();
    let ImageChange::Embedded { embedding, model, uri, attributes } = &events[0].change else {
        panic!("{events:?}")
    };
    assert_eq!(*embedding, JsonEmbedding::Numbers(vec![1.0, 2.0]));
    assert_eq!((model.as_str(), uri.as_deref()), ("ab", Some("s3://b/a.jpg")));
    assert!(attributes.is_empty());
    for (from, to, field) in [
        (r#","model":"ab""#, "", "model"),
        (r#""uri":"s3://b/a.jpg""#, r#""data":"aGk=""#, "embedding"),
        ("[1,2]", "7", "embedding"),
        ("[1,2]", r#"[1,"x"]"#, "embedding[1]"),
    ] {
        let rejected = decode(&with_replacements(text, &[(from, to)])).unwrap_err();
        assert!(rejected.to_string().starts_with(&format!("{field}: ")), "{rejected}");
    }
    let deleted =
        with_replacements(text, &[(r#""sequence""#, r#""operation":"delete","sequence""#)]);
    assert_eq!(decode(&deleted).unwrap()[0].change, ImageChange::Delete);
}

#[test]
fn malformed_payloads_are_rejected() {
    for text in ["", "null", "[]", "hello", "{\"a\":", "\u{0}"] {
        let rejected = decode_with_ordering(VersionOrdering::Sequence, &message(None, Some(text)))
            .unwrap_err();
        assert_eq!(rejected.code(), "unknown_format", "{text}");
    }
}

/// Reads an example of `schemas/examples` as a message.
fn example_message(name: &str) -> KafkaMessage {
    let file = format!("schemas/examples/{name}.json");
    let text = std::fs::read_to_string(file).unwrap();
    let value: serde_json::Value = serde_json::from_str(&text).unwrap();
    let Some(headers) = value.get("headers") else { return message(None, Some(&text)) };
    let headers = headers.as_object().unwrap().iter().map(|(name, value)| {
        (name.clone(), Some(Bytes::copy_from_slice(value.as_str().unwrap().as_bytes())))
    });
    KafkaMessage { headers: headers.collect(), ..message(None, Some(&value["value"].to_string())) }
}

fn with_replacements(text: &str, changes: &[(&str, &str)]) -> String {
    changes.iter().fold(text.to_owned(), |text, (from, to)| {
        assert!(text.contains(from), "{from}");
        text.replace(from, to)
    })
}

const S3_NOTIFICATION: &str = r#"{"Records":[{"eventVersion":"2.1","eventName":"ObjectCreated:Put",
    "eventTime":"2023-11-14T22:13:20.123Z","s3":{"bucket":{"name":"photos"},
    "object":{"key":"red+mugs/a%26b%2B%C3%A9.jpg","size":7,"versionId":"v1","sequencer":"0055AED6DC"}}}]}"#;

#[test]
fn bucket_notifications_become_upserts_and_deletes() {
    let decode_one = |text: &str| {
        let mut events =
            decode_with_ordering(VersionOrdering::Sequencer, &message(None, Some(text))).unwrap();
        assert_eq!(events.len(), 1);
        events.remove(0)
    };
    let uri = "s3://photos/red%20mugs/a&b+%C3%A9.jpg";
    let created = decode_one(S3_NOTIFICATION);
    assert_eq!(created.image_id.as_str(), "photos/red mugs/a&b+é.jpg");
    assert_eq!(created.sequence, SequenceKey::from_sequencer("0055AED6DC00").unwrap());
    let ImageChange::Upsert { content, .. } = created.change else { panic!("not an upsert") };
    assert_eq!(content, ImageSource::Uri { uri: uri.into(), version: Some("v1".into()) });

    // MinIO prefixes the event name with `s3:`, and writes `null` if the bucket is not versioned.
    let unversioned = [("ObjectCreated:Put", "s3:ObjectRemoved:Delete"), ("\"v1\"", "\"null\"")];
    assert_eq!(
        decode_one(&with_replacements(S3_NOTIFICATION, &unversioned)).change,
        ImageChange::Delete
    );
    let marker = [("ObjectCreated:Put", "ObjectRemoved:DeleteMarkerCreated")];
    assert_eq!(
        decode_one(&with_replacements(S3_NOTIFICATION, &marker)).change,
        ImageChange::Delete
    );
    // One version was deleted permanently: the newest version may be another one.
    let version = [("ObjectCreated:Put", "LifecycleExpiration:Delete")];
    assert_eq!(
        decode_one(&with_replacements(S3_NOTIFICATION, &version)).change,
        ImageChange::Recheck { content: ImageSource::from_uri(uri) }
    );

    let folder = with_replacements(S3_NOTIFICATION, &[("a%26b%2B%C3%A9.jpg", "")]);
    for without_image in [folder.as_str(), r#"{"Service":"Amazon S3","Event":"s3:TestEvent"}"#] {
        assert_eq!(
            decode_with_ordering(VersionOrdering::Sequencer, &message(None, Some(without_image))),
            Ok(Vec::new())
        );
    }
}

#[test]
fn keys_are_read_as_the_bucket_has_them() {
    for (source, written, key) in [
        ("aws:s3", "red+mugs%2Fa%2B%2525.jpg", "red mugs/a+%25.jpg"),
        ("aws:s3", "a%2F%2Fb.jpg", "a//b.jpg"),
        ("minio:s3", "%2Fa.jpg", "/a.jpg"),
        // Ceph does not encode keys.
        ("ceph:s3", "red+mugs/a%2B.jpg", "red+mugs/a%2B.jpg"),
        ("ceph:s3", "a//b é.jpg", "a//b é.jpg"),
        // Nor do some others, which shows if the key has a character that is always encoded.
        ("other:s3", "a b+c.jpg", "a b+c.jpg"),
        ("other:s3", "é+%20.jpg", "é+%20.jpg"),
    ] {
        let key_json = serde_json::to_string(written).unwrap();
        let text = with_replacements(
            S3_NOTIFICATION,
            &[
                ("\"red+mugs/a%26b%2B%C3%A9.jpg\"", &key_json),
                ("{\"eventVersion\"", &format!("{{\"eventSource\":\"{source}\",\"eventVersion\"")),
            ],
        );
        let event = decode_with_ordering(VersionOrdering::Sequencer, &message(None, Some(&text)))
            .unwrap()
            .remove(0);
        assert_eq!(event.image_id.as_str(), format!("photos/{key}"));
        let ImageChange::Upsert { content: ImageSource::Uri { uri, .. }, .. } = event.change else {
            panic!("not an upsert with an address")
        };
        let url = crate::store::parse_object_url(&uri).unwrap();
        assert_eq!(crate::store::key_of_url(&url).unwrap(), key);
    }
}

#[test]
fn one_invalid_record_rejects_its_message_and_is_named() {
    let record = S3_NOTIFICATION.trim_start_matches("{\"Records\":[").trim_end_matches("]}");
    let cases = [
        ("ObjectCreated:Put", "ObjectRestore:Completed", "unknown_event_type"),
        ("\"key\"", "\"clef\"", "invalid_field"),
        ("red+mugs", "..", "invalid_field"),
        ("0055AED6DC", "noon", "invalid_field"),
        ("%C3%A9", "%C3", "invalid_field"),
        ("\"photos\"", "\"a/b\"", "invalid_field"),
    ];
    for (from, to, code) in cases {
        let text =
            format!("{{\"Records\":[{record},{}]}}", with_replacements(record, &[(from, to)]));
        let rejected =
            decode_with_ordering(VersionOrdering::Sequencer, &message(None, Some(&text)))
                .unwrap_err();
        assert_eq!((rejected.code(), rejected.record_index()), (code, Some(1)), "{to}");
    }
    let rejected =
        decode_with_ordering(VersionOrdering::Sequence, &message(None, Some(S3_NOTIFICATION)))
            .unwrap_err();
    assert_eq!(rejected.to_string().split(':').nth(1), Some(" sequence"), "{rejected}");
    let missing = with_replacements(S3_NOTIFICATION, &[("\"name\"", "\"nom\"")]);
    let missing = decode_with_ordering(VersionOrdering::Sequencer, &message(None, Some(&missing)))
        .unwrap_err();
    assert_eq!(missing.to_string(), "record 0: s3.bucket.name: is missing");
}

const STRUCTURED_CLOUD_EVENT: &str = r#"{"specversion":"1.0","type":"bsap.image.upsert","source":"/shop","id":"1",
    "subject":"mug-1","time":"2023-11-14T22:13:20Z","sequence":"12","data":{"uri":"s3://b/a.jpg"}}"#;

#[test]
fn cloud_events_decode_in_both_modes() {
    let structured = decode_with_ordering(
        VersionOrdering::Sequence,
        &message(None, Some(STRUCTURED_CLOUD_EVENT)),
    )
    .unwrap();
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
    assert_eq!(decode_with_ordering(VersionOrdering::Sequence, &binary).unwrap(), structured);
    assert_eq!(structured[0].image_id.as_str(), "mug-1");
    assert_eq!(structured[0].sequence, SequenceKey::from_number(12));
    assert_eq!(structured[0].event_time, DateTime::from_timestamp(1_700_000_000, 0));

    // The value may be the bytes of the image, and empty for a delete.
    binary.headers[7].1 = Some(Bytes::from_static(b"image/jpeg"));
    let inline = ImageSource::Inline(binary.payload.clone().unwrap());
    let event = decode_with_ordering(VersionOrdering::Sequence, &binary).unwrap().remove(0);
    let ImageChange::Upsert { content, .. } = event.change else { panic!("not an upsert") };
    assert_eq!(content, inline);
    binary.headers[1].1 = Some(Bytes::from_static(b"bsap.image.delete"));
    binary.payload = None;
    assert_eq!(
        decode_with_ordering(VersionOrdering::Sequence, &binary).unwrap()[0].change,
        ImageChange::Delete
    );
    let inline = with_replacements(
        STRUCTURED_CLOUD_EVENT,
        &[(
            "\"data\":{\"uri\":\"s3://b/a.jpg\"}",
            "\"datacontenttype\":\"image/png\",\"data_base64\":\"QUI=\"",
        )],
    );
    let event = decode_with_ordering(VersionOrdering::Sequence, &message(None, Some(&inline)))
        .unwrap()
        .remove(0);
    let ImageChange::Upsert { content, .. } = event.change else { panic!("not an upsert") };
    assert_eq!(content, ImageSource::Inline("AB".into()));
}

#[test]
fn unusable_cloud_events_are_rejected_with_a_reason() {
    let cases = [
        ("bsap.image.upsert", "com.example.sold", "unknown_event_type", "source.cloud_event_types"),
        ("\"1.0\"", "\"0.3\"", "invalid_field", "specversion"),
        ("\"12\"", "\"twelve\"", "invalid_field", "sequence"),
        ("\"subject\"", "\"topic\"", "invalid_field", "image_id"),
        ("\"uri\":", "\"operation\":\"delete\",\"uri\":", "invalid_field", "data.operation"),
        ("2023-11-14", "yesterday", "invalid_field", "time"),
    ];
    for (from, to, code, mentioned) in cases {
        let text = with_replacements(STRUCTURED_CLOUD_EVENT, &[(from, to)]);
        let rejected = decode_with_ordering(VersionOrdering::Sequence, &message(None, Some(&text)))
            .unwrap_err();
        assert_eq!(rejected.code(), code, "{to}");
        assert!(rejected.to_string().contains(mentioned), "{rejected}");
    }
    let mut avro = message(None, Some("{}"));
    avro.headers =
        vec![("content-type".into(), Some(Bytes::from_static(b"application/cloudevents+avro")))];
    assert!(decode_with_ordering(VersionOrdering::Sequence, &avro).is_err());
}

#[test]
fn every_example_decodes_and_matches_its_schema() {
    let examples: BTreeMap<&str, (&str, VersionOrdering)> = BTreeMap::from([
        ("image-event-upsert", ("image-event", VersionOrdering::Sequence)),
        ("image-event-inline", ("image-event", VersionOrdering::EventTime)),
        ("image-event-delete", ("image-event", VersionOrdering::EventTime)),
        ("image-event-embedding", ("image-event", VersionOrdering::EventTime)),
        ("cloud-event-structured", ("cloud-event", VersionOrdering::EventTime)),
        ("cloud-event-binary", ("cloud-event", VersionOrdering::Sequence)),
        ("s3-notification", ("bucket-notification", VersionOrdering::Sequencer)),
        ("minio-notification", ("bucket-notification", VersionOrdering::Sequencer)),
    ]);
    let folder = "schemas/examples";
    let files = std::fs::read_dir(folder).unwrap().count();
    assert_eq!(files, examples.len(), "an example has no test, or a test has no example");
    for (name, (schema, ordering)) in examples {
        let events = decode_with_ordering(ordering, &example_message(name))
            .unwrap_or_else(|e| panic!("{name}: {e}"));
        assert!(!events.is_empty(), "{name}");
        let read_json = |file: String| {
            let text = std::fs::read_to_string(file).unwrap();
            serde_json::from_str::<serde_json::Value>(&text).unwrap()
        };
        let schema = read_json(format!("schemas/{schema}.schema.json"));
        let mut instance = read_json(format!("{folder}/{name}.json"));
        if name == "cloud-event-binary" {
            // The schema describes structured mode: convert the headers to attributes.
            let mut structured = serde_json::json!({"data": instance["value"]});
            for (header, value) in instance["headers"].as_object().unwrap() {
                let attribute = header.strip_prefix("ce_").unwrap_or("datacontenttype");
                structured[attribute] = value.clone();
            }
            instance = structured;
        }
        let validated = jsonschema::validate(&schema, &instance);
        assert!(validated.is_ok(), "{name}: {validated:?}");
    }
}

#[test]
fn schemas_are_current() {
    let schemas = [
        ("image-event", schemars::schema_for!(ImageEvent)),
        ("cloud-event", schemars::schema_for!(CloudEvent)),
        ("bucket-notification", schemars::schema_for!(BucketNotification)),
    ];
    for (name, schema) in schemas {
        let file = format!("schemas/{name}.schema.json");
        let current = std::fs::read_to_string(&file).unwrap_or_default();
        let generated = serde_json::to_string_pretty(&schema).unwrap() + "\n";
        assert!(current == generated, "{file} is not current: run `just generate`");
    }
}

#[test]
fn whole_floats_are_integers_and_keys_may_be_in_quotes() {
    for (value, text) in [
        ("2020.0", Some("2020")),
        ("-3e2", Some("-300")),
        ("2020.5", None),
        ("1e300", None),
        ("\"2020\"", None),
    ] {
        let value = serde_json::from_str(value).unwrap();
        let found = canonical_attribute_text(AttributeType::Integer, &value);
        assert_eq!(found.as_deref(), text, "{value}");
    }
    for (key, id) in [("a.jpg", "a.jpg"), ("\"a.jpg\"", "a.jpg"), ("\"half", "\"half")] {
        for ordering in [VersionOrdering::Offset, VersionOrdering::EventTime] {
            let tombstone = KafkaMessage { timestamp_ms: Some(1), ..message(Some(key), None) };
            let events = decode_with_ordering(ordering, &tombstone).unwrap();
            assert_eq!(events[0].image_id.as_str(), id);
            assert_eq!(events[0].change, ImageChange::Delete);
        }
    }
}

#[test]
fn upserts_older_than_tombstones_are_rejected() {
    let decoder = new_decoder(VersionOrdering::Sequence).with_tombstone_retention_days(30);
    let upsert = message(None, Some(r#"{"image_id":"a","uri":"u","sequence":1}"#));
    let delete = r#"{"image_id":"a","sequence":2,"operation":"delete"}"#;
    let after = |days: i64| DateTime::from_timestamp(1_700_000_000 + days * 86_400, 0).unwrap();
    assert!(decoder.decode(&upsert, after(29)).is_ok());
    assert_eq!(decoder.decode(&upsert, after(31)).unwrap_err().code(), "too_old");
    assert!(decoder.decode(&message(None, Some(delete)), after(31)).is_ok());
}
