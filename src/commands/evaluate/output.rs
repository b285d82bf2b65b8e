//! Prints and writes the report of an evaluation.

use tokio_util::sync::CancellationToken;

use super::arguments::EvaluateArgs;
use super::files::{print_report, write_file, write_rankings};
use crate::commands::shared::error::CommandResult;
use crate::commands::shared::evaluation::thumbnails::ThumbnailSource;
use crate::commands::shared::printing::print_note;
use crate::evaluate::{self, Corpus, Evaluation, EvaluationReport, RankingConfiguration};

/// Prints the report, and writes JSON, rankings and judgements if the arguments name files for them.
pub fn write_outputs(
    args: &EvaluateArgs,
    evaluated: &Evaluation,
    corpus: &Corpus,
    configurations: &[RankingConfiguration],
) -> CommandResult {
    let report = &evaluated.report;
    let terminal = evaluate::render_terminal(report);
    print_report(args.json.as_deref(), &terminal, &serde_json::to_string_pretty(report)?)?;
    if let Some(folder) = &args.runs {
        let names: Vec<&str> = configurations.iter().map(|c| c.name.as_str()).collect();
        let Evaluation { rankings, image_grades, .. } = evaluated;
        write_rankings(folder, &names, rankings, image_grades, &corpus.images)?;
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
