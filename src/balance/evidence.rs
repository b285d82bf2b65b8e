//! What banks of auxiliary prompts gained on sets of real CLIP embeddings: evidence for banks that cannot be
//! measured, because nobody has judged queries.
//!
//! The figures are those of docs/balancing.md: hit@1 more than plain CLIP with `nnn`, k 16 and λ 1, over four
//! sets with 95 % intervals between the sets, not only within them.

use super::proposal::{BankMeasurement, CAUTIOUS_WEIGHT, FULL_WEIGHT, HIGH_FIT};

/// What banks gained: the mean, and how far a set may differ.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct MeasuredGain {
    /// Mean over the sets.
    pub mean: f64,
    /// 95 % interval of the mean, from the differences between sets.
    pub interval: (f64, f64),
    /// 95 % interval of one further set; `None` if it was not measured.
    pub further_set: Option<(f64, f64)>,
}

/// Banks of a set's own texts, from this many texts on, at a weight.
const OWN_TEXTS: [(usize, f32, MeasuredGain); 7] = [
    (250, FULL_WEIGHT, gain(0.064, (0.051, 0.077), Some((0.034, 0.093)))),
    (128, FULL_WEIGHT, gain(0.058, (0.046, 0.069), Some((0.032, 0.084)))),
    (32, FULL_WEIGHT, gain(0.050, (0.029, 0.071), Some((0.003, 0.098)))),
    (250, CAUTIOUS_WEIGHT, gain(0.042, (0.036, 0.047), None)),
    (128, CAUTIOUS_WEIGHT, gain(0.040, (0.031, 0.048), None)),
    (32, CAUTIOUS_WEIGHT, gain(0.035, (0.023, 0.048), None)),
    (8, CAUTIOUS_WEIGHT, gain(0.030, (0.020, 0.040), Some((0.007, 0.053)))),
];
/// Banks of another domain at the proposed weight; the interval is between pairs of sets.
const OTHER_DOMAIN: MeasuredGain = gain(0.015, (-0.017, 0.048), None);
/// What half of the texts gained on four further sets of other kinds, at weight 0.5: the least and the most.
const FRESH_SETS: (f64, f64) = (0.009, 0.044);
/// Largest loss in any situation that was measured, at weight 0.25.
const LARGEST_LOSS: f64 = 0.014;

const fn gain(mean: f64, interval: (f64, f64), further_set: Option<(f64, f64)>) -> MeasuredGain {
    MeasuredGain { mean, interval, further_set }
}

/// Says what banks like this one gained on real sets at the proposed weight, and how uncertain that is.
pub fn describe_gain_of_similar_banks(bank: &BankMeasurement, proposed_weight: f32) -> String {
    let Some(fit) = bank.fit else {
        return format!(
            "How much it gains is not known, as its fit is not. In no situation that was measured on real embeddings did weight {CAUTIOUS_WEIGHT} lose more than {LARGEST_LOSS} of hit@1."
        );
    };
    if proposed_weight == 0.0 {
        return "Plain CLIP is proposed: on real embeddings every loss of hit@1 was with a low fit.".into();
    }
    if fit < HIGH_FIT {
        return format!(
            "Banks of another domain, whose fit was as low, gained {} on real embeddings (95 % between pairs of sets); neither figure tells which of them lose.",
            describe(&OTHER_DOMAIN)
        );
    }
    let similar = OWN_TEXTS
        .iter()
        .find(|(texts, weight, _)| bank.texts >= *texts && proposed_weight == *weight);
    let Some((texts, weight, gain)) = similar else {
        return format!(
            "Banks of fewer than {} texts were not measured.",
            OWN_TEXTS[OWN_TEXTS.len() - 1].0
        );
    };
    let further = gain.further_set.map_or(String::new(), |(low, high)| {
        format!("; for one further set {low:+.3} to {high:+.3}")
    });
    let (least, most) = FRESH_SETS;
    format!(
        "Banks of {texts} own texts or more at weight {weight} gained {} on four sets of real embeddings (95 % between sets{further}). Sets of other kinds gained less ({least:+.3} to {most:+.3}), so what yours gains is at least as uncertain: only judged queries show it (`bsap evaluate`).",
        describe(gain)
    )
}

fn describe(gain: &MeasuredGain) -> String {
    let (low, high) = gain.interval;
    format!("{:+.3} ({low:+.3} to {high:+.3}) of hit@1", gain.mean)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::balance::proposal::propose_weight;

    #[test]
    fn the_evidence_is_that_of_banks_of_the_same_size_and_fit() {
        let describe = |texts, fit, concentration| {
            let bank = BankMeasurement { texts, fit, concentration };
            describe_gain_of_similar_banks(&bank, propose_weight(&bank).0)
        };
        assert!(describe(400, Some(0.9), Some(0.4)).contains("+0.064 (+0.051 to +0.077)"));
        assert!(
            describe(200, Some(0.9), Some(0.4)).contains("128 own texts or more at weight 0.5")
        );
        assert!(describe(32, Some(0.9), Some(0.4)).contains("one further set +0.003 to +0.098"));
        assert!(describe(300, Some(0.9), Some(1.4)).contains("+0.042"));
        assert!(describe(9, Some(0.9), Some(0.4)).contains("8 own texts or more at weight 0.25"));
        assert!(describe(3, Some(0.9), Some(0.4)).contains("were not measured"));
        assert!(describe(300, Some(0.3), Some(0.4)).contains("-0.017 to +0.048"));
        assert!(describe(300, Some(0.05), Some(0.4)).contains("Plain CLIP"));
        assert!(describe(300, None, None).contains("not known"));
    }

    #[test]
    fn every_proposed_weight_has_evidence_from_the_largest_bank_down() {
        for weight in [FULL_WEIGHT, CAUTIOUS_WEIGHT] {
            let sizes: Vec<usize> =
                OWN_TEXTS.iter().filter(|one| one.1 == weight).map(|one| one.0).collect();
            assert!(sizes.len() >= 3 && sizes.is_sorted_by(|a, b| a > b), "{sizes:?}");
        }
        for (_, _, gain) in OWN_TEXTS {
            assert!(gain.interval.0 < gain.mean && gain.mean < gain.interval.1);
        }
    }
}
