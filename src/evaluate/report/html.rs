//! A report as one HTML file that needs nothing from elsewhere.

use std::collections::BTreeMap;
use std::fmt::Write as _;

use super::chart::{IntervalBar, draw_interval_chart, escape_html, truncate_text};
use super::{EvaluationReport, MeasuredDifference, classify_difference, format_percent};
use crate::evaluate::compare::{ConfigurationResult, RankingChange, ShownResult};
use crate::evaluate::measures::FALSE_HIT_MEASURE;
use crate::evaluate::measures::interval::{ConfidenceInterval, MeasureComparison};

/// Configurations whose changed queries are shown; the others' are in the JSON report.
pub const MAX_SHOWN_CONFIGURATIONS: usize = 3;
/// Longest query that is shown whole.
const MAX_QUERY_CHARS: usize = 120;
pub(crate) const STYLESHEET: &str = include_str!("report.css");

/// Pictures by their place in the world, as `data:` URIs.
pub type ThumbnailUris = BTreeMap<u32, String>;

/// The results that a page of this report shows pictures of, most telling first.
pub fn images_to_show(report: &EvaluationReport) -> Vec<u32> {
    let mut all = Vec::new();
    for outcome in report.non_baseline().take(MAX_SHOWN_CONFIGURATIONS) {
        let changes = &outcome.changes;
        for change in changes.worsened.iter().chain(&changes.improved).chain(&changes.unjudged) {
            for shown in change.before.iter().chain(&change.after) {
                if !all.contains(&shown.image_position) {
                    all.push(shown.image_position);
                }
            }
        }
    }
    all
}

/// The page.
pub fn render_html(report: &EvaluationReport, thumbnails: &ThumbnailUris) -> String {
    let mut page = format!(
        "<!doctype html>\n<html lang=\"en\"><head><meta charset=\"utf-8\"><meta name=\"viewport\" content=\"width=device-width, initial-scale=1\"><meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'; img-src data:\"><title>Evaluation – {}</title><style>{STYLESHEET}",
        escape_html(&report.catalogue)
    );
    for (place, uri) in thumbnails {
        let _ = write!(page, ".p{place}{{background-image:url({uri})}}");
    }
    page.push_str("</style></head><body><main>");
    write_head(&mut page, report);
    write_charts(&mut page, report);
    write_measures(&mut page, report);
    write_groups(&mut page, report);
    write_rankings(&mut page, report);
    write_thresholds(&mut page, report);
    write_changes(&mut page, report, thumbnails);
    write_appendix(&mut page, report);
    page.push_str("</main></body></html>\n");
    page
}

fn write_head(page: &mut String, report: &EvaluationReport) {
    let q = &report.queries;
    let images: usize = report.models.first().map_or(0, |model| model.images);
    let _ = write!(
        page,
        "<header><h1>Is balancing worth it?</h1><p class=\"muted\">{} · {images} images · {} queries, {} of them judged · {}</p></header><section class=\"verdict\"><p>{}</p></section>",
        escape_html(&report.catalogue),
        q.total,
        q.judged,
        report.created_at.format("%Y-%m-%d %H:%M UTC"),
        escape_html(&report.verdict)
    );
    write_tiles(page, report);
    for note in &report.notes {
        let _ = write!(page, "<p class=\"note\">{}</p>", escape_html(note));
    }
}

/// The few figures that a decision rests on.
fn write_tiles(page: &mut String, report: &EvaluationReport) {
    page.push_str("<section class=\"tiles\">");
    for outcome in &report.configurations {
        let baseline = outcome.name == report.baseline;
        let _ = write!(
            page,
            "<div class=\"tile\"><h3>{}</h3>",
            escape_html(&truncate_text(&outcome.name, 48))
        );
        if let Some(column) = report.measure_comparison(outcome, FALSE_HIT_MEASURE) {
            let _ = write!(
                page,
                "<p class=\"figure\">{}</p><p class=\"muted\">of first results are wrong</p>",
                format_percent(column.value.mean)
            );
            if !baseline {
                let _ = write!(page, "<p>{}</p>", format_gain_badge(FALSE_HIT_MEASURE, &column));
            }
        } else if let Some(stability) = &outcome.stability {
            let _ = write!(
                page,
                "<p class=\"figure\">{}</p><p class=\"muted\">of first results are others</p>",
                format_percent(stability.top_hit_changed.mean)
            );
        }
        if baseline {
            page.push_str(
                "<p><span class=\"badge none\">all others are compared with it</span></p>",
            );
        }
        if let Some(savings) = &outcome.savings {
            let minutes = savings.minutes_per_day;
            let money = savings.money_per_day.map_or(String::new(), |m| {
                format!(
                    "; money: {} ({} to {})",
                    format_whole(m.mean),
                    format_whole(m.low),
                    format_whole(m.high)
                )
            });
            let _ = write!(
                page,
                "<p>minutes a day saved: {} ({} to {}){money}</p>",
                format_whole(minutes.mean),
                format_whole(minutes.low),
                format_whole(minutes.high)
            );
        }
        page.push_str("</div>");
    }
    page.push_str("</section>");
}

