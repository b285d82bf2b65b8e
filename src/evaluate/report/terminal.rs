//! Renders a report as tables and text for the terminal.

use comfy_table::presets::UTF8_BORDERS_ONLY;
use comfy_table::{ContentArrangement, Table};

use super::{EvaluationReport, MeasuredDifference, classify_difference, format_percent};
use crate::evaluate::compare::ConfigurationResult;
use crate::evaluate::measures::FALSE_HIT_MEASURE;
use crate::evaluate::measures::interval::{ConfidenceInterval, MeasureComparison};
use crate::evaluate::trec::MeasuredTrecRun;

/// Maximum width of text around the tables, in characters.
const LINE_WIDTH_CHARS: usize = 100;

pub(crate) fn new_table(header: Vec<String>) -> Table {
    let mut table = Table::new();
    table.load_style(UTF8_BORDERS_ONLY).set_header(header);
    table.set_content_arrangement(ContentArrangement::Dynamic);
    table
}

fn format_signed(value: f64) -> String {
    format!("{value:+.3}").replace('-', "−")
}

/// Formats a gain with its interval, marked if it is significant.
fn format_gain(measure: &str, comparison: &MeasureComparison) -> String {
    let mark = match classify_difference(measure, comparison) {
        MeasuredDifference::Better => " ▲",
        MeasuredDifference::Worse => " ▼",
        MeasuredDifference::NotSignificant => "",
    };
    format!(
        "{}{mark}\n{} to {}",
        format_signed(comparison.gain.mean),
        format_signed(comparison.gain.low),
        format_signed(comparison.gain.high)
    )
}

/// Wraps text at [`LINE_WIDTH_CHARS`].
pub(crate) fn wrap_words(text: &str) -> String {
    let mut lines = vec![String::new()];
    for word in text.split_whitespace() {
        let line = lines
            .last_mut()
            .filter(|l| l.is_empty() || l.chars().count() + word.len() < LINE_WIDTH_CHARS);
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

/// Renders the report.
pub fn render_terminal(report: &EvaluationReport) -> String {
    let mut parts = vec![format_head(report)];
    if report.queries.judged > 0 {
        parts.push(format!("Means, 95 % intervals\n{}", value_table(report)));
        if report.non_baseline_results().next().is_some() {
            parts.push(format!(
                "Gain over {}, per query (▲ significantly better, ▼ significantly worse)\n{}",
                report.baseline,
                gain_table(report)
            ));
        }
        parts.extend(group_table(report));
    }
    if report.configurations.iter().any(|result| result.hubness.is_some()) {
        parts.push(format!("Rankings\n{}", ranking_table(report)));
    }
    parts.extend(bank_table(report));
    parts.extend(separation_table(report));
    parts.extend(threshold_table(report));
    parts.extend(report.non_baseline_results().filter_map(format_changes));
    parts.push(wrap_words(&report.verdict));
    parts.join("\n\n")
}

fn format_head(report: &EvaluationReport) -> String {
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
        q.total, q.source, q.judged, q.judged_no_match, q.unjudged, q.without_relevant_image
    ));
    lines.extend(report.notes.iter().map(|note| wrap_words(&format!("Note: {note}"))));
    lines.join("\n")
}

fn value_table(report: &EvaluationReport) -> Table {
    let mut header = vec!["configuration".to_owned()];
    header.extend(report.measures.iter().cloned());
    let mut table = new_table(header);
    for result in &report.configurations {
        let Some(all) = &result.overall else { continue };
        let mut row = vec![result.name.clone()];
        row.extend(
            all.measures
                .iter()
                .map(|c| format!("{:.3}\n{:.3}–{:.3}", c.value.mean, c.value.low, c.value.high)),
        );
        table.add_row(row);
    }
    table
}

