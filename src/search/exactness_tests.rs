//! Answers are those of a brute force in f64 over the stored vectors.

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

/// L of the test's prompt sets.
const LOGIT_SCALE: f32 = 100.0;

/// Ids with exact balanced and raw scores, best balanced first; and best raw first.
fn rank_by_brute_force(
    ask: &ScanRequest,
    allowed: &dyn Fn(&str) -> bool,
) -> [Vec<(String, f64)>; 2] {
    let mut lists: [Vec<(String, f64)>; 2] = Default::default();
    for (entry, embedding) in ask.snapshot.images() {
        let id = entry.image_id.as_str();
        if !allowed(id) {
            continue;
        }
        let values = embedding.values().iter().zip(&*ask.embedding);
        let raw: f64 = values.map(|(v, q)| f64::from(*v) * f64::from(*q)).sum();
        let affine = ask
            .snapshot
            .statistics(id, &ask.statistics_key)
            .map(|s| ask.balance.affine_transform(&s, LOGIT_SCALE));
        let (alpha, beta) = affine.map_or((1.0, 0.0), |a| (f64::from(a.alpha), f64::from(a.beta)));
        lists[0].push((id.to_owned(), alpha * raw + beta));
        lists[1].push((id.to_owned(), raw));
    }
    for list in &mut lists {
        list.sort_by(|a, b| b.1.total_cmp(&a.1).then_with(|| a.0.cmp(&b.0)));
    }
    lists
}

/// Compares places; where scores differ by rounding alone, ties may fall either way.
fn assert_ranking_agrees(
    ask: &ScanRequest,
    hits: &[Hit],
    offset: usize,
    score_index: usize,
    truth: &[Vec<(String, f64)>; 2],
) {
    let wanted = truth[score_index].len().min(ask.depth).saturating_sub(offset);
    assert_eq!(hits.len(), wanted);
    for (i, hit) in hits.iter().enumerate() {
        let places = [hit.rank, hit.raw_rank];
        assert_eq!(places[score_index], offset + i + 1);
        for (list, (place, score)) in
            truth.iter().zip(places.into_iter().zip([hit.score, hit.raw_score]))
        {
            let id = hit.image.image_id.as_str();
            let (at, exact) = &list[place - 1];
            let own = list.iter().find(|(other, _)| other == id).unwrap().1;
            assert!(at == id || (own - exact).abs() < 1e-12, "{id} at {place}: {own} {exact}");
            assert!((f64::from(score) - own).abs() < 1e-6 * (1.0 + own.abs()));
        }
    }
}

async fn build_snapshot(rng: &mut ChaCha8Rng, dimension: usize, rows: u64) -> Arc<Snapshot> {
    let sets = vec![sample_prompt_set("one", dimension), sample_prompt_set("three", dimension)];
    let snapshots = SnapshotStore::new(sample_serving_snapshot(sets), u64::MAX);
    let centres: Vec<Vec<f32>> = (0..5).map(|i| clip_like_embedding(900 + i, dimension)).collect();
    let vector = |rng: &mut ChaCha8Rng| {
        let centre = centres.choose(rng).unwrap();
        // Clusters, and exact duplicates so that there are ties.
        let near = if rng.random_bool(0.1) { 0.0 } else { rng.random_range(0.01..0.6) };
        let other = clip_like_embedding(rng.random(), dimension);
        let mixed: Vec<f32> = centre.iter().zip(other).map(|(c, o)| c + near * o).collect();
        let norm = mixed.iter().map(|v| v * v).sum::<f32>().sqrt();
        mixed.into_iter().map(|v| v / norm).collect::<Vec<f32>>()
    };
    let all = (0..rows).map(|i| sample_row(&format!("i{i:05}"), 1, Some(vector(rng)))).collect();
    snapshots
        .apply_changes(TableChanges {
            version: 1,
            is_full_snapshot: true,
            part: SnapshotPart::All,
            rows: all,
        })
        .await
        .unwrap();
    // Updates, deletions and new images, in commits of their own.
    for version in 2..6 {
        let some = (0..rows / 10).map(|_| {
            let id = format!("i{:05}", rng.random_range(0..rows * 11 / 10));
            let vector = rng.random_bool(0.7).then(|| vector(rng));
            sample_row(&id, version, vector)
        });
        let rows = some.collect();
        snapshots
            .apply_changes(TableChanges {
                version,
                is_full_snapshot: false,
                part: SnapshotPart::All,
                rows,
            })
            .await
            .unwrap();
    }
    snapshots.newest()
}

