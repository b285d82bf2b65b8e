//! Progress bars.

use indicatif::{ProgressBar, ProgressStyle};

/// A progress bar for work whose length is known.
pub fn progress_bar(what: &str, length: u64) -> anyhow::Result<ProgressBar> {
    let template = format!("{what:>10} [{{bar:40}}] {{pos}}/{{len}} {{per_sec}} {{eta}}");
    let style = ProgressStyle::with_template(&template)?.progress_chars("=> ");
    Ok(ProgressBar::new(length).with_style(style))
}

/// Shows how much of how much is done.
pub fn progress_callback(bar: &ProgressBar) -> impl Fn(usize, usize) + Sync {
    |done, all| {
        bar.set_length(all as u64);
        bar.set_position(done as u64);
    }
}
