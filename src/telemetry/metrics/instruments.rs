//! Counters, gauges and histograms with labels, on top of `prometheus-client`.

use std::sync::atomic::AtomicU64;

use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::{counter, gauge, histogram};
use prometheus_client::registry::Registry;

type LabelPairs = Vec<(&'static str, String)>;

fn label_pairs(names: &'static [&'static str], values: &[&str]) -> LabelPairs {
    names.iter().copied().zip(values.iter().map(|value| (*value).to_owned())).collect()
}

/// A number that only grows.
pub struct Counter {
    label_names: &'static [&'static str],
    family: Family<LabelPairs, counter::Counter>,
}

impl Counter {
    pub(crate) const KIND: &'static str = "counter";

    pub(crate) fn register(
        registry: &mut Registry,
        name: &'static str,
        labels: &'static [&'static str],
        about: &'static str,
    ) -> Self {
        let family = Family::default();
        // The encoder appends the suffix `_total` again, and the registry the full stop.
        let name = name.strip_suffix("_total").unwrap_or(name);
        registry.register(name, about.trim_end_matches('.'), family.clone());
        Self { label_names: labels, family }
    }

    /// Adds `n`; `values` are those of the labels, in the declared order.
    pub fn add(&self, values: &[&str], n: u64) {
        self.family.get_or_create(&label_pairs(self.label_names, values)).inc_by(n);
    }
}

/// A number that goes up and down.
pub struct Gauge {
    label_names: &'static [&'static str],
    family: Family<LabelPairs, gauge::Gauge<f64, AtomicU64>>,
}

impl Gauge {
    pub(crate) const KIND: &'static str = "gauge";

    pub(crate) fn register(
        registry: &mut Registry,
        name: &'static str,
        labels: &'static [&'static str],
        about: &'static str,
    ) -> Self {
        let family = Family::default();
        registry.register(name, about.trim_end_matches('.'), family.clone());
        Self { label_names: labels, family }
    }

    /// Sets the gauge; `values` are those of the labels, in the declared order.
    pub fn set(&self, values: &[&str], value: f64) {
        self.family.get_or_create(&label_pairs(self.label_names, values)).set(value);
    }

    /// Returns the value of a gauge without labels.
    pub(crate) fn value(&self) -> f64 {
        self.family.get_or_create(&Vec::new()).get()
    }

    /// Sets a gauge without labels; `None` (not known) becomes NaN.
    pub fn set_or_nan(&self, value: Option<f64>) {
        self.set(&[], value.unwrap_or(f64::NAN));
    }
}

/// Counts values per range; the values of all histograms are in seconds.
pub struct Histogram {
    label_names: &'static [&'static str],
    family: Family<LabelPairs, histogram::Histogram, fn() -> histogram::Histogram>,
}

impl Histogram {
    pub(crate) const KIND: &'static str = "histogram";

    pub(crate) fn register(
        registry: &mut Registry,
        name: &'static str,
        labels: &'static [&'static str],
        about: &'static str,
    ) -> Self {
        let family =
            Family::new_with_constructor(new_seconds_histogram as fn() -> histogram::Histogram);
        registry.register(name, about.trim_end_matches('.'), family.clone());
        Self { label_names: labels, family }
    }

    /// Counts a value in seconds; `values` are those of the labels, in the declared order.
    pub fn observe_seconds(&self, values: &[&str], seconds: f64) {
        self.family.get_or_create(&label_pairs(self.label_names, values)).observe(seconds);
    }
}

/// Returns a histogram for 1 ms (a scan in memory) to 500 s (a commit to a failing store).
fn new_seconds_histogram() -> histogram::Histogram {
    histogram::Histogram::new([
        0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 25.0, 50.0,
        100.0, 250.0, 500.0,
    ])
}
