//! Arguments as typed.

pub(crate) mod dead_letters;
pub(crate) mod demo;
pub(crate) mod evaluate;
pub(crate) mod model;
pub(crate) mod prompts;
pub(crate) mod reconcile;
pub(crate) mod reindex;
pub(crate) mod table;

use std::net::SocketAddr;
use std::path::PathBuf;

use clap::{Args, CommandFactory, FromArgMatches, Parser, Subcommand, ValueEnum};

pub use dead_letters::{DeadLetterFilterArgs, DeadLettersAction, DeadLettersArgs};
pub use demo::{DemoAction, DemoArgs, DemoEvaluateArgs, DemoRenderArgs};
pub use evaluate::{
    EvaluateAction, EvaluateArgs, EvaluateRankingsArgs, PromptsSuggestArgs, SyntheticCatalogueArgs,
};
pub use model::{CheckpointArgs, EmbedArgs, ModelAction, ModelArgs};
pub use prompts::{PromptsAction, PromptsArgs, PromptsMeasureArgs};
pub use reconcile::ReconcileArgs;
pub use reindex::{
    CandidateAction, CandidateArgs, CandidateSetArgs, HistoryArgs, PromoteArgs, ReindexAction,
    ReindexArgs, ReindexModelArgs, ReindexStatisticsArgs, RollbackArgs,
};
pub use table::{CompactArgs, StatusArgs, VacuumArgs, VerifyArgs};

use crate::balance::normalise::Normaliser;
use crate::config;
use crate::serve::http::Scope;

const LONG_ABOUT: &str = "\
Text→image search that can be trusted. Workers (`ingest`) consume new-image events from Kafka, \
embed each image with CLIP, measure it against auxiliary prompts (BSAP) and store both on object \
storage; the query worker (`serve`) follows the stored table and answers queries balanced against \
each image's own score distribution.

Start with `bsap demo`: everything in one process, nothing to set up.";

const AFTER_LONG_HELP: &str = "\
Exit codes: 0 done, 1 the work failed, 2 usage or configuration is wrong.

Every option of the configuration file can be set by an environment variable \
BSAP_<SECTION>__<KEY>. `bsap config reference` describes all of them.";

