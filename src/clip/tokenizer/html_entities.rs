//! Character references of HTML, decoded as Python's `html.unescape` and as `ftfy` do.

use std::collections::HashMap;
use std::sync::LazyLock;

/// The names of the HTML standard, one per line with its characters in hexadecimal; `?` after a name
/// says that it is valid without a semicolon too.
const NAMES: &str = include_str!("html_entities.txt");
/// Longest name that a reference without a number can have, the semicolon not included.
const MAX_NAME_CHARS: usize = 32;
/// Longest reference that `ftfy` decodes, `&`, `#` and the semicolon not included.
const MAX_STRICT_CHARS: usize = 24;
/// What Windows-1252 has at 0x80 to 0x9f; five places are control characters there too.
pub const WINDOWS_1252: [char; 32] = [
    '€', '\u{81}', '‚', 'ƒ', '„', '…', '†', '‡', 'ˆ', '‰', 'Š', '‹', 'Œ', '\u{8d}', 'Ž', '\u{8f}',
    '\u{90}', '‘', '’', '“', '”', '•', '–', '—', '˜', '™', 'š', '›', 'œ', '\u{9d}', 'ž', 'Ÿ',
];

/// A named reference: its characters, and whether it needs a semicolon.
struct Entity {
    characters: String,
    is_optional_semicolon: bool,
}

static ENTITIES: LazyLock<HashMap<&'static str, Entity>> = LazyLock::new(|| {
    let parse = |line: &'static str| {
        let mut fields = line.split(' ');
        let name = fields.next()?;
        let plain = name.trim_end_matches('?');
        let characters = fields
            .map(|code| u32::from_str_radix(code, 16).ok().and_then(char::from_u32))
            .collect::<Option<String>>()?;
        Some((plain, Entity { characters, is_optional_semicolon: plain != name }))
    };
    NAMES.lines().filter_map(parse).collect()
});

/// Decodes every reference as `html.unescape` does: as browsers do, without a semicolon too where the
/// standard allows it.
pub fn unescape(text: &str) -> String {
    replace_references(text, |rest| {
        if let Some(number) = rest.strip_prefix('#') {
            let (length, code) = parse_number(number)?;
            let semicolon = usize::from(number[length..].starts_with(';'));
            return Some((1 + length + semicolon, decode_number(code)));
        }
        let ends = |c: char| matches!(c, '\t' | '\n' | '\u{c}' | ' ' | '<' | '&' | '#' | ';');
        let end = rest.find(ends).unwrap_or(rest.len());
        let end = rest.char_indices().nth(MAX_NAME_CHARS).map_or(end, |(at, _)| end.min(at));
        let name = &rest[..end];
        if rest[end..].starts_with(';')
            && let Some(entity) = ENTITIES.get(name)
        {
            return Some((end + 1, entity.characters.clone()));
        }
        // The longest beginning that is valid without a semicolon; names are ASCII.
        (2..=end).rev().filter(|length| name.is_char_boundary(*length)).find_map(|length| {
            let entity = ENTITIES.get(&name[..length])?;
            entity.is_optional_semicolon.then(|| (length, entity.characters.clone()))
        })
    })
}

/// Decodes only what is certainly meant, as `ftfy` does: references with a semicolon, and names of lower
/// case that somebody wrote in capitals.
pub fn unescape_strict(text: &str) -> String {
    replace_references(text, |rest| {
        let (sign, name) = rest.strip_prefix('#').map_or((0, rest), |number| (1, number));
        let length = name.bytes().take_while(u8::is_ascii_alphanumeric).count();
        if !(1..=MAX_STRICT_CHARS).contains(&length) || !name[length..].starts_with(';') {
            return None;
        }
        let whole = sign + length + 1;
        let name = &name[..length];
        if sign == 1 {
            let (digits, code) = parse_number(name)?;
            // A reference that is decoded to a semicolon stays, as one that is decoded in part.
            let decoded = decode_number(code);
            return (digits == length && decoded != ";").then_some((whole, decoded));
        }
        if let Some(entity) = ENTITIES.get(name) {
            return Some((whole, entity.characters.clone()));
        }
        let lower = name.to_ascii_lowercase();
        let entity = ENTITIES.get(lower.as_str())?;
        let in_capitals = lower.to_ascii_uppercase() == name;
        let reference = format!("&{name};");
        (in_capitals && unescape(&reference) == reference)
            .then(|| (whole, entity.characters.to_uppercase()))
    })
}

/// Replaces each reference that `decode` knows. `decode` gets what follows `&`, and returns the number of
/// bytes that belong to the reference and what it means.
fn replace_references(text: &str, decode: impl Fn(&str) -> Option<(usize, String)>) -> String {
    let mut replaced = String::with_capacity(text.len());
    let mut rest = text;
    while let Some(at) = rest.find('&') {
        replaced.push_str(&rest[..at]);
        rest = &rest[at + 1..];
        match decode(rest) {
            Some((length, characters)) => {
                replaced.push_str(&characters);
                rest = &rest[length..];
            }
            None => replaced.push('&'),
        }
    }
    replaced.push_str(rest);
    replaced
}

/// Parses decimal digits, or hexadecimal ones after `x`. Returns their length in bytes and the number; too
/// large ones are `u32::MAX`.
fn parse_number(text: &str) -> Option<(usize, u32)> {
    let (prefix, radix) = if text.starts_with(['x', 'X']) { (1, 16) } else { (0, 10) };
    let digits = text[prefix..].bytes().take_while(|b| char::from(*b).is_digit(radix)).count();
    let number = &text[prefix..prefix + digits];
    (digits > 0).then(|| (prefix + digits, u32::from_str_radix(number, radix).unwrap_or(u32::MAX)))
}

/// Returns the character of a number, as browsers do: Windows-1252 in the place of control characters,
/// nothing for other invalid ones.
fn decode_number(code: u32) -> String {
    let is_noncharacter = (0xfdd0..=0xfdef).contains(&code) || (code & 0xfffe == 0xfffe);
    match code {
        0 => "\u{fffd}".into(),
        0x80..=0x9f => WINDOWS_1252[code as usize - 0x80].into(),
        0x01..=0x08 | 0x0b | 0x0e..=0x1f | 0x7f => String::new(),
        _ => match char::from_u32(code) {
            Some(_) if is_noncharacter => String::new(),
            Some(character) => character.into(),
            None => "\u{fffd}".into(),
        },
    }
}
