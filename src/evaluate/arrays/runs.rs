//! The configurations that arrays are ranked under.

use crate::balance::normalise::{BalanceParameters, Normaliser, ScaleConstants};
use crate::balance::proposal::{CAUTIOUS_WEIGHT, PROPOSED_WEIGHTS, ProposedBalance};
use crate::balance::statistics::StatisticsSettings;
use crate::evaluate::compare::{BaseConfiguration, ConfigurationSpec, MAX_CONFIGURATIONS};

/// Name of plain CLIP, with which all others are compared.
pub(super) const RAW_NAME: &str = "raw";
/// Name of the configuration that is proposed for the bank.
pub(super) const DEFAULT_NAME: &str = "default";

/// A configuration that arrays are ranked under.
#[derive(Debug, Clone, PartialEq)]
pub struct ArrayRun {
    /// Name in reports.
    pub name: String,
    /// The formula; `raw` is plain CLIP.
    pub normaliser: Normaliser,
    /// The weight, 0 to 1.
    pub weight: f32,
    /// λ of `nnn`.
    pub lambda: f32,
    /// k of `nnn` and temperature of `softmax`.
    pub statistics: StatisticsSettings,
}

/// A configuration that arrays cannot be ranked under.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("--configuration {name:?}: {reason}")]
pub struct RunSpecError {
    /// The configuration.
    pub name: String,
    /// What is wrong.
    pub reason: String,
}

impl ArrayRun {
    /// Returns plain CLIP.
    pub(super) fn raw() -> Self {
        let proposed = ProposedBalance::with_weight(0.0);
        Self { normaliser: Normaliser::Raw, ..Self::from_proposal(RAW_NAME, &proposed) }
    }

    /// Returns what is proposed for a bank.
    pub(super) fn from_proposal(name: &str, proposed: &ProposedBalance) -> Self {
        Self {
            name: name.to_owned(),
            normaliser: proposed.normaliser,
            weight: proposed.weight,
            lambda: proposed.lambda,
            statistics: proposed.statistics,
        }
    }

    /// Returns the runs from which the proposal chooses, without plain CLIP.
    pub(super) fn proposable() -> Vec<Self> {
        let weights = PROPOSED_WEIGHTS.into_iter().filter(|weight| *weight > 0.0);
        let run = |weight| Self::from_proposal(DEFAULT_NAME, &ProposedBalance::with_weight(weight));
        weights.map(run).collect()
    }

    /// Returns the run of a typed configuration. What it does not name has the value that is configured by
    /// default.
    fn from_spec(spec: &ConfigurationSpec) -> Result<Self, RunSpecError> {
        let name = spec.label().to_owned();
        let refuse = |reason: &str| RunSpecError { name: name.clone(), reason: reason.to_owned() };
        let ConfigurationSpec { base, prompt_set, standby, min_score, .. } = spec;
        if matches!(base, Some(BaseConfiguration::Live | BaseConfiguration::Candidate))
            || prompt_set.is_some()
            || *standby
            || min_score.is_some()
        {
            return Err(refuse(
                "live, candidate, set, generation and min_score belong to a catalogue; arrays have normaliser, weight, lambda, top_k, temperature and name",
            ));
        }
        if name == RAW_NAME && !spec.is_raw() || name == DEFAULT_NAME {
            return Err(refuse("is the name of a run that is always there; choose another name="));
        }
        let proposed = ProposedBalance::with_weight(CAUTIOUS_WEIGHT);
        let raw = (spec.is_raw() && spec.normaliser.is_none()).then_some(Normaliser::Raw);
        Ok(Self {
            normaliser: spec.normaliser.or(raw).unwrap_or(proposed.normaliser),
            weight: spec.weight.unwrap_or(proposed.weight),
            lambda: spec.lambda.unwrap_or(proposed.lambda),
            statistics: spec.settings_over(proposed.statistics),
            name,
        })
    }

    /// Returns the runs of typed configurations; their names must be unique. Plain CLIP, which is always
    /// there, is left out.
    pub(super) fn from_specs(specs: &[ConfigurationSpec]) -> Result<Vec<Self>, RunSpecError> {
        let mut runs: Vec<Self> = Vec::new();
        for spec in specs {
            let run = Self::from_spec(spec)?;
            if run.name == RAW_NAME {
                continue;
            }
            if runs.iter().any(|known| known.name == run.name) {
                let reason = "is given twice; give one a name=".to_owned();
                return Err(RunSpecError { name: run.name, reason });
            }
            runs.push(run);
        }
        if runs.len() > MAX_CONFIGURATIONS {
            let reason = format!("more than {MAX_CONFIGURATIONS} configurations");
            return Err(RunSpecError { name: runs[MAX_CONFIGURATIONS].name.clone(), reason });
        }
        Ok(runs)
    }

    /// Returns normaliser, weight and λ, with scale constants that are still to be computed.
    pub(super) fn balance(&self) -> BalanceParameters {
        if self.normaliser == Normaliser::Raw {
            return BalanceParameters::RAW;
        }
        BalanceParameters {
            normaliser: self.normaliser,
            weight: self.weight,
            lambda: self.lambda,
            scale: ScaleConstants::default(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn runs(specs: &[&str]) -> Result<Vec<ArrayRun>, String> {
        let specs: Vec<ConfigurationSpec> =
            specs.iter().map(|text| ConfigurationSpec::try_from(*text).unwrap()).collect();
        ArrayRun::from_specs(&specs).map_err(|error| error.to_string())
    }

    #[test]
    fn what_a_configuration_does_not_name_has_its_default() {
        let found = runs(&["normaliser=softmax,temperature=0.5,name=s", "raw", "top_k=4"]).unwrap();
        let defaults = ProposedBalance::with_weight(CAUTIOUS_WEIGHT);
        assert_eq!(found.len(), 2);
        assert_eq!((found[0].name.as_str(), found[0].normaliser), ("s", Normaliser::Softmax));
        assert_eq!((found[0].weight, found[0].statistics.temperature), (CAUTIOUS_WEIGHT, 0.5));
        assert_eq!(found[0].statistics.top_k, defaults.statistics.top_k);
        assert_eq!((found[1].normaliser, found[1].statistics.top_k), (defaults.normaliser, 4));
    }

    #[test]
    fn what_needs_a_catalogue_is_refused() {
        for (spec, reason) in [
            ("live", "belong to a catalogue"),
            ("candidate,weight=0.5", "belong to a catalogue"),
            ("set=demo", "belong to a catalogue"),
            ("min_score=0.2", "belong to a catalogue"),
            ("generation=standby", "belong to a catalogue"),
            ("weight=0.5,name=default", "always there"),
            ("weight=0.5,name=raw", "always there"),
        ] {
            let error = runs(&[spec]).unwrap_err();
            assert!(error.contains(reason), "{spec}: {error}");
        }
        assert!(runs(&["weight=0.5", "weight=0.5"]).unwrap_err().contains("given twice"));
        let many: Vec<String> =
            (0..=MAX_CONFIGURATIONS).map(|k| format!("top_k={}", k + 1)).collect();
        let many: Vec<&str> = many.iter().map(String::as_str).collect();
        assert!(runs(&many).unwrap_err().contains("more than 32"));
    }
}
