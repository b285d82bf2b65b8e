//! TODO

use crate::balance::normalise::Normaliser;
use crate::catalogue::{CatalogueState, RolloutCandidate};

/// Most configurations of one comparison.
pub const MAX_CONFIGURATIONS: usize = 32;

/// A configuration as it is typed: `candidate`, or `set=demo,normaliser=nnn,weight=0.25`. What is not
/// said is as the base has it, `live` unless another is named first.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct ConfigurationSpec {
    /// `raw`, `live` or `candidate`.
    pub base: Option<BaseConfiguration>,
    /// Name in reports.
    pub name: Option<String>,
    /// Prompt set: key, name or name@version of a stored one, shipped name, or path of a TOML file.
    pub prompt_set: Option<String>,
    /// Formula.
    pub normaliser: Option<Normaliser>,
    /// Weight of the balanced score.
    pub weight: Option<f32>,
    /// λ of `nnn`.
    pub lambda: Option<f32>,
    /// k of `nnn`, for sets that are not stored.
    pub top_k: Option<usize>,
    /// Whether the generation beside the live one is ranked.
    pub standby: bool,
    /// Hits with a lower score are not shown.
    pub min_score: Option<f32>,
    pub(super) typed_text: String,
}

/// What a [`Spec`] starts from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum BaseConfiguration {
    /// Plain CLIP.
    Raw,
    /// What is served.
    Live,
    /// What may be served next.
    Candidate,
}

impl TryFrom<&str> for ConfigurationSpec {
    type Error = String;

    fn try_from(text: &str) -> Result<Self, String> {
        let mut spec = Self { typed_text: text.to_owned(), ..Self::default() };
        for (i, part) in text.split(',').map(str::trim).enumerate() {
            let Some((key, value)) = part.split_once('=') else {
                spec.base = Some(match (i, part) {
                    (0, "raw") => BaseConfiguration::Raw,
                    (0, "live") => BaseConfiguration::Live,
                    (0, "candidate") => BaseConfiguration::Candidate,
                    _ => {
                        return Err(format!(
                            "{part:?} is neither raw, live or candidate at the beginning nor key=value"
                        ));
                    }
                });
                continue;
            };
            spec.set_option(key.trim(), value.trim())?;
        }
        Ok(spec)
    }
}

impl ConfigurationSpec {
    fn set_option(&mut self, key: &str, value: &str) -> Result<(), String> {
        let number = |low: f32, high: f32| {
            let parsed = value.parse::<f32>().ok().filter(|v| (low..=high).contains(v));
            parsed.ok_or_else(|| format!("{key}: {value:?} is not a number from {low} to {high}"))
        };
        match key {
            "name" => self.name = Some(value.to_owned()),
            "set" => self.prompt_set = Some(value.to_owned()),
            "normaliser" => {
                let found = Normaliser::ALL.into_iter().find(|n| n.name() == value);
                let names = Normaliser::ALL.map(Normaliser::name).join(", ");
                let unknown = || format!("normaliser: {value:?} is not one of {names}");
                self.normaliser = Some(found.ok_or_else(unknown)?);
            }
            "weight" => self.weight = Some(number(0.0, 1.0)?),
            "lambda" => self.lambda = Some(number(0.0, 10.0)?),
            "top_k" => {
                let k = value.parse().ok().filter(|k| (1..=4096).contains(k));
                self.top_k =
                    Some(k.ok_or_else(|| format!("top_k: {value:?} is not from 1 to 4096"))?);
            }
            "generation" => {
                self.standby = match value {
                    "live" => false,
                    "standby" => true,
                    _ => return Err(format!("generation: {value:?} is not live or beside")),
                }
            }
            "min_score" => self.min_score = Some(number(-100.0, 100.0)?),
            _ => {
                return Err(format!(
                    "{key:?} is not one of name, set, normaliser, weight, lambda, top_k, generation, min_score"
                ));
            }
        }
        Ok(())
    }

    /// Whether it is plain CLIP.
    pub fn is_raw(&self) -> bool {
        self.base == Some(BaseConfiguration::Raw) || self.normaliser == Some(Normaliser::Raw)
    }

    /// Whether it is its base as it is, so that thresholds measured for it can be stored there.
    pub fn is_unmodified_base(&self) -> bool {
        let Self {
            base,
            name: _,
            prompt_set: set,
            normaliser,
            weight,
            lambda,
            top_k,
            standby: beside,
            min_score,
            typed_text: _,
        } = self;
        matches!(base, Some(BaseConfiguration::Live | BaseConfiguration::Candidate))
            && (set, normaliser, weight) == (&None, &None, &None)
            && (lambda, top_k, min_score, *beside) == (&None, &None, &None, false)
    }

    /// Its name in reports: as given, else as typed.
    pub fn label(&self) -> &str {
        self.name.as_deref().unwrap_or(&self.typed_text)
    }

    /// Whether it reads the generation beside the live one of `state`.
    pub fn reads_standby(&self, state: &CatalogueState) -> bool {
        let elsewhere = |candidate: &RolloutCandidate| candidate.generation != state.live.id;
        let candidate =
            state.candidate.as_ref().filter(|_| self.base == Some(BaseConfiguration::Candidate));
        self.standby || candidate.is_some_and(elsewhere)
    }

    /// Plain CLIP.
    pub fn plain_clip() -> Self {
        Self { base: Some(BaseConfiguration::Raw), name: Some("raw".into()), ..Self::default() }
    }

    /// A base as it is.
    pub fn from_base(base: BaseConfiguration, name: &str) -> Self {
        Self { base: Some(base), name: Some(name.into()), ..Self::default() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_configuration_is_read_as_typed() {
        let spec =
            ConfigurationSpec::try_from("live, set=mine.toml,normaliser=nnn,weight=0.25").unwrap();
        assert_eq!(spec.base, Some(BaseConfiguration::Live));
        assert_eq!(spec.normaliser, Some(Normaliser::Nnn));
        assert_eq!((spec.prompt_set.as_deref(), spec.weight), (Some("mine.toml"), Some(0.25)));
        for (wrong, named) in [
            ("fast", "raw, live or candidate"),
            ("weight=0.5,raw", "raw, live or candidate"),
            ("weight=2", "from 0 to 1"),
            ("normaliser=bsap", "softmax"),
            ("colour=red", "one of name"),
            ("generation=old", "live or beside"),
            ("top_k=0", "top_k"),
        ] {
            let error = ConfigurationSpec::try_from(wrong).unwrap_err();
            assert!(error.contains(named), "{wrong}: {error}");
        }
    }
}
