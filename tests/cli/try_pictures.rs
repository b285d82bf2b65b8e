//! `bsap try` on real files with the demo's model: what is stored, skipped and followed, and one sentence with
//! a remedy for everything that can go wrong at the start.

use std::fs;
use std::io::{BufRead as _, BufReader, Write as _};
use std::net::{TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use tempfile::TempDir;

use super::{assert_fails, run_bsap};

/// Longest wait for something that takes a second or two.
const PATIENCE: Duration = Duration::from_secs(120);

/// Pictures, and a folder for the table.
struct Fixture {
    folder: TempDir,
}

impl Fixture {
    /// Six pictures, one of them without an extension.
    fn new() -> Self {
        let fixture = Self { folder: tempfile::tempdir().unwrap() };
        fs::create_dir_all(fixture.photos().join("sub")).unwrap();
        for (source, name) in [
            ("200x301.png", "a.png"),
            ("301x200.png", "b.PNG"),
            ("32x32.png", "sub/c.png"),
            ("97x33.png", "sub/d"),
            ("64x190.png", "e.png"),
            ("9x7.png", "ü x.png"),
        ] {
            fs::copy(
                Path::new("tests/fixtures/pictures").join(source),
                fixture.photos().join(name),
            )
            .unwrap();
        }
        fixture
    }

    fn photos(&self) -> PathBuf {
        self.folder.path().join("photos")
    }

    fn path(&self, name: &str) -> String {
        self.folder.path().join(name).display().to_string()
    }

    /// Runs `bsap try PHOTOS --dir … --checkpoint demo` with more arguments.
    fn run(&self, arguments: &[&str]) -> Output {
        let (photos, state) = (self.path("photos"), self.path("state"));
        let usual = ["try", &photos, "--dir", &state, "--checkpoint", "demo"];
        run_bsap(&[&usual, arguments].concat(), &[])
    }

    /// Runs it to the end, and returns the JSON.
    #[track_caller]
    fn run_once(&self) -> Value {
        let output = self.run(&["--once", "--json"]);
        let text = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{text}");
        let outcome: Value = serde_json::from_slice(&output.stdout).expect(&text);
        assert_eq!(
            outcome["found"].as_u64().unwrap(),
            outcome["stored"].as_u64().unwrap()
                + outcome["skipped"].as_array().unwrap().len() as u64,
            "{outcome}"
        );
        outcome
    }
}

fn count(outcome: &Value, key: &str) -> u64 {
    outcome[key].as_u64().unwrap()
}

#[test]
fn every_file_is_stored_or_skipped_with_a_reason_and_a_second_start_embeds_only_what_differs() {
    let fixture = Fixture::new();
    fs::write(fixture.photos().join("notes.txt"), "notes").unwrap();
    fs::write(fixture.photos().join("sub/no-picture.jpg"), "notes").unwrap();
    let whole = fs::read(fixture.photos().join("a.png")).unwrap();
    fs::write(fixture.photos().join("half.png"), &whole[..whole.len() / 2]).unwrap();
    fs::write(fixture.photos().join("small.psd"), "x").unwrap();
    let outcome = fixture.run_once();
    assert_eq!((count(&outcome, "found"), count(&outcome, "stored")), (10, 6), "{outcome}");
    assert_eq!((count(&outcome, "failed"), count(&outcome, "unchanged")), (0, 0), "{outcome}");
    let skipped = outcome["skipped"].as_array().unwrap();
    for (path, word) in [
        ("half.png", "damaged"),
        ("small.psd", "PSD"),
        ("notes.txt", "no picture"),
        ("sub/no-picture.jpg", "not an image"),
    ] {
        let ends_with_path = |entry: &&Value| entry["path"].as_str().unwrap().ends_with(path);
        let entry = skipped.iter().find(ends_with_path).unwrap();
        assert!(entry["reason"].as_str().unwrap().contains(word), "{entry}");
    }

    let outcome = fixture.run_once();
    assert_eq!((count(&outcome, "stored"), count(&outcome, "unchanged")), (6, 6), "{outcome}");

    // One new, one changed, one removed, one replaced by an older file of another size.
    fs::copy("tests/fixtures/pictures/9x7.png", fixture.photos().join("new.png")).unwrap();
    fs::copy("tests/fixtures/pictures/97x33.png", fixture.photos().join("a.png")).unwrap();
    fs::remove_file(fixture.photos().join("e.png")).unwrap();
    let older = fs::File::options().write(true).open(fixture.photos().join("b.PNG")).unwrap();
    older.set_modified(std::time::SystemTime::UNIX_EPOCH + Duration::from_secs(1)).unwrap();
    let outcome = fixture.run_once();
    assert_eq!((count(&outcome, "stored"), count(&outcome, "unchanged")), (6, 3), "{outcome}");
    let table = ("BSAP_TABLE__URL", outcome["table"].as_str().unwrap());
    let status = run_bsap(&["verify"], &[table]);
    let status = String::from_utf8(status.stdout).unwrap();
    assert!(status.contains('6') && !status.contains("decode_rule_differs"), "{status}");

    images_decoded_under_another_rule_are_listed_as_events(&fixture, table);
}

/// Under the rule of the table none; under another all that are not deleted, as events that can be published.
#[track_caller]
fn images_decoded_under_another_rule_are_listed_as_events(fixture: &Fixture, table: (&str, &str)) {
    let listed = run_bsap(&["verify", "--decoded-otherwise"], &[table]);
    assert!(listed.status.success() && listed.stdout.is_empty(), "{listed:?}");

    let accepting = [table, ("BSAP_DECODE__DAMAGED", "accept")];
    let status = run_bsap(&["verify"], &accepting);
    assert!(status.status.success(), "a warning: {status:?}");
    assert!(String::from_utf8_lossy(&status.stdout).contains("decode_rule_differs"), "{status:?}");
    let listed = run_bsap(&["verify", "--decoded-otherwise"], &accepting);
    assert!(listed.status.success(), "{listed:?}");
    let events = String::from_utf8(listed.stdout).unwrap();
    let events_file = fixture.path("otherwise.jsonl");
    fs::write(&events_file, &events).unwrap();
    let events: Vec<Value> =
        events.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    let ids: Vec<_> = events.iter().map(|event| event["image_id"].as_str().unwrap()).collect();
    assert_eq!(ids.len(), 6, "{ids:?}");
    assert!(!ids.iter().any(|id| id.ends_with("e.png")), "deleted: {ids:?}");
    for event in &events {
        assert_eq!(event["decode_rule"], "1 refuse", "{event}");
        assert_eq!(event["operation"], "upsert", "{event}");
        let file = url::Url::parse(event["uri"].as_str().unwrap()).unwrap().to_file_path().unwrap();
        assert!(file.is_file(), "{event}");
    }

    let published = run_bsap(&["publish", "--jsonl", &events_file, "--dry-run"], &[]);
    assert!(published.status.success(), "{published:?}");
    let published = String::from_utf8(published.stdout).unwrap();
    let published: Vec<Value> =
        published.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    // The stored versions, so that no newer event is superseded.
    let versions = |events: &[Value]| -> Vec<(Value, Value)> {
        let version = |event: &Value| (event["image_id"].clone(), event["event_time"].clone());
        events.iter().map(version).collect()
    };
    assert_eq!(versions(&published), versions(&events));
    assert!(events.iter().all(|event| event["event_time"].is_string()), "{events:?}");
}

#[test]
fn a_killed_process_goes_on_where_it_was() {
    let fixture = Fixture::new();
    for n in 0..200 {
        let to = fixture.photos().join(format!("{n:03}.png"));
        fs::copy("tests/fixtures/pictures/9x7.png", to).unwrap();
    }
    let mut child = start(&fixture, &["--once"]);
    // Somewhere between the start and the end; wherever it is, nothing may be lost or be there twice.
    std::thread::sleep(Duration::from_secs(3));
    child.kill().unwrap();
    child.wait().unwrap();
    let outcome = fixture.run_once();
    assert_eq!((count(&outcome, "found"), count(&outcome, "stored")), (206, 206), "{outcome}");
}

/// Starts `bsap try` on a fixture; standard output can be read.
fn start(fixture: &Fixture, arguments: &[&str]) -> Child {
    let mut command = Command::new(env!("CARGO_BIN_EXE_bsap"));
    command.args(["try", &fixture.path("photos"), "--dir", &fixture.path("state"), "--port", "0"]);
    command.args(["--checkpoint", "demo"]).args(arguments);
    command.stdout(Stdio::piped()).stderr(Stdio::null()).spawn().unwrap()
}

#[test]
fn changes_are_followed_until_it_is_stopped_and_a_second_process_is_kept_out() {
    let fixture = Fixture::new();
    let mut child = start(&fixture, &["--json", &fixture.path("result.json")]);
    let mut lines = BufReader::new(child.stdout.take().unwrap()).lines().map(Result::unwrap);
    let mut wait_for = |word: &str| {
        let seen = lines.by_ref().find(|line| line.contains(word));
        seen.unwrap_or_else(|| panic!("{word} was not printed"))
    };
    wait_for("6 files found: 6 stored");
    wait_for("Following changes");
    let second = fixture.run(&["--once"]);
    let message = String::from_utf8_lossy(&second.stderr);
    assert_eq!(second.status.code(), Some(2), "{message}");
    for word in ["another bsap try (process", "http://127.0.0.1:", "--dir"] {
        assert!(message.contains(word), "{message}");
    }
    fs::remove_file(fixture.photos().join("e.png")).unwrap();
    wait_for("removed  photos/e.png");
    fs::copy("tests/fixtures/pictures/9x7.png", fixture.photos().join("new.png")).unwrap();
    wait_for("added    photos/new.png");
    fs::copy("tests/fixtures/pictures/97x33.png", fixture.photos().join("new.png")).unwrap();
    wait_for("changed  photos/new.png");
    let stopped = Command::new("kill").arg(child.id().to_string()).status().unwrap();
    assert!(stopped.success());
    assert!(child.wait().unwrap().success());
    let result: Value =
        serde_json::from_slice(&fs::read(fixture.path("result.json")).unwrap()).unwrap();
    assert_eq!((count(&result, "found"), count(&result, "stored")), (6, 6), "{result}");
}

#[test]
fn a_list_has_attributes_and_lines_that_fail_are_named() {
    let fixture = Fixture::new();
    let list = fixture.path("shop.csv");
    fs::write(&list, "id,path,price,colour\nmug,photos/a.png,2.5,red\nhat,photos/b.PNG,3,blue\ncup,photos/gone.png,1,red\n").unwrap();
    let state = fixture.path("state");
    let result = fixture.path("result.json");
    let arguments =
        ["try", &list, "--dir", &state, "--checkpoint", "demo", "--once", "--json", &result];
    assert_fails(
        &arguments,
        &[],
        1,
        &["3 files found: 2 stored", "gone.png: there is no file", "1 files could not"],
    );
    let result: Value = serde_json::from_slice(&fs::read(result).unwrap()).unwrap();
    let table = result["table"].as_str().unwrap();
    let model = fixture.path("state/demo-clip");
    let variables = [
        ("BSAP_TABLE__URL", table),
        ("BSAP_MODEL__CHECKPOINT", &model),
        ("BSAP_SOURCE__ORDERING", "sequence"),
        ("BSAP_ATTRIBUTES__COLOUR", "text"),
        ("BSAP_ATTRIBUTES__PRICE", "number"),
    ];
    let filter = json!({"eq": {"colour": "blue"}}).to_string();
    let found = run_bsap(&["search", "a hat", "--json", "--filter", &filter], &variables);
    let answer: Value = serde_json::from_slice(&found.stdout)
        .unwrap_or_else(|_| panic!("{}", String::from_utf8_lossy(&found.stderr)));
    assert_eq!(answer["hits"].as_array().unwrap().len(), 1);
    assert_eq!(answer["hits"][0]["image_id"], "hat");
    assert_eq!(answer["hits"][0]["attributes"]["price"].to_string().trim_matches('"'), "3");
}

#[test]
fn queries_end_with_a_verdict_and_the_production_configuration_is_accepted() {
    let fixture = Fixture::new();
    let queries = fixture.path("judged.jsonl");
    let lines = [
        json!({"text": "a mug", "relevant": ["a.png"]}),
        json!({"text": "a red hat", "relevant": ["sub/c.png", "photos/b.PNG"]}),
        json!({"text": "a chair", "relevant": ["nowhere.png"]}),
    ];
    fs::write(&queries, lines.map(|line| line.to_string() + "\n").concat()).unwrap();
    let config = fixture.path("production.toml");
    let output = fixture.run(&["--once", "--queries", &queries, "--write-config", &config]);
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success(), "{text}{}", String::from_utf8_lossy(&output.stderr));
    for word in ["1 names in", "nowhere.png", "hit@1", "compared with raw", "report.html"] {
        assert!(text.contains(word), "{word} is not in {text}");
    }
    let report = fs::read_to_string(fixture.path("state/report.html")).unwrap();
    assert!(report.contains("data:image/jpeg"), "the report has no pictures");

    let written = fs::read_to_string(&config).unwrap();
    let photos = fixture.photos().canonicalize().unwrap();
    let publish = format!("{} --id-prefix photos/", photos.display());
    for word in [publish.as_str(), "everyday-nouns", "demo-clip", "kafka.brokers"] {
        assert!(written.contains(word), "{word} is not in {written}");
    }
    let variables = [
        ("BSAP_KAFKA__BROKERS", "127.0.0.1:1"),
        ("BSAP_KAFKA__REQUEST_TIMEOUT_MS", "500"),
        ("BSAP_HTTP__LISTEN", "127.0.0.1:0"),
    ];
    // Everything but the Kafka that is not there.
    let words = [
        "ok      configuration",
        "ok      table.url",
        "ok      model.checkpoint",
        "ok      prompts.sets",
        "1 checks failed",
    ];
    assert_fails(&["check", "--config", &config], &variables, 1, &words);
    let again = fixture.run(&["--once", "--write-config", &config]);
    let message = String::from_utf8_lossy(&again.stderr);
    assert!(again.status.code() == Some(2) && message.contains("--write-config"), "{message}");
}

