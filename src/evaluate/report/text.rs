//! A report for the terminal.

use comfy_table::presets::UTF8_BORDERS_ONLY;
use comfy_table::{ContentArrangement, Table};

use super::{Finding, Report, finding, percent};
use crate::evaluate::compare::Outcome;
use crate::evaluate::measures::interval::Column;
use crate::evaluate::trec::Measured;

/// Widest line of the words around the tables.
const WIDTH: usize = 100;

pub(crate) fn table(header: Vec<String>) -> Table {
    let mut table = Table::new();
    table.load_style(UTF8_BORDERS_ONLY).set_header(header);
    table.set_content_arrangement(ContentArrangement::Dynamic);
    table
}

fn signed(value: f64) -> String {
    format!("{value:+.3}").replace('-', "−")
}

/// A gain, marked where it is measurable.
fn gain(measure: &str, column: &Column) -> String {
    let mark = match finding(measure, column) {
        Finding::Better => " ▲",
        Finding::Worse => " ▼",
        Finding::None => "",
    };
    format!(
        "{}{mark}\n{} to {}",
        signed(column.gain.mean),
        signed(column.gain.low),
        signed(column.gain.high)
    )
}

pub(crate) fn wrap(text: &str) -> String {
    let mut lines = vec![String::new()];
    for word in text.split_whitespace() {
        let line =
            lines.last_mut().filter(|l| l.is_empty() || l.chars().count() + word.len() < WIDTH);
        match line {
            Some(line) if line.is_empty() => line.push_str(word),
            Some(line) => {
                line.push(' ');
                line.push_str(word);
            }
            None => lines.push(word.to_owned()),
        }
    }
    lines.join("\n")
}

/// The report in tables and words.
pub fn terminal(report: &Report) -> String {
    let mut parts = vec![head(report)];
    if report.queries.judged > 0 {
        parts.push(format!("Means, 95 % intervals\n{}", values(report)));
        if report.others().next().is_some() {
            parts.push(format!(
                "Gain over {}, query by query (▲ better, ▼ worse, measurably)\n{}",
                report.baseline,
                gains(report)
            ));
        }
        parts.extend(groups(report));
    }
    if report.configurations.iter().any(|outcome| outcome.hubness.is_some()) {
        parts.push(format!("Rankings\n{}", rankings(report)));
    }
    parts.extend(thresholds(report));
    parts.extend(report.others().filter_map(changes));
    parts.push(wrap(&report.verdict));
    parts.join("\n\n")
}

fn head(report: &Report) -> String {
    let q = &report.queries;
    let mut lines = vec![format!("{}, report {:.12}", report.catalogue, report.fingerprint)];
    for model in &report.models {
        lines.push(format!(
            "{} images by {} ({:.12}), generation {} ({})",
            model.images, model.model, model.fingerprint, model.generation, model.role
        ));
    }
    lines.push(format!(
        "{} queries from {}: {} judged, {} that match nothing, {} not judged, {} left out",
        q.asked, q.source, q.judged, q.nothing, q.unknown, q.left_out
    ));
    lines.extend(report.notes.iter().map(|note| wrap(&format!("Note: {note}"))));
    lines.join("\n")
}

fn values(report: &Report) -> Table {
    let mut header = vec!["configuration".to_owned()];
    header.extend(report.measures.iter().cloned());
    let mut table = table(header);
    for outcome in &report.configurations {
        let Some(all) = &outcome.all else { continue };
        let mut row = vec![outcome.name.clone()];
        row.extend(
            all.columns
                .iter()
                .map(|c| format!("{:.3}\n{:.3}–{:.3}", c.value.mean, c.value.low, c.value.high)),
        );
        table.add_row(row);
    }
    table
}

fn gains(report: &Report) -> Table {
    let mut header = vec!["configuration".to_owned()];
    header.extend(report.measures.iter().cloned());
    let mut table = table(header);
    for outcome in report.others() {
        let Some(all) = &outcome.all else { continue };
        let mut row = vec![outcome.name.clone()];
        row.extend(report.measures.iter().zip(&all.columns).map(|(name, c)| gain(name, c)));
        table.add_row(row);
    }
    table
}

