//! Prompt sets and models are switched, and back, under continuous updates and queries, while each
//! process is killed in turn.

mod expected_answers;
mod updates;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use bsap::catalogue::{Generation, StateStore};
use bsap::demo::catalogue::{PhotoStyle, Scene};
use bsap::demo::draw::render_jpeg;
use serde_json::{Value, json};
use tokio::time::sleep;

use expected_answers::{ExpectedAnswers, ExpectedModel, ObservedAnswers};
use updates::{UpdateGenerator, image_name};

use bsap::world::{AGAIN, Worker, World};

const OLD_CHECKPOINT: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/models/demo");
/// Another model, of another dimension.
const NEW_CHECKPOINT: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/fixtures/clip-gelu");
const OTHER_PROMPT_SET: &str = r#"
name = "other"
version = 1
language = "en"
notes = "Unlike what the demo has."
texts = ["a thing", "a picture of a thing", "a small thing", "a large thing", "several things",
    "nothing", "a drawing", "a dark drawing", "a bright drawing", "a plain background"]
"#;
/// How long anything may take to come about.
const WAIT_TIMEOUT: Duration = Duration::from_secs(180);
/// Pictures that images are drawn from: known by their hash, so that scores can be checked.
const PICTURE_COUNT: u64 = 12;
/// Changes of which no event tells.
const UNANNOUNCED_DELETES: usize = 3;
const UNANNOUNCED_UPSERTS: u64 = 5;

/// A process that is killed and started again.
struct RestartableProcess {
    description: &'static str,
    arguments: &'static [&'static str],
    options: Vec<(&'static str, String)>,
    worker: Option<Worker>,
}

impl RestartableProcess {
    fn start(
        world: &mut World,
        what: &'static str,
        arguments: &'static [&'static str],
        options: &[(&'static str, &str)],
    ) -> Self {
        let options = options.iter().map(|(key, value)| (*key, (*value).to_owned())).collect();
        let mut process = Self { description: what, arguments, options, worker: None };
        process.spawn(world);
        process
    }

    fn spawn(&mut self, world: &mut World) {
        let options: Vec<_> = self.options.iter().map(|(k, v)| (*k, v.as_str())).collect();
        self.worker = Some(world.start(self.arguments, &options));
    }

    fn kill_and_restart(&mut self, world: &mut World) {
        println!("    kill -9 {}", self.description);
        self.worker.take().unwrap().kill();
        self.spawn(world);
    }
}

async fn wait_until(what: &str, mut done: impl AsyncFnMut() -> bool) {
    let started = Instant::now();
    while !done().await {
        assert!(started.elapsed() < WAIT_TIMEOUT, "waited in vain until {what}");
        sleep(Duration::from_millis(200)).await;
    }
}

async fn fetch_state(address: &str) -> Option<Value> {
    let response = reqwest::get(format!("http://{address}/v1/state")).await.ok()?;
    serde_json::from_str(&response.text().await.ok()?).ok()
}

/// Until both query workers answer, so that the next one may be killed.
async fn wait_until_answering(addresses: &[String; 2]) {
    for address in addresses {
        let ready =
            || async { fetch_state(address).await.is_some_and(|state| state["ready"] == true) };
        wait_until("a query worker answers again", async || ready().await).await;
    }
}

/// Runs a command and kills it after a while; whether it was still running.
async fn kill_after(world: &World, wait: Duration, arguments: &[&str]) -> bool {
    let mut child = world.command(Path::new("")).args(arguments).spawn().unwrap();
    sleep(wait).await;
    let running = child.try_wait().unwrap().is_none();
    let _ = child.kill();
    child.wait().unwrap();
    println!("    kill -9 bsap {} (running: {running})", arguments[..2].join(" "));
    running
}

/// The processes and what they are to do.
struct Scenario<'a> {
    world: &'a mut World,
    expected: Arc<ExpectedAnswers>,
    /// File of the other prompt set.
    prompt_set_file: PathBuf,
    image_count: u64,
    old_workers: Vec<RestartableProcess>,
    query_workers: Vec<RestartableProcess>,
    addresses: [String; 2],
    new_worker: Option<RestartableProcess>,
    started: Instant,
}

