//! Events that carry an embedding: another team's workers have computed it.

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use half::f16;

use super::*;

#[tokio::test(flavor = "multi_thread")]
async fn embeddings_of_events_are_stored_or_dead_lettered_and_obey_the_order_of_versions() {
    let fixture = Fixture::with_partitions(2);
    let model = fixture.encoders.card().fingerprint.clone();
    let embedding = fixture.encoders.embed_texts(&["a red mug"]).unwrap().remove(0);
    let halves: Vec<u8> =
        embedding.iter().flat_map(|value| f16::from_f32(*value).to_le_bytes()).collect();
    let floats: Vec<u8> = embedding.iter().flat_map(|value| value.to_le_bytes()).collect();
    let longer: Vec<f32> = embedding.iter().map(|value| value * 3.0).collect();
    let event = |id: &str, sequence: u64, embedding: Value| {
        json!({
            "image_id": id, "sequence": sequence, "model": model, "embedding": embedding,
            "attributes": {"colour": "red"},
        })
    };
    for (id, form) in [
        ("halves", json!(STANDARD.encode(&halves))),
        ("floats", json!(STANDARD.encode(&floats))),
        ("numbers", json!(longer)),
    ] {
        fixture.send_event(event(id, 2, form)).await;
    }
    let mut with_address = event("halves", 3, json!(longer));
    with_address["uri"] = json!("s3://photos/mug.jpg");
    fixture.send_event(with_address).await;
    fixture.send_event(event("halves", 1, json!(longer))).await;
    fixture.send_event(event("deleted", 1, json!(longer))).await;
    let delete = json!({"image_id": "deleted", "operation": "delete", "sequence": 2});
    fixture.send_event(delete).await;
    let mut other_model = event("other", 1, json!(longer));
    other_model["model"] = json!("ab".repeat(32));
    fixture.send_event(other_model).await;
    fixture.send_event(event("short", 1, json!([1.0, 2.0]))).await;
    let nan: Vec<u8> = vec![0xff; 4 * embedding.len()];
    fixture.send_event(event("nan", 1, json!(STANDARD.encode(nan)))).await;
    let mut unnamed = event("unnamed", 1, json!(longer));
    unnamed.as_object_mut().unwrap().remove("model");
    fixture.send_event(unnamed).await;

    let token = CancellationToken::new();
    let (progress, running) = fixture.start_worker(&token).await;
    wait_until("all messages are processed", || {
        progress.stored_rows.load(AtomicOrdering::Relaxed) == 7
            && progress.dead_lettered_messages.load(AtomicOrdering::Relaxed) == 4
    })
    .await;
    token.cancel();
    assert!(running.await.unwrap(), "drained");

    let snapshot = fixture.load_engine().await.snapshots().newest();
    assert_eq!(snapshot.len(), 3);
    for id in ["halves", "floats", "numbers"] {
        let stored = snapshot.embedding(id).unwrap();
        for (stored, sent) in stored.values().iter().zip(&embedding) {
            assert!((stored - sent).abs() < 1e-3, "{id}");
        }
        let key = &fixture.sets[0].statistics_key;
        let statistics = fixture.sets[0].compute_statistics(&stored).unwrap();
        assert_eq!(snapshot.statistics(id, key), Some(statistics), "{id}");
    }
    let newest = snapshot.metadata("halves").unwrap();
    assert_eq!(newest.uri.as_deref(), Some("s3://photos/mug.jpg"));
    assert_eq!((newest.width, newest.content_hash.as_str()), (0, ""));
    assert_eq!(newest.attributes, BTreeMap::from([("colour".into(), "red".into())]));
    let mut codes = read_dead_letter_codes(&fixture);
    codes.sort();
    let expected =
        ["embedding_invalid", "embedding_invalid", "embedding_of_other_model", "invalid_field"];
    assert_eq!(codes, expected);
}
