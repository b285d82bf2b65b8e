//! `bsap evaluate rankings`: TREC runs of any program.

use std::path::{Path, PathBuf};

use clap::Args;

use crate::commands::shared::error::{CommandError, CommandResult};
use crate::commands::shared::printing::{print_line, print_note};
use crate::commands::shared::query_files::read_text_file;
use crate::evaluate::{self, Cutoffs, trec};

/// `bsap evaluate rankings`.
#[derive(Debug, Args)]
pub struct EvaluateRankingsArgs {
    /// Judgements: one line `query 0 image grade` each
    #[arg(long, value_name = "FILE")]
    pub qrels: PathBuf,
    /// Rankings: one line `query Q0 image rank score tag` each; the first file is compared with the others
    #[arg(long = "run", value_name = "FILE", required = true)]
    pub runs: Vec<PathBuf>,
    /// Cut-offs: hit@k for each of them, other measures at the largest
    #[arg(short, long, default_value = "1,5,10", value_name = "K,…", value_parser = |text: &str| Cutoffs::try_from(text))]
    pub k: Cutoffs,
    /// Print JSON, with the values of every query
    #[arg(long)]
    pub json: bool,
}

/// Measures TREC runs, and prints the measures.
pub fn evaluate_rankings(args: &EvaluateRankingsArgs) -> CommandResult {
    let name = |path: &Path| path.display().to_string();
    let qrels = trec::parse_qrels(&read_text_file(&args.qrels, "--qrels")?, &name(&args.qrels));
    let qrels = qrels.map_err(CommandError::usage)?;
    let mut runs = Vec::new();
    for path in &args.runs {
        let run = trec::parse_run(&read_text_file(path, "--run")?, &name(path))
            .map_err(CommandError::usage)?;
        runs.push((name(path), run));
    }
    let measured = trec::measure_runs(&runs, &qrels, &args.k);
    for run in measured.iter().filter(|run| run.tied_results > 0) {
        print_note!(
            "warning: {}: {} results have the score of an earlier result of their query, rounded to f32; as in trec_eval, they are ordered by id, the greatest first",
            run.name,
            run.tied_results
        );
    }
    if args.json {
        let names = args.k.measure_names();
        print_line!(
            "{}",
            serde_json::to_string_pretty(
                &serde_json::json!({"measures": names, "runs": measured})
            )?
        );
        return Ok(());
    }
    print_line!("{}", evaluate::render_runs_terminal(&args.k.measure_names(), &measured));
    Ok(())
}
