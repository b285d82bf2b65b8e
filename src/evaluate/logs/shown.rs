//! The report of logs in tables and words, and as one HTML file.

use std::fmt::Write as _;

use super::{Answers, LogReport, Shadow, TENTHS};
use crate::evaluate::measures::interval::Interval;
use crate::evaluate::report::chart::{Bar, escape, intervals, short};
use crate::evaluate::report::html::{STYLE, table};
use crate::evaluate::report::text::{self, wrap};
use crate::evaluate::report::{Finding, percent};

/// Longest query that is shown whole.
const TEXT: usize = 80;

/// The report for a terminal.
pub fn terminal(report: &LogReport) -> String {
    let mut parts = vec![head(report)];
    let tables = [shadows(report), overlaps(report), answers(report)];
    let most = report.shadows.iter().filter(|shadow| !shadow.most.is_empty()).map(most);
    for (title, header, rows) in tables.into_iter().chain(most).filter(|(.., r)| !r.is_empty()) {
        let mut table = text::table(header);
        table.add_rows(rows);
        parts.push(format!("{title}\n{table}"));
    }
    if !report.problems.is_empty() {
        parts.push(format!("Lines that could not be used\n{}", report.problems.join("\n")));
    }
    parts.push(wrap(&report.verdict));
    parts.join("\n\n")
}

/// The report as a page that needs nothing from elsewhere.
pub fn html(report: &LogReport) -> String {
    let mut page = format!(
        "<!doctype html>\n<html lang=\"en\"><head><meta charset=\"utf-8\"><meta name=\"viewport\" content=\"width=device-width, initial-scale=1\"><meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\"><title>What the logs tell</title><style>{STYLE}</style></head><body><main><header><h1>What would the candidate change?</h1><p class=\"muted\">{}</p></header><section class=\"verdict\"><p>{}</p></section>",
        escape(&head(report)).replace('\n', "<br>"),
        escape(&report.verdict)
    );
    let bars: Vec<Bar> = report
        .shadows
        .iter()
        .map(|shadow| Bar {
            name: format!("{} beside {}", shadow.candidate, shadow.live),
            interval: shadow.first_changed,
            finding: Finding::None,
        })
        .collect();
    if !bars.is_empty() {
        let title = "Share of the answers with another first result, in percent";
        let chart = intervals(title, &bars, true, "", 100.0);
        let _ = write!(page, "<section><h2>{title}</h2>{chart}</section>");
    }
    let tables = [shadows(report), overlaps(report), answers(report)];
    let most = report.shadows.iter().filter(|shadow| !shadow.most.is_empty()).map(most);
    for (title, header, rows) in tables.into_iter().chain(most) {
        if !rows.is_empty() {
            let _ = write!(page, "<section><h2>{}</h2>", escape(&title));
            let escaped = |row: &Vec<String>| {
                row.iter().map(|cell| escape(cell).replace('\n', "<br>")).collect::<Vec<_>>()
            };
            table(&mut page, &header, &rows.iter().map(escaped).collect::<Vec<_>>());
            page.push_str("</section>");
        }
    }
    if !report.problems.is_empty() {
        page.push_str("<section><h2>Lines that could not be used</h2><ul class=\"facts\">");
        for problem in &report.problems {
            let _ = write!(page, "<li>{}</li>", escape(problem));
        }
        page.push_str("</ul></section>");
    }
    let _ = writeln!(
        page,
        "<section><h2>What this rests on</h2><ul class=\"facts\"><li>{}</li><li>Lines that count: <code>{}</code>, bsap {}. Intervals, 95 %: bootstrap, 1,000 samples of queries with all of their answers.</li></ul></section></main></body></html>",
        report.sources.iter().map(|file| escape(file)).collect::<Vec<_>>().join(", "),
        escape(&report.fingerprint),
        escape(&report.version)
    );
    page
}

type Shown = (String, Vec<String>, Vec<Vec<String>>);

fn head(report: &LogReport) -> String {
    let time = |at: Option<chrono::DateTime<chrono::Utc>>| {
        at.map_or("?".into(), |at| at.format("%Y-%m-%d %H:%M UTC").to_string())
    };
    format!(
        "{} to {}, report {:.12}\n{} lines: {} passed over, {} that could not be used",
        time(report.from),
        time(report.to),
        report.fingerprint,
        report.lines,
        report.skipped,
        report.malformed
    )
}

fn header(names: &[&str]) -> Vec<String> {
    names.iter().map(|name| (*name).to_owned()).collect()
}

fn interval(i: &Interval) -> String {
    format!("{}\n{:.1}–{:.1}", percent(i.mean), i.low * 100.0, i.high * 100.0)
}

fn shadows(report: &LogReport) -> Shown {
    let row = |shadow: &Shadow| {
        let differs = match shadow.differs {
            None => "too few queries to tell",
            Some(true) => "answers differ",
            Some(false) => "no measurable difference",
        };
        vec![
            format!("{} beside {}", shadow.candidate, shadow.live),
            shadow.compared.to_string(),
            shadow.queries.to_string(),
            interval(&shadow.first_changed),
            interval(&shadow.overlap),
            interval(&shadow.same),
            differs.to_owned(),
        ]
    };
    let names = [
        "candidate",
        "answers compared",
        "different queries",
        "first result changed",
        "results shared",
        "the same in all places",
        "found",
    ];
    let title = "Computed in the shadow, 95 % intervals".to_owned();
    (title, header(&names), report.shadows.iter().map(row).collect())
}

fn overlaps(report: &LogReport) -> Shown {
    let mut names = header(&["candidate"]);
    names.extend((0..TENTHS).map(|tenth| match tenth * 10 {
        100 => "all".to_owned(),
        percent => format!("{percent}–{} %", percent + 10),
    }));
    let row = |shadow: &Shadow| {
        let share = |count: &u64| percent(*count as f64 / shadow.compared.max(1) as f64);
        let mut row = vec![shadow.candidate.clone()];
        row.extend(shadow.overlaps.iter().map(share));
        row
    };
    let title = "Answers by their share of common results".to_owned();
    (title, names, report.shadows.iter().map(row).collect())
}

fn answers(report: &LogReport) -> Shown {
    let row = |answers: &Answers| {
        let share = |i: Option<Interval>| i.as_ref().map_or("–".into(), interval);
        vec![
            answers.configuration.clone(),
            answers.answers.to_string(),
            answers.queries.to_string(),
            share(answers.moved),
            share(answers.first_moved),
            share(answers.no_match),
            share(answers.wrong),
            answers.scan_ms.map_or("–".into(), |ms| {
                format!("{:.1} ms\n{:.1}–{:.1}", ms.mean, ms.low, ms.high)
            }),
        ]
    };
    let names = [
        "configuration",
        "answers",
        "different queries",
        "results moved by balancing",
        "first result moved",
        "nothing matches",
        "of the feedback, wrong",
        "pass over the catalogue",
    ];
    let title = "Answered, each to its own share of the queries, 95 % intervals".to_owned();
    (title, header(&names), report.answers.iter().map(row).collect())
}

fn most(shadow: &Shadow) -> Shown {
    let rows = shadow.most.iter().map(|changed| {
        vec![
            changed.text.as_ref().map_or_else(|| changed.query_hash.clone(), |t| short(t, TEXT)),
            changed.compared.to_string(),
            percent(changed.overlap),
            percent(changed.first_changed),
        ]
    });
    let names = ["query", "answers", "results shared", "first result changed"];
    let title = format!("Queries that {} changes most", shadow.candidate);
    (title, header(&names), rows.collect())
}
