use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use tempfile::TempDir;

use super::environment::HubEnvironment;
use super::find_or_download;
use super::test_hub::{
    Action, COMMIT, SeenRequest, TestHub, WEIGHTS, checkpoint_files, etag, safetensors_file,
};

const ID: &str = "org/model";
const SIZE: usize = 300_000;

/// A cache of its own, and the variables that name it and a hub.
struct Client {
    folder: TempDir,
    environment: HubEnvironment,
}

impl Client {
    fn new(hub: &TestHub) -> Self {
        Self::with_variables(&hub.url, &[])
    }

    fn with_variables(url: &str, variables: &[(&str, &str)]) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let mut environment = HubEnvironment::read(
            |name| match name {
                "HF_ENDPOINT" => Some(url.into()),
                "HF_HUB_CACHE" => Some(folder.path().into()),
                _ => variables.iter().find(|(n, _)| *n == name).map(|(_, value)| value.into()),
            },
            None,
        )
        .unwrap_or_else(|e| panic!("{e}"));
        environment.stall_timeout = Duration::from_secs(1);
        Self { folder, environment }
    }

    fn find(&self) -> Result<PathBuf, String> {
        self.find_at("main", false)
    }

    fn find_at(&self, revision: &str, offline: bool) -> Result<PathBuf, String> {
        find_or_download(&self.environment, ID, revision, offline).map_err(|e| e.to_string())
    }

    fn repo(&self) -> PathBuf {
        self.folder.path().join("models--org--model")
    }

    fn blob(&self, name: &str, bytes: &[u8]) -> PathBuf {
        self.repo().join("blobs").join(etag(name, bytes))
    }

    /// Returns the names in `blobs`.
    fn blobs(&self) -> Vec<String> {
        let folder = std::fs::read_dir(self.repo().join("blobs"));
        let names = folder.into_iter().flatten().map(|entry| entry.unwrap().file_name());
        names.map(|name| name.into_string().unwrap()).collect()
    }
}

fn weights() -> Vec<u8> {
    safetensors_file(SIZE)
}

/// Starts a hub whose requests for the bytes of the weights are answered by `download`.
fn start_hub(download: impl Fn(&SeenRequest) -> Action + Send + Sync + 'static) -> TestHub {
    TestHub::start(checkpoint_files(SIZE), move |request| {
        if request.is_download() { download(request) } else { Action::Serve }
    })
}

#[track_caller]
fn assert_downloaded(client: &Client) {
    let folder = client.find().unwrap_or_else(|e| panic!("{e}"));
    assert_snapshot(&folder);
    assert!(!client.blobs().iter().any(|name| name.ends_with(".incomplete")));
}

#[track_caller]
fn assert_snapshot(folder: &Path) {
    for (name, bytes) in checkpoint_files(SIZE) {
        assert!(std::fs::read(folder.join(&name)).unwrap() == bytes, "{name}");
    }
}

#[track_caller]
fn assert_refused(client: &Client, words: &[&str]) -> String {
    let error = client.find().expect_err("it was downloaded");
    for word in words {
        assert!(error.contains(word), "{word} is not in: {error}");
    }
    assert!(!error.contains('\n'), "{error}");
    error
}

#[test]
fn a_model_is_laid_out_as_python_does_and_found_without_a_request() {
    let hub = start_hub(|_| Action::Serve);
    let client = Client::new(&hub);
    assert_downloaded(&client);
    let repo = client.repo();
    assert_eq!(std::fs::read_to_string(repo.join("refs/main")).unwrap(), COMMIT);
    let link = std::fs::read_link(repo.join("snapshots").join(COMMIT).join(WEIGHTS)).unwrap();
    assert_eq!(link, Path::new("../../blobs").join(etag(WEIGHTS, &weights())));
    assert!(repo.join(".no_exist").join(COMMIT).join("merges.txt").is_file());
    let requests = hub.seen();
    assert!(requests.iter().all(|r| r.accept_encoding.as_deref() == Some("identity")));
    assert!(
        requests.iter().filter(|r| r.path.contains("/resolve/main/")).count() == 1,
        "one commit, even if the branch moves"
    );
    assert_downloaded(&client);
    let by_commit = client.find_at(COMMIT, false);
    assert_snapshot(&by_commit.unwrap());
    assert_eq!(hub.seen().len(), requests.len(), "the cache is used");
}

