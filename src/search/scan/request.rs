//! What a pass over the snapshot is asked for.

use std::sync::Arc;

use pulp::Arch;

use crate::balance::normalise::{AffineTransform, AffineTransforms, BalanceParameters};
use crate::balance::statistics::{ScoreStatistics, StatisticsKey};
use crate::search::snapshot::{ROWS_PER_GROUP, Snapshot};

/// A query, ready to be scanned for.
#[derive(Debug, Clone)]
pub struct ScanRequest {
    /// What is searched.
    pub snapshot: Arc<Snapshot>,
    /// The query's embedding.
    pub embedding: Arc<Vec<f32>>,
    /// Which statistics.
    pub statistics_key: StatisticsKey,
    /// How they balance.
    pub balance: BalanceParameters,
    /// L of the statistics.
    pub logit_scale: f32,
    /// Rows that may be found, a bit each, a word a group over all chunks; none: all live rows.
    pub row_mask: Option<Arc<[u64]>>,
    /// How many of the best are wanted, those of earlier pages counted.
    pub depth: usize,
}

impl ScanRequest {
    /// α and β of a row with these statistics.
    pub fn affine_transform(&self, statistics: &ScoreStatistics) -> AffineTransform {
        if statistics.n == 0 {
            return AffineTransform { alpha: 1.0, beta: 0.0 };
        }
        self.balance.affine_transform(statistics, self.logit_scale)
    }

    /// α and β of a group's rows with these statistics; where there are none, they stay 1 and 0.
    pub fn fill_affine_factors(
        &self,
        statistics: Option<&[ScoreStatistics]>,
        out: &mut [[f32; ROWS_PER_GROUP]; 2],
    ) {
        let Some(statistics) = statistics else { return };
        let [alpha, beta] = out;
        Arch::new().dispatch(AffineTransforms {
            balance: self.balance,
            statistics,
            logit_scale: self.logit_scale,
            alpha_beta: [alpha, beta],
        });
    }

    pub fn has_same_balance(&self, other: &Self) -> bool {
        self.statistics_key == other.statistics_key && self.balance == other.balance
    }
}