#[test]
fn whatever_prevents_a_start_is_one_sentence_with_a_remedy() {
    let fixture = Fixture::new();
    let (photos, state) = (fixture.path("photos"), fixture.path("state"));
    assert_fails(&["try"], &[], 2, &["PATH"]);
    assert_fails(
        &["try", "/no/such/folder"],
        &[],
        2,
        &["/no/such/folder", "no such folder", "spelling"],
    );
    fs::create_dir(fixture.path("empty")).unwrap();
    fs::write(fixture.path("empty/notes.txt"), "x").unwrap();
    let empty = fixture.path("empty");
    let arguments = ["try", &empty, "--once", "--dir", &state, "--checkpoint", "demo"];
    assert_fails(&arguments, &[], 2, &["there is no picture", &empty, "name a folder"]);
    // No user can create folders there, not even root.
    let arguments = ["try", &photos, "--once", "--dir", "/proc/bsap", "--checkpoint", "demo"];
    assert_fails(&arguments, &[], 2, &["--dir", "/proc/bsap", "choose"]);
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port().to_string();
    let arguments = ["try", &photos, "--dir", &state, "--checkpoint", "demo", "--port", &port];
    assert_fails(&arguments, &[], 2, &["--port", &port, "in use", "--port 0"]);
    let arguments = ["try", &photos, "--once", "--dir", &state, "--checkpoint", "nowhere"];
    assert_fails(&arguments, &[], 2, &["--checkpoint", "nowhere", "folder"]);
    let arguments = ["try", &photos, "--once", "--dir", &state, "--checkpoint", &empty];
    assert_fails(&arguments, &[], 2, &["config.json"]);
    let arguments = ["try", &photos, "--once", "--dir", &state, "--queries", "none.jsonl"];
    assert_fails(&arguments, &[], 2, &["--queries", "none.jsonl"]);
}

