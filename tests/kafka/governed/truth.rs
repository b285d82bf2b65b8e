//! What clients ask and see, and what they should: computed apart from what is tested.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use bsap::clip::{self, Clip, Towers};
use bsap::serve::http::SearchAnswer;
use bsap::balance::normalise::{Balance, Normaliser, Scale};
use bsap::prompts::{EmbeddedSet, PromptSet};
use bsap::record::{Embedding, hex};
use serde_json::{Value, json};
use sha2::{Digest, Sha256};
use tokio::time::sleep;

const TEXTS: [&str; 6] = ["a red mug", "blue", "a striped lamp", "two chairs", "a shoe", "wood"];

/// What a model makes of texts and pictures, computed apart from what is tested.
pub struct Model {
    pub generation: String,
    logit_scale: f32,
    texts: Vec<Vec<f32>>,
    pictures: BTreeMap<String, Embedding>,
    sets: BTreeMap<&'static str, EmbeddedSet>,
}

impl Model {
    pub fn load(checkpoint: &str, other: &Path, pictures: &[Vec<u8>]) -> Self {
        let options = clip::Options { checkpoint: checkpoint.into(), ..clip::Options::default() };
        let towers = Clip::load(&options).unwrap();
        let embed = |bytes: &Vec<u8>| {
            let pixels =
                towers.prepare(&image::load_from_memory(bytes).unwrap().to_rgb8()).unwrap();
            let embedding = towers.embed_images(&[pixels]).unwrap().remove(0);
            (hex(&Sha256::digest(bytes)), Embedding::round(&embedding))
        };
        let set = |name: &str| PromptSet::load(name).unwrap().embed(&towers, 8).unwrap();
        Self {
            generation: towers.card().fingerprint[..16].to_owned(),
            logit_scale: towers.card().logit_scale,
            texts: towers.embed_texts(&TEXTS).unwrap(),
            pictures: pictures.iter().map(embed).collect(),
            sets: [("demo", set("demo")), ("other", set(other.to_str().unwrap()))].into(),
        }
    }
}

/// A configuration by its name: model, prompt set, weight.
pub type Configurations = BTreeMap<&'static str, (usize, &'static str, f32)>;

pub struct Truth {
    pub models: [Model; 2],
    pub configurations: Configurations,
}

impl Truth {
    /// Why an answer is not wholly the one that its configuration gives.
    fn mixed(&self, text: usize, answer: &SearchAnswer) -> Option<String> {
        let named = self.configurations.get(answer.configuration.as_str());
        let Some((model, set, weight)) = named else {
            return Some(format!("configuration {}", answer.configuration));
        };
        let model = &self.models[*model];
        let set = &model.sets[set];
        let (generation, key) = (&model.generation, &set.key);
        if (&answer.generation, &answer.prompt_set, answer.weight) != (generation, key, *weight) {
            return Some(format!(
                "{} by {} {}",
                answer.configuration, answer.generation, answer.prompt_set
            ));
        }
        let (normaliser, lambda, scale) = (Normaliser::Softmax, 1.0, Scale::default());
        let balance = Balance { normaliser, weight: *weight, lambda, scale };
        for hit in &answer.hits {
            let embedding = &model.pictures[&hit.image.content_hash];
            let raw: f32 =
                model.texts[text].iter().zip(embedding.values()).map(|(a, b)| a * b).sum();
            let affine = balance.affine(&set.statistics(embedding).unwrap(), model.logit_scale);
            let wrong = (raw - hit.raw_score).abs() > 5e-3
                || (affine.alpha - hit.alpha).abs() > 1e-2
                || (affine.score(raw) - hit.score).abs() > 1e-2;
            if wrong {
                return Some(format!(
                    "{} of {}: raw {raw} and {}, score {} and {}",
                    hit.image.image_id,
                    answer.configuration,
                    hit.raw_score,
                    affine.score(raw),
                    hit.score
                ));
            }
        }
        None
    }
}

/// What clients have seen.
#[derive(Default)]
pub struct Seen {
    pub answers: Mutex<BTreeMap<(String, String), u64>>,
    /// Answered by the second address, because the first did not.
    pub retried: AtomicU64,
    pub failed: Mutex<Vec<String>>,
    pub mixed: Mutex<Vec<String>>,
}

/// Asks two query workers in turn, and the other one where the first does not answer.
pub async fn ask(
    addresses: [String; 2],
    truth: Arc<Truth>,
    seen: Arc<Seen>,
    stop: Arc<AtomicBool>,
) {
    let client = reqwest::Client::builder().timeout(Duration::from_secs(20)).build().unwrap();
    let mut number = 0usize;
    while !stop.load(Ordering::SeqCst) {
        number += 1;
        let text = number % TEXTS.len();
        let body = json!({"text": TEXTS[text], "k": 10, "key": format!("user-{}", number % 97)});
        let mut problems = Vec::new();
        for turn in 0..2 {
            let address = &addresses[(number + turn) % 2];
            match search(&client, address, &body).await {
                Ok(answer) => {
                    seen.retried.fetch_add(turn as u64, Ordering::SeqCst);
                    seen.mixed.lock().unwrap().extend(truth.mixed(text, &answer));
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

async fn search(
    client: &reqwest::Client,
    address: &str,
    body: &Value,
) -> Result<SearchAnswer, String> {
    let request = client.post(format!("http://{address}/v1/search"));
    let request = request.header("content-type", "application/json").body(body.to_string());
    let response = request.send().await.map_err(|e| format!("{address}: {e:?}"))?;
    let (status, text) = (response.status(), response.text().await.map_err(|e| e.to_string())?);
    if !status.is_success() {
        return Err(format!("{address}: {status}: {text}"));
    }
    serde_json::from_str(&text).map_err(|e| format!("{address}: {e}: {text}"))
}
