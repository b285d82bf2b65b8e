//! Bodies that hosts and stores send compressed.

use std::io::{self, Read};

use bytes::Bytes;
use flate2::read::{DeflateDecoder, MultiGzDecoder, ZlibDecoder};

/// How a body is compressed, by its `Content-Encoding`.
#[derive(Debug, Clone, Copy)]
pub enum ContentEncoding {
    /// gzip.
    Gzip,
    /// zlib, or without its frame, as some servers send it.
    Deflate,
}

impl ContentEncoding {
    /// Returns the encoding called `name`; `None` for `identity` and unknown ones, with which the decoder finds
    /// no picture.
    pub fn from_name(name: &str) -> Option<Self> {
        match name.trim().to_ascii_lowercase().as_str() {
            "gzip" | "x-gzip" => Some(Self::Gzip),
            "deflate" => Some(Self::Deflate),
            _ => None,
        }
    }

    /// Decompresses a body; `None` if it has more than `limit` bytes then.
    pub fn decompress(self, bytes: &[u8], limit: u64) -> io::Result<Option<Bytes>> {
        let read = |decoder: &mut dyn Read| -> io::Result<Option<Bytes>> {
            let mut content = Vec::new();
            Read::take(decoder, limit + 1).read_to_end(&mut content)?;
            Ok((content.len() as u64 <= limit).then(|| content.into()))
        };
        match self {
            Self::Gzip => read(&mut MultiGzDecoder::new(bytes)),
            Self::Deflate => read(&mut ZlibDecoder::new(bytes))
                .or_else(|_| read(&mut DeflateDecoder::new(bytes))),
        }
    }
}
