use std::io::Write as _;

use crate::config::*;

fn load_text(text: &str, variables: &[(&str, &str)]) -> Result<Config, ConfigError> {
    let mut file = tempfile::NamedTempFile::new().unwrap();
    file.write_all(text.as_bytes()).unwrap();
    let variables = variables.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned()));
    load_valid_config(Some(file.path()), variables)
}

/// The shortest valid configuration: the folder of its checkpoint exists.
const MINIMAL_CONFIG: &str = "[model]\ncheckpoint = '.'\n";

#[test]
fn all_problems_are_reported_at_once_and_name_their_keys() {
    let text = "
        [kafka]
        brokers = 7
        brokrs = 'x'
        properties = { 'group.id' = 'g' }
        [source]
        queue_messages = 0
        ordering = 'newest'
        [modle]
        [http]
        listen = '0.0.0.0:80'
        [model]
        device = 'gpu'
        checkpoint = 'no such folder'
        [attributes]
        colour = 'colour'
    ";
    let problems =
        load_text(text, &[("BSAP_HTTP__MAX_CONCURRENT_REQUESTS", "many")]).unwrap_err().problems;
    for key in [
        "BSAP_HTTP__MAX_CONCURRENT_REQUESTS: \"many\" is not a whole number",
        "kafka.brokers: ",
        "kafka.brokrs: ",
        "kafka.properties.\"group.id\": ",
        "source.queue_messages: ",
        "source.ordering: ",
        "modle: ",
        "http.listen: ",
        "model.device: ",
        "model.checkpoint: ",
        "attributes.colour: ",
    ] {
        assert_eq!(
            problems.iter().filter(|p| p.starts_with(key)).count(),
            1,
            "{key} in {problems:#?}"
        );
    }
    assert_eq!(problems.len(), 11, "{problems:#?}");
}

#[test]
fn each_use_needs_a_topic_of_its_own_with_a_valid_name() {
    let problems = |table: &str| load_text(table, &[]).unwrap_err().problems;
    let shared = problems(
        "[source]
        control_topic = 'images.reindex'
        [dead_letter]
        topic = 'images'",
    );
    assert_eq!(
        shared,
        [
            "source.control_topic: \"images.reindex\" is source.reindex_topic too; each needs a topic of its own",
            "dead_letter.topic: \"images\" is source.topic too; each needs a topic of its own",
        ]
    );
    let illegal = problems(
        "[source]
        topic = 'my images'
        reindex_topic = ''
        [dead_letter]
        topic = '..'",
    );
    let keys = ["source.topic", "source.reindex_topic", "dead_letter.topic"];
    assert_eq!(illegal.len(), keys.len(), "{illegal:#?}");
    for (problem, key) in illegal.iter().zip(keys) {
        assert!(problem.starts_with(key) && problem.contains("Kafka topic name"), "{problem}");
    }
}

#[test]
fn the_environment_overrides_the_file() {
    let folder = tempfile::tempdir().unwrap();
    let roots = ["a,b", "c"].map(|name| folder.path().join(name));
    for root in &roots {
        std::fs::create_dir(root).unwrap();
    }
    let root_list = serde_json::to_string(&roots).unwrap();
    let hash = http::KeyHash::from_secret("swordfish");
    let keys = format!("[{{ name = 'shop', hash = '{hash}', scopes = ['search', 'feedback'] }}]");
    let variables = [
        ("BSAP_KAFKA__BROKERS", "a:1,b:2"),
        ("BSAP_KAFKA__PROPERTIES__SASL_PASSWORD", "swordfish"),
        ("BSAP_PROMPTS__SETS", "demo, photographs"),
        ("BSAP_FETCH__FILE_ROOTS", &root_list),
        ("BSAP_SEARCH__WEIGHT", "0.5"),
        ("BSAP_TABLE__STORE_OPTIONS__AWS_REGION", "eu-west-1"),
        ("BSAP_HTTP__KEYS", &keys),
        ("BSAP_CONFIG", "no section and key"),
        ("HOME", "/root"),
    ];
    let config =
        load_text(&format!("{MINIMAL_CONFIG}[kafka]\nbrokers = 'c:3'\n"), &variables).unwrap();
    assert_eq!(config.kafka.brokers, "a:1,b:2");
    assert_eq!(config.kafka.properties["sasl.password"], "swordfish");
    assert_eq!(config.prompts.sets, ["demo", "photographs"]);
    assert_eq!(config.fetch.file_roots, roots);
    assert_eq!(config.search.weight, 0.5);
    assert_eq!((&config.http.keys[0].name[..], config.http.keys[0].hash), ("shop", hash));
    assert_eq!(config.table.store_options["aws_region"], "eu-west-1");
}

#[test]
fn secrets_are_hidden_and_the_rest_is_shown() {
    let text = format!(
        "{MINIMAL_CONFIG}[kafka.properties]\n'sasl.password' = 'swordfish'\n'sasl.username' = 'me'\n[table.store_options]\naws_secret_access_key = 'swordfish'\n"
    );
    let shown = load_text(&text, &[]).unwrap().to_redacted_toml();
    assert!(!shown.contains("swordfish") && shown.contains("\"me\""), "{shown}");
    // The output is a valid configuration again.
    assert!(load_text(&shown, &[]).is_ok());
}

#[test]
fn the_example_file_has_the_defaults() {
    let mut table: toml::Table = example_toml().parse().unwrap();
    table.retain(|_, section| !section.as_table().unwrap().is_empty());
    let read: Config = table.try_into().unwrap();
    assert_eq!(read, Config::default());
}

#[test]
fn every_option_is_described() {
    let sections = describe_sections();
    assert_eq!(sections.len(), 16);
    for section in sections {
        assert!(section.description.len() > 10, "[{}] is not described", section.name);
        for setting in section.settings {
            assert!(
                setting.description.len() > 10,
                "{}.{} is not described",
                section.name,
                setting.key
            );
        }
    }
}

#[test]
fn the_error_for_a_missing_or_malformed_file_says_what_to_do() {
    let missing = load_valid_config(Some("nowhere.toml".as_ref()), []).unwrap_err().to_string();
    assert!(
        missing.contains("nowhere.toml") && missing.contains("bsap config example"),
        "{missing}"
    );
    let broken = load_text("[kafka\n", &[]).unwrap_err().to_string();
    assert!(broken.contains("not TOML") && broken.contains("line 1"), "{broken}");
}

#[test]
fn generated_files_are_current() {
    let root = std::path::Path::new("");
    let schema = serde_json::to_string_pretty(&config_json_schema()).unwrap() + "\n";
    for (file, expected) in [
        ("docs/configuration.md", render_config_reference()),
        ("schemas/config.schema.json", schema),
        ("deploy/bsap.example.toml", example_toml()),
    ] {
        let found = std::fs::read_to_string(root.join(file)).unwrap_or_default();
        assert!(found == expected, "{file} is not current: run `just generate`");
    }
}

#[test]
fn the_shipped_example_files_load() {
    let folders = ["deploy/config", "deploy/compose"].map(|f| std::fs::read_dir(f).unwrap());
    let files = folders.into_iter().flatten().map(|entry| entry.unwrap().path());
    let files: Vec<_> = files.filter(|f| f.extension().is_some_and(|e| e == "toml")).collect();
    assert!(files.len() >= 6, "{files:?}");
    for file in files {
        // The folders of checkpoints in the examples do not exist here.
        let model = [("BSAP_MODEL__CHECKPOINT".to_owned(), ".".to_owned())];
        if let Err(error) = load_valid_config(Some(&file), model) {
            panic!("{}: {error}", file.display());
        }
    }
}
