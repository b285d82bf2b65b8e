use serde_json::json;

use super::report::{MAX_SHOWN_QUERIES, MIN_DISTINCT_QUERIES};
use crate::evaluate::log_lines::MAX_LINE_BYTES;
use crate::evaluate::logs::*;

fn shadow_line(query: usize, overlap: f64, top_hit_changed: bool) -> String {
    let reranked = usize::from(overlap < 1.0);
    json!({
        "timestamp": "2026-01-01T00:00:00Z", "level": "INFO", "event": "shadow.compared", "message": "m",
        "target": "bsap::search", "query_hash": format!("{query:012x}"), "configuration": "old",
        "candidate": "new", "k": 10, "overlap": overlap, "reranked": reranked,
        "top_hit_changed": top_hit_changed, "table_version": 3,
    })
    .to_string()
}

fn search_line(configuration: &str, query: usize, reranked: u64) -> String {
    json!({
        "timestamp": "2026-01-02T00:00:00Z", "event": "search", "query_hash": format!("{query:012x}"),
        "query": format!("query {query} <b>"), "configuration": configuration, "results": 10,
        "reranked": reranked, "top_hit_changed": query.is_multiple_of(4), "scan_ms": 2.0,
    })
    .to_string()
}

fn report_on_lines(lines: &[String]) -> Result<QueryLogReport, QueryLogError> {
    let mut reader = QueryLogReader::default();
    reader.read_log(lines.join("\n").as_bytes(), "a.log")?;
    reader.into_report()
}

#[test]
fn a_report_has_the_difference_its_interval_and_the_most_changed_queries() {
    let mut lines = Vec::new();
    for query in 0..100 {
        // Repeated queries are one observation with more lines.
        for _ in 0..=query % 3 {
            let overlap = if query == 7 { 0.1 } else { 0.8 };
            lines.push(shadow_line(query, overlap, query % 2 == 1));
        }
        lines.push(search_line("old", query, 3));
        let verdict = if query < 10 { "wrong" } else { "right" };
        lines.push(
            json!({"event": "feedback", "verdict": verdict, "configuration": "old"}).to_string(),
        );
    }
    let report = report_on_lines(&lines).unwrap();
    let shadow = &report.shadow_comparisons[0];
    assert_eq!((shadow.live.as_str(), shadow.candidate.as_str()), ("old", "new"));
    assert_eq!((shadow.compared, shadow.queries, shadow.changed_queries), (199, 100, 100));
    assert_eq!(shadow.differs, Some(true));
    assert_eq!((shadow.overlap_histogram[1], shadow.overlap_histogram[8]), (2, 197));
    let changed = shadow.top_hit_changed;
    assert!(changed.low > 0.3 && changed.low < changed.mean && changed.high < 0.7, "{changed:?}");
    assert_eq!(shadow.most_changed_queries.len(), MAX_SHOWN_QUERIES);
    assert_eq!(shadow.most_changed_queries[0].text.as_deref(), Some("query 7 <b>"));
    assert!((shadow.most_changed_queries[0].overlap - 0.1).abs() < 1e-9);
    assert!(
        report.verdict.contains("new changes the first result of old in"),
        "{}",
        report.verdict
    );
    let reranked = report.answers[0].reranked.unwrap();
    assert!((report.answers[0].top_hit_changed.unwrap().mean - 0.25).abs() < 1e-9);
    assert_eq!(report.answers[0].feedback, 100);
    assert!((report.answers[0].wrong.unwrap().mean - 0.1).abs() < 1e-9);
    assert!((reranked.mean - 0.3).abs() < 1e-9 && report.answers[0].no_match.is_none());
    assert_eq!(report.from.unwrap().to_rfc3339(), "2026-01-01T00:00:00+00:00");
    assert_eq!(report.to.unwrap().to_rfc3339(), "2026-01-02T00:00:00+00:00");
    let page = render_html(&report);
    assert!(page.contains("query 7 &lt;b&gt;") && !page.contains("query 7 <b>"));
    assert!(render_terminal(&report).contains("query 7 <b>"));
    assert_eq!(report.fingerprint, report_on_lines(&lines).unwrap().fingerprint);
}

