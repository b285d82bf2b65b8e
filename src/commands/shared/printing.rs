//! Lines for people on standard output and standard error, with control characters escaped.
//!
//! Ids, titles, queries and reasons come from whoever sends events or queries. A control character in one
//! of them could overwrite earlier output, and a mark that changes the direction of writing could make
//! one name look like another.

use std::borrow::Cow;
use std::fmt::{Arguments, Write as _};
use std::io::Write;

use crate::diagnosis::redact::redact;

/// Prints a line on standard output: the result of a command, for people or for another program.
macro_rules! print_line {
    ($($text:tt)*) => {
        $crate::commands::shared::printing::write_escaped_line(std::io::stdout(), format_args!($($text)*))
    };
}
pub(crate) use print_line;

/// Prints a line on standard error: a note that is not part of the result.
macro_rules! print_note {
    ($($text:tt)*) => {
        $crate::commands::shared::printing::write_redacted_line(std::io::stderr(), format_args!($($text)*))
    };
}
pub(crate) use print_note;

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
            write_escaped_line(std::io::stderr(), text);
        } else {
            write_escaped_line(std::io::stdout(), text);
        }
    }
}

/// Writes a line. Unlike `println!` it does not panic if the reader has closed the pipe
/// (`bsap … | head`).
pub fn write_escaped_line(mut output: impl Write, text: Arguments<'_>) {
    let _ = writeln!(output, "{}", escape_control_characters(&text.to_string()));
}

/// Writes a line as [`write_escaped_line`] does, without secrets.
pub fn write_redacted_line(output: impl Write, text: Arguments<'_>) {
    write_escaped_line(output, format_args!("{}", redact(&text.to_string())));
}

/// Replaces the line breaks of a name by `\uXXXX`, so that it stays in its line.
pub fn escape_line_breaks(name: &str) -> String {
    name.replace('\n', "\\u000a").replace('\r', "\\u000d")
}

/// Replaces characters that control a terminal by `\uXXXX`, which a JSON parser reads as the same
/// character. Line breaks, tabs and colours stay.
fn escape_control_characters(text: &str) -> Cow<'_, str> {
    if !text.contains(controls_terminal) {
        return text.into();
    }
    let mut escaped = String::with_capacity(text.len());
    for (at, c) in text.char_indices() {
        let rest = &text[at..];
        if controls_terminal(c) && !starts_with_colour_code(rest) && !rest.starts_with("\r\n") {
            let _ = write!(escaped, "\\u{:04x}", u32::from(c));
        } else {
            escaped.push(c);
        }
    }
    escaped.into()
}

fn controls_terminal(c: char) -> bool {
    let changes_direction = matches!(c, '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}');
    changes_direction || (c.is_control() && !matches!(c, '\n' | '\t'))
}

/// Whether `text` starts with the control sequence "select graphic rendition" of ECMA-48.
fn starts_with_colour_code(text: &str) -> bool {
    let code = text.strip_prefix("\u{1b}[");
    code.is_some_and(|c| {
        c.trim_start_matches(|c: char| c.is_ascii_digit() || c == ';').starts_with('m')
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn printed(text: &str) -> String {
        let mut out = Vec::new();
        write_escaped_line(&mut out, format_args!("{text}"));
        String::from_utf8(out).unwrap()
    }

    #[test]
    fn text_from_outside_does_not_control_the_terminal() {
        for (hostile, harmless) in [
            ("mug\u{1b}[2J\u{1b}[1;1H", "mug\\u001b[2J\\u001b[1;1H\n"),
            ("\u{1b}]52;c;cm0=\u{7}", "\\u001b]52;c;cm0=\\u0007\n"),
            ("\u{9b}2J", "\\u009b2J\n"),
            ("ok\rFAILED", "ok\\u000dFAILED\n"),
            ("a\u{202e}gpj.exe", "a\\u202egpj.exe\n"),
        ] {
            assert_eq!(printed(hostile), harmless);
        }
        let escaped = printed(&serde_json::json!("a\u{202e}b").to_string());
        assert_eq!(serde_json::from_str::<String>(&escaped).unwrap(), "a\u{202e}b");
    }

    #[test]
    fn layout_colours_and_all_scripts_are_kept() {
        for text in ["a\tb\nc\r\nd", "\u{1b}[1;38;5;10mgreen\u{1b}[0m", "ミルク مرحبا 👩‍🎨"]
        {
            assert_eq!(printed(text), format!("{text}\n"));
        }
    }
}
