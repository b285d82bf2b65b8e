//! The tables of the HTML report.

use std::fmt::Write as _;

use super::chart::escape_html;
use super::{EvaluationReport, MeasuredDifference, classify_difference, format_percent};
use crate::evaluate::compare::Separation;
use crate::evaluate::measures::FALSE_HIT_MEASURE;
use crate::evaluate::measures::interval::{ConfidenceInterval, MeasureComparison};

/// Writes a table whose first column names the row. Header cells are escaped here; other cells are
/// markup already.
pub(crate) fn write_table(page: &mut String, header: &[String], rows: &[Vec<String>]) {
    page.push_str("<div class=\"scroll\"><table><thead><tr>");
    for cell in header {
        let _ = write!(page, "<th>{}</th>", escape_html(cell));
    }
    page.push_str("</tr></thead><tbody>");
    for row in rows {
        page.push_str("<tr>");
        for (index, cell) in row.iter().enumerate() {
            let tag = if index == 0 { "th" } else { "td" };
            let _ = write!(page, "<{tag}>{cell}</{tag}>");
        }
        page.push_str("</tr>");
    }
    page.push_str("</tbody></table></div>");
}

fn format_cell(measure: &str, comparison: &MeasureComparison, is_baseline: bool) -> String {
    let mut text = format!("<b>{:.3}</b>", comparison.value.mean);
    if is_baseline {
        let _ = write!(
            text,
            "<br><span class=\"muted\">{:.3} to {:.3}</span>",
            comparison.value.low, comparison.value.high
        );
        return text;
    }
    let class = match classify_difference(measure, comparison) {
        MeasuredDifference::Better => "better",
        MeasuredDifference::Worse => "worse",
        MeasuredDifference::NotSignificant => "muted",
    };
    let signed = |v: f64| format!("{v:+.3}").replace('-', "−");
    let _ = write!(
        text,
        "<br><span class=\"{class}\" title=\"p = {:.4}\">{}<br>{} to {}</span>",
        comparison.p_value,
        signed(comparison.gain.mean),
        signed(comparison.gain.low),
        signed(comparison.gain.high)
    );
    text
}

pub(super) fn write_measures(page: &mut String, report: &EvaluationReport) {
    if report.queries.judged == 0 {
        return;
    }
    let _ = write!(
        page,
        "<section><h2>All measures</h2><p class=\"muted\">Mean, and beneath it the gain over {} with its 95 % interval (for {0} itself the interval of the mean). Less is better for {FALSE_HIT_MEASURE}, more for all others.</p>",
        escape_html(&report.baseline)
    );
    let mut header = vec![String::new()];
    header.extend(report.measures.iter().cloned());
    let rows: Vec<Vec<String>> = report
        .configurations
        .iter()
        .filter_map(|result| {
            let all = result.overall.as_ref()?;
            let is_baseline = result.name == report.baseline;
            let mut row = vec![escape_html(&result.name)];
            let cells = report.measures.iter().zip(&all.measures);
            row.extend(cells.map(|(name, cell)| format_cell(name, cell, is_baseline)));
            Some(row)
        })
        .collect();
    write_table(page, &header, &rows);
    page.push_str("</section>");
}

pub(super) fn write_groups(page: &mut String, report: &EvaluationReport) {
    let Some(first) = report.configurations.first().filter(|o| !o.groups.is_empty()) else {
        return;
    };
    let Some(false_hit) = report.measures.iter().position(|name| name == FALSE_HIT_MEASURE) else {
        return;
    };
    page.push_str("<section><h2>False first results by group of queries</h2>");
    let mut header = vec![String::new()];
    header.extend(first.groups.iter().map(|(name, s)| format!("{name} ({})", s.queries)));
    let rows: Vec<Vec<String>> = report
        .configurations
        .iter()
        .map(|result| {
            let is_baseline = result.name == report.baseline;
            let mut row = vec![escape_html(&result.name)];
            row.extend(first.groups.keys().map(|name| {
                let group = result.groups.get(name).and_then(|s| s.measures.get(false_hit));
                group.map_or("–".into(), |comparison| {
                    format_cell(FALSE_HIT_MEASURE, comparison, is_baseline)
                })
            }));
            row
        })
        .collect();
    write_table(page, &header, &rows);
    page.push_str("<p class=\"muted\">Within groups p is not corrected for their number: with many groups, some differ by chance.</p></section>");
}

