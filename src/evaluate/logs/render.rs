//! Renders the report on logs as tables and text for the terminal, and as one HTML file.

use std::fmt::Write as _;

use super::reader::OVERLAP_BINS;
use super::report::{ConfigurationAnswers, QueryLogReport, ShadowComparison};
use crate::evaluate::measures::interval::ConfidenceInterval;
use crate::evaluate::report::chart::{
    IntervalBar, draw_interval_chart, escape_html, truncate_text,
};
use crate::evaluate::report::html::STYLESHEET;
use crate::evaluate::report::html_tables::write_table;
use crate::evaluate::report::terminal::{self, wrap_words};
use crate::evaluate::report::{MeasuredDifference, format_percent};

/// Queries with more characters are truncated.
const MAX_SHOWN_QUERY_CHARS: usize = 80;

/// Renders the report for the terminal.
pub fn render_terminal(report: &QueryLogReport) -> String {
    let mut parts = vec![format_head(report)];
    let tables = [shadow_table(report), overlap_table(report), answer_table(report)];
    let most_changed = report
        .shadow_comparisons
        .iter()
        .filter(|shadow| !shadow.most_changed_queries.is_empty())
        .map(most_changed_table);
    for (title, header, rows) in
        tables.into_iter().chain(most_changed).filter(|(.., r)| !r.is_empty())
    {
        let mut table = terminal::new_table(header);
        table.add_rows(rows);
        parts.push(format!("{title}\n{table}"));
    }
    if !report.problems.is_empty() {
        parts.push(format!("Malformed lines\n{}", report.problems.join("\n")));
    }
    parts.push(wrap_words(&report.verdict));
    parts.join("\n\n")
}

/// Renders the report as an HTML page that loads nothing from elsewhere.
pub fn render_html(report: &QueryLogReport) -> String {
    let mut page = format!(
        "<!doctype html>\n<html lang=\"en\"><head><meta charset=\"utf-8\"><meta name=\"viewport\" content=\"width=device-width, initial-scale=1\"><meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\"><title>Evaluation of query logs</title><style>{STYLESHEET}</style></head><body><main><header><h1>What would the candidate change?</h1><p class=\"muted\">{}</p></header><section class=\"verdict\"><p>{}</p></section>",
        escape_html(&format_head(report)).replace('\n', "<br>"),
        escape_html(&report.verdict)
    );
    let bars: Vec<IntervalBar> = report
        .shadow_comparisons
        .iter()
        .map(|shadow| IntervalBar {
            row_label: format!("{} compared with {}", shadow.candidate, shadow.live),
            interval: shadow.top_hit_changed,
            difference: MeasuredDifference::NotSignificant,
        })
        .collect();
    if !bars.is_empty() {
        let title = "Share of the answers with another first result, in percent";
        let chart = draw_interval_chart(title, &bars, true, "", 100.0);
        let _ = write!(page, "<section><h2>{title}</h2>{chart}</section>");
    }
    let tables = [shadow_table(report), overlap_table(report), answer_table(report)];
    let most_changed = report
        .shadow_comparisons
        .iter()
        .filter(|shadow| !shadow.most_changed_queries.is_empty())
        .map(most_changed_table);
    for (title, header, rows) in tables.into_iter().chain(most_changed) {
        if !rows.is_empty() {
            let _ = write!(page, "<section><h2>{}</h2>", escape_html(&title));
            let escaped = |row: &Vec<String>| {
                row.iter().map(|cell| escape_html(cell).replace('\n', "<br>")).collect::<Vec<_>>()
            };
            write_table(&mut page, &header, &rows.iter().map(escaped).collect::<Vec<_>>());
            page.push_str("</section>");
        }
    }
    if !report.problems.is_empty() {
        page.push_str("<section><h2>Malformed lines</h2><ul class=\"facts\">");
        for problem in &report.problems {
            let _ = write!(page, "<li>{}</li>", escape_html(problem));
        }
        page.push_str("</ul></section>");
    }
    let _ = writeln!(
        page,
        "<section><h2>Sources and methods</h2><ul class=\"facts\"><li>{}</li><li>Fingerprint of the lines used: <code>{}</code>, bsap {}. Intervals, 95 %: bootstrap, 1,000 samples of queries with all of their answers.</li></ul></section></main></body></html>",
        report.log_files.iter().map(|file| escape_html(file)).collect::<Vec<_>>().join(", "),
        escape_html(&report.fingerprint),
        escape_html(&report.version)
    );
    page
}

