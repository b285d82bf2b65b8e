//! Prompt sets and models are promoted and rolled back under continuous updates and queries, while one
//! process after the other is killed.

mod expected_answers;
mod updates;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use bsap::catalogue::StateStore;
use bsap::demo::catalogue::{PhotoStyle, Scene};
use bsap::demo::draw::render_jpeg;
use bsap::table::Generation;
use serde_json::{Value, json};
use tokio::time::sleep;

use expected_answers::{ExpectedAnswers, ExpectedModel, ObservedAnswers};
use updates::{UpdateGenerator, image_name};

use crate::fixture::{Fixture, REEMBED_TOPIC, WorkerProcess};

const OLD_CHECKPOINT: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/models/demo");
/// Another model, of another dimension.
const NEW_CHECKPOINT: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/fixtures/clip-gelu");
const OTHER_PROMPT_SET: &str = r#"
name = "other"
version = 1
language = "en"
notes = "Different from the demo set."
texts = ["a thing", "a picture of a thing", "a small thing", "a large thing", "several things",
    "nothing", "a drawing", "a dark drawing", "a bright drawing", "a plain background"]
"#;
/// Limit of every wait.
const WAIT_TIMEOUT: Duration = Duration::from_secs(180);
/// Number of different images. Their hashes are known, so that scores can be checked.
const PICTURE_COUNT: u64 = 12;
/// Changes for which no event is sent.
const UNANNOUNCED_DELETES: usize = 3;
const UNANNOUNCED_UPSERTS: u64 = 5;

/// A process that can be killed and started again.
struct RestartableProcess {
    description: &'static str,
    arguments: &'static [&'static str],
    options: Vec<(&'static str, String)>,
    worker: Option<WorkerProcess>,
}

impl RestartableProcess {
    fn start(
        fixture: &mut Fixture,
        description: &'static str,
        arguments: &'static [&'static str],
        options: &[(&'static str, &str)],
    ) -> Self {
        let options = options.iter().map(|(key, value)| (*key, (*value).to_owned())).collect();
        let mut process = Self { description, arguments, options, worker: None };
        process.spawn(fixture);
        process
    }

    fn spawn(&mut self, fixture: &mut Fixture) {
        let options: Vec<_> = self.options.iter().map(|(k, v)| (*k, v.as_str())).collect();
        self.worker = Some(fixture.start_command(self.arguments, &options));
    }

    fn kill_and_restart(&mut self, fixture: &mut Fixture) {
        println!("    kill -9 {}", self.description);
        self.worker.take().unwrap().kill();
        self.spawn(fixture);
    }
}

async fn wait_until(condition: &str, mut done: impl AsyncFnMut() -> bool) {
    let started = Instant::now();
    while !done().await {
        assert!(started.elapsed() < WAIT_TIMEOUT, "timed out waiting until {condition}");
        sleep(Duration::from_millis(200)).await;
    }
}

async fn fetch_state(address: &str) -> Option<Value> {
    let response = reqwest::get(format!("http://{address}/v1/state")).await.ok()?;
    serde_json::from_str(&response.text().await.ok()?).ok()
}

/// Waits until both query workers answer, so that the next one may be killed.
async fn wait_until_answering(addresses: &[String; 2]) {
    for address in addresses {
        let ready =
            || async { fetch_state(address).await.is_some_and(|state| state["ready"] == true) };
        wait_until("a query worker answers again", async || ready().await).await;
    }
}

/// Runs a command and kills it after `wait`; returns whether it was still running.
async fn kill_after(fixture: &Fixture, wait: Duration, arguments: &[&str]) -> bool {
    let mut child = fixture.bsap_command(Path::new("")).args(arguments).spawn().unwrap();
    sleep(wait).await;
    let running = child.try_wait().unwrap().is_none();
    let _ = child.kill();
    child.wait().unwrap();
    println!("    kill -9 bsap {} (running: {running})", arguments[..2].join(" "));
    running
}

/// The running processes and the expected answers.
struct Scenario<'a> {
    fixture: &'a mut Fixture,
    expected: Arc<ExpectedAnswers>,
    /// File of the prompt set `other`.
    prompt_set_file: PathBuf,
    image_count: u64,
    old_workers: Vec<RestartableProcess>,
    query_workers: Vec<RestartableProcess>,
    addresses: [String; 2],
    new_worker: Option<RestartableProcess>,
    started: Instant,
}

