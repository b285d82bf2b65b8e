//! The log events: name, level, meaning, fields and remedy of each, declared once.
//!
//! To add an event, add an entry to the list below and run `just generate`, which writes
//! `ops/log-events.md` from it. A name or a field is not changed without a note in the CHANGELOG:
//! dashboards and alerts are built on them.

use std::fmt::Write as _;

use serde_json::{Map, Value};

/// What the value of a field is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FieldType {
    /// Text.
    Text,
    /// A whole number, 0 or more.
    Count,
    /// A whole number, which may lie below 0.
    Integer,
    /// A number.
    Number,
    /// `true` or `false`.
    Flag,
}

impl FieldType {
    fn name(self) -> &'static str {
        match self {
            Self::Text => "text",
            Self::Count => "count",
            Self::Integer => "integer",
            Self::Number => "number",
            Self::Flag => "flag",
        }
    }

    fn matches(self, value: &Value) -> bool {
        match self {
            Self::Text => value.is_string(),
            Self::Count => value.is_u64(),
            Self::Integer => value.is_i64() || value.is_u64(),
            Self::Number => value.is_number(),
            Self::Flag => value.is_boolean(),
        }
    }
}

/// A field of an event. A name that ends in `_ms` is in milliseconds, in `_seconds` in seconds, one
/// with `bytes` in bytes.
#[derive(Debug, Clone, Copy)]
pub struct EventField {
    /// Its name.
    pub name: &'static str,
    /// What its value is.
    pub field_type: FieldType,
    /// What it says; empty where the name says it all.
    pub description: &'static str,
    /// Whether it may be missing.
    pub optional: bool,
}

impl EventField {
    /// It is missing where it is not known.
    const fn optional(self) -> Self {
        Self { optional: true, ..self }
    }
}

const fn new_field(name: &'static str, kind: FieldType, about: &'static str) -> EventField {
    EventField { name, field_type: kind, description: about, optional: false }
}

const fn text_field(name: &'static str, about: &'static str) -> EventField {
    new_field(name, FieldType::Text, about)
}

const fn count_field(name: &'static str, about: &'static str) -> EventField {
    new_field(name, FieldType::Count, about)
}

const fn integer_field(name: &'static str, about: &'static str) -> EventField {
    new_field(name, FieldType::Integer, about)
}

const fn number_field(name: &'static str, about: &'static str) -> EventField {
    new_field(name, FieldType::Number, about)
}

const fn flag_field(name: &'static str, about: &'static str) -> EventField {
    new_field(name, FieldType::Flag, about)
}

/// What is known of an event.
#[derive(Debug, Clone, Copy)]
pub struct EventDefinition {
    /// Its name, the value of the field `event`.
    pub name: &'static str,
    /// The levels that it is logged at, as `tracing` writes them in lower case.
    pub levels: &'static [&'static str],
    /// What it means.
    pub meaning: &'static str,
    /// What to do about it.
    pub remedy: &'static str,
    /// Its own fields, beside those that every line has.
    pub fields: &'static [EventField],
}

/// Fields that every line has or may have.
pub const COMMON_FIELDS: &[EventField] = &[
    text_field("timestamp", "RFC 3339, UTC"),
    text_field("level", "`ERROR`, `WARN`, `INFO`, `DEBUG`"),
    text_field("event", "one of the names below"),
    text_field("message", "for people; not part of the interface"),
    text_field("target", "the module, which begins with `bsap`"),
];

