//! Prints reports, and writes reports and rankings to files.

use std::path::Path;

use anyhow::Context;
use tokio_util::sync::CancellationToken;

use super::arguments::EvaluateArgs;
use super::thumbnails::ThumbnailSource;
use crate::commands::shared::error::CommandResult;
use crate::commands::shared::printing::{print_line, print_note};
use crate::evaluate::{self, Corpus, Evaluation, EvaluationReport, RankingConfiguration, trec};

/// Writes a file; `option` names it in errors.
pub fn write_file(path: &Path, text: &str, option: &str) -> anyhow::Result<()> {
    std::fs::write(path, text).with_context(|| format!("{option}: {}", path.display()))
}

/// Prints a report. With `--json FILE` also writes it as JSON; with `--json -` prints only JSON.
pub fn print_report(args: &EvaluateArgs, terminal: &str, json: &str) -> anyhow::Result<()> {
    match &args.json {
        Some(path) if path.as_os_str() == "-" => print_line!("{json}"),
        Some(path) => {
            print_line!("{terminal}");
            write_file(path, json, "--json")?;
        }
        None => print_line!("{terminal}"),
    }
    Ok(())
}

/// Prints the report, and writes JSON, rankings and judgements if the arguments name files for them.
pub fn write_outputs(
    args: &EvaluateArgs,
    evaluated: &Evaluation,
    corpus: &Corpus,
    configurations: &[RankingConfiguration],
) -> CommandResult {
    let report = &evaluated.report;
    print_report(args, &evaluate::render_terminal(report), &serde_json::to_string_pretty(report)?)?;
    if let Some(folder) = &args.runs {
        std::fs::create_dir_all(folder).with_context(|| format!("--runs: {}", folder.display()))?;
        for (number, configuration) in configurations.iter().enumerate() {
            let file = folder.join(format!("{}.run", to_file_name(&configuration.name)));
            let run =
                trec::format_run(&evaluated.rankings, evaluated.image_grades.len(), corpus, number);
            write_file(&file, &run, "--runs")?;
        }
        let qrels = trec::format_qrels(&evaluated.image_grades, corpus);
        write_file(&folder.join("qrels.txt"), &qrels, "--runs")?;
    }
    Ok(())
}

/// Writes the HTML report if `--report` is given.
pub async fn write_html_report(
    args: &EvaluateArgs,
    report: &EvaluationReport,
    corpus: &Corpus,
    source: ThumbnailSource<'_>,
    token: &CancellationToken,
) -> CommandResult {
    let Some(path) = &args.report else { return Ok(()) };
    let source = if args.no_thumbnails { ThumbnailSource::None } else { source };
    let (pictures, missing) = source.load_thumbnails(report, corpus, token).await?;
    let html = evaluate::render_html(report, &pictures);
    write_file(path, &html, "--report")?;
    // Standard output may be the JSON report.
    print_note!("written: {}", path.display());
    if missing > 0 {
        print_note!(
            "{missing} pictures could not be fetched and are left out; fetch.file_roots and fetch.store_options say what may be fetched"
        );
    }
    Ok(())
}

/// Returns the name of a configuration as a file name.
fn to_file_name(name: &str) -> String {
    let replace_illegal = |c: char| if c.is_alphanumeric() || "-_.=".contains(c) { c } else { '_' };
    name.chars().map(replace_illegal).take(100).collect()
}
