//! What clients ask and see, and what they should: computed apart from what is tested.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use bsap::balance::normalise::{BalanceParameters, Normaliser, ScaleConstants};
use bsap::clip::{self, ClipModel, Encoders};
use bsap::prompts::{EmbeddedPromptSet, PromptSet};
use bsap::record::{Embedding, to_hex};
use bsap::serve::http::SearchResponse;
use serde_json::{Value, json};
use sha2::{Digest, Sha256};
use tokio::time::sleep;

const QUERY_TEXTS: [&str; 6] =
    ["a red mug", "blue", "a striped lamp", "two chairs", "a shoe", "wood"];

/// What a model makes of texts and pictures, computed apart from what is tested.
pub struct ExpectedModel {
    pub generation: String,
    logit_scale: f32,
    texts: Vec<Vec<f32>>,
    pictures: BTreeMap<String, Embedding>,
    sets: BTreeMap<&'static str, EmbeddedPromptSet>,
}

impl ExpectedModel {
    pub fn load(checkpoint: &str, other: &Path, pictures: &[Vec<u8>]) -> Self {
        let options =
            clip::ModelOptions { checkpoint: checkpoint.into(), ..clip::ModelOptions::default() };
        let towers = ClipModel::load(&options).unwrap();
        let embed = |bytes: &Vec<u8>| {
            let pixels = towers
                .preprocess_image(&image::load_from_memory(bytes).unwrap().to_rgb8())
                .unwrap();
            let embedding = towers.embed_images(&[pixels]).unwrap().remove(0);
            (to_hex(&Sha256::digest(bytes)), Embedding::from_unit_vector(&embedding))
        };
        let set = |name: &str| PromptSet::load(name).unwrap().embed(&towers, 8).unwrap();
        Self {
            generation: towers.card().fingerprint[..16].to_owned(),
            logit_scale: towers.card().logit_scale,
            texts: towers.embed_texts(&QUERY_TEXTS).unwrap(),
            pictures: pictures.iter().map(embed).collect(),
            sets: [("demo", set("demo")), ("other", set(other.to_str().unwrap()))].into(),
        }
    }
}

/// A configuration by its name: model, prompt set, weight.
pub type Configurations = BTreeMap<&'static str, (usize, &'static str, f32)>;

pub struct ExpectedAnswers {
    pub models: [ExpectedModel; 2],
    pub configurations: Configurations,
}

impl ExpectedAnswers {
    /// Why an answer is not wholly the one that its configuration gives.
    fn find_mismatch(&self, text: usize, answer: &SearchResponse) -> Option<String> {
        let named = self.configurations.get(answer.configuration.as_str());
        let Some((model, set, weight)) = named else {
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
        let (normaliser, lambda, scale) = (Normaliser::Softmax, 1.0, ScaleConstants::default());
        let balance = BalanceParameters { normaliser, weight: *weight, lambda, scale };
        for hit in &answer.hits {
            let embedding = &model.pictures[&hit.image.content_hash];
            let raw: f32 =
                model.texts[text].iter().zip(embedding.values()).map(|(a, b)| a * b).sum();
            let affine =
                balance.affine_transform(&set.statistics(embedding).unwrap(), model.logit_scale);
            let wrong = (raw - hit.raw_score).abs() > 5e-3
                || (affine.alpha - hit.alpha).abs() > 1e-2
                || (affine.apply(raw) - hit.score).abs() > 1e-2;
            if wrong {
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

/// What clients have seen.
#[derive(Default)]
pub struct ObservedAnswers {
    pub answers: Mutex<BTreeMap<(String, String), u64>>,
    /// Answered by the second address, because the first did not.
    pub retried: AtomicU64,
    pub failed: Mutex<Vec<String>>,
    pub mismatches: Mutex<Vec<String>>,
}

/// Asks two query workers in turn, and the other one where the first does not answer.
pub async fn query_until_stopped(
    addresses: [String; 2],
    truth: Arc<ExpectedAnswers>,
    seen: Arc<ObservedAnswers>,
    stop: Arc<AtomicBool>,
) {
    let client = reqwest::Client::builder().timeout(Duration::from_secs(20)).build().unwrap();
    let mut number = 0usize;
    while !stop.load(Ordering::SeqCst) {
        number += 1;
        let text = number % QUERY_TEXTS.len();
        let body = json!({"text": QUERY_TEXTS[text], "k": 10, "traffic_key": format!("user-{}", number % 97)});
        let mut problems = Vec::new();
        for turn in 0..2 {
            let address = &addresses[(number + turn) % 2];
            match post_search(&client, address, &body).await {
                Ok(answer) => {
                    seen.retried.fetch_add(turn as u64, Ordering::SeqCst);
                    seen.mismatches.lock().unwrap().extend(truth.find_mismatch(text, &answer));
                    let by = (answer.generation, answer.configuration);
                    *seen.answers.lock().unwrap().entry(by).or_default() += 1;
                    problems.clear();
                    break;
                }
                Err(problem) => problems.push(problem),
            }
        }
        if !problems.is_empty() {
            seen.failed.lock().unwrap().push(problems.join("; "));
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
