//! The command line: invalid input ends with one message that names the problem and the remedy, and
//! with the documented exit code; the demo and the commands on its table work.

#![allow(clippy::unwrap_used, clippy::expect_used)]

mod demo;
mod try_pictures;

use std::process::{Command, Output};

fn run_bsap(arguments: &[&str], variables: &[(&str, &str)]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_bsap"));
    for (name, _) in std::env::vars().filter(|(name, _)| name.starts_with("BSAP_")) {
        command.env_remove(name);
    }
    let working_dir = tempfile::tempdir().unwrap();
    command
        .args(arguments)
        .envs(variables.iter().copied())
        .current_dir(&working_dir)
        .output()
        .unwrap()
}

#[track_caller]
fn assert_fails(arguments: &[&str], variables: &[(&str, &str)], code: i32, words: &[&str]) {
    let output = run_bsap(arguments, variables);
    let text = String::from_utf8_lossy(&output.stderr).into_owned()
        + &String::from_utf8_lossy(&output.stdout);
    assert_eq!(output.status.code(), Some(code), "{arguments:?}: {text}");
    for word in words {
        assert!(text.contains(word), "{arguments:?} does not say {word:?}:\n{text}");
    }
    assert!(!text.contains("panicked") && !text.contains("backtrace"), "{text}");
}

/// Returns the absolute path of a valid checkpoint; `run_bsap` runs in another folder.
/// `CARGO_MANIFEST_DIR` would be wrong in a target folder shared by several checkouts.
fn demo_checkpoint_folder() -> String {
    std::fs::canonicalize("models/demo").unwrap().display().to_string()
}

fn config_file(text: &str) -> tempfile::NamedTempFile {
    let file = tempfile::NamedTempFile::with_suffix(".toml").unwrap();
    std::fs::write(&file, text).unwrap();
    file
}

#[test]
fn help_and_version_are_printed() {
    let help = String::from_utf8(run_bsap(&["--help"], &[]).stdout).unwrap();
    for word in
        ["demo", "ingest", "serve", "publish", "search", "evaluate", "prompts", "check", "config"]
    {
        assert!(help.contains(word), "{help}");
    }
    assert!(help.contains("Exit codes"), "{help}");
    for command in ["demo", "ingest", "serve", "publish", "search", "prompts", "check", "config"] {
        assert!(run_bsap(&[command, "--help"], &[]).status.success(), "{command}");
    }
    assert!(run_bsap(&["--version"], &[]).status.success());
}

#[test]
fn without_a_command_the_ways_to_begin_are_shown() {
    let output = run_bsap(&[], &[]);
    let text = String::from_utf8(output.stdout).unwrap();
    assert!(output.status.success() && output.stderr.is_empty(), "{text}");
    for words in ["bsap demo", "bsap try ", "bsap ingest", "bsap serve", "bsap --help"] {
        assert!(text.contains(words), "{words} is not in {text}");
    }
    assert!(text.lines().all(|line| line.chars().count() <= 90) && text.lines().count() < 32);
    // Every command and page that it names exists.
    let help = String::from_utf8(run_bsap(&["--help"], &[]).stdout).unwrap();
    for line in text.lines().filter_map(|line| line.trim().strip_prefix("bsap ")) {
        let command = line.split_whitespace().next().unwrap();
        assert!(help.contains(&format!("\n  {command}")), "there is no command {command}");
    }
    assert!(std::fs::exists("docs/getting-started.md").unwrap());
    assert_fails(&["--config"], &[], 2, &["--config"]);
}

#[test]
fn invalid_imports_and_exports_are_rejected_before_any_work() {
    let checkpoint = demo_checkpoint_folder();
    let arguments = ["import", "--images", "x.npy", "--checkpoint", &checkpoint];
    assert_fails(&arguments, &[], 2, &["--images: x.npy: ", "--ids: is missing"]);
    let arguments = ["import", "--images", "x.npy", "--metadata", "m.csv", "--ids", "id"];
    let checkpoint = [("BSAP_MODEL__CHECKPOINT", checkpoint.as_str())];
    assert_fails(&arguments, &checkpoint, 2, &["--images: x.npy: ", "--metadata: m.csv"]);
    assert_fails(&["export", "corrections", "--out", "x.txt"], &[], 2, &[".parquet, .csv or .npy"]);
    assert_fails(&["export", "corrections", "--out", "x.npy"], &[], 2, &["--ids: is missing"]);
    let both = ["export", "corrections", "--out", "x.csv", "--since", "1", "--ids", "x"];
    assert_fails(&both, &[], 2, &["cannot be used with"]);
}

