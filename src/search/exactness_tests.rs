//! Compares answers with a brute-force ranking in f64 over the stored embeddings.

use std::sync::Arc;

use rand::seq::IndexedRandom;
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;

use super::scan::{
    BACKGROUND_GROUP_STRIDE, ExactRanker, Hit, ScanRequest, scan_snapshot, split_into_tasks,
};
use super::snapshot::{Snapshot, SnapshotStore};
use super::testing::{clip_like_embedding, sample_prompt_set, sample_row, sample_serving_snapshot};
use crate::balance::normalise::{BalanceParameters, Normaliser};
use crate::table::{SnapshotPart, TableChanges};

/// Logit scale of the prompt sets.
const LOGIT_SCALE: f32 = 100.0;

/// Ranks the allowed images by exact balanced scores, and by exact raw scores: ids with scores, best
/// first.
fn rank_by_brute_force(
    request: &ScanRequest,
    is_allowed: &dyn Fn(&str) -> bool,
) -> [Vec<(String, f64)>; 2] {
    let mut lists: [Vec<(String, f64)>; 2] = Default::default();
    for (image, embedding) in request.snapshot.images_with_embeddings() {
        let id = image.image_id.as_str();
        if !is_allowed(id) {
            continue;
        }
        let values = embedding.values().iter().zip(&*request.embedding);
        let raw: f64 = values.map(|(v, q)| f64::from(*v) * f64::from(*q)).sum();
        let affine = request
            .snapshot
            .statistics(id, &request.statistics_key)
            .map(|s| request.balance.affine_transform(&s, LOGIT_SCALE));
        let (alpha, beta) = affine.map_or((1.0, 0.0), |a| (f64::from(a.alpha), f64::from(a.beta)));
        lists[0].push((id.to_owned(), alpha * raw + beta));
        lists[1].push((id.to_owned(), raw));
    }
    for list in &mut lists {
        list.sort_by(|a, b| b.1.total_cmp(&a.1).then_with(|| a.0.cmp(&b.0)));
    }
    lists
}

/// Compares ranks and scores with the brute-force ranking. Images whose scores differ only by rounding may
/// be in either order.
fn assert_ranking_agrees(
    request: &ScanRequest,
    hits: &[Hit],
    offset: usize,
    score_index: usize,
    expected: &[Vec<(String, f64)>; 2],
) {
    let expected_hits = expected[score_index].len().min(request.depth).saturating_sub(offset);
    assert_eq!(hits.len(), expected_hits);
    for (i, hit) in hits.iter().enumerate() {
        let ranks = [hit.rank, hit.raw_rank];
        assert_eq!(ranks[score_index], offset + i + 1);
        for (list, (rank, score)) in
            expected.iter().zip(ranks.into_iter().zip([hit.score, hit.raw_score]))
        {
            let id = hit.image_metadata.image_id.as_str();
            let (id_at_rank, score_at_rank) = &list[rank - 1];
            let exact = list.iter().find(|(other, _)| other == id).unwrap().1;
            assert!(
                id_at_rank == id || (exact - score_at_rank).abs() < 1e-12,
                "{id} at {rank}: {exact} {score_at_rank}"
            );
            assert!((f64::from(score) - exact).abs() < 1e-6 * (1.0 + exact.abs()));
        }
    }
}

/// Builds a snapshot of clustered images with duplicates, from several commits.
async fn build_snapshot(rng: &mut ChaCha8Rng, dimension: usize, rows: u64) -> Arc<Snapshot> {
    let sets = vec![sample_prompt_set("one", dimension), sample_prompt_set("three", dimension)];
    let snapshots = SnapshotStore::new(sample_serving_snapshot(sets), u64::MAX);
    let centres: Vec<Vec<f32>> = (0..5).map(|i| clip_like_embedding(900 + i, dimension)).collect();
    let random_vector = |rng: &mut ChaCha8Rng| {
        let centre = centres.choose(rng).unwrap();
        // Some vectors are exact duplicates, so that there are ties.
        let distance = if rng.random_bool(0.1) { 0.0 } else { rng.random_range(0.01..0.6) };
        let other = clip_like_embedding(rng.random(), dimension);
        let mixed: Vec<f32> = centre.iter().zip(other).map(|(c, o)| c + distance * o).collect();
        let norm = mixed.iter().map(|v| v * v).sum::<f32>().sqrt();
        mixed.into_iter().map(|v| v / norm).collect::<Vec<f32>>()
    };
    let first_rows =
        (0..rows).map(|i| sample_row(&format!("i{i:05}"), 1, Some(random_vector(rng)))).collect();
    snapshots
        .apply_changes(TableChanges {
            table_version: 1,
            is_full_snapshot: true,
            part: SnapshotPart::All,
            rows: first_rows,
        })
        .await
        .unwrap();
    // Updates, deletes and new images in further commits.
    for version in 2..6 {
        let changed_rows = (0..rows / 10).map(|_| {
            let id = format!("i{:05}", rng.random_range(0..rows * 11 / 10));
            let vector = rng.random_bool(0.7).then(|| random_vector(rng));
            sample_row(&id, version, vector)
        });
        let rows = changed_rows.collect();
        snapshots
            .apply_changes(TableChanges {
                table_version: version,
                is_full_snapshot: false,
                part: SnapshotPart::All,
                rows,
            })
            .await
            .unwrap();
    }
    snapshots.newest()
}