#[test]
fn if_no_answer_differs_the_report_says_so_and_how_much_could_hide() {
    let lines: Vec<String> = (0..200).map(|query| shadow_line(query, 1.0, false)).collect();
    let report = report_on_lines(&lines).unwrap();
    assert_eq!(report.shadow_comparisons[0].differs, Some(false));
    assert!(report.verdict.contains("new makes no measurable difference to old"));
    assert!(report.verdict.contains("another answer to up to 1.9 % of them"), "{}", report.verdict);
    for rendered in [render_terminal(&report), render_html(&report)] {
        assert!(rendered.contains("no measurable difference"), "{rendered}");
    }
    // One changed query of many may be chance.
    let one_changed = [&lines[1..], &[shadow_line(0, 0.9, true)]].concat();
    assert_eq!(report_on_lines(&one_changed).unwrap().shadow_comparisons[0].differs, Some(false));
    let few = report_on_lines(&lines[..MIN_DISTINCT_QUERIES - 1]).unwrap();
    assert_eq!(few.shadow_comparisons[0].differs, None);
    assert!(few.verdict.contains("too few"), "{}", few.verdict);
}

#[test]
fn answers_to_overridden_and_image_queries_are_not_counted_for_a_configuration() {
    let overridden = json!({"overrides": true});
    let line_with = |query: usize, reranked: u64, fields: &serde_json::Value| {
        let mut line: serde_json::Value =
            serde_json::from_str(&search_line("old", query, reranked)).unwrap();
        for (key, value) in fields.as_object().unwrap() {
            line[key] = value.clone();
        }
        line.to_string()
    };
    let lines = [
        line_with(1, 2, &json!({"overrides": false, "input": "text"})),
        line_with(2, 2, &json!({"overrides": false, "input": "vector"})),
        search_line("old", 3, 2),
        line_with(4, 10, &overridden),
        line_with(5, 0, &json!({"overrides": false, "input": "image_id"})),
        line_with(6, 0, &json!({"overrides": false, "input": "image"})),
    ];
    let report = report_on_lines(&lines).unwrap();
    assert_eq!((report.answers.len(), report.answers[0].answers, report.skipped), (1, 3, 3));
    assert!((report.answers[0].reranked.unwrap().mean - 0.2).abs() < 1e-9);
    let error = report_on_lines(&[line_with(4, 10, &overridden)]).unwrap_err().to_string();
    assert!(
        error.contains("no usable `shadow.compared` or `search` line among 1 lines"),
        "{error}"
    );
}

#[test]
fn malformed_lines_are_listed_by_number_and_lines_of_other_events_are_skipped() {
    let good = shadow_line(1, 1.0, false);
    let lines = [
        good.clone(),
        "{\"event\": \"table.refreshed\"}".to_owned(),
        "{\"event\": \"shadow.compared\", \"query_h".to_owned(),
        good.replace("\"overlap\":1.0", "\"overlap\":\"half\""),
        good.replace("\"overlap\":1.0", "\"overlap\":1.5"),
        String::new(),
        search_line("old", 1, 11),
        format!("\"{}\"", "x".repeat(MAX_LINE_BYTES as usize)),
        "7".to_owned(),
        search_line("old", 1, 3),
    ];
    let report = report_on_lines(&lines).unwrap();
    assert_eq!((report.lines, report.skipped, report.malformed), (10, 2, 6));
    let numbers = [3, 4, 5, 7, 8, 9];
    for (problem, number) in report.problems.iter().zip(numbers) {
        assert!(problem.starts_with(&format!("a.log: line {number}: ")), "{problem}");
    }
    assert!(report.problems[1].contains("shadow.compared: invalid type"), "{:?}", report.problems);
    assert_eq!((report.shadow_comparisons[0].compared, report.answers[0].answers), (1, 1));

    let error = report_on_lines(&["plain text".to_owned()]).unwrap_err().to_string();
    assert!(error.contains("1 lines (a.log: line 1: is not JSON"), "{error}");
}