#[test]
fn without_a_network_the_default_model_is_named_and_nothing_takes_its_place() {
    let fixture = Fixture::new();
    let (photos, state, cache) =
        (fixture.path("photos"), fixture.path("state"), fixture.path("hub"));
    let variables = [("HF_ENDPOINT", "http://127.0.0.1:1"), ("HF_HUB_CACHE", cache.as_str())];
    let arguments = ["try", &photos, "--once", "--dir", &state];
    let words = [
        "laion/CLIP-ViT-B-32-laion2B-s34B-b79K",
        "605 MB",
        "licence MIT",
        &cache,
        "cannot be downloaded",
        "--checkpoint FOLDER",
    ];
    assert_fails(&arguments, &variables, 1, &words);
    assert!(!Path::new(&state).join("catalogue").exists());
    let offline = [variables[0], variables[1], ("HF_HUB_OFFLINE", "1")];
    assert_fails(&arguments, &offline, 1, &["HF_HUB_OFFLINE is set", "--checkpoint FOLDER"]);
}

#[test]
fn the_default_model_is_downloaded_once_and_works_offline_then() {
    let hub = start_hub();
    let fixture = Fixture::new();
    let (photos, state, cache) =
        (fixture.path("photos"), fixture.path("state"), fixture.path("hub"));
    let variables = [("HF_ENDPOINT", hub.as_str()), ("HF_HUB_CACHE", cache.as_str())];
    let arguments = ["try", &photos, "--once", "--dir", &state];
    let output = run_bsap(&arguments, &variables);
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success(), "{text}{}", String::from_utf8_lossy(&output.stderr));
    assert!(text.contains("downloaded once into") && text.contains("6 stored"), "{text}");
    let offline = [("HF_HUB_OFFLINE", "1"), ("HF_HUB_CACHE", cache.as_str())];
    let output = run_bsap(&arguments, &offline);
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success(), "{text}{}", String::from_utf8_lossy(&output.stderr));
    assert!(text.contains("from the cache") && text.contains("6 of them since"), "{text}");
}