#[test]
fn a_broken_connection_is_resumed_where_it_broke_off() {
    let hub = start_hub(|request| match request.earlier {
        0 => Action::BreakAfter(100_000),
        // More failures than attempts without progress are allowed.
        1..=7 => Action::BreakAfter(1_000),
        _ => Action::Serve,
    });
    assert_downloaded(&Client::new(&hub));
    let ranges = hub.ranges();
    assert_eq!(ranges.len(), 9);
    assert_eq!(ranges[0], None);
    let first = |range: &Option<String>| -> usize {
        range.as_ref().unwrap()[6..].strip_suffix('-').unwrap().parse().unwrap()
    };
    assert!(ranges[1..].windows(2).all(|pair| first(&pair[0]) < first(&pair[1])), "{ranges:?}");
}

#[test]
fn a_download_that_another_process_left_is_resumed() {
    let hub = start_hub(|_| Action::Serve);
    let client = Client::new(&hub);
    let blob = client.blob(WEIGHTS, &weights());
    std::fs::create_dir_all(blob.parent().unwrap()).unwrap();
    std::fs::write(blob.with_extension("incomplete"), &weights()[..123_456]).unwrap();
    assert_downloaded(&client);
    assert_eq!(hub.ranges(), [Some("bytes=123456-".to_owned())]);
}

#[test]
fn what_is_resumed_from_wrong_bytes_is_downloaded_again() {
    let hub = start_hub(|_| Action::Serve);
    for left in [vec![7; 1_000], vec![7; weights().len()], vec![7; 2 * weights().len()]] {
        let client = Client::new(&hub);
        let blob = client.blob(WEIGHTS, &weights());
        std::fs::create_dir_all(blob.parent().unwrap()).unwrap();
        std::fs::write(blob.with_extension("incomplete"), left).unwrap();
        assert_downloaded(&client);
    }
}

#[test]
fn servers_that_cannot_resume_send_the_file_again() {
    type Answer = fn() -> Action;
    let answers: [Answer; 4] = [
        || Action::ServeAll,
        || Action::ServeAllAs(None),
        || Action::ServeAllAs(Some("bytes 0-9/10".into())),
        || Action::Status(416, "content-range", "bytes */10".into()),
    ];
    for answer in answers {
        let hub = start_hub(move |request| match (request.earlier, &request.range) {
            (0, _) => Action::BreakAfter(100_000),
            (_, Some(_)) => answer(),
            (_, None) => Action::Serve,
        });
        assert_downloaded(&Client::new(&hub));
    }
}

#[test]
fn a_storage_on_another_host_gets_no_token() {
    let storage = TestHub::start(checkpoint_files(SIZE), |request| match request.earlier {
        // A signed address that has expired.
        0 => Action::Status(403, "x-error", "expired".into()),
        _ => Action::Serve,
    });
    let target = format!("{}/x/{COMMIT}/{WEIGHTS}?signature=secret", storage.url);
    let hub = TestHub::start(checkpoint_files(SIZE), move |request| {
        let for_weights = request.path.ends_with(WEIGHTS);
        if for_weights { Action::Redirect(target.clone()) } else { Action::Serve }
    });
    let client = Client::with_variables(&hub.url, &[("HF_TOKEN", "hf_secret")]);
    assert_downloaded(&client);
    let with_token = |r: &SeenRequest| r.authorization.as_deref() == Some("Bearer hf_secret");
    assert!(hub.seen().iter().all(with_token));
    assert_eq!(storage.seen().len(), 2);
    assert!(storage.seen().iter().all(|r| r.authorization.is_none() && !r.is_head));
}