#[test]
fn invalid_evaluations_are_rejected_before_any_work() {
    assert_fails(&["evaluate"], &[], 2, &["--queries", "--synthetic"]);
    assert_fails(&["evaluate", "--query-log", "x", "--feedback"], &[], 2, &["cannot be used with"]);
    assert_fails(&["evaluate", "--feedback", "--store"], &[], 2, &["--calibrate"]);
    let invalid = "live,weight=2";
    assert_fails(
        &["evaluate", "--feedback", "--configuration", invalid],
        &[],
        2,
        &["weight", "0 to 1"],
    );
    assert_fails(&["evaluate", "--feedback", "--k", "0"], &[], 2, &["1 to 1000"]);
    assert_fails(
        &["evaluate", "--feedback", "--hourly-cost", "30"],
        &[],
        2,
        &["--minutes-per-false-hit"],
    );
    let run = config_file("1 Q0 a 1 high t\n");
    let qrels = config_file("1 0 a 1\n");
    let [run, qrels] = [run.path(), qrels.path()].map(|path| path.to_str().unwrap().to_owned());
    let arguments = ["evaluate", "rankings", "--qrels", &qrels, "--run", &run];
    assert_fails(&arguments, &[], 2, &["line 1", "score"]);
    assert_fails(&["evaluate", "--queries", &run], &[], 2, &["line 1", &run]);
    assert_fails(
        &["evaluate", "--from-logs", &run],
        &[],
        2,
        &["no usable `shadow.compared`", "line 1", "log.format"],
    );
    assert_fails(
        &["evaluate", "--from-logs", &run, "--runs", "x"],
        &[],
        2,
        &["cannot be used with"],
    );
    assert_fails(
        &["evaluate", "--from-logs", "none.jsonl"],
        &[],
        2,
        &["none.jsonl", "No such file"],
    );
    let words = ["--queries", "--query-log", "--attribute"];
    assert_fails(&["prompts", "suggest", "--out", "x"], &[], 2, &words);
    let arguments = ["prompts", "suggest", "--out", "x", "--queries", "q", "--texts", "99"];
    assert_fails(&arguments, &[], 2, &["--texts", "cannot be used with"]);
}

#[test]
fn usage_errors_exit_with_2() {
    assert_fails(&["fly"], &[], 2, &["fly"]);
    assert_fails(&["demo", "--images", "0"], &[], 2, &["--images"]);
    assert_fails(
        &["publish"],
        &[("BSAP_KAFKA__BROKERS", "127.0.0.1:1")],
        2,
        &["nothing to publish"],
    );
    assert_fails(&["reconcile"], &[], 2, &["nothing to compare with"]);
    assert_fails(&["reconcile", "nowhere/at/all"], &[], 1, &["there is no catalogue"]);
    assert_fails(
        &["reconcile", "x", "--max-deletes", "2"],
        &[],
        2,
        &["--max-deletes", "between 0 and 1"],
    );
    assert_fails(&["reconcile", "--ids", "x", "--repair"], &[], 2, &["--as-of"]);
    for (ordering, word) in [("sequencer", "sequencer"), ("sequence", "--sequence-is-time")] {
        let ordering = [("BSAP_SOURCE__ORDERING", ordering)];
        assert_fails(&["reconcile", "x", "--repair"], &ordering, 2, &[word]);
    }
    assert_fails(&["search", "x", "--server", "nonsense"], &[], 2, &["--server", "http://"]);
}

#[test]
fn all_problems_of_a_configuration_are_reported_at_once() {
    let config = config_file(
        "[kafka]\nbroker = 'x'\n[source]\nqueue_messages = 'many'\n[http]\nlisten = '0.0.0.0:1'\n[model]\ncheckpoint = 'nowhere'\n",
    );
    let path = config.path().to_str().unwrap();
    let words = ["kafka.broker", "source.queue_messages", "http.listen", "model.checkpoint", path];
    assert_fails(&["ingest", "--config", path], &[], 2, &words);
    assert_fails(&["serve", "--config", path], &[], 2, &words);
    assert_fails(
        &["check", "--config", path],
        &[("BSAP_KAFKA__REQUEST_TIMEOUT_MS", "300")],
        2,
        &words[..4],
    );
    assert_fails(
        &["ingest", "--config", "nowhere.toml"],
        &[],
        2,
        &["nowhere.toml", "bsap config example"],
    );
}

