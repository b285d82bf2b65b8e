//! The log events: name, level, meaning, fields and remedy of each, declared once.
//!
//! To add an event, add an entry to the list below and run `just generate`, which writes
//! `ops/log-events.md` from it. A name or a field is not changed without a note in the CHANGELOG:
//! dashboards and alerts are built on them.

use std::fmt::Write as _;

use serde_json::{Map, Value};

/// What the value of a field is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
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

impl Kind {
    fn name(self) -> &'static str {
        match self {
            Self::Text => "text",
            Self::Count => "count",
            Self::Integer => "integer",
            Self::Number => "number",
            Self::Flag => "flag",
        }
    }

    fn takes(self, value: &Value) -> bool {
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
pub struct Field {
    /// Its name.
    pub name: &'static str,
    /// What its value is.
    pub kind: Kind,
    /// What it says; empty where the name says it all.
    pub about: &'static str,
    /// Whether it may be missing.
    pub optional: bool,
}

impl Field {
    /// It is missing where it is not known.
    const fn maybe(self) -> Self {
        Self { optional: true, ..self }
    }
}

const fn field(name: &'static str, kind: Kind, about: &'static str) -> Field {
    Field { name, kind, about, optional: false }
}

const fn text(name: &'static str, about: &'static str) -> Field {
    field(name, Kind::Text, about)
}

const fn count(name: &'static str, about: &'static str) -> Field {
    field(name, Kind::Count, about)
}

const fn integer(name: &'static str, about: &'static str) -> Field {
    field(name, Kind::Integer, about)
}

const fn number(name: &'static str, about: &'static str) -> Field {
    field(name, Kind::Number, about)
}

const fn flag(name: &'static str, about: &'static str) -> Field {
    field(name, Kind::Flag, about)
}

/// What is known of an event.
#[derive(Debug, Clone, Copy)]
pub struct Event {
    /// Its name, the value of the field `event`.
    pub name: &'static str,
    /// The levels that it is logged at, as `tracing` writes them in lower case.
    pub levels: &'static [&'static str],
    /// What it means.
    pub meaning: &'static str,
    /// What to do about it.
    pub remedy: &'static str,
    /// Its own fields, beside those that every line has.
    pub fields: &'static [Field],
}

/// Fields that every line has or may have.
pub const COMMON: &[Field] = &[
    text("timestamp", "RFC 3339, UTC"),
    text("level", "`ERROR`, `WARN`, `INFO`, `DEBUG`"),
    text("event", "one of the names below"),
    text("message", "for people; not part of the interface"),
    text("target", "the module, which begins with `bsap`"),
];

