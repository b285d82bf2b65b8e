//! Progress bars.

use indicatif::{ProgressBar, ProgressStyle};

/// Creates a progress bar with a label of at most 10 characters.
pub fn progress_bar(label: &str, length: u64) -> anyhow::Result<ProgressBar> {
    let template = format!("{label:>10} [{{bar:40}}] {{pos}}/{{len}} {{per_sec}} {{eta}}");
    let style = ProgressStyle::with_template(&template)?.progress_chars("=> ");
    Ok(ProgressBar::new(length).with_style(style))
}

/// Returns a callback that shows how many of how many items are done.
pub fn progress_callback(bar: &ProgressBar) -> impl Fn(usize, usize) + Sync {
    |done, total| {
        bar.set_length(total as u64);
        bar.set_position(done as u64);
    }
}
