//! A report as one HTML file that needs nothing from elsewhere.

use std::collections::BTreeMap;
use std::fmt::Write as _;

use super::chart::{Bar, escape, intervals, short};
use super::{Finding, Report, finding, percent};
use crate::evaluate::compare::{Change, Outcome, Shown};
use crate::evaluate::measures::FALSE_HIT;
use crate::evaluate::measures::interval::{Column, Interval};

/// Configurations whose changed queries are shown; the others' are in the JSON report.
pub const SHOWN_CONFIGURATIONS: usize = 3;
/// Longest query that is shown whole.
const TEXT: usize = 120;
pub(crate) const STYLE: &str = include_str!("report.css");

/// Pictures by their place in the world, as `data:` URIs.
pub type Pictures = BTreeMap<u32, String>;

/// The results that a page of this report shows pictures of, most telling first.
pub fn pictured(report: &Report) -> Vec<u32> {
    let mut all = Vec::new();
    for outcome in report.others().take(SHOWN_CONFIGURATIONS) {
        let changes = &outcome.changes;
        for change in changes.worse.iter().chain(&changes.better).chain(&changes.moved) {
            for shown in change.before.iter().chain(&change.after) {
                if !all.contains(&shown.picture) {
                    all.push(shown.picture);
                }
            }
        }
    }
    all
}

/// The page.
pub fn html(report: &Report, pictures: &Pictures) -> String {
    let mut page = format!(
        "<!doctype html>\n<html lang=\"en\"><head><meta charset=\"utf-8\"><meta name=\"viewport\" content=\"width=device-width, initial-scale=1\"><meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'; img-src data:\"><title>Evaluation – {}</title><style>{STYLE}",
        escape(&report.catalogue)
    );
    for (place, uri) in pictures {
        let _ = write!(page, ".p{place}{{background-image:url({uri})}}");
    }
    page.push_str("</style></head><body><main>");
    head(&mut page, report);
    charts(&mut page, report);
    measures(&mut page, report);
    groups(&mut page, report);
    rankings(&mut page, report);
    thresholds(&mut page, report);
    changes(&mut page, report, pictures);
    appendix(&mut page, report);
    page.push_str("</main></body></html>\n");
    page
}

fn head(page: &mut String, report: &Report) {
    let q = &report.queries;
    let images: usize = report.models.first().map_or(0, |model| model.images);
    let _ = write!(
        page,
        "<header><h1>Is balancing worth it?</h1><p class=\"muted\">{} · {images} images · {} queries, {} of them judged · {}</p></header><section class=\"verdict\"><p>{}</p></section>",
        escape(&report.catalogue),
        q.asked,
        q.judged,
        report.at.format("%Y-%m-%d %H:%M UTC"),
        escape(&report.verdict)
    );
    tiles(page, report);
    for note in &report.notes {
        let _ = write!(page, "<p class=\"note\">{}</p>", escape(note));
    }
}

/// The few figures that a decision rests on.
fn tiles(page: &mut String, report: &Report) {
    page.push_str("<section class=\"tiles\">");
    for outcome in &report.configurations {
        let baseline = outcome.name == report.baseline;
        let _ = write!(page, "<div class=\"tile\"><h3>{}</h3>", escape(&short(&outcome.name, 48)));
        if let Some(column) = report.column(outcome, FALSE_HIT) {
            let _ = write!(
                page,
                "<p class=\"figure\">{}</p><p class=\"muted\">of first results are wrong</p>",
                percent(column.value.mean)
            );
            if !baseline {
                let _ = write!(page, "<p>{}</p>", badge(FALSE_HIT, &column));
            }
        } else if let Some(stability) = &outcome.stability {
            let _ = write!(
                page,
                "<p class=\"figure\">{}</p><p class=\"muted\">of first results are others</p>",
                percent(stability.first_changed.mean)
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
                format!("; money: {} ({} to {})", whole(m.mean), whole(m.low), whole(m.high))
            });
            let _ = write!(
                page,
                "<p>minutes a day saved: {} ({} to {}){money}</p>",
                whole(minutes.mean),
                whole(minutes.low),
                whole(minutes.high)
            );
        }
        page.push_str("</div>");
    }
    page.push_str("</section>");
}