#[test]
fn a_redirect_on_the_same_host_keeps_the_token_and_the_way_back_does_not() {
    let hub = TestHub::start(checkpoint_files(SIZE), |request| {
        if request.path.contains("/resolve/") && !request.path.ends_with(WEIGHTS) {
            let name = request.path.rsplit('/').next().unwrap();
            return Action::Redirect(format!("/api/resolve-cache/{COMMIT}/{name}"));
        }
        Action::Serve
    });
    let url = hub.url.clone();
    let client = Client::with_variables(&url, &[("HF_TOKEN", "hf_secret")]);
    assert_downloaded(&client);
    assert!(hub.seen().iter().all(|r| r.authorization.is_some()));

    let back = TestHub::start(checkpoint_files(SIZE), move |request| {
        let name = request.path.rsplit('/').next().unwrap();
        Action::Redirect(format!("{url}/back/{COMMIT}/{name}"))
    });
    let hub_requests = hub.seen().len();
    let forth = Client::with_variables(&back.url, &[("HF_TOKEN", "hf_secret")]);
    assert_downloaded(&forth);
    assert!(hub.seen()[hub_requests..].iter().all(|r| r.authorization.is_none()));
}

#[test]
fn endless_redirects_end() {
    let hub =
        TestHub::start(checkpoint_files(SIZE), |request| Action::Redirect(request.path.clone()));
    assert_refused(&Client::new(&hub), &["more than 10 redirects"]);
}

#[test]
fn a_compressed_answer_is_refused_by_name() {
    let hub = start_hub(|_| Action::Compress);
    assert_refused(&Client::new(&hub), &[WEIGHTS, "gzip", "identity"]);
}

#[test]
fn wrong_bytes_never_get_a_name() {
    let mut wrong = weights();
    wrong[200_000] ^= 1;
    let once = wrong.clone();
    let hub = start_hub(move |request| match request.earlier {
        0 => Action::Send(once.clone()),
        _ => Action::Serve,
    });
    assert_downloaded(&Client::new(&hub));

    let hub = start_hub(move |_| Action::Send(wrong.clone()));
    let client = Client::new(&hub);
    assert_refused(&client, &[WEIGHTS, "other bytes", &etag(WEIGHTS, &weights())]);
    assert!(!client.blob(WEIGHTS, &weights()).exists());
    assert_eq!(client.blobs().len(), 3, "the small files only: {:?}", client.blobs());

    let hub = TestHub::start(checkpoint_files(SIZE), |request| {
        let small = !request.is_head && request.path.ends_with("/config.json");
        if small { Action::Send(b"{\"of\": \"config.jsoN\"}".to_vec()) } else { Action::Serve }
    });
    assert_refused(&Client::new(&hub), &["config.json", "other bytes"]);
}

#[test]
fn a_file_of_another_length_than_announced_is_refused() {
    let longer = [weights(), vec![1; 10]].concat();
    let hub = start_hub(move |_| Action::Send(longer.clone()));
    assert_refused(&Client::new(&hub), &[WEIGHTS, "more than"]);
    let hub = start_hub(|_| Action::Send(weights()[..1_000].to_vec()));
    assert_refused(&Client::new(&hub), &[WEIGHTS, "bytes"]);
}

#[test]
fn silence_ends_an_attempt_and_the_next_one_continues() {
    let hub = start_hub(|request| match request.earlier {
        0 | 1 => Action::SilentAfter(50_000),
        _ => Action::Serve,
    });
    assert_downloaded(&Client::new(&hub));
    let ranges = hub.ranges();
    assert_eq!(ranges[1].as_deref(), Some("bytes=50000-"));
    assert_eq!(ranges.len(), 3, "{ranges:?}");

    let hub = start_hub(|_| Action::SilentAfter(0));
    let started = Instant::now();
    assert_refused(&Client::new(&hub), &[WEIGHTS, "no byte within 1 s"]);
    assert_eq!(hub.ranges().len(), 5);
    assert!(started.elapsed() < Duration::from_secs(60));
}

#[test]
fn a_mirror_without_head_is_asked_by_get() {
    for status in [405, 501] {
        let hub = TestHub::start(checkpoint_files(SIZE), move |request| {
            if request.is_head {
                Action::Status(status, "allow", "GET".into())
            } else {
                Action::Serve
            }
        });
        assert_downloaded(&Client::new(&hub));
    }
}