/// Thousands of questions: all normalisers, weights, depths, filters and pages, several a pass.
#[tokio::test]
async fn every_answer_is_the_brute_force_answer() {
    let mut rng = ChaCha8Rng::seed_from_u64(3);
    let mut checked_queries = 0;
    for (dimension, rows) in [(1, 40), (7, 300), (64, 900), (40, 5000), (96, 1)] {
        let snapshot = build_snapshot(&mut rng, dimension, rows).await;
        let groups: usize = snapshot.chunks.iter().map(|c| c.live_bitmap.len()).sum();
        let tasks = split_into_tasks(&snapshot);
        for _ in 0..(60_000 / (rows + 60)) {
            let count = rng.random_range(1..7);
            let asks: Vec<ScanRequest> = (0..count)
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
                        // A query that is an image of the catalogue, and one like no image.
                        0 => snapshot
                            .images()
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
                        logit_scale: LOGIT_SCALE,
                        row_mask: mask,
                        depth: rng.random_range(1..40),
                    }
                })
                .collect();
            let refs: Vec<&ScanRequest> = asks.iter().collect();
            for (ask, scanned) in asks.iter().zip(scan_snapshot(&snapshot, &tasks, &refs)) {
                let allowed = |id: &str| {
                    let place = snapshot.find_row(id).unwrap();
                    let first = tasks
                        .iter()
                        .find(|t| t.chunk_index == place.chunk && t.first_group == 0)
                        .unwrap()
                        .global_first_group;
                    ask.row_mask
                        .as_ref()
                        .is_none_or(|m| m[first + place.row / 64] >> (place.row % 64) & 1 == 1)
                };
                let truth = rank_by_brute_force(ask, &allowed);
                let ranker = ExactRanker::new(ask, &tasks, &scanned);
                let offset = rng.random_range(0..ask.depth);
                let found = ranker.top_k(offset);
                assert_eq!(found.matched, truth[0].len());
                assert_ranking_agrees(ask, &found.hits, offset, 0, &truth);
                assert_ranking_agrees(ask, &found.raw_hits, offset, 1, &truth);
                let behind = rank_by_brute_force(ask, &|id| {
                    let place = snapshot.find_row(id).unwrap();
                    let first = tasks
                        .iter()
                        .find(|t| t.chunk_index == place.chunk && t.first_group == 0)
                        .unwrap()
                        .global_first_group;
                    ask.row_mask.is_none()
                        || (first + place.row / 64).is_multiple_of(BACKGROUND_GROUP_STRIDE)
                });
                let scores: Vec<f64> = behind[0].iter().map(|(_, score)| *score).collect();
                if !scores.is_empty() {
                    let mean = scores.iter().sum::<f64>() / scores.len() as f64;
                    assert!(
                        (f64::from(found.score_distribution.mean) - mean).abs()
                            < 0.02 * (1.0 + mean.abs())
                    );
                }
                if let Some((id, _)) = truth[0].choose(&mut rng) {
                    let hit = ranker.rank_of(snapshot.find_row(id).unwrap()).unwrap();
                    let place = |list: &[(String, f64)]| {
                        list.iter().position(|(o, _)| o == id).unwrap() + 1
                    };
                    let near = |list: &[(String, f64)], a: usize, b: usize| {
                        a == b || (list[a - 1].1 - list[b - 1].1).abs() < 1e-12
                    };
                    assert!(near(&truth[0], place(&truth[0]), hit.rank));
                    assert!(near(&truth[1], place(&truth[1]), hit.raw_rank));
                }
                checked_queries += 1;
            }
        }
    }
    assert!(checked_queries > 2000, "{checked_queries}");
}
