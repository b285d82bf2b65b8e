//! The usual answers of a configuration, stored with its calibration so that drift can be detected.

use super::compare::{
    BaseConfiguration, ConfigurationResolver, ConfigurationSpec, RankingConfiguration,
};
use super::evaluation::Evaluation;
use crate::balance::calibration::{AnswerStats, Baseline, StatisticsSummary};
use crate::balance::normalise::Normaliser;
use crate::catalogue::CatalogueState;

/// Returns plain CLIP over the generation that the spec labelled `calibrated` ranks; `None` if
/// `specs` has it already, or has no spec of that label. [`Evaluation::drift_baseline`] needs it.
pub fn plain_clip_counterpart(
    specs: &[ConfigurationSpec],
    calibrated: &str,
    state: &CatalogueState,
) -> Option<ConfigurationSpec> {
    let reads_standby = specs.iter().find(|spec| spec.label() == calibrated)?.reads_standby(state);
    if specs.iter().any(|spec| spec.is_raw() && spec.reads_standby(state) == reads_standby) {
        return None;
    }
    let name = if reads_standby { "raw standby" } else { "raw live" };
    let mut plain = ConfigurationSpec::from_base(BaseConfiguration::Raw, name);
    plain.standby = reads_standby;
    Some(plain)
}

impl Evaluation {
    /// Returns how the configuration at this index answers compared with plain CLIP over the same
    /// images, and the moments of the statistics that it uses. `None` if plain CLIP over these
    /// images is not among the configurations, or if only judged images were ranked.
    pub fn drift_baseline(
        &self,
        resolver: &mut ConfigurationResolver,
        configurations: &[RankingConfiguration],
        configuration_index: usize,
    ) -> Option<Baseline> {
        let configuration = &configurations[configuration_index];
        let is_plain_clip = |c: &RankingConfiguration| {
            c.balance.normaliser == Normaliser::Raw && c.table_index == configuration.table_index
        };
        let plain_clip_index = configurations.iter().position(is_plain_clip)?;
        let rule = self.report.configurations[configuration_index]
            .thresholds
            .as_ref()
            .and_then(|t| t.no_match);
        let images = resolver.corpus.tables[configuration.table_index].image_positions().len();
        // Rankings have further rows for the probes, which `zip` leaves out.
        let fully_ranked = || {
            self.rankings.iter().zip(&self.image_grades).filter(|(_, grades)| !grades.judged_only)
        };
        let first_hits = fully_ranked().filter_map(|(rankings, _)| {
            let balanced = &rankings[configuration_index];
            let (hit, raw_hit) =
                (balanced.top_results.first()?, rankings[plain_clip_index].top_results.first()?);
            Some((hit.0, raw_hit.0, rule.map(|rule| rule.is_no_match(balanced.best_hit_features))))
        });
        let answers = AnswerStats::from_answers(first_hits, images)?;
        let set = configuration.prompt_set.as_ref();
        let score_moments = set.and_then(|set| {
            let statistics = resolver.cached_statistics(configuration.table_index, set);
            StatisticsSummary::from_statistics(statistics.iter().copied())
        });
        Some(Baseline { queries: fully_ranked().count(), score_moments, answers })
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

    /// Returns the state of a catalogue whose candidate ranks the standby generation.
    fn catalogue_state() -> CatalogueState {
        let generation = |name: &str| {
            Generation::new(name, &name.repeat(64), 2, 100.0, VersionOrdering::Sequence)
        };
        let (live, standby) = (generation("a"), generation("b"));
        let serving = ServingConfig::new(StatisticsKey::from_stored("k"), Normaliser::Nnn, 0.25);
        let candidate = RolloutCandidate {
            name: "new".into(),
            generation: standby.id.clone(),
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
                generation: standby,
                checkpoint: String::new(),
                prompt_sets: Vec::new(),
                since: Utc::now(),
            }),
            candidate: Some(candidate),
        }
    }

    #[test]
    fn a_standby_candidate_is_compared_with_plain_clip_by_the_standby_model() {
        let mut state = catalogue_state();
        let live = ConfigurationSpec::from_base(BaseConfiguration::Live, "live");
        let candidate = ConfigurationSpec::from_base(BaseConfiguration::Candidate, "new");
        let mut specs = vec![ConfigurationSpec::plain_clip(), live, candidate];
        assert_eq!(plain_clip_counterpart(&specs, "live", &state), None);
        let plain = plain_clip_counterpart(&specs, "new", &state).unwrap();
        assert!(plain.is_raw() && plain.reads_standby(&state), "{plain:?}");
        assert_eq!(plain_clip_counterpart(&specs, "nobody", &state), None);
        specs.push(plain);
        assert_eq!(
            plain_clip_counterpart(&specs, "new", &state),
            None,
            "the specs have it already"
        );
        let standby_and_live =
            [ConfigurationSpec::try_from("raw,generation=standby").unwrap(), specs[1].clone()];
        let plain = plain_clip_counterpart(&standby_and_live, "live", &state).unwrap();
        assert_eq!(plain.label(), "raw live");
        // If the candidate ranks the live generation, one plain CLIP serves for both.
        state.candidate.as_mut().unwrap().generation.clone_from(&state.live.id);
        assert_eq!(plain_clip_counterpart(&specs[..3], "new", &state), None);
    }
}
