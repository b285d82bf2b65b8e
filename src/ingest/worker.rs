//! A worker: its parts, and how they are put together.

use std::sync::Arc;

use async_trait::async_trait;
use tokio::sync::Mutex;
use tokio_util::sync::CancellationToken;

use super::dead_letter::DeadLetterWriter;
use super::decode::DecodeOptions;
use super::embed::Embedder;
use super::error::IngestError;
use super::fetch::Fetcher;
use super::message_processor::{MessageProcessor, new_decode_memory_budget, new_decode_permits};
use super::options::IngestOptions;
use super::pipeline::Pipeline;
use super::progress::Progress;
use super::sink::Sink;
use super::source::{Decoder, OffsetProvider, Source, SourceOptions};
use crate::clip::Encoders;
use crate::kafka;
use crate::prompts::ActivePromptSets;
use crate::record::TopicPartition;
use crate::table::TableWriter;

/// A worker before it is started: its options, clients, model and table.
pub struct Worker {
    /// Connection to Kafka.
    pub kafka: kafka::KafkaOptions,
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
    pub writer: TableWriter,
    /// Batch sizes and limits.
    pub options: IngestOptions,
    /// Counters and health, shared with metrics.
    pub progress: Arc<Progress>,
}

/// Resumes partitions from the positions in the table.
struct TableOffsetProvider(Arc<Mutex<TableWriter>>);

#[async_trait]
impl OffsetProvider for TableOffsetProvider {
    async fn next_offset(&self, partition: &TopicPartition) -> Result<Option<i64>, String> {
        let mut writer = self.0.lock().await;
        writer.read_position(partition).await.map_err(|e| e.to_string())
    }
}

impl Worker {
    /// Runs until `token` is cancelled or a permanent error occurs. Returns whether all messages in the
    /// pipeline were processed before it ended.
    pub async fn run(self, token: CancellationToken) -> Result<bool, IngestError> {
        let writer = Arc::new(Mutex::new(self.writer));
        let offset_provider = Arc::new(TableOffsetProvider(writer.clone()));
        let reembed_topic = self.decoder.reembed_topic().map(str::to_owned);
        let topics: Vec<&str> = std::iter::once(self.source_options.topic.as_str())
            .chain(reembed_topic.as_deref())
            .collect();
        let source = Source::start(
            &self.kafka,
            &self.source_options,
            &topics,
            offset_provider,
            token.clone(),
        )?;
        self.progress.add_consumer(source.handle());
        let model_fingerprint = self.encoders.card().fingerprint.clone();
        let prompt_sets = self.prompt_sets.clone();
        let cancel_processing = CancellationToken::new();
        let embedder = Embedder::start(
            self.encoders.clone(),
            self.prompt_sets,
            &self.options,
            self.progress.clone(),
        );
        let processor = Arc::new(MessageProcessor {
            decoder: self.decoder,
            dead_letter_writer: self.dead_letter_writer,
            fetcher: self.fetcher,
            decode_permits: new_decode_permits(self.options.decode_threads),
            decode_memory_budget: new_decode_memory_budget(&self.decode_options),
            decode_options: self.decode_options,
            encoders: self.encoders,
            embedder,
            progress: self.progress.clone(),
            cancel: cancel_processing.clone(),
        });
        let sink =
            Sink::new(writer, &self.options, self.progress.clone(), model_fingerprint, prompt_sets);
        let mut pipeline = Pipeline::new(source, processor, sink, self.progress, self.options);
        let result = pipeline.run(&token).await;
        // What did not drain is given up: its next owner processes it again.
        cancel_processing.cancel();
        let drained = pipeline.close().await;
        result.map(|()| drained)
    }
}