/// The program.
#[derive(Debug, Parser)]
#[command(name = "bsap", version, about = "Text→image search that can be trusted", long_about = LONG_ABOUT, after_long_help = AFTER_LONG_HELP)]
pub struct Cli {
    /// Configuration file; without one, the defaults hold.
    #[arg(long, short, global = true, env = "BSAP_CONFIG", value_name = "FILE")]
    pub config: Option<PathBuf>,
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

impl Cli {
    /// Parses the process's arguments; ends the process with code 2 where they are wrong. The long
    /// help of a command describes the options of the configuration that it reads.
    pub fn from_process() -> Self {
        const SEARCH_SECTIONS: [&str; 5] = ["model", "table", "search", "attributes", "decode"];
        const WORKER_SECTIONS: [&str; 14] = [
            "kafka",
            "source",
            "dead_letter",
            "attributes",
            "fetch",
            "decode",
            "model",
            "prompts",
            "table",
            "maintenance",
            "ingest",
            "log",
            "metrics",
            "otlp",
        ];
        const SERVE_SECTIONS: [&str; 10] = [
            "model",
            "table",
            "search",
            "attributes",
            "decode",
            "fetch",
            "http",
            "log",
            "metrics",
            "otlp",
        ];
        let mut command = Self::command();
        for (name, sections) in [
            ("ingest", &WORKER_SECTIONS[..]),
            ("serve", &SERVE_SECTIONS),
            ("publish", &["kafka", "source", "attributes", "fetch"]),
            ("reconcile", &["kafka", "source", "attributes", "fetch", "table", "maintenance"]),
            ("dead-letters", &["kafka", "dead_letter"]),
            ("status", &["table", "kafka", "source"]),
            ("verify", &["table", "maintenance"]),
            ("compact", &["table", "maintenance"]),
            ("vacuum", &["table", "maintenance"]),
            ("reindex", &["kafka", "source", "attributes", "prompts", "model", "table"]),
            ("candidate", &["table"]),
            ("promote", &["model", "table"]),
            ("rollback", &["table"]),
            ("history", &["table"]),
            ("search", &SEARCH_SECTIONS),
            ("evaluate", &["model", "table", "prompts"]),
            ("prompts", &["prompts", "model", "table"]),
        ] {
            let help = config::help_text(sections);
            command = command.mut_subcommand(name, |command| {
                let examples = command.get_after_long_help().map(ToString::to_string);
                let all = examples.map_or_else(
                    || help.clone(),
                    |own_examples| format!("{own_examples}\n\n{help}"),
                );
                command.after_long_help(all)
            });
        }
        Self::from_arg_matches(&command.get_matches()).unwrap_or_else(|error| error.exit())
    }
}

/// What to do.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Show everything at work: broker, storage, workers and page in one process
    Demo(DemoArgs),
    /// Consume new-image events and store embeddings and statistics, until stopped
    Ingest,
    /// Follow the stored table and answer queries over HTTP, until stopped
    Serve(ServeArgs),
    /// Announce images: files, folders, bucket prefixes or JSON lines become events
    Publish(PublishArgs),
    /// Find images that are new, changed or gone without an event, and announce them
    Reconcile(ReconcileArgs),
    /// List, show and send again messages that could not be used
    DeadLetters(DeadLettersArgs),
    /// Show what is stored, how it is served, and how far ingestion is behind
    Status(StatusArgs),
    /// Check that the stored table is whole and right
    Verify(VerifyArgs),
    /// Merge small files of the table, and drop superseded rows
    Compact(CompactArgs),
    /// Remove files that are no longer part of the table
    Vacuum(VacuumArgs),
    /// Compute anew what stored rows are measured with
    Reindex(ReindexArgs),
    /// Name a configuration that may become live, and watch it
    Candidate(CandidateArgs),
    /// Make the candidate live
    Promote(PromoteArgs),
    /// Make live again what was live before the last promotion
    Rollback(RollbackArgs),
    /// Print what was changed, when and by whom
    History(HistoryArgs),
    /// Ask a running server, or the table itself
    Search(SearchArgs),
    /// Compare ways to rank on your own queries: is balancing worth it?
    Evaluate(Box<EvaluateArgs>),
    /// Embed texts and images and print the numbers, to compare with a reference
    Embed(EmbedArgs),
    /// Show what a checkpoint is, and test it
    Model(ModelArgs),
    /// List prompt sets, and measure what one does on the stored images
    Prompts(PromptsArgs),
    /// Make API keys for the query worker
    Keys(KeysArgs),
    /// Check the configuration and try every connection that it names
    Check,
    /// Print an example, what is in effect, the reference or the JSON schema
    Config(ConfigArgs),
}

/// `bsap serve`.
#[derive(Debug, Args)]
pub struct ServeArgs {
    /// Address and port, instead of http.listen
    #[arg(long, value_name = "ADDRESS")]
    pub listen: Option<SocketAddr>,
}

/// `bsap publish`.
#[derive(Debug, Args)]
#[command(after_long_help = "\
Examples:
  bsap publish photos/                       every picture below a folder
  bsap publish s3://shop/images --id-prefix shop/
  bsap publish --jsonl events.jsonl          events as schemas/image-event.schema.json has them
  bsap publish --delete shop/a.jpg           say that an image is gone")]
pub struct PublishArgs {
    /// Files, folders, bucket prefixes (s3://, gs://, az://) or http(s) addresses
    #[arg(value_name = "TARGET")]
    pub targets: Vec<String>,
    /// JSON lines, an event each; `-` reads standard input
    #[arg(long, value_name = "FILE")]
    pub jsonl: Option<PathBuf>,
    /// Image ids that are gone
    #[arg(long, value_name = "ID", num_args = 1..)]
    pub delete: Vec<String>,
    /// Put before each image id
    #[arg(long, default_value = "", value_name = "TEXT")]
    pub id_prefix: String,
    /// An attribute for every listed image, for example --attribute shop=berlin
    #[arg(long = "attribute", value_name = "NAME=VALUE", value_parser = parse_name_value)]
    pub attributes: Vec<(String, String)>,
    /// Date the events now instead of at each object's last change
    #[arg(long)]
    pub now: bool,
    /// Print the events as JSON lines instead of sending them
    #[arg(long)]
    pub dry_run: bool,
}

