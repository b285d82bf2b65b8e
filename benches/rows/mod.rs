//! Rows as workers write them, with random embeddings.

use std::collections::BTreeMap;
use std::error::Error;

use bsap::balance::statistics::{ScoreStatistics, StatisticsKey};
use bsap::record::{Embedding, ImageId, ImageRow, SequenceKey, StoredImage};

/// A random direction, the same for the same seed.
pub fn random_unit_vector(seed: u64, dimension: usize) -> Vec<f32> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state >> 40) as f32 / (1u32 << 24) as f32 - 0.5
    };
    let values: Vec<f32> = (0..dimension).map(|_| next()).collect();
    let length = values.iter().map(|v| v * v).sum::<f32>().sqrt();
    values.into_iter().map(|v| v / length).collect()
}

/// Version `sequence` of the image number `i`, with statistics by `sets`.
pub fn random_row(
    i: usize,
    sequence: u64,
    dimension: usize,
    sets: &[StatisticsKey],
) -> Result<ImageRow, Box<dyn Error>> {
    let at = chrono::DateTime::from_timestamp(1_700_000_000 + sequence as i64, 0);
    let embedding = random_unit_vector((i as u64 + 99) ^ (sequence << 40), dimension);
    // Any digits of the embedding: what counts is that they do not compress better than real ones.
    let digit = |n: usize| embedding[n % dimension];
    let statistics = ScoreStatistics {
        n: 64,
        mean: 0.2 + digit(0) / 10.0,
        std: 0.03 + digit(1) / 100.0,
        min: 0.1 + digit(2) / 10.0,
        max: 0.3 + digit(3) / 10.0,
        lse: 30.0 + digit(4) * 10.0,
        topk_mean: 0.27 + digit(5) / 10.0,
    };
    Ok(ImageRow {
        image_id: ImageId::new(format!("image-{i:08}"))?,
        sequence: SequenceKey::from_number(sequence),
        event_time: None,
        embedded_at: at.ok_or("no time")?,
        image: Some(StoredImage {
            uri: Some(format!("s3://bucket/{i}.jpg")),
            content_hash: embedding
                .iter()
                .take(32)
                .map(|v| format!("{:02x}", v.to_bits() & 0xff))
                .collect(),
            bytes: 100_000 + i as u64 % 5_000,
            width: 640,
            height: 480,
            attributes: BTreeMap::from([("category".into(), format!("category {}", i % 40))]),
            statistics: sets.iter().map(|key| (key.clone(), statistics)).collect(),
            embedding: Embedding::from_unit_vector(&embedding),
        }),
    })
}