/// The scenario, `rounds` times over.
pub async fn run(world: &mut World, images: u64, rounds: u32, pause: Duration) {
    let pictures: Vec<Vec<u8>> = (0..PICTURE_COUNT)
        .map(|n| render_jpeg(&Scene::sample(7, n, PhotoStyle::Studio), 64).unwrap())
        .collect();
    let folder = world.folder.path();
    let mut updates = UpdateGenerator {
        folder: folder.join("pictures"),
        staging_file: folder.join("aside"),
        producer: world.cluster.client().set("enable.idempotence", "true").create().unwrap(),
        pictures: pictures.clone(),
        image_count: images,
        pause,
        expected_images: BTreeMap::new(),
        sent_events: 0,
    };
    for number in 0..images {
        updates.send_change(image_name(number), false).await;
    }
    let mut scenario = Scenario::start(world, images, &pictures).await;
    let (no_updates, no_queries) = <(Arc<AtomicBool>, Arc<AtomicBool>)>::default();
    let seen = Arc::new(ObservedAnswers::default());
    let updating = tokio::spawn(updates.run(no_updates.clone()));
    let asking = [(); 2].map(|()| {
        let (addresses, truth) = (scenario.addresses.clone(), scenario.expected.clone());
        tokio::spawn(expected_answers::query_until_stopped(
            addresses,
            truth,
            seen.clone(),
            no_queries.clone(),
        ))
    });
    for round in 1..=rounds {
        scenario.switch_prompt_set(round).await;
        scenario.switch_model(round).await;
    }
    no_updates.store(true, Ordering::SeqCst);
    let mut updates = updating.await.unwrap();
    scenario.reconcile_unannounced_changes(&mut updates).await;
    let differences = scenario.count_differences(&updates).await;
    no_queries.store(true, Ordering::SeqCst);
    for client in asking {
        client.await.unwrap();
    }
    scenario.print_and_assert_results(&updates, &seen, differences);
    scenario.stop_all();
}

