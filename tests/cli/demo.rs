//! The demo in one process, and the commands that read the table that it leaves.

use serde_json::json;

use super::{assert_fails, config_file, run_bsap};

/// Runs the whole system in one process, and checks the log, which is an interface.
#[test]
fn the_demo_finds_every_image_and_logs_declared_events() {
    let folder = tempfile::tempdir().unwrap();
    let dir = folder.path().join("demo");
    let output =
        run_bsap(&["demo", "--once", "--images", "40", "--dir", dir.to_str().unwrap()], &[]);
    let text = String::from_utf8(output.stdout).unwrap();
    assert!(output.status.success(), "{text}{}", String::from_utf8_lossy(&output.stderr));
    for words in ["kafka.brokers", "plain CLIP", "balanced (nnn", "All 40 images are there."] {
        assert!(text.contains(words), "{words} is not in {text}");
    }
    check_marks_and_score(&text);
    let log = std::fs::read_to_string(dir.join("bsap.log")).unwrap();
    let mut seen = std::collections::BTreeSet::new();
    for line in log.lines() {
        let line: serde_json::Value = serde_json::from_str(line).expect(line);
        assert!(line["timestamp"].is_string() && line["level"].is_string(), "{line}");
        if line["target"].as_str().unwrap().starts_with("bsap") {
            let event = line["event"].as_str().unwrap_or_else(|| panic!("no event in {line}"));
            assert!(
                bsap::telemetry::event::find_log_event_definition(event).is_some(),
                "{event} is not documented"
            );
            seen.insert(event.to_owned());
        }
    }
    for event in ["start", "rebalance", "commit.succeeded", "snapshot.ready", "search"] {
        assert!(seen.contains(event), "{event} was not logged: {seen:?}");
    }
    check_prompt_sets_and_search(&dir);
}

/// Checks that results are marked by what their titles say, and that the output ends with the score.
fn check_marks_and_score(text: &str) {
    let example = text.split("“something striped”").nth(1).unwrap();
    let rows: Vec<&str> = example.lines().filter(|line| line.contains("p-0")).take(5).collect();
    assert_eq!(rows.len(), 5, "{example}");
    let mut right = [0, 0];
    for row in rows {
        let labels: Vec<&str> = row.split(['✓', '✗']).skip(1).collect();
        let marks: Vec<char> = row.chars().filter(|c| "✓✗".contains(*c)).collect();
        assert_eq!((labels.len(), marks.len()), (2, 2), "{row}");
        for (ranking, (label, mark)) in labels.into_iter().zip(marks).enumerate() {
            assert_eq!(mark == '✓', label.contains("striped"), "{row}");
            right[ranking] += usize::from(mark == '✓');
        }
    }
    let ends = ["among the first 5 by plain CLIP", "among 5 balanced"];
    let counts = example.lines().find(|line| line.contains(ends[0])).unwrap();
    for (count, (end, part)) in right.into_iter().zip(ends.into_iter().zip(counts.split(", "))) {
        assert!(part.starts_with(&format!("{count} of ")) && part.ends_with(end), "{counts}");
    }
    let score = text.split("sample queries, judged by what the program drew").nth(1).unwrap();
    for words in ["first result wrong", "plain CLIP", "difference", "points ("] {
        assert!(score.contains(words), "{words} is not in {score}");
    }
    let last = text.trim_end().lines().last().unwrap();
    assert!(last.ends_with('.') && !last.contains('│'), "{last}");
}

/// Checks `bsap prompts measure` and `bsap search` on the table of a finished demo.
fn check_prompt_sets_and_search(dir: &std::path::Path) {
    let (table, model) = (dir.join("catalogue"), dir.join("demo-clip"));
    let variables = [
        ("BSAP_MODEL__CHECKPOINT", model.to_str().unwrap()),
        ("BSAP_TABLE__URL", table.to_str().unwrap()),
    ];
    let mixed_script_set = config_file(
        "name = 'mixed'\nversion = 1\nlanguage = 'ru'\nnotes = ''\ntexts = ['кружка', 'a mug', 'a red mug']\n",
    );
    let sets = ["demo", mixed_script_set.path().to_str().unwrap()];
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
        assert_eq!(report["penalised_image_ids"].as_array().unwrap().len(), 3);
    }
    assert!(reports[0]["warning"].is_null());
    let warning = reports[1]["warning"].as_str().unwrap();
    assert!(warning.contains("not multilingual") && warning.contains("1 of 3"), "{warning}");

    let output = run_bsap(&["prompts", "measure", "--normaliser", "softmax"], &variables);
    let report = String::from_utf8(output.stdout).unwrap();
    for words in ["demo@", "photographs@", "█", "Strongest prompt", "lose most", "softmax"] {
        assert!(report.contains(words), "{words} is not in {report}");
    }
    let log = dir.join("queries.jsonl");
    let lines = |count: usize| -> String {
        (0..count).map(|i| format!("{{\"text\": \"{i} mugs next to a hat\"}}\n")).collect()
    };
    // Each text twice: only different ones count.
    for (count, queries) in [(70, json!(70)), (63, json!(null))] {
        std::fs::write(&log, lines(count).repeat(2)).unwrap();
        let log = log.display().to_string();
        let arguments = ["prompts", "measure", "demo", "--query-log", &log, "--json"];
        let output = run_bsap(&arguments, &variables);
        let report: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
        let bank = &report["bank"];
        assert_eq!(bank["fit"].get("queries").unwrap_or(&json!(null)), &queries, "{bank}");
        assert!(bank["reason"].as_str().is_some_and(|reason| reason.contains("fit")), "{bank}");
    }
    let search = run_bsap(&["search", "赤いマグカップ"], &variables);
    assert!(String::from_utf8(search.stdout).unwrap().contains("WARNING"));
    check_filters_and_image_queries(dir, &variables);
}