#[test]
fn a_bucket_that_does_not_answer_is_named() {
    let variables = [
        ("AWS_ENDPOINT", "http://127.0.0.1:1"),
        ("AWS_ALLOW_HTTP", "true"),
        ("AWS_REGION", "eu-west-1"),
        ("AWS_ACCESS_KEY_ID", "a"),
        ("AWS_SECRET_ACCESS_KEY", "b"),
    ];
    let state = tempfile::tempdir().unwrap();
    let dir = state.path().to_str().unwrap();
    let arguments =
        ["try", "s3://no-such-bucket/x", "--once", "--dir", dir, "--checkpoint", "demo"];
    assert_fails(&arguments, &variables, 1, &["s3://no-such-bucket/x"]);
}

/// Starts a hub on loopback whose only model has the files of the demo's; returns its address.
fn start_hub() -> String {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = format!("http://{}", listener.local_addr().unwrap());
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            std::thread::spawn(move || answer_hub_request(stream.unwrap()));
        }
    });
    address
}

fn answer_hub_request(mut stream: TcpStream) {
    let mut head = BufReader::new(stream.try_clone().unwrap()).lines().map_while(Result::ok);
    let request = head.next().unwrap_or_default();
    for line in head {
        if line.is_empty() {
            break;
        }
    }
    let path = request.split(' ').nth(1).unwrap_or_default();
    let name = path.rsplit('/').next().unwrap_or_default();
    let commit = "x-repo-commit: 0123456789abcdef0123456789abcdef01234567\r\nconnection: close\r\n";
    let Ok(bytes) = fs::read(Path::new("models/demo").join(name)) else {
        let _ = write!(stream, "HTTP/1.1 404 Not Found\r\n{commit}content-length: 0\r\n\r\n");
        return;
    };
    let length = bytes.len();
    let _ = write!(
        stream,
        "HTTP/1.1 200 OK\r\n{commit}etag: \"{name}\"\r\ncontent-length: {length}\r\n\r\n"
    );
    if request.starts_with("GET") {
        let _ = stream.write_all(&bytes);
    }
}