impl<'a> Scenario<'a> {
    /// Until every image is searchable.
    async fn start(world: &'a mut World, images: u64, pictures: &[Vec<u8>]) -> Self {
        let started = Instant::now();
        world.cluster.create(AGAIN, 6, 1 << 20).await;
        let set = world.folder.path().join("other.toml");
        std::fs::write(&set, OTHER_PROMPT_SET).unwrap();
        let truth = Arc::new(ExpectedAnswers {
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
            || RestartableProcess::start(world, "a worker of the old model", &["ingest"], &[]);
        let old_workers = vec![worker(), worker()];
        wait_until("the catalogue is made", async || {
            StateStore::new(&world.store()).read_newest().await.unwrap().is_some()
        })
        .await;
        let listeners = [(); 2].map(|()| std::net::TcpListener::bind("127.0.0.1:0").unwrap());
        let addresses = listeners.each_ref().map(|l| l.local_addr().unwrap().to_string());
        drop(listeners);
        let mut query_worker = |address: &String| {
            let options = [
                ("HTTP__LISTEN", address.as_str()),
                ("SEARCH__CANDIDATE_CHECKPOINT", NEW_CHECKPOINT),
            ];
            RestartableProcess::start(world, "a query worker", &["serve"], &options)
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
            world,
            expected: truth,
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

    /// Reindexes with another prompt set, promotes it, and rolls back.
    async fn switch_prompt_set(&mut self, round: u32) {
        self.print_step(&format!("round {round}: another prompt set"));
        let reindex =
            ["reindex", "statistics", "--prompt-set", self.prompt_set_file.to_str().unwrap()];
        if round == 1 {
            kill_after(self.world, Duration::from_millis(1500), &reindex).await;
        }
        self.old_workers[0].kill_and_restart(self.world);
        self.world.bsap(&reindex);
        let candidate = ["candidate", "set", "other-half", "--prompt-set", "other"];
        let how = ["--weight", "0.5", "--share", "0.4", "--shadow", "0.5"];
        self.world.bsap(&[&candidate[..], &how].concat());
        self.query_workers[0].kill_and_restart(self.world);
        wait_until_answering(&self.addresses).await;
        // What has just become known may still be missing in rows that workers are about to write.
        wait_until("the candidate is promoted", async || {
            self.world.outcome(&["promote", "--yes"]).0 == Some(0)
        })
        .await;
        sleep(Duration::from_secs(2)).await;
        self.world.bsap(&["rollback"]);
    }

    /// Reindexes with another model, promotes it, and rolls back.
    async fn switch_model(&mut self, round: u32) {
        self.print_step(&format!("round {round}: another model"));
        self.fill_new_generation(round).await;
        self.kill_dependencies().await;
        let candidate = ["candidate", "set", "large", "--beside"];
        self.world.bsap(&[&candidate[..], &["--share", "0.3", "--shadow", "0.5"]].concat());
        println!("    {}", evaluate_candidate(self.world));
        self.old_workers[1].kill_and_restart(self.world);
        self.query_workers[1].kill_and_restart(self.world);
        wait_until_answering(&self.addresses).await;
        let mut told = String::new();
        wait_until("the new model is promoted", async || {
            let (code, said) = self.world.outcome(&["promote", "--yes", "--timeout", "120"]);
            if code != Some(0) {
                println!("    not yet: {}", said.lines().last().unwrap_or_default());
            }
            told = said;
            code == Some(0)
        })
        .await;
        for line in told.lines().filter(|l| l.starts_with("coverage") || l.contains("serve")) {
            println!("    {line}");
        }
        // One that starts now serves the new model at once.
        self.query_workers[0].kill_and_restart(self.world);
        wait_until_answering(&self.addresses).await;
        sleep(Duration::from_secs(2)).await;
        let [old, new] = &self.expected.models;
        for address in &self.addresses {
            assert_eq!(fetch_state(address).await.unwrap()["generation"], new.generation);
        }
        // Updates go on, so that the old model may lack some: nobody is there to be asked.
        self.world.bsap(&["rollback", "--yes"]);
        for address in &self.addresses {
            wait_until("the old model answers again", async || {
                fetch_state(address).await.unwrap()["generation"] == old.generation
            })
            .await;
        }
    }

    /// Until the other model's generation has all but what is on its way.
    async fn fill_new_generation(&mut self, round: u32) {
        let reindex = ["reindex", "model", "--checkpoint", NEW_CHECKPOINT, "--rate", "20"];
        if round == 1 {
            kill_after(self.world, Duration::from_millis(3500), &reindex).await;
        }
        // It is set up before its first worker starts, which would not know what it is for.
        assert_eq!(self.world.outcome(&reindex).0, Some(0));
        let worker = self.new_worker.get_or_insert_with(|| {
            let options = [("MODEL__CHECKPOINT", NEW_CHECKPOINT)];
            RestartableProcess::start(
                self.world,
                "the worker of the new model",
                &["ingest"],
                &options,
            )
        });
        sleep(Duration::from_secs(4)).await;
        worker.kill_and_restart(self.world);
        // Updates go on, so that some are always on their way.
        let mut progress = String::new();
        wait_until("the new generation has all but what is on its way", async || {
            let told = self.world.outcome(&reindex).1;
            let counted = told.lines().find(|line| line.contains("are up to date in it"));
            counted.unwrap_or_default().clone_into(&mut progress);
            let asked = progress.split("; ").nth(1).and_then(|rest| rest.split(' ').next());
            let asked = asked.and_then(|n| n.parse::<u64>().ok());
            asked.is_some_and(|n| n <= self.image_count / 10)
        })
        .await;
        println!("    {progress}");
    }

    /// Kafka, and the object storage.
    async fn kill_dependencies(&mut self) {
        println!("    kill -9 Kafka");
        self.world.cluster.end(0, "KILL");
        sleep(Duration::from_secs(1)).await;
        self.world.cluster.launch(0);
        self.world.cluster.wait_until_ready();
        if let Some(minio) = &mut self.world.minio {
            println!("    kill -9 MinIO");
            minio.kill();
            sleep(Duration::from_secs(2)).await;
            minio.launch();
        }
    }

    /// The generations in the order of the models.
    async fn read_generations(&self) -> [Generation; 2] {
        let state = StateStore::new(&self.world.store()).read_newest().await.unwrap().unwrap();
        [state.live, state.standby.unwrap().generation]
    }

    async fn wait_until_caught_up(&mut self) {
        let [_, new] = self.read_generations().await;
        let workers = self.old_workers.iter_mut().map(|p| p.worker.as_mut().unwrap());
        self.world.caught_up(&mut workers.collect::<Vec<_>>()).await;
        let worker = self.new_worker.as_mut().and_then(|p| p.worker.as_mut()).unwrap();
        self.world.caught_up_beside(&new, &mut [worker]).await;
    }

    /// Changes images without telling, and mends that.
    async fn reconcile_unannounced_changes(&mut self, updates: &mut UpdateGenerator) {
        self.print_step("reconcile");
        self.wait_until_caught_up().await;
        let there = updates.expected_images.iter().filter(|(_, wanted)| wanted.1);
        let there: Vec<String> =
            there.map(|(id, _)| id.clone()).take(UNANNOUNCED_DELETES).collect();
        for id in &there {
            std::fs::remove_file(updates.folder.join(id)).unwrap();
            updates.expected_images.remove(id);
        }
        for number in self.image_count..self.image_count + UNANNOUNCED_UPSERTS {
            updates.write_picture(&image_name(number));
            updates.expected_images.insert(image_name(number), (0, true));
        }
        let folder = updates.folder.to_str().unwrap();
        let look = ["reconcile", folder, "--sequence-is-time", "--grace", "0"];
        let look = [&look[..], &["--max-deletes", "0.5"]].concat();
        let (code, told) = self.world.outcome(&look);
        assert!(code == Some(1) && told.contains("differs"), "{told}");
        let mended = self.world.bsap(&[&look[..], &["--repair"]].concat());
        self.wait_until_caught_up().await;
        let after = self.world.bsap(&look);
        for line in mended.lines().chain(after.lines()) {
            println!("    {line}");
        }
    }

    /// Images missing, strange and not the newest, in each generation; until the query workers have
    /// what must be there.
    async fn count_differences(&self, updates: &UpdateGenerator) -> [[usize; 2]; 3] {
        let live = updates.live_images();
        let [mut missing, mut strange, mut old] = [[0; 2]; 3];
        for (i, generation) in self.read_generations().await.iter().enumerate() {
            let found = self.world.newest(generation).await;
            let there = |id: &String| found.get(id).and_then(|(_, content)| content.as_ref());
            missing[i] = live.keys().filter(|id| there(id).is_none()).count();
            let stays = |id: &&String| there(id).is_some() && !live.contains_key(id);
            strange[i] = found.keys().filter(stays).count();
            let is_old = |(id, sequence): &(&&String, &u64)| {
                found.get(**id).is_some_and(|(s, _)| s.parse::<u64>().unwrap() < **sequence)
            };
            old[i] = live.iter().filter(is_old).count();
        }
        for address in &self.addresses {
            wait_until("the query workers have it all, in both generations", async || {
                let state = fetch_state(address).await.unwrap();
                let count = json!(live.len());
                state["images"] == count && state["beside"]["images"] == count
            })
            .await;
        }
        [missing, strange, old]
    }

    /// Prints what has been, and expects that nothing was wrong.
    fn print_and_assert_results(
        &self,
        updates: &UpdateGenerator,
        seen: &ObservedAnswers,
        differences: [[usize; 2]; 3],
    ) {
        let (answers, failed, mixed) = (
            seen.answers.lock().unwrap(),
            seen.failed.lock().unwrap(),
            seen.mismatches.lock().unwrap(),
        );
        let [missing, strange, old] = differences;
        println!(
            "models and prompt sets: {} updates; {} queries answered, {} of them by the other \
             address, {} failed, {} mixed; {} live images, missing in the old and the new generation \
             {missing:?}, strange {strange:?}, not the newest {old:?}; {} lost notifications mended; \
             {:.0} s",
            updates.sent_events,
            answers.values().sum::<u64>(),
            seen.retried.load(Ordering::SeqCst),
            failed.len(),
            mixed.len(),
            updates.live_images().len(),
            UNANNOUNCED_DELETES + UNANNOUNCED_UPSERTS as usize,
            self.started.elapsed().as_secs_f64(),
        );
        for ((generation, configuration), count) in &*answers {
            println!("    {count} answers by {configuration} of {generation}");
        }
        assert_eq!(*failed, Vec::<String>::new());
        assert_eq!(*mixed, Vec::<String>::new());
        assert_eq!(differences, [[0; 2]; 3]);
        let names: Vec<&str> = answers.keys().map(|(_, name)| name.as_str()).collect();
        for name in self.expected.configurations.keys() {
            assert!(names.contains(name), "{name} answered nothing");
        }
    }

    fn stop_all(self) {
        let all = self.old_workers.into_iter().chain(self.query_workers).chain(self.new_worker);
        for mut process in all {
            process.worker.take().unwrap().stop();
        }
    }
}

/// Compares what is served with the candidate of another model, as one would before promoting it.
fn evaluate_candidate(world: &World) -> String {
    let asked = world.folder.path().join("asked.jsonl");
    let texts = ["a red mug", "a blue chair", "a green lamp"];
    let lines = texts.map(|text| format!("{}\n", json!({ "text": text })));
    std::fs::write(&asked, lines.concat()).unwrap();
    let report = world.bsap(&["evaluate", "--log", asked.to_str().unwrap(), "--json", "-"]);
    let report = &report[report.find('{').unwrap()..=report.rfind('}').unwrap()];
    let report: Value = serde_json::from_str(report).unwrap();
    let models = report["models"].as_array().unwrap();
    let told: Vec<String> = models
        .iter()
        .map(|m| format!("{} by {}, {} images", m["role"], m["model"], m["images"]))
        .collect();
    assert_eq!(told.len(), 2, "{told:?}");
    format!("evaluated: {}", told.join("; "))
}