#[test]
fn an_overloaded_hub_is_asked_again_when_it_says() {
    let hub = TestHub::start(checkpoint_files(SIZE), |request| match request.earlier {
        0 => Action::Status(503, "x-by", "test".into()),
        1 if request.is_download() => Action::Status(429, "retry-after", "1".into()),
        _ => Action::Serve,
    });
    let started = Instant::now();
    assert_downloaded(&Client::new(&hub));
    assert!(started.elapsed() >= Duration::from_secs(1));
    let hub = start_hub(|_| Action::Status(502, "x-by", "test".into()));
    assert_refused(&Client::new(&hub), &["502"]);
}

#[test]
fn refusals_say_what_to_do_and_never_the_token() {
    for status in [401, 403] {
        let hub = TestHub::start(checkpoint_files(SIZE), move |request| {
            match request.authorization.as_deref() {
                Some("Bearer hf_good") => Action::Serve,
                _ => Action::Status(status, "x-error-code", "GatedRepo".into()),
            }
        });
        let code = status.to_string();
        assert_refused(&Client::new(&hub), &[&code, "without a token", "set HF_TOKEN", "terms"]);
        let wrong = Client::with_variables(&hub.url, &[("HF_TOKEN", "hf_wrong")]);
        let error = assert_refused(&wrong, &[&code, "HF_TOKEN", ID]);
        assert!(!error.contains("hf_wrong"), "{error}");
        assert_downloaded(&Client::with_variables(&hub.url, &[("HF_TOKEN", "hf_good")]));
    }
    let hub = TestHub::start(checkpoint_files(SIZE), |_| {
        Action::Status(404, "x-error-code", "RevisionNotFound".into())
    });
    assert_refused(&Client::new(&hub), &["main", "branch, tag or commit"]);
    let empty = TestHub::start([].into(), |_| Action::Serve);
    assert_refused(&Client::new(&empty), &["config.json", "404"]);
}

#[test]
fn of_two_processes_the_second_waits_for_the_first() {
    let hub = start_hub(|request| match request.earlier {
        0 => Action::SilentAfter(100_000),
        _ => Action::Serve,
    });
    let client = Client::new(&hub);
    std::thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| assert_snapshot(&client.find().unwrap()));
        }
    });
    assert_eq!(hub.ranges(), [None, Some("bytes=100000-".to_owned())], "one downloads");
    assert_downloaded(&client);
}

#[test]
fn a_lock_that_python_holds_is_waited_for() {
    let hub = start_hub(|_| Action::Serve);
    let client = Client::new(&hub);
    let locks = client.folder.path().join(".locks/models--org--model");
    std::fs::create_dir_all(&locks).unwrap();
    let lock = locks.join(format!("{}.lock", etag(WEIGHTS, &weights())));
    let held = std::fs::File::create(lock).unwrap();
    held.lock().unwrap();
    std::thread::scope(|scope| {
        let waiting = scope.spawn(|| client.find());
        std::thread::sleep(Duration::from_millis(800));
        assert!(!waiting.is_finished() && hub.ranges().is_empty());
        held.unlock().unwrap();
        assert_snapshot(&waiting.join().unwrap().unwrap());
    });
}

/// Lays out what Python's client leaves behind: no `.no_exist`, and `refs` only for a branch.
fn fill_as_python(client: &Client, reference: Option<&str>) {
    let snapshot = client.repo().join("snapshots").join(COMMIT);
    std::fs::create_dir_all(&snapshot).unwrap();
    std::fs::create_dir_all(client.repo().join("blobs")).unwrap();
    std::fs::create_dir_all(client.repo().join("refs")).unwrap();
    for (name, bytes) in checkpoint_files(SIZE) {
        std::fs::write(client.blob(&name, &bytes), &bytes).unwrap();
        let target = Path::new("../../blobs").join(etag(&name, &bytes));
        std::os::unix::fs::symlink(target, snapshot.join(name)).unwrap();
    }
    if let Some(reference) = reference {
        std::fs::write(client.repo().join("refs").join(reference), COMMIT).unwrap();
    }
}