pub(super) fn write_rankings(page: &mut String, report: &EvaluationReport) {
    if report.configurations.iter().all(|result| result.hubness.is_none()) {
        return;
    }
    page.push_str("<section><h2>How rankings behave</h2>");
    let header = [
        "",
        "first result differs",
        "any of the best differs",
        "shared among the best",
        "hubness (0 is even)",
        "images never found",
        "most frequent first result",
    ];
    let rows: Vec<Vec<String>> = report
        .configurations
        .iter()
        .map(|result| {
            let share = |value: Option<f64>| value.map_or("–".into(), format_percent);
            let stability = result.stability.as_ref();
            let hubness = result.hubness.as_ref();
            let hub = hubness.and_then(|hubness| hubness.hubs.first());
            vec![
                escape_html(&result.name),
                share(stability.map(|s| s.top_hit_changed.mean)),
                share(stability.map(|s| s.any_changed.mean)),
                share(stability.map(|s| s.overlap.mean)),
                hubness.map_or("–".into(), |hubness| format!("{:.2}", hubness.skewness)),
                share(hubness.map(|hubness| hubness.never_ranked_share)),
                hub.map_or("–".into(), |hub| {
                    format!(
                        "{} of the queries: {}",
                        format_percent(hub.share),
                        escape_html(&hub.image_id)
                    )
                }),
            ]
        })
        .collect();
    write_table(page, &header.map(String::from), &rows);
    page.push_str("</section>");
}

/// Writes how well the prompts of each configuration fit the queries.
pub(super) fn write_banks(page: &mut String, report: &EvaluationReport) {
    let rows: Vec<Vec<String>> = report
        .configurations
        .iter()
        .filter_map(|result| {
            let bank = result.bank.as_ref()?;
            let fit = bank.fit.map_or("–".into(), |fit| {
                format!(
                    "<b>{:.2}</b><br><span class=\"muted\">{:.2} to {:.2}, {} queries</span>",
                    fit.value, fit.low, fit.high, fit.queries
                )
            });
            Some(vec![
                escape_html(&result.name),
                bank.texts.to_string(),
                fit,
                bank.concentration.map_or("–".into(), |value| format!("{value:.2}")),
                bank.proposed_weight.to_string(),
                escape_html(&bank.reason),
            ])
        })
        .collect();
    if rows.is_empty() {
        return;
    }
    page.push_str("<section><h2>Do the prompts fit the queries?</h2><p class=\"muted\">Without judgements. Fit: correlation, over the images, between the corrections by the prompts and by the queries. Concentration: how far the corrections of first results lie above the mean, in standard deviations.</p>");
    let header = ["", "prompts", "fit", "concentration", "proposed weight", "because"];
    write_table(page, &header.map(String::from), &rows);
    page.push_str("</section>");
}

/// Writes how well first results separate answerable queries from texts that nothing answers.
pub(super) fn write_separation(page: &mut String, report: &EvaluationReport) {
    let Some(first) = report.configurations.first().filter(|r| !r.separation.is_empty()) else {
        return;
    };
    page.push_str("<section><h2>Are wrong results recognised?</h2><p class=\"muted\">How well the score of the first result separates queries with an answer from texts that nothing answers: area under the ROC curve, 0.5 separates nothing, 1 everything. Intervals are DeLong's; a configuration can rank better and separate worse.</p>");
    let mut header = vec![String::new(), "false first results".to_owned()];
    header.extend(first.separation.iter().map(|s| format!("{} ({})", s.kind.name(), s.texts)));
    let rows: Vec<Vec<String>> = report
        .configurations
        .iter()
        .map(|result| {
            let false_hits = report.measure_comparison(result, FALSE_HIT_MEASURE);
            let mut row = vec![escape_html(&result.name)];
            row.push(false_hits.map_or("–".into(), |c| format_percent(c.value.mean)));
            let is_baseline = result.name == report.baseline;
            row.extend(result.separation.iter().map(|s| format_separation(s, is_baseline)));
            row
        })
        .collect();
    write_table(page, &header, &rows);
    page.push_str("</section>");
}

fn format_separation(separation: &Separation, is_baseline: bool) -> String {
    let (auroc, gain) = (separation.auroc, separation.gain);
    let value = format!("<b>{:.3}</b>", auroc.mean);
    if is_baseline {
        let (low, high) = (auroc.low, auroc.high);
        return format!("{value}<br><span class=\"muted\">{low:.3} to {high:.3}</span>");
    }
    let class = match (gain.excludes_zero(), gain.mean > 0.0) {
        (true, true) => "better",
        (true, false) => "worse",
        (false, _) => "muted",
    };
    let signed = |v: f64| format!("{v:+.3}").replace('-', "−");
    let [mean, low, high] = [gain.mean, gain.low, gain.high].map(signed);
    format!("{value}<br><span class=\"{class}\">{mean}<br>{low} to {high}</span>")
}

