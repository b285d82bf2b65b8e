//! Arguments of `bsap evaluate`.

use std::path::PathBuf;

use clap::{ArgGroup, Args, Subcommand};

use super::arrays::EvaluateArraysArgs;
use super::rankings::EvaluateRankingsArgs;
use crate::demo::catalogue::PhotoStyle;
use crate::evaluate::{ConfigurationSpec, Cutoffs};

/// `bsap evaluate`.
#[derive(Debug, Args)]
#[command(args_conflicts_with_subcommands = true, subcommand_negates_reqs = true)]
#[command(group = ArgGroup::new("input").required(true).args(["queries", "query_log", "feedback", "synthetic", "from_logs"]))]
#[command(after_long_help = "\
Examples:
  bsap evaluate --queries judged.jsonl               the live configuration and plain CLIP
  bsap evaluate --queries judged.csv --report report.html \\
      --configuration set=mine.toml,normaliser=nnn,weight=0.25 --configuration candidate
  bsap evaluate --queries judged.jsonl --calibrate live --store
  bsap evaluate --query-log queries.jsonl            how much rankings differ, without judgements
  bsap evaluate --from-logs query-*.jsonl            what a candidate changed, from log lines
  bsap evaluate --synthetic clutter                  on drawn pictures whose content is known
  bsap evaluate arrays --images i.npy --queries q.npy --prompts p.npy --relevant pairs.csv
  bsap evaluate rankings --qrels q.txt --run a.run --run b.run

Queries are JSON lines, `{\"text\": \"a red mug\", \"relevant\": [\"id\", …], \"group\": \"mugs\"}`, or CSV with the \
columns text, relevant (ids separated by |), group, or text, image_id, grade, group. An empty `relevant` \
means that nothing matches; without `relevant` the query is unjudged. docs/evaluation.md has more.")]
pub struct EvaluateArgs {
    /// Another input than queries on a catalogue.
    #[command(subcommand)]
    pub action: Option<EvaluateAction>,
    /// Judged queries, with their relevant images: JSON lines or CSV
    #[arg(long, value_name = "FILE")]
    pub queries: Option<PathBuf>,
    /// Unjudged queries, for example from a query log: JSON lines or CSV
    #[arg(long, value_name = "FILE")]
    pub query_log: Option<PathBuf>,
    /// Use the feedback of users as judgements, as query workers stored it in the catalogue
    #[arg(long)]
    pub feedback: bool,
    /// JSON logs of query workers: how the answers of a candidate differed (`shadow.compared`), and what
    /// each configuration answered (`search`); `-` reads standard input. The configuration file is not
    /// read
    #[arg(long, value_name = "FILE", num_args = 1.., conflicts_with_all = ["configurations", "minutes_per_false_hit", "calibrate", "runs"])]
    pub from_logs: Vec<PathBuf>,
    /// Evaluate on pictures that the program draws, whose content is known; the configuration file is
    /// not read
    #[arg(long, value_name = "STYLE")]
    pub synthetic: Option<PhotoStyle>,
    /// A configuration to compare: raw, live or candidate, and keys that differ (set, normaliser,
    /// weight, lambda, top_k, temperature, generation, min_score, name). Without any, live and the candidate
    #[arg(long = "configuration", value_name = "SPEC", value_parser = |text: &str| ConfigurationSpec::try_from(text))]
    pub configurations: Vec<ConfigurationSpec>,
    /// The configuration that all others are compared with
    #[arg(long, default_value = "raw", value_name = "NAME")]
    pub baseline: String,
    /// Cut-offs: hit@k for each of them, other measures at the largest
    #[arg(short, long, default_value = "1,5,10", value_name = "K,…", value_parser = |text: &str| Cutoffs::try_from(text))]
    pub k: Cutoffs,
    /// Minutes of manual correction that one false first hit costs
    #[arg(long, value_name = "MINUTES", requires = "queries_per_day", value_parser = parse_positive)]
    pub minutes_per_false_hit: Option<f64>,
    /// Queries per day
    #[arg(long, value_name = "N", requires = "minutes_per_false_hit", value_parser = parse_positive)]
    pub queries_per_day: Option<f64>,
    /// Cost of an hour of correction, in any currency
    #[arg(long, value_name = "MONEY", requires = "minutes_per_false_hit", value_parser = parse_positive)]
    pub hourly_cost: Option<f64>,
    /// Target share of false ones among the shown first hits, for choosing `min_score`
    #[arg(long, default_value_t = 0.2, value_name = "SHARE", value_parser = parse_share)]
    pub target_false_hit_rate: f64,
    /// Largest share of relevant first hits that the no-match rule may hide
    #[arg(long, default_value_t = 0.05, value_name = "SHARE", value_parser = parse_share)]
    pub max_lost_hits: f64,
    /// Print the thresholds of this configuration, in the form that the catalogue state has
    #[arg(long, value_name = "NAME")]
    pub calibrate: Option<String>,
    /// Store the thresholds with the configuration, live or candidate
    #[arg(long, requires = "calibrate")]
    pub store: bool,
    /// Write the report as one self-contained HTML file
    #[arg(long, value_name = "FILE")]
    pub report: Option<PathBuf>,
    /// Leave the pictures out of the HTML file
    #[arg(long, requires = "report")]
    pub no_thumbnails: bool,
    /// Write the report as JSON; `-` prints it instead of the tables
    #[arg(long, value_name = "FILE")]
    pub json: Option<PathBuf>,
    /// Write the rankings of every configuration as a TREC run, and the judgements, into this folder
    #[arg(long, value_name = "FOLDER")]
    pub runs: Option<PathBuf>,
    /// Options of `--synthetic`.
    #[command(flatten)]
    pub drawing: SyntheticCatalogueArgs,
}

/// What `--synthetic` draws.
#[derive(Debug, Clone, Args)]
pub struct SyntheticCatalogueArgs {
    /// With --synthetic: number of pictures
    #[arg(long, default_value_t = 2_000, value_parser = clap::value_parser!(u64).range(10..=1_000_000))]
    pub count: u64,
    /// With --synthetic: queries per difficulty, if there are as many
    #[arg(long, default_value_t = 150)]
    pub per_difficulty: usize,
    /// With --synthetic: seed of pictures and queries
    #[arg(long, default_value_t = 2)]
    pub seed: u64,
    /// With --synthetic: another checkpoint than that of the demo
    #[arg(long, value_name = "FOLDER|ID")]
    pub checkpoint: Option<String>,
}

/// Actions of `bsap evaluate` that need no catalogue.
#[derive(Debug, Subcommand)]
pub enum EvaluateAction {
    /// Compare configurations on embeddings that you have: no model, no Kafka, no table
    Arrays(EvaluateArraysArgs),
    /// Measure rankings of any program: TREC runs and judgements
    Rankings(EvaluateRankingsArgs),
}

fn parse_positive(text: &str) -> Result<f64, String> {
    let number = text.parse().ok().filter(|n: &f64| n.is_finite() && *n > 0.0);
    number.ok_or_else(|| format!("{text:?} is not a number above 0"))
}

fn parse_share(text: &str) -> Result<f64, String> {
    let number = text.parse().ok().filter(|n: &f64| (0.0..1.0).contains(n));
    number.ok_or_else(|| format!("{text:?} is not a share from 0 to below 1"))
}