/// A gain with what it says.
fn badge(measure: &str, column: &Column) -> String {
    let (class, word) = match finding(measure, column) {
        Finding::Better => ("better", "better"),
        Finding::Worse => ("worse", "worse"),
        Finding::None => ("none", "no measurable difference"),
    };
    format!("<span class=\"badge {class}\">{word}</span> {}", gain(&column.gain))
}

fn signed(value: f64) -> String {
    format!("{:+.1}", value * 100.0).replace('-', "−")
}

/// A whole number; below 0 nothing is saved.
fn whole(value: f64) -> String {
    format!("{value:.0}").replace('-', "−")
}

fn gain(i: &Interval) -> String {
    format!("{} points ({} to {})", signed(i.mean), signed(i.low), signed(i.high))
}

fn charts(page: &mut String, report: &Report) {
    if report.queries.judged == 0 || report.others().next().is_none() {
        return;
    }
    let _ = write!(
        page,
        "<section><h2>What changes beside {}</h2><p class=\"muted\">Differences in percentage points, query by query, with 95 % intervals. Green and red are measurable after correction for the number of configurations; grey is not.</p>",
        escape(&report.baseline)
    );
    let wanted = |name: &String| name == FALSE_HIT || name.starts_with("nDCG");
    let told = |name: &str| match name {
        FALSE_HIT => "False first results (left is better)".to_owned(),
        other => format!("{other} (right is better)"),
    };
    let mut shown: Vec<&String> = report.measures.iter().filter(|name| wanted(name)).collect();
    shown.sort_by_key(|name| *name != FALSE_HIT);
    for name in shown {
        let bars: Vec<Bar> = report
            .others()
            .filter_map(|outcome| {
                let column = report.column(outcome, name)?;
                let finding = finding(name, &column);
                Some(Bar { name: outcome.name.clone(), interval: column.gain, finding })
            })
            .collect();
        let title = told(name);
        let _ = write!(
            page,
            "<h3>{}</h3>{}",
            escape(&title),
            intervals(&title, &bars, true, "", 100.0)
        );
    }
    page.push_str("</section>");
}