pub(super) fn write_thresholds(page: &mut String, report: &EvaluationReport) {
    if report.configurations.iter().all(|result| result.thresholds.is_none()) {
        return;
    }
    page.push_str("<section><h2>When not to trust a result</h2><p class=\"muted\">Chosen on one half of the queries and texts, measured here on the other half, with 95 % intervals.</p>");
    let header = [
        "",
        "nothing matches if",
        "flags of texts that match nothing",
        "flags of good first results",
        "minimum score",
        "first results shown",
        "wrong ones among them",
    ];
    let interval = |i: Option<ConfidenceInterval>| {
        i.map_or("–".to_owned(), |i| {
            format!("{} ({:.1} to {:.1})", format_percent(i.mean), i.low * 100.0, i.high * 100.0)
        })
    };
    let rows: Vec<Vec<String>> = report
        .configurations
        .iter()
        .filter_map(|result| {
            let thresholds = result.thresholds.as_ref()?;
            let held_out = &thresholds.held_out;
            let flagged: Vec<String> = held_out
                .flagged
                .iter()
                .map(|f| format!("{}: {}", f.kind.name(), interval(f.share)))
                .collect();
            let rule = thresholds.no_match.map_or("no rule".into(), |rule| {
                format!("{} below {:.3}", rule.signal.name(), rule.threshold)
            });
            Some(vec![
                escape_html(&result.name),
                rule,
                flagged.join("<br>"),
                interval(held_out.lost_hits),
                thresholds.min_score.map_or("none".into(), |score| format!("{score:.4}")),
                interval(held_out.shown_share),
                interval(held_out.false_hit_rate),
            ])
        })
        .collect();
    write_table(page, &header.map(String::from), &rows);
    page.push_str("</section>");
}

pub(super) fn write_appendix(page: &mut String, report: &EvaluationReport) {
    page.push_str("<section><h2>What was compared</h2>");
    let header = [
        "",
        "prompt set",
        "normaliser",
        "weight",
        "λ",
        "factor, shift",
        "minimum score",
        "generation",
    ];
    let rows: Vec<Vec<String>> = report
        .configurations
        .iter()
        .map(|result| {
            let setting = &result.setting;
            let balance = &setting.balance;
            vec![
                escape_html(&result.name),
                setting.prompt_set.as_ref().map_or("–".into(), |key| escape_html(key.as_str())),
                balance.normaliser.name().to_owned(),
                format!("{}", balance.weight),
                format!("{}", balance.lambda),
                format!("{:.4}, {:.4}", balance.scale.factor, balance.scale.shift),
                setting.min_score.map_or("–".into(), |score| format!("{score:.4}")),
                escape_html(&setting.generation),
            ]
        })
        .collect();
    write_table(page, &header.map(String::from), &rows);
    page.push_str("<ul class=\"facts\">");
    for model in &report.models {
        let _ = write!(
            page,
            "<li>Model {} ({}), fingerprint <code>{}</code>, logit scale {}, generation {}, {} images at table version {}</li>",
            escape_html(&model.model),
            escape_html(&model.role),
            escape_html(&model.fingerprint),
            model.logit_scale,
            escape_html(&model.generation),
            model.images,
            model.table_version
        );
    }
    let q = &report.queries;
    let _ = write!(
        page,
        "<li>Queries from {}: {} in all, {} judged, {} that match nothing, {} not judged, {} left out because no right image is in the catalogue; fingerprint <code>{}</code>. In addition, {} unrelated and gibberish texts.</li>",
        escape_html(&q.source),
        q.total,
        q.judged,
        q.judged_no_match,
        q.unjudged,
        q.without_relevant_image,
        escape_html(&q.fingerprint),
        q.probes
    );
    if let Some(cost) = &report.cost {
        let hourly = cost.hourly_cost.map_or(String::new(), |cost| format!(", {cost} per hour"));
        let _ = write!(
            page,
            "<li>Cost figures as given: {} minutes per false first result, {} queries per day{hourly}</li>",
            cost.minutes_per_false_hit, cost.queries_per_day
        );
    }
    let _ = write!(
        page,
        "<li>Report <code>{}</code>, bsap {}. Intervals: bootstrap, 1,000 samples; p: paired randomisation, 2,000 assignments, corrected by Holm; shares in the table of thresholds: Wilson.</li></ul></section>",
        escape_html(&report.fingerprint),
        escape_html(&report.version)
    );
}