macro_rules! catalogue {
    ($($constant:ident = $name:literal, [$($level:literal),+], $meaning:literal, $remedy:literal, [$($field:expr),* $(,)?];)*) => {
        $(#[doc = concat!("`", $name, "`: ", $meaning)] pub const $constant: &str = $name;)*
        /// Every event, in the order of `ops/log-events.md`.
        pub const EVENT_DEFINITIONS: &[EventDefinition] = &[$(EventDefinition {
            name: $name,
            levels: &[$($level),+],
            meaning: $meaning,
            remedy: $remedy,
            fields: &[$($field),*],
        }),*];
    };
}

catalogue! {
    LOG_SUPPRESSED = "log.suppressed", ["warn"],
        "So many lines of an event were not written because too many came (`log.burst`).",
        "Look at the event that is named; `bsap_log_events_total` counts all of its lines.",
        [text_field("suppressed_event", "the event, or the target of a library"), count_field("count", ""), count_field("window_seconds", "in which they came")];
    OTLP_FAILED = "otlp.failed", ["warn"],
        "The OpenTelemetry collector did not take traces or metrics; they are dropped, the process works on.",
        "Check `otlp.endpoint`; `bsap_otlp_dropped_total` counts what is lost.",
        [text_field("signal", "`traces` or `metrics`"), count_field("count", "spans or requests"), text_field("error", "")];
    START = "start", ["info"],
        "A worker or query worker has started.",
        "Compare `fingerprint` between workers when they disagree.",
        [text_field("role", "`worker` or `query worker`"), text_field("version", "of the program"), text_field("model_name", ""), text_field("model_fingerprint", "of the model"), text_field("generation", "that is filled or served"), text_field("table", "where the catalogue is"), text_field("limits", "bounds that hold, `option=value` each")];
    METRICS_UNAVAILABLE = "metrics.unavailable", ["warn"],
        "`metrics.listen` cannot be listened on; the process works on without metrics and probes.",
        "Give each process of a machine a `metrics.listen` of its own, or set `metrics.enabled = false`.",
        [text_field("error", "")];
    STOP = "stop", ["info"],
        "It has stopped.",
        "`drained = false`: work was cut off; it is done again by the next owner.",
        [text_field("role", ""), flag_field("drained", "everything that was taken up is settled")];
    DRAIN_TIMED_OUT = "drain.timed_out", ["warn"],
        "At shutdown, messages or the last commit took longer than `ingest.drain_seconds` and were cut off.",
        "None: the next owner processes them again. If it stays, look at what is slow (`retry`).",
        [count_field("remaining", "messages")];
    FATAL = "fatal", ["error"],
        "The process ends because of an error.",
        "The message says what to change.",
        [text_field("error", "")];
    HEARTBEAT = "heartbeat", ["info"],
        "The worker is alive; every `ingest.heartbeat_seconds`.",
        "No heartbeat for two minutes: the worker hangs or is gone; restart it, nothing is lost. `poll_age_ms` above some seconds: the consumer's thread hangs. `partitions` = 0 on one of several workers: there are more workers than partitions.",
        [text_field("role", ""), integer_field("poll_age_ms", "since Kafka was last polled").optional(), count_field("assigned_partitions", "that are this worker's"), count_field("in_flight_messages", "messages in the pipeline"), count_field("pending_rows", "that wait for the next commit"), flag_field("committing", "")];
    LAG = "lag", ["info"],
        "How far the worker is behind; beside each `heartbeat`.",
        "`durable` that only grows: add workers, or partitions where each worker has one; see `commit.succeeded` for the stage that takes longest. `known = false`: Kafka has not told the ends of the logs yet; where it stays, look at `source.error`.",
        [flag_field("end_offsets_known", "whether the ends of all its partitions are known"), integer_field("lag_messages", "messages not stored yet").optional(), integer_field("unread_messages", "messages not taken up yet: `durable` less those in the pipeline").optional(), integer_field("event_age_ms", "of the oldest event in the last commit; missing: not known").optional()];
    COMMIT_SUCCEEDED = "commit.succeeded", ["info"],
        "Rows and positions are stored in one commit.",
        "None. If it stops while events arrive, see `source.error` and `commit.conflict`. `fetch_ms` to `embed_ms` are sums over the images, which are worked on at one time: the largest is the bottleneck. Where `towers_wait_ms` nears the time between commits while the worker lags, it is not the model.",
        [count_field("table_version", "of the table"), text_field("positions", "`topic[partition]@next`, separated by spaces"), text_field("model_fingerprint", "fingerprint"), text_field("prompt_set", "the first; others are stored beside it").optional(), count_field("rows", "stored"), count_field("bytes", "of the files written"), count_field("succeeded", "events embedded or deleted"), count_field("deleted", "of them, deletes"), count_field("dead_lettered", "messages put aside"), count_field("not_found", "images that were gone"), count_field("image_bytes", "fetched"), count_field("fetch_ms", ""), count_field("decode_ms", ""), count_field("embed_ms", ""), count_field("model_ms", "that the image tower computed since the last commit"), count_field("model_wait_ms", "that it waited for images"), count_field("fenced_partitions", "partitions dropped, another worker had stored them"), count_field("commit_ms", ""), integer_field("event_age_ms", "of the oldest event; below 0: clocks differ; missing: not known").optional(), text_field("trace_ids", "from the messages' `traceparent`, the first 32, separated by spaces").optional()];
    DEAD_LETTER = "dead_letter", ["warn"],
        "A message can never be used and was put aside, unchanged.",
        "`bsap dead-letters show <partition>@<offset>`; mend the cause, then `bsap dead-letters replay` with a filter, or `--all`.",
        [text_field("partition", ""), integer_field("offset", ""), text_field("stage", "`decode_event`, `fetch` or `decode_image`"), text_field("code", ""), text_field("reason", ""), text_field("trace_id", "from the message's `traceparent`").optional()];
    MODEL_FAILED = "model.failed", ["error"],
        "The device of the model did not compute: a GPU is lost or out of memory. A worker ends, so that it opens the device anew when it is started again, and loses nothing; a query worker answers what needs no model, and after three failures in a row its probe `/livez` asks for a restart.",
        "Look at the device (`nvidia-smi`, the kernel's log); another machine, or `model.device = \"cpu\"`, until it is mended. Out of memory: lower `ingest.batch_images`.",
        [text_field("device", "`cpu` or `cuda`"), count_field("consecutive_failures", "since a computation last succeeded"), text_field("error", "")];
    IMAGE_NOT_FOUND = "image.not_found", ["info"],
        "The image was gone before it could be fetched. No row is written.",
        "None, if deletes follow in the topic.",
        [text_field("partition", ""), integer_field("offset", ""), text_field("image_id", ""), text_field("uri", ""), text_field("trace_id", "from the message's `traceparent`").optional()];
    RETRY = "retry", ["debug", "info"],
        "Something that may pass failed and is tried again.",
        "Many in a row: look at the store or host that is named.",
        [text_field("stage", ""), count_field("attempt", ""), text_field("error", "")];
    REBALANCE = "rebalance", ["info"],
        "Partitions came to or left this worker.",
        "Constant rebalancing: a worker restarts or is too slow; look for `start`.",
        [text_field("change", "`assigned` or `revoked`"), text_field("partitions", ""), flag_field("drained", "where revoked").optional()];
    SOURCE_ERROR = "source.error", ["warn", "debug"],
        "Kafka reported an error; consuming goes on.",
        "Check that the brokers are reachable.",
        [text_field("error", ""), flag_field("pause", "").optional()];
    SOURCE_FAILED = "source.failed", ["error"],
        "Consuming cannot go on; the worker stops.",
        "The message says what to change.",
        [text_field("error", "").optional()];
    SOURCE_DATA_LOSS = "source.data_loss", ["error"],
        "Kafka's retention removed messages that were never processed.",
        "`bsap reconcile --repair` announces what was lost; give the topic a longer retention.",
        [text_field("partition", ""), integer_field("requested_offset", "the offset that was wanted"), integer_field("earliest_offset", "the first that is there"), integer_field("lost_messages", "")];
    COMMIT_CONFLICT = "commit.conflict", ["info"],
        "Another writer committed first, or the store failed; the commit is tried again.",
        "None, unless attempts run out.",
        [count_field("attempt", ""), text_field("reason", "")];
    COMMIT_FENCED = "commit.fenced", ["warn"],
        "Another worker has consumed this partition; these rows were dropped because they are stored already.",
        "None; it happens at a rebalance.",
        [text_field("partition", ""), integer_field("stored_offset", ""), integer_field("expected_offset", "").optional(), integer_field("next_offset", "")];
    COMPACTION = "compaction", ["info"],
        "Small files of the table were merged, superseded rows dropped.",
        "None. `lost`: merges given up because another compactor was first.",
        [count_field("jobs", ""), count_field("conflicts", ""), count_field("files_in", ""), count_field("files_out", ""), count_field("bytes_in", ""), count_field("bytes_out", ""), count_field("superseded_rows", "rows dropped"), count_field("tombstones", "dropped"), count_field("merged_statistics", "backfilled statistics that stand in the rows now"), count_field("duration_ms", "")];
    VACUUM = "vacuum", ["info"],
        "Files that are no longer part of the table were removed.",
        "None.",
        [count_field("files", ""), count_field("log_files", "")];
    GENERATION_REMOVED = "generation.removed", ["info"],
        "The table of a generation that was neither live nor beside the live one was removed (`bsap vacuum --generations`).",
        "None.",
        [text_field("generation", "the generation"), count_field("objects", ""), count_field("bytes", "")];
    FILE_DROPPED = "file.dropped", ["warn"],
        "A data file that was missing or damaged was taken out of the table (`bsap compact --drop-damaged`).",
        "Run `bsap reconcile --repair`: what it held is not stored any more.",
        [text_field("file", "its name")];
    MAINTENANCE_FAILED = "maintenance.failed", ["warn"],
        "The table was not tidied; the next turn tries again. Ingestion goes on.",
        "If it stays: the number of files grows (`bsap status`), commits become slower. The message says what failed.",
        [text_field("error", "")];
    TABLE_REFRESHED = "table.refreshed", ["info", "debug"],
        "The query worker took in a commit.",
        "None.",
        [count_field("table_version", "of the table"), count_field("rows", ""), count_field("images", "that are there now"), number_field("duration_ms", "")];
    TABLE_REFRESH_FAILED = "table.refresh_failed", ["error", "warn"],
        "The query worker cannot read the table; it serves what it has and tries again.",
        "The message names the file or the store.",
        [text_field("error", ""), count_field("attempt", "").optional()];
    SNAPSHOT_READY = "snapshot.ready", ["info"],
        "The query worker has read the whole table and is ready.",
        "None.",
        [count_field("table_version", "of the table"), count_field("images", ""), number_field("duration_ms", "")];
    SNAPSHOT_MEMORY_EXCEEDED = "snapshot.memory_exceeded", ["error"],
        "The catalogue needs more memory than `search.memory_mib` allows. At the start the query worker ends; later it serves what it has and takes nothing more in.",
        "Raise `search.memory_mib`, give the machine more memory, or serve fewer images or prompt sets; then start again.",
        [text_field("error", "with the figures"), count_field("table_version", "of the table that does not fit")];
    SEARCH = "search", ["info"],
        "A query was answered.",
        "None. `moved` near `results` on most queries: the balance changes every ranking; measure it on your own queries, or lower the weight by a candidate (`bsap candidate set`).",
        [text_field("query_hash", "the same text has the same hash"), text_field("query", "where `log.query_text` is set").optional(), text_field("input", "what was looked for: text, texts, image_id, image, vector"), text_field("trace_id", "from the request's `traceparent`").optional(), text_field("parent_id", "its span, from there too").optional(), text_field("api_key_name", "name of the API key").optional(), text_field("configuration", "the name of the one that answered"), flag_field("overrides", "whether the request said itself how it is to be answered: prompt set, normaliser, weight or λ"), text_field("normaliser", ""), number_field("weight", ""), count_field("k", ""), count_field("offset", "results on earlier pages"), flag_field("filtered", "whether there was a filter"), count_field("scanned", ""), count_field("matched", ""), number_field("top_score", "best balanced score").optional(), number_field("top_raw_score", "best score of plain CLIP").optional(), flag_field("no_match", "whether the best hit is no better than what unrelated texts reach, where that is calibrated").optional(), count_field("reranked", "results whose place is not that of plain CLIP"), count_field("results", "of this page"), flag_field("top_hit_changed", "whether plain CLIP has another first result").optional(), number_field("embed_ms", "embedding the query"), number_field("wait_ms", "waiting for a pass over the catalogue"), number_field("scan_ms", "that pass, which other queries may share"), number_field("rank_ms", "exact scores and places"), count_field("table_version", "of the table")];
    FEEDBACK = "feedback", ["info"],
        "A user said of a result whether it is right; it is stored.",
        "None. Many `wrong` ones at once: look at them (`bsap evaluate --feedback`).",
        [text_field("verdict", "`right` or `wrong`"), text_field("image_id", ""), text_field("configuration", "the name of the one that answered").optional(), text_field("api_key_name", "name of the API key").optional()];
    FEEDBACK_FAILED = "feedback.failed", ["warn"],
        "Feedback could not be stored; whoever sent it was told so.",
        "Look at the store that is named.",
        [text_field("verdict", "`right` or `wrong`"), text_field("error", "")];
    BALANCE_DRIFT = "balance.drift", ["info"],
        "How far balancing goes, every `search.drift_interval_seconds`: over the last 2,000 answers of the live configuration to texts without a filter, at most an hour old, each query once; beside what was usual when it was calibrated (`_then`).",
        "`calibrated = false`: there is nothing to compare with; `bsap evaluate --calibrate live --store` keeps it. Else look at the runbook pages BsapStatisticsDrift, BsapFirstHitsMoved, BsapNothingMatches and BsapHubness.",
        [text_field("configuration", "the name of what is live"), count_field("revision", "of the state"), flag_field("calibrated", "whether it is known what was usual"), count_field("images", "that are served"), count_field("queries", "different ones in the window"), number_field("top_hit_changed", "share of them whose first hit is not that of plain CLIP").optional(), number_field("top_hit_changed_baseline", "").optional(), number_field("no_match", "share that nothing matches").optional(), number_field("no_match_baseline", "").optional(), number_field("hubness", "skewness of how often an image is first").optional(), number_field("hubness_raw", "the same by plain CLIP").optional(), number_field("hubness_ratio", "of the two").optional(), number_field("hubness_ratio_baseline", "").optional(), number_field("mean", "of the images' mean auxiliary scores").optional(), number_field("mean_baseline", "").optional(), number_field("std", "mean of the standard deviations of the images' auxiliary scores").optional(), number_field("std_baseline", "").optional(), number_field("drift", "`mean` less `mean_then`, in standard deviations that the images' means had then").optional()];
    SEARCH_SLOW = "search.slow", ["warn"],
        "A query took longer than `search.slow_ms`.",
        "`text_ms` is most of it: the text tower waits for cores. `wait_ms`: more queries at one time than passes can serve. `scan_ms` and `rank_ms`: the catalogue is large for this machine. For all of these add cores or query workers.",
        [text_field("query_hash", ""), text_field("trace_id", "").optional(), number_field("duration_ms", "in all"), number_field("embed_ms", ""), number_field("wait_ms", ""), number_field("scan_ms", ""), number_field("rank_ms", ""), count_field("scanned", ""), count_field("limit_ms", "")];
    REQUEST_REJECTED = "request.rejected", ["warn"],
        "A request was turned away because too many are in flight.",
        "Add query workers, or raise `http.max_concurrent_requests`.",
        [count_field("limit", "")];
    ACCESS_DENIED = "access.denied", ["warn"],
        "A request was refused: its key is not accepted (`wrong_key`) or has not the scope (`scope`), another site sent it by a browser (`cross_site`), or it asked for another host than this machine where no key is asked for (`host`).",
        "A key that was changed or taken away and is still used: hand out the new one. Many from elsewhere: somebody is trying; keys cannot be guessed, but close the port to them.",
        [text_field("code", "of the answer")];
    HTTP_ERROR = "http.error", ["error"],
        "A request failed through no fault of the caller.",
        "The message says what failed.",
        [text_field("code", ""), text_field("error", "")];
    PROMPTS_UNSUPPORTED_SCRIPT = "prompts.unsupported_script", ["warn"],
        "A prompt set is in a script that the model's vocabulary does not have; its statistics mean nothing.",
        "Use a multilingual model, or another set in `prompts.sets`.",
        [text_field("prompt_set", ""), text_field("warning", "")];
    PUBLISH = "publish", ["info"],
        "Events were published.",
        "None.",
        [count_field("published", ""), count_field("skipped", "")];
    STATE_APPLIED = "state.applied", ["info"],
        "A change of the catalogue's state was taken up: new images are measured with these prompt sets.",
        "None.",
        [count_field("revision", "of the state"), text_field("prompt_sets", "their keys")];
    STATE_FAILED = "state.failed", ["warn"],
        "The catalogue's state was not read or taken up; what was known holds, the next look tries again.",
        "If it stays: the message names the store, or what does not fit.",
        [text_field("error", "")];
    REINDEX_PROGRESS = "reindex.progress", ["info"],
        "Statistics of stored rows are computed for a prompt set: at the beginning, every 10 s, at the end.",
        "None.",
        [text_field("phase", "`started`, `running` or `done`"), text_field("prompt_set", "its key"), count_field("rows", "of the table"), count_field("covered_rows", "of them have the statistics"), count_field("pending_files", "files still to be measured"), count_field("measured_rows", "rows, by this process"), number_field("elapsed_seconds", "since it started")];
    CONFIGURATION_APPLIED = "configuration.applied", ["info"],
        "A query worker answers as a revision of the catalogue's state says.",
        "None.",
        [count_field("revision", "of the state"), text_field("generation", ""), text_field("configuration", "the name of what is live"), text_field("prompt_sets", "their keys"), count_field("duration_ms", "that it took to prepare")];
    CANDIDATE_CHANGED = "candidate.changed", ["info"],
        "A candidate was set or withdrawn.",
        "None.",
        [text_field("change", "`set` or `withdrawn`"), text_field("name", ""), count_field("revision", "of the state"), text_field("actor", "who")];
    SHADOW_COMPARED = "shadow.compared", ["info"],
        "A query that the live configuration answered was computed by the candidate too, unseen.",
        "None: compare before `bsap promote`.",
        [text_field("query_hash", "that of `search`"), text_field("configuration", "that answered"), text_field("candidate", "its name"), count_field("k", ""), number_field("overlap", "share of common results, 0 to 1"), count_field("reranked", "common results in another place"), flag_field("top_hit_changed", "another result is best"), count_field("table_version", "of the table")];
    PROMOTE = "promote", ["info"],
        "The candidate became live.",
        "`bsap rollback` goes back.",
        [text_field("name", ""), count_field("previous_revision", "the revision that was live before"), count_field("revision", "of the state"), text_field("generation", "that is live then"), text_field("actor", "who")];
    ROLLBACK = "rollback", ["info"],
        "What was live before the last promotion is live again.",
        "None.",
        [count_field("restored_revision", "the revision that is served again"), text_field("name", ""), count_field("revision", "of the state"), text_field("generation", "that is live then"), text_field("actor", "who")];
    CONTROL_ACCEPTED = "control.accepted", ["info"],
        "A request of the control topic was taken up.",
        "None.",
        [text_field("request", ""), text_field("prompt_set", "its key"), text_field("requested_by", "who asked")];
    CONTROL_REJECTED = "control.rejected", ["error"],
        "A request of the control topic cannot be done and was passed over.",
        "The message says what is wrong; send it again corrected.",
        [text_field("error", "")];
    CONTROL_FAILED = "control.failed", ["warn"],
        "The control topic cannot be read; ingestion goes on.",
        "Check that `source.control_topic` exists.",
        [text_field("error", "")];
    RECONCILE = "reconcile", ["info"],
        "The table was compared with a listing.",
        "`new`, `changed` or `gone` above 0: events were lost; `bsap reconcile --repair`, then look for the cause.",
        [text_field("listing_target", ""), count_field("listed", ""), count_field("stored", "images of this place"), count_field("unchanged", ""), count_field("too_recent", "too young to be judged"), count_field("new", ""), count_field("changed", ""), count_field("removed", ""), count_field("unrepairable", "that no event can mend"), count_field("deleted", "by an event after their last change"), count_field("id_conflicts", "whose id belongs to another image"), count_field("ignored", "no pictures"), number_field("duration_ms", "")];
}

/// The event of that name.
pub fn find_definition(name: &str) -> Option<&'static EventDefinition> {
    EVENT_DEFINITIONS.iter().find(|event| event.name == name)
}

