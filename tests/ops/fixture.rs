//! What runs in production, on this machine: a Kafka broker in this process, a folder as object
//! storage, and the real program as separate processes that log JSON.

#![allow(dead_code, reason = "several tests share it and use different parts")]

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use bsap::demo::broker::MockBroker;
use bsap::demo::catalogue::{PhotoStyle, Scene};
use bsap::demo::draw::render_jpeg;
use bsap::kafka;
use rdkafka::message::{Header, OwnedHeaders};
use rdkafka::producer::{FutureProducer, FutureRecord};
use serde_json::{Map, Value, json};

pub const TOPIC: &str = "images";
pub const DEAD_LETTER_TOPIC: &str = "images.dead-letters";

/// A line of a log.
pub type LogLine = Map<String, Value>;

/// A broker, a folder, and the settings of the processes.
pub struct Fixture {
    pub broker: MockBroker,
    pub folder: tempfile::TempDir,
    producer: FutureProducer,
    settings: Vec<(String, String)>,
}

impl Fixture {
    pub fn with_partitions(partitions: i32) -> Self {
        let broker = MockBroker::start(&[(TOPIC, partitions), (DEAD_LETTER_TOPIC, 1)]).unwrap();
        let options = kafka::KafkaOptions {
            brokers: broker.bootstrap_servers(),
            ..kafka::KafkaOptions::default()
        };
        let folder = tempfile::tempdir().unwrap();
        std::fs::create_dir(folder.path().join("pictures")).unwrap();
        let model = std::fs::canonicalize("models/demo").unwrap();
        let to_text = |path: &Path| path.to_str().unwrap().to_owned();
        let settings = [
            ("KAFKA__BROKERS", broker.bootstrap_servers()),
            ("TABLE__URL", to_text(&folder.path().join("catalogue"))),
            ("MODEL__CHECKPOINT", to_text(&model)),
            ("PROMPTS__SETS", "demo".into()),
            ("FETCH__FILE_ROOTS", to_text(&folder.path().join("pictures"))),
            ("FETCH__MAX_ATTEMPTS", "2".into()),
            ("SOURCE__ORDERING", "sequence".into()),
            // In the mock cluster, a member that has left blocks the group until its session times
            // out.
            ("SOURCE__SESSION_TIMEOUT_MS", "6000".into()),
            ("SOURCE__DRAIN_SECONDS", "3".into()),
            ("INGEST__DRAIN_SECONDS", "3".into()),
            ("INGEST__COMMIT_MS", "200".into()),
            ("INGEST__HEARTBEAT_SECONDS", "1".into()),
            ("LOG__FORMAT", "json".into()),
            (
                "LOG__LEVEL",
                "info,bsap=debug,deltalake_core=error,delta_kernel=error,buoyant_kernel=error"
                    .into(),
            ),
        ];
        let settings = settings.map(|(key, value)| (format!("BSAP_{key}"), value)).to_vec();
        let producer = options.producer_config().create().unwrap();
        Self { broker, folder, producer, settings }
    }

    /// Sets an option of all processes that are started later. `key` is like `INGEST__COMMIT_MS`.
    pub fn set_option(&mut self, key: &str, value: &str) {
        let key = format!("BSAP_{key}");
        self.settings.retain(|(known, _)| *known != key);
        self.settings.push((key, value.to_owned()));
    }