#[test]
fn the_error_names_an_unreachable_broker() {
    let model = demo_checkpoint_folder();
    let variables = [
        ("BSAP_MODEL__CHECKPOINT", model.as_str()),
        ("BSAP_KAFKA__BROKERS", "127.0.0.1:1"),
        ("BSAP_KAFKA__REQUEST_TIMEOUT_MS", "500"),
    ];
    assert_fails(
        &["ingest"],
        &variables,
        1,
        &["kafka.brokers", "127.0.0.1:1", "check the address"],
    );
    assert_fails(
        &["check"],
        &variables,
        1,
        &["kafka.brokers", "127.0.0.1:1", "ok      table.url", "ok      model.checkpoint"],
    );
}

#[test]
fn the_error_names_an_unreachable_bucket() {
    let model = demo_checkpoint_folder();
    let variables = [
        ("BSAP_MODEL__CHECKPOINT", model.as_str()),
        ("BSAP_KAFKA__BROKERS", "127.0.0.1:1"),
        ("BSAP_KAFKA__REQUEST_TIMEOUT_MS", "300"),
        ("BSAP_TABLE__URL", "s3://no-such-bucket/catalogue"),
        ("BSAP_TABLE__STORE_OPTIONS__AWS_ENDPOINT", "http://127.0.0.1:1"),
        ("BSAP_TABLE__STORE_OPTIONS__AWS_ALLOW_HTTP", "true"),
        ("BSAP_TABLE__STORE_OPTIONS__AWS_REGION", "eu-west-1"),
        ("AWS_ACCESS_KEY_ID", "a"),
        ("AWS_SECRET_ACCESS_KEY", "b"),
    ];
    assert_fails(
        &["search", "a mug"],
        &variables,
        1,
        &["table.url", "s3://no-such-bucket/catalogue"],
    );
}

#[test]
fn the_error_names_a_port_in_use() {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    let model = demo_checkpoint_folder();
    let variables = [("BSAP_MODEL__CHECKPOINT", model.as_str())];
    assert_fails(
        &["serve", "--listen", &address.to_string()],
        &variables,
        2,
        &[&address.to_string(), "free port"],
    );
    assert_fails(
        &["demo", "--port", &address.port().to_string()],
        &[],
        2,
        &[&address.to_string(), "free port"],
    );
    assert_fails(
        &["serve", "--listen", "0.0.0.0:0"],
        &variables,
        2,
        &["http.listen", "http.keys", "http.allow_unauthenticated"],
    );
}

#[test]
fn the_error_names_an_unusable_folder() {
    let used = tempfile::tempdir().unwrap();
    std::fs::write(used.path().join("thesis.doc"), "years of work").unwrap();
    let path = used.path().to_str().unwrap();
    assert_fails(&["demo", "--once", "--dir", path], &[], 2, &[path, "not empty"]);
    assert!(used.path().join("thesis.doc").exists());
    let file = used.path().join("thesis.doc").display().to_string();
    assert_fails(&["demo", "--once", "--dir", &file], &[], 2, &["--dir", &file, "another one"]);
    // Every write to this device fails as on a full disk.
    let full = tempfile::tempdir().unwrap();
    let marker = full.path().join("made-by-bsap-demo");
    std::os::unix::fs::symlink("/dev/full", &marker).unwrap();
    let path = full.path().to_str().unwrap();
    let words = ["--dir", path, "No space left", "free some space"];
    assert_fails(&["demo", "--once", "--dir", path], &[], 2, &words);
    std::fs::remove_file(&marker).unwrap();
    let running = std::fs::File::create(&marker).unwrap();
    running.lock().unwrap();
    std::fs::create_dir(full.path().join("pictures")).unwrap();
    assert_fails(&["demo", "--dir", path], &[], 2, &[path, "another bsap demo runs", "end it"]);
    assert!(full.path().join("pictures").exists());
    // No user can create folders there, not even root.
    assert_fails(&["demo", "--once", "--dir", "/proc/bsap"], &[], 2, &["--dir", "/proc/bsap"]);
    let model = demo_checkpoint_folder();
    let variables = [("BSAP_MODEL__CHECKPOINT", model.as_str()), ("BSAP_TABLE__URL", "/proc/bsap")];
    assert_fails(&["search", "a mug"], &variables, 1, &["table.url", "/proc/bsap", "may write"]);
}

