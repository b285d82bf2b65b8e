//! A worker: its parts, and how they are put together.

use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use tokio::sync::Mutex;
use tokio_util::sync::CancellationToken;
use tokio_util::task::AbortOnDropHandle;

use super::dead_letter::DeadLetterWriter;
use super::decode::DecodeOptions;
use super::embed::Embedder;
use super::error::IngestError;
use super::fetch::Fetcher;
use super::message_processor::{MessageProcessor, new_decode_permits};
use super::options::IngestOptions;
use super::pipeline::Pipeline;
use super::progress::Progress;
use super::sink::Sink;
use super::source::{Decoder, OffsetProvider, Source, SourceOptions};
use crate::clip::Encoders;
use crate::kafka;
use crate::prompts::ActivePromptSets;
use crate::record::{StoredPosition, TopicPartition};
use crate::table::{TableError, TableWriter};

/// A worker before it is started: its options, clients, model and table.
pub struct Worker {
    /// Connection to Kafka.
    pub kafka_options: kafka::KafkaOptions,
    /// Topics and consumer group.
    pub source_options: SourceOptions,
    /// Turns messages into events.
    pub decoder: Decoder,
    /// Writes messages that can never be processed to a topic of their own.
    pub dead_letter_writer: DeadLetterWriter,
    /// Fetches the bytes of images.
    pub fetcher: Fetcher,
    /// Limits of image decoding.
    pub decode_options: DecodeOptions,
    /// The image encoder of the model.
    pub encoders: Arc<dyn Encoders>,
    /// Prompt sets whose statistics are computed for each image; they may change while the worker runs.
    pub prompt_sets: ActivePromptSets,
    /// Writes rows and positions to the table.
    pub table_writer: TableWriter,
    /// Batch sizes and limits.
    pub ingest_options: IngestOptions,
    /// Counters and health, shared with metrics.
    pub progress: Arc<Progress>,
}

/// Resumes partitions from the positions in the table.
struct TableOffsetProvider {
    table_writer: Arc<Mutex<TableWriter>>,
    /// Cancelled when the worker is to stop: then no position is needed any more.
    worker_cancel: CancellationToken,
}

#[async_trait]
impl OffsetProvider for TableOffsetProvider {
    async fn stored_position(&self, partition: &TopicPartition) -> Result<StoredPosition, String> {
        self.run_unless_stopping(async {
            let mut writer = self.table_writer.lock().await;
            writer.read_stored_position(partition, &self.worker_cancel).await
        })
        .await
    }

    async fn start_new_log(
        &self,
        partition: &TopicPartition,
        replaced: u64,
    ) -> Result<StoredPosition, String> {
        self.run_unless_stopping(async {
            let mut writer = self.table_writer.lock().await;
            writer.start_new_log(partition, replaced, &self.worker_cancel).await
        })
        .await
    }
}

impl TableOffsetProvider {
    async fn run_unless_stopping(
        &self,
        read: impl Future<Output = Result<StoredPosition, TableError>>,
    ) -> Result<StoredPosition, String> {
        match self.worker_cancel.run_until_cancelled(read).await {
            Some(position) => position.map_err(|error| error.to_string()),
            None => Err("the worker is stopping".into()),
        }
    }
}

impl Worker {
    /// Runs until `token` is cancelled or a permanent error occurs, then drains for at most
    /// `ingest.drain_seconds`, the last commit included. Returns whether all messages in the pipeline were
    /// processed before it ended.
    pub async fn run(self, token: CancellationToken) -> Result<bool, IngestError> {
        let writer = Arc::new(Mutex::new(self.table_writer));
        // Cancelled when nothing new is started: the worker is to stop, or its source has failed.
        let draining = token.child_token();
        let offset_provider = Arc::new(TableOffsetProvider {
            table_writer: writer.clone(),
            worker_cancel: draining.clone(),
        });
        let reembed_topic = self.decoder.reembed_topic_name().map(str::to_owned);
        let topics: Vec<&str> = std::iter::once(self.source_options.topic.as_str())
            .chain(reembed_topic.as_deref())
            .collect();
        let source = Source::start(
            &self.kafka_options,
            &self.source_options,
            &topics,
            self.dead_letter_writer.topic(),
            offset_provider,
            draining.clone(),
        )?;
        self.progress.add_consumer(source.status_handle());
        let model_fingerprint = self.encoders.card().fingerprint.clone();
        let prompt_sets = self.prompt_sets.clone();
        // Cancelled when the time to drain is over: no attempt and no pause outlives it.
        let cancel_processing = CancellationToken::new();
        let _drain_timer = start_drain_timer(
            draining.clone(),
            Duration::from_secs(self.ingest_options.drain_seconds),
            cancel_processing.clone(),
        );
        let embedder = Embedder::start(
            self.encoders.clone(),
            self.prompt_sets.clone(),
            &self.ingest_options,
            self.progress.clone(),
        );
        let processor = Arc::new(MessageProcessor {
            decoder: self.decoder,
            dead_letter_writer: self.dead_letter_writer,
            fetcher: self.fetcher,
            decode_permits: new_decode_permits(
                &self.decode_options,
                self.ingest_options.decode_threads,
            ),
            decode_options: self.decode_options,
            encoders: self.encoders,
            embedder,
            prompt_sets: self.prompt_sets,
            progress: self.progress.clone(),
            processing_cancel: cancel_processing.clone(),
        });
        let sink = Sink::new(
            writer,
            &self.ingest_options,
            self.progress.clone(),
            model_fingerprint,
            prompt_sets,
            cancel_processing.clone(),
        );
        let mut pipeline =
            Pipeline::new(source, processor, sink, self.progress, self.ingest_options);
        let result = cancel_processing.run_until_cancelled(pipeline.run(&token, &draining)).await;
        // What did not drain is given up: its next owner processes it again.
        cancel_processing.cancel();
        let drained = match result {
            Some(Err(IngestError::Table(TableError::Cancelled { .. }))) | None => {
                pipeline.warn_drain_timed_out();
                Ok(false)
            }
            Some(result) => result.map(|()| pipeline.is_empty()),
        };
        let source_failure = pipeline.close().await;
        let drained = drained?;
        match source_failure {
            Some(error) => Err(error),
            None if token.is_cancelled() => Ok(drained),
            None => Err(IngestError::Internal("the consumer".into())),
        }
    }
}

/// Cancels `deadline` when `limit` has passed since `draining` was cancelled.
fn start_drain_timer(
    draining: CancellationToken,
    limit: Duration,
    deadline: CancellationToken,
) -> AbortOnDropHandle<()> {
    AbortOnDropHandle::new(tokio::spawn(async move {
        draining.cancelled().await;
        tokio::time::sleep(limit).await;
        deadline.cancel();
    }))
}
