//! Renders a report as one HTML file that loads nothing from elsewhere.

use std::collections::BTreeMap;
use std::fmt::Write as _;

use super::chart::{IntervalBar, draw_interval_chart, escape_html, truncate_text};
use super::html_tables::{
    write_appendix, write_banks, write_groups, write_measures, write_rankings, write_separation,
    write_thresholds,
};
use super::{EvaluationReport, MeasuredDifference, classify_difference, format_percent};
use crate::evaluate::compare::{ConfigurationResult, RankingChange, ShownResult};
use crate::evaluate::measures::FALSE_HIT_MEASURE;
use crate::evaluate::measures::interval::{ConfidenceInterval, MeasureComparison};

/// Number of configurations whose changed queries are shown; those of all are in the JSON report.
pub const MAX_SHOWN_CONFIGURATIONS: usize = 3;
/// Queries with more characters are truncated.
const MAX_SHOWN_QUERY_CHARS: usize = 120;
/// Stylesheet of all HTML reports.
pub(crate) const STYLESHEET: &str = include_str!("report.css");

/// Thumbnails as `data:` URIs, by index into the images of the corpus.
pub type ThumbnailUris = BTreeMap<u32, String>;

/// Returns the images for which the page of this report needs thumbnails, most important first.
pub fn images_to_show(report: &EvaluationReport) -> Vec<u32> {
    let mut positions = Vec::new();
    for result in report.non_baseline_results().take(MAX_SHOWN_CONFIGURATIONS) {
        let changes = &result.changes;
        for change in changes.worsened.iter().chain(&changes.improved).chain(&changes.unjudged) {
            for shown in change.before.iter().chain(&change.after) {
                if !positions.contains(&shown.image_position) {
                    positions.push(shown.image_position);
                }
            }
        }
    }
    positions
}

/// Renders the page.
pub fn render_html(report: &EvaluationReport, thumbnails: &ThumbnailUris) -> String {
    let mut page = format!(
        "<!doctype html>\n<html lang=\"en\"><head><meta charset=\"utf-8\"><meta name=\"viewport\" content=\"width=device-width, initial-scale=1\"><meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'; img-src data:\"><title>Evaluation – {}</title><style>{STYLESHEET}",
        escape_html(&report.catalogue)
    );
    for (position, uri) in thumbnails {
        let _ = write!(page, ".p{position}{{background-image:url({uri})}}");
    }
    page.push_str("</style></head><body><main>");
    write_head(&mut page, report);
    write_charts(&mut page, report);
    write_measures(&mut page, report);
    write_groups(&mut page, report);
    write_rankings(&mut page, report);
    write_banks(&mut page, report);
    write_separation(&mut page, report);
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

/// Writes one tile per configuration with the figures that a decision depends on.
fn write_tiles(page: &mut String, report: &EvaluationReport) {
    page.push_str("<section class=\"tiles\">");
    for result in &report.configurations {
        let is_baseline = result.name == report.baseline;
        let _ = write!(
            page,
            "<div class=\"tile\"><h3>{}</h3>",
            escape_html(&truncate_text(&result.name, 48))
        );
        if let Some(comparison) = report.measure_comparison(result, FALSE_HIT_MEASURE) {
            let _ = write!(
                page,
                "<p class=\"figure\">{}</p><p class=\"muted\">of first results are wrong</p>",
                format_percent(comparison.value.mean)
            );
            if !is_baseline {
                let _ =
                    write!(page, "<p>{}</p>", format_gain_badge(FALSE_HIT_MEASURE, &comparison));
            }
        } else if let Some(stability) = &result.stability {
            let _ = write!(
                page,
                "<p class=\"figure\">{}</p><p class=\"muted\">of first results are others</p>",
                format_percent(stability.top_hit_changed.mean)
            );
        }
        if is_baseline {
            page.push_str(
                "<p><span class=\"badge none\">all others are compared with this one</span></p>",
            );
        }
        if let Some(savings) = &result.savings {
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
                "<p>minutes saved per day: {} ({} to {}){money}</p>",
                format_whole(minutes.mean),
                format_whole(minutes.low),
                format_whole(minutes.high)
            );
        }
        page.push_str("</div>");
    }
    page.push_str("</section>");
}

/// Formats a gain with a badge that says whether it is better, worse or not significant.
fn format_gain_badge(measure: &str, comparison: &MeasureComparison) -> String {
    let (class, word) = match classify_difference(measure, comparison) {
        MeasuredDifference::Better => ("better", "better"),
        MeasuredDifference::Worse => ("worse", "worse"),
        MeasuredDifference::NotSignificant => ("none", "no measurable difference"),
    };
    format!("<span class=\"badge {class}\">{word}</span> {}", format_gain(&comparison.gain))
}

fn format_points(value: f64) -> String {
    format!("{:+.1}", value * 100.0).replace('-', "−")
}

/// Formats a number without decimals.
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
    if report.queries.judged == 0 || report.non_baseline_results().next().is_none() {
        return;
    }
    let _ = write!(
        page,
        "<section><h2>What changes compared with {}</h2><p class=\"muted\">Mean differences in percentage points, paired by query, with 95 % intervals. Green and red are measurable after correction for the number of configurations; grey is not.</p>",
        escape_html(&report.baseline)
    );
    let has_chart = |name: &String| name == FALSE_HIT_MEASURE || name.starts_with("nDCG");
    let chart_title = |name: &str| match name {
        FALSE_HIT_MEASURE => "False first results (left is better)".to_owned(),
        other => format!("{other} (right is better)"),
    };
    let mut charted: Vec<&String> = report.measures.iter().filter(|name| has_chart(name)).collect();
    charted.sort_by_key(|name| *name != FALSE_HIT_MEASURE);
    for name in charted {
        let bars: Vec<IntervalBar> = report
            .non_baseline_results()
            .filter_map(|result| {
                let comparison = report.measure_comparison(result, name)?;
                Some(IntervalBar {
                    row_label: result.name.clone(),
                    interval: comparison.gain,
                    difference: classify_difference(name, &comparison),
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

fn write_changes(page: &mut String, report: &EvaluationReport, thumbnails: &ThumbnailUris) {
    for result in report.non_baseline_results().take(MAX_SHOWN_CONFIGURATIONS) {
        let lists = [
            ("Queries that lose most", &result.changes.worsened),
            ("Queries that gain most", &result.changes.improved),
            ("Queries that change most, not judged", &result.changes.unjudged),
        ];
        if lists.iter().all(|(_, list)| list.is_empty()) {
            continue;
        }
        let _ = write!(page, "<section><h2>Changes by {}</h2>", escape_html(&result.name));
        for (title, list) in lists.iter().filter(|(_, list)| !list.is_empty()) {
            let _ = write!(page, "<h3>{title}</h3>");
            for change in *list {
                write_change(page, report, result, change, thumbnails);
            }
        }
        page.push_str("</section>");
    }
}

fn write_change(
    page: &mut String,
    report: &EvaluationReport,
    result: &ConfigurationResult,
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
        escape_html(&truncate_text(&change.text, MAX_SHOWN_QUERY_CHARS))
    );
    for (name, results) in [(&report.baseline, &change.before), (&result.name, &change.after)] {
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
