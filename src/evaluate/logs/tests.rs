use serde_json::json;

use super::reader::MAX_LINE_BYTES;
use super::report::{MAX_SHOWN_QUERIES, MIN_DISTINCT_QUERIES};
use crate::evaluate::logs::*;

fn shadow_line(query: usize, overlap: f64, top_changed: bool) -> String {
    let moved = usize::from(overlap < 1.0);
    json!({
        "timestamp": "2026-01-01T00:00:00Z", "level": "INFO", "event": "shadow.compared", "message": "m",
        "target": "bsap::search", "query_hash": format!("{query:012x}"), "configuration": "old",
        "candidate": "new", "k": 10, "overlap": overlap, "reranked": moved,
        "top_hit_changed": top_changed, "table_version": 3,
    })
    .to_string()
}

fn search_line(configuration: &str, query: usize, moved: u64) -> String {
    json!({
        "timestamp": "2026-01-02T00:00:00Z", "event": "search", "query_hash": format!("{query:012x}"),
        "query": format!("query {query} <b>"), "configuration": configuration, "results": 10,
        "reranked": moved, "top_hit_changed": query.is_multiple_of(4), "scan_ms": 2.0,
    })
    .to_string()
}

fn report_on_lines(lines: &[String]) -> Result<QueryLogReport, QueryLogError> {
    let mut reader = QueryLogReader::default();
    reader.read_log(lines.join("\n").as_bytes(), "a.log")?;
    reader.into_report()
}

#[test]
fn a_difference_is_told_with_its_interval_and_the_queries_that_change_most() {
    let mut lines = Vec::new();
    for query in 0..100 {
        // Repeated queries are one observation, asked more often.
        for _ in 0..=query % 3 {
            let worst = query == 7;
            let overlap = if worst { 0.1 } else { 0.8 };
            lines.push(shadow_line(query, overlap, query % 2 == 1));
        }
        lines.push(search_line("old", query, 3));
        let verdict = if query < 10 { "wrong" } else { "right" };
        lines.push(
            json!({"event": "feedback", "verdict": verdict, "configuration.applied": "old"})
                .to_string(),
        );
    }
    let found = report_on_lines(&lines).unwrap();
    let shadow = &found.shadow_comparisons[0];
    assert_eq!((shadow.live.as_str(), shadow.candidate.as_str()), ("old", "new"));
    assert_eq!((shadow.compared, shadow.queries, shadow.changed_queries), (199, 100, 100));
    assert_eq!(shadow.differs, Some(true));
    assert_eq!((shadow.overlap_histogram[1], shadow.overlap_histogram[8]), (2, 197));
    let first = shadow.top_hit_changed;
    assert!(first.low > 0.3 && first.low < first.mean && first.high < 0.7, "{first:?}");
    assert_eq!(shadow.most_changed_queries.len(), MAX_SHOWN_QUERIES);
    assert_eq!(shadow.most_changed_queries[0].text.as_deref(), Some("query 7 <b>"));
    assert!((shadow.most_changed_queries[0].overlap - 0.1).abs() < 1e-9);
    assert!(found.verdict.contains("new changes the first result of old in"), "{}", found.verdict);
    let moved = found.answers[0].reranked.unwrap();
    assert!((found.answers[0].top_hit_changed.unwrap().mean - 0.25).abs() < 1e-9);
    assert_eq!(found.answers[0].feedback, 100);
    assert!((found.answers[0].wrong.unwrap().mean - 0.1).abs() < 1e-9);
    assert!((moved.mean - 0.3).abs() < 1e-9 && found.answers[0].no_match.is_none());
    assert_eq!(found.from.unwrap().to_rfc3339(), "2026-01-01T00:00:00+00:00");
    assert_eq!(found.to.unwrap().to_rfc3339(), "2026-01-02T00:00:00+00:00");
    let page = render_html(&found);
    assert!(page.contains("query 7 &lt;b&gt;") && !page.contains("query 7 <b>"));
    assert!(render_terminal(&found).contains("query 7 <b>"));
    assert_eq!(found.fingerprint, report_on_lines(&lines).unwrap().fingerprint);
}

