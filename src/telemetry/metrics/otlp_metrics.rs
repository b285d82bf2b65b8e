//! The metrics of this process as OTLP has them, from the text that Prometheus reads: one truth.

use std::collections::BTreeMap;

use serde_json::{Value, json};

use super::{METRIC_DESCRIPTIONS, global, render_prometheus};

/// Labels, as they are written.
type LabelText = String;

/// A request to `/v1/metrics`.
pub fn export_request_json(resource: &Value) -> Value {
    let start = unix_nanoseconds(global().start_time.value());
    request_from_prometheus(
        &render_prometheus(),
        resource,
        &start,
        &unix_nanoseconds(super::unix_seconds()),
    )
}

fn unix_nanoseconds(seconds: f64) -> String {
    ((seconds * 1e3).round() as i64 * 1_000_000).to_string()
}

/// Series of one metric, by their labels without `le`.
#[derive(Default)]
struct MetricSeries {
    value: f64,
    sum: f64,
    count: f64,
    /// Upper bound and count at or below it.
    buckets: Vec<(f64, f64)>,
}

fn request_from_prometheus(text: &str, resource: &Value, start: &str, now: &str) -> Value {
    let mut found: BTreeMap<&str, BTreeMap<LabelText, MetricSeries>> = BTreeMap::new();
    for line in text.lines().filter(|line| !line.starts_with('#')) {
        let Some((name, value)) = line.rsplit_once(' ') else { continue };
        let Ok(value) = value.parse::<f64>() else { continue };
        let (name, labels) = name.split_once('{').unwrap_or((name, ""));
        let labels = labels.trim_end_matches('}');
        let part = ["_bucket", "_sum", "_count"]
            .into_iter()
            .find_map(|p| Some((name.strip_suffix(p)?, p)));
        let known = |name: &str| METRIC_DESCRIPTIONS.iter().find(|metric| metric.name == name);
        let histogram = part
            .and_then(|(base, part)| Some((known(base).filter(|m| m.kind == "histogram")?, part)));
        if let Some((metric, part)) = histogram {
            let (bound, rest): (Vec<&str>, Vec<&str>) =
                labels.split(',').filter(|l| !l.is_empty()).partition(|l| l.starts_with("le="));
            let series = found.entry(metric.name).or_default().entry(rest.join(",")).or_default();
            match part {
                "_sum" => series.sum = value,
                "_count" => series.count = value,
                _ => {
                    let bound = bound.first().map_or("", |le| &le[3..]).trim_matches('"');
                    series.buckets.push((bound.parse().unwrap_or(f64::INFINITY), value));
                }
            }
        } else if let Some(metric) = known(name).filter(|_| value.is_finite()) {
            found.entry(metric.name).or_default().entry(labels.to_owned()).or_default().value =
                value;
        }
    }
    let metrics: Vec<Value> = METRIC_DESCRIPTIONS
        .iter()
        .filter_map(|metric| {
            let points: Vec<Value> = found
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
    // Values of labels are names of ours: no commas or quotes.
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
    let below = std::iter::once(0.0).chain(series.buckets.iter().map(|(_, count)| *count));
    let own: Vec<String> = series
        .buckets
        .iter()
        .zip(below)
        .map(|((_, all), below)| format!("{}", all - below))
        .collect();
    let bounds: Vec<f64> =
        series.buckets.iter().map(|(b, _)| *b).filter(|b| b.is_finite()).collect();
    json!({
        "attributes": attributes, "startTimeUnixNano": start, "timeUnixNano": now,
        "count": format!("{}", series.count), "sum": series.sum,
        "bucketCounts": own, "explicitBounds": bounds,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn prometheus_text_becomes_points() {
        let text = "# TYPE bsap_lag_messages gauge\nbsap_lag_messages 7\nbsap_poll_age_seconds NaN\n\
            bsap_searches_total{normaliser=\"nnn\"} 3\n\
            bsap_stage_seconds_sum{stage=\"fetch\"} 1.5\nbsap_stage_seconds_count{stage=\"fetch\"} 4\n\
            bsap_stage_seconds_bucket{le=\"0.1\",stage=\"fetch\"} 1\n\
            bsap_stage_seconds_bucket{le=\"+Inf\",stage=\"fetch\"} 4\n";
        let sent = request_from_prometheus(text, &json!({}), "1", "2");
        let metrics = sent["resourceMetrics"][0]["scopeMetrics"][0]["metrics"].as_array().unwrap();
        let named = |name: &str| metrics.iter().find(|metric| metric["name"] == name);
        assert_eq!(named("bsap_lag_messages").unwrap()["gauge"]["dataPoints"][0]["asDouble"], 7.0);
        assert!(named("bsap_poll_age_seconds").is_none(), "what is not known is not sent");
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
