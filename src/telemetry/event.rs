//! The log events: name, level, meaning, fields and remedy of each, declared once.
//!
//! To add an event, add an entry to the list below and run `just generate`, which writes
//! `ops/log-events.md` from it. A changed name or field needs a note in the CHANGELOG: dashboards and
//! alerts depend on them.

pub use super::event_schema::{FieldType, LogEventDefinition, LogEventField};
use super::event_schema::{count_field, flag_field, integer_field, number_field, text_field};

macro_rules! log_events {
    ($($constant:ident = $name:literal, [$($level:literal),+], $meaning:literal, $remedy:literal, [$($field:expr),* $(,)?];)*) => {
        $(#[doc = concat!("`", $name, "`: ", $meaning)] pub const $constant: &str = $name;)*
        /// Every event, in the order of `ops/log-events.md`.
        pub const EVENT_DEFINITIONS: &[LogEventDefinition] = &[$(LogEventDefinition {
            name: $name,
            levels: &[$($level),+],
            meaning: $meaning,
            remedy: $remedy,
            fields: &[$($field),*],
        }),*];
    };
}

log_events! {
    LOG_SUPPRESSED = "log.suppressed", ["warn"],
        "Lines of an event were not written because too many came (`log.burst`).",
        "Look at the event that is named; `bsap_log_events_total` counts all of its lines.",
        [
            text_field("suppressed_event", "the event, or the target of a library"),
            count_field("count", "of suppressed lines"),
            count_field("window_seconds", "length of the window in which they came"),
        ];
    OTLP_FAILED = "otlp.failed", ["warn"],
        "The OpenTelemetry collector did not accept traces or metrics; they are dropped, and the process works on.",
        "Check `otlp.endpoint`; `bsap_otlp_dropped_total` counts what is lost.",
        [
            text_field("signal", "`traces` or `metrics`"),
            count_field("count", "of spans or requests"),
            text_field("error", ""),
        ];
    START = "start", ["info"],
        "A worker or query worker has started.",
        "Compare `model_fingerprint` between workers when they disagree.",
        [
            text_field("role", "`worker` or `query worker`"),
            text_field("version", "of the program"),
            text_field("model_name", ""),
            text_field("model_fingerprint", ""),
            text_field("generation", "that is filled or served"),
            text_field("table", "address of the catalogue"),
            text_field("limits", "limits in effect, `option=value` each"),
        ];
    METRICS_UNAVAILABLE = "metrics.unavailable", ["warn"],
        "The process cannot listen on `metrics.listen`; it works on without metrics and probes.",
        "Give each process of a machine a `metrics.listen` of its own, or set `metrics.enabled = false`.",
        [text_field("error", "")];
    STOP = "stop", ["info"],
        "A worker or query worker has stopped.",
        "If `drained` is false, messages in the pipeline were dropped; the next owner of their partitions processes them again.",
        [
            text_field("role", "`worker` or `query worker`"),
            flag_field("drained", "whether every message in the pipeline was processed and stored"),
        ];
    DRAIN_TIMED_OUT = "drain.timed_out", ["warn"],
        "At shutdown, messages took longer than `ingest.drain_seconds` and were dropped from the pipeline.",
        "None: the next owner of their partitions processes them again. If it happens often, look at what is slow (`retry`).",
        [count_field("remaining", "messages that were dropped")];
    FATAL = "fatal", ["error"],
        "The process ends because of an error.",
        "The message says what to change.",
        [text_field("error", "")];
    PANIC = "panic", ["error"],
        "A part of the program failed in a way that it should not. What it was working on is given up, as the next lines say: a file that a decoder fails at is dead-lettered, a request is answered with 500.",
        "Report it with the file that caused it; the process works on.",
        [
            text_field("error", ""),
            text_field("location", "in the source").optional(),
        ];
    HEARTBEAT = "heartbeat", ["info"],
        "The worker is alive; logged every `ingest.heartbeat_seconds`.",
        "No heartbeat for two minutes: the worker hangs or has ended; restart it, nothing is lost. `poll_age_ms` above some seconds: the thread of the consumer hangs. `assigned_partitions` is 0 on one of several workers: there are more workers than partitions.",
        [
            text_field("role", "`worker`"),
            text_field("state", "as in `source.state`"),
            integer_field("poll_age_ms", "since Kafka was last polled").optional(),
            count_field("assigned_partitions", "partitions assigned to this worker"),
            count_field("in_flight_messages", "messages in the pipeline"),
            count_field("pending_rows", "rows that wait for the next commit"),
            flag_field("committing", "whether a commit is running"),
        ];
    LAG = "lag", ["info"],
        "How far the worker is behind; logged with each `heartbeat`.",
        "If `lag_messages` only grows: add workers, or partitions if each worker has only one; `commit.succeeded` says which stage takes longest. If `end_offsets_known` stays false, Kafka does not report the ends of the partitions: look at `source.error`.",
        [
            text_field("state", "as in `source.state`"),
            flag_field("end_offsets_known", "whether partitions are assigned and consumed, and the ends of all of them are known"),
            integer_field("lag_messages", "messages that are not stored yet").optional(),
            integer_field("unread_messages", "messages that are not read yet: `lag_messages` less those in the pipeline").optional(),
            integer_field("event_age_ms", "of the oldest event in the last commit; missing: not known").optional(),
        ];
    COMMIT_SUCCEEDED = "commit.succeeded", ["info"],
        "Rows and positions are stored in one commit.",
        "None. If it stops while events arrive, see `source.error` and `commit.conflict`. `fetch_ms`, `decode_ms` and `embed_ms` are sums over the images, which are processed concurrently: the largest is the bottleneck. If the worker lags and `model_wait_ms` is nearly the time between commits, the model is not the bottleneck.",
        [
            count_field("table_version", ""),
            text_field("positions", "`topic[partition]@next`, separated by spaces"),
            text_field("model_fingerprint", ""),
            text_field("prompt_set", "the first; statistics of others are stored too").optional(),
            count_field("rows", "stored"),
            count_field("bytes", "of the files written"),
            count_field("succeeded", "events whose image was embedded or deleted"),
            count_field("deleted", "of them, deletes"),
            count_field("dead_lettered", "messages that were dead-lettered"),
            count_field("not_found", "images that no longer existed"),
            count_field("image_bytes", "fetched"),
            count_field("fetch_ms", ""),
            count_field("decode_ms", ""),
            count_field("embed_ms", ""),
            count_field("model_ms", "that the image encoder computed since the last commit"),
            count_field("model_wait_ms", "that the image encoder waited for images since the last commit"),
            count_field("fenced_partitions", "partitions whose rows were dropped because another worker had stored them"),
            count_field("commit_ms", ""),
            integer_field("event_age_ms", "of the oldest event; below 0: clocks differ; missing: not known").optional(),
            text_field("trace_ids", "from the `traceparent` of the messages, the first 32, separated by spaces").optional(),
        ];
    BUCKETS_SHARE_IDS = "source.buckets_share_ids", ["error"],
        "Notifications of several buckets come from the topic, but `source.image_id_template` lacks `{bucket}`: objects with one key in two buckets become one image, of which the newer event wins.",
        "Put `{bucket}` into `source.image_id_template` and ingest into a new catalogue, or give each bucket a topic and a catalogue of its own. If the buckets have no key in common, nothing is wrong.",
        [
            text_field("first_bucket", "that this worker saw"),
            text_field("bucket", "another one; logged once for each"),
        ];
    DEAD_LETTER = "dead_letter", ["warn"],
        "A message can never be used and was dead-lettered, unchanged, or without its value if that is too large for the topic.",
        "Run `bsap dead-letters show <partition>@<offset>`; fix the cause, then run `bsap dead-letters replay` with a filter, or with `--all`.",
        [
            text_field("partition", "`topic[partition]`"),
            integer_field("offset", ""),
            text_field("stage", "`decode_event`, `fetch` or `decode_image`"),
            text_field("code", "of the error"),
            text_field("reason", ""),
            count_field("omitted_bytes", "of the value, if it was too large for the dead-letter topic").optional(),
            text_field("trace_id", "from the `traceparent` of the message").optional(),
        ];
    MODEL_FAILED = "model.failed", ["error"],
        "The device of the model failed to compute: a GPU is lost or out of memory. A worker ends, so that it opens the device again when it is restarted, and loses nothing; a query worker answers queries that need no model, and after three consecutive failures its probe `/livez` asks for a restart.",
        "Look at the device (`nvidia-smi`, the log of the kernel); use another machine, or `model.device = \"cpu\"`, until it is fixed. Out of memory: lower `ingest.batch_images`.",
        [
            text_field("device", "`cpu` or `cuda`"),
            count_field("consecutive_failures", "since a computation last succeeded"),
            text_field("error", ""),
        ];
    IMAGE_NOT_FOUND = "image.not_found", ["info"],
        "The image no longer existed when it was fetched. No row is written.",
        "None, if a delete follows in the topic.",
        [
            text_field("partition", "`topic[partition]`"),
            integer_field("offset", ""),
            text_field("image_id", ""),
            text_field("uri", ""),
            text_field("trace_id", "from the `traceparent` of the message").optional(),
        ];
    RETRY = "retry", ["debug", "info"],
        "An operation failed with a transient error and is tried again.",
        "If there are many in succession: look at the store or host that is named.",
        [
            text_field("stage", "of the operation"),
            count_field("attempt", ""),
            text_field("error", ""),
        ];
    REBALANCE = "rebalance", ["info"],
        "Partitions were assigned to this worker, or revoked from it.",
        "Constant rebalancing: a worker restarts or is too slow; look for `start`.",
        [
            text_field("change", "`assigned` or `revoked`"),
            text_field("partitions", ""),
            flag_field("drained", "only if revoked: whether their messages were processed and stored first").optional(),
        ];
    SOURCE_ERROR = "source.error", ["warn", "debug"],
        "Kafka reported an error; consuming goes on.",
        "Check that the brokers are reachable.",
        [
            text_field("error", ""),
            flag_field("pause", "only if pausing (true) or resuming (false) the consumer failed").optional(),
        ];
    SOURCE_FAILED = "source.failed", ["error"],
        "Consuming cannot go on; the worker stops.",
        "The message says what to change.",
        [text_field("error", "").optional()];
    SOURCE_STATE = "source.state", ["info", "warn"],
        "It changed whether the worker can consume messages, and otherwise why not: `consuming`, `starting`, `no_partitions_assigned`, `dead_letter_topic_missing`, `topic_missing`, `not_authorised`, `authentication_failed`, `brokers_unreachable`.",
        "`detail` says what to change. Nothing is lost within the topic's retention; the worker goes on by itself.",
        [
            text_field("state", ""),
            text_field("previous_state", ""),
            text_field("detail", ""),
        ];
    SOURCE_LOG_REPLACED = "source.log_replaced", ["error"],
        "The log of a partition is not the one that was consumed: its topic was deleted and created again, restored from a backup, or has lost its end. The new log is consumed from its beginning; what was stored before stays.",
        "Messages of the old log that were not stored yet are lost: run `bsap reconcile --repair`, which publishes events for them. If the topic was created again on purpose and was consumed to its end, nothing.",
        [
            text_field("partition", "`topic[partition]`"),
            count_field("log_number", "of the new log, counted from 0"),
            integer_field("stored_offset", "the next one to be consumed of the old log").optional(),
            integer_field("earliest_offset", "the first one of the new log"),
            integer_field("end_offset", "of the new log"),
            integer_field("replayed_messages", "of the new log, which are consumed now"),
            integer_field("lost_messages", "of the old log that were not stored; missing: not known").optional(),
            text_field("reason", "how the log was recognised as another one"),
        ];
    SOURCE_DATA_LOSS = "source.data_loss", ["error"],
        "The retention of Kafka, or `kafka-delete-records`, removed messages that were never processed.",
        "Run `bsap reconcile --repair`, which publishes events for what was lost; give the topic a longer retention.",
        [
            text_field("partition", "`topic[partition]`"),
            integer_field("requested_offset", "the next one to be consumed"),
            integer_field("earliest_offset", "the first one that still exists"),
            integer_field("lost_messages", ""),
        ];
    COMMIT_CONFLICT = "commit.conflict", ["info"],
        "Another writer committed first; the commit is tried again.",
        "None, unless attempts run out.",
        [count_field("attempt", ""), text_field("reason", "")];
    COMMIT_FENCED = "commit.fenced", ["warn"],
        "Another worker has consumed this partition; these rows were dropped because they are stored already.",
        "None; it happens at a rebalance.",
        [
            text_field("partition", "`topic[partition]`"),
            integer_field("stored_offset", "the next one according to the table"),
            integer_field("expected_offset", "the one that this commit continues").optional(),
            integer_field("next_offset", "the one that this commit would have stored"),
        ];
    COMPACTION = "compaction", ["info"],
        "Small files of the table were merged, and superseded rows dropped.",
        "None. `conflicts` counts merges that were abandoned because another compactor was first.",
        [
            count_field("jobs", "merges that were committed"),
            count_field("conflicts", "merges that were abandoned"),
            count_field("files_in", ""),
            count_field("files_out", ""),
            count_field("bytes_in", ""),
            count_field("bytes_out", ""),
            count_field("superseded_rows", "that were dropped"),
            count_field("tombstones", "that were dropped"),
            count_field("merged_statistics", "backfilled statistics that are in the rows now"),
            count_field("duration_ms", ""),
        ];
    VACUUM = "vacuum", ["info"],
        "Files that are no longer part of the table were removed.",
        "None.",
        [count_field("files", "data files"), count_field("log_files", "files of the log")];
    GENERATION_REMOVED = "generation.removed", ["info"],
        "The table of a generation that was neither live nor standby was removed (`bsap vacuum --generations`).",
        "None.",
        [text_field("generation", ""), count_field("objects", ""), count_field("bytes", "")];
    FILE_DROPPED = "file.dropped", ["warn"],
        "A data file that was missing or damaged was removed from the table (`bsap compact --drop-damaged`).",
        "Run `bsap reconcile --repair`: the rows of the file are no longer stored.",
        [text_field("file", "its name")];
    MAINTENANCE_FAILED = "maintenance.failed", ["warn"],
        "Maintenance of the table failed; it is tried again after `maintenance.interval_seconds`. Ingestion goes on.",
        "If it persists, the number of files grows (`bsap status`) and commits become slower. The message says what failed.",
        [text_field("error", "")];
    TABLE_REFRESHED = "table.refreshed", ["info", "debug"],
        "The query worker loaded a commit.",
        "None.",
        [
            count_field("table_version", ""),
            count_field("rows", "of the commit"),
            count_field("images", "that are served now"),
            number_field("duration_ms", ""),
        ];
    TABLE_REFRESH_FAILED = "table.refresh_failed", ["error", "warn"],
        "The query worker cannot read the table; it serves what it has loaded and tries again.",
        "The message names the file or the store.",
        [text_field("error", ""), count_field("attempt", "").optional()];
    SNAPSHOT_READY = "snapshot.ready", ["info"],
        "The query worker has read the whole table and is ready.",
        "None.",
        [
            count_field("table_version", ""),
            count_field("images", ""),
            number_field("duration_ms", ""),
        ];
    SNAPSHOT_MEMORY_EXCEEDED = "snapshot.memory_exceeded", ["error"],
        "The catalogue needs more memory than `search.memory_mib` allows. At the start the query worker ends; later it serves what it has loaded and loads no further commits.",
        "Raise `search.memory_mib`, give the machine more memory, or serve fewer images or prompt sets; then restart it.",
        [
            text_field("error", "with the figures"),
            count_field("table_version", "the first that does not fit"),
        ];
    SEARCH = "search", ["info"],
        "A query was answered.",
        "None. If `reranked` is near `results` for most queries, balancing changes every ranking: evaluate it on your own queries, or lower the weight by a candidate (`bsap candidate set`).",
        [
            text_field("query_hash", "the same text has the same hash"),
            text_field("query", "only if `log.query_text` is set").optional(),
            text_field("input", "kind of the query: text, texts, image_id, image or vector"),
            text_field("trace_id", "from the `traceparent` of the request").optional(),
            text_field("parent_id", "span of the caller, from there too").optional(),
            text_field("api_key_name", "").optional(),
            text_field("configuration", "name of the one that answered"),
            flag_field("overrides", "whether the request chose prompt set, normaliser, weight or λ itself"),
            text_field("normaliser", ""),
            number_field("weight", ""),
            count_field("k", ""),
            count_field("offset", "number of results on earlier pages"),
            flag_field("filtered", "whether the request has a filter"),
            count_field("scanned", "images"),
            count_field("matched", "images that match the filter"),
            number_field("top_score", "best balanced score").optional(),
            number_field("top_raw_score", "best score of plain CLIP").optional(),
            flag_field("no_match", "whether the best hit is no better than those of unrelated texts; missing: not calibrated").optional(),
            count_field("reranked", "results whose rank is not that of plain CLIP"),
            count_field("results", "of this page"),
            flag_field("top_hit_changed", "whether the first result of plain CLIP is another one").optional(),
            number_field("embed_ms", "embedding the query"),
            number_field("wait_ms", "waiting for a scan of the catalogue"),
            number_field("scan_ms", "the scan, which other queries may share"),
            number_field("rank_ms", "exact scores and ranks"),
            count_field("table_version", ""),
        ];
    RERANK = "rerank", ["info"],
        "Candidates that a caller has found elsewhere were ranked.",
        "None. If `unknown` is not 0 for long: the caller's index has images that the catalogue lacks (`bsap import`, or their events).",
        [
            text_field("query_hash", "the same text has the same hash"),
            text_field("query", "only if `log.query_text` is set").optional(),
            text_field("input", "kind of the query: text, texts, image_id, image or vector"),
            text_field("trace_id", "from the `traceparent` of the request").optional(),
            text_field("parent_id", "span of the caller, from there too").optional(),
            text_field("api_key_name", "").optional(),
            text_field("configuration", "name of the one that answered"),
            flag_field("overrides", "whether the request chose prompt set, normaliser, weight or λ itself"),
            text_field("normaliser", ""),
            number_field("weight", ""),
            count_field("ranked", "candidates"),
            count_field("known", "of them in the catalogue"),
            count_field("unknown", "candidates without an embedding that are not in the catalogue"),
            count_field("reranked", "candidates whose rank is not that of plain CLIP"),
            flag_field("top_hit_changed", "whether the first of plain CLIP is another one").optional(),
            number_field("embed_ms", "embedding the query"),
            number_field("rank_ms", "scores and ranks"),
            count_field("table_version", ""),
        ];
    FEEDBACK = "feedback", ["info"],
        "A user judged whether a result is right; the verdict is stored.",
        "None. If there are many `wrong` ones at once: evaluate them (`bsap evaluate --feedback`).",
        [
            text_field("verdict", "`right` or `wrong`"),
            text_field("image_id", ""),
            text_field("configuration", "name of the one that answered").optional(),
            text_field("api_key_name", "").optional(),
        ];
    FEEDBACK_FAILED = "feedback.failed", ["warn"],
        "Feedback could not be stored; the response to its sender said so.",
        "Look at the store that is named.",
        [text_field("verdict", "`right` or `wrong`"), text_field("error", "")];
    BALANCE_DRIFT = "balance.drift", ["info"],
        "How much balancing changes answers, every `search.drift_interval_seconds`: over the last 2,000 answers of the live configuration to texts without a filter, at most an hour old, each query once; fields that end in `_baseline` are the values at calibration.",
        "If `calibrated` is false, there is nothing to compare with; `bsap evaluate --calibrate live --store` stores a baseline. Otherwise see the runbook pages BsapStatisticsDrift, BsapTopHitsChanged, BsapNothingMatches and BsapHubness.",
        [
            text_field("configuration", "name of the live one"),
            count_field("revision", "of the catalogue state"),
            flag_field("calibrated", "whether there is a baseline"),
            count_field("images", "that are served"),
            count_field("queries", "different ones in the window"),
            number_field("top_hit_changed", "share of them whose first hit is not that of plain CLIP").optional(),
            number_field("top_hit_changed_baseline", "").optional(),
            number_field("no_match", "share of them that nothing matches").optional(),
            number_field("no_match_baseline", "").optional(),
            number_field("hubness", "skewness of how often an image is first").optional(),
            number_field("hubness_raw", "the same for plain CLIP").optional(),
            number_field("hubness_ratio", "`hubness` over `hubness_raw`").optional(),
            number_field("hubness_ratio_baseline", "").optional(),
            number_field("mean", "mean of the mean auxiliary scores of the images").optional(),
            number_field("mean_baseline", "").optional(),
            number_field("std", "mean of the standard deviations of the auxiliary scores of the images").optional(),
            number_field("std_baseline", "").optional(),
            number_field("drift", "`mean` less `mean_baseline`, in standard deviations of the means of the images at calibration").optional(),
        ];
    BALANCE_FIT = "balance.fit", ["info"],
        "How well the prompt set of the live configuration or of the candidate fits the last 512 distinct text queries, at most a day old, every `search.fit_interval_seconds`; measured without judgements.",
        "If `weight` is above `proposed_weight`, `reason` says why; see the runbook page BsapLowFit. Without `fit` there were fewer than 64 queries.",
        [
            text_field("configuration", "its name"),
            text_field("role", "`live` or `candidate`"),
            count_field("revision", "of the catalogue state"),
            text_field("prompt_set", "its key"),
            count_field("texts", "of the prompt set"),
            count_field("images", "that were measured, at most 10,000; 0: too few queries"),
            count_field("queries", "different ones in the window"),
            number_field("fit", "correlation of the corrections by the prompt set with those by the queries").optional(),
            number_field("fit_low", "lower bound of its 95 % interval").optional(),
            number_field("fit_high", "upper bound").optional(),
            number_field("concentration", "of the corrections of first images, in standard deviations").optional(),
            number_field("weight", "that is served; 0 is plain CLIP"),
            number_field("proposed_weight", "by fit, concentration and size"),
            text_field("reason", "of the proposal"),
        ];
    SEARCH_SLOW = "search.slow", ["warn"],
        "A query took longer than `search.slow_ms`.",
        "The largest part says why. `embed_ms`: the text encoder waits for cores. `wait_ms`: there are more concurrent queries than scans can serve. `scan_ms` and `rank_ms`: the catalogue is large for this machine. For all of these add cores or query workers.",
        [
            text_field("query_hash", ""),
            text_field("trace_id", "").optional(),
            number_field("duration_ms", "in total"),
            number_field("embed_ms", ""),
            number_field("wait_ms", ""),
            number_field("scan_ms", ""),
            number_field("rank_ms", ""),
            count_field("scanned", "images"),
            count_field("limit_ms", "`search.slow_ms`"),
        ];
    REQUEST_REJECTED = "request.rejected", ["warn"],
        "A request was rejected because too many are in flight.",
        "Add query workers, or raise `http.max_concurrent_requests`.",
        [count_field("limit", "of concurrent requests")];
    ACCESS_DENIED = "access.denied", ["warn"],
        "A request was denied: its API key is not accepted (`invalid_api_key`) or lacks the scope (`insufficient_scope`), a browser sent it from another site (`cross_site`), or it names a host other than this machine although no key is required (`host_not_allowed`).",
        "If a key that was replaced or revoked is still used: give its users the new one. If many come from outside: somebody is trying; keys cannot be guessed, but close the port to them.",
        [text_field("code", "of the answer")];
    HTTP_ERROR = "http.error", ["error"],
        "A request failed through no fault of the caller.",
        "The message says what failed.",
        [text_field("code", "of the answer"), text_field("error", "")];
    PROMPTS_UNSUPPORTED_SCRIPT = "prompts.unsupported_script", ["warn"],
        "A prompt set is in a script that the vocabulary of the model does not have; its statistics mean nothing.",
        "Use a multilingual model, or another set in `prompts.sets`.",
        [text_field("prompt_set", ""), text_field("warning", "")];
    PUBLISH = "publish", ["info"],
        "Events were published.",
        "None.",
        [count_field("published", ""), count_field("skipped", "")];
    LISTING_OBJECT_SKIPPED = "listing.object_skipped", ["warn"],
        "`bsap publish` or `bsap reconcile` left out an image of a bucket or folder, because its key cannot be written as an address or is no image id.",
        "Rename the object, or announce it with an id of its own (`bsap publish --jsonl`).",
        [
            text_field("listing_target", "bucket, prefix or folder"),
            text_field("key", "with its control characters escaped"),
            text_field("reason", ""),
        ];
    STATE_APPLIED = "state.applied", ["info"],
        "A worker applied a change of the catalogue state: new images are measured with these prompt sets.",
        "None.",
        [
            count_field("revision", "of the catalogue state"),
            text_field("prompt_sets", "their keys"),
        ];
    STATE_FAILED = "state.failed", ["warn"],
        "The catalogue state could not be read or applied; the previous one stays in effect, and the next poll tries again.",
        "If it persists: the message names the store, or what does not fit.",
        [text_field("error", "")];
    REINDEX_PROGRESS = "reindex.progress", ["info"],
        "Statistics of stored rows are computed for a prompt set; logged at the start, every 10 s, and at the end.",
        "None.",
        [
            text_field("phase", "`started`, `running` or `done`"),
            text_field("prompt_set", "its key"),
            count_field("rows", "of the table"),
            count_field("covered_rows", "of them, those that have the statistics"),
            count_field("pending_files", "files that are not measured yet"),
            count_field("measured_rows", "by this process"),
            number_field("elapsed_seconds", "since it started"),
        ];
    CONFIGURATION_APPLIED = "configuration.applied", ["info"],
        "A query worker serves the configuration of a new revision of the catalogue state.",
        "None.",
        [
            count_field("revision", "of the catalogue state"),
            text_field("generation", ""),
            text_field("configuration", "name of the live one"),
            text_field("prompt_sets", "their keys"),
            count_field("duration_ms", "of preparing it"),
        ];
    CANDIDATE_CHANGED = "candidate.changed", ["info"],
        "A candidate was set or withdrawn.",
        "None.",
        [
            text_field("change", "`set` or `withdrawn`"),
            text_field("name", ""),
            count_field("revision", "of the catalogue state"),
            text_field("actor", "who"),
        ];
    SHADOW_COMPARED = "shadow.compared", ["info"],
        "A query that the live configuration answered was computed by the candidate too; its results were compared and not shown.",
        "None: evaluate them before `bsap promote` (`bsap evaluate --from-logs`).",
        [
            text_field("query_hash", "that of `search`"),
            text_field("configuration", "name of the one that answered"),
            text_field("candidate", "its name"),
            count_field("k", ""),
            number_field("overlap", "share of common results, 0 to 1"),
            count_field("reranked", "common results with another rank"),
            flag_field("top_hit_changed", "whether the first result is another one"),
            count_field("table_version", ""),
        ];
    PROMOTE = "promote", ["info"],
        "The candidate became live.",
        "To undo it, run `bsap rollback`.",
        [
            text_field("name", "of the configuration"),
            count_field("previous_revision", "that was live before"),
            count_field("revision", "of the catalogue state"),
            text_field("generation", "that is live now"),
            text_field("actor", "who"),
        ];
    ROLLBACK = "rollback", ["info"],
        "The configuration before the last promotion is live again.",
        "None.",
        [
            count_field("restored_revision", "that is served again"),
            text_field("name", "of the configuration"),
            count_field("revision", "of the catalogue state"),
            text_field("generation", "that is live now"),
            text_field("actor", "who"),
        ];
    CONTROL_ACCEPTED = "control.accepted", ["info"],
        "A request of the control topic was accepted and is carried out.",
        "None.",
        [
            text_field("request", ""),
            text_field("prompt_set", "its key"),
            text_field("requested_by", ""),
        ];
    CONTROL_REJECTED = "control.rejected", ["error"],
        "A request of the control topic is invalid or cannot be carried out, and was skipped.",
        "The message says what is wrong; send it again corrected.",
        [text_field("error", "")];
    CONTROL_FAILED = "control.failed", ["warn"],
        "The control topic cannot be read; ingestion goes on.",
        "Check that `source.control_topic` exists.",
        [text_field("error", "")];
    RECONCILE = "reconcile", ["info"],
        "The table was compared with a listing.",
        "If `new`, `changed` or `removed` is above 0, events were lost: run `bsap reconcile --repair`, then look for the cause.",
        [
            text_field("listing_target", ""),
            count_field("listed", ""),
            count_field("stored", "images of this target"),
            count_field("unchanged", ""),
            count_field("too_recent", "changed too recently to be compared"),
            count_field("new", ""),
            count_field("changed", ""),
            count_field("removed", ""),
            count_field("unrepairable", "differences that no event can repair"),
            count_field("deleted", "by an event after their last change"),
            count_field("id_conflicts", "whose id belongs to an image from elsewhere"),
            count_field("ignored", "whose names are not those of pictures"),
            count_field("unaddressable", "new ones that cannot be announced because of their keys"),
            number_field("duration_ms", ""),
        ];
}

/// Returns the declaration of the event `name`.
pub fn find_log_event_definition(name: &str) -> Option<&'static LogEventDefinition> {
    EVENT_DEFINITIONS.iter().find(|event| event.name == name)
}
