//! Reads logs of any length line by line, with little memory.

use std::io::{BufRead, Error, Read as _};

use super::text_files::skip_byte_order_mark;

/// Maximum length of a line in bytes; of a longer line nothing is returned.
pub(super) const MAX_LINE_BYTES: u64 = 1 << 20;

/// Calls `visit` with the number of each line, from 1, and its bytes, line break included; with `None` for
/// a line that is longer than [`MAX_LINE_BYTES`]. Ends when the log does, or with the first error; `failed`
/// converts that of the log.
pub(super) fn for_each_line<E>(
    mut log: impl BufRead,
    failed: impl Fn(Error) -> E,
    mut visit: impl FnMut(u64, Option<&[u8]>) -> Result<(), E>,
) -> Result<(), E> {
    skip_byte_order_mark(&mut log).map_err(&failed)?;
    let mut line = Vec::new();
    for number in 1.. {
        line.clear();
        let read = (&mut log).take(MAX_LINE_BYTES).read_until(b'\n', &mut line);
        let read = read.map_err(&failed)? as u64;
        if read == 0 {
            break;
        }
        let is_too_long = read == MAX_LINE_BYTES && line.last() != Some(&b'\n');
        if is_too_long {
            log.skip_until(b'\n').map_err(&failed)?;
        }
        visit(number, (!is_too_long).then_some(&line))?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_byte_order_mark_is_not_part_of_the_first_line() {
        let mut lines = Vec::new();
        let mut read = |log: &[u8]| {
            for_each_line(
                log,
                |error| error.to_string(),
                |_, line| {
                    lines.extend(line.map(<[u8]>::to_vec));
                    Ok(())
                },
            )
        };
        read(b"\xef\xbb\xbf{}\n").unwrap();
        assert!(read(b"\xff\xfe{\0}\0").unwrap_err().contains("UTF-16"));
        assert_eq!(lines, [b"{}\n"]);
    }

    #[test]
    fn a_line_that_is_too_long_is_skipped_to_its_end() {
        let long = "x".repeat(MAX_LINE_BYTES as usize + 7);
        let fits = "y".repeat(MAX_LINE_BYTES as usize - 1);
        let log = format!("first\n{long}\n\n{fits}\nlast");
        let mut lines = Vec::new();
        for_each_line(
            log.as_bytes(),
            |error| error,
            |number, line| {
                assert_eq!(number as usize, lines.len() + 1);
                lines.push(line.map(|line| line.trim_ascii().len()));
                Ok(())
            },
        )
        .unwrap();
        assert_eq!(lines, [Some(5), None, Some(0), Some(fits.len()), Some(4)]);
    }
}