    fn command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_bsap"));
        for (name, _) in std::env::vars().filter(|(name, _)| name.starts_with("BSAP_")) {
            command.env_remove(name);
        }
        command.args(arguments).envs(self.settings.iter().cloned()).current_dir(self.folder.path());
        command
    }

    /// Starts a process that logs to `<name>.log` and serves metrics on a free port.
    pub fn start_process(&self, name: &str, arguments: &[&str]) -> BsapProcess {
        self.start_process_with_metrics_at(name, arguments, &format!("127.0.0.1:{}", free_port()))
    }

    /// Starts a process that logs to `<name>.log` and serves metrics at this address.
    pub fn start_process_with_metrics_at(
        &self,
        name: &str,
        arguments: &[&str],
        metrics: &str,
    ) -> BsapProcess {
        let log = self.folder.path().join(format!("{name}.log"));
        let mut command = self.command(arguments);
        command.env("BSAP_LOG__FILE", &log).env("BSAP_METRICS__LISTEN", metrics);
        command.stdout(Stdio::null()).stdin(Stdio::null());
        let errors = std::fs::File::create(log.with_extension("stderr")).unwrap();
        BsapProcess {
            child: command.stderr(errors).spawn().unwrap(),
            log,
            metrics_address: metrics.to_owned(),
        }
    }

    /// Runs a command until it ends, and returns its output and its log, which is in `<name>.log`.
    pub fn run_command(&self, name: &str, arguments: &[&str]) -> (Output, Vec<LogLine>) {
        self.run_command_with_env(name, arguments, &[])
    }

    /// Runs a command like [`Fixture::run_command`], with further environment variables.
    pub fn run_command_with_env(
        &self,
        name: &str,
        arguments: &[&str],
        variables: &[(&str, &str)],
    ) -> (Output, Vec<LogLine>) {
        let log = self.folder.path().join(format!("{name}.log"));
        let mut command = self.command(arguments);
        command.env("BSAP_METRICS__ENABLED", "false").env("BSAP_LOG__FILE", &log);
        let output = command.envs(variables.iter().copied()).output().unwrap();
        (output, read_log_lines(&log))
    }

    /// Draws a picture and returns its URI.
    pub fn write_image(&self, name: &str, number: u64) -> String {
        self.write_file(
            name,
            &render_jpeg(&Scene::sample(1, number, PhotoStyle::Studio), 64).unwrap(),
        )
    }

    /// Writes a file into the folder of pictures and returns its URI.
    pub fn write_file(&self, name: &str, bytes: &[u8]) -> String {
        let file = self.folder.path().join("pictures").join(name);
        std::fs::write(&file, bytes).unwrap();
        url::Url::from_file_path(file).unwrap().into()
    }

    pub async fn send_message(&self, key: &str, value: &str) {
        let record = FutureRecord::to(TOPIC).key(key).payload(value);
        self.producer.send(record, Duration::from_secs(10)).await.unwrap();
    }

    /// Sends an upsert event.
    pub async fn send_upsert(&self, id: &str, uri: &str, sequence: u64) {
        let event =
            json!({"image_id": id, "uri": uri, "sequence": sequence, "event_time": now_rfc3339()});
        self.send_message(id, &event.to_string()).await;
    }

    /// Sends a message with a `traceparent` header.
    pub async fn send_traced(&self, key: &str, value: &str, traceparent: &str) {
        self.send_with_header(key, value, ("traceparent", traceparent)).await;
    }

    /// Sends a message with a header of this name and value.
    pub async fn send_with_header(&self, key: &str, value: &str, (name, content): (&str, &str)) {
        let header = Header { key: name, value: Some(content) };
        let headers = OwnedHeaders::new().insert(header);
        let record = FutureRecord::to(TOPIC).key(key).payload(value).headers(headers);
        self.producer.send(record, Duration::from_secs(10)).await.unwrap();
    }
}

/// Returns the current time in the format of events.
pub fn now_rfc3339() -> String {
    chrono::Utc::now().to_rfc3339()
}

/// A running process of the program, which is killed when it is dropped.
pub struct BsapProcess {
    pub child: Child,
    pub log: PathBuf,
    /// Address at which it serves metrics and probes.
    pub metrics_address: String,
}

impl BsapProcess {
    pub fn log_lines(&self) -> Vec<LogLine> {
        read_log_lines(&self.log)
    }

    /// Requests a path of the metrics server; returns status and body.
    pub async fn http_get(&self, path: &str) -> (u16, String) {
        let url = format!("http://{}{path}", self.metrics_address);
        let response = reqwest::get(url).await.unwrap();
        (response.status().as_u16(), response.text().await.unwrap())
    }

    /// Sends a signal by its name, such as `TERM`.
    pub fn send_signal(&self, name: &str) {
        let arguments = [format!("-{name}"), self.child.id().to_string()];
        assert!(Command::new("kill").args(arguments).status().unwrap().success());
    }

    /// Sends SIGTERM and waits for the end of the process; returns whether it exited successfully.
    pub fn stop_gracefully(mut self) -> bool {
        self.send_signal("TERM");
        let started = Instant::now();
        loop {
            if let Some(status) = self.child.try_wait().unwrap() {
                return status.success();
            }
            assert!(started.elapsed() < Duration::from_secs(30), "the process does not end");
            std::thread::sleep(Duration::from_millis(50));
        }
    }

    /// Waits until a line of the log matches, and returns it.
    pub async fn wait_for_line(
        &mut self,
        what: &str,
        matches: impl Fn(&LogLine) -> bool,
    ) -> LogLine {
        let started = Instant::now();
        loop {
            if let Some(line) = self.log_lines().into_iter().find(&matches) {
                return line;
            }
            if started.elapsed() > Duration::from_secs(90)
                || self.child.try_wait().unwrap().is_some()
            {
                let errors = std::fs::read_to_string(self.log.with_extension("stderr")).unwrap();
                let log = std::fs::read_to_string(&self.log).unwrap_or_default();
                panic!("waited in vain until {what}; standard error: {errors}; log: {log}");
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    }
}

impl Drop for BsapProcess {
    fn drop(&mut self) {
        // It may have ended already.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Returns the complete lines of a log; the last line may be incomplete while a process writes it.
pub fn read_log_lines(log: &Path) -> Vec<LogLine> {
    let text = std::fs::read_to_string(log).unwrap_or_default();
    let complete = text.rfind('\n').map_or("", |end| &text[..end]);
    complete.lines().map(|line| serde_json::from_str(line).expect(line)).collect()
}

/// Returns whether a line is of this event.
pub fn is_event(line: &LogLine, event: &str) -> bool {
    line.get("event").is_some_and(|name| name == event)
}

/// Returns the sum of a field over all lines of an event.
pub fn sum_field(lines: &[LogLine], event: &str, field: &str) -> u64 {
    lines.iter().filter(|line| is_event(line, event)).filter_map(|line| line[field].as_u64()).sum()
}

/// Returns a free port.
pub fn free_port() -> u16 {
    std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port()
}