/// Runs the scenario `rounds` times.
pub async fn run(fixture: &mut Fixture, images: u64, rounds: u32, pause: Duration) {
    let pictures: Vec<Vec<u8>> = (0..PICTURE_COUNT)
        .map(|n| render_jpeg(&Scene::sample(7, n, PhotoStyle::Studio), 64).unwrap())
        .collect();
    let folder = fixture.folder.path();
    let mut updates = UpdateGenerator {
        folder: folder.join("pictures"),
        staging_file: folder.join("staging"),
        producer: fixture
            .cluster
            .client_config()
            .set("enable.idempotence", "true")
            .create()
            .unwrap(),
        pictures: pictures.clone(),
        image_count: images,
        pause,
        expected_images: BTreeMap::new(),
        sent_events: 0,
    };
    for number in 0..images {
        updates.send_change(image_name(number), false).await;
    }
    let mut scenario = Scenario::start(fixture, images, &pictures).await;
    let (stop_updates, stop_queries) = <(Arc<AtomicBool>, Arc<AtomicBool>)>::default();
    let observed = Arc::new(ObservedAnswers::default());
    let updating = tokio::spawn(updates.run(stop_updates.clone()));
    let querying = [(); 2].map(|()| {
        let (addresses, expected) = (scenario.addresses.clone(), scenario.expected.clone());
        tokio::spawn(expected_answers::query_until_stopped(
            addresses,
            expected,
            observed.clone(),
            stop_queries.clone(),
        ))
    });
    for round in 1..=rounds {
        scenario.switch_prompt_set(round).await;
        scenario.switch_model(round).await;
    }
    stop_updates.store(true, Ordering::SeqCst);
    let mut updates = updating.await.unwrap();
    scenario.reconcile_unannounced_changes(&mut updates).await;
    let differences = scenario.count_differences(&updates).await;
    stop_queries.store(true, Ordering::SeqCst);
    for client in querying {
        client.await.unwrap();
    }
    scenario.print_and_assert_results(&updates, &observed, differences);
    scenario.stop_all();
}

impl<'a> Scenario<'a> {
    /// Starts all processes and waits until every image is searchable.
    async fn start(fixture: &'a mut Fixture, images: u64, pictures: &[Vec<u8>]) -> Self {
        let started = Instant::now();
        fixture.cluster.create_topic(REEMBED_TOPIC, 6, 1 << 20).await;
        let set = fixture.folder.path().join("other.toml");
        std::fs::write(&set, OTHER_PROMPT_SET).unwrap();
        let expected = Arc::new(ExpectedAnswers {
            models: [OLD_CHECKPOINT, NEW_CHECKPOINT]
                .map(|checkpoint| ExpectedModel::load(checkpoint, &set, pictures)),
            configurations: [
                ("initial", (0, "demo", 0.25)),
                ("other-half", (0, "other", 0.5)),
                ("large", (1, "demo", 0.25)),
            ]
            .into(),
        });
        let mut worker =
            || RestartableProcess::start(fixture, "a worker of the old model", &["ingest"], &[]);
        let old_workers = vec![worker(), worker()];
        wait_until("the catalogue is created", async || {
            StateStore::new(&fixture.store()).read_newest().await.unwrap().is_some()
        })
        .await;
        let listeners = [(); 2].map(|()| std::net::TcpListener::bind("127.0.0.1:0").unwrap());
        let addresses = listeners.each_ref().map(|l| l.local_addr().unwrap().to_string());
        drop(listeners);
        let mut query_worker = |address: &String| {
            let options = [
                ("HTTP__LISTEN", address.as_str()),
                ("SEARCH__STANDBY_CHECKPOINT", NEW_CHECKPOINT),
            ];
            RestartableProcess::start(fixture, "a query worker", &["serve"], &options)
        };
        let query_workers = addresses.iter().map(&mut query_worker).collect();
        for address in &addresses {
            wait_until("every image is searchable", async || {
                fetch_state(address).await.is_some_and(|state| state["images"] == images)
            })
            .await;
        }
        println!("  {images} images searchable after {:.0} s", started.elapsed().as_secs_f64());
        let new_worker = None;
        Self {
            fixture,
            expected,
            prompt_set_file: set,
            image_count: images,
            old_workers,
            query_workers,
            addresses,
            new_worker,
            started,
        }
    }

