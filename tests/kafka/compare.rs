//! What is in the table and among the dead letters, compared with what must be.

use std::collections::BTreeMap;

use bsap::catalogue::Generation;
use bsap::ingest::dead_letter;
use bsap::record::ImageRow;
use bsap::store::Store;
use bsap::table::Follower;
use deltalake_core::arrow::array::AsArray;
use deltalake_core::parquet::arrow::arrow_reader::ParquetRecordBatchReaderBuilder;
use futures::TryStreamExt;
use object_store::ObjectStoreExt;
use serde_json::Value;
use tokio_util::sync::CancellationToken;

use crate::events::{ExpectedImage, SentMessage};
use crate::fixture::{Fixture, TOPIC};

impl Fixture {
    /// Compares table and dead letters with what was sent. `passes`: how often the whole topic was
    /// deliberately consumed.
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
        let found: BTreeMap<String, ExpectedImage> = newest
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
        let wanted = &self.events.expected_images;
        let missing = wanted.keys().filter(|id| !found.contains_key(*id)).count();
        let strange = found.keys().filter(|id| !wanted.contains_key(*id)).count();
        let differ =
            wanted.iter().filter(|(id, w)| found.get(*id).is_some_and(|f| f != *w)).count();
        let (letters, put_aside) = self.read_dead_letters();
        let live = wanted.values().filter(|newest| newest.content_hash.is_some()).count();
        let events = &self.events;
        // A producer that lost its broker may have written a message twice: that is no fault here.
        let written: i64 = self.end_offsets().values().sum();
        println!(
            "{}: {} messages, {written} in the topic ({} repeated, {} late, {} deletes, {} gone, {} poison) gave {rows} rows \
             of {} wanted; {live} live images: {missing} missing, {strange} strange, {differ} not the \
             newest; {} dead letters of {} positions; {:.0} s",
            self.scenario,
            events.sent_messages,
            events.duplicates,
            events.stale,
            events.deletes,
            events.missing_images,
            events.poison_messages.len(),
            events.expected_rows * passes,
            put_aside,
            letters.len(),
            self.started.elapsed().as_secs_f64(),
        );
        if rows != events.expected_rows * passes {
            println!("{}: stored twice: {:?}", self.scenario, self.duplicated_positions().await);
        }
        assert_eq!((missing, strange, differ), (0, 0, 0));
        assert_eq!(
            rows,
            events.expected_rows * passes,
            "each message is committed exactly once a pass"
        );
        assert_eq!(letters, events.poison_messages, "dead letters are the poison, byte for byte");
        let (committed, positions) = (self.committed_offsets(), self.table_positions().await);
        for (partition, offset) in committed {
            assert!(offset <= positions[&partition], "Kafka is ahead of the table");
        }
    }

    /// The newest version of every image in a generation: its sequence and its content.
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

    /// Actions of the table's log by which rows were appended; compaction takes superseded ones away.
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

    /// Rows that were ever appended.
    async fn appended_rows(&self) -> u64 {
        let store = self.store().subfolder(&format!("generations/{}/images", self.generation.id));
        let rows = |add: &Value| {
            let stats: Value = serde_json::from_str(add["add"]["stats"].as_str().unwrap()).unwrap();
            stats["numRecords"].as_u64().unwrap()
        };
        self.append_actions(&store).await.iter().map(rows).sum()
    }

    /// Positions in Kafka of which the table's files have more than one row each; files that compaction
    /// took away count, as long as they are there, and those that it made do not.
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
        let twice = seen.into_iter().filter(|(_, files)| files.len() > 1);
        twice.map(|(source, files)| format!("{source} in {}", files.join(", "))).collect()
    }

    /// Dead letters by the position that they had, and how many there are in all.
    fn read_dead_letters(&self) -> (BTreeMap<(i32, i64), SentMessage>, u64) {
        let (mut letters, mut all) = (BTreeMap::new(), 0);
        let (options, filter) =
            (dead_letter::DeadLetterOptions::default(), dead_letter::DeadLetterFilter::default());
        let token = CancellationToken::new();
        let strange = dead_letter::read_dead_letters(
            &self.kafka_options(),
            &options,
            &filter,
            &token,
            |letter| {
                all += 1;
                assert_eq!(&*letter.message.partition.topic, TOPIC);
                let message = letter.message;
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
        assert_eq!(strange.unwrap(), 0);
        (letters, all)
    }
}
