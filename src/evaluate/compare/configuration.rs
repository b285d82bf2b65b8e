//! Ways to rank, as typed and as resolved.

use std::collections::BTreeMap;
use std::sync::Arc;

use serde::Serialize;

use super::world::{Table, World};
use crate::balance::calibration::{Calibration, Vocabulary};
use crate::balance::normalise::{Balance, Normaliser, Scale};
use crate::balance::statistics::{Statistics, StatisticsKey};
use crate::catalogue::{Candidate, CatalogueState, PromptSetRecord, Serving};
use crate::clip::Towers;
use crate::prompts::{EmbeddedSet, PromptError, PromptSet};

/// Most configurations of one comparison.
pub const MAX_CONFIGURATIONS: usize = 32;

/// A configuration as it is typed: `candidate`, or `set=demo,normaliser=nnn,weight=0.25`. What is not
/// said is as the base has it, `live` unless another is named first.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Spec {
    /// `raw`, `live` or `candidate`.
    pub base: Option<Base>,
    /// Name in reports.
    pub name: Option<String>,
    /// Prompt set: key, name or name@version of a stored one, shipped name, or path of a TOML file.
    pub set: Option<String>,
    /// Formula.
    pub normaliser: Option<Normaliser>,
    /// Weight of the balanced score.
    pub weight: Option<f32>,
    /// λ of `nnn`.
    pub lambda: Option<f32>,
    /// k of `nnn`, for sets that are not stored.
    pub top_k: Option<usize>,
    /// Whether the generation beside the live one is ranked.
    pub beside: bool,
    /// Hits with a lower score are not shown.
    pub min_score: Option<f32>,
    text: String,
}

/// What a [`Spec`] starts from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Base {
    /// Plain CLIP.
    Raw,
    /// What is served.
    Live,
    /// What may be served next.
    Candidate,
}

impl TryFrom<&str> for Spec {
    type Error = String;

    fn try_from(text: &str) -> Result<Self, String> {
        let mut spec = Self { text: text.to_owned(), ..Self::default() };
        for (i, part) in text.split(',').map(str::trim).enumerate() {
            let Some((key, value)) = part.split_once('=') else {
                spec.base = Some(match (i, part) {
                    (0, "raw") => Base::Raw,
                    (0, "live") => Base::Live,
                    (0, "candidate") => Base::Candidate,
                    _ => {
                        return Err(format!(
                            "{part:?} is neither raw, live or candidate at the beginning nor key=value"
                        ));
                    }
                });
                continue;
            };
            spec.put(key.trim(), value.trim())?;
        }
        Ok(spec)
    }
}