/// Title, header and rows of a table.
type TitledTable = (String, Vec<String>, Vec<Vec<String>>);

fn format_head(report: &QueryLogReport) -> String {
    let time = |time: Option<chrono::DateTime<chrono::Utc>>| {
        time.map_or("?".into(), |time| time.format("%Y-%m-%d %H:%M UTC").to_string())
    };
    format!(
        "{} to {}, report {:.12}\n{} lines: {} skipped, {} malformed",
        time(report.from),
        time(report.to),
        report.fingerprint,
        report.lines,
        report.skipped,
        report.malformed
    )
}

fn to_header(names: &[&str]) -> Vec<String> {
    names.iter().map(|name| (*name).to_owned()).collect()
}

fn format_interval(i: &ConfidenceInterval) -> String {
    format!("{}\n{:.1}–{:.1}", format_percent(i.mean), i.low * 100.0, i.high * 100.0)
}

fn shadow_table(report: &QueryLogReport) -> TitledTable {
    let row = |shadow: &ShadowComparison| {
        let differs = match shadow.differs {
            None => "too few queries",
            Some(true) => "answers differ",
            Some(false) => "no measurable difference",
        };
        vec![
            format!("{} compared with {}", shadow.candidate, shadow.live),
            shadow.compared.to_string(),
            shadow.queries.to_string(),
            format_interval(&shadow.top_hit_changed),
            format_interval(&shadow.overlap),
            format_interval(&shadow.identical),
            differs.to_owned(),
        ]
    };
    let names = [
        "candidate",
        "answers compared",
        "different queries",
        "first result changed",
        "results shared",
        "same results in the same order",
        "conclusion",
    ];
    let title = "Shadow queries, 95 % intervals".to_owned();
    (title, to_header(&names), report.shadow_comparisons.iter().map(row).collect())
}

fn overlap_table(report: &QueryLogReport) -> TitledTable {
    let mut names = to_header(&["candidate"]);
    names.extend((0..OVERLAP_BINS).map(|bin| match bin * 10 {
        100 => "100 %".to_owned(),
        percent => format!("{percent}–{} %", percent + 10),
    }));
    let row = |shadow: &ShadowComparison| {
        let share = |count: &u64| format_percent(*count as f64 / shadow.compared.max(1) as f64);
        let mut row = vec![shadow.candidate.clone()];
        row.extend(shadow.overlap_histogram.iter().map(share));
        row
    };
    let title = "Answers by the share of results that both have".to_owned();
    (title, names, report.shadow_comparisons.iter().map(row).collect())
}

fn answer_table(report: &QueryLogReport) -> TitledTable {
    let row = |answers: &ConfigurationAnswers| {
        let share = |i: &Option<ConfidenceInterval>| i.as_ref().map_or("–".into(), format_interval);
        vec![
            answers.configuration.clone(),
            answers.answers.to_string(),
            answers.queries.to_string(),
            share(&answers.reranked),
            share(&answers.top_hit_changed),
            share(&answers.no_match),
            share(&answers.wrong),
            answers.scan_ms.map_or("–".into(), |ms| {
                format!("{:.1} ms\n{:.1}–{:.1}", ms.mean, ms.low, ms.high)
            }),
        ]
    };
    let names = [
        "configuration",
        "answers",
        "different queries",
        "results reranked by balancing",
        "first result changed by balancing",
        "nothing matches",
        "wrong, of the feedback",
        "scan over the catalogue",
    ];
    let title = "Answers by configuration, 95 % intervals".to_owned();
    (title, to_header(&names), report.answers.iter().map(row).collect())
}

fn most_changed_table(shadow: &ShadowComparison) -> TitledTable {
    let rows = shadow.most_changed_queries.iter().map(|changed| {
        vec![
            changed.text.as_ref().map_or_else(
                || changed.query_hash.clone(),
                |t| truncate_text(t, MAX_SHOWN_QUERY_CHARS),
            ),
            changed.compared.to_string(),
            format_percent(changed.overlap),
            format_percent(changed.top_hit_changed),
        ]
    });
    let names = ["query", "answers", "results shared", "first result changed"];
    let title = format!("Queries that {} changes most", shadow.candidate);
    (title, to_header(&names), rows.collect())
}
