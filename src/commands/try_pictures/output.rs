//! Lines for people: on standard output, or on standard error if standard output is for JSON.

use std::fmt::Arguments;
use std::io;

use crate::commands::shared::printing::write_escaped_line;

/// Where lines for people go.
#[derive(Debug, Clone, Copy)]
pub struct Output {
    uses_stderr: bool,
}

impl Output {
    /// Creates an output; `prints_json` says that standard output is for JSON.
    pub fn new(prints_json: bool) -> Self {
        Self { uses_stderr: prints_json }
    }

    /// Prints a line.
    pub fn line(self, text: Arguments<'_>) {
        if self.uses_stderr {
            write_escaped_line(io::stderr(), text);
        } else {
            write_escaped_line(io::stdout(), text);
        }
    }
}