    fn print_step(&self, step: &str) {
        println!("  {step} ({:.0} s)", self.started.elapsed().as_secs_f64());
    }

    /// Reindexes with another prompt set, promotes it and rolls back.
    async fn switch_prompt_set(&mut self, round: u32) {
        self.print_step(&format!("round {round}: another prompt set"));
        let reindex =
            ["reindex", "statistics", "--prompt-set", self.prompt_set_file.to_str().unwrap()];
        if round == 1 {
            kill_after(self.fixture, Duration::from_millis(1500), &reindex).await;
        }
        self.old_workers[0].kill_and_restart(self.fixture);
        self.fixture.run_command_ok(&reindex);
        let candidate = ["candidate", "set", "other-half", "--prompt-set", "other"];
        let options = ["--weight", "0.5", "--traffic-share", "0.4", "--shadow", "0.5"];
        self.fixture.run_command_ok(&[&candidate[..], &options].concat());
        self.query_workers[0].kill_and_restart(self.fixture);
        wait_until_answering(&self.addresses).await;
        // Rows that workers are about to commit may still lack the new prompt set: retry.
        wait_until("the candidate is promoted", async || {
            self.fixture.run_command(&["promote", "--yes"]).0 == Some(0)
        })
        .await;
        sleep(Duration::from_secs(2)).await;
        self.fixture.run_command_ok(&["rollback"]);
    }

    /// Reindexes with another model, promotes it and rolls back.
    async fn switch_model(&mut self, round: u32) {
        self.print_step(&format!("round {round}: another model"));
        self.fill_new_generation(round).await;
        self.kill_dependencies().await;
        let candidate = ["candidate", "set", "large", "--standby"];
        self.fixture.run_command_ok(
            &[&candidate[..], &["--traffic-share", "0.3", "--shadow", "0.5"]].concat(),
        );
        println!("    {}", evaluate_candidate(self.fixture));
        self.old_workers[1].kill_and_restart(self.fixture);
        self.query_workers[1].kill_and_restart(self.fixture);
        wait_until_answering(&self.addresses).await;
        let mut promotion_output = String::new();
        wait_until("the new model is promoted", async || {
            let (code, output) =
                self.fixture.run_command(&["promote", "--yes", "--timeout", "120"]);
            if code != Some(0) {
                println!("    not yet: {}", output.lines().last().unwrap_or_default());
            }
            promotion_output = output;
            code == Some(0)
        })
        .await;
        for line in
            promotion_output.lines().filter(|l| l.starts_with("coverage") || l.contains("serve"))
        {
            println!("    {line}");
        }
        // A query worker that starts now serves the new model at once.
        self.query_workers[0].kill_and_restart(self.fixture);
        wait_until_answering(&self.addresses).await;
        sleep(Duration::from_secs(2)).await;
        let [old, new] = &self.expected.models;
        for address in &self.addresses {
            assert_eq!(fetch_state(address).await.unwrap()["generation"], new.generation);
        }
        // Updates go on, so that the old generation may lack some images: confirm with --yes.
        self.fixture.run_command_ok(&["rollback", "--yes"]);
        for address in &self.addresses {
            wait_until("the old model answers again", async || {
                fetch_state(address).await.unwrap()["generation"] == old.generation
            })
            .await;
        }
    }

