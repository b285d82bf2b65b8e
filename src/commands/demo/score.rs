//! The score of both rankings over the sample queries, for the terminal.

use comfy_table::Table;
use comfy_table::presets::UTF8_BORDERS_ONLY;

use crate::serve::http::{SearchHit, SearchResponse};
use crate::serve::result_judge::{RankingScore, SampleScore, ScoreDifference};

/// Renders the score; says why there is none if there is none.
pub fn render_score(score: Option<&SampleScore>) -> String {
    let Some(score) = score else {
        return "No picture is a right answer to any sample query: draw more with --images.".into();
    };
    let percent = |share: f64| format!("{:.1} %", share * 100.0);
    let row = |name: &str, ranking: &RankingScore| {
        let wrong = ranking.false_first_hits;
        let share = percent(wrong as f64 / score.queries as f64);
        vec![
            name.to_owned(),
            format!("{wrong} of {} ({share})", score.queries),
            percent(ranking.recall),
        ]
    };
    let balanced = format!("balanced ({}, weight {})", score.normaliser.name(), score.weight);
    let difference = vec![
        "difference".to_owned(),
        format_points(&score.false_first_hits),
        format_points(&score.recall),
    ];
    let mut table = Table::new();
    table
        .load_style(UTF8_BORDERS_ONLY)
        .set_header(vec![
            String::new(),
            "first result wrong".into(),
            format!("right pictures found in the first {}", score.recall_depth),
        ])
        .add_rows([row("plain CLIP", &score.plain), row(&balanced, &score.balanced), difference]);
    format!(
        "Over {} sample queries, judged by what the program drew (95 % intervals):\n{table}\n{}",
        score.queries, score.summary
    )
}

fn format_points(difference: &ScoreDifference) -> String {
    let signed = |share: f64| format!("{:+.1}", share * 100.0).replace('-', "−");
    let ScoreDifference { mean, low, high, .. } = difference;
    format!("{} points ({} to {})", signed(*mean), signed(*low), signed(*high))
}

/// Counts the right results of both rankings; `None` if the response has no marks.
pub fn render_right_counts(answer: &SearchResponse) -> Option<String> {
    let total = answer.right_images?;
    if total == 0 {
        return Some("no picture in the catalogue is right".into());
    }
    let right = |hits: &[SearchHit]| hits.iter().filter(|hit| hit.right == Some(true)).count();
    Some(format!(
        "{} of {total} right pictures among the first {} by plain CLIP, {} of {total} among {} balanced",
        right(&answer.raw_hits),
        answer.raw_hits.len(),
        right(&answer.hits),
        answer.hits.len(),
    ))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::balance::normalise::Normaliser;
    use crate::serve::result_judge::ScoreVerdict;

    #[test]
    fn the_score_has_counts_shares_and_intervals() {
        let difference = ScoreDifference {
            mean: -0.05,
            low: -0.1,
            high: 0.0,
            verdict: ScoreVerdict::NotSignificant,
        };
        let score = SampleScore {
            table_version: 1,
            configuration: "initial".into(),
            normaliser: Normaliser::Nnn,
            weight: 0.25,
            queries: 40,
            recall_depth: 10,
            plain: RankingScore { false_first_hits: 10, recall: 0.5 },
            balanced: RankingScore { false_first_hits: 8, recall: 0.55 },
            false_first_hits: difference,
            recall: ScoreDifference { mean: 0.05, low: 0.01, high: 0.09, ..difference },
            summary: "No difference.".into(),
        };
        let text = render_score(Some(&score));
        for words in [
            "10 of 40 (25.0 %)",
            "8 of 40 (20.0 %)",
            "55.0 %",
            "−5.0 points (−10.0 to +0.0)",
            "+5.0 points (+1.0 to +9.0)",
            "found in the first 10",
        ] {
            assert!(text.contains(words), "{words} is not in {text}");
        }
        assert!(text.ends_with("No difference."));
        assert!(render_score(None).contains("--images"));
    }
}