/// hit at the smallest cut-off, by group.
fn groups(report: &Report) -> Option<String> {
    let names: Vec<&String> = report.configurations.first()?.groups.keys().collect();
    let measure = report.measures.first()?;
    if names.is_empty() {
        return None;
    }
    let mut header = vec!["configuration".to_owned()];
    let count = |name: &String| report.configurations[0].groups[name].queries;
    header.extend(names.iter().map(|name| format!("{name} ({})", count(name))));
    let mut table = table(header);
    for outcome in &report.configurations {
        let mut row = vec![outcome.name.clone()];
        row.extend(names.iter().map(|name| {
            let column = outcome.groups.get(*name).and_then(|s| s.columns.first());
            column.map_or("–".into(), |c| {
                format!("{:.3}\n{:.3}–{:.3}", c.value.mean, c.value.low, c.value.high)
            })
        }));
        table.add_row(row);
    }
    Some(format!("{measure} by group (judged queries)\n{table}"))
}

/// The queries that change most.
fn changes(outcome: &Outcome) -> Option<String> {
    let lists = [
        ("lose most", &outcome.changes.worse),
        ("gain most", &outcome.changes.better),
        ("change most", &outcome.changes.moved),
    ];
    let mut lines = Vec::new();
    for (word, list) in lists.iter().filter(|(_, list)| !list.is_empty()) {
        let texts: Vec<String> = list
            .iter()
            .map(|change| match change.gain {
                Some(gain) => format!("“{}” ({})", change.text, signed(gain)),
                None => format!("“{}” ({} shared)", change.text, percent(change.overlap)),
            })
            .collect();
        lines.push(wrap(&format!("Queries that {word}: {}", texts.join(", "))));
    }
    (!lines.is_empty()).then(|| format!("{} at work\n{}", outcome.name, lines.join("\n")))
}

fn rankings(report: &Report) -> Table {
    let header = [
        "configuration",
        "first result changed",
        "any of the best changed",
        "overlap",
        "hubness (skew)",
        "images never found",
        "most frequent first",
    ];
    let mut table = table(header.map(String::from).into());
    for outcome in &report.configurations {
        let share = |value: Option<f64>| value.map_or("–".into(), percent);
        let stability = outcome.stability.as_ref();
        let hubness = outcome.hubness.as_ref();
        let hub = hubness.and_then(|hubness| hubness.hubs.first());
        table.add_row([
            outcome.name.clone(),
            share(stability.map(|s| s.first_changed.mean)),
            share(stability.map(|s| s.any_changed.mean)),
            share(stability.map(|s| s.overlap.mean)),
            hubness.map_or("–".into(), |hubness| format!("{:.2}", hubness.skewness)),
            share(hubness.map(|hubness| hubness.never)),
            hub.map_or("–".into(), |hub| format!("{} of queries", percent(hub.share))),
        ]);
    }
    table
}

fn thresholds(report: &Report) -> Option<String> {
    let with: Vec<(&Outcome, _)> = report
        .configurations
        .iter()
        .filter_map(|outcome| Some((outcome, outcome.thresholds.as_ref()?)))
        .collect();
    if with.is_empty() {
        return None;
    }
    let header = [
        "configuration",
        "no match if",
        "flags",
        "good first hits lost",
        "min_score",
        "first hits shown",
        "false ones among them",
    ];
    let mut table = table(header.map(String::from).into());
    for (outcome, found) in with {
        let rule = found
            .no_match
            .map_or("no rule".into(), |rule| format!("{} < {:.3}", rule.signal.name(), rule.below));
        let interval = |i: Option<crate::evaluate::measures::interval::Interval>| {
            i.map_or("–".into(), |i| {
                format!("{} ({:.1}–{:.1})", percent(i.mean), i.low * 100.0, i.high * 100.0)
            })
        };
        let held = &found.held_out;
        let flagged: Vec<String> = held
            .flagged
            .iter()
            .map(|f| format!("{} {}", f.kind.name(), interval(f.share)))
            .collect();
        table.add_row([
            outcome.name.clone(),
            rule,
            flagged.join("\n"),
            interval(held.lost),
            found.min_score.map_or("none".into(), |score| format!("{score:.4}")),
            interval(held.shown),
            interval(held.false_hits),
        ]);
    }
    Some(format!(
        "Thresholds, chosen on one half of the queries and measured on the other\n{table}"
    ))
}

/// Measured runs in a table.
pub fn terminal_runs(measures: &[String], runs: &[Measured]) -> String {
    let mut header = vec!["run".to_owned(), "queries".to_owned()];
    header.extend(measures.iter().cloned());
    let mut table = table(header);
    for (place, run) in runs.iter().enumerate() {
        let mut row = vec![run.name.clone(), run.queries.to_string()];
        row.extend(measures.iter().zip(&run.columns).map(|(name, c)| {
            let own = format!("{:.3} ({:.3}–{:.3})", c.value.mean, c.value.low, c.value.high);
            if place == 0 { own } else { format!("{own}\n{}", gain(name, c)) }
        }));
        table.add_row(row);
    }
    format!("{table}")
}