/// Thousands of random queries with all normalisers, weights, depths, filters and pages, several per pass.
#[tokio::test]
async fn every_answer_equals_the_brute_force_answer() {
    let mut rng = ChaCha8Rng::seed_from_u64(3);
    let mut checked_queries = 0;
    for (dimension, rows) in [(1, 40), (7, 300), (64, 900), (40, 5000), (96, 1)] {
        let snapshot = build_snapshot(&mut rng, dimension, rows).await;
        let groups: usize = snapshot.chunks.iter().map(|c| c.live_bitmap.len()).sum();
        let tasks = split_into_tasks(&snapshot);
        for _ in 0..(60_000 / (rows + 60)) {
            let count = rng.random_range(1..7);
            let requests: Vec<ScanRequest> = (0..count)
                .map(|_| {
                    let set = snapshot.serving_snapshot.prompt_sets.choose(&mut rng).unwrap();
                    let normaliser = *Normaliser::ALL.choose(&mut rng).unwrap();
                    let scale = snapshot.scale_constants(&set.statistics_key, normaliser);
                    let weight = *[0.0, 0.1, 0.5, 1.0].choose(&mut rng).unwrap();
                    let mask = rng.random_bool(0.5).then(|| {
                        let live = snapshot.chunks.iter().flat_map(|c| c.live_bitmap.iter());
                        let mask: Vec<u64> = match rng.random_range(0..3) {
                            0 => vec![0; groups],
                            1 => live
                                .map(|w| w & rng.random::<u64>() & rng.random::<u64>())
                                .collect(),
                            _ => live.map(|w| w & rng.random::<u64>()).collect(),
                        };
                        Arc::from(mask)
                    });
                    let query = match rng.random_range(0..4) {
                        // A query that is an image of the catalogue, and one that is like no image.
                        0 => snapshot
                            .images_with_embeddings()
                            .next()
                            .map_or(vec![0.0; dimension], |i| i.1.values().to_vec()),
                        1 => clip_like_embedding(rng.random(), dimension)
                            .iter()
                            .map(|v| -v)
                            .collect(),
                        _ => clip_like_embedding(rng.random(), dimension),
                    };
                    ScanRequest {
                        snapshot: snapshot.clone(),
                        embedding: Arc::new(query),
                        statistics_key: set.statistics_key.clone(),
                        balance: BalanceParameters { normaliser, weight, lambda: 0.7, scale },
                        softmax_scale: LOGIT_SCALE,
                        row_mask: mask,
                        depth: rng.random_range(1..40),
                    }
                })
                .collect();
            let request_refs: Vec<&ScanRequest> = requests.iter().collect();
            // The bitmap word of a row and its bit in that word, as masks over all chunks have them.
            let mask_position = |id: &str| {
                let location = snapshot.find_row(id).unwrap();
                let first_group = tasks
                    .iter()
                    .find(|t| t.chunk_index == location.chunk_index && t.first_group == 0)
                    .unwrap()
                    .global_first_group;
                (first_group + location.row_index / 64, location.row_index % 64)
            };
            let results = scan_snapshot(&snapshot, &tasks, &request_refs);
            for (request, result) in requests.iter().zip(&results) {
                let is_allowed = |id: &str| {
                    let (word, bit) = mask_position(id);
                    request.row_mask.as_ref().is_none_or(|mask| mask[word] >> bit & 1 == 1)
                };
                let expected = rank_by_brute_force(request, &is_allowed);
                let ranker = ExactRanker::new(request, &tasks, result);
                let offset = rng.random_range(0..request.depth);
                let top_k = ranker.top_k(offset);
                assert_eq!(top_k.matched_image_count, expected[0].len());
                assert_ranking_agrees(request, &top_k.hits, offset, 0, &expected);
                assert_ranking_agrees(request, &top_k.raw_hits, offset, 1, &expected);
                let background = rank_by_brute_force(request, &|id| {
                    request.row_mask.is_none()
                        || mask_position(id).0.is_multiple_of(BACKGROUND_GROUP_STRIDE)
                });
                let scores: Vec<f64> = background[0].iter().map(|(_, score)| *score).collect();
                if !scores.is_empty() {
                    let mean = scores.iter().sum::<f64>() / scores.len() as f64;
                    assert!(
                        (f64::from(top_k.score_distribution.mean) - mean).abs()
                            < 0.02 * (1.0 + mean.abs())
                    );
                }
                if let Some((id, _)) = expected[0].choose(&mut rng) {
                    let hit = ranker.ranked_hit(snapshot.find_row(id).unwrap()).unwrap();
                    let expected_rank = |list: &[(String, f64)]| {
                        list.iter().position(|(other, _)| other == id).unwrap() + 1
                    };
                    let is_tie = |list: &[(String, f64)], a: usize, b: usize| {
                        a == b || (list[a - 1].1 - list[b - 1].1).abs() < 1e-12
                    };
                    assert!(is_tie(&expected[0], expected_rank(&expected[0]), hit.rank));
                    assert!(is_tie(&expected[1], expected_rank(&expected[1]), hit.raw_rank));
                }
                checked_queries += 1;
            }
        }
    }
    assert!(checked_queries > 2000, "{checked_queries}");
}