    /// Fills the generation of the other model, except for updates in transit.
    async fn fill_new_generation(&mut self, round: u32) {
        let reindex = ["reindex", "model", "--checkpoint", NEW_CHECKPOINT, "--rate", "20"];
        if round == 1 {
            kill_after(self.fixture, Duration::from_millis(3500), &reindex).await;
        }
        // Set up the generation first: its worker would not start without it.
        assert_eq!(self.fixture.run_command(&reindex).0, Some(0));
        let worker = self.new_worker.get_or_insert_with(|| {
            let options = [("MODEL__CHECKPOINT", NEW_CHECKPOINT)];
            RestartableProcess::start(
                self.fixture,
                "the worker of the new model",
                &["ingest"],
                &options,
            )
        });
        sleep(Duration::from_secs(4)).await;
        worker.kill_and_restart(self.fixture);
        // Updates go on, so that some are always in transit.
        let mut progress = String::new();
        wait_until("the new generation has all images but those in transit", async || {
            let output = self.fixture.run_command(&reindex).1;
            let counts = output.lines().find(|line| line.contains("are up to date in it"));
            counts.unwrap_or_default().clone_into(&mut progress);
            let missing = progress.split("; ").nth(1).and_then(|rest| rest.split(' ').next());
            let missing = missing.and_then(|n| n.parse::<u64>().ok());
            missing.is_some_and(|n| n <= self.image_count / 10)
        })
        .await;
        println!("    {progress}");
    }

    /// Kills and restarts Kafka and the object store.
    async fn kill_dependencies(&mut self) {
        println!("    kill -9 Kafka");
        self.fixture.cluster.stop_broker(0, "KILL");
        sleep(Duration::from_secs(1)).await;
        self.fixture.cluster.launch_broker(0);
        self.fixture.cluster.wait_until_ready();
        if let Some(minio) = &mut self.fixture.minio {
            println!("    kill -9 MinIO");
            minio.kill();
            sleep(Duration::from_secs(2)).await;
            minio.launch();
        }
    }

    /// Returns the generations in the order of the models.
    async fn read_generations(&self) -> [Generation; 2] {
        let state = StateStore::new(&self.fixture.store()).read_newest().await.unwrap().unwrap();
        [state.live, state.standby.unwrap().generation]
    }

    /// Waits until the workers of both models have consumed all messages.
    async fn wait_until_caught_up(&mut self) {
        let [_, new] = self.read_generations().await;
        let workers = self.old_workers.iter_mut().map(|p| p.worker.as_mut().unwrap());
        self.fixture.wait_until_caught_up(&mut workers.collect::<Vec<_>>()).await;
        let worker = self.new_worker.as_mut().and_then(|p| p.worker.as_mut()).unwrap();
        self.fixture.wait_until_standby_caught_up(&new, &mut [worker]).await;
    }

    /// Changes images without sending events, and repairs that by reconciling.
    async fn reconcile_unannounced_changes(&mut self, updates: &mut UpdateGenerator) {
        self.print_step("reconcile");
        self.wait_until_caught_up().await;
        let existing = updates.expected_images.iter().filter(|(_, (_, exists))| *exists);
        let deleted: Vec<String> =
            existing.map(|(id, _)| id.clone()).take(UNANNOUNCED_DELETES).collect();
        for id in &deleted {
            std::fs::remove_file(updates.folder.join(id)).unwrap();
            updates.expected_images.remove(id);
        }
        for number in self.image_count..self.image_count + UNANNOUNCED_UPSERTS {
            updates.write_picture(&image_name(number));
            updates.expected_images.insert(image_name(number), (0, true));
        }
        let folder = updates.folder.to_str().unwrap();
        let reconcile = ["reconcile", folder, "--sequence-is-time", "--grace", "0"];
        let reconcile = [&reconcile[..], &["--max-deletes", "0.5"]].concat();
        let (code, output) = self.fixture.run_command(&reconcile);
        assert!(code == Some(1) && output.contains("differs"), "{output}");
        let repaired = self.fixture.run_command_ok(&[&reconcile[..], &["--repair"]].concat());
        self.wait_until_caught_up().await;
        let after = self.fixture.run_command_ok(&reconcile);
        for line in repaired.lines().chain(after.lines()) {
            println!("    {line}");
        }
    }

