//! What is usual of a configuration: kept with its calibration, so that a change shows.

use super::Evaluated;
use super::configuration::{Configuration, Resolver};
use crate::calibration::{Habits, Moments, Usual};
use crate::normalise::Normaliser;

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