#[test]
fn where_nothing_differs_the_report_says_so_and_what_could_hide() {
    let lines: Vec<String> = (0..200).map(|query| shadow_line(query, 1.0, false)).collect();
    let found = report_on_lines(&lines).unwrap();
    assert_eq!(found.shadow_comparisons[0].differs, Some(false));
    assert!(found.verdict.contains("new makes no measurable difference to old"));
    assert!(found.verdict.contains("another answer to up to 1.9 % of them"), "{}", found.verdict);
    for shown in [render_terminal(&found), render_html(&found)] {
        assert!(shown.contains("no measurable difference"), "{shown}");
    }
    // One changed query of many may be chance.
    let one = [&lines[1..], &[shadow_line(0, 0.9, true)]].concat();
    assert_eq!(report_on_lines(&one).unwrap().shadow_comparisons[0].differs, Some(false));
    let few = report_on_lines(&lines[..MIN_DISTINCT_QUERIES - 1]).unwrap();
    assert_eq!(few.shadow_comparisons[0].differs, None);
    assert!(few.verdict.contains("too few"), "{}", few.verdict);
}

#[test]
fn only_what_a_configuration_answered_by_itself_is_counted_as_its() {
    let own = json!({"overrides": true});
    let with = |query: usize, moved: u64, more: &serde_json::Value| {
        let mut line: serde_json::Value =
            serde_json::from_str(&search_line("old", query, moved)).unwrap();
        for (key, value) in more.as_object().unwrap() {
            line[key] = value.clone();
        }
        line.to_string()
    };
    let lines = [
        with(1, 2, &json!({"overrides": false, "input": "text"})),
        with(2, 2, &json!({"overrides": false, "input": "vector"})),
        search_line("old", 3, 2),
        with(4, 10, &own),
        with(5, 0, &json!({"overrides": false, "input": "image_id"})),
        with(6, 0, &json!({"overrides": false, "input": "image"})),
    ];
    let found = report_on_lines(&lines).unwrap();
    assert_eq!((found.answers.len(), found.answers[0].answers, found.skipped), (1, 3, 3));
    assert!((found.answers[0].reranked.unwrap().mean - 0.2).abs() < 1e-9);
    let nothing = report_on_lines(&[with(4, 10, &own)]).unwrap_err().to_string();
    assert!(nothing.contains("no `search` line that counts among 1 lines"), "{nothing}");
}

#[test]
fn lines_that_cannot_be_used_are_told_by_number_and_others_are_passed_over() {
    let good = shadow_line(1, 1.0, false);
    let lines = [
        good.clone(),
        "{\"event\": \"follow\"}".to_owned(),
        "{\"event\": \"shadow\", \"query_h".to_owned(),
        good.replace("\"overlap\":1.0", "\"overlap\":\"much\""),
        good.replace("\"overlap\":1.0", "\"overlap\":1.5"),
        String::new(),
        search_line("old", 1, 11),
        format!("\"{}\"", "x".repeat(MAX_LINE_BYTES as usize)),
        "7".to_owned(),
        search_line("old", 1, 3),
    ];
    let found = report_on_lines(&lines).unwrap();
    assert_eq!((found.lines, found.skipped, found.malformed), (10, 2, 6));
    let numbers = [3, 4, 5, 7, 8, 9];
    for (problem, number) in found.problems.iter().zip(numbers) {
        assert!(problem.starts_with(&format!("a.log: line {number}: ")), "{problem}");
    }
    assert!(found.problems[1].contains("shadow: invalid type"), "{:?}", found.problems);
    assert_eq!((found.shadow_comparisons[0].compared, found.answers[0].answers), (1, 1));

    let nothing = report_on_lines(&["plain text".to_owned()]).unwrap_err().to_string();
    assert!(nothing.contains("1 lines (a.log: line 1: is not JSON"), "{nothing}");
}
