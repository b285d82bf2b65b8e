//! Which results of a running demo are right: the title of a drawn picture names everything in it.

use std::collections::BTreeSet;
use std::sync::{Mutex, PoisonError};

use rayon::prelude::*;

use super::EXAMPLE_QUERIES;
use super::catalogue::Product;
use super::judge::{ScoredQuery, measure_queries};
use super::queries::{AttributeQuery, generate_queries, parse_title};
use crate::balance::normalise::{AffineTransform, BalanceParameters};
use crate::balance::statistics::dot_product;
use crate::evaluate::{
    ConfidenceInterval, Cutoffs, FALSE_HIT_MEASURE, MeasureComparison, MeasuredDifference,
    RESAMPLING_SEED, classify_difference, compare_measures, correct_by_holm, wilson_interval,
};
use crate::record::Embedding;
use crate::search::{Engine, ImageMetadata, QueryError, Snapshot};
use crate::serve::result_judge::{
    ImageJudge, RankingScore, ResultJudge, SampleScore, ScoreDifference, ScoreVerdict,
};

/// Generated sample queries per difficulty, in addition to the examples that the page offers. These few
/// would not show any difference.
const SAMPLES_PER_DIFFICULTY: usize = 60;
/// Seed of the sample queries: none of those by which model and weight were chosen.
const SAMPLE_SEED: u64 = 41;

/// What the drawn pictures show, and sample queries about them.
pub struct DrawnTruth {
    samples: Vec<AttributeQuery>,
    /// The embeddings of the samples, with the fingerprint of their model.
    embedded_samples: Mutex<Option<(String, Vec<Vec<f32>>)>>,
    /// The last score, with the serial number of its snapshot.
    last_score: Mutex<Option<(u64, Option<SampleScore>)>>,
}

impl Default for DrawnTruth {
    fn default() -> Self {
        let mut seen = BTreeSet::new();
        let examples = EXAMPLE_QUERIES.into_iter().filter_map(AttributeQuery::parse);
        let samples = examples.chain(generate_queries(SAMPLE_SEED, SAMPLES_PER_DIFFICULTY));
        Self {
            samples: samples.filter(|query| seen.insert(query.text.clone())).collect(),
            embedded_samples: Mutex::default(),
            last_score: Mutex::default(),
        }
    }
}

fn products_of(image: &ImageMetadata) -> Option<Vec<Product>> {
    parse_title(image.attributes.get("title")?)
}

impl ResultJudge for DrawnTruth {
    fn judge_text(&self, text: &str) -> Option<ImageJudge> {
        let query = AttributeQuery::parse(text)?;
        Some(Box::new(move |image| {
            products_of(image).is_some_and(|products| query.matches_products(&products))
        }))
    }

    fn score_samples(&self, engine: &Engine) -> Result<Option<SampleScore>, QueryError> {
        let snapshot = engine.snapshots().newest();
        // Held while it is computed: those who ask at the same time wait for it.
        let mut last = self.last_score.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((serial, score)) = &*last
            && *serial == snapshot.serial
        {
            return Ok(score.clone());
        }
        let texts = self.embed_samples(engine)?;
        let score = score_rankings(&snapshot, &self.samples, &texts);
        *last = Some((snapshot.serial, score.clone()));
        Ok(score)
    }
}

impl DrawnTruth {
    fn embed_samples(&self, engine: &Engine) -> Result<Vec<Vec<f32>>, QueryError> {
        let encoders = engine.encoders();
        let fingerprint = &encoders.card().fingerprint;
        let mut embedded = self.embedded_samples.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((model, units)) = &*embedded
            && model == fingerprint
        {
            return Ok(units.clone());
        }
        let texts: Vec<&str> = self.samples.iter().map(|query| query.text.as_str()).collect();
        let units = encoders.embed_texts_in_batches(&texts)?;
        *embedded = Some((fingerprint.clone(), units.clone()));
        Ok(units)
    }
}

/// A picture with what it shows, and what its statistics make of a raw score.
struct DrawnImage {
    products: Vec<Product>,
    embedding: Embedding,
    affine: AffineTransform,
}

/// Returns the pictures of the snapshot with the live configuration's transforms.
fn drawn_images(snapshot: &Snapshot) -> Vec<DrawnImage> {
    let served = &snapshot.serving_snapshot;
    let serving = &served.serving;
    let key = &serving.prompt_set;
    let Some(set) = served.prompt_sets.iter().find(|set| set.statistics_key == *key) else {
        return Vec::new();
    };
    let balance = BalanceParameters {
        normaliser: serving.normaliser,
        weight: serving.weight,
        lambda: serving.lambda,
        scale: serving.scale.unwrap_or_else(|| snapshot.scale_constants(key, serving.normaliser)),
    };
    let drawn_image = |(image, embedding): (ImageMetadata, Embedding)| {
        let statistics = snapshot.statistics(image.image_id.as_str(), key)?;
        let affine = balance.affine_transform(&statistics, set.softmax_scale());
        Some(DrawnImage { products: products_of(&image)?, embedding, affine })
    };
    snapshot.images_with_embeddings().filter_map(drawn_image).collect()
}

