//! Which settings are proposed for a bank of auxiliary prompts, from what is known without judgements.
//!
//! The thresholds were chosen on four sets of real CLIP embeddings by leave-one-set-out; docs/balancing.md
//! has the figures.

use super::normalise::Normaliser;
use super::statistics::StatisticsSettings;

/// Weight of a bank that is large, fits the queries and is not concentrated.
pub const FULL_WEIGHT: f32 = 0.5;
/// Weight of any other bank, also if its fit is not known.
pub const CAUTIOUS_WEIGHT: f32 = 0.25;
/// All weights that are proposed; 0 is plain CLIP.
pub const PROPOSED_WEIGHTS: [f32; 3] = [FULL_WEIGHT, CAUTIOUS_WEIGHT, 0.0];
/// Smallest number of texts of a bank at [`FULL_WEIGHT`].
pub const MIN_TEXTS: usize = 32;
/// Smallest fit of a bank at [`FULL_WEIGHT`].
pub const HIGH_FIT: f64 = 0.50;
/// Fit below which plain CLIP is proposed.
pub const LOW_FIT: f64 = 0.15;
/// Largest concentration of a bank at [`FULL_WEIGHT`].
pub const MAX_CONCENTRATION: f64 = 1.0;
/// The k of `nnn` and the temperature of `softmax` that are proposed.
pub const PROPOSED_STATISTICS: StatisticsSettings =
    StatisticsSettings { top_k: 16, temperature: 0.25 };

/// What is known of a bank without judgements.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct BankMeasurement {
    /// Number of its different texts.
    pub texts: usize,
    /// Its fit; `None` if there are too few queries.
    pub fit: Option<f64>,
    /// Its concentration; `None` if there are too few queries.
    pub concentration: Option<f64>,
}

/// Settings that are proposed for a bank.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct ProposedBalance {
    /// The formula.
    pub normaliser: Normaliser,
    /// The weight; 0 is plain CLIP.
    pub weight: f32,
    /// λ of `nnn`.
    pub lambda: f32,
    /// k of `nnn` and temperature of `softmax`.
    pub statistics: StatisticsSettings,
}

impl ProposedBalance {
    /// Returns what is proposed at one of [`PROPOSED_WEIGHTS`].
    pub fn with_weight(weight: f32) -> Self {
        Self { normaliser: Normaliser::Nnn, weight, lambda: 1.0, statistics: PROPOSED_STATISTICS }
    }
}

/// Returns the weight that is proposed for a bank, and what decided.
pub fn propose_weight(bank: &BankMeasurement) -> (f32, String) {
    let Some(fit) = bank.fit else {
        return (CAUTIOUS_WEIGHT, "the fit of the bank is not known".into());
    };
    let concentration = bank.concentration.unwrap_or(0.0);
    if fit < LOW_FIT {
        (0.0, format!("the fit {fit:.2} is below {LOW_FIT:.2}"))
    } else if fit < HIGH_FIT {
        (CAUTIOUS_WEIGHT, format!("the fit {fit:.2} is below {HIGH_FIT:.2}"))
    } else if bank.texts < MIN_TEXTS {
        (CAUTIOUS_WEIGHT, format!("the bank has {} texts, fewer than {MIN_TEXTS}", bank.texts))
    } else if concentration > MAX_CONCENTRATION {
        let limit = format!("above {MAX_CONCENTRATION:.2}");
        (CAUTIOUS_WEIGHT, format!("the concentration {concentration:.2} is {limit}"))
    } else {
        (FULL_WEIGHT, format!("the fit {fit:.2} is at least {HIGH_FIT:.2}"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_weight_rises_only_if_everything_known_speaks_for_it() {
        let weight = |texts, fit, concentration| {
            let bank = BankMeasurement { texts, fit, concentration };
            propose_weight(&bank).0
        };
        assert_eq!(weight(250, Some(0.9), Some(0.4)), FULL_WEIGHT);
        assert_eq!(weight(32, Some(0.5), Some(1.0)), FULL_WEIGHT);
        assert_eq!(weight(31, Some(0.9), Some(0.4)), CAUTIOUS_WEIGHT);
        assert_eq!(weight(250, Some(0.49), Some(0.4)), CAUTIOUS_WEIGHT);
        assert_eq!(weight(250, Some(0.95), Some(1.2)), CAUTIOUS_WEIGHT);
        assert_eq!(weight(250, None, None), CAUTIOUS_WEIGHT);
        assert_eq!(weight(250, Some(0.15), Some(0.4)), CAUTIOUS_WEIGHT);
        assert_eq!(weight(250, Some(0.14), Some(0.4)), 0.0);
        let bank = BankMeasurement { texts: 8, fit: Some(0.9), concentration: Some(0.4) };
        assert_eq!(propose_weight(&bank).1, "the bank has 8 texts, fewer than 32");
    }
}