fn parse_name_value(text: &str) -> Result<(String, String), String> {
    let pair = text.split_once('=').filter(|(name, _)| !name.is_empty());
    let (name, value) = pair.ok_or_else(|| format!("{text:?} is not NAME=VALUE"))?;
    Ok((name.to_owned(), value.to_owned()))
}

/// `bsap search`.
#[derive(Debug, Args)]
#[command(after_long_help = "\
Examples:
  bsap search 'a red mug' --filter '{\"lte\": {\"price\": 20}}'
  bsap search --image photo.jpg                 what is like a picture
  bsap search --like shop/a.jpg -k 5            what is like an image of the catalogue")]
#[command(group(clap::ArgGroup::new("input").required(true).args(["text", "image", "similar_to"])))]
pub struct SearchArgs {
    /// What to look for
    pub text: Option<String>,
    /// A picture's file: find what is like it
    #[arg(long, value_name = "FILE")]
    pub image: Option<PathBuf>,
    /// An image of the catalogue: find what is like it
    #[arg(long, value_name = "ID")]
    pub similar_to: Option<String>,
    /// Which images may be found: JSON as in docs/api.md
    #[arg(long, value_name = "JSON")]
    pub filter: Option<String>,
    /// Balanced score that hits must have: a number, or `calibrated`
    #[arg(long, value_name = "SCORE", allow_hyphen_values = true)]
    pub min_score: Option<String>,
    /// A running server, for example http://127.0.0.1:8080; without it the table is read
    #[arg(long, value_name = "URL")]
    pub server: Option<String>,
    /// How many results
    #[arg(short, long, default_value_t = 10)]
    pub k: usize,
    /// Formula; what is served, unless given
    #[arg(long)]
    pub normaliser: Option<Normaliser>,
    /// Weight of the balanced score, 0 (plain CLIP) to 1; what is served, unless given
    #[arg(long)]
    pub weight: Option<f32>,
    /// Prompt set by name; what is served, unless given
    #[arg(long, value_name = "NAME")]
    pub prompt_set: Option<String>,
    /// Print the answer as JSON, as the server gives it
    #[arg(long)]
    pub json: bool,
    /// API key for the server; better in the variable, where no list of processes shows it
    #[arg(long, env = "BSAP_KEY", hide_env_values = true, value_name = "KEY")]
    pub key: Option<String>,
}

/// `bsap keys`.
#[derive(Debug, Args)]
pub struct KeysArgs {
    /// What to do.
    #[command(subcommand)]
    pub action: KeysAction,
}

/// What `bsap keys` does.
#[derive(Debug, Subcommand)]
pub enum KeysAction {
    /// Print a new key, and the lines of the configuration that make it known
    New {
        /// Who will hold it, for the log
        #[arg(long)]
        name: String,
        /// What it may do; may be given several times. `admin` may do everything
        #[arg(long = "scope", required = true, value_name = "SCOPE")]
        scopes: Vec<Scope>,
    },
}

/// `bsap config`.
#[derive(Debug, Args)]
pub struct ConfigArgs {
    /// What to print
    #[arg(value_enum)]
    pub what: ConfigOutput,
}

/// What `bsap config` prints.
#[derive(Debug, Clone, Copy, ValueEnum)]
pub enum ConfigOutput {
    /// A commented file with every option at its default
    Example,
    /// What is in effect, with secrets hidden
    Show,
    /// Every option described, as Markdown
    Reference,
    /// The JSON schema of the file, for editors
    Schema,
    /// The JSON schema of new-image events
    EventSchema,
    /// The JSON schema of CloudEvents that bring them
    CloudEventSchema,
    /// The JSON schema of bucket notifications
    BucketNotificationSchema,
    /// The HTTP interface as OpenAPI 3.1
    Openapi,
    /// Every log event with its fields and what to do about it, as Markdown
    LogEvents,
    /// The JSON schema of requests on the control topic
    ControlRequestSchema,
    /// Every metric with its labels, as Markdown
    Metrics,
}