/// Checks filters, pictures as queries and the no-match rule on the table of a finished demo.
fn check_filters_and_image_queries(dir: &std::path::Path, variables: &[(&str, &str)]) {
    let with_attribute = [variables, &[("BSAP_ATTRIBUTES__TITLE", "text")]].concat();
    let answer = |arguments: &[&str]| -> serde_json::Value {
        let output =
            run_bsap(&[&["search", "--json", "-k", "40"], arguments].concat(), &with_attribute);
        let text = String::from_utf8(output.stdout).unwrap();
        assert!(output.status.success(), "{text}{}", String::from_utf8_lossy(&output.stderr));
        serde_json::from_str(&text).unwrap()
    };
    let all = answer(&["a mug"]);
    let hits = all["hits"].as_array().unwrap();
    assert_eq!((hits.len(), &all["no_match"]), (40, &serde_json::Value::Null));
    let (id, title) = (hits[3]["image_id"].as_str().unwrap(), &hits[3]["attributes"]["title"]);
    let filter = json!({"eq": {"title": title}}).to_string();
    let filtered = answer(&["a mug", "--filter", &filter]);
    let titled = hits.iter().filter(|hit| hit["attributes"]["title"] == *title).count();
    assert_eq!(filtered["hits"].as_array().unwrap().len(), titled);
    assert_eq!(filtered["matched"], titled);
    let min_score = hits[5]["score"].to_string();
    let above_min_score = answer(&["a mug", "--min-score", &min_score]);
    assert_eq!(above_min_score["hits"].as_array().unwrap().len(), 6);
    let similar = answer(&["--similar-to", id]);
    assert_eq!(
        (similar["matched"].as_u64(), similar["normaliser"].as_str()),
        (Some(39), Some("raw"))
    );
    let picture = dir.join("pictures").join(format!("{id}.jpg"));
    let by_picture = answer(&["--image", picture.to_str().unwrap()]);
    assert_eq!(by_picture["hits"][0]["image_id"], id);
    assert_eq!(by_picture["hits"][1]["image_id"], similar["hits"][0]["image_id"]);
    assert_fails(&["search", "a", "--filter", "{"], &with_attribute, 2, &["--filter"]);
    assert_fails(
        &["search", "a", "--filter", r#"{"exists":"size"}"#],
        &with_attribute,
        2,
        &["size", "title"],
    );
    assert_fails(
        &["search", "--similar-to", "nobody"],
        &with_attribute,
        2,
        &["nobody", "not in the catalogue"],
    );
    assert_fails(
        &["search", "a", "--similar-to", id],
        &with_attribute,
        2,
        &["cannot be used with"],
    );
    assert_fails(&["search", "a", "--min-score", "calibrated"], &with_attribute, 2, &["min_score"]);

    check_candidate_traffic_filter(title.as_str().unwrap(), &with_attribute);

    // After calibration, the no-match rule distinguishes gibberish from titles in the catalogue.
    let mut judged = std::collections::BTreeSet::new();
    for hit in hits {
        let title = hit["attributes"]["title"].as_str().unwrap();
        let with_same_title = hits.iter().filter(|other| other["attributes"]["title"] == title);
        let ids: Vec<&str> = with_same_title.map(|hit| hit["image_id"].as_str().unwrap()).collect();
        for text in [title, &format!("photo of {title}"), title.trim_start_matches("a ")] {
            judged.insert(json!({"text": text, "relevant": ids}).to_string() + "\n");
        }
    }
    let judged: String = judged.into_iter().collect();
    let queries = dir.join("judged.jsonl");
    std::fs::write(&queries, judged).unwrap();
    let queries = queries.to_str().unwrap();
    let output = run_bsap(
        &["evaluate", "--queries", queries, "--calibrate", "live", "--store"],
        &with_attribute,
    );
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let gibberish = answer(&["qwv xlkjh zzkw"]);
    assert_eq!(gibberish["no_match"]["nothing_matches"], true, "{gibberish}");
    let title = answer(&[title.as_str().unwrap()]);
    assert_eq!(title["no_match"]["nothing_matches"], false, "{}", title["no_match"]);
    let output = run_bsap(&["search", "qwv xlkjh zzkw"], &with_attribute);
    assert!(String::from_utf8(output.stdout).unwrap().contains("nothing matches: the best hit"));
}

/// Checks that `--traffic-filter` is validated, stored and shown.
fn check_candidate_traffic_filter(title: &str, variables: &[(&str, &str)]) {
    let set =
        ["candidate", "set", "half", "--weight", "0.5", "--traffic-share", "1", "--traffic-filter"];
    assert_fails(
        &[&set[..], &["title"]].concat(),
        variables,
        2,
        &["--traffic-filter", "name", "value"],
    );
    let run = |arguments: &[&str]| -> String {
        let output = run_bsap(arguments, variables);
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8(output.stdout).unwrap()
    };
    let filter = format!("title={title}");
    run(&[&set[..], &[&filter]].concat());
    let shown = run(&["candidate", "show"]);
    assert!(shown.contains(&filter), "{shown}");
    run(&["candidate", "withdraw"]);
    let history = run(&["history", "--limit", "2"]);
    assert!(history.contains("half"), "{history}");
    // The live generation is never removed.
    let removed = run(&["vacuum", "--generations"]);
    assert!(removed.contains("nothing to do"), "{removed}");
}