#[test]
fn a_cache_that_python_filled_is_used_by_branch_and_by_commit() {
    let unreachable = "http://127.0.0.1:9";
    for variables in [&[][..], &[("HF_HUB_OFFLINE", "1")]] {
        let client = Client::with_variables(unreachable, variables);
        fill_as_python(&client, Some("main"));
        assert_snapshot(&client.find().unwrap());
        let client = Client::with_variables(unreachable, variables);
        fill_as_python(&client, None);
        let by_commit = client.find_at(COMMIT, false);
        assert_snapshot(&by_commit.unwrap());
        assert!(client.find().is_err(), "nothing says that main is this commit");
    }
    // With a hub, what Python did not ask for is asked once, and nothing is downloaded again.
    let hub = start_hub(|_| Action::Serve);
    let client = Client::new(&hub);
    fill_as_python(&client, Some("main"));
    assert_downloaded(&client);
    assert!(hub.seen().iter().all(|r| r.is_head), "{:?}", hub.seen());
    let requests = hub.seen().len();
    assert_downloaded(&client);
    assert_eq!(hub.seen().len(), requests);
}

#[test]
fn a_damaged_cache_is_named_offline_and_downloaded_again_with_a_hub() {
    type Damage = fn(&mut Vec<u8>);
    let hub = start_hub(|_| Action::Serve);
    let damages: [(&str, Damage); 3] = [
        // As an append of earlier versions left it.
        (WEIGHTS, |bytes| bytes.extend_from_slice(&[0; 1_000])),
        (WEIGHTS, |bytes| bytes.truncate(1_000)),
        ("tokenizer.json", |bytes| bytes[0] = b' '),
    ];
    for (name, damage) in damages {
        let client = Client::new(&hub);
        assert_downloaded(&client);
        let blob = client.blob(name, &checkpoint_files(SIZE)[name]);
        let mut bytes = std::fs::read(&blob).unwrap();
        damage(&mut bytes);
        std::fs::write(&blob, bytes).unwrap();
        let error = client.find_at("main", true).unwrap_err();
        assert!(error.contains(name) && error.contains("damaged"), "{error}");
        assert_downloaded(&client);
    }
}

#[test]
fn nothing_is_requested_offline() {
    let hub = start_hub(|_| Action::Serve);
    let client = Client::with_variables(&hub.url, &[("HF_HUB_OFFLINE", "1")]);
    let cache = client.folder.path().to_str().unwrap().to_owned();
    assert_refused(&client, &["HF_HUB_OFFLINE is set", "config.json", &cache]);
    let client = Client::new(&hub);
    let error = client.find_at("main", true).unwrap_err();
    assert!(error.contains("model.offline is on"), "{error}");
    assert!(hub.seen().is_empty());
}

#[test]
fn a_cache_that_cannot_be_written_is_one_sentence_with_its_path() {
    let hub = start_hub(|_| Action::Serve);
    let mut client = Client::new(&hub);
    let file = client.folder.path().join("file");
    std::fs::write(&file, "").unwrap();
    client.environment.cache = file.join("cache");
    let path = file.display().to_string();
    assert_refused(&client, &[&path, "Not a directory", "set HF_HUB_CACHE"]);
}

#[test]
fn a_full_disk_is_one_sentence_with_its_path() {
    let hub = start_hub(|_| Action::Serve);
    let client = Client::new(&hub);
    // Every write to this device fails as on a full disk.
    let partial = client.blob(WEIGHTS, &weights()).with_extension("incomplete");
    std::fs::create_dir_all(partial.parent().unwrap()).unwrap();
    std::os::unix::fs::symlink("/dev/full", &partial).unwrap();
    let path = partial.display().to_string();
    assert_refused(&client, &[&path, "No space left", "free space", "HF_HUB_CACHE"]);
    std::fs::remove_file(partial).unwrap();
    assert_downloaded(&client);
}