fn gain_table(report: &EvaluationReport) -> Table {
    let mut header = vec!["configuration".to_owned()];
    header.extend(report.measures.iter().cloned());
    let mut table = new_table(header);
    for result in report.non_baseline_results() {
        let Some(all) = &result.overall else { continue };
        let mut row = vec![result.name.clone()];
        row.extend(report.measures.iter().zip(&all.measures).map(|(name, c)| format_gain(name, c)));
        table.add_row(row);
    }
    table
}

/// Returns a table of hit@k at the smallest cut-off, by group.
fn group_table(report: &EvaluationReport) -> Option<String> {
    let names: Vec<&String> = report.configurations.first()?.groups.keys().collect();
    let measure = report.measures.first()?;
    if names.is_empty() {
        return None;
    }
    let mut header = vec!["configuration".to_owned()];
    let query_count = |name: &String| report.configurations[0].groups[name].queries;
    header.extend(names.iter().map(|name| format!("{name} ({})", query_count(name))));
    let mut table = new_table(header);
    for result in &report.configurations {
        let mut row = vec![result.name.clone()];
        row.extend(names.iter().map(|name| {
            let comparison = result.groups.get(*name).and_then(|s| s.measures.first());
            comparison.map_or("–".into(), |c| {
                format!("{:.3}\n{:.3}–{:.3}", c.value.mean, c.value.low, c.value.high)
            })
        }));
        table.add_row(row);
    }
    Some(format!("{measure} by group (judged queries)\n{table}"))
}

/// Lists the queries that change most.
fn format_changes(result: &ConfigurationResult) -> Option<String> {
    let lists = [
        ("lose most", &result.changes.worsened),
        ("gain most", &result.changes.improved),
        ("change most", &result.changes.unjudged),
    ];
    let mut lines = Vec::new();
    for (word, list) in lists.iter().filter(|(_, list)| !list.is_empty()) {
        let texts: Vec<String> = list
            .iter()
            .map(|change| match change.gain {
                Some(gain) => format!("“{}” ({})", change.text, format_signed(gain)),
                None => format!("“{}” ({} shared)", change.text, format_percent(change.overlap)),
            })
            .collect();
        lines.push(wrap_words(&format!("Queries that {word}: {}", texts.join(", "))));
    }
    (!lines.is_empty()).then(|| format!("Changes by {}\n{}", result.name, lines.join("\n")))
}

fn ranking_table(report: &EvaluationReport) -> Table {
    let header = [
        "configuration",
        "first result changed",
        "any of the best changed",
        "overlap",
        "hubness (skew)",
        "images never found",
        "most frequent first",
    ];
    let mut table = new_table(header.map(String::from).into());
    for result in &report.configurations {
        let share = |value: Option<f64>| value.map_or("–".into(), format_percent);
        let stability = result.stability.as_ref();
        let hubness = result.hubness.as_ref();
        let hub = hubness.and_then(|hubness| hubness.hubs.first());
        table.add_row([
            result.name.clone(),
            share(stability.map(|s| s.top_hit_changed.mean)),
            share(stability.map(|s| s.any_changed.mean)),
            share(stability.map(|s| s.overlap.mean)),
            hubness.map_or("–".into(), |hubness| format!("{:.2}", hubness.skewness)),
            share(hubness.map(|hubness| hubness.never_ranked_share)),
            hub.map_or("–".into(), |hub| format!("{} of queries", format_percent(hub.share))),
        ]);
    }
    table
}

/// Returns a table of how well the prompts of each configuration fit the queries.
fn bank_table(report: &EvaluationReport) -> Option<String> {
    let header = ["configuration", "prompts", "fit", "concentration", "proposed weight", "because"];
    let mut table = new_table(header.map(String::from).into());
    for result in &report.configurations {
        let Some(bank) = &result.bank else { continue };
        let fit = bank.fit.map_or("–".into(), |fit| {
            format!("{:.2} ({:.2}–{:.2})", fit.value, fit.low, fit.high)
        });
        table.add_row([
            result.name.clone(),
            bank.texts.to_string(),
            fit,
            bank.concentration.map_or("–".into(), |value| format!("{value:.2}")),
            bank.proposed_weight.to_string(),
            bank.reason.clone(),
        ]);
    }
    (table.row_count() > 0).then(|| {
        format!("Prompts and queries, without judgements (95 % interval over queries)\n{table}")
    })
}