/// What is wrong with a line of the JSON log: nothing where its event, level and fields are as they
/// are declared here. Lines of libraries, whose `target` is another program's, are right.
pub fn validate_line(line: &Map<String, Value>) -> Vec<String> {
    let target = line.get("target").and_then(Value::as_str).unwrap_or_default();
    if !target.starts_with("bsap") {
        return Vec::new();
    }
    let name = line.get("event").unwrap_or(&Value::Null);
    let Some(event) = name.as_str().and_then(find_definition) else {
        return vec![format!("event {name} is not declared")];
    };
    let mut problems = Vec::new();
    let level = line.get("level").and_then(Value::as_str).unwrap_or_default().to_ascii_lowercase();
    if !event.levels.contains(&level.as_str()) {
        problems.push(format!("{}: level {level:?} is not declared", event.name));
    }
    let declared = || COMMON_FIELDS.iter().chain(event.fields);
    for (key, value) in line {
        match declared().find(|field| field.name == key) {
            None => problems.push(format!("{}: field {key} is not declared", event.name)),
            Some(field) if !field.field_type.matches(value) => problems.push(format!(
                "{}: field {key} is {value}, not a {}",
                event.name,
                field.field_type.name()
            )),
            Some(_) => {}
        }
    }
    for field in declared().filter(|f| !f.optional && !line.contains_key(f.name)) {
        problems.push(format!("{}: field {} is missing", event.name, field.name));
    }
    problems
}

