//! Any body of `POST /v1/search`, answered over a small catalogue: hits or a refusal that names a
//! field.

#![no_main]

use std::collections::BTreeMap;
use std::sync::{Arc, LazyLock};

use bsap::clip::{ClipError, ModelCard, Pixels, Towers};
use bsap::serve::http::SearchRequest;
use bsap::balance::normalise::Normaliser;
use bsap::prompts::PromptSet;
use bsap::record::{AttributeType, AttributeTypes, Embedding, Image, ImageId, Row, Sequence};
use bsap::search::{Engine, Options, Query, Route, Served};
use bsap::table::{Changes, Part};
use bsap::catalogue::Serving;
use image::RgbImage;
use libfuzzer_sys::fuzz_target;

const K: usize = 20;

/// Every text and picture in the same direction, more or less.
struct Constant(ModelCard);

impl Towers for Constant {
    fn card(&self) -> &ModelCard {
        &self.0
    }
    fn prepare(&self, _: &RgbImage) -> Result<Pixels, ClipError> {
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
    let towers = Arc::new(Constant(ModelCard::stand_in("constant", 4)));
    let set = PromptSet::new("two", vec!["one".into(), "four".into()]);
    let set = Arc::new(set.embed(&*towers, 2).expect("a set"));
    let serving = Serving::new(set.key.clone(), Normaliser::Softmax, 0.5);
    let served = Served {
        revision: 1,
        generation: "g".into(),
        name: "live".into(),
        stands_as: Route::Live,
        sets: vec![set],
        serving,
        candidate: None,
    };
    let declared = AttributeTypes::from([
        ("colour".into(), AttributeType::Text),
        ("price".into(), AttributeType::Number),
    ]);
    let options = Options { max_k: K, ..Options::default() };
    let engine = Engine::new(towers, served, options).reading(declared, Default::default());
    let row = |i: u64| Row {
        image_id: ImageId::new(format!("image-{i}")).expect("an id"),
        sequence: Sequence::from_number(1),
        event_time: None,
        embedded_at: chrono::DateTime::UNIX_EPOCH,
        image: Some(Image {
            uri: None,
            content_hash: "00".repeat(32),
            bytes: 9,
            width: 1,
            height: 1,
            attributes: BTreeMap::from([
                ("colour".into(), ["red", "blue"][i as usize % 2].into()),
                ("price".into(), format!("{i}")),
            ]),
            embedding: Embedding::round(&[0.5, 0.5, -0.5, 0.5 - i as f32 / 50.0]),
            statistics: BTreeMap::new(),
        }),
    };
    let changes = Changes {
        version: 1,
        whole: true,
        part: Part::All,
        rows: (0..50).map(row).collect(),
        statistics: Vec::new(),
    };
    let runtime = tokio::runtime::Builder::new_current_thread().build().expect("a runtime");
    runtime.block_on(engine.snapshots().apply(changes)).expect("a small catalogue");
    engine
});

fuzz_target!(|data: &[u8]| {
    let Ok(request) = serde_json::from_slice::<SearchRequest>(data) else { return };
    match Query::try_from(request).and_then(|query| ENGINE.search(&query)) {
        Ok(results) => {
            assert!(results.hits.len() <= K && results.matched <= results.scanned);
            assert!(
                results.hits.iter().all(|hit| hit.score.is_finite() && hit.raw_score.is_finite())
            );
        }
        Err(error) => assert!(!error.to_string().is_empty()),
    }
});
