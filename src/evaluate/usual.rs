//! What is usual of a configuration: kept with its calibration, so that a change shows.

use super::Evaluated;
use super::compare::configuration::{Base, Configuration, Resolver, Spec};
use crate::balance::calibration::{Habits, Moments, Usual};
use crate::balance::normalise::Normaliser;
use crate::catalogue::CatalogueState;

/// Plain CLIP over the generation that the one of `specs` called `calibrated` reads; none where it is
/// among them already. Without it nothing of [`Evaluated::usual`] is known.
pub fn plain_for(specs: &[Spec], calibrated: &str, state: &CatalogueState) -> Option<Spec> {
    let beside = specs.iter().find(|spec| spec.label() == calibrated)?.reads_beside(state);
    if specs.iter().any(|spec| spec.is_raw() && spec.reads_beside(state) == beside) {
        return None;
    }
    let name = if beside { "raw beside" } else { "raw live" };
    let mut plain = Spec::of(Base::Raw, name);
    plain.beside = beside;
    Some(plain)
}

impl Evaluated {
    /// How the configuration at `place` answers, beside plain CLIP over the same images, and the
    /// statistics that it does so by. `None` where plain CLIP is not among the configurations, or
    /// only judged images were looked at.
    pub fn usual(
        &self,
        resolver: &mut Resolver,
        configurations: &[Configuration],
        place: usize,
    ) -> Option<Usual> {
        let own = &configurations[place];
        let is_plain =
            |c: &Configuration| c.balance.normaliser == Normaliser::Raw && c.table == own.table;
        let plain = configurations.iter().position(is_plain)?;
        let rule = self.report.configurations[place].thresholds.as_ref().and_then(|t| t.no_match);
        let images = resolver.world.tables[own.table].pictures().len();
        let whole = || self.ranked.iter().zip(&self.right).filter(|(_, right)| !right.condensed);
        let first = whole().filter_map(|(ranked, _)| {
            let (hit, raw) = (ranked[place].best.first()?, ranked[plain].best.first()?);
            Some((hit.0, raw.0, rule.map(|rule| rule.holds(ranked[place].hit))))
        });
        let answers = Habits::of(first, images)?;
        let set = own.set.as_ref();
        let statistics =
            set.and_then(|set| Moments::of(resolver.statistics(own.table, set).iter().copied()));
        Some(Usual { queries: whole().count(), statistics, answers })
    }
}

#[cfg(test)]
mod tests {
    use chrono::Utc;

    use super::*;
    use crate::balance::statistics::StatisticsKey;
    use crate::catalogue::{Beside, Candidate, Change, Generation, Serving};
    use crate::record::Ordering;

    /// A catalogue whose candidate reads the generation of another model.
    fn state() -> CatalogueState {
        let generation =
            |name: &str| Generation::new(name, &name.repeat(64), 2, 100.0, Ordering::Sequence);
        let (live, beside) = (generation("a"), generation("b"));
        let serving = Serving::new(StatisticsKey::from_stored("k"), Normaliser::Nnn, 0.25);
        let candidate = Candidate {
            name: "new".into(),
            generation: beside.id.clone(),
            serving: serving.clone(),
            share: 0.0,
            shadow: 0.0,
            only: None,
            since: Utc::now(),
            evaluation: None,
        };
        CatalogueState {
            format: 2,
            revision: 1,
            at: Utc::now(),
            by: "test".into(),
            live,
            prompt_sets: Vec::new(),
            serving,
            name: "initial".into(),
            change: Change::default(),
            beside: Some(Beside {
                generation: beside,
                checkpoint: String::new(),
                prompt_sets: Vec::new(),
                since: Utc::now(),
            }),
            candidate: Some(candidate),
        }
    }

    #[test]
    fn a_candidate_of_another_model_is_seen_beside_plain_clip_by_that_model() {
        let mut state = state();
        let live = Spec::of(Base::Live, "live");
        let candidate = Spec::of(Base::Candidate, "new");
        let mut specs = vec![Spec::raw(), live, candidate];
        assert_eq!(plain_for(&specs, "live", &state), None);
        let plain = plain_for(&specs, "new", &state).unwrap();
        assert!(plain.is_raw() && plain.reads_beside(&state), "{plain:?}");
        assert_eq!(plain_for(&specs, "nobody", &state), None);
        specs.push(plain);
        assert_eq!(plain_for(&specs, "new", &state), None, "it is there");
        let there = [Spec::try_from("raw,generation=beside").unwrap(), specs[1].clone()];
        assert_eq!(plain_for(&there, "live", &state).unwrap().label(), "raw live");
        // Of the live generation, one plain CLIP serves for both.
        state.candidate.as_mut().unwrap().generation.clone_from(&state.live.id);
        assert_eq!(plain_for(&specs[..3], "new", &state), None);
    }
}
