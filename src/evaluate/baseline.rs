//! What is usual of a configuration: kept with its calibration, so that a change shows.

use super::compare::{
    BaseConfiguration, ConfigurationResolver, ConfigurationSpec, RankingConfiguration,
};
use super::evaluation::Evaluation;
use crate::balance::calibration::{AnswerStats, Baseline, StatisticsSummary};
use crate::balance::normalise::Normaliser;
use crate::catalogue::CatalogueState;

/// Plain CLIP over the generation that the one of `specs` called `calibrated` reads; none where it is
/// among them already. Without it nothing of [`Evaluated::usual`] is known.
pub fn plain_clip_counterpart(
    specs: &[ConfigurationSpec],
    calibrated: &str,
    state: &CatalogueState,
) -> Option<ConfigurationSpec> {
    let reads_standby = specs.iter().find(|spec| spec.label() == calibrated)?.reads_standby(state);
    if specs.iter().any(|spec| spec.is_raw() && spec.reads_standby(state) == reads_standby) {
        return None;
    }
    let name = if reads_standby { "raw beside" } else { "raw live" };
    let mut plain = ConfigurationSpec::from_base(BaseConfiguration::Raw, name);
    plain.standby = reads_standby;
    Some(plain)
}

impl Evaluation {
    /// How the configuration at `place` answers, beside plain CLIP over the same images, and the
    /// statistics that it does so by. `None` where plain CLIP is not among the configurations, or
    /// only judged images were looked at.
    pub fn drift_baseline(
        &self,
        resolver: &mut ConfigurationResolver,
        configurations: &[RankingConfiguration],
        configuration_index: usize,
    ) -> Option<Baseline> {
        let own = &configurations[configuration_index];
        let is_plain = |c: &RankingConfiguration| {
            c.balance.normaliser == Normaliser::Raw && c.table_index == own.table_index
        };
        let plain = configurations.iter().position(is_plain)?;
        let rule = self.report.configurations[configuration_index]
            .thresholds
            .as_ref()
            .and_then(|t| t.no_match);
        let images = resolver.corpus.tables[own.table_index].image_positions().len();
        let whole =
            || self.rankings.iter().zip(&self.image_grades).filter(|(_, right)| !right.judged_only);
        let first = whole().filter_map(|(ranked, _)| {
            let (hit, raw) = (ranked[configuration_index].top.first()?, ranked[plain].top.first()?);
            Some((
                hit.0,
                raw.0,
                rule.map(|rule| rule.is_no_match(ranked[configuration_index].best_hit)),
            ))
        });
        let answers = AnswerStats::from_answers(first, images)?;
        let set = own.prompt_set.as_ref();
        let statistics = set.and_then(|set| {
            StatisticsSummary::from_statistics(
                resolver.statistics(own.table_index, set).iter().copied(),
            )
        });
        Some(Baseline { queries: whole().count(), score_moments: statistics, answers })
    }
}

#[cfg(test)]
mod tests {
    use chrono::Utc;

    use super::*;
    use crate::balance::statistics::StatisticsKey;
    use crate::catalogue::{RolloutCandidate, ServingConfig, StandbyGeneration, StateChange};
    use crate::record::VersionOrdering;
    use crate::table::Generation;

    /// A catalogue whose candidate reads the generation of another model.
    fn catalogue_state() -> CatalogueState {
        let generation = |name: &str| {
            Generation::new(name, &name.repeat(64), 2, 100.0, VersionOrdering::Sequence)
        };
        let (live, beside) = (generation("a"), generation("b"));
        let serving = ServingConfig::new(StatisticsKey::from_stored("k"), Normaliser::Nnn, 0.25);
        let candidate = RolloutCandidate {
            name: "new".into(),
            generation: beside.id.clone(),
            serving: serving.clone(),
            traffic_share: 0.0,
            shadow_share: 0.0,
            traffic_filter: None,
            since: Utc::now(),
            evaluation_fingerprint: None,
        };
        CatalogueState {
            format: 2,
            revision: 1,
            created_at: Utc::now(),
            actor: "test".into(),
            live,
            prompt_sets: Vec::new(),
            serving,
            configuration_name: "initial".into(),
            change: StateChange::default(),
            standby: Some(StandbyGeneration {
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
        let mut state = catalogue_state();
        let live = ConfigurationSpec::from_base(BaseConfiguration::Live, "live");
        let candidate = ConfigurationSpec::from_base(BaseConfiguration::Candidate, "new");
        let mut specs = vec![ConfigurationSpec::plain_clip(), live, candidate];
        assert_eq!(plain_clip_counterpart(&specs, "live", &state), None);
        let plain = plain_clip_counterpart(&specs, "new", &state).unwrap();
        assert!(plain.is_raw() && plain.reads_standby(&state), "{plain:?}");
        assert_eq!(plain_clip_counterpart(&specs, "nobody", &state), None);
        specs.push(plain);
        assert_eq!(plain_clip_counterpart(&specs, "new", &state), None, "it is there");
        let there =
            [ConfigurationSpec::try_from("raw,generation=beside").unwrap(), specs[1].clone()];
        assert_eq!(plain_clip_counterpart(&there, "live", &state).unwrap().label(), "raw live");
        // Of the live generation, one plain CLIP serves for both.
        state.candidate.as_mut().unwrap().generation.clone_from(&state.live.id);
        assert_eq!(plain_clip_counterpart(&specs[..3], "new", &state), None);
    }
}
