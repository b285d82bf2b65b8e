//! Prompt sets and models are switched, and back, under continuous updates and queries, while each
//! process is killed in turn.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use bsap::clip::{self, Clip, Towers};
use bsap::demo::catalogue::{Scene, Style};
use bsap::demo::draw::render;
use bsap::http::SearchAnswer;
use bsap::normalise::{Balance, Normaliser, Scale};
use bsap::prompts::{EmbeddedSet, PromptSet};
use bsap::record::{Embedding, hex};
use bsap::table::StateStore;
use chrono::{SecondsFormat, Utc};
use rand::RngExt;
use rdkafka::producer::{FutureProducer, FutureRecord};
use serde_json::{Value, json};
use sha2::{Digest, Sha256};
use tokio::task::JoinHandle;
use tokio::time::sleep;

use crate::world::{AGAIN, TOPIC, Worker, World};

const OLD: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/models/demo");
/// Another model, of another dimension.
const NEW: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/fixtures/clip-gelu");
const TEXTS: [&str; 6] = ["a red mug", "blue", "a striped lamp", "two chairs", "a shoe", "wood"];
const OTHER_SET: &str = r#"
name = "other"
version = 1
language = "en"
notes = "Unlike what the demo has."
texts = ["a thing", "a picture of a thing", "a small thing", "a large thing", "several things",
    "nothing", "a drawing", "a dark drawing", "a bright drawing", "a plain background"]
"#;
/// How long anything may take to come about.
const LIMIT: Duration = Duration::from_secs(180);
/// Pictures that images are drawn from: known by their hash, so that scores can be checked.
const PICTURES: u64 = 12;

/// What a model makes of texts and pictures, computed apart from what is tested.
struct Model {
    generation: String,
    logit_scale: f32,
    texts: Vec<Vec<f32>>,
    pictures: BTreeMap<String, Embedding>,
    sets: BTreeMap<&'static str, EmbeddedSet>,
}