/// A gain with what it says.
fn format_gain_badge(measure: &str, column: &MeasureComparison) -> String {
    let (class, word) = match classify_difference(measure, column) {
        MeasuredDifference::Better => ("better", "better"),
        MeasuredDifference::Worse => ("worse", "worse"),
        MeasuredDifference::NotSignificant => ("none", "no measurable difference"),
    };
    format!("<span class=\"badge {class}\">{word}</span> {}", format_gain(&column.gain))
}

fn format_points(value: f64) -> String {
    format!("{:+.1}", value * 100.0).replace('-', "−")
}

/// A whole number; below 0 nothing is saved.
fn format_whole(value: f64) -> String {
    format!("{value:.0}").replace('-', "−")
}

fn format_gain(i: &ConfidenceInterval) -> String {
    format!(
        "{} points ({} to {})",
        format_points(i.mean),
        format_points(i.low),
        format_points(i.high)
    )
}

fn write_charts(page: &mut String, report: &EvaluationReport) {
    if report.queries.judged == 0 || report.non_baseline().next().is_none() {
        return;
    }
    let _ = write!(
        page,
        "<section><h2>What changes beside {}</h2><p class=\"muted\">Differences in percentage points, query by query, with 95 % intervals. Green and red are measurable after correction for the number of configurations; grey is not.</p>",
        escape_html(&report.baseline)
    );
    let wanted = |name: &String| name == FALSE_HIT_MEASURE || name.starts_with("nDCG");
    let chart_title = |name: &str| match name {
        FALSE_HIT_MEASURE => "False first results (left is better)".to_owned(),
        other => format!("{other} (right is better)"),
    };
    let mut shown: Vec<&String> = report.measures.iter().filter(|name| wanted(name)).collect();
    shown.sort_by_key(|name| *name != FALSE_HIT_MEASURE);
    for name in shown {
        let bars: Vec<IntervalBar> = report
            .non_baseline()
            .filter_map(|outcome| {
                let column = report.measure_comparison(outcome, name)?;
                let finding = classify_difference(name, &column);
                Some(IntervalBar {
                    name: outcome.name.clone(),
                    interval: column.gain,
                    difference: finding,
                })
            })
            .collect();
        let title = chart_title(name);
        let _ = write!(
            page,
            "<h3>{}</h3>{}",
            escape_html(&title),
            draw_interval_chart(&title, &bars, true, "", 100.0)
        );
    }
    page.push_str("</section>");
}

/// A table whose first column names the row.
pub(crate) fn write_table(page: &mut String, header: &[String], rows: &[Vec<String>]) {
    page.push_str("<div class=\"scroll\"><table><thead><tr>");
    for cell in header {
        let _ = write!(page, "<th>{}</th>", escape_html(cell));
    }
    page.push_str("</tr></thead><tbody>");
    for row in rows {
        page.push_str("<tr>");
        for (place, cell) in row.iter().enumerate() {
            // Cells are markup already; names of rows were escaped by their makers.
            let tag = if place == 0 { "th" } else { "td" };
            let _ = write!(page, "<{tag}>{cell}</{tag}>");
        }
        page.push_str("</tr>");
    }
    page.push_str("</tbody></table></div>");
}