impl Spec {
    fn put(&mut self, key: &str, value: &str) -> Result<(), String> {
        let number = |low: f32, high: f32| {
            let parsed = value.parse::<f32>().ok().filter(|v| (low..=high).contains(v));
            parsed.ok_or_else(|| format!("{key}: {value:?} is not a number from {low} to {high}"))
        };
        match key {
            "name" => self.name = Some(value.to_owned()),
            "set" => self.set = Some(value.to_owned()),
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
                self.beside = match value {
                    "live" => false,
                    "beside" => true,
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
        self.base == Some(Base::Raw) || self.normaliser == Some(Normaliser::Raw)
    }

    /// Whether it is its base as it is, so that thresholds measured for it can be stored there.
    pub fn as_it_is(&self) -> bool {
        let Self {
            base,
            name: _,
            set,
            normaliser,
            weight,
            lambda,
            top_k,
            beside,
            min_score,
            text: _,
        } = self;
        matches!(base, Some(Base::Live | Base::Candidate))
            && (set, normaliser, weight) == (&None, &None, &None)
            && (lambda, top_k, min_score, *beside) == (&None, &None, &None, false)
    }

    /// Its name in reports: as given, else as typed.
    pub fn label(&self) -> &str {
        self.name.as_deref().unwrap_or(&self.text)
    }

    /// Whether it reads the generation beside the live one of `state`.
    pub fn reads_beside(&self, state: &CatalogueState) -> bool {
        let elsewhere = |candidate: &Candidate| candidate.generation != state.live.id;
        let candidate = state.candidate.as_ref().filter(|_| self.base == Some(Base::Candidate));
        self.beside || candidate.is_some_and(elsewhere)
    }

    /// Plain CLIP.
    pub fn raw() -> Self {
        Self { base: Some(Base::Raw), name: Some("raw".into()), ..Self::default() }
    }

    /// A base as it is.
    pub fn of(base: Base, name: &str) -> Self {
        Self { base: Some(base), name: Some(name.into()), ..Self::default() }
    }
}

/// A way to rank.
#[derive(Clone)]
pub struct Configuration {
    /// Name in reports.
    pub name: String,
    /// Which of the world's tables.
    pub table: usize,
    /// Whose statistics; none for plain CLIP.
    pub set: Option<Arc<EmbeddedSet>>,
    /// Formula, weight and constants.
    pub balance: Balance,
    /// Hits with a lower score are not shown.
    pub min_score: Option<f32>,
    /// Thresholds that are stored with it.
    pub calibration: Option<Calibration>,
    /// Words of the prompt set that is served with it.
    pub vocabulary: Arc<Vocabulary>,
}

/// A configuration in a report: enough to serve it.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Setting {
    /// The generation it reads.
    pub generation: String,
    /// Fingerprint of the model.
    pub model: String,
    /// Key of the prompt set; none for plain CLIP.
    pub prompt_set: Option<StatisticsKey>,
    /// Formula, weight and constants.
    #[serde(flatten)]
    pub balance: Balance,
    /// Hits with a lower score are not shown.
    pub min_score: Option<f32>,
}

impl Configuration {
    /// As a report has it.
    pub fn setting(&self, world: &World) -> Setting {
        let note = &world.tables[self.table].note;
        Setting {
            generation: note.generation.clone(),
            model: note.fingerprint.clone(),
            prompt_set: self.set.as_ref().map(|set| set.key.clone()),
            balance: self.balance,
            min_score: self.min_score,
        }
    }
}

/// What cannot be compared.
#[derive(Debug, thiserror::Error)]
pub enum ConfigurationError {
    /// The text names something that is not there.
    #[error("--configuration {text:?}: {reason}")]
    Missing {
        /// As typed.
        text: String,
        /// What is not there.
        reason: String,
    },
    /// The prompt set cannot be used.
    #[error("--configuration {text:?}: {source}")]
    Prompts {
        /// As typed.
        text: String,
        /// Why.
        source: PromptError,
    },
}

/// Resolves what is typed against a catalogue.
pub struct Resolver<'a> {
    /// The tables: the live one first, then the one beside it.
    pub world: &'a World,
    /// How the catalogue is served; none for a drawn one.
    pub state: Option<&'a CatalogueState>,
    /// What a drawn catalogue is served with.
    pub fallback: Serving,
    /// Prompt sets that the rows carry.
    pub stored: Vec<Arc<EmbeddedSet>>,
    /// k of `nnn` for prompt sets that are not stored.
    pub top_k: usize,
    /// Statistics of the sets that were used, by table and key.
    statistics: BTreeMap<(usize, StatisticsKey), Arc<Vec<Statistics>>>,
    embedded: BTreeMap<(usize, StatisticsKey), Arc<EmbeddedSet>>,
}

impl<'a> Resolver<'a> {
    /// For a world; `stored` are the prompt sets whose statistics its rows carry.
    pub fn new(
        world: &'a World,
        state: Option<&'a CatalogueState>,
        fallback: Serving,
        stored: Vec<Arc<EmbeddedSet>>,
        top_k: usize,
    ) -> Self {
        let (statistics, embedded) = (BTreeMap::new(), BTreeMap::new());
        Self { world, state, fallback, stored, top_k, statistics, embedded }
    }

    /// The configuration that `spec` names.
    pub fn resolve(&mut self, spec: &Spec) -> Result<Configuration, ConfigurationError> {
        let missing = |reason: &str| ConfigurationError::Missing {
            text: spec.text.clone(),
            reason: reason.to_owned(),
        };
        let base = spec.base.unwrap_or(Base::Live);
        let candidate = self.state.and_then(|state| state.candidate.as_ref());
        let live = self.state.map_or(&self.fallback, |state| &state.serving).clone();
        let (serving, mut beside) = match (base, candidate) {
            (Base::Candidate, None) => return Err(missing("the catalogue has no candidate")),
            (Base::Candidate, Some(candidate)) => {
                let beside = self.state.is_some_and(|state| candidate.generation != state.live.id);
                (candidate.serving.clone(), beside)
            }
            (Base::Live | Base::Raw, _) => (live, false),
        };
        let own_table = usize::from(beside);
        beside |= spec.beside;
        let table = usize::from(beside);
        if table >= self.world.tables.len() {
            return Err(missing("the catalogue has no generation beside the live one"));
        }
        let normaliser = if base == Base::Raw && spec.normaliser.is_none() {
            Normaliser::Raw
        } else {
            spec.normaliser.unwrap_or(serving.normaliser)
        };
        let mut balance = Balance {
            normaliser,
            weight: spec.weight.unwrap_or(serving.weight),
            lambda: spec.lambda.unwrap_or(serving.lambda),
            scale: Scale::default(),
        };
        if normaliser == Normaliser::Raw {
            balance = Balance::RAW;
        }
        let wanted = spec.set.as_deref().unwrap_or(serving.prompt_set.as_str());
        let served = self.set(wanted, table, spec)?;
        let vocabulary = Vocabulary::of(served.set.texts.iter().map(String::as_str));
        let set = (normaliser != Normaliser::Raw).then_some(served);
        if let Some(set) = &set {
            // Another model's scores lie elsewhere, though its statistics may go by the same key.
            let unchanged = table == own_table
                && serving.prompt_set == set.key
                && serving.normaliser == normaliser;
            let frozen = unchanged.then_some(serving.scale).flatten();
            balance.scale = match frozen {
                Some(scale) => scale,
                None => Scale::of(normaliser, self.statistics(table, set).iter().copied()),
            };
        }
        let calibration = serving.calibration.filter(|_| spec.as_it_is());
        let stored = calibration.as_ref().and_then(|calibration| calibration.min_score);
        Ok(Configuration {
            name: spec.label().to_owned(),
            table,
            set,
            balance,
            min_score: spec.min_score.or(stored),
            calibration,
            vocabulary: Arc::new(vocabulary),
        })
    }