impl Model {
    fn load(checkpoint: &str, other: &Path, pictures: &[Vec<u8>]) -> Self {
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
type Configurations = BTreeMap<&'static str, (usize, &'static str, f32)>;

struct Truth {
    models: [Model; 2],
    configurations: Configurations,
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
struct Seen {
    answers: Mutex<BTreeMap<(String, String), u64>>,
    /// Answered by the second address, because the first did not.
    retried: AtomicU64,
    failed: Mutex<Vec<String>>,
    mixed: Mutex<Vec<String>>,
}

/// Asks two query workers in turn, and the other one where the first does not answer.
async fn ask(addresses: [String; 2], truth: Arc<Truth>, seen: Arc<Seen>, stop: Arc<AtomicBool>) {
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

/// Changes images without pause.
struct Updates {
    folder: PathBuf,
    aside: PathBuf,
    pictures: Vec<Vec<u8>>,
    producer: FutureProducer,
    images: u64,
    pause: Duration,
    /// The newest sequence of each image, and whether it is there.
    wanted: BTreeMap<String, (u64, bool)>,
    sent: u64,
}

impl Updates {
    fn write(&self, id: &str) {
        let picture = &self.pictures[rand::rng().random_range(0..self.pictures.len())];
        // A reader sees one picture or the other.
        std::fs::write(&self.aside, picture).unwrap();
        std::fs::rename(&self.aside, self.folder.join(id)).unwrap();
    }

    async fn change(&mut self, id: String, delete: bool) {
        let file = self.folder.join(&id);
        let mut event = json!({"image_id": id});
        if delete {
            let _ = std::fs::remove_file(file);
            event["operation"] = "delete".into();
        } else {
            self.write(&id);
            event["uri"] = url::Url::from_file_path(file).unwrap().as_str().into();
        }
        let now = Utc::now();
        let sequence = now.timestamp_micros() as u64;
        event["sequence"] = sequence.into();
        // As `bsap publish` does; reconciling by time relies on it.
        event["event_time"] = now.to_rfc3339_opts(SecondsFormat::Micros, true).into();
        let event = event.to_string();
        let record = FutureRecord::to(TOPIC).key(&id).payload(&event);
        self.producer.send(record, Duration::from_secs(60)).await.unwrap();
        self.wanted.insert(id, (sequence, !delete));
        self.sent += 1;
    }

    async fn run(mut self, stop: Arc<AtomicBool>) -> Self {
        while !stop.load(Ordering::SeqCst) {
            let id = name(rand::rng().random_range(0..self.images));
            let delete = rand::rng().random_ratio(1, 20);
            self.change(id, delete).await;
            sleep(self.pause).await;
        }
        self
    }
}

fn name(number: u64) -> String {
    format!("image-{number:05}.jpg")
}

/// A process that is killed and started again.
struct Process {
    what: &'static str,
    arguments: &'static [&'static str],
    options: Vec<(&'static str, String)>,
    worker: Option<Worker>,
}

impl Process {
    fn start(
        world: &mut World,
        what: &'static str,
        arguments: &'static [&'static str],
        options: &[(&'static str, &str)],
    ) -> Self {
        let options = options.iter().map(|(key, value)| (*key, (*value).to_owned())).collect();
        let mut process = Self { what, arguments, options, worker: None };
        process.again(world);
        process
    }

    fn again(&mut self, world: &mut World) {
        let options: Vec<_> = self.options.iter().map(|(k, v)| (*k, v.as_str())).collect();
        self.worker = Some(world.start(self.arguments, &options));
    }

    fn kill(&mut self, world: &mut World) {
        println!("    kill -9 {}", self.what);
        self.worker.take().unwrap().kill();
        self.again(world);
    }
}

async fn until(what: &str, mut done: impl AsyncFnMut() -> bool) {
    let started = Instant::now();
    while !done().await {
        assert!(started.elapsed() < LIMIT, "waited in vain until {what}");
        sleep(Duration::from_millis(200)).await;
    }
}

async fn state(address: &str) -> Option<Value> {
    let response = reqwest::get(format!("http://{address}/v1/state")).await.ok()?;
    serde_json::from_str(&response.text().await.ok()?).ok()
}

/// Until both query workers answer, so that the next one may be killed.
async fn answering(addresses: &[String; 2]) {
    for address in addresses {
        let ready = || async { state(address).await.is_some_and(|state| state["ready"] == true) };
        until("a query worker answers again", async || ready().await).await;
    }
}

/// Runs a command and kills it after a while; whether it was still running.
async fn killed_after(world: &World, wait: Duration, arguments: &[&str]) -> bool {
    let mut child = world.command(Path::new("")).args(arguments).spawn().unwrap();
    sleep(wait).await;
    let running = child.try_wait().unwrap().is_none();
    let _ = child.kill();
    child.wait().unwrap();
    println!("    kill -9 bsap {} (running: {running})", arguments[..2].join(" "));
    running
}

/// The scenario, `rounds` times over.
pub async fn run(world: &mut World, images: u64, rounds: u32, pause: Duration) {
    let started = Instant::now();
    world.cluster.create(AGAIN, 6, 1 << 20).await;
    let set = world.folder.path().join("other.toml");
    std::fs::write(&set, OTHER_SET).unwrap();
    let pictures: Vec<Vec<u8>> =
        (0..PICTURES).map(|n| render(&Scene::sample(7, n, Style::Studio), 64).unwrap()).collect();
    let truth = Arc::new(Truth {
        models: [Model::load(OLD, &set, &pictures), Model::load(NEW, &set, &pictures)],
        configurations: [
            ("initial", (0, "demo", 0.25)),
            ("other-half", (0, "other", 0.5)),
            ("large", (1, "demo", 0.25)),
        ]
        .into(),
    });
    let mut updates = Updates {
        folder: world.folder.path().join("pictures"),
        aside: world.folder.path().join("aside"),
        pictures,
        producer: world.cluster.client().set("enable.idempotence", "true").create().unwrap(),
        images,
        pause,
        wanted: BTreeMap::new(),
        sent: 0,
    };
    for number in 0..images {
        updates.change(name(number), false).await;
    }

    let mut old_workers: Vec<Process> = (0..2)
        .map(|_| Process::start(world, "a worker of the old model", &["ingest"], &[]))
        .collect();
    until("the catalogue is made", async || {
        StateStore::new(&world.store()).newest().await.unwrap().is_some()
    })
    .await;
    let listeners = [(); 2].map(|()| std::net::TcpListener::bind("127.0.0.1:0").unwrap());
    let addresses = listeners.each_ref().map(|l| l.local_addr().unwrap().to_string());
    drop(listeners);
    let mut query_workers: Vec<Process> = addresses
        .iter()
        .map(|address| {
            let options =
                [("HTTP__LISTEN", address.as_str()), ("SEARCH__CANDIDATE_CHECKPOINT", NEW)];
            Process::start(world, "a query worker", &["serve"], &options)
        })
        .collect();
    for address in &addresses {
        until("every image is searchable", async || {
            state(address).await.is_some_and(|state| state["images"] == images)
        })
        .await;
    }
    let stop = Arc::new(AtomicBool::new(false));
    let seen = Arc::new(Seen::default());
    let (stop_updates, stop_queries) = (stop.clone(), Arc::new(AtomicBool::new(false)));
    let updating: JoinHandle<Updates> = tokio::spawn(updates.run(stop_updates));
    let asking: Vec<_> = (0..2)
        .map(|_| {
            let (truth, seen, stop) = (truth.clone(), seen.clone(), stop_queries.clone());
            tokio::spawn(ask(addresses.clone(), truth, seen, stop))
        })
        .collect();
    println!("  {images} images searchable after {:.0} s", started.elapsed().as_secs_f64());

    let mut new_worker = None;
    for round in 0..rounds {
        println!(
            "  round {}: another prompt set ({:.0} s)",
            round + 1,
            started.elapsed().as_secs_f64()
        );
        let reindex = ["reindex", "statistics", "--prompt-set", set.to_str().unwrap()];
        if round == 0 {
            killed_after(world, Duration::from_millis(1500), &reindex).await;
        }
        old_workers[0].kill(world);
        world.bsap(&reindex);
        world.bsap(&[
            "candidate",
            "set",
            "other-half",
            "--prompt-set",
            "other",
            "--weight",
            "0.5",
            "--share",
            "0.4",
            "--shadow",
            "0.5",
        ]);
        query_workers[0].kill(world);
        answering(&addresses).await;
        // What has just become known may still be missing in rows that workers are about to write.
        until("the candidate is promoted", async || {
            world.outcome(&["promote", "--yes"]).0 == Some(0)
        })
        .await;
        sleep(Duration::from_secs(2)).await;
        world.bsap(&["rollback"]);

        println!("  round {}: another model ({:.0} s)", round + 1, started.elapsed().as_secs_f64());
        let reindex = ["reindex", "model", "--checkpoint", NEW, "--rate", "20"];
        if round == 0 {
            killed_after(world, Duration::from_millis(3500), &reindex).await;
        }
        // It is set up before its first worker starts, which would not know what it is for.
        assert_eq!(world.outcome(&reindex).0, Some(0));
        let worker = new_worker.get_or_insert_with(|| {
            let options = [("MODEL__CHECKPOINT", NEW)];
            Process::start(world, "the worker of the new model", &["ingest"], &options)
        });
        sleep(Duration::from_secs(4)).await;
        worker.kill(world);
        // Updates go on, so that some are always on their way.
        let mut left = String::new();
        until("the new generation has all but what is on its way", async || {
            let told = world.outcome(&reindex).1;
            let counted = told.lines().find(|line| line.contains("stand in it"));
            counted.unwrap_or_default().clone_into(&mut left);
            let asked = left.split("; ").nth(1).and_then(|rest| rest.split(' ').next());
            asked.and_then(|n| n.parse::<u64>().ok()).is_some_and(|n| n <= images / 10)
        })
        .await;
        println!("    {left}");
        println!("    kill -9 Kafka");
        world.cluster.end(0, "KILL");
        sleep(Duration::from_secs(1)).await;
        world.cluster.launch(0);
        world.cluster.wait_until_ready();
        world.bsap(&["candidate", "set", "large", "--beside", "--share", "0.3", "--shadow", "0.5"]);
        println!("    {}", measured(world));
        old_workers[1].kill(world);
        query_workers[1].kill(world);
        answering(&addresses).await;
        let promote = ["promote", "--yes", "--timeout", "120"];
        let mut told = String::new();
        until("the new model is promoted", async || {
            let (code, said) = world.outcome(&promote);
            if code != Some(0) {
                println!("    not yet: {}", said.lines().last().unwrap_or_default());
            }
            told = said;
            code == Some(0)
        })
        .await;
        for line in
            told.lines().filter(|line| line.starts_with("coverage") || line.contains("serve"))
        {
            println!("    {line}");
        }
        // One that starts now serves the new model at once.
        query_workers[0].kill(world);
        answering(&addresses).await;
        sleep(Duration::from_secs(2)).await;
        for address in &addresses {
            assert_eq!(state(address).await.unwrap()["generation"], truth.models[1].generation);
        }
        world.bsap(&["rollback"]);
        for address in &addresses {
            until("the old model answers again", async || {
                state(address).await.unwrap()["generation"] == truth.models[0].generation
            })
            .await;
        }
    }

    println!("  reconcile ({:.0} s)", started.elapsed().as_secs_f64());
    stop.store(true, Ordering::SeqCst);
    let mut updates = updating.await.unwrap();
    let generations = {
        let state = StateStore::new(&world.store()).newest().await.unwrap().unwrap();
        [state.live, state.beside.unwrap().generation]
    };
    let mut new_worker = new_worker.unwrap();
    let mut caught_up = async |world: &World| {
        let workers = old_workers.iter_mut().map(|p| p.worker.as_mut().unwrap());
        world.caught_up(&mut workers.collect::<Vec<_>>()).await;
        let new = new_worker.worker.as_mut().unwrap();
        world.caught_up_beside(&generations[1], &mut [new]).await;
    };
    caught_up(world).await;
    // Of these no event tells.
    let there: Vec<String> =
        updates.wanted.iter().filter(|(_, w)| w.1).map(|(id, _)| id.clone()).take(3).collect();
    for id in &there {
        std::fs::remove_file(updates.folder.join(id)).unwrap();
        updates.wanted.remove(id);
    }
    let mut lost = there.len();
    for number in images..images + 5 {
        updates.write(&name(number));
        updates.wanted.insert(name(number), (0, true));
        lost += 1;
    }
    let folder = updates.folder.to_str().unwrap();
    let look = ["reconcile", folder, "--sequence-is-time", "--grace", "0", "--max-deletes", "0.5"];
    let (code, told) = world.outcome(&look);
    assert!(code == Some(1) && told.contains("differs"), "{told}");
    let mend = [&look[..], &["--repair"]].concat();
    let mended = world.bsap(&mend);
    caught_up(world).await;
    let after = world.bsap(&look);
    for line in mended.lines().chain(after.lines()) {
        println!("    {line}");
    }

    // Both generations say the same, and that is what was sent.
    let live: BTreeMap<&String, u64> =
        updates.wanted.iter().filter(|(_, w)| w.1).map(|(id, w)| (id, w.0)).collect();
    let (mut missing, mut strange, mut old) = ([0; 2], [0; 2], [0; 2]);
    for (i, generation) in generations.iter().enumerate() {
        let found = world.newest(generation).await;
        let there = |id: &String| found.get(id).and_then(|(_, content)| content.as_ref());
        missing[i] = live.keys().filter(|id| there(id).is_none()).count();
        let stays = |id: &&String| there(id).is_some() && !live.contains_key(id);
        strange[i] = found.keys().filter(stays).count();
        let is_old = |(id, sequence): &(&&String, &u64)| {
            found.get(**id).is_some_and(|(s, _)| s.parse::<u64>().unwrap() < **sequence)
        };
        old[i] = live.iter().filter(is_old).count();
    }
    for address in &addresses {
        until("the query workers have it all, in both generations", async || {
            let state = state(address).await.unwrap();
            let count = json!(live.len());
            state["images"] == count && state["beside"]["images"] == count
        })
        .await;
    }
    stop_queries.store(true, Ordering::SeqCst);
    for client in asking {
        client.await.unwrap();
    }
    let (answers, failed, mixed) =
        (seen.answers.lock().unwrap(), seen.failed.lock().unwrap(), seen.mixed.lock().unwrap());
    println!(
        "models and prompt sets: {} updates; {} queries answered, {} of them by the other address, \
         {} failed, {} mixed; {} live images, missing in the old and the new generation {missing:?}, \
         strange {strange:?}, not the newest {old:?}; {lost} lost notifications mended; {:.0} s",
        updates.sent,
        answers.values().sum::<u64>(),
        seen.retried.load(Ordering::SeqCst),
        failed.len(),
        mixed.len(),
        live.len(),
        started.elapsed().as_secs_f64(),
    );
    for ((generation, configuration), count) in &*answers {
        println!("    {count} answers by {configuration} of {generation}");
    }
    assert_eq!(*failed, Vec::<String>::new());
    assert_eq!(*mixed, Vec::<String>::new());
    assert_eq!((missing, strange, old), ([0; 2], [0; 2], [0; 2]));
    let names: Vec<&str> = answers.keys().map(|(_, name)| name.as_str()).collect();
    for name in truth.configurations.keys() {
        assert!(names.contains(name), "{name} answered nothing");
    }
    for mut process in old_workers.into_iter().chain(query_workers).chain([new_worker]) {
        process.worker.take().unwrap().stop();
    }
}

/// Compares what is served with the candidate of another model, as one would before promoting it.
fn measured(world: &World) -> String {
    let asked = world.folder.path().join("asked.jsonl");
    let texts = ["a red mug", "a blue chair", "a green lamp"];
    let lines = texts.map(|text| format!("{}\n", serde_json::json!({ "text": text })));
    std::fs::write(&asked, lines.concat()).unwrap();
    let report = world.bsap(&["evaluate", "--log", asked.to_str().unwrap(), "--json", "-"]);
    let report = &report[report.find('{').unwrap()..=report.rfind('}').unwrap()];
    let report: serde_json::Value = serde_json::from_str(report).unwrap();
    let models = report["models"].as_array().unwrap();
    let told: Vec<String> = models
        .iter()
        .map(|m| format!("{} by {}, {} images", m["role"], m["model"], m["images"]))
        .collect();
    assert_eq!(told.len(), 2, "{told:?}");
    format!("evaluated: {}", told.join("; "))
}
