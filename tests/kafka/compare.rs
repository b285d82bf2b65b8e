//! Compares the table and the dead letters with the expected result.

use std::collections::BTreeMap;

use bsap::ingest::dead_letter;
use bsap::record::ImageRow;
use bsap::store::Store;
use bsap::table::Follower;
use bsap::table::Generation;
use deltalake_core::arrow::array::AsArray;
use deltalake_core::parquet::arrow::arrow_reader::ParquetRecordBatchReaderBuilder;
use futures::TryStreamExt;
use object_store::ObjectStoreExt;
use serde_json::Value;
use tokio_util::sync::CancellationToken;

use crate::events::{ExpectedImage, SentMessage};
use crate::fixture::{Fixture, TOPIC};

impl Fixture {
    /// Asserts that table and dead letters match the sent events. `passes`: how often the whole topic was
    /// consumed, including deliberate replays.
    pub async fn assert_table_matches_events(&self, passes: u64) {
        let mut follower = Follower::open(&self.store(), &self.generation).await.unwrap();
        let mut newest: BTreeMap<String, ImageRow> = BTreeMap::new();
        let rows = self.appended_rows().await;
        while let Some(changes) = follower.next(&|_, _| {}).await.unwrap() {
            for row in changes.rows {
                match newest.get(row.image_id.as_str()) {
                    Some(known) if !row.supersedes(known) => {}
                    _ => {
                        newest.insert(row.image_id.to_string(), row);
                    }
                }
            }
        }
        let actual: BTreeMap<String, ExpectedImage> = newest
            .into_iter()
            .map(|(id, row)| {
                let sequence = row.sequence.as_str().parse().unwrap();
                (
                    id,
                    ExpectedImage {
                        sequence,
                        content_hash: row.image.map(|image| image.content_hash),
                    },
                )
            })
            .collect();
        let expected = &self.events.expected_images;
        let missing = expected.keys().filter(|id| !actual.contains_key(*id)).count();
        let unexpected = actual.keys().filter(|id| !expected.contains_key(*id)).count();
        let outdated =
            expected.iter().filter(|(id, e)| actual.get(*id).is_some_and(|a| a != *e)).count();
        let (letters, letter_count) = self.read_dead_letters();
        let live = expected.values().filter(|newest| newest.content_hash.is_some()).count();
        let events = &self.events;
        // A producer that lost its broker may have written a message twice, which is not an error here.
        let written: i64 = self.end_offsets().values().sum();
        println!(
            "{}: {} messages, {written} in the topic ({} repeated, {} stale, {} deletes, {} without an image, {} poison): {rows} \
             of {} rows; {live} live images: {missing} missing, {unexpected} unexpected, {outdated} not \
             the newest; {} dead letters of {} positions; {:.0} s",
            self.scenario,
            events.sent_messages,
            events.duplicates,
            events.stale,
            events.deletes,
            events.missing_images,
            events.poison_messages.len(),
            events.expected_rows * passes,
            letter_count,
            letters.len(),
            self.started.elapsed().as_secs_f64(),
        );
        if rows != events.expected_rows * passes {
            println!("{}: stored twice: {:?}", self.scenario, self.duplicated_positions().await);
        }
        assert_eq!((missing, unexpected, outdated), (0, 0, 0));
        assert_eq!(
            rows,
            events.expected_rows * passes,
            "each message is committed exactly once per pass"
        );
        assert_eq!(
            letters, events.poison_messages,
            "dead letters are the poison messages, byte for byte"
        );
        let (committed, positions) = (self.committed_offsets(), self.table_positions().await);
        for (partition, offset) in committed {
            assert!(offset <= positions[&partition], "Kafka is ahead of the table");
        }
    }

