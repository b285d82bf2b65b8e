//! Prints reports, and writes them and rankings to the files that arguments name.

use std::path::Path;

use anyhow::Context;

use crate::commands::shared::printing::print_line;
use crate::evaluate::{CorpusImage, ImageGrades, QueryRanking, trec};

/// Writes a file; `option` names it in errors.
pub fn write_file(path: &Path, text: &str, option: &str) -> anyhow::Result<()> {
    std::fs::write(path, text).with_context(|| format!("{option}: {}", path.display()))
}

/// Prints a report. With `--json FILE` also writes it as JSON; with `--json -` prints only JSON.
pub fn print_report(json_file: Option<&Path>, terminal: &str, json: &str) -> anyhow::Result<()> {
    match json_file {
        Some(path) if path.as_os_str() == "-" => print_line!("{json}"),
        Some(path) => {
            print_line!("{terminal}");
            write_file(path, json, "--json")?;
        }
        None => print_line!("{terminal}"),
    }
    Ok(())
}

/// Writes the rankings of every configuration as a TREC run, and the judgements, for `--runs`.
pub fn write_rankings(
    folder: &Path,
    names: &[&str],
    rankings: &[Vec<QueryRanking>],
    image_grades: &[ImageGrades],
    images: &[CorpusImage],
) -> anyhow::Result<()> {
    std::fs::create_dir_all(folder).with_context(|| format!("--runs: {}", folder.display()))?;
    for (number, name) in names.iter().enumerate() {
        let file = folder.join(format!("{}.run", to_file_name(name)));
        let run = trec::format_run(rankings, image_grades.len(), images, number);
        write_file(&file, &run, "--runs")?;
    }
    let qrels = trec::format_qrels(image_grades, images);
    write_file(&folder.join("qrels.txt"), &qrels, "--runs")
}

/// Returns the name of a configuration as a file name.
fn to_file_name(name: &str) -> String {
    let replace_illegal = |c: char| if c.is_alphanumeric() || "-_.=".contains(c) { c } else { '_' };
    name.chars().map(replace_illegal).take(100).collect()
}