/// Compares both rankings over the queries that a picture matches; `None` if there are none.
fn score_rankings(
    snapshot: &Snapshot,
    queries: &[AttributeQuery],
    texts: &[Vec<f32>],
) -> Option<SampleScore> {
    let images = drawn_images(snapshot);
    let scored: Vec<ScoredQuery> = queries
        .par_iter()
        .zip(texts)
        .map(|(query, text)| ScoredQuery {
            group: query.difficulty.name(),
            raw_scores: images.iter().map(|i| dot_product(text, i.embedding.values())).collect(),
            relevance_by_picture: images
                .iter()
                .map(|image| query.matches_products(&image.products))
                .collect(),
        })
        .filter(|query| query.relevance_by_picture.contains(&true))
        .collect();
    let plain = measure_queries(&scored, |_, raw| raw);
    let balanced = measure_queries(&scored, |image, raw| images[image].affine.apply(raw));
    let [plain_rows, balanced_rows] =
        [&plain, &balanced].map(|rows| rows.iter().map(Vec::as_slice).collect::<Vec<_>>());
    let comparisons = compare_measures(&balanced_rows, &plain_rows, RESAMPLING_SEED);

    let cutoffs = Cutoffs::default();
    let names = cutoffs.measure_names();
    let recall_name = format!("capped recall@{}", cutoffs.depth());
    let position = |name: &str| names.iter().position(|other| other == name);
    let (false_hit, recall) = (position(FALSE_HIT_MEASURE)?, position(&recall_name)?);
    let ranking_score = |measured: &[Vec<f64>]| RankingScore {
        false_first_hits: measured.iter().filter(|row| row[false_hit] > 0.0).count(),
        recall: measured.iter().map(|row| row[recall]).sum::<f64>() / measured.len() as f64,
    };
    let served = &snapshot.serving_snapshot;
    let compared = [(FALSE_HIT_MEASURE, false_hit), (recall_name.as_str(), recall)];
    let p_values = compared.map(|(_, column)| comparisons.get(column).map_or(1.0, |c| c.p_value));
    let differences: Vec<ScoreDifference> = compared
        .into_iter()
        .zip(correct_by_holm(&p_values))
        .filter_map(|((name, column), p_value)| {
            let comparison = MeasureComparison { p_value, ..*comparisons.get(column)? };
            Some(score_difference(name, &comparison, scored.len()))
        })
        .collect();
    let [false_first_hits, recall] = *differences.as_slice() else { return None };
    Some(SampleScore {
        table_version: snapshot.table_version,
        configuration: served.configuration_name.clone(),
        normaliser: served.serving.normaliser,
        weight: served.serving.weight,
        queries: scored.len(),
        recall_depth: cutoffs.depth(),
        plain: ranking_score(&plain),
        balanced: ranking_score(&balanced),
        false_first_hits,
        recall,
        summary: describe_differences(false_first_hits.verdict, recall.verdict).to_owned(),
    })
}

fn score_difference(
    measure: &str,
    comparison: &MeasureComparison,
    queries: usize,
) -> ScoreDifference {
    let verdict = match classify_difference(measure, comparison) {
        MeasuredDifference::Better => ScoreVerdict::Better,
        MeasuredDifference::Worse => ScoreVerdict::Worse,
        MeasuredDifference::NotSignificant => ScoreVerdict::NotSignificant,
    };
    let ConfidenceInterval { mean, mut low, mut high } = comparison.gain;
    // Without any change among these queries, the bootstrap has none to sample. Other queries may change.
    if low >= high {
        let unseen = wilson_interval(0, queries).map_or(1.0, |share| share.high);
        (low, high) = (mean - unseen, mean + unseen);
    }
    ScoreDifference { mean, low, high, verdict }
}

