//! A configuration as it is typed on the command line.

use crate::balance::normalise::Normaliser;
use crate::balance::statistics::StatisticsSettings;
use crate::catalogue::{CatalogueState, RolloutCandidate};

/// Maximum number of configurations in one comparison.
pub const MAX_CONFIGURATIONS: usize = 32;

/// A configuration as it is typed: `candidate`, or `set=demo,normaliser=nnn,weight=0.25`. Omitted
/// settings come from the base, which is `live` unless another is named first.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct ConfigurationSpec {
    /// The configuration that omitted settings come from; `None` means `live`.
    pub base: Option<BaseConfiguration>,
    /// Name in reports; `None` means the text as typed.
    pub name: Option<String>,
    /// Key, name or name@version of a stored prompt set, name of a built-in one, or path of a TOML
    /// file.
    pub prompt_set: Option<String>,
    /// The formula that balances scores.
    pub normaliser: Option<Normaliser>,
    /// Weight of the normalised score in the balanced score, 0 to 1.
    pub weight: Option<f32>,
    /// λ of `nnn`, 0 to 10.
    pub lambda: Option<f32>,
    /// k of `nnn`, 1 to 4096.
    pub top_k: Option<usize>,
    /// Temperature of `softmax`, 0.01 to 10.
    pub temperature: Option<f32>,
    /// Whether the standby generation is ranked instead of the base's.
    pub standby: bool,
    /// Results with a lower score are not shown.
    pub min_score: Option<f32>,
    pub(super) typed_text: String,
}

/// The configuration whose settings a [`ConfigurationSpec`] starts from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum BaseConfiguration {
    /// Plain CLIP, without balancing.
    Raw,
    /// The configuration that is served.
    Live,
    /// The candidate that may be promoted to live.
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
                let named = Normaliser::ALL.into_iter().find(|n| n.name() == value);
                let names = Normaliser::ALL.map(Normaliser::name).join(", ");
                let unknown = || format!("normaliser: {value:?} is not one of {names}");
                self.normaliser = Some(named.ok_or_else(unknown)?);
            }
            "weight" => self.weight = Some(number(0.0, 1.0)?),
            "lambda" => self.lambda = Some(number(0.0, 10.0)?),
            "top_k" => {
                let max = StatisticsSettings::MAX_TOP_K;
                let k = value.parse().ok().filter(|k| (1..=max).contains(k));
                self.top_k =
                    Some(k.ok_or_else(|| format!("top_k: {value:?} is not from 1 to {max}"))?);
            }
            "temperature" => {
                let (min, max) =
                    (StatisticsSettings::MIN_TEMPERATURE, StatisticsSettings::MAX_TEMPERATURE);
                self.temperature = Some(number(min, max)?);
            }
            "generation" => {
                self.standby = match value {
                    "live" => false,
                    "standby" => true,
                    _ => return Err(format!("generation: {value:?} is not live or standby")),
                }
            }
            "min_score" => self.min_score = Some(number(-100.0, 100.0)?),
            _ => {
                return Err(format!(
                    "{key:?} is not one of name, set, normaliser, weight, lambda, top_k, temperature, generation, min_score"
                ));
            }
        }
        Ok(())
    }

    /// Returns whether this is plain CLIP.
    pub fn is_raw(&self) -> bool {
        self.base == Some(BaseConfiguration::Raw) || self.normaliser == Some(Normaliser::Raw)
    }

    /// Returns whether this is the live configuration or the candidate without changes, so that
    /// thresholds measured for it can be stored with it.
    pub fn is_unmodified_base(&self) -> bool {
        let Self {
            base,
            name: _,
            prompt_set,
            normaliser,
            weight,
            lambda,
            top_k,
            temperature,
            standby,
            min_score,
            typed_text: _,
        } = self;
        matches!(base, Some(BaseConfiguration::Live | BaseConfiguration::Candidate))
            && (prompt_set, normaliser, weight) == (&None, &None, &None)
            && (lambda, top_k, temperature) == (&None, &None, &None)
            && (min_score, *standby) == (&None, false)
    }

    /// Returns `settings` with what this configuration changes.
    pub fn settings_over(&self, settings: StatisticsSettings) -> StatisticsSettings {
        StatisticsSettings {
            top_k: self.top_k.unwrap_or(settings.top_k),
            temperature: self.temperature.unwrap_or(settings.temperature),
        }
    }

    /// Returns the name in reports.
    pub fn label(&self) -> &str {
        self.name.as_deref().unwrap_or(&self.typed_text)
    }

    /// Returns whether it ranks the standby generation of `state`.
    pub fn reads_standby(&self, state: &CatalogueState) -> bool {
        let is_standby = |candidate: &RolloutCandidate| candidate.generation != state.live.id;
        let candidate =
            state.candidate.as_ref().filter(|_| self.base == Some(BaseConfiguration::Candidate));
        self.standby || candidate.is_some_and(is_standby)
    }

    /// Returns plain CLIP under the name `raw`.
    pub fn plain_clip() -> Self {
        Self { base: Some(BaseConfiguration::Raw), name: Some("raw".into()), ..Self::default() }
    }

    /// Returns `base` without changes.
    pub fn from_base(base: BaseConfiguration, name: &str) -> Self {
        Self { base: Some(base), name: Some(name.into()), ..Self::default() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_configuration_is_parsed_and_a_wrong_one_is_rejected_with_the_reason() {
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
            ("generation=old", "live or standby"),
            ("top_k=0", "top_k"),
            ("temperature=0", "0.01 to 10"),
        ] {
            let error = ConfigurationSpec::try_from(wrong).unwrap_err();
            assert!(error.contains(named), "{wrong}: {error}");
        }
    }
}