/// A table whose first column names the row.
pub(crate) fn table(page: &mut String, header: &[String], rows: &[Vec<String>]) {
    page.push_str("<div class=\"scroll\"><table><thead><tr>");
    for cell in header {
        let _ = write!(page, "<th>{}</th>", escape(cell));
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

fn cell(measure: &str, column: &Column, baseline: bool) -> String {
    let mut text = format!("<b>{:.3}</b>", column.value.mean);
    if baseline {
        let _ = write!(
            text,
            "<br><span class=\"muted\">{:.3} to {:.3}</span>",
            column.value.low, column.value.high
        );
        return text;
    }
    let class = match finding(measure, column) {
        Finding::Better => "better",
        Finding::Worse => "worse",
        Finding::None => "muted",
    };
    let three = |v: f64| format!("{v:+.3}").replace('-', "−");
    let _ = write!(
        text,
        "<br><span class=\"{class}\" title=\"p = {:.4}\">{}<br>{} to {}</span>",
        column.p,
        three(column.gain.mean),
        three(column.gain.low),
        three(column.gain.high)
    );
    text
}

fn measures(page: &mut String, report: &Report) {
    if report.queries.judged == 0 {
        return;
    }
    let _ = write!(
        page,
        "<section><h2>All measures</h2><p class=\"muted\">Mean, and beneath it the gain over {} with its 95 % interval (for {0} itself the interval of the mean). Less is better for {FALSE_HIT}, more for all others.</p>",
        escape(&report.baseline)
    );
    let mut header = vec![String::new()];
    header.extend(report.measures.iter().cloned());
    let rows: Vec<Vec<String>> = report
        .configurations
        .iter()
        .filter_map(|outcome| {
            let all = outcome.all.as_ref()?;
            let baseline = outcome.name == report.baseline;
            let mut row = vec![escape(&outcome.name)];
            let cells = report.measures.iter().zip(&all.columns);
            row.extend(cells.map(|(name, column)| cell(name, column, baseline)));
            Some(row)
        })
        .collect();
    table(page, &header, &rows);
    page.push_str("</section>");
}

fn groups(page: &mut String, report: &Report) {
    let Some(first) = report.configurations.first().filter(|o| !o.groups.is_empty()) else {
        return;
    };
    let Some(place) = report.measures.iter().position(|name| name == FALSE_HIT) else { return };
    page.push_str("<section><h2>False first results by group of queries</h2>");
    let mut header = vec![String::new()];
    header.extend(first.groups.iter().map(|(name, s)| format!("{name} ({})", s.queries)));
    let rows: Vec<Vec<String>> = report
        .configurations
        .iter()
        .map(|outcome| {
            let baseline = outcome.name == report.baseline;
            let mut row = vec![escape(&outcome.name)];
            row.extend(first.groups.keys().map(|name| {
                let column = outcome.groups.get(name).and_then(|s| s.columns.get(place));
                column.map_or("–".into(), |column| cell(FALSE_HIT, column, baseline))
            }));
            row
        })
        .collect();
    table(page, &header, &rows);
    page.push_str("<p class=\"muted\">Within groups p is not corrected for their number: with many groups, some differ by chance.</p></section>");
}

fn rankings(page: &mut String, report: &Report) {
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
            let share = |value: Option<f64>| value.map_or("–".into(), percent);
            let stability = outcome.stability.as_ref();
            let hubness = outcome.hubness.as_ref();
            let hub = hubness.and_then(|hubness| hubness.hubs.first());
            vec![
                escape(&outcome.name),
                share(stability.map(|s| s.first_changed.mean)),
                share(stability.map(|s| s.any_changed.mean)),
                share(stability.map(|s| s.overlap.mean)),
                hubness.map_or("–".into(), |hubness| format!("{:.2}", hubness.skewness)),
                share(hubness.map(|hubness| hubness.never)),
                hub.map_or("–".into(), |hub| {
                    format!("{} of the queries: {}", percent(hub.share), escape(&hub.image_id))
                }),
            ]
        })
        .collect();
    table(page, &header.map(String::from), &rows);
    page.push_str("</section>");
}

fn thresholds(page: &mut String, report: &Report) {
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
    let interval = |i: Option<Interval>| {
        i.map_or("–".to_owned(), |i| {
            format!("{} ({:.1} to {:.1})", percent(i.mean), i.low * 100.0, i.high * 100.0)
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
                format!("{} below {:.3}", rule.signal.name(), rule.below)
            });
            Some(vec![
                escape(&outcome.name),
                rule,
                flagged.join("<br>"),
                interval(held.lost),
                found.min_score.map_or("none reaches it".into(), |score| format!("{score:.4}")),
                interval(held.shown),
                interval(held.false_hits),
            ])
        })
        .collect();
    table(page, &header.map(String::from), &rows);
    page.push_str("</section>");
}

fn changes(page: &mut String, report: &Report, pictures: &Pictures) {
    for outcome in report.others().take(SHOWN_CONFIGURATIONS) {
        let lists = [
            ("Queries that lose most", &outcome.changes.worse),
            ("Queries that gain most", &outcome.changes.better),
            ("Queries that change most, not judged", &outcome.changes.moved),
        ];
        if lists.iter().all(|(_, list)| list.is_empty()) {
            continue;
        }
        let _ = write!(page, "<section><h2>{} at work</h2>", escape(&outcome.name));
        for (title, list) in lists.iter().filter(|(_, list)| !list.is_empty()) {
            let _ = write!(page, "<h3>{title}</h3>");
            for change in *list {
                one_change(page, report, outcome, change, pictures);
            }
        }
        page.push_str("</section>");
    }
}