#[test]
fn the_error_names_an_invalid_checkpoint() {
    let empty = tempfile::tempdir().unwrap();
    let path = empty.path().to_str().unwrap();
    let variables = [("BSAP_MODEL__CHECKPOINT", path)];
    assert_fails(&["search", "a mug"], &variables, 2, &["model.checkpoint", "config.json"]);
}

#[test]
fn the_error_for_a_missing_table_names_the_command_that_creates_it() {
    let (model, empty_folder) = (demo_checkpoint_folder(), tempfile::tempdir().unwrap());
    let variables = [
        ("BSAP_MODEL__CHECKPOINT", model.as_str()),
        ("BSAP_TABLE__URL", empty_folder.path().to_str().unwrap()),
    ];
    assert_fails(&["search", "a mug"], &variables, 1, &["no catalogue", "bsap ingest"]);
}

/// Six images of the demo, stored by the last program that wrote format 2.
#[test]
fn every_command_refuses_a_catalogue_of_an_older_format_and_leaves_it_unchanged() {
    let files = |folder: &str| {
        let mut files = read_files(std::path::Path::new(folder));
        files.sort();
        files
    };
    let (model, folder) = (demo_checkpoint_folder(), tempfile::tempdir().unwrap());
    let catalogue = folder.path().join("catalogue").display().to_string();
    let copy = Command::new("cp")
        .args(["-r", "tests/fixtures/catalogue-format-2", &catalogue])
        .status()
        .unwrap();
    assert!(copy.success());
    let stored = files(&catalogue);
    assert_eq!(stored.len(), 8);
    let queries = config_file("{\"text\": \"a mug\", \"relevant\": [\"a\"]}");
    let queries = queries.path().to_str().unwrap();
    let variables = [
        ("BSAP_MODEL__CHECKPOINT", model.as_str()),
        ("BSAP_TABLE__URL", catalogue.as_str()),
        ("BSAP_PROMPTS__SETS", "[\"demo\"]"),
        ("BSAP_KAFKA__BROKERS", "127.0.0.1:1"),
        ("BSAP_KAFKA__REQUEST_TIMEOUT_MS", "1000"),
        ("BSAP_HTTP__LISTEN", "127.0.0.1:0"),
    ];
    for arguments in [
        &["ingest"][..],
        &["serve"],
        &["check"],
        &["status"],
        &["verify"],
        &["compact"],
        &["vacuum"],
        &["vacuum", "--generations"],
        &["reconcile", "."],
        &["history"],
        &["candidate", "show"],
        &["candidate", "set", "x", "--weight", "0.5"],
        &["candidate", "withdraw"],
        &["promote"],
        &["rollback", "--yes"],
        &["reindex", "statistics", "--prompt-set", "demo"],
        &["reindex", "model", "--checkpoint", &model],
        &["search", "a mug"],
        &["evaluate", "--queries", queries],
        &["evaluate", "--feedback"],
        &["prompts", "measure"],
        &["prompts", "suggest", "--queries", queries, "--name", "own", "--out", "own.toml"],
        &["prompts", "retire", "demo"],
    ] {
        let words = ["has format 2, this program reads format 3", "bsap publish"];
        assert_fails(arguments, &variables, 1, &words);
    }
    assert_eq!(files(&catalogue), stored);
}

/// Reads all files below a folder.
fn read_files(folder: &std::path::Path) -> Vec<(std::path::PathBuf, Vec<u8>)> {
    let entries = std::fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path());
    entries
        .flat_map(|path| {
            if path.is_dir() {
                read_files(&path)
            } else {
                vec![(path.clone(), std::fs::read(path).unwrap())]
            }
        })
        .collect()
}

#[test]
fn a_dry_run_prints_events_without_sending_them() {
    let shop = tempfile::tempdir().unwrap();
    std::fs::write(shop.path().join("a.jpg"), b"x").unwrap();
    let output = run_bsap(
        &["publish", shop.path().to_str().unwrap(), "--id-prefix", "shop/", "--dry-run"],
        &[],
    );
    let line: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(line["image_id"], "shop/a.jpg");
    assert!(output.status.success());
}