macro_rules! catalogue {
    ($($constant:ident = $name:literal, [$($level:literal),+], $meaning:literal, $remedy:literal, [$($field:expr),* $(,)?];)*) => {
        $(#[doc = concat!("`", $name, "`: ", $meaning)] pub const $constant: &str = $name;)*
        /// Every event, in the order of `ops/log-events.md`.
        pub const ALL: &[Event] = &[$(Event {
            name: $name,
            levels: &[$($level),+],
            meaning: $meaning,
            remedy: $remedy,
            fields: &[$($field),*],
        }),*];
    };
}

catalogue! {
    HELD_BACK = "log.held_back", ["warn"],
        "So many lines of an event were not written because too many came (`log.burst`).",
        "Look at the event that is named; `bsap_log_events_total` counts all of its lines.",
        [text("held", "the event, or the target of a library"), count("count", ""), count("seconds", "in which they came")];
    OTLP_FAILED = "otlp.failed", ["warn"],
        "The OpenTelemetry collector did not take traces or metrics; they are dropped, the process works on.",
        "Check `otlp.endpoint`; `bsap_otlp_dropped_total` counts what is lost.",
        [text("signal", "`traces` or `metrics`"), count("count", "spans or requests"), text("error", "")];
    START = "start", ["info"],
        "A worker or query worker has started.",
        "Compare `fingerprint` between workers when they disagree.",
        [text("role", "`worker` or `query worker`"), text("version", "of the program"), text("model", ""), text("fingerprint", "of the model"), text("generation", "that is filled or served"), text("table", "where the catalogue is"), text("limits", "bounds that hold, `option=value` each")];
    METRICS_OFF = "metrics.off", ["warn"],
        "`metrics.listen` cannot be listened on; the process works on without metrics and probes.",
        "Give each process of a machine a `metrics.listen` of its own, or set `metrics.serve = false`.",
        [text("error", "")];
    STOP = "stop", ["info"],
        "It has stopped.",
        "`drained = false`: work was cut off; it is done again by the next owner.",
        [text("role", ""), flag("drained", "everything that was taken up is settled")];
    DRAIN_OVERDUE = "drain.overdue", ["warn"],
        "At shutdown, messages took longer than `ingest.drain_seconds` and were cut off.",
        "None: the next owner processes them again. If it stays, look at what is slow (`retry`).",
        [count("left", "messages")];
    FATAL = "fatal", ["error"],
        "The process ends because of an error.",
        "The message says what to change.",
        [text("error", "")];
    HEARTBEAT = "heartbeat", ["info"],
        "The worker is alive; every `ingest.heartbeat_seconds`.",
        "No heartbeat for two minutes: the worker hangs or is gone; restart it, nothing is lost. `poll_age_ms` above some seconds: the consumer's thread hangs. `partitions` = 0 on one of several workers: there are more workers than partitions.",
        [text("role", ""), integer("poll_age_ms", "since Kafka was last polled").maybe(), count("partitions", "that are this worker's"), count("in_flight", "messages in the pipeline"), count("waiting_rows", "that wait for the next commit"), flag("committing", "")];
    LAG = "lag", ["info"],
        "How far the worker is behind; beside each `heartbeat`.",
        "`durable` that only grows: add workers, or partitions where each worker has one; see `batch.done` for the stage that takes longest. `known = false`: Kafka has not told the ends of the logs yet; where it stays, look at `source.error`.",
        [flag("known", "whether the ends of all its partitions are known"), integer("durable", "messages not stored yet").maybe(), integer("buffered", "messages not taken up yet: `durable` less those in the pipeline").maybe(), integer("event_age_ms", "of the oldest event in the last commit; missing: not known").maybe()];
    BATCH_DONE = "batch.done", ["info"],
        "Rows and positions are stored in one commit.",
        "None. If it stops while events arrive, see `source.error` and `commit.conflict`. `fetch_ms` to `embed_ms` are sums over the images, which are worked on at one time: the largest is the bottleneck. Where `towers_wait_ms` nears the time between commits while the worker lags, it is not the model.",
        [count("version", "of the table"), text("positions", "`topic[partition]@next`, separated by spaces"), text("model", "fingerprint"), text("prompt_set", "the first; others are stored beside it").maybe(), count("rows", "stored"), count("bytes", "of the files written"), count("ok", "events embedded or deleted"), count("deleted", "of them, deletes"), count("dead_lettered", "messages put aside"), count("skipped", "images that were gone"), count("image_bytes", "fetched"), count("fetch_ms", ""), count("decode_ms", ""), count("embed_ms", ""), count("towers_ms", "that the image tower computed since the last commit"), count("towers_wait_ms", "that it waited for images"), count("fenced", "partitions dropped, another worker had stored them"), count("commit_ms", ""), integer("age_ms", "of the oldest event; below 0: clocks differ; missing: not known").maybe(), text("trace_ids", "from the messages' `traceparent`, the first 32, separated by spaces").maybe()];
    DEAD_LETTER = "dead_letter", ["warn"],
        "A message can never be used and was put aside, unchanged.",
        "`bsap dead-letters show <partition>@<offset>`; mend the cause, then `bsap dead-letters replay` with a filter, or `--all`.",
        [text("partition", ""), integer("offset", ""), text("stage", "`decode_event`, `fetch` or `decode_image`"), text("code", ""), text("reason", ""), text("trace_id", "from the message's `traceparent`").maybe()];
    TOWERS_FAILED = "towers.failed", ["error"],
        "The device of the model did not compute: a GPU is lost or out of memory. A worker ends, so that it opens the device anew when it is started again, and loses nothing; a query worker answers what needs no model, and after three failures in a row its probe `/livez` asks for a restart.",
        "Look at the device (`nvidia-smi`, the kernel's log); another machine, or `model.device = \"cpu\"`, until it is mended. Out of memory: lower `ingest.batch_images`.",
        [text("device", "`cpu` or `cuda`"), count("in_a_row", "since a computation last succeeded"), text("error", "")];
    GONE = "image.gone", ["info"],
        "The image was gone before it could be fetched. No row is written.",
        "None, if deletes follow in the topic.",
        [text("partition", ""), integer("offset", ""), text("image_id", ""), text("uri", ""), text("trace_id", "from the message's `traceparent`").maybe()];
    RETRY = "retry", ["debug", "info"],
        "Something that may pass failed and is tried again.",
        "Many in a row: look at the store or host that is named.",
        [text("stage", ""), count("attempt", ""), text("error", "")];
    REBALANCE = "rebalance", ["info"],
        "Partitions came to or left this worker.",
        "Constant rebalancing: a worker restarts or is too slow; look for `start`.",
        [text("change", "`assigned` or `revoked`"), text("partitions", ""), flag("drained", "where revoked").maybe()];
    SOURCE_ERROR = "source.error", ["warn", "debug"],
        "Kafka reported an error; consuming goes on.",
        "Check that the brokers are reachable.",
        [text("error", ""), flag("pause", "").maybe()];
    SOURCE_FAILED = "source.failed", ["error"],
        "Consuming cannot go on; the worker stops.",
        "The message says what to change.",
        [text("error", "").maybe()];
    SOURCE_GAP = "source.gap", ["error"],
        "Kafka's retention removed messages that were never processed.",
        "`bsap reconcile --repair` announces what was lost; give the topic a longer retention.",
        [text("partition", ""), integer("resume", "the offset that was wanted"), integer("low", "the first that is there"), integer("lost", "")];
    COMMIT_CONFLICT = "commit.conflict", ["info"],
        "Another writer committed first, or the store failed; the commit is tried again.",
        "None, unless attempts run out.",
        [count("attempt", ""), text("reason", "")];
    COMMIT_FENCED = "commit.fenced", ["warn"],
        "Another worker has consumed this partition; these rows were dropped because they are stored already.",
        "None; it happens at a rebalance.",
        [text("partition", ""), integer("stored", ""), integer("expected", "").maybe(), integer("next", "")];
    COMPACTION = "compaction", ["info"],
        "Small files of the table were merged, superseded rows dropped.",
        "None. `lost`: merges given up because another compactor was first.",
        [count("jobs", ""), count("lost", ""), count("files_in", ""), count("files_out", ""), count("bytes_in", ""), count("bytes_out", ""), count("superseded", "rows dropped"), count("tombstones", "dropped"), count("folded", "backfilled statistics that stand in the rows now"), count("ms", "")];
    VACUUM = "vacuum", ["info"],
        "Files that are no longer part of the table were removed.",
        "None.",
        [count("files", ""), count("log_files", "")];
    GENERATION_REMOVED = "generation.removed", ["info"],
        "The table of a generation that was neither live nor beside the live one was removed (`bsap vacuum --generations`).",
        "None.",
        [text("id", "the generation"), count("objects", ""), count("bytes", "")];
    FILE_DROPPED = "file.dropped", ["warn"],
        "A data file that was missing or damaged was taken out of the table (`bsap compact --drop-damaged`).",
        "Run `bsap reconcile --repair`: what it held is not stored any more.",
        [text("file", "its name")];
    UPKEEP_FAILED = "upkeep.failed", ["warn"],
        "The table was not tidied; the next turn tries again. Ingestion goes on.",
        "If it stays: the number of files grows (`bsap status`), commits become slower. The message says what failed.",
        [text("error", "")];
    FOLLOW = "follow", ["info", "debug"],
        "The query worker took in a commit.",
        "None.",
        [count("version", "of the table"), count("rows", ""), count("images", "that are there now"), number("ms", "")];
    FOLLOW_FAILED = "follow.failed", ["error", "warn"],
        "The query worker cannot read the table; it serves what it has and tries again.",
        "The message names the file or the store.",
        [text("error", ""), count("attempt", "").maybe()];
    SNAPSHOT_READY = "snapshot.ready", ["info"],
        "The query worker has read the whole table and is ready.",
        "None.",
        [count("version", "of the table"), count("images", ""), number("ms", "")];
    SNAPSHOT_MEMORY = "snapshot.memory", ["error"],
        "The catalogue needs more memory than `search.memory_mib` allows. At the start the query worker ends; later it serves what it has and takes nothing more in.",
        "Raise `search.memory_mib`, give the machine more memory, or serve fewer images or prompt sets; then start again.",
        [text("error", "with the figures"), count("version", "of the table that does not fit")];
    SEARCH = "search", ["info"],
        "A query was answered.",
        "None. `moved` near `results` on most queries: the balance changes every ranking; measure it on your own queries, or lower the weight by a candidate (`bsap candidate set`).",
        [text("query_hash", "the same text has the same hash"), text("query", "where `log.query_text` is set").maybe(), text("input", "what was looked for: text, texts, image_id, image, vector"), text("trace_id", "from the request's `traceparent`").maybe(), text("parent_id", "its span, from there too").maybe(), text("by", "name of the API key").maybe(), text("configuration", "the name of the one that answered"), flag("own", "whether the request said itself how it is to be answered: prompt set, normaliser, weight or λ"), text("normaliser", ""), number("weight", ""), count("k", ""), count("offset", "results on earlier pages"), flag("filtered", "whether there was a filter"), count("scanned", ""), count("matched", ""), number("top", "best balanced score").maybe(), number("top_raw", "best score of plain CLIP").maybe(), flag("no_match", "whether the best hit is no better than what unrelated texts reach, where that is calibrated").maybe(), count("moved", "results whose place is not that of plain CLIP"), count("results", "of this page"), flag("first_moved", "whether plain CLIP has another first result").maybe(), number("text_ms", "embedding the query"), number("wait_ms", "waiting for a pass over the catalogue"), number("scan_ms", "that pass, which other queries may share"), number("rank_ms", "exact scores and places"), count("version", "of the table")];
    FEEDBACK = "feedback", ["info"],
        "A user said of a result whether it is right; it is stored.",
        "None. Many `wrong` ones at once: look at them (`bsap evaluate --feedback`).",
        [text("verdict", "`right` or `wrong`"), text("image_id", ""), text("configuration", "the name of the one that answered").maybe(), text("by", "name of the API key").maybe()];
    FEEDBACK_FAILED = "feedback.failed", ["warn"],
        "Feedback could not be stored; whoever sent it was told so.",
        "Look at the store that is named.",
        [text("verdict", "`right` or `wrong`"), text("error", "")];
    BALANCE_WATCH = "balance.watch", ["info"],
        "How far balancing goes, every `search.watch_seconds`: over the last 2,000 answers of the live configuration to texts without a filter, at most an hour old, each query once; beside what was usual when it was calibrated (`_then`).",
        "`calibrated = false`: there is nothing to compare with; `bsap evaluate --calibrate live --store` keeps it. Else look at the runbook pages BsapStatisticsDrift, BsapFirstHitsMoved, BsapNothingMatches and BsapHubness.",
        [text("configuration", "the name of what is live"), count("revision", "of the state"), flag("calibrated", "whether it is known what was usual"), count("images", "that are served"), count("queries", "different ones in the window"), number("first_moved", "share of them whose first hit is not that of plain CLIP").maybe(), number("first_moved_then", "").maybe(), number("no_match", "share that nothing matches").maybe(), number("no_match_then", "").maybe(), number("hubness", "skewness of how often an image is first").maybe(), number("hubness_raw", "the same by plain CLIP").maybe(), number("hubness_ratio", "of the two").maybe(), number("hubness_ratio_then", "").maybe(), number("mean", "of the images' mean auxiliary scores").maybe(), number("mean_then", "").maybe(), number("std", "mean of the standard deviations of the images' auxiliary scores").maybe(), number("std_then", "").maybe(), number("drift", "`mean` less `mean_then`, in standard deviations that the images' means had then").maybe()];
    SEARCH_SLOW = "search.slow", ["warn"],
        "A query took longer than `search.slow_ms`.",
        "`text_ms` is most of it: the text tower waits for cores. `wait_ms`: more queries at one time than passes can serve. `scan_ms` and `rank_ms`: the catalogue is large for this machine. For all of these add cores or query workers.",
        [text("query_hash", ""), text("trace_id", "").maybe(), number("ms", "in all"), number("text_ms", ""), number("wait_ms", ""), number("scan_ms", ""), number("rank_ms", ""), count("scanned", ""), count("limit_ms", "")];
    SHED = "shed", ["warn"],
        "A request was turned away because too many are in flight.",
        "Add query workers, or raise `http.concurrency`.",
        [count("limit", "")];
    ACCESS_REFUSED = "access.refused", ["warn"],
        "A request was refused: its key is not accepted (`wrong_key`) or has not the scope (`scope`), another site sent it by a browser (`cross_site`), or it asked for another host than this machine where no key is asked for (`host`).",
        "A key that was changed or taken away and is still used: hand out the new one. Many from elsewhere: somebody is trying; keys cannot be guessed, but close the port to them.",
        [text("code", "of the answer")];
    HTTP_ERROR = "http.error", ["error"],
        "A request failed through no fault of the caller.",
        "The message says what failed.",
        [text("code", ""), text("error", "")];
    PROMPTS_SCRIPT = "prompts.script", ["warn"],
        "A prompt set is in a script that the model's vocabulary does not have; its statistics mean nothing.",
        "Use a multilingual model, or another set in `prompts.sets`.",
        [text("prompt_set", ""), text("warning", "")];
    PUBLISH = "publish", ["info"],
        "Events were published.",
        "None.",
        [count("published", ""), count("skipped", "")];
    STATE = "state", ["info"],
        "A change of the catalogue's state was taken up: new images are measured with these prompt sets.",
        "None.",
        [count("revision", "of the state"), text("prompt_sets", "their keys")];
    STATE_FAILED = "state.failed", ["warn"],
        "The catalogue's state was not read or taken up; what was known holds, the next look tries again.",
        "If it stays: the message names the store, or what does not fit.",
        [text("error", "")];
    REINDEX = "reindex", ["info"],
        "Statistics of stored rows are computed for a prompt set: at the beginning, every 10 s, at the end.",
        "None.",
        [text("phase", "`started`, `running` or `done`"), text("prompt_set", "its key"), count("rows", "of the table"), count("covered", "of them have the statistics"), count("pending_files", "files still to be measured"), count("measured", "rows, by this process"), number("seconds", "since it started")];
    CONFIGURATION = "configuration", ["info"],
        "A query worker answers as a revision of the catalogue's state says.",
        "None.",
        [count("revision", "of the state"), text("generation", ""), text("configuration", "the name of what is live"), text("prompt_sets", "their keys"), count("ms", "that it took to prepare")];
    CANDIDATE = "candidate", ["info"],
        "A candidate was set or withdrawn.",
        "None.",
        [text("change", "`set` or `withdrawn`"), text("name", ""), count("revision", "of the state"), text("by", "who")];
    SHADOW = "shadow", ["info"],
        "A query that the live configuration answered was computed by the candidate too, unseen.",
        "None: compare before `bsap promote`.",
        [text("query_hash", "that of `search`"), text("configuration", "that answered"), text("candidate", "its name"), count("k", ""), number("overlap", "share of common results, 0 to 1"), count("moved", "common results in another place"), flag("top_changed", "another result is best"), count("version", "of the table")];
    PROMOTE = "promote", ["info"],
        "The candidate became live.",
        "`bsap rollback` goes back.",
        [text("name", ""), count("from", "the revision that was live before"), count("revision", "of the state"), text("generation", "that is live then"), text("by", "who")];
    ROLLBACK = "rollback", ["info"],
        "What was live before the last promotion is live again.",
        "None.",
        [count("to", "the revision that is served again"), text("name", ""), count("revision", "of the state"), text("generation", "that is live then"), text("by", "who")];
    CONTROL = "control", ["info"],
        "A request of the control topic was taken up.",
        "None.",
        [text("request", ""), text("prompt_set", "its key"), text("by", "who asked")];
    CONTROL_REFUSED = "control.refused", ["error"],
        "A request of the control topic cannot be done and was passed over.",
        "The message says what is wrong; send it again corrected.",
        [text("error", "")];
    CONTROL_FAILED = "control.failed", ["warn"],
        "The control topic cannot be read; ingestion goes on.",
        "Check that `source.control_topic` exists.",
        [text("error", "")];
    RECONCILE = "reconcile", ["info"],
        "The table was compared with a listing.",
        "`new`, `changed` or `gone` above 0: events were lost; `bsap reconcile --repair`, then look for the cause.",
        [text("place", ""), count("listed", ""), count("stored", "images of this place"), count("same", ""), count("recent", "too young to be judged"), count("new", ""), count("changed", ""), count("gone", ""), count("refused", "that no event can mend"), count("deleted", "by an event after their last change"), count("elsewhere", "whose id belongs to another image"), count("ignored", "no pictures"), number("ms", "")];
}

/// The event of that name.
pub fn find(name: &str) -> Option<&'static Event> {
    ALL.iter().find(|event| event.name == name)
}