fn one_change(
    page: &mut String,
    report: &Report,
    outcome: &Outcome,
    change: &Change,
    pictures: &Pictures,
) {
    let group = change.group.as_ref().map_or(String::new(), |g| format!(" · {}", escape(g)));
    let gain = change.gain.map_or_else(
        || format!("{} shared among the best", percent(change.overlap)),
        |gain| format!("nDCG {}", format!("{gain:+.3}").replace('-', "−")),
    );
    let _ = write!(
        page,
        "<article><h4>“{}” <span class=\"muted\">{gain}{group}</span></h4><div class=\"pair\">",
        escape(&short(&change.text, TEXT))
    );
    for (name, results) in [(&report.baseline, &change.before), (&outcome.name, &change.after)] {
        let _ = write!(page, "<div><h5>{}</h5><ol>", escape(&short(name, 48)));
        for shown in results {
            result(page, shown, pictures);
        }
        page.push_str("</ol></div>");
    }
    page.push_str("</div></article>");
}

fn result(page: &mut String, shown: &Shown, pictures: &Pictures) {
    let (class, mark) = match shown.right {
        Some(true) => ("right", "✓"),
        Some(false) => ("wrong", "✗"),
        None => ("unknown", ""),
    };
    let title = shown.title.as_deref().unwrap_or(&shown.image_id);
    let picture = if pictures.contains_key(&shown.picture) {
        format!("p{}", shown.picture)
    } else {
        "missing".to_owned()
    };
    let _ = write!(
        page,
        "<li class=\"{class}\" title=\"{} · {:.4}\"><span class=\"picture {picture}\" role=\"img\" aria-label=\"{2}\"></span><span class=\"mark\">{mark}</span><span class=\"title\">{2}</span></li>",
        escape(&shown.image_id),
        shown.score,
        escape(&short(title, 60))
    );
}

fn appendix(page: &mut String, report: &Report) {
    page.push_str("<section><h2>What was compared</h2>");
    let header =
        ["", "prompt set", "normaliser", "weight", "λ", "c, m", "least score", "generation"];
    let rows: Vec<Vec<String>> = report
        .configurations
        .iter()
        .map(|outcome| {
            let s = &outcome.setting;
            vec![
                escape(&outcome.name),
                s.prompt_set.as_ref().map_or("–".into(), |key| escape(key.as_str())),
                s.balance.normaliser.name().to_owned(),
                format!("{}", s.balance.weight),
                format!("{}", s.balance.lambda),
                format!("{:.4}, {:.4}", s.balance.scale.c, s.balance.scale.m),
                s.min_score.map_or("–".into(), |score| format!("{score:.4}")),
                escape(&s.generation),
            ]
        })
        .collect();
    table(page, &header.map(String::from), &rows);
    page.push_str("<ul class=\"facts\">");
    for model in &report.models {
        let _ = write!(
            page,
            "<li>Model {} ({}), fingerprint <code>{}</code>, logit scale {}, generation {}, {} images at table version {}</li>",
            escape(&model.model),
            escape(&model.role),
            escape(&model.fingerprint),
            model.logit_scale,
            escape(&model.generation),
            model.images,
            model.version
        );
    }
    let q = &report.queries;
    let _ = write!(
        page,
        "<li>Queries from {}: {} in all, {} judged, {} that match nothing, {} not judged, {} left out because no right image is in the catalogue; fingerprint <code>{}</code>. Besides, {} unrelated and gibberish texts.</li>",
        escape(&q.source),
        q.asked,
        q.judged,
        q.nothing,
        q.unknown,
        q.left_out,
        escape(&q.fingerprint),
        q.probes
    );
    if let Some(cost) = &report.cost {
        let wage = cost.wage.map_or(String::new(), |wage| format!(", {wage} an hour"));
        let _ = write!(
            page,
            "<li>Figures of the cost, as given: {} minutes a false first result, {} queries a day{wage}</li>",
            cost.minutes_per_false_hit, cost.queries_per_day
        );
    }
    let _ = write!(
        page,
        "<li>Report <code>{}</code>, bsap {}. Intervals: bootstrap, 1,000 samples; p: paired randomisation, 2,000 assignments, corrected by Holm; shares in the table of thresholds: Wilson.</li></ul></section>",
        escape(&report.fingerprint),
        escape(&report.version)
    );
}