    /// Returns sequence and content hash of the newest version of each image in a generation; the hash is
    /// `None` for deletes.
    pub async fn newest_versions(
        &self,
        generation: &Generation,
    ) -> BTreeMap<String, (String, Option<String>)> {
        let folder = self.folder.path();
        let rows =
            bsap::reconcile::read_current_rows(&self.store(), generation, folder).await.unwrap();
        let mut follower = Follower::open(&self.store(), generation).await.unwrap();
        let mut hashes = BTreeMap::new();
        for row in follower.next(&|_, _| {}).await.unwrap().unwrap().rows {
            let hash = row.image.map(|image| image.content_hash);
            hashes.insert((row.image_id.to_string(), row.sequence.as_str().to_owned()), hash);
        }
        rows.map(|entry| {
            let entry = entry.unwrap();
            let sequence = entry.version.sequence.as_str().to_owned();
            let hash = hashes.remove(&(entry.image_id.clone(), sequence.clone())).flatten();
            (entry.image_id, (sequence, hash))
        })
        .collect()
    }

    /// Returns the `add` actions of the table's log that appended rows, even of files that compaction has
    /// removed since.
    async fn append_actions(&self, store: &Store) -> Vec<Value> {
        let log = store.object_store().list(Some(&"_delta_log".into()));
        let commits: Vec<_> = log.try_collect().await.unwrap();
        let mut adds = Vec::new();
        for commit in commits.iter().filter(|commit| commit.location.extension() == Some("json")) {
            let found = store.object_store().get(&commit.location).await.unwrap();
            let text = String::from_utf8(found.bytes().await.unwrap().into()).unwrap();
            let actions = text.lines().map(|line| serde_json::from_str::<Value>(line).unwrap());
            adds.extend(actions.filter(|action| action["add"]["dataChange"] == true));
        }
        adds
    }

    /// Returns the number of rows that were ever appended.
    async fn appended_rows(&self) -> u64 {
        let store = self.store().subfolder(&format!("generations/{}/images", self.generation.id));
        let rows = |add: &Value| {
            let stats: Value = serde_json::from_str(add["add"]["stats"].as_str().unwrap()).unwrap();
            stats["numRecords"].as_u64().unwrap()
        };
        self.append_actions(&store).await.iter().map(rows).sum()
    }

    /// Describes the Kafka positions from which more than one row was appended. Reads the files that were
    /// appended and still exist, not those of compaction.
    async fn duplicated_positions(&self) -> Vec<String> {
        let store = self.store().subfolder(&format!("generations/{}/images", self.generation.id));
        let mut seen: BTreeMap<String, Vec<String>> = BTreeMap::new();
        for add in self.append_actions(&store).await {
            let file = add["add"]["path"].as_str().unwrap().to_owned();
            let Ok(found) = store.object_store().get(&file.as_str().into()).await else { continue };
            let bytes = found.bytes().await.unwrap();
            let batches = ParquetRecordBatchReaderBuilder::try_new(bytes).unwrap().build().unwrap();
            for batch in batches {
                let batch = batch.unwrap();
                let sources = batch.column_by_name("source").unwrap().as_string::<i32>();
                for source in sources.iter().flatten() {
                    seen.entry(source.to_owned()).or_default().push(file.clone());
                }
            }
        }
        let duplicated = seen.into_iter().filter(|(_, files)| files.len() > 1);
        duplicated.map(|(source, files)| format!("{source} in {}", files.join(", "))).collect()
    }

    /// Returns the original messages of the dead letters by partition and offset, and the number of dead
    /// letters.
    fn read_dead_letters(&self) -> (BTreeMap<(i32, i64), SentMessage>, u64) {
        let (mut letters, mut letter_count) = (BTreeMap::new(), 0);
        let (options, filter) =
            (dead_letter::DeadLetterOptions::default(), dead_letter::DeadLetterFilter::default());
        let token = CancellationToken::new();
        let not_dead_letters = dead_letter::read_dead_letters(
            &self.kafka_options(),
            &options,
            &filter,
            &token,
            |letter| {
                letter_count += 1;
                assert_eq!(&*letter.original_message.partition.topic, TOPIC);
                let message = letter.original_message;
                let sent = SentMessage {
                    key: message.key.map(Into::into),
                    value: message.payload.map(Into::into),
                    headers: message
                        .headers
                        .into_iter()
                        .map(|(k, v)| (k, v.map(Into::into)))
                        .collect(),
                    timestamp_ms: message.timestamp_ms.unwrap(),
                };
                letters.insert((message.partition.number, message.offset), sent);
                true
            },
        );
        assert_eq!(not_dead_letters.unwrap(), 0);
        (letters, letter_count)
    }
}