fn format_cell(measure: &str, column: &MeasureComparison, baseline: bool) -> String {
    let mut text = format!("<b>{:.3}</b>", column.value.mean);
    if baseline {
        let _ = write!(
            text,
            "<br><span class=\"muted\">{:.3} to {:.3}</span>",
            column.value.low, column.value.high
        );
        return text;
    }
    let class = match classify_difference(measure, column) {
        MeasuredDifference::Better => "better",
        MeasuredDifference::Worse => "worse",
        MeasuredDifference::NotSignificant => "muted",
    };
    let three = |v: f64| format!("{v:+.3}").replace('-', "−");
    let _ = write!(
        text,
        "<br><span class=\"{class}\" title=\"p = {:.4}\">{}<br>{} to {}</span>",
        column.p_value,
        three(column.gain.mean),
        three(column.gain.low),
        three(column.gain.high)
    );
    text
}

fn write_measures(page: &mut String, report: &EvaluationReport) {
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
        .filter_map(|outcome| {
            let all = outcome.overall.as_ref()?;
            let baseline = outcome.name == report.baseline;
            let mut row = vec![escape_html(&outcome.name)];
            let cells = report.measures.iter().zip(&all.measures);
            row.extend(cells.map(|(name, column)| format_cell(name, column, baseline)));
            Some(row)
        })
        .collect();
    write_table(page, &header, &rows);
    page.push_str("</section>");
}

fn write_groups(page: &mut String, report: &EvaluationReport) {
    let Some(first) = report.configurations.first().filter(|o| !o.groups.is_empty()) else {
        return;
    };
    let Some(place) = report.measures.iter().position(|name| name == FALSE_HIT_MEASURE) else {
        return;
    };
    page.push_str("<section><h2>False first results by group of queries</h2>");
    let mut header = vec![String::new()];
    header.extend(first.groups.iter().map(|(name, s)| format!("{name} ({})", s.queries)));
    let rows: Vec<Vec<String>> = report
        .configurations
        .iter()
        .map(|outcome| {
            let baseline = outcome.name == report.baseline;
            let mut row = vec![escape_html(&outcome.name)];
            row.extend(first.groups.keys().map(|name| {
                let column = outcome.groups.get(name).and_then(|s| s.measures.get(place));
                column
                    .map_or("–".into(), |column| format_cell(FALSE_HIT_MEASURE, column, baseline))
            }));
            row
        })
        .collect();
    write_table(page, &header, &rows);
    page.push_str("<p class=\"muted\">Within groups p is not corrected for their number: with many groups, some differ by chance.</p></section>");
}