/// Says what the differences show, and nothing that they do not show.
fn describe_differences(false_first_hits: ScoreVerdict, recall: ScoreVerdict) -> &'static str {
    use ScoreVerdict::{Better, NotSignificant, Worse};
    match (false_first_hits, recall) {
        (Better, Better) => {
            "Balancing has fewer false first hits, and finds more of the right pictures."
        }
        (Better, NotSignificant) => {
            "Balancing has fewer false first hits; it does not measurably find more or fewer of the right pictures."
        }
        (Better, Worse) => {
            "Balancing has fewer false first hits, but finds fewer of the right pictures."
        }
        (NotSignificant, Better) => {
            "Balancing finds more of the right pictures; its false first hits are not measurably fewer or more."
        }
        (NotSignificant, NotSignificant) => {
            "These queries show no difference between the rankings."
        }
        (NotSignificant, Worse) => {
            "Balancing finds fewer of the right pictures; its false first hits are not measurably fewer or more."
        }
        (Worse, Better) => {
            "Balancing has more false first hits, but finds more of the right pictures."
        }
        (Worse, NotSignificant) => {
            "Balancing has more false first hits; it does not measurably find more or fewer of the right pictures."
        }
        (Worse, Worse) => {
            "Balancing has more false first hits, and finds fewer of the right pictures."
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::demo::catalogue::{PhotoStyle, Scene};
    use crate::search::testing::{
        HashEncoders, sample_prompt_set, sample_row, sample_serving_snapshot,
    };
    use crate::search::{Query, SearchOptions};
    use crate::table::{SnapshotPart, TableChanges};

    const DIMENSION: usize = 16;

    /// An engine of drawn pictures whose embeddings say nothing of what they show.
    async fn engine_of_pictures(count: u64) -> Engine {
        let encoders = HashEncoders::new(DIMENSION);
        let set = sample_prompt_set("first", DIMENSION);
        let row = |number: u64| {
            let scene = Scene::sample(1, number, PhotoStyle::Studio);
            let id = format!("p-{number}");
            let mut row = sample_row(&id, 1, Some(encoders.embed_bytes(id.as_bytes())));
            row.image.as_mut().unwrap().attributes = scene.attributes();
            row
        };
        let serving = sample_serving_snapshot(vec![set]);
        let engine = Engine::new(encoders.clone(), serving, SearchOptions::default());
        let rows = (0..count).map(row).collect();
        let part = SnapshotPart::All;
        let changes = TableChanges { table_version: 1, is_full_snapshot: true, part, rows };
        engine.snapshots().apply_changes(changes).await.unwrap();
        engine
    }

    #[tokio::test]
    async fn the_score_counts_what_the_rankings_show() {
        let engine = engine_of_pictures(80).await;
        let truth = DrawnTruth::default();
        let score = truth.score_samples(&engine).unwrap().unwrap();
        let (mut queries, mut wrong, mut recall) = (0, [0, 0], [0.0, 0.0]);
        for sample in &truth.samples {
            let judge = truth.judge_text(&sample.text).unwrap();
            let right = engine.snapshots().newest().images().filter(|image| judge(image)).count();
            if right == 0 {
                continue;
            }
            queries += 1;
            let input = sample.text.as_str().into();
            let query = Query { input, k: Some(10), ..Query::default() };
            let results = engine.search(&query).unwrap();
            for (ranking, hits) in [&results.raw_hits, &results.hits].into_iter().enumerate() {
                let marks: Vec<bool> = hits.iter().map(|hit| judge(&hit.image_metadata)).collect();
                wrong[ranking] += usize::from(!marks[0]);
                let found = marks.iter().filter(|is_right| **is_right).count();
                recall[ranking] += found as f64 / right.min(10) as f64;
            }
        }
        assert!(queries > 40 && queries < truth.samples.len(), "{queries}");
        assert_eq!(score.queries, queries);
        for (ranking, counted) in [score.plain, score.balanced].into_iter().enumerate() {
            assert_eq!(counted.false_first_hits, wrong[ranking]);
            assert!((counted.recall - recall[ranking] / queries as f64).abs() < 1e-9);
        }
        // Embeddings by chance: there is nothing to gain, and nothing is claimed.
        assert!(score.plain.false_first_hits > queries / 2);
        assert_eq!(score.false_first_hits.verdict, ScoreVerdict::NotSignificant);
        assert!(score.summary.contains("no difference"), "{}", score.summary);
        let difference = score.balanced.recall - score.plain.recall;
        assert!((score.recall.mean - difference).abs() < 1e-9);
    }

    #[tokio::test]
    async fn without_a_right_answer_there_is_no_score() {
        let engine = engine_of_pictures(0).await;
        assert_eq!(DrawnTruth::default().score_samples(&engine).unwrap(), None);
    }

    #[test]
    fn an_interval_without_any_change_is_not_empty() {
        let rows: Vec<[f64; 1]> = (0..150).map(|i| [f64::from(i % 2)]).collect();
        let rows: Vec<&[f64]> = rows.iter().map(<[f64; 1]>::as_slice).collect();
        let comparison = compare_measures(&rows, &rows, RESAMPLING_SEED)[0];
        let difference = score_difference(FALSE_HIT_MEASURE, &comparison, rows.len());
        assert_eq!((difference.mean, difference.verdict), (0.0, ScoreVerdict::NotSignificant));
        assert!(difference.low < -0.02 && difference.high > 0.02, "{difference:?}");
    }

    #[test]
    fn no_sentence_claims_what_is_not_significant() {
        use ScoreVerdict::{Better, NotSignificant, Worse};
        for (false_first_hits, recall) in [Better, Worse, NotSignificant]
            .into_iter()
            .flat_map(|a| [(a, Better), (a, Worse), (a, NotSignificant)])
        {
            let sentence = describe_differences(false_first_hits, recall);
            let says = |words: &str| sentence.contains(words);
            assert_eq!(says("has fewer false"), false_first_hits == Better, "{sentence}");
            assert_eq!(says("has more false"), false_first_hits == Worse, "{sentence}");
            assert_eq!(says("finds more of"), recall == Better, "{sentence}");
            assert_eq!(says("finds fewer of"), recall == Worse, "{sentence}");
        }
    }
}
