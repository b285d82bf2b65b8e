//! Clients that query, and the answers that they should get: computed independently of the search engine.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use bsap::balance::normalise::{BalanceParameters, Normaliser, ScaleConstants};
use bsap::clip::{self, ClipModel, Encoders};
use bsap::ingest::decode::{DecodeOptions, decode_image};
use bsap::prompts::{EmbeddedPromptSet, PromptOptions, PromptSet};
use bsap::record::{Embedding, to_hex};
use bsap::serve::http::SearchResponse;
use serde_json::{Value, json};
use sha2::{Digest, Sha256};
use tokio::time::sleep;

const QUERY_TEXTS: [&str; 6] =
    ["a red mug", "blue", "a striped lamp", "two chairs", "a shoe", "wood"];

/// Embeddings and statistics of one model for all queries and images.
pub struct ExpectedModel {
    pub generation: String,
    /// Embeddings of [`QUERY_TEXTS`].
    texts: Vec<Vec<f32>>,
    /// Embeddings by content hash.
    images: BTreeMap<String, Embedding>,
    sets: BTreeMap<&'static str, EmbeddedPromptSet>,
}

impl ExpectedModel {
    /// `other_set`: file of the prompt set `other`.
    pub fn load(checkpoint: &str, other_set: &Path, images: &[Vec<u8>]) -> Self {
        let options =
            clip::ModelOptions { checkpoint: checkpoint.into(), ..clip::ModelOptions::default() };
        let model = ClipModel::load(&options).unwrap();
        let embed = |bytes: &Vec<u8>| {
            let image = decode_image(bytes, &DecodeOptions::default()).unwrap();
            let pixels = model.preprocess_image(&image).unwrap();
            let embedding = model.embed_images(&[pixels]).unwrap().remove(0);
            (to_hex(&Sha256::digest(bytes)), Embedding::from_unit_vector(&embedding))
        };
        let settings = PromptOptions::default().statistics_settings();
        let set = |name: &str| {
            PromptSet::load_builtin_or_file(name).unwrap().embed(&model, settings).unwrap()
        };
        Self {
            generation: model.card().fingerprint[..16].to_owned(),
            texts: model.embed_texts(&QUERY_TEXTS).unwrap(),
            images: images.iter().map(embed).collect(),
            sets: [("demo", set("demo")), ("other", set(other_set.to_str().unwrap()))].into(),
        }
    }
}

/// Configurations by name: index of the model, prompt set, weight.
pub type Configurations = BTreeMap<&'static str, (usize, &'static str, f32)>;

pub struct ExpectedAnswers {
    pub models: [ExpectedModel; 2],
    pub configurations: Configurations,
}

impl ExpectedAnswers {
    /// Returns how an answer differs from the one of its configuration; `None` if it does not.
    fn find_mismatch(&self, text: usize, answer: &SearchResponse) -> Option<String> {
        let configuration = self.configurations.get(answer.configuration.as_str());
        let Some((model, set, weight)) = configuration else {
            return Some(format!("configuration {}", answer.configuration));
        };
        let model = &self.models[*model];
        let set = &model.sets[set];
        let (generation, key) = (&model.generation, &set.statistics_key);
        if (&answer.generation, &answer.prompt_set, answer.weight) != (generation, key, *weight) {
            return Some(format!(
                "{} by {} {}",
                answer.configuration, answer.generation, answer.prompt_set
            ));
        }
        let (normaliser, lambda, scale) = (Normaliser::Nnn, 1.0, ScaleConstants::default());
        let balance = BalanceParameters { normaliser, weight: *weight, lambda, scale };
        for hit in &answer.hits {
            let embedding = &model.images[&hit.image.content_hash];
            let raw: f32 =
                model.texts[text].iter().zip(embedding.values()).map(|(a, b)| a * b).sum();
            let affine = balance
                .affine_transform(&set.compute_statistics(embedding).unwrap(), set.softmax_scale());
            let differs = (raw - hit.raw_score).abs() > 5e-3
                || (affine.alpha - hit.alpha).abs() > 1e-2
                || (affine.apply(raw) - hit.score).abs() > 1e-2;
            if differs {
                return Some(format!(
                    "{} of {}: raw {raw} and {}, score {} and {}",
                    hit.image.image_id,
                    answer.configuration,
                    hit.raw_score,
                    affine.apply(raw),
                    hit.score
                ));
            }
        }
        None
    }
}

/// The answers that clients received.
#[derive(Default)]
pub struct ObservedAnswers {
    /// Number of answers by generation and configuration.
    pub answers: Mutex<BTreeMap<(String, String), u64>>,
    /// Queries answered by the second address, because the first did not.
    pub retried: AtomicU64,
    pub failed: Mutex<Vec<String>>,
    pub mismatches: Mutex<Vec<String>>,
}

/// Queries two query workers alternately, and the other one if the first does not answer.
pub async fn query_until_stopped(
    addresses: [String; 2],
    expected: Arc<ExpectedAnswers>,
    observed: Arc<ObservedAnswers>,
    stop: Arc<AtomicBool>,
) {
    let client = reqwest::Client::builder().timeout(Duration::from_secs(20)).build().unwrap();
    let mut number = 0usize;
    while !stop.load(Ordering::SeqCst) {
        number += 1;
        let text = number % QUERY_TEXTS.len();
        let body = json!({"text": QUERY_TEXTS[text], "k": 10, "traffic_key": format!("user-{}", number % 97)});
        let mut problems = Vec::new();
        for attempt in 0..2 {
            let address = &addresses[(number + attempt) % 2];
            match post_search(&client, address, &body).await {
                Ok(answer) => {
                    observed.retried.fetch_add(attempt as u64, Ordering::SeqCst);
                    observed
                        .mismatches
                        .lock()
                        .unwrap()
                        .extend(expected.find_mismatch(text, &answer));
                    let answered_by = (answer.generation, answer.configuration);
                    *observed.answers.lock().unwrap().entry(answered_by).or_default() += 1;
                    problems.clear();
                    break;
                }
                Err(problem) => problems.push(problem),
            }
        }
        if !problems.is_empty() {
            observed.failed.lock().unwrap().push(problems.join("; "));
        }
        sleep(Duration::from_millis(20)).await;
    }
}

async fn post_search(
    client: &reqwest::Client,
    address: &str,
    body: &Value,
) -> Result<SearchResponse, String> {
    let request = client.post(format!("http://{address}/v1/search"));
    let request = request.header("content-type", "application/json").body(body.to_string());
    let response = request.send().await.map_err(|e| format!("{address}: {e:?}"))?;
    let (status, text) = (response.status(), response.text().await.map_err(|e| e.to_string())?);
    if !status.is_success() {
        return Err(format!("{address}: {status}: {text}"));
    }
    serde_json::from_str(&text).map_err(|e| format!("{address}: {e}: {text}"))
}
