//! The progress bar of a download: bytes, rate and time left.

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

/// Files below this size have no bar: they are there before one could be read.
const MIN_SHOWN_BYTES: u64 = 1 << 20;

/// The progress bar of one file, on standard error if that is a terminal.
pub struct DownloadProgress(ProgressBar);

impl DownloadProgress {
    pub fn new(file: &str, size: Option<u64>, shown: bool) -> Self {
        let shown = shown && size.is_none_or(|size| size >= MIN_SHOWN_BYTES);
        let target =
            if shown { ProgressDrawTarget::stderr() } else { ProgressDrawTarget::hidden() };
        let bar = ProgressBar::with_draw_target(size, target);
        let template = "{prefix} [{bar:30}] {bytes}/{total_bytes} {bytes_per_sec} {eta} {msg}";
        if let Ok(style) = ProgressStyle::with_template(template) {
            bar.set_style(style.progress_chars("=> "));
        }
        bar.set_prefix(file.to_owned());
        Self(bar)
    }

    /// Says that another process downloads the file.
    pub fn show_waiting(&self) {
        self.0.set_message("another process downloads it");
        self.0.tick();
    }

    /// Continues at a byte; what was downloaded earlier does not count for the rate.
    pub fn start_at(&self, position: u64, size: Option<u64>) {
        if let Some(size) = size {
            self.0.set_length(size);
        }
        self.0.set_message("");
        self.0.set_position(position);
        self.0.reset_eta();
    }

    pub fn advance_to(&self, position: u64) {
        self.0.set_position(position);
    }
}

impl Drop for DownloadProgress {
    fn drop(&mut self) {
        self.0.finish_and_clear();
    }
}