    /// Counts the images that are missing, unexpected and outdated in each generation; waits until the query
    /// workers have all images.
    async fn count_differences(&self, updates: &UpdateGenerator) -> [[usize; 2]; 3] {
        let live = updates.live_images();
        let [mut missing, mut unexpected, mut outdated] = [[0; 2]; 3];
        for (i, generation) in self.read_generations().await.iter().enumerate() {
            let versions = self.fixture.newest_versions(generation).await;
            let content = |id: &String| versions.get(id).and_then(|(_, content)| content.as_ref());
            missing[i] = live.keys().filter(|id| content(id).is_none()).count();
            let is_unexpected = |id: &&String| content(id).is_some() && !live.contains_key(id);
            unexpected[i] = versions.keys().filter(is_unexpected).count();
            let is_outdated = |(id, sequence): &(&&String, &u64)| {
                versions.get(**id).is_some_and(|(s, _)| s.parse::<u64>().unwrap() < **sequence)
            };
            outdated[i] = live.iter().filter(is_outdated).count();
        }
        for address in &self.addresses {
            wait_until("the query workers have all images of both generations", async || {
                let state = fetch_state(address).await.unwrap();
                let count = json!(live.len());
                state["images"] == count && state["standby"]["images"] == count
            })
            .await;
        }
        [missing, unexpected, outdated]
    }

    /// Prints the results, and asserts that no query failed and no image differs.
    fn print_and_assert_results(
        &self,
        updates: &UpdateGenerator,
        observed: &ObservedAnswers,
        differences: [[usize; 2]; 3],
    ) {
        let (answers, failed, mismatches) = (
            observed.answers.lock().unwrap(),
            observed.failed.lock().unwrap(),
            observed.mismatches.lock().unwrap(),
        );
        let [missing, unexpected, outdated] = differences;
        println!(
            "models and prompt sets: {} updates; {} queries answered, {} of them by the other \
             address, {} failed, {} mismatched; {} live images, missing in the old and the new generation \
             {missing:?}, unexpected {unexpected:?}, outdated {outdated:?}; {} lost notifications \
             repaired; \
             {:.0} s",
            updates.sent_events,
            answers.values().sum::<u64>(),
            observed.retried.load(Ordering::SeqCst),
            failed.len(),
            mismatches.len(),
            updates.live_images().len(),
            UNANNOUNCED_DELETES + UNANNOUNCED_UPSERTS as usize,
            self.started.elapsed().as_secs_f64(),
        );
        for ((generation, configuration), count) in &*answers {
            println!("    {count} answers by {configuration} of {generation}");
        }
        assert_eq!(*failed, Vec::<String>::new());
        assert_eq!(*mismatches, Vec::<String>::new());
        assert_eq!(differences, [[0; 2]; 3]);
        let names: Vec<&str> = answers.keys().map(|(_, name)| name.as_str()).collect();
        for name in self.expected.configurations.keys() {
            assert!(names.contains(name), "no answer by {name}");
        }
    }

    fn stop_all(self) {
        let all = self.old_workers.into_iter().chain(self.query_workers).chain(self.new_worker);
        for mut process in all {
            process.worker.take().unwrap().stop();
        }
    }
}

/// Evaluates the live configuration and the candidate of another model, as before a promotion.
fn evaluate_candidate(fixture: &Fixture) -> String {
    let query_log = fixture.folder.path().join("queries.jsonl");
    let texts = ["a red mug", "a blue chair", "a green lamp"];
    let lines = texts.map(|text| format!("{}\n", json!({ "text": text })));
    std::fs::write(&query_log, lines.concat()).unwrap();
    let report = fixture.run_command_ok(&[
        "evaluate",
        "--query-log",
        query_log.to_str().unwrap(),
        "--json",
        "-",
    ]);
    let report = &report[report.find('{').unwrap()..=report.rfind('}').unwrap()];
    let report: Value = serde_json::from_str(report).unwrap();
    let models = report["models"].as_array().unwrap();
    let descriptions: Vec<String> = models
        .iter()
        .map(|m| format!("{} by {}, {} images", m["role"], m["model"], m["images"]))
        .collect();
    assert_eq!(descriptions.len(), 2, "{descriptions:?}");
    format!("evaluated: {}", descriptions.join("; "))
}
