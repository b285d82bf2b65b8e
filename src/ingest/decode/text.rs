//! Images inside of text: base64 and `data:` addresses.

use std::borrow::Cow;

use base64::Engine as _;
use base64::alphabet;
use base64::engine::{DecodePaddingMode, GeneralPurpose, GeneralPurposeConfig};

const FORGIVING: GeneralPurposeConfig = GeneralPurposeConfig::new()
    .with_decode_padding_mode(DecodePaddingMode::Indifferent)
    .with_decode_allow_trailing_bits(true);
const STANDARD: GeneralPurpose = GeneralPurpose::new(&alphabet::STANDARD, FORGIVING);

/// Decodes base64 in the standard or the URL-safe alphabet, with or without padding and line breaks.
pub fn decode_base64(text: &str) -> Result<Vec<u8>, String> {
    let is_plain = |byte: u8| !byte.is_ascii_whitespace() && byte != b'-' && byte != b'_';
    let standard: Cow<'_, [u8]> = if text.bytes().all(is_plain) {
        text.as_bytes().into()
    } else {
        let bytes = text.bytes().filter(|byte| !byte.is_ascii_whitespace());
        let to_standard = |byte| match byte {
            b'-' => b'+',
            b'_' => b'/',
            other => other,
        };
        bytes.map(to_standard).collect()
    };
    STANDARD.decode(standard).map_err(|error| format!("is not base64: {error}"))
}

/// Decodes the bytes in a `data:` address.
pub fn decode_data_url(url: &str) -> Result<Vec<u8>, String> {
    let invalid = |error: String| format!("is not a data URL: {error}");
    let head_and_body = url.split_once(',');
    if let Some((head, body)) = head_and_body
        && head.trim_end().to_ascii_lowercase().ends_with("base64")
    {
        let body = body.split('#').next().unwrap_or_default();
        let body = percent_encoding::percent_decode_str(body).decode_utf8();
        return decode_base64(&body.map_err(|error| invalid(error.to_string()))?).map_err(invalid);
    }
    let parsed = data_url::DataUrl::process(url).map_err(|error| invalid(format!("{error:?}")))?;
    let (bytes, _) = parsed.decode_to_vec().map_err(|error| invalid(format!("{error:?}")))?;
    Ok(bytes)
}

/// Whether a text is a `data:` address.
pub fn is_data_url(text: &str) -> bool {
    text.get(..5).is_some_and(|scheme| scheme.eq_ignore_ascii_case("data:"))
}

/// Decodes an image that a text has as base64 or as a `data:` address.
pub fn decode_image_text(text: &str) -> Result<Vec<u8>, String> {
    let text = text.trim();
    if is_data_url(text) { decode_data_url(text) } else { decode_base64(text) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn base64_of_all_writers_is_read() {
        let bytes = [0xFB, 0xEF, 0xFF, 0x01];
        for text in [
            "++//AQ==",
            "--__AQ==",
            "--__AQ",
            "++//\r\nAQ==\n",
            " ++//AQ",
            "data:image/png;base64,++//AQ==",
            "DATA:;BASE64,--__AQ",
            "data:image/png;base64,%2B%2B//AQ%3D%3D",
            "data:image/png;charset=x;base64,++//\nAQ",
            "data:,%FB%EF%FF%01",
        ] {
            assert_eq!(decode_image_text(text).as_deref(), Ok(&bytes[..]), "{text}");
        }
        for text in ["++//A", "a*b=", "data:image/png;base64", "data:;base64,a*b="] {
            assert!(decode_image_text(text).is_err(), "{text}");
        }
    }
}