/// Runs the program without the rights that root has on the files of others.
fn run_without_root(arguments: &[&str]) -> Output {
    let is_root = Command::new("id").arg("-u").output().unwrap().stdout == b"0\n";
    let mut command = if is_root {
        let mut command = Command::new("setpriv");
        command.arg("--bounding-set=-dac_override,-dac_read_search");
        command.args(["--inh-caps=-dac_override,-dac_read_search", env!("CARGO_BIN_EXE_bsap")]);
        command
    } else {
        Command::new(env!("CARGO_BIN_EXE_bsap"))
    };
    command.args(arguments).output().unwrap()
}

#[test]
fn files_and_folders_that_may_not_be_read_or_written_are_named() {
    use std::os::unix::fs::PermissionsExt as _;
    let fixture = Fixture::new();
    let set_mode = |path: &str, mode| {
        fs::set_permissions(path, fs::Permissions::from_mode(mode)).unwrap();
    };
    let (photos, state) = (fixture.path("photos"), fixture.path("state"));
    let check = |arguments: &[&str], code: i32, words: &[&str]| {
        let output = run_without_root(arguments);
        let text =
            String::from_utf8_lossy(&output.stdout) + String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(code), "{text}");
        for word in words {
            assert!(text.contains(word), "{word} is not in {text}");
        }
    };
    let arguments = ["try", &photos, "--once", "--dir", &state, "--checkpoint", "demo"];
    fs::create_dir(fixture.path("photos/secret")).unwrap();
    set_mode(&fixture.path("photos/secret"), 0);
    set_mode(&fixture.path("photos/a.png"), 0);
    check(
        &arguments,
        1,
        &[
            "7 files found: 5 stored, 2 skipped",
            "a.png: ",
            "ermission denied",
            "secret: the folder cannot be listed",
            "2 files could not",
        ],
    );
    set_mode(&fixture.path("photos/secret"), 0o700);
    set_mode(&photos, 0);
    check(&arguments, 2, &["photos", "may not read it", "give the user the right"]);
    set_mode(&photos, 0o700);
    set_mode(fixture.folder.path().to_str().unwrap(), 0o500);
    let arguments =
        ["try", &photos, "--once", "--dir", &fixture.path("other"), "--checkpoint", "demo"];
    check(&arguments, 2, &["--dir", "ermission denied", "this user may write"]);
    set_mode(fixture.folder.path().to_str().unwrap(), 0o700);
}

#[test]
fn a_full_disk_is_named_and_nothing_is_lost() {
    let fixture = Fixture::new();
    for n in 0..300 {
        let to = fixture.photos().join(format!("{n:03}.png"));
        fs::copy("tests/fixtures/pictures/9x7.png", to).unwrap();
    }
    let limited = |kib: &str| {
        let script = r#"trap "" XFSZ; ulimit -f "$1"; shift; exec "$@""#;
        let (photos, state) = (fixture.path("photos"), fixture.path("state"));
        let mut command = Command::new("bash");
        command.args(["-c", script, "bash", kib, env!("CARGO_BIN_EXE_bsap")]);
        command.args(["try", &photos, "--once", "--dir", &state]);
        command.args([
            "--checkpoint",
            &std::fs::canonicalize("models/demo").unwrap().display().to_string(),
        ]);
        command.output().unwrap()
    };
    let started = Instant::now();
    let output = limited("20");
    let text = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(1), "{text}");
    for word in ["the disk of", "is full", "free some space", "--dir", "goes on where it was"] {
        assert!(text.contains(word), "{word} is not in {text}");
    }
    assert!(started.elapsed() < PATIENCE);
    let output = limited("unlimited");
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success() && text.contains("306 files found: 306 stored"), "{text}");
}
