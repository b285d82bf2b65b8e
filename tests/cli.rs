//! Bad input: one clear message that names what is wrong and the remedy, and the right exit code.

#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::process::{Command, Output};

use serde_json::json;

fn run_bsap(arguments: &[&str], variables: &[(&str, &str)]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_bsap"));
    for (name, _) in std::env::vars().filter(|(name, _)| name.starts_with("BSAP_")) {
        command.env_remove(name);
    }
    let here = tempfile::tempdir().unwrap();
    command.args(arguments).envs(variables.iter().copied()).current_dir(&here).output().unwrap()
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

/// A folder with a checkpoint that loads, as an absolute path: programs are started elsewhere. Not
/// from `CARGO_MANIFEST_DIR`, which a build that is shared between checkouts remembers wrongly.
fn demo_checkpoint_folder() -> String {
    std::fs::canonicalize("models/demo").unwrap().display().to_string()
}

fn config_file(text: &str) -> tempfile::NamedTempFile {
    let file = tempfile::NamedTempFile::with_suffix(".toml").unwrap();
    std::fs::write(&file, text).unwrap();
    file
}

#[test]
fn help_teaches_and_version_is_told() {
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
fn what_is_wrong_with_an_evaluation_is_told_before_any_work() {
    assert_fails(&["evaluate"], &[], 2, &["--queries", "--drawn"]);
    assert_fails(&["evaluate", "--log", "x", "--feedback"], &[], 2, &["cannot be used with"]);
    assert_fails(&["evaluate", "--feedback", "--store"], &[], 2, &["--calibrate"]);
    let wrong = "live,weight=2";
    assert_fails(
        &["evaluate", "--feedback", "--configuration", wrong],
        &[],
        2,
        &["weight", "0 to 1"],
    );
    assert_fails(&["evaluate", "--feedback", "--k", "0"], &[], 2, &["1 to 1000"]);
    assert_fails(&["evaluate", "--feedback", "--wage", "30"], &[], 2, &["--minutes-per-false-hit"]);
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
    assert_fails(&["prompts", "suggest", "--out", "x"], &[], 2, &["--queries"]);
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
fn all_problems_of_a_configuration_are_told_at_once() {
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
fn an_unreachable_broker_is_named() {
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
fn a_bucket_that_cannot_be_reached_is_named() {
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
fn a_port_in_use_is_named() {
    let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let address = taken.local_addr().unwrap();
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
        &["http.listen", "http.keys", "http.open"],
    );
}

#[test]
fn folders_that_cannot_be_used_are_named() {
    let used = tempfile::tempdir().unwrap();
    std::fs::write(used.path().join("thesis.doc"), "years of work").unwrap();
    let path = used.path().to_str().unwrap();
    assert_fails(&["demo", "--once", "--dir", path], &[], 2, &[path, "not empty"]);
    assert!(used.path().join("thesis.doc").exists());
    // No user may make folders there, root neither.
    assert_fails(&["demo", "--once", "--dir", "/proc/bsap"], &[], 2, &["--dir", "/proc/bsap"]);
    let model = demo_checkpoint_folder();
    let variables = [("BSAP_MODEL__CHECKPOINT", model.as_str()), ("BSAP_TABLE__URL", "/proc/bsap")];
    assert_fails(&["search", "a mug"], &variables, 1, &["table.url", "/proc/bsap", "may write"]);
}

#[test]
fn a_checkpoint_that_is_none_is_named() {
    let empty = tempfile::tempdir().unwrap();
    let path = empty.path().to_str().unwrap();
    let variables = [("BSAP_MODEL__CHECKPOINT", path)];
    assert_fails(&["search", "a mug"], &variables, 1, &["model.checkpoint", "config.json"]);
}

#[test]
fn a_table_that_is_not_there_is_named() {
    let (model, nothing) = (demo_checkpoint_folder(), tempfile::tempdir().unwrap());
    let variables = [
        ("BSAP_MODEL__CHECKPOINT", model.as_str()),
        ("BSAP_TABLE__URL", nothing.path().to_str().unwrap()),
    ];
    assert_fails(&["search", "a mug"], &variables, 1, &["no catalogue", "bsap ingest"]);
}

#[test]
fn events_are_listed_without_sending_any() {
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
fn a_hostile_name_does_not_act_on_the_terminal() {
    let shop = tempfile::tempdir().unwrap();
    let publish = || run_bsap(&["publish", shop.path().to_str().unwrap(), "--dry-run"], &[]);
    std::fs::write(shop.path().join("\u{202e}gpj.png"), b"x").unwrap();
    let listed = String::from_utf8(publish().stdout).unwrap();
    assert!(listed.contains(r"\u202egpj.png"), "{listed}");
    let line: serde_json::Value = serde_json::from_str(&listed).unwrap();
    assert_eq!(line["image_id"], "\u{202e}gpj.png");
    // No store takes this one, and what comes after it would not be listed: that is told.
    std::fs::write(shop.path().join("\u{1b}[2J.jpg"), b"x").unwrap();
    let output = publish();
    assert_eq!(output.status.code(), Some(1));
    let told = String::from_utf8(output.stderr).unwrap();
    assert!(told.contains(r"error: ") && told.contains(r"\u001b[2J.jpg"), "{told}");
    assert!(!told.contains('\u{1b}') && !listed.contains('\u{202e}'), "{told}");
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

/// The main job in one process; the log is an interface, so its lines are checked as one.
#[test]
fn the_demo_finds_every_image_and_logs_events_by_their_names() {
    let folder = tempfile::tempdir().unwrap();
    let dir = folder.path().join("demo");
    let output =
        run_bsap(&["demo", "--once", "--images", "40", "--dir", dir.to_str().unwrap()], &[]);
    let text = String::from_utf8(output.stdout).unwrap();
    assert!(output.status.success(), "{text}{}", String::from_utf8_lossy(&output.stderr));
    for words in ["kafka.brokers", "plain CLIP", "balanced (nnn", "All 40 images are there."] {
        assert!(text.contains(words), "{words} is not in {text}");
    }
    let log = std::fs::read_to_string(dir.join("bsap.log")).unwrap();
    let mut seen = std::collections::BTreeSet::new();
    for line in log.lines() {
        let line: serde_json::Value = serde_json::from_str(line).expect(line);
        assert!(line["timestamp"].is_string() && line["level"].is_string(), "{line}");
        if line["target"].as_str().unwrap().starts_with("bsap") {
            let event = line["event"].as_str().unwrap_or_else(|| panic!("no event in {line}"));
            assert!(
                bsap::telemetry::event::find_definition(event).is_some(),
                "{event} is not documented"
            );
            seen.insert(event.to_owned());
        }
    }
    for event in ["start", "rebalance", "batch.done", "snapshot.ready", "search"] {
        assert!(seen.contains(event), "{event} was not logged: {seen:?}");
    }
    check_prompt_sets_and_search(&dir);
}

/// `bsap prompts measure` and `bsap search` on the table that a demo left behind.
fn check_prompt_sets_and_search(dir: &std::path::Path) {
    let (table, model) = (dir.join("catalogue"), dir.join("demo-clip"));
    let variables = [
        ("BSAP_MODEL__CHECKPOINT", model.to_str().unwrap()),
        ("BSAP_TABLE__URL", table.to_str().unwrap()),
    ];
    let strange = config_file(
        "name = 'mixed'\nversion = 1\nlanguage = 'ru'\nnotes = ''\ntexts = ['кружка', 'a mug', 'a red mug']\n",
    );
    let sets = ["demo", strange.path().to_str().unwrap()];
    let output =
        run_bsap(&["prompts", "measure", sets[0], sets[1], "--json", "--limit", "3"], &variables);
    let text = String::from_utf8(output.stdout).unwrap();
    assert!(output.status.success(), "{text}{}", String::from_utf8_lossy(&output.stderr));
    let reports: Vec<serde_json::Value> =
        text.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    assert_eq!(reports.len(), 2);
    for report in &reports {
        assert_eq!(report["report"]["images"], 40);
        assert_eq!(report["normaliser"], "nnn");
        assert_eq!(report["penalised_ids"].as_array().unwrap().len(), 3);
    }
    assert!(reports[0]["warning"].is_null());
    let warning = reports[1]["warning"].as_str().unwrap();
    assert!(warning.contains("not multilingual") && warning.contains("1 of 3"), "{warning}");

    let page = run_bsap(&["prompts", "measure", "--normaliser", "softmax"], &variables);
    let page = String::from_utf8(page.stdout).unwrap();
    for words in ["demo@", "photographs@", "█", "Strongest prompt", "lose most", "softmax"] {
        assert!(page.contains(words), "{words} is not in {page}");
    }
    let search = run_bsap(&["search", "赤いマグカップ"], &variables);
    assert!(String::from_utf8(search.stdout).unwrap().contains("WARNING"));
    check_filters_and_image_queries(dir, &variables);
}

/// Filters, pictures as queries, and whether anything matches, on what a demo left behind.
fn check_filters_and_image_queries(dir: &std::path::Path, variables: &[(&str, &str)]) {
    let declared = [variables, &[("BSAP_ATTRIBUTES__TITLE", "text")]].concat();
    let answer = |arguments: &[&str]| -> serde_json::Value {
        let output = run_bsap(&[&["search", "--json", "-k", "40"], arguments].concat(), &declared);
        let text = String::from_utf8(output.stdout).unwrap();
        assert!(output.status.success(), "{text}{}", String::from_utf8_lossy(&output.stderr));
        serde_json::from_str(&text).unwrap()
    };
    let all = answer(&["a mug"]);
    let hits = all["hits"].as_array().unwrap();
    assert_eq!((hits.len(), &all["no_match"]), (40, &serde_json::Value::Null));
    let (id, title) = (hits[3]["image_id"].as_str().unwrap(), &hits[3]["attributes"]["title"]);
    let filter = json!({"eq": {"title": title}}).to_string();
    let some = answer(&["a mug", "--filter", &filter]);
    let titled = hits.iter().filter(|hit| hit["attributes"]["title"] == *title).count();
    assert_eq!(some["hits"].as_array().unwrap().len(), titled);
    assert_eq!(some["matched"], titled);
    let least = hits[5]["score"].to_string();
    let above = answer(&["a mug", "--min-score", &least]);
    assert_eq!(above["hits"].as_array().unwrap().len(), 6);
    let like = answer(&["--like", id]);
    assert_eq!((like["matched"].as_u64(), like["normaliser"].as_str()), (Some(39), Some("raw")));
    let picture = dir.join("pictures").join(format!("{id}.jpg"));
    let same = answer(&["--image", picture.to_str().unwrap()]);
    assert_eq!(same["hits"][0]["image_id"], id);
    assert_eq!(same["hits"][1]["image_id"], like["hits"][0]["image_id"]);
    assert_fails(&["search", "a", "--filter", "{"], &declared, 2, &["--filter"]);
    assert_fails(
        &["search", "a", "--filter", r#"{"exists":"size"}"#],
        &declared,
        2,
        &["size", "title"],
    );
    assert_fails(
        &["search", "--like", "nobody"],
        &declared,
        2,
        &["nobody", "not in the catalogue"],
    );
    assert_fails(&["search", "a", "--like", id], &declared, 2, &["cannot be used with"]);
    assert_fails(&["search", "a", "--min-score", "calibrated"], &declared, 2, &["min_score"]);

    check_candidate_traffic_filter(title.as_str().unwrap(), &declared);

    // Once thresholds are calibrated, gibberish is told from what is there.
    let mut judged = std::collections::BTreeSet::new();
    for hit in hits {
        let title = hit["attributes"]["title"].as_str().unwrap();
        let same = hits.iter().filter(|other| other["attributes"]["title"] == title);
        let ids: Vec<&str> = same.map(|hit| hit["image_id"].as_str().unwrap()).collect();
        for text in [title, &format!("photo of {title}"), title.trim_start_matches("a ")] {
            judged.insert(json!({"text": text, "relevant": ids}).to_string() + "\n");
        }
    }
    let judged: String = judged.into_iter().collect();
    let queries = dir.join("judged.jsonl");
    std::fs::write(&queries, judged).unwrap();
    let queries = queries.to_str().unwrap();
    let output =
        run_bsap(&["evaluate", "--queries", queries, "--calibrate", "live", "--store"], &declared);
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let gibberish = answer(&["qwv xlkjh zzkw"]);
    assert_eq!(gibberish["no_match"]["holds"], true, "{gibberish}");
    let title = answer(&[title.as_str().unwrap()]);
    assert_eq!(title["no_match"]["holds"], false, "{}", title["no_match"]);
    let page = run_bsap(&["search", "qwv xlkjh zzkw"], &declared);
    assert!(String::from_utf8(page.stdout).unwrap().contains("nothing matches: the best hit"));
}

/// `--only` keeps a candidate's share to the requests whose filter asks for one value.
fn check_candidate_traffic_filter(title: &str, variables: &[(&str, &str)]) {
    let set = ["candidate", "set", "half", "--weight", "0.5", "--share", "1", "--only"];
    assert_fails(&[&set[..], &["title"]].concat(), variables, 2, &["--only", "name", "value"]);
    let done = |arguments: &[&str]| -> String {
        let output = run_bsap(arguments, variables);
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8(output.stdout).unwrap()
    };
    let only = format!("title={title}");
    done(&[&set[..], &[&only]].concat());
    let shown = done(&["candidate", "show"]);
    assert!(shown.contains(&only), "{shown}");
    done(&["candidate", "withdraw"]);
    let history = done(&["history", "--limit", "2"]);
    assert!(history.contains("half"), "{history}");
    // The live one stays, however often generations are removed.
    let removed = done(&["vacuum", "--generations"]);
    assert!(removed.contains("nothing to do"), "{removed}");
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
    assert_eq!(set, bsap::prompts::PromptSet::load("photographs").unwrap());
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
fn a_new_key_comes_with_the_lines_that_make_it_known() {
    let new = ["keys", "new", "--name", "shop", "--scope", "search", "--scope", "feedback"];
    let printed = String::from_utf8(run_bsap(&new, &[]).stdout).unwrap();
    let secret = printed.split_whitespace().find(|word| word.starts_with("bsap_")).unwrap();
    let at = printed.find("[[http.keys]]").unwrap();
    let known = config_file(&printed[at..]);
    let config = known.path().display().to_string();
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