/// What is wrong with a line of the JSON log: nothing where its event, level and fields are as they
/// are declared here. Lines of libraries, whose `target` is another program's, are right.
pub fn problems(line: &Map<String, Value>) -> Vec<String> {
    let target = line.get("target").and_then(Value::as_str).unwrap_or_default();
    if !target.starts_with("bsap") {
        return Vec::new();
    }
    let name = line.get("event").unwrap_or(&Value::Null);
    let Some(event) = name.as_str().and_then(find) else {
        return vec![format!("event {name} is not declared")];
    };
    let mut problems = Vec::new();
    let level = line.get("level").and_then(Value::as_str).unwrap_or_default().to_ascii_lowercase();
    if !event.levels.contains(&level.as_str()) {
        problems.push(format!("{}: level {level:?} is not declared", event.name));
    }
    let declared = || COMMON.iter().chain(event.fields);
    for (key, value) in line {
        match declared().find(|field| field.name == key) {
            None => problems.push(format!("{}: field {key} is not declared", event.name)),
            Some(field) if !field.kind.takes(value) => problems.push(format!(
                "{}: field {key} is {value}, not a {}",
                event.name,
                field.kind.name()
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
pub fn markdown() -> String {
    let mut page = String::from(
        "# Log events\n\n\
         Every line that bsap itself logs carries `event`, one of the names below. Lines of its libraries\n\
         have another `target` (Kafka's client: `librdkafka`). Names and fields are an interface: they do\n\
         not change without a note in the CHANGELOG. With `log.format = \"json\"` a line is one JSON object\n\
         with these fields and those of the event:\n\n",
    );
    let entry = |field: &Field| {
        let about =
            if field.about.is_empty() { String::new() } else { format!(", {}", field.about) };
        let maybe = if field.optional { "?" } else { "" };
        format!("`{}`{maybe} ({}{about})", field.name, field.kind.name())
    };
    let entries =
        |fields: &[Field], between| fields.iter().map(entry).collect::<Vec<_>>().join(between);
    // Writing to a string cannot fail.
    let _ = write!(page, "{}.\n\n", entries(COMMON, ", "));
    page.push_str(
        "A *count* is a whole number from 0, a *flag* `true` or `false`; `?` marks a field that is missing\n\
         where its value is not known. `_ms` is milliseconds. This page is written by `bsap config\n\
         log-events` from `src/telemetry/event.rs`.\n\n\
         | event | level | what it means | fields | what to do |\n\
         | --- | --- | --- | --- | --- |\n",
    );
    for event in ALL {
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
        assert!(page == markdown(), "ops/log-events.md is not current: run `just generate`");
    }

    #[test]
    fn names_are_told_apart_and_described() {
        let names: BTreeSet<_> = ALL.iter().map(|event| event.name).collect();
        assert_eq!(names.len(), ALL.len());
        for event in ALL {
            assert!(event.meaning.ends_with('.') && event.remedy.ends_with('.'), "{}", event.name);
            let fields: BTreeSet<_> =
                COMMON.iter().chain(event.fields).map(|field| field.name).collect();
            assert_eq!(fields.len(), COMMON.len() + event.fields.len(), "{}", event.name);
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
            problems(line.as_object().unwrap())
        };
        assert!(line(json!({})).is_empty());
        assert!(line(json!({"files": -1}))[0].contains("not a count"));
        assert!(line(json!({"file": 1}))[0].contains("file is not declared"));
        assert!(line(json!({"level": "WARN"}))[0].contains("level"));
        assert!(line(json!({"event": "vacum"}))[0].contains("not declared"));
        assert!(line(json!({"event": null}))[0].contains("not declared"));
        let bare = json!({"event": "vacuum", "target": "bsap::upkeep"});
        assert!(problems(bare.as_object().unwrap()).len() > 3);
        assert!(problems(json!({"target": "librdkafka"}).as_object().unwrap()).is_empty());
    }
}
