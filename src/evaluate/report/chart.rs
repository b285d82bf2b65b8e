//! Charts as SVG. They are drawn here because a report must not load anything from elsewhere.

use std::fmt::Write as _;

use super::MeasuredDifference;
use crate::evaluate::measures::interval::ConfidenceInterval;

/// Height of a row, in SVG units.
const ROW_HEIGHT: usize = 26;
/// Width of the column of names on the left, in SVG units.
const NAMES_WIDTH: f64 = 260.0;
/// Width of the plot between names and numbers, in SVG units.
const PLOT_WIDTH: f64 = 460.0;
/// Width of the column of numbers on the right, in SVG units.
const NUMBERS_WIDTH: f64 = 190.0;
/// Names with more characters are truncated.
const MAX_NAME_CHARS: usize = 38;

/// A row of a chart.
pub(crate) struct IntervalBar {
    /// Name of the row.
    pub(crate) row_label: String,
    /// Mean and interval to draw.
    pub(crate) interval: ConfidenceInterval,
    /// Decides the colour.
    pub(crate) difference: MeasuredDifference,
}

/// Escapes text for HTML and SVG, including attributes.
pub(crate) fn escape_html(text: &str) -> String {
    let mut safe = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '&' => safe.push_str("&amp;"),
            '<' => safe.push_str("&lt;"),
            '>' => safe.push_str("&gt;"),
            '"' => safe.push_str("&quot;"),
            '\'' => safe.push_str("&#39;"),
            c => safe.push(c),
        }
    }
    safe
}

/// Truncates a text to at most `max_chars` characters, the last of which is then an ellipsis.
pub(crate) fn truncate_text(text: &str, max_chars: usize) -> String {
    if text.chars().count() <= max_chars {
        return text.to_owned();
    }
    text.chars().take(max_chars - 1).chain(['…']).collect()
}

/// Draws means with intervals, one below the other, on a shared axis. With `include_zero`, the axis
/// includes 0 and marks it by a line. Printed numbers are multiplied by `scale` (100 for percent).
pub(crate) fn draw_interval_chart(
    title: &str,
    bars: &[IntervalBar],
    include_zero: bool,
    unit: &str,
    scale: f64,
) -> String {
    if bars.is_empty() {
        return String::new();
    }
    let mut low = bars.iter().map(|bar| bar.interval.low).fold(f64::MAX, f64::min);
    let mut high = bars.iter().map(|bar| bar.interval.high).fold(f64::MIN, f64::max);
    if include_zero {
        (low, high) = (low.min(0.0), high.max(0.0));
    }
    let margin = ((high - low) * 0.06).max(0.002);
    let (low, high) = (low - margin, high + margin);
    let x = |value: f64| NAMES_WIDTH + (value - low) / (high - low) * PLOT_WIDTH;
    let height = bars.len() * ROW_HEIGHT + 34;
    let width = NAMES_WIDTH + PLOT_WIDTH + NUMBERS_WIDTH;
    let mut svg = format!(
        "<svg viewBox=\"0 0 {width} {height}\" role=\"img\" aria-label=\"{}\" class=\"chart\">",
        escape_html(title)
    );
    let bottom = bars.len() * ROW_HEIGHT + 6;
    for tick in axis_ticks(low, high) {
        let class = if include_zero && tick == 0.0 { "zero" } else { "grid" };
        let tick_x = x(tick);
        let _ = write!(
            svg,
            "<line x1=\"{tick_x:.1}\" x2=\"{tick_x:.1}\" y1=\"2\" y2=\"{bottom}\" class=\"{class}\"/><text x=\"{tick_x:.1}\" y=\"{}\" class=\"tick\">{}</text>",
            bottom + 16,
            format_number(tick * scale, unit)
        );
    }
    for (index, bar) in bars.iter().enumerate() {
        let y = index * ROW_HEIGHT + ROW_HEIGHT / 2 + 2;
        let class = match bar.difference {
            MeasuredDifference::Better => "better",
            MeasuredDifference::Worse => "worse",
            MeasuredDifference::NotSignificant => "none",
        };
        let ConfidenceInterval { mean, low, high } = bar.interval;
        let _ = write!(
            svg,
            "<text x=\"{}\" y=\"{}\" class=\"name\"><title>{}</title>{}</text><line x1=\"{:.1}\" x2=\"{:.1}\" y1=\"{y}\" y2=\"{y}\" class=\"range {class}\"/><circle cx=\"{:.1}\" cy=\"{y}\" r=\"5\" class=\"dot {class}\"/><text x=\"{}\" y=\"{}\" class=\"value\">{} ({} to {})</text>",
            NAMES_WIDTH - 12.0,
            y + 4,
            escape_html(&bar.row_label),
            escape_html(&truncate_text(&bar.row_label, MAX_NAME_CHARS)),
            x(low),
            x(high),
            x(mean),
            NAMES_WIDTH + PLOT_WIDTH + 12.0,
            y + 4,
            format_number(mean * scale, unit),
            format_number(low * scale, ""),
            format_number(high * scale, "")
        );
    }
    svg.push_str("</svg>");
    svg
}

/// Returns round values on an axis, about five.
fn axis_ticks(low: f64, high: f64) -> Vec<f64> {
    let min_step = (high - low) / 5.0;
    let power = 10f64.powf(min_step.log10().floor());
    let step = [1.0, 2.0, 5.0, 10.0].into_iter().map(|m| m * power).find(|s| *s >= min_step);
    let step = step.unwrap_or(min_step);
    let first = (low / step).ceil() as i64;
    let last = (high / step).floor() as i64;
    (first..=last).map(|n| n as f64 * step).collect()
}

fn format_number(value: f64, unit: &str) -> String {
    let digits = usize::from(value.abs() < 100.0);
    let rounded = format!("{value:.digits$}").replace('-', "−");
    // A small negative value may be rounded to −0.0, which is printed without its sign.
    let rounded = if rounded.trim_start_matches('−').parse() == Ok(0.0) {
        rounded.trim_start_matches('−').to_owned()
    } else {
        rounded
    };
    format!("{rounded}{unit}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ticks_are_round_and_few() {
        for (low, high) in [(-0.03, 0.011), (0.0, 1.0), (-512.0, 3.0), (0.1234, 0.1239)] {
            let all = axis_ticks(low, high);
            assert!((2..=11).contains(&all.len()), "{low} {high} {all:?}");
            assert!(all.iter().all(|t| (low..=high).contains(t)), "{all:?}");
        }
    }

    #[test]
    fn markup_in_a_name_is_escaped() {
        let interval = ConfidenceInterval { mean: 0.1, low: 0.0, high: 0.2 };
        let name = "<script>alert('x')</script>\"".to_owned();
        let bar = IntervalBar {
            row_label: name,
            interval,
            difference: MeasuredDifference::NotSignificant,
        };
        let svg = draw_interval_chart("a & b", &[bar], true, "", 1.0);
        assert!(!svg.contains("<script") && svg.contains("&lt;script"), "{svg}");
    }
}
