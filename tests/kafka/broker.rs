//! A real Apache Kafka on loopback, one process per broker, from the jars that `tests/run` downloads.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{Read as _, Write as _};
use std::net::{TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use rdkafka::ClientConfig;
use rdkafka::admin::{
    AdminClient, AdminOptions, AlterConfig, NewPartitions, NewTopic, ResourceSpecifier,
    TopicReplication,
};
use rdkafka::client::DefaultClientContext;
use rdkafka::consumer::{BaseConsumer, Consumer};
use rdkafka::{Offset, TopicPartitionList};

/// Id of the cluster in its storage; any 16 bytes in base64.
const CLUSTER_ID: &str = "4L6g3nShT-eMCtK--X86sw";
const READY_TIMEOUT: Duration = Duration::from_secs(60);

/// Sends a signal to a process by the name of the signal, such as `STOP`.
pub fn send_signal(process: &Child, name: &str) {
    let sent =
        Command::new("kill").args([format!("-{name}"), process.id().to_string()]).status().unwrap();
    assert!(sent.success(), "kill -{name} {}", process.id());
}

/// Copies a folder with all that it contains.
pub fn copy_folder(from: &Path, to: &Path) {
    std::fs::create_dir_all(to).unwrap();
    for entry in std::fs::read_dir(from).unwrap() {
        let entry = entry.unwrap();
        let target = to.join(entry.file_name());
        if entry.file_type().unwrap().is_dir() {
            copy_folder(&entry.path(), &target);
        } else {
            std::fs::copy(entry.path(), target).unwrap();
        }
    }
}

/// What a right is granted on.
#[derive(Clone, Copy)]
pub enum Resource<'a> {
    Topic(&'a str),
    Group(&'a str),
}

/// Operations by their numbers in the Kafka protocol.
#[derive(Clone, Copy)]
pub enum Operation {
    Read = 3,
    Write = 4,
    Describe = 8,
}

/// Brokers that are also controllers (KRaft).
pub struct Cluster {
    folder: tempfile::TempDir,
    jars: PathBuf,
    ports: Vec<u16>,
    sasl_port: Option<u16>,
    brokers: Vec<Option<Child>>,
}

/// Name and password of the only account that [`Cluster::start_secured`] knows.
pub const ACCOUNT: (&str, &str) = ("worker", "right-password");

impl Cluster {
    pub fn start(count: usize) -> Self {
        Self::start_with(count, false)
    }

    /// Starts one broker that also listens for SASL, and allows [`ACCOUNT`] only what is granted to it. Clients of
    /// the plain listener may do everything.
    pub fn start_secured() -> Self {
        Self::start_with(1, true)
    }

    fn start_with(count: usize, is_secured: bool) -> Self {
        let jars = std::env::var_os("BSAP_KAFKA_JARS");
        let jars =
            jars.expect("BSAP_KAFKA_JARS names the folder of Kafka's jars; run `tests/run kafka`");
        let free_port = || TcpListener::bind("127.0.0.1:0").unwrap();
        // Bound all at once, so that no port is used twice.
        let port_count = 2 * count + usize::from(is_secured);
        let listeners: Vec<_> = (0..port_count).map(|_| free_port()).collect();
        let mut all: Vec<u16> = listeners.iter().map(|l| l.local_addr().unwrap().port()).collect();
        drop(listeners);
        let sasl_port = if is_secured { all.pop() } else { None };
        let (ports, controllers) = all.split_at(count);
        let voters: Vec<String> =
            controllers.iter().enumerate().map(|(i, p)| format!("{i}@127.0.0.1:{p}")).collect();
        let folder = tempfile::tempdir().unwrap();
        let replicas = count.min(3);
        let (name, password) = ACCOUNT;
        let (sasl_listener, security) = sasl_port.map_or_else(Default::default, |port| {
            (
                format!(",SASL_PLAINTEXT://127.0.0.1:{port}"),
                format!(
                    "listener.security.protocol.map=PLAINTEXT:PLAINTEXT,CONTROLLER:PLAINTEXT,SASL_PLAINTEXT:SASL_PLAINTEXT\n\
                     authorizer.class.name=org.apache.kafka.metadata.authorizer.StandardAuthorizer\n\
                     super.users=User:ANONYMOUS\n\
                     sasl.enabled.mechanisms=PLAIN,SCRAM-SHA-512\n\
                     listener.name.sasl_plaintext.scram-sha-512.sasl.jaas.config=\
                     org.apache.kafka.common.security.scram.ScramLoginModule required;\n\
                     listener.name.sasl_plaintext.plain.sasl.jaas.config=\
                     org.apache.kafka.common.security.plain.PlainLoginModule required user_{name}=\"{password}\";\n"
                ),
            )
        });
        for (i, (port, controller)) in ports.iter().zip(controllers).enumerate() {
            let properties = format!(
                "process.roles=broker,controller\n\
                 node.id={i}\n\
                 listeners=PLAINTEXT://127.0.0.1:{port},CONTROLLER://127.0.0.1:{controller}{sasl_listener}\n\
                 advertised.listeners=PLAINTEXT://127.0.0.1:{port}{sasl_listener}\n\
                 {security}\
                 controller.listener.names=CONTROLLER\n\
                 controller.quorum.voters={}\n\
                 log.dirs={}\n\
                 auto.create.topics.enable=false\n\
                 min.insync.replicas={}\n\
                 offsets.topic.replication.factor={replicas}\n\
                 offsets.topic.num.partitions=4\n\
                 transaction.state.log.replication.factor={replicas}\n\
                 transaction.state.log.min.isr=1\n\
                 share.coordinator.state.topic.replication.factor={replicas}\n\
                 group.initial.rebalance.delay.ms=0\n\
                 log.initial.task.delay.ms=500\n\
                 log.retention.check.interval.ms=500\n\
                 log.segment.delete.delay.ms=100\n",
                voters.join(","),
                folder.path().join(format!("data-{i}")).display(),
                replicas.div_ceil(2),
            );
            std::fs::write(folder.path().join(format!("{i}.properties")), properties).unwrap();
        }
        let mut cluster = Self {
            folder,
            jars: jars.into(),
            ports: ports.to_vec(),
            sasl_port,
            brokers: (0..count).map(|_| None).collect(),
        };
        for i in 0..count {
            let mut format = cluster.java_command("kafka.tools.StorageTool");
            format.args(["format", "--cluster-id", CLUSTER_ID, "--config"]);
            format.arg(cluster.properties_file(i));
            if is_secured {
                let (name, password) = ACCOUNT;
                format.arg("--add-scram");
                format.arg(format!("SCRAM-SHA-512=[name={name},password={password}]"));
            }
            let formatted = format.stdout(Stdio::null()).status();
            assert!(formatted.unwrap().success(), "the storage of broker {i} was not formatted");
        }
        for i in 0..count {
            cluster.launch_broker(i);
        }
        cluster.wait_until_ready();
        cluster
    }

    fn properties_file(&self, i: usize) -> PathBuf {
        self.folder.path().join(format!("{i}.properties"))
    }

    fn java_command(&self, class: &str) -> Command {
        let logging = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/kafka/log4j2.xml");
        let mut command = Command::new("java");
        command
            .args(["-Xmx256m", "-XX:+UseSerialGC", "-XX:TieredStopAtLevel=1"])
            .arg(format!("-Dlog4j2.configurationFile={logging}"))
            .arg("-cp")
            .arg(self.jars.join("*"))
            .arg(class);
        command
    }

    /// Starts a broker that is not running.
    pub fn launch_broker(&mut self, i: usize) {
        let log = self.folder.path().join(format!("{i}.log"));
        let log = File::options().create(true).append(true).open(log).unwrap();
        let broker = self
            .java_command("kafka.Kafka")
            .arg(self.properties_file(i))
            .stdout(log.try_clone().unwrap())
            .stderr(log)
            .spawn();
        self.brokers[i] = Some(broker.expect("java starts"));
    }

    /// Ends a broker: `TERM` lets it transfer its partitions first, `KILL` does not.
    pub fn stop_broker(&mut self, i: usize, how: &str) {
        let mut broker = self.brokers[i].take().expect("the broker runs");
        send_signal(&broker, how);
        broker.wait().unwrap();
    }

    /// Copies the data of a stopped broker, as a backup of its disk does.
    pub fn back_up(&self, i: usize) {
        copy_folder(&self.data_folder(i), &self.folder.path().join(format!("backup-{i}")));
    }

    /// Replaces the data of a stopped broker by the copy of [`Self::back_up`].
    pub fn restore(&self, i: usize) {
        std::fs::remove_dir_all(self.data_folder(i)).unwrap();
        copy_folder(&self.folder.path().join(format!("backup-{i}")), &self.data_folder(i));
    }

    fn data_folder(&self, i: usize) -> PathBuf {
        self.folder.path().join(format!("data-{i}"))
    }

    /// Suspends a broker, or resumes it.
    pub fn set_frozen(&self, i: usize, frozen: bool) {
        let broker = self.brokers[i].as_ref().expect("the broker runs");
        send_signal(broker, if frozen { "STOP" } else { "CONT" });
    }

    /// Returns the `host:port` of all brokers, separated by commas.
    pub fn bootstrap_servers(&self) -> String {
        self.ports.iter().map(|p| format!("127.0.0.1:{p}")).collect::<Vec<_>>().join(",")
    }

    /// Returns the `host:port` of the listener for SASL.
    pub fn sasl_bootstrap_server(&self) -> String {
        format!("127.0.0.1:{}", self.sasl_port.expect("the cluster is secured"))
    }

    pub fn client_config(&self) -> ClientConfig {
        let mut config = ClientConfig::new();
        config.set("bootstrap.servers", self.bootstrap_servers()).set("log_level", "0");
        config
    }

    /// Waits until every broker is a member of the cluster.
    pub fn wait_until_ready(&self) {
        let started = Instant::now();
        loop {
            let client: BaseConsumer = self.client_config().create().unwrap();
            let metadata = client.fetch_metadata(None, Duration::from_secs(5));
            if metadata.is_ok_and(|found| found.brokers().len() == self.ports.len()) {
                return;
            }
            assert!(
                started.elapsed() < READY_TIMEOUT,
                "Kafka does not start; see {:?}",
                self.log_tail()
            );
            std::thread::sleep(Duration::from_millis(200));
        }
    }

    fn log_tail(&self) -> String {
        let log = std::fs::read_to_string(self.folder.path().join("0.log")).unwrap_or_default();
        log.lines().rev().take(20).collect::<Vec<_>>().join("\n")
    }

    pub async fn create_topic(&self, topic: &str, partitions: i32, max_message_bytes: u32) {
        let admin: AdminClient<DefaultClientContext> = self.client_config().create().unwrap();
        let replicas = TopicReplication::Fixed(self.ports.len().min(3) as i32);
        let largest = max_message_bytes.to_string();
        // Dead letters keep the timestamp of the original, by which retention would remove them.
        let topic = NewTopic::new(topic, partitions, replicas)
            .set("retention.ms", "-1")
            .set("max.message.bytes", &largest);
        let started = Instant::now();
        // A topic of this name may still be on its way out.
        while let Err((name, error)) =
            &admin.create_topics([&topic], &AdminOptions::new()).await.unwrap()[0]
        {
            assert!(started.elapsed() < READY_TIMEOUT, "{name} was not created: {error}");
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    }
}

impl Cluster {
    /// Deletes a topic, and waits until it is gone.
    pub async fn delete_topic(&self, topic: &str) {
        let admin: AdminClient<DefaultClientContext> = self.client_config().create().unwrap();
        admin.delete_topics(&[topic], &AdminOptions::new()).await.unwrap()[0].as_ref().unwrap();
        let started = Instant::now();
        loop {
            let client: BaseConsumer = self.client_config().create().unwrap();
            let metadata = client.fetch_metadata(None, Duration::from_secs(5)).unwrap();
            if metadata.topics().iter().all(|one| one.name() != topic) {
                return;
            }
            assert!(started.elapsed() < READY_TIMEOUT, "{topic} is still there");
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    }

    /// Adds partitions to a topic until it has `count`.
    pub async fn add_partitions(&self, topic: &str, count: usize) {
        let admin: AdminClient<DefaultClientContext> = self.client_config().create().unwrap();
        let added = [NewPartitions::new(topic, count)];
        admin.create_partitions(&added, &AdminOptions::new()).await.unwrap()[0].as_ref().unwrap();
    }

    /// Grants [`ACCOUNT`] an operation on a topic or group (`CreateAcls` of the Kafka protocol, version 1).
    pub fn grant(&self, resource: Resource<'_>, operation: Operation) {
        let text = |text: &str| {
            let length = i16::try_from(text.len()).unwrap().to_be_bytes();
            [&length[..], text.as_bytes()].concat()
        };
        let (resource_type, name) = match resource {
            Resource::Topic(name) => (2_u8, name),
            Resource::Group(name) => (3, name),
        };
        let (literal, allow) = (3_u8, 3_u8);
        let request = [
            &[0, 30, 0, 1, 0, 0, 0, 1][..],
            &text("test"),
            &[0, 0, 0, 1, resource_type],
            &text(name),
            &[literal],
            &text(&format!("User:{}", ACCOUNT.0)),
            &text("*"),
            &[operation as u8, allow],
        ]
        .concat();
        let mut stream = TcpStream::connect(("127.0.0.1", self.ports[0])).unwrap();
        let length = u32::try_from(request.len()).unwrap().to_be_bytes();
        stream.write_all(&[&length[..], &request].concat()).unwrap();
        let mut length = [0; 4];
        stream.read_exact(&mut length).unwrap();
        let mut response = vec![0; u32::from_be_bytes(length) as usize];
        stream.read_exact(&mut response).unwrap();
        // Correlation id, throttle time, number of results, error code.
        assert_eq!(response[12..14], [0, 0], "{name} was not granted: {response:?}");
    }

    /// Sets a configuration of a topic; all others get their defaults.
    pub async fn set_topic_config(&self, topic: &str, name: &str, value: &str) {
        let admin: AdminClient<DefaultClientContext> = self.client_config().create().unwrap();
        let resource = AlterConfig::new(ResourceSpecifier::Topic(topic));
        let altered = [resource.set(name, value)];
        admin.alter_configs(&altered, &AdminOptions::new()).await.unwrap()[0].as_ref().unwrap();
    }

    /// Removes the messages before `ends` from each partition of `topic`, as retention does.
    pub async fn delete_records_before(&self, topic: &str, ends: &BTreeMap<i32, i64>) {
        let admin: AdminClient<DefaultClientContext> = self.client_config().create().unwrap();
        let mut list = TopicPartitionList::new();
        for (number, end) in ends {
            list.add_partition_offset(topic, *number, Offset::Offset(*end)).unwrap();
        }
        admin.delete_records(&list, &AdminOptions::new()).await.unwrap();
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        for mut broker in self.brokers.drain(..).flatten() {
            // KILL: a suspended process handles no other signal.
            let _ = broker.kill();
            let _ = broker.wait();
        }
    }
}
