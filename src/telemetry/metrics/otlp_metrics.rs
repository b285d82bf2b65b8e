//! The metrics of this process in the JSON form of OTLP, parsed from the text for Prometheus, so that
//! both always agree.

use std::collections::BTreeMap;

use serde_json::{Value, json};

use super::{METRIC_DESCRIPTIONS, global, render_prometheus};

/// Labels without `le`, as in the text: `a="x",b="y"`.
type LabelText = String;

/// Returns the body of a request to `/v1/metrics`.
pub fn metrics_request_json(resource: &Value) -> Value {
    let start = unix_nanoseconds(global().start_time.value());
    request_from_prometheus(
        &render_prometheus(),
        resource,
        &start,
        &unix_nanoseconds(super::unix_seconds_now()),
    )
}

fn unix_nanoseconds(seconds: f64) -> String {
    ((seconds * 1e3).round() as i64 * 1_000_000).to_string()
}

/// The values of one series: `value` of a counter or gauge, the rest of a histogram.
#[derive(Default)]
struct MetricSeries {
    value: f64,
    histogram_sum: f64,
    histogram_count: f64,
    /// Upper bound, and count of values at or below it.
    cumulative_buckets: Vec<(f64, f64)>,
}

fn request_from_prometheus(text: &str, resource: &Value, start: &str, now: &str) -> Value {
    let mut series_by_metric: BTreeMap<&str, BTreeMap<LabelText, MetricSeries>> = BTreeMap::new();
    for line in text.lines().filter(|line| !line.starts_with('#')) {
        let Some((name, value)) = line.rsplit_once(' ') else { continue };
        let Ok(value) = value.parse::<f64>() else { continue };
        let (name, labels) = name.split_once('{').unwrap_or((name, ""));
        let labels = labels.trim_end_matches('}');
        let suffix = ["_bucket", "_sum", "_count"]
            .into_iter()
            .find_map(|suffix| Some((name.strip_suffix(suffix)?, suffix)));
        let find_metric =
            |name: &str| METRIC_DESCRIPTIONS.iter().find(|metric| metric.name == name);
        let histogram = suffix.and_then(|(base, suffix)| {
            Some((find_metric(base).filter(|m| m.kind == "histogram")?, suffix))
        });
        if let Some((metric, suffix)) = histogram {
            let (bound, rest): (Vec<&str>, Vec<&str>) =
                labels.split(',').filter(|l| !l.is_empty()).partition(|l| l.starts_with("le="));
            let series =
                series_by_metric.entry(metric.name).or_default().entry(rest.join(",")).or_default();
            match suffix {
                "_sum" => series.histogram_sum = value,
                "_count" => series.histogram_count = value,
                _ => {
                    let bound = bound.first().map_or("", |le| &le[3..]).trim_matches('"');
                    series.cumulative_buckets.push((bound.parse().unwrap_or(f64::INFINITY), value));
                }
            }
        } else if let Some(metric) = find_metric(name).filter(|_| value.is_finite()) {
            series_by_metric
                .entry(metric.name)
                .or_default()
                .entry(labels.to_owned())
                .or_default()
                .value = value;
        }
    }
    let metrics: Vec<Value> = METRIC_DESCRIPTIONS
        .iter()
        .filter_map(|metric| {
            let points: Vec<Value> = series_by_metric
                .get(metric.name)?
                .iter()
                .map(|(labels, series)| data_point_json(metric.kind, labels, series, start, now))
                .collect();
            let data = match metric.kind {
                "counter" => {
                    json!({"sum": {"dataPoints": points, "aggregationTemporality": 2, "isMonotonic": true}})
                }
                "gauge" => json!({"gauge": {"dataPoints": points}}),
                _ => json!({"histogram": {"dataPoints": points, "aggregationTemporality": 2}}),
            };
            let mut metric_json = json!({"name": metric.name, "description": metric.about});
            metric_json.as_object_mut()?.extend(data.as_object()?.clone());
            Some(metric_json)
        })
        .collect();
    json!({"resourceMetrics": [{
        "resource": resource,
        "scopeMetrics": [{"scope": {"name": "bsap"}, "metrics": metrics}],
    }]})
}

fn data_point_json(
    kind: &str,
    labels: &str,
    series: &MetricSeries,
    start: &str,
    now: &str,
) -> Value {
    // Label values are names from this program, without commas or quotes.
    let attribute = |label: &str| {
        let (key, value) = label.split_once('=')?;
        Some(json!({"key": key, "value": {"stringValue": value.trim_matches('"')}}))
    };
    let attributes: Vec<Value> = labels.split(',').filter_map(attribute).collect();
    if kind != "histogram" {
        return json!({
            "attributes": attributes, "asDouble": series.value,
            "startTimeUnixNano": start, "timeUnixNano": now,
        });
    }
    let below =
        std::iter::once(0.0).chain(series.cumulative_buckets.iter().map(|(_, count)| *count));
    let bucket_counts: Vec<String> = series
        .cumulative_buckets
        .iter()
        .zip(below)
        .map(|((_, at_or_below), below)| format!("{}", at_or_below - below))
        .collect();
    let bounds: Vec<f64> =
        series.cumulative_buckets.iter().map(|(b, _)| *b).filter(|b| b.is_finite()).collect();
    json!({
        "attributes": attributes, "startTimeUnixNano": start, "timeUnixNano": now,
        "count": format!("{}", series.histogram_count), "sum": series.histogram_sum,
        "bucketCounts": bucket_counts, "explicitBounds": bounds,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_text_for_prometheus_becomes_data_points() {
        let text = "# TYPE bsap_lag_messages gauge\nbsap_lag_messages 7\nbsap_poll_age_seconds NaN\n\
            bsap_searches_total{normaliser=\"nnn\"} 3\n\
            bsap_ingest_stage_seconds_sum{stage=\"fetch\"} 1.5\nbsap_ingest_stage_seconds_count{stage=\"fetch\"} 4\n\
            bsap_ingest_stage_seconds_bucket{le=\"0.1\",stage=\"fetch\"} 1\n\
            bsap_ingest_stage_seconds_bucket{le=\"+Inf\",stage=\"fetch\"} 4\n";
        let sent = request_from_prometheus(text, &json!({}), "1", "2");
        let metrics = sent["resourceMetrics"][0]["scopeMetrics"][0]["metrics"].as_array().unwrap();
        let named = |name: &str| metrics.iter().find(|metric| metric["name"] == name);
        assert_eq!(named("bsap_lag_messages").unwrap()["gauge"]["dataPoints"][0]["asDouble"], 7.0);
        assert!(named("bsap_poll_age_seconds").is_none(), "an unknown value is not sent");
        let searches = &named("bsap_searches_total").unwrap()["sum"];
        assert_eq!(
            (searches["isMonotonic"].as_bool(), searches["aggregationTemporality"].as_u64()),
            (Some(true), Some(2))
        );
        let attribute = json!({"key": "normaliser", "value": {"stringValue": "nnn"}});
        assert_eq!(searches["dataPoints"][0]["attributes"], json!([attribute]));
        let stage = &named("bsap_ingest_stage_seconds").unwrap()["histogram"]["dataPoints"][0];
        assert_eq!(stage["bucketCounts"], json!(["1", "3"]));
        assert_eq!((&stage["explicitBounds"], &stage["count"]), (&json!([0.1]), &json!("4")));
    }
}