/// Returns a table of how well first results separate answerable queries from texts that nothing answers.
fn separation_table(report: &EvaluationReport) -> Option<String> {
    let kinds = &report.configurations.first()?.separation;
    if kinds.is_empty() {
        return None;
    }
    let mut header = vec!["configuration".to_owned(), "false first hits".to_owned()];
    header.extend(kinds.iter().map(|s| format!("AUROC against {} ({})", s.kind.name(), s.texts)));
    let mut table = new_table(header);
    for result in &report.configurations {
        let false_hits = report.measure_comparison(result, FALSE_HIT_MEASURE);
        let mut row = vec![result.name.clone()];
        row.push(false_hits.map_or("–".into(), |c| format_percent(c.value.mean)));
        row.extend(result.separation.iter().map(|separation| {
            let (auroc, gain) = (separation.auroc, separation.gain);
            let interval = format!("{:.3} ({:.3}–{:.3})", auroc.mean, auroc.low, auroc.high);
            if result.name == report.baseline {
                return interval;
            }
            let mark = match (gain.excludes_zero(), gain.mean > 0.0) {
                (true, true) => " ▲",
                (true, false) => " ▼",
                (false, _) => "",
            };
            format!("{interval}\n{}{mark}", format_signed(gain.mean))
        }));
        table.add_row(row);
    }
    Some(format!(
        "Queries with an answer against texts that nothing answers, by the score of the first result\n{table}"
    ))
}

fn threshold_table(report: &EvaluationReport) -> Option<String> {
    let with_thresholds: Vec<(&ConfigurationResult, _)> = report
        .configurations
        .iter()
        .filter_map(|result| Some((result, result.thresholds.as_ref()?)))
        .collect();
    if with_thresholds.is_empty() {
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
    let mut table = new_table(header.map(String::from).into());
    for (result, thresholds) in with_thresholds {
        let rule = thresholds.no_match.map_or("no rule".into(), |rule| {
            format!("{} < {:.3}", rule.signal.name(), rule.threshold)
        });
        let interval = |i: Option<ConfidenceInterval>| {
            i.map_or("–".into(), |i| {
                format!("{} ({:.1}–{:.1})", format_percent(i.mean), i.low * 100.0, i.high * 100.0)
            })
        };
        let held_out = &thresholds.held_out;
        let flagged: Vec<String> = held_out
            .flagged
            .iter()
            .map(|f| format!("{} {}", f.kind.name(), interval(f.share)))
            .collect();
        table.add_row([
            result.name.clone(),
            rule,
            flagged.join("\n"),
            interval(held_out.lost_hits),
            thresholds.min_score.map_or("none".into(), |score| format!("{score:.4}")),
            interval(held_out.shown_share),
            interval(held_out.false_hit_rate),
        ]);
    }
    Some(format!(
        "Thresholds, chosen on one half of the queries and measured on the other\n{table}"
    ))
}

/// Renders measured runs as a table; the first run is the baseline.
pub fn render_runs_terminal(measures: &[String], runs: &[MeasuredTrecRun]) -> String {
    let mut header = vec!["run".to_owned(), "queries".to_owned()];
    header.extend(measures.iter().cloned());
    let mut table = new_table(header);
    for (index, run) in runs.iter().enumerate() {
        let mut row = vec![run.name.clone(), run.queries.to_string()];
        row.extend(measures.iter().zip(&run.columns).map(|(name, c)| {
            let value = format!("{:.3} ({:.3}–{:.3})", c.value.mean, c.value.low, c.value.high);
            if index == 0 { value } else { format!("{value}\n{}", format_gain(name, c)) }
        }));
        table.add_row(row);
    }
    format!("{table}")
}
