//! Judged queries from the feedback that users sent.

use std::collections::{BTreeMap, HashMap};

use super::judged_query::{JudgedQuery, Judgements, MAX_QUERIES};
use crate::record::ImageId;
use crate::serve::feedback::{Feedback, FeedbackVerdict};

/// Reads judged queries from stored feedback, oldest line first: JSON lines with `text`, `image_id`
/// and `verdict` (`right` or `wrong`). The last verdict on an image counts. Returns the queries and
/// the number of unusable lines, which are no error because anybody may send feedback.
pub fn queries_from_feedback<'a>(
    lines: impl Iterator<Item = &'a str>,
) -> (Vec<JudgedQuery>, usize) {
    let mut texts: Vec<String> = Vec::new();
    let mut grades_by_text: HashMap<String, BTreeMap<ImageId, f64>> = HashMap::new();
    let mut unusable = 0;
    for line in lines.filter(|line| !line.trim().is_empty()) {
        let Some((feedback, id)) = serde_json::from_str::<Feedback>(line)
            .ok()
            .and_then(|feedback| ImageId::new(&feedback.image_id).ok().map(|id| (feedback, id)))
        else {
            unusable += 1;
            continue;
        };
        let text = feedback.text.trim().to_owned();
        if text.is_empty() || !grades_by_text.contains_key(&text) && texts.len() == MAX_QUERIES {
            unusable += 1;
            continue;
        }
        let grade = f64::from(u8::from(feedback.verdict == FeedbackVerdict::Right));
        grades_by_text
            .entry(text.clone())
            .or_insert_with(|| {
                texts.push(text);
                BTreeMap::new()
            })
            .insert(id, grade);
    }
    let queries = texts.into_iter().map(|text| {
        let grades = grades_by_text.remove(&text).unwrap_or_default();
        JudgedQuery {
            text,
            group: None,
            judgements: Judgements::Graded { grades, judged_only: true },
        }
    });
    (queries.collect(), unusable)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_verdict_on_an_image_counts_and_only_judged_images_are_ranked() {
        let lines = [
            r#"{"at":"2026-01-01T00:00:00Z","text":"a mug","image_id":"1","verdict":"right"}"#,
            r#"{"at":"2026-01-02T00:00:00Z","text":"a mug","image_id":"2","verdict":"wrong"}"#,
            r#"{"at":"2026-01-03T00:00:00Z","text":"a mug","image_id":"1","verdict":"wrong"}"#,
            "broken",
        ];
        let (queries, unusable) = queries_from_feedback(lines.into_iter());
        assert_eq!((queries.len(), unusable), (1, 1));
        let Judgements::Graded { grades, judged_only: true } = &queries[0].judgements else {
            panic!()
        };
        assert_eq!(grades.values().copied().collect::<Vec<_>>(), [0.0, 0.0]);
    }
}
