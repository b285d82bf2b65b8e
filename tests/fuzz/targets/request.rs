//! An arbitrary body of `POST /v1/search` or `POST /v1/rerank`, answered over a small catalogue: hits or ranked
//! candidates, or an error that names a field.

#![no_main]

use std::collections::BTreeMap;
use std::sync::{Arc, LazyLock};

use bsap::balance::normalise::Normaliser;
use bsap::balance::statistics::StatisticsSettings;
use bsap::catalogue::ServingConfig;
use bsap::clip::{ClipError, Encoders, ModelCard, Pixels};
use bsap::prompts::PromptSet;
use bsap::record::{
    AttributeType, AttributeTypes, Embedding, ImageId, ImageRow, SequenceKey, StoredImage,
};
use bsap::search::{Engine, Query, SearchOptions, ServingRole, ServingSnapshot};
use bsap::serve::http::{RerankRequest, SearchRequest};
use bsap::table::{SnapshotPart, TableChanges};
use image::RgbImage;
use libfuzzer_sys::fuzz_target;
use tokio_util::sync::CancellationToken;

const MAX_RESULTS: usize = 20;

/// A model that gives all images the same embedding, and texts one of two.
struct ConstantEncoders(ModelCard);

impl Encoders for ConstantEncoders {
    fn card(&self) -> &ModelCard {
        &self.0
    }
    fn preprocess_image(&self, _: &RgbImage) -> Result<Pixels, ClipError> {
        Ok(Pixels(Vec::new()))
    }
    fn embed_images(&self, batch: &[Pixels]) -> Result<Vec<Vec<f32>>, ClipError> {
        Ok(vec![vec![0.5; 4]; batch.len()])
    }
    fn embed_texts(&self, texts: &[&str]) -> Result<Vec<Vec<f32>>, ClipError> {
        let unit =
            |text: &&str| if text.len() % 2 == 0 { vec![0.5; 4] } else { vec![1.0, 0.0, 0.0, 0.0] };
        Ok(texts.iter().map(unit).collect())
    }
}

static ENGINE: LazyLock<Engine> = LazyLock::new(|| {
    let encoders = Arc::new(ConstantEncoders(ModelCard::without_checkpoint("constant", 4)));
    let set = PromptSet::new("two", vec!["one".into(), "four".into()]);
    let set = Arc::new(set.embed(&*encoders, StatisticsSettings::with_top_k(2)).expect("a set"));
    let serving = ServingConfig::new(set.statistics_key.clone(), Normaliser::Softmax, 0.5);
    let served = ServingSnapshot {
        state_revision: 1,
        generation_id: "g".into(),
        configuration_name: "live".into(),
        role: ServingRole::Live,
        prompt_sets: vec![set],
        serving,
        candidate: None,
    };
    let declared = AttributeTypes::from([
        ("colour".into(), AttributeType::Text),
        ("price".into(), AttributeType::Number),
    ]);
    let options = SearchOptions { max_k: MAX_RESULTS, ..SearchOptions::default() };
    let engine = Engine::new(encoders, served, options)
        .with_attributes_and_decoding(declared, Default::default());
    let row = |i: u64| ImageRow {
        image_id: ImageId::new(format!("image-{i}")).expect("an id"),
        sequence: SequenceKey::from_number(1),
        event_time: None,
        embedded_at: chrono::DateTime::UNIX_EPOCH,
        image: Some(StoredImage {
            uri: None,
            content_hash: "00".repeat(32),
            byte_size: 9,
            width: 1,
            height: 1,
            attributes: BTreeMap::from([
                ("colour".into(), ["red", "blue"][i as usize % 2].into()),
                ("price".into(), format!("{i}")),
            ]),
            embedding: Embedding::from_unit_vector(&[0.5, 0.5, -0.5, 0.5 - i as f32 / 50.0]),
            statistics: BTreeMap::new(),
            decoding: None,
        }),
    };
    let changes = TableChanges {
        table_version: 1,
        is_full_snapshot: true,
        part: SnapshotPart::All,
        rows: (0..50).map(row).collect(),
    };
    let runtime = tokio::runtime::Builder::new_current_thread().build().expect("a runtime");
    runtime.block_on(engine.snapshots().apply_changes(changes)).expect("a small catalogue");
    engine
});

/// Ranks the candidates of a request: none is dropped and none is added.
fn rerank(request: RerankRequest) {
    let ranked = request.into_parts().and_then(|(query, candidates, explain)| {
        let candidates: Arc<[_]> = candidates.into();
        let results = ENGINE.rerank(&query, &candidates, explain, &CancellationToken::new())?;
        Ok((candidates.len(), results))
    });
    match ranked {
        Ok((count, results)) => {
            assert_eq!(results.images.len() + results.unknown_ids.len(), count);
            for (i, image) in results.images.iter().enumerate() {
                assert_eq!(image.balanced.rank, i + 1);
                assert!(image.raw.score.is_finite() && image.balanced.score.is_finite());
            }
        }
        Err(error) => assert!(!error.to_string().is_empty()),
    }
}

fuzz_target!(|data: &[u8]| {
    if let Ok(request) = serde_json::from_slice(data) {
        rerank(request);
    }
    let Ok(request) = serde_json::from_slice::<SearchRequest>(data) else { return };
    match Query::try_from(request).and_then(|query| ENGINE.search(&query)) {
        Ok(results) => {
            assert!(
                results.hits.len() <= MAX_RESULTS
                    && results.matched_image_count <= results.scanned_image_count
            );
            assert!(
                results.hits.iter().all(|hit| hit.score.is_finite() && hit.raw_score.is_finite())
            );
        }
        Err(error) => assert!(!error.to_string().is_empty()),
    }
});