fn write_rankings(page: &mut String, report: &EvaluationReport) {
    if report.configurations.iter().all(|outcome| outcome.hubness.is_none()) {
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
        .map(|outcome| {
            let share = |value: Option<f64>| value.map_or("–".into(), format_percent);
            let stability = outcome.stability.as_ref();
            let hubness = outcome.hubness.as_ref();
            let hub = hubness.and_then(|hubness| hubness.hubs.first());
            vec![
                escape_html(&outcome.name),
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

fn write_thresholds(page: &mut String, report: &EvaluationReport) {
    if report.configurations.iter().all(|outcome| outcome.thresholds.is_none()) {
        return;
    }
    page.push_str("<section><h2>When not to trust a result</h2><p class=\"muted\">Chosen on one half of the queries and texts, measured here on the other half, with 95 % intervals.</p>");
    let header = [
        "",
        "nothing matches if",
        "flags of texts that match nothing",
        "flags of good first results",
        "least score",
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
        .filter_map(|outcome| {
            let found = outcome.thresholds.as_ref()?;
            let held = &found.held_out;
            let flagged: Vec<String> = held
                .flagged
                .iter()
                .map(|f| format!("{}: {}", f.kind.name(), interval(f.share)))
                .collect();
            let rule = found.no_match.map_or("no rule reaches it".into(), |rule| {
                format!("{} below {:.3}", rule.signal.name(), rule.threshold)
            });
            Some(vec![
                escape_html(&outcome.name),
                rule,
                flagged.join("<br>"),
                interval(held.lost_hits),
                found.min_score.map_or("none reaches it".into(), |score| format!("{score:.4}")),
                interval(held.shown_share),
                interval(held.false_hit_rate),
            ])
        })
        .collect();
    write_table(page, &header.map(String::from), &rows);
    page.push_str("</section>");
}

fn write_changes(page: &mut String, report: &EvaluationReport, thumbnails: &ThumbnailUris) {
    for outcome in report.non_baseline().take(MAX_SHOWN_CONFIGURATIONS) {
        let lists = [
            ("Queries that lose most", &outcome.changes.worsened),
            ("Queries that gain most", &outcome.changes.improved),
            ("Queries that change most, not judged", &outcome.changes.unjudged),
        ];
        if lists.iter().all(|(_, list)| list.is_empty()) {
            continue;
        }
        let _ = write!(page, "<section><h2>{} at work</h2>", escape_html(&outcome.name));
        for (title, list) in lists.iter().filter(|(_, list)| !list.is_empty()) {
            let _ = write!(page, "<h3>{title}</h3>");
            for change in *list {
                write_change(page, report, outcome, change, thumbnails);
            }
        }
        page.push_str("</section>");
    }
}

fn write_change(
    page: &mut String,
    report: &EvaluationReport,
    outcome: &ConfigurationResult,
    change: &RankingChange,
    thumbnails: &ThumbnailUris,
) {
    let group = change.group.as_ref().map_or(String::new(), |g| format!(" · {}", escape_html(g)));
    let gain = change.gain.map_or_else(
        || format!("{} shared among the best", format_percent(change.overlap)),
        |gain| format!("nDCG {}", format!("{gain:+.3}").replace('-', "−")),
    );
    let _ = write!(
        page,
        "<article><h4>“{}” <span class=\"muted\">{gain}{group}</span></h4><div class=\"pair\">",
        escape_html(&truncate_text(&change.text, MAX_QUERY_CHARS))
    );
    for (name, results) in [(&report.baseline, &change.before), (&outcome.name, &change.after)] {
        let _ = write!(page, "<div><h5>{}</h5><ol>", escape_html(&truncate_text(name, 48)));
        for shown in results {
            write_result(page, shown, thumbnails);
        }
        page.push_str("</ol></div>");
    }
    page.push_str("</div></article>");
}

fn write_result(page: &mut String, shown: &ShownResult, thumbnails: &ThumbnailUris) {
    let (class, mark) = match shown.is_relevant {
        Some(true) => ("right", "✓"),
        Some(false) => ("wrong", "✗"),
        None => ("unknown", ""),
    };
    let title = shown.title.as_deref().unwrap_or(&shown.image_id);
    let picture = if thumbnails.contains_key(&shown.image_position) {
        format!("p{}", shown.image_position)
    } else {
        "missing".to_owned()
    };
    let _ = write!(
        page,
        "<li class=\"{class}\" title=\"{} · {:.4}\"><span class=\"picture {picture}\" role=\"img\" aria-label=\"{2}\"></span><span class=\"mark\">{mark}</span><span class=\"title\">{2}</span></li>",
        escape_html(&shown.image_id),
        shown.score,
        escape_html(&truncate_text(title, 60))
    );
}

fn write_appendix(page: &mut String, report: &EvaluationReport) {
    page.push_str("<section><h2>What was compared</h2>");
    let header =
        ["", "prompt set", "normaliser", "weight", "λ", "c, m", "least score", "generation"];
    let rows: Vec<Vec<String>> = report
        .configurations
        .iter()
        .map(|outcome| {
            let s = &outcome.setting;
            vec![
                escape_html(&outcome.name),
                s.prompt_set.as_ref().map_or("–".into(), |key| escape_html(key.as_str())),
                s.balance.normaliser.name().to_owned(),
                format!("{}", s.balance.weight),
                format!("{}", s.balance.lambda),
                format!("{:.4}, {:.4}", s.balance.scale.factor, s.balance.scale.shift),
                s.min_score.map_or("–".into(), |score| format!("{score:.4}")),
                escape_html(&s.generation),
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
        "<li>Queries from {}: {} in all, {} judged, {} that match nothing, {} not judged, {} left out because no right image is in the catalogue; fingerprint <code>{}</code>. Besides, {} unrelated and gibberish texts.</li>",
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
        let wage = cost.hourly_cost.map_or(String::new(), |wage| format!(", {wage} an hour"));
        let _ = write!(
            page,
            "<li>Figures of the cost, as given: {} minutes a false first result, {} queries a day{wage}</li>",
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