#[test]
fn a_hostile_file_name_does_not_control_the_terminal() {
    let shop = tempfile::tempdir().unwrap();
    let publish = || run_bsap(&["publish", shop.path().to_str().unwrap(), "--dry-run"], &[]);
    std::fs::write(shop.path().join("\u{202e}gpj.png"), b"x").unwrap();
    let listed = String::from_utf8(publish().stdout).unwrap();
    assert!(listed.contains(r"\u202egpj.png"), "{listed}");
    let line: serde_json::Value = serde_json::from_str(&listed).unwrap();
    assert_eq!(line["image_id"], "\u{202e}gpj.png");
    // No image has such an id: the file is left out and named, and the others are announced.
    std::fs::write(shop.path().join("\u{1b}[2J.jpg"), b"x").unwrap();
    let output = publish();
    assert_eq!(output.status.code(), Some(1));
    let message = String::from_utf8(output.stderr).unwrap();
    assert!(message.contains(r"skipped: ") && message.contains(r"\u{1b}[2J.jpg"), "{message}");
    assert_eq!(String::from_utf8(output.stdout).unwrap(), listed);
    assert!(!message.contains('\u{1b}') && !listed.contains('\u{202e}'), "{message}");
}

#[test]
fn the_example_configuration_is_accepted() {
    let example = String::from_utf8(run_bsap(&["config", "example"], &[]).stdout).unwrap();
    let config = config_file(&example);
    let model = demo_checkpoint_folder();
    let output = run_bsap(
        &["config", "show", "--config", config.path().to_str().unwrap()],
        &[
            ("BSAP_MODEL__CHECKPOINT", &model),
            ("BSAP_KAFKA__PROPERTIES__SASL_PASSWORD", "swordfish"),
        ],
    );
    let shown = String::from_utf8(output.stdout).unwrap();
    assert!(output.status.success(), "{shown}");
    assert!(!shown.contains("swordfish") && shown.contains("(hidden)"), "{shown}");
}

#[test]
fn prompt_sets_are_listed_and_shown() {
    let list = String::from_utf8(run_bsap(&["prompts", "list"], &[]).stdout).unwrap();
    for words in ["photographs", "ecommerce-ja", "demo", "served first"] {
        assert!(list.contains(words), "{words} is not in {list}");
    }
    let shown =
        String::from_utf8(run_bsap(&["prompts", "show", "photographs"], &[]).stdout).unwrap();
    let set: bsap::prompts::PromptSet = toml::from_str(&shown).unwrap();
    assert_eq!(set, bsap::prompts::PromptSet::load_builtin_or_file("photographs").unwrap());
    assert_fails(
        &["prompts", "show", "nowhere.toml"],
        &[],
        2,
        &["nowhere.toml", "the built-in sets are"],
    );
    let model = demo_checkpoint_folder();
    let variables = [("BSAP_MODEL__CHECKPOINT", model.as_str())];
    assert_fails(&["prompts", "measure", "--weight", "2"], &variables, 2, &["--weight"]);
}

#[test]
fn a_new_key_is_printed_with_the_configuration_that_accepts_it() {
    let new = ["keys", "new", "--name", "shop", "--scope", "search", "--scope", "feedback"];
    let printed = String::from_utf8(run_bsap(&new, &[]).stdout).unwrap();
    let secret = printed.split_whitespace().find(|word| word.starts_with("bsap_")).unwrap();
    let start = printed.find("[[http.keys]]").unwrap();
    let config_with_key = config_file(&printed[start..]);
    let config = config_with_key.path().display().to_string();
    let variables = [("BSAP_CONFIG", config.as_str()), ("BSAP_HTTP__LISTEN", "0.0.0.0:8080")];
    let shown = run_bsap(&["config", "show"], &variables);
    let shown =
        String::from_utf8(shown.stdout).unwrap() + &String::from_utf8(shown.stderr).unwrap();
    assert!(shown.contains("name = \"shop\"") && !shown.contains(secret), "{shown}");
    assert!(shown.contains("scopes = [\"search\", \"feedback\"]"), "{shown}");
    assert_fails(
        &["keys", "new", "--name", "a shop", "--scope", "search"],
        &[],
        2,
        &["keys: ", "a shop"],
    );
    assert_fails(&["keys", "new", "--name", "shop"], &[], 2, &["--scope"]);
}