/// The page `ops/log-events.md`.
pub fn render_markdown() -> String {
    let mut page = String::from(
        "# Log events\n\n\
         Every line that bsap itself logs carries `event`, one of the names below. Lines of its libraries\n\
         have another `target` (Kafka's client: `librdkafka`). Names and fields are an interface: they do\n\
         not change without a note in the CHANGELOG. With `log.format = \"json\"` a line is one JSON object\n\
         with these fields and those of the event:\n\n",
    );
    let entry = |field: &EventField| {
        let about = if field.description.is_empty() {
            String::new()
        } else {
            format!(", {}", field.description)
        };
        let maybe = if field.optional { "?" } else { "" };
        format!("`{}`{maybe} ({}{about})", field.name, field.field_type.name())
    };
    let entries =
        |fields: &[EventField], between| fields.iter().map(entry).collect::<Vec<_>>().join(between);
    // Writing to a string cannot fail.
    let _ = write!(page, "{}.\n\n", entries(COMMON_FIELDS, ", "));
    page.push_str(
        "A *count* is a whole number from 0, a *flag* `true` or `false`; `?` marks a field that is missing\n\
         where its value is not known. `_ms` is milliseconds. This page is written by `bsap config\n\
         log-events` from `src/telemetry/event.rs`.\n\n\
         | event | level | what it means | fields | what to do |\n\
         | --- | --- | --- | --- | --- |\n",
    );
    for event in EVENT_DEFINITIONS {
        let _ = writeln!(
            page,
            "| `{}` | {} | {} | {} | {} |",
            event.name,
            event.levels.join(", "),
            event.meaning,
            entries(event.fields, "; "),
            event.remedy
        );
    }
    page
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use serde_json::json;

    use super::*;

    #[test]
    fn the_page_is_current() {
        let page = std::fs::read_to_string("ops/log-events.md").unwrap();
        assert!(page == render_markdown(), "ops/log-events.md is not current: run `just generate`");
    }

    #[test]
    fn event_names_are_unique_and_described() {
        let names: BTreeSet<_> = EVENT_DEFINITIONS.iter().map(|event| event.name).collect();
        assert_eq!(names.len(), EVENT_DEFINITIONS.len());
        for event in EVENT_DEFINITIONS {
            assert!(event.meaning.ends_with('.') && event.remedy.ends_with('.'), "{}", event.name);
            let fields: BTreeSet<_> =
                COMMON_FIELDS.iter().chain(event.fields).map(|field| field.name).collect();
            assert_eq!(fields.len(), COMMON_FIELDS.len() + event.fields.len(), "{}", event.name);
        }
    }

    #[test]
    fn a_line_that_is_not_as_declared_is_found_out() {
        let line = |changes: Value| {
            let mut line = json!({
                "timestamp": "2026-01-01T00:00:00Z", "level": "INFO", "message": "m",
                "target": "bsap::upkeep", "event": "vacuum", "files": 1, "log_files": 0,
            });
            for (key, value) in changes.as_object().unwrap() {
                line[key] = value.clone();
            }
            validate_line(line.as_object().unwrap())
        };
        assert!(line(json!({})).is_empty());
        assert!(line(json!({"files": -1}))[0].contains("not a count"));
        assert!(line(json!({"file": 1}))[0].contains("file is not declared"));
        assert!(line(json!({"level": "WARN"}))[0].contains("level"));
        assert!(line(json!({"event": "vacum"}))[0].contains("not declared"));
        assert!(line(json!({"event": null}))[0].contains("not declared"));
        let bare = json!({"event": "vacuum", "target": "bsap::upkeep"});
        assert!(validate_line(bare.as_object().unwrap()).len() > 3);
        assert!(validate_line(json!({"target": "librdkafka"}).as_object().unwrap()).is_empty());
    }
}
