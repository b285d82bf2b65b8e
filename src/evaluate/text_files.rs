//! Text files as other programs write them: byte order marks, UTF-16, what separates the fields of a table,
//! and what is wrong with a line of JSON.

use std::io::{BufRead, Error, ErrorKind};

const UTF_8_MARK: &[u8] = b"\xef\xbb\xbf";
const UTF_16_MARKS: [&[u8]; 2] = [b"\xff\xfe", b"\xfe\xff"];
/// Separators of fields: of CSV, of CSV where a comma is part of numbers, and of TSV.
const DELIMITERS: [u8; 3] = [b',', b';', b'\t'];

/// Returns the text of a file in UTF-8, with or without a byte order mark, or in UTF-16 with one; fails
/// with a sentence if it is in another encoding.
pub fn decode_text(mut bytes: Vec<u8>) -> Result<String, String> {
    let is_little_endian = bytes.starts_with(UTF_16_MARKS[0]);
    if is_little_endian || bytes.starts_with(UTF_16_MARKS[1]) {
        let (units, rest) = bytes[2..].as_chunks();
        let decode: fn([u8; 2]) -> u16 =
            if is_little_endian { u16::from_le_bytes } else { u16::from_be_bytes };
        let units = units.iter().copied().map(decode);
        let text = char::decode_utf16(units).collect::<Result<String, _>>();
        return text
            .ok()
            .filter(|_| rest.is_empty())
            .ok_or_else(|| "is not valid UTF-16; save it as UTF-8".into());
    }
    if bytes.starts_with(UTF_8_MARK) {
        bytes.drain(..UTF_8_MARK.len());
    }
    let text = String::from_utf8(bytes).map_err(|error| {
        format!(
            "byte {} is not UTF-8; save the file as UTF-8",
            error.utf8_error().valid_up_to() + 1
        )
    })?;
    // UTF-16 without a mark is valid UTF-8 if all characters are ASCII.
    if text.contains('\0') {
        return Err("has zero bytes, as UTF-16 without a byte order mark; save it as UTF-8".into());
    }
    Ok(text)
}

/// Skips a byte order mark at the beginning of a log in UTF-8; fails if the log is in UTF-16.
pub fn skip_byte_order_mark(log: &mut impl BufRead) -> Result<(), Error> {
    let beginning = log.fill_buf()?;
    if UTF_16_MARKS.iter().any(|mark| beginning.starts_with(mark)) {
        return Err(Error::new(ErrorKind::InvalidData, "is UTF-16; save it as UTF-8"));
    }
    if beginning.starts_with(UTF_8_MARK) {
        log.consume(UTF_8_MARK.len());
    }
    Ok(())
}

/// Returns the message of an error without its position, which is relative to what was parsed: whoever
/// reports it names the line in the file.
pub fn describe_without_position(error: &serde_json::Error) -> String {
    error.to_string().split(" at line ").next().unwrap_or_default().to_owned()
}

/// Returns what separates the fields of a table: that which finds most of `columns` in its first line,
/// the comma if none does.
pub fn detect_delimiter(beginning: &[u8], columns: &[&str]) -> u8 {
    let known_columns = |delimiter: &u8| {
        let header = csv::ReaderBuilder::new()
            .delimiter(*delimiter)
            .trim(csv::Trim::All)
            .from_reader(beginning)
            .headers()
            .map(|header| header.iter().filter(|name| columns.contains(name)).count());
        header.unwrap_or_default()
    };
    // The last of equal ones is returned.
    DELIMITERS.into_iter().rev().max_by_key(known_columns).unwrap_or(b',')
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn encodings_with_a_mark_are_read_and_others_are_named() {
        let text = "text,relevant\na ü hat,1\n";
        let marked = [UTF_8_MARK, text.as_bytes()].concat();
        let little = [0xff, 0xfe].into_iter().chain(text.encode_utf16().flat_map(u16::to_le_bytes));
        let big = [0xfe, 0xff].into_iter().chain(text.encode_utf16().flat_map(u16::to_be_bytes));
        for bytes in [text.into(), marked, little.collect(), big.collect()] {
            assert_eq!(decode_text(bytes).as_deref(), Ok(text));
        }
        let unmarked: Vec<u8> = "a hat".encode_utf16().flat_map(u16::to_le_bytes).collect();
        for (bytes, reason) in [
            (unmarked, "byte order mark"),
            (b"a \xfc hat".to_vec(), "byte 3 is not UTF-8"),
            (b"\xff\xfea".to_vec(), "not valid UTF-16"),
        ] {
            let error = decode_text(bytes).unwrap_err();
            assert!(error.contains(reason), "{error}");
        }
    }

    #[test]
    fn the_separator_is_the_one_that_finds_the_columns() {
        let columns = ["text", "relevant", "group"];
        for (header, delimiter) in [
            ("text,relevant\n", b','),
            ("text\n", b','),
            ("text;relevant;group\n\"a;b\";1;x\n", b';'),
            ("\"text\"\trelevant\n", b'\t'),
            ("colour;size\n", b','),
            ("", b','),
        ] {
            assert_eq!(detect_delimiter(header.as_bytes(), &columns), delimiter, "{header:?}");
        }
    }
}