#[test]
fn weights_in_several_files_and_models_in_a_folder_are_downloaded() {
    let mut files = checkpoint_files(SIZE);
    files.remove(WEIGHTS);
    let index = r#"{"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}"#;
    files.insert("model.safetensors.index.json".into(), index.into());
    files.insert("model-1.safetensors".into(), safetensors_file(10));
    let hub = TestHub::start(files.clone(), |_| Action::Serve);
    assert_refused(&Client::new(&hub), &["model-2.safetensors"]);
    files.insert("model-2.safetensors".into(), safetensors_file(20));
    let hub = TestHub::start(files.clone(), |_| Action::Serve);
    let client = Client::new(&hub);
    let folder = client.find().unwrap();
    assert_eq!(std::fs::read(folder.join("model-2.safetensors")).unwrap(), safetensors_file(20));
    let requests = hub.seen().len();
    client.find().unwrap();
    assert_eq!(hub.seen().len(), requests);

    let modules = r#"[{"idx": 0, "path": "0_CLIPModel", "type": "x"}]"#;
    let mut files: std::collections::BTreeMap<_, _> = checkpoint_files(SIZE)
        .into_iter()
        .map(|(name, bytes)| (format!("0_CLIPModel/{name}"), bytes))
        .collect();
    files.insert("modules.json".into(), modules.into());
    let hub = TestHub::start(files.clone(), |_| Action::Serve);
    let client = Client::new(&hub);
    assert_snapshot(&client.find().unwrap().join("0_CLIPModel"));
    let requests = hub.seen().len();
    client.find().unwrap();
    assert_eq!(hub.seen().len(), requests);
    for hostile in ["../up", "/etc", ".git"] {
        files.insert("modules.json".into(), format!(r#"[{{"path": "{hostile}"}}]"#).into());
        let hub = TestHub::start(files.clone(), |_| Action::Serve);
        assert_refused(&Client::new(&hub), &["modules.json", hostile]);
    }
}

#[test]
fn the_weights_are_those_of_the_layout_that_is_read() {
    let mut files = checkpoint_files(SIZE);
    files.insert("open_clip_config.json".into(), "{}".into());
    files.insert("open_clip_model.safetensors".into(), safetensors_file(10));
    let has = |folder: &Path, name: &str| folder.join(name).exists();
    let hub = TestHub::start(files.clone(), |_| Action::Serve);
    let folder = Client::new(&hub).find().unwrap();
    assert!(!has(&folder, "open_clip_model.safetensors"));
    for config in [None, Some(r#"{"auto_map": {"AutoModel": "code.Model"}}"#)] {
        files.remove("config.json");
        if let Some(config) = config {
            files.insert("config.json".into(), config.into());
        }
        let hub = TestHub::start(files.clone(), |_| Action::Serve);
        let client = Client::new(&hub);
        let folder = client.find().unwrap();
        assert!(has(&folder, "open_clip_model.safetensors") && !has(&folder, WEIGHTS));
        let requests = hub.seen().len();
        client.find().unwrap();
        assert_eq!(hub.seen().len(), requests);
    }
}

#[test]
fn pickled_weights_are_refused_with_the_remedy() {
    let mut files = checkpoint_files(SIZE);
    files.remove(WEIGHTS);
    let hub = TestHub::start(files.clone(), |_| Action::Serve);
    assert_refused(&Client::new(&hub), &["org/model/model.safetensors: is missing"]);
    files.insert("pytorch_model.bin".into(), b"pickle".to_vec());
    let hub = TestHub::start(files, |_| Action::Serve);
    assert_refused(&Client::new(&hub), &["org/model/pytorch_model.bin: is a pickle", "convert it"]);
}

#[test]
fn names_that_would_leave_the_cache_are_refused() {
    let hub = start_hub(|_| Action::Serve);
    let client = Client::new(&hub);
    for revision in ["../main", "/main", "a/../../b"] {
        let error = client.find_at(revision, false).unwrap_err();
        assert!(error.contains("no branch, tag or commit"), "{error}");
    }
    for header in [("etag", "../../x"), ("x-repo-commit", "../x")] {
        let hub = TestHub::start(checkpoint_files(SIZE), move |_| {
            Action::Status(200, header.0, header.1.into())
        });
        assert_refused(&Client::new(&hub), &["no usable"]);
    }
    assert!(hub.seen().is_empty());
}