    /// Statistics of a set over a table, computed once.
    pub fn statistics(&mut self, table: usize, set: &EmbeddedSet) -> Arc<Vec<Statistics>> {
        let world = self.world;
        let of = || Arc::new(world.tables[table].statistics(set));
        self.statistics.entry((table, set.key.clone())).or_insert_with(of).clone()
    }

    fn set(
        &mut self,
        wanted: &str,
        table: usize,
        spec: &Spec,
    ) -> Result<Arc<EmbeddedSet>, ConfigurationError> {
        let prompts = |source| ConfigurationError::Prompts { text: spec.text.clone(), source };
        let stored = EmbeddedSet::find(&self.stored, wanted).cloned();
        let towers: &dyn Towers = &**self.world.tables[table].towers();
        // The generation beside the live one has sets and keys of its own.
        let beside = self.state.and_then(|state| state.beside.as_ref()).filter(|_| table > 0);
        let record = beside.and_then(|b| PromptSetRecord::find(&b.prompt_sets, wanted));
        if let Some(record) = record {
            let set = EmbeddedSet::from_record(record, towers).map_err(prompts)?.set;
            let top_k = spec.top_k.unwrap_or(record.top_k);
            return self.embed(set, table, towers, top_k).map_err(prompts);
        }
        match stored {
            Some(set) if table == 0 && spec.top_k.is_none() => Ok(set),
            // Another model gives the prompts other embeddings, another k other statistics.
            Some(set) => {
                let top_k = spec.top_k.unwrap_or_else(|| set.record().top_k);
                self.embed(set.set.clone(), table, towers, top_k).map_err(prompts)
            }
            None => {
                let set = PromptSet::load(wanted).map_err(prompts)?;
                self.embed(set, table, towers, spec.top_k.unwrap_or(self.top_k)).map_err(prompts)
            }
        }
    }

    fn embed(
        &mut self,
        set: PromptSet,
        table: usize,
        towers: &dyn Towers,
        top_k: usize,
    ) -> Result<Arc<EmbeddedSet>, PromptError> {
        let scale = towers.card().logit_scale;
        let key = StatisticsKey::new(&set.name, set.version, &set.fingerprint(), scale, top_k);
        if let Some(known) = self.embedded.get(&(table, key.clone())) {
            return Ok(known.clone());
        }
        let embedded = Arc::new(set.embed(towers, top_k)?);
        self.embedded.insert((table, key), embedded.clone());
        Ok(embedded)
    }
}

/// α and β of every row of a table under a configuration.
pub(crate) fn affine(
    table: &Table,
    configuration: &Configuration,
    statistics: &[Statistics],
) -> Vec<crate::balance::normalise::Affine> {
    let scale = table.note.logit_scale;
    statistics.iter().map(|s| configuration.balance.affine(s, scale)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_configuration_is_read_as_typed() {
        let spec = Spec::try_from("live, set=mine.toml,normaliser=nnn,weight=0.25").unwrap();
        assert_eq!(spec.base, Some(Base::Live));
        assert_eq!(spec.normaliser, Some(Normaliser::Nnn));
        assert_eq!((spec.set.as_deref(), spec.weight), (Some("mine.toml"), Some(0.25)));
        for (wrong, named) in [
            ("fast", "raw, live or candidate"),
            ("weight=0.5,raw", "raw, live or candidate"),
            ("weight=2", "from 0 to 1"),
            ("normaliser=bsap", "softmax"),
            ("colour=red", "one of name"),
            ("generation=old", "live or beside"),
            ("top_k=0", "top_k"),
        ] {
            let error = Spec::try_from(wrong).unwrap_err();
            assert!(error.contains(named), "{wrong}: {error}");
        }
    }
}
