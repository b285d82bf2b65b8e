//! A consumer that is much slower than the publisher, on the broker in this process.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering as AtomicOrdering};
use std::time::{Duration, Instant};

use base64::Engine as _;
use bsap::clip::{ClipError, Encoders, ModelCard, Pixels};
use bsap::demo::broker::{MAX_BACKLOG_BYTES, MAX_BACKLOG_MESSAGES};
use bsap::ingest::source::ImageEvent;
use bsap::kafka;
use bsap::publish::{
    BacklogLimit, EventTemplate, PublishError, PublishInput, Publisher, discover_events,
};
use bsap::record::{Operation, VersionOrdering};
use futures::{Stream, stream};
use image::{Rgb, RgbImage};
use rand::{RngExt, SeedableRng};
use rdkafka::consumer::{BaseConsumer, Consumer};
use rdkafka::{Offset, TopicPartitionList};
use tokio_util::sync::CancellationToken;

use super::{Fixture, TOPIC, kafka_options};

/// The test fails if no further row is stored for this long.
const STALL_TIMEOUT: Duration = Duration::from_secs(30);
const GROUP: &str = "bsap";
const MIB: u64 = 1 << 20;

/// A model that returns a constant, and takes a given time per image.
struct SlowEncoders {
    card: ModelCard,
    us_per_image: AtomicU64,
}

impl SlowEncoders {
    fn new(us_per_image: u64) -> Arc<Self> {
        let card = ModelCard::without_checkpoint("slow", 16);
        Arc::new(Self { card, us_per_image: us_per_image.into() })
    }
}

impl Encoders for SlowEncoders {
    fn card(&self) -> &ModelCard {
        &self.card
    }
    fn preprocess_image(&self, _: &RgbImage) -> Result<Pixels, ClipError> {
        Ok(Pixels(Vec::new()))
    }
    fn embed_images(&self, batch: &[Pixels]) -> Result<Vec<Vec<f32>>, ClipError> {
        let us = self.us_per_image.load(AtomicOrdering::Relaxed) * batch.len() as u64;
        std::thread::sleep(Duration::from_micros(us));
        let mut unit = vec![0.0; self.card.dimension];
        unit[0] = 1.0;
        Ok(vec![unit; batch.len()])
    }
    fn embed_texts(&self, _: &[&str]) -> Result<Vec<Vec<f32>>, ClipError> {
        unreachable!("there are no prompts and no queries")
    }
}

/// What was observed from outside of the publisher while it sent.
#[derive(Debug, Default)]
struct Observations {
    /// The most messages behind the offsets that the group has committed.
    max_backlog: AtomicU64,
    /// Memory of the process, in bytes.
    max_memory: AtomicU64,
}

impl Observations {
    /// Observes broker and process until `done`.
    fn collect(&self, kafka: &kafka::KafkaOptions, partitions: i32, done: &AtomicBool) {
        let consumer: BaseConsumer = kafka.client_config().set("group.id", GROUP).create().unwrap();
        let timeout = Duration::from_secs(10);
        while !done.load(AtomicOrdering::Relaxed) {
            let mut group = TopicPartitionList::new();
            (0..partitions).for_each(|number| {
                group.add_partition(TOPIC, number);
            });
            // The ends first: what is committed in between makes the backlog look smaller, not larger.
            let end = |number| consumer.fetch_watermarks(TOPIC, number, timeout).unwrap().1;
            let ends: i64 = (0..partitions).map(end).sum();
            let committed = consumer.committed_offsets(group, timeout).unwrap();
            let committed = committed.elements();
            let stored = committed.iter().map(|element| match element.offset() {
                Offset::Offset(offset) => offset,
                _ => 0,
            });
            let backlog = (ends - stored.sum::<i64>()).max(0) as u64;
            self.max_backlog.fetch_max(backlog, AtomicOrdering::Relaxed);
            self.max_memory.fetch_max(memory_bytes(), AtomicOrdering::Relaxed);
            std::thread::sleep(Duration::from_millis(50));
        }
    }
}

/// Returns the resident memory of this process.
fn memory_bytes() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find(|line| line.starts_with("VmRSS:")).unwrap();
    line.split_whitespace().nth(1).unwrap().parse::<u64>().unwrap() * 1024
}

