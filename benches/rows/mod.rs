//! Rows like those of workers, with random embeddings.

use std::collections::BTreeMap;
use std::error::Error;

use bsap::balance::statistics::{ScoreStatistics, StatisticsKey};
use bsap::record::{Embedding, ImageId, ImageRow, SequenceKey, StoredImage};

/// Returns a random unit vector that depends on `seed` alone.
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

/// Returns the version `sequence` of the image number `i`, with statistics for `sets`.
pub fn random_row(
    i: usize,
    sequence: u64,
    dimension: usize,
    sets: &[StatisticsKey],
) -> Result<ImageRow, Box<dyn Error>> {
    let embedded_at = chrono::DateTime::from_timestamp(1_700_000_000 + sequence as i64, 0);
    let embedding = random_unit_vector((i as u64 + 99) ^ (sequence << 40), dimension);
    // Random statistics, so that they do not compress better than real ones.
    let random_value = |n: usize| embedding[n % dimension];
    let statistics = ScoreStatistics {
        n: 64,
        mean: 0.2 + random_value(0) / 10.0,
        std: 0.03 + random_value(1) / 100.0,
        min: 0.1 + random_value(2) / 10.0,
        max: 0.3 + random_value(3) / 10.0,
        lse: 30.0 + random_value(4) * 10.0,
        topk_mean: 0.27 + random_value(5) / 10.0,
    };
    Ok(ImageRow {
        image_id: ImageId::new(format!("image-{i:08}"))?,
        sequence: SequenceKey::from_number(sequence),
        event_time: None,
        embedded_at: embedded_at.ok_or("no time")?,
        image: Some(StoredImage {
            uri: Some(format!("s3://bucket/{i}.jpg")),
            content_hash: embedding
                .iter()
                .take(32)
                .map(|v| format!("{:02x}", v.to_bits() & 0xff))
                .collect(),
            byte_size: 100_000 + i as u64 % 5_000,
            width: 640,
            height: 480,
            attributes: BTreeMap::from([("category".into(), format!("category {}", i % 40))]),
            statistics: sets.iter().map(|key| (key.clone(), statistics)).collect(),
            embedding: Embedding::from_unit_vector(&embedding),
            decoding: None,
        }),
    })
}
