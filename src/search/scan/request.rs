//! A query in the form that the scan needs.

use std::sync::Arc;

use pulp::Arch;

use crate::balance::normalise::{AffineTransform, AffineTransformKernel, BalanceParameters};
use crate::balance::statistics::{ScoreStatistics, StatisticsKey};
use crate::prompts::EmbeddedPromptSet;
use crate::search::snapshot::{ROWS_PER_GROUP, Snapshot};

/// A validated and embedded query over one snapshot.
#[derive(Debug, Clone)]
pub struct ScanRequest {
    /// Snapshot that is scanned.
    pub snapshot: Arc<Snapshot>,
    /// Unit embedding of the query.
    pub embedding: Arc<Vec<f32>>,
    /// Selects the statistics of the images.
    pub statistics_key: StatisticsKey,
    /// Normaliser, weight and constants that turn statistics into α and β.
    pub balance: BalanceParameters,
    /// Scale at which the log-sum-exps of the statistics were computed.
    pub softmax_scale: f32,
    /// Rows that may be hits: one bit per row, one word per group, over all chunks. `None` allows all
    /// live rows.
    pub row_mask: Option<Arc<[u64]>>,
    /// Number of best rows to find, including those of earlier pages.
    pub depth: usize,
}

impl ScanRequest {
    /// Ranks by another prompt set and balance from now on.
    pub fn set_configuration(
        &mut self,
        prompt_set: &EmbeddedPromptSet,
        balance: BalanceParameters,
    ) {
        self.statistics_key = prompt_set.statistics_key.clone();
        self.softmax_scale = prompt_set.softmax_scale();
        self.balance = balance;
    }

    /// Returns α and β of a row with these statistics.
    pub fn affine_transform(&self, statistics: &ScoreStatistics) -> AffineTransform {
        if statistics.n == 0 {
            return AffineTransform::RAW;
        }
        self.balance.affine_transform(statistics, self.softmax_scale)
    }

    /// Writes α and β of the rows of a group. If the chunk has no statistics, `out` keeps its initial
    /// values of 1 and 0.
    pub fn fill_affine_factors(
        &self,
        statistics: Option<&[ScoreStatistics]>,
        out: &mut [[f32; ROWS_PER_GROUP]; 2],
    ) {
        let Some(statistics) = statistics else { return };
        let [alpha, beta] = out;
        Arch::new().dispatch(AffineTransformKernel {
            balance: self.balance,
            statistics,
            softmax_scale: self.softmax_scale,
            alpha_beta: [alpha, beta],
        });
    }

    /// Returns whether both requests have the same α and β for every row.
    pub fn has_same_balance(&self, other: &Self) -> bool {
        self.statistics_key == other.statistics_key && self.balance == other.balance
    }
}