/// Publishes all `inputs` to a worker, calls `on_sent` with the number of messages sent so far, and
/// returns the seconds until the last row is stored. Checks that each became a row, and that storing
/// never stopped for long.
async fn publish_and_store(
    fixture: &Fixture,
    publisher: &Publisher,
    inputs: impl Stream<Item = Result<PublishInput, PublishError>>,
    count: u64,
    mut on_sent: impl FnMut(u64),
) -> f64 {
    let token = CancellationToken::new();
    let (progress, running) =
        fixture.start_worker_with_model(&fixture.encoders, &[], GROUP, &token).await;
    let started = Instant::now();
    let mut sent = 0;
    let send = publisher.send_all(inputs, &token, |_| {
        sent += 1;
        on_sent(sent);
    });
    let wait = async {
        let mut last_growth = (0, Instant::now());
        while last_growth.0 < count {
            let stored = progress.stored_rows.load(AtomicOrdering::Relaxed);
            if stored > last_growth.0 {
                last_growth = (stored, Instant::now());
            }
            let stalled = last_growth.1.elapsed() > STALL_TIMEOUT;
            assert!(!stalled && !running.is_finished(), "{stored} of {count} stored");
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    let (summary, ()) = tokio::join!(send, wait);
    let seconds = started.elapsed().as_secs_f64();
    assert_eq!(summary.unwrap().published_events, count);
    token.cancel();
    assert!(running.await.unwrap(), "drained");
    assert_eq!(progress.dead_lettered_messages.load(AtomicOrdering::Relaxed), 0);
    let mut ids: Vec<_> = fixture.read_rows().await.into_iter().map(|row| row.image_id).collect();
    assert_eq!(ids.len() as u64, count, "rows");
    ids.sort();
    ids.dedup();
    assert_eq!(ids.len() as u64, count, "different images");
    seconds
}

/// An image of noise, which no compression makes smaller, in base64.
fn noise_png(rng: &mut impl RngExt, side: u32) -> String {
    let noise = RgbImage::from_fn(side, side, |_, _| Rgb(rng.random()));
    let mut png = std::io::Cursor::new(Vec::new());
    noise.write_to(&mut png, image::ImageFormat::Png).unwrap();
    base64::engine::general_purpose::STANDARD.encode(png.into_inner())
}

/// Without the limit, the broker drops what does not fit into its 5 MiB per partition, and the worker
/// ends.
#[tokio::test(flavor = "multi_thread")]
async fn a_slow_consumer_loses_nothing_that_the_embedded_broker_cannot_hold() {
    let encoders = SlowEncoders::new(1_000);
    let fixture = Fixture { encoders, ..Fixture::with_partitions(1) };
    let kafka = kafka_options(&fixture.broker);
    let publisher = fixture.broker.new_publisher(&kafka, TOPIC, GROUP).unwrap();
    let rng = &mut rand::rngs::StdRng::seed_from_u64(1);
    let data = noise_png(rng, 60);
    let (count, message_bytes) = (700u64, data.len() as u64);
    assert!(count * message_bytes > 9 * MIB && message_bytes < MAX_BACKLOG_BYTES / 100);
    let event = move |number: u64| ImageEvent {
        image_id: format!("i{number}"),
        operation: Operation::Upsert,
        uri: None,
        data: Some(data.clone()),
        embedding: None,
        model: None,
        sequence: Some(1),
        event_time: None,
        attributes: [].into(),
    };
    let inputs = stream::iter((0..count).map(|number| Ok(Ok(event(number)))));
    let (observations, done) =
        (Arc::new(Observations::default()), Arc::new(AtomicBool::new(false)));
    let observer = {
        let (observations, done) = (observations.clone(), done.clone());
        std::thread::spawn(move || observations.collect(&kafka, 1, &done))
    };
    publish_and_store(&fixture, &publisher, inputs, count, |_| {}).await;
    done.store(true, AtomicOrdering::Relaxed);
    observer.join().unwrap();
    let backlog = observations.max_backlog.load(AtomicOrdering::Relaxed);
    let size = publisher.backlog_size().unwrap();
    assert!(backlog > 0 && backlog * message_bytes <= MAX_BACKLOG_BYTES, "{backlog} messages");
    assert!(size.peak_messages >= backlog && size.peak_bytes <= MAX_BACKLOG_BYTES, "{size:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_publisher_that_waits_for_capacity_ends_when_it_is_cancelled() {
    let fixture = Fixture::with_partitions(1);
    let kafka = kafka_options(&fixture.broker);
    let limit = BacklogLimit { group: GROUP.into(), max_messages: 2, max_bytes: MIB };
    let publisher = Publisher::new(&kafka, TOPIC).unwrap();
    let publisher = publisher.with_backlog_limit(&kafka, limit).unwrap();
    let folder = fixture.folder.path();
    (0..5).for_each(|number| write_tiny_png(folder, number));
    let inputs = list_folder(folder).await;
    let token = CancellationToken::new();
    let cancel = async {
        while publisher.backlog_size().unwrap().messages < 2 {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        tokio::time::sleep(Duration::from_millis(300)).await;
        token.cancel();
    };
    let send = publisher.send_all(inputs, &token, |_| {});
    let both =
        tokio::time::timeout(Duration::from_secs(30), async { tokio::join!(send, cancel).0 });
    assert_eq!(both.await.unwrap().unwrap().published_events, 2);
}

async fn list_folder(
    folder: &Path,
) -> impl Stream<Item = Result<PublishInput, PublishError>> + use<> {
    let template =
        EventTemplate { ordering: VersionOrdering::Sequence, ..EventTemplate::default() };
    discover_events(folder.to_str().unwrap(), &BTreeMap::new(), template).await.unwrap()
}

fn write_tiny_png(folder: &Path, number: u32) {
    let [_, red, green, blue] = number.to_be_bytes();
    let picture = RgbImage::from_pixel(8, 8, Rgb([red, green, blue]));
    picture.save(folder.join(format!("{number:06}.png"))).unwrap();
}

/// Files of a folder, from the listing to rows, by a consumer ten times slower than the publisher is
/// without one. `BSAP_BACKLOG_FILES` is their number.
#[tokio::test(flavor = "multi_thread")]
#[ignore = "takes minutes: just backlog"]
async fn a_hundred_thousand_files_pass_the_embedded_broker() {
    const PARTITIONS: i32 = 4;
    const MAX_MEMORY_GROWTH: u64 = 256 * MIB;
    let count: u32 =
        std::env::var("BSAP_BACKLOG_FILES").map_or(100_000, |text| text.parse().unwrap());
    let measured = u64::from(count / 10).min(MAX_BACKLOG_MESSAGES / 2);
    let encoders = SlowEncoders::new(5_000);
    let fixture = Fixture { encoders: encoders.clone(), ..Fixture::with_partitions(PARTITIONS) };
    let kafka = kafka_options(&fixture.broker);
    let folder = fixture.folder.path().join("pictures");
    std::fs::create_dir(&folder).unwrap();
    (0..count).for_each(|number| write_tiny_png(&folder, number));
    let publisher = fixture.broker.new_publisher(&kafka, TOPIC, GROUP).unwrap();
    let inputs = list_folder(&folder).await;
    let memory_before = memory_bytes();
    let (observations, done) =
        (Arc::new(Observations::default()), Arc::new(AtomicBool::new(false)));
    let observer = {
        let (observations, done) = (observations.clone(), done.clone());
        std::thread::spawn(move || observations.collect(&kafka, PARTITIONS, &done))
    };
    // The first messages do not have to wait: they show how fast the publisher is.
    let (started, mut publisher_rate) = (Instant::now(), 0.0);
    let on_sent = |sent: u64| {
        if sent == measured {
            publisher_rate = measured as f64 / started.elapsed().as_secs_f64();
            encoders.us_per_image.store((1e7 / publisher_rate) as u64, AtomicOrdering::Relaxed);
        }
    };
    let seconds = publish_and_store(&fixture, &publisher, inputs, count.into(), on_sent).await;
    done.store(true, AtomicOrdering::Relaxed);
    observer.join().unwrap();
    let backlog = observations.max_backlog.load(AtomicOrdering::Relaxed);
    let growth =
        observations.max_memory.load(AtomicOrdering::Relaxed).saturating_sub(memory_before);
    let size = publisher.backlog_size().unwrap();
    println!("files published and stored     {count}");
    println!("publisher alone          {publisher_rate:9.0} messages/s");
    println!("publisher and consumer   {:9.0} images/s", f64::from(count) / seconds);
    println!("most messages not stored {backlog:9} (limit {MAX_BACKLOG_MESSAGES})");
    println!("most bytes not stored    {:9} (limit {MAX_BACKLOG_BYTES})", size.peak_bytes);
    println!("memory of the process    {:9} MiB more than before", growth / MIB);
    assert!(backlog <= MAX_BACKLOG_MESSAGES && size.peak_bytes <= MAX_BACKLOG_BYTES);
    assert!(growth < MAX_MEMORY_GROWTH, "{growth} bytes");
    assert!(f64::from(count) / seconds <= publisher_rate / 9.0, "the consumer is not slow");
}
