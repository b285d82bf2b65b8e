//! How long decoding one image may take.

use std::io::{self, BufRead, Cursor, Read, Seek, SeekFrom};
use std::time::{Duration, Instant};

use super::error::ImageDecodeError;

/// Bytes that a decoder gets between two looks at the clock. What one piece decompresses to is bounded: by some
/// thousand times its size.
const PIECE_BYTES: usize = 64 << 10;

/// When decoding an image must have ended. Decoders look at it between strips, tiles, frames and pieces of their input.
#[derive(Debug, Clone, Copy)]
pub struct Deadline {
    started: Instant,
    timeout_ms: u64,
}

impl Deadline {
    /// Starts the clock.
    pub fn start(timeout_ms: u64) -> Self {
        Self { started: Instant::now(), timeout_ms }
    }

    /// Fails if decoding must have ended.
    pub fn check(&self) -> Result<(), ImageDecodeError> {
        if self.started.elapsed() < Duration::from_millis(self.timeout_ms) {
            Ok(())
        } else {
            Err(ImageDecodeError::TimedOut { timeout_ms: self.timeout_ms })
        }
    }
}

/// Bytes that can be read until the deadline.
pub struct TimedReader<'a> {
    bytes: Cursor<&'a [u8]>,
    deadline: Deadline,
    /// Up to which position nobody looks at the clock: some decoders read a few bytes at a time.
    unchecked_until: u64,
}

impl<'a> TimedReader<'a> {
    pub fn new(bytes: &'a [u8], deadline: Deadline) -> Self {
        Self { bytes: Cursor::new(bytes), deadline, unchecked_until: 0 }
    }

    fn check(&mut self) -> io::Result<()> {
        if self.bytes.position() >= self.unchecked_until {
            let check = self.deadline.check();
            check.map_err(|error| io::Error::new(io::ErrorKind::TimedOut, error))?;
            self.unchecked_until = self.bytes.position() + PIECE_BYTES as u64;
        }
        Ok(())
    }
}

impl Read for TimedReader<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        self.check()?;
        self.bytes.read(buffer)
    }
}

impl BufRead for TimedReader<'_> {
    fn fill_buf(&mut self) -> io::Result<&[u8]> {
        self.check()?;
        let rest = self.bytes.fill_buf()?;
        Ok(&rest[..rest.len().min(PIECE_BYTES)])
    }

    fn consume(&mut self, amount: usize) {
        self.bytes.consume(amount);
    }
}

impl Seek for TimedReader<'_> {
    fn seek(&mut self, position: SeekFrom) -> io::Result<u64> {
        self.unchecked_until = 0;
        self.bytes.seek(position)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reading_ends_at_the_deadline() {
        let bytes = vec![0; 3 * PIECE_BYTES];
        let mut reader = TimedReader::new(&bytes, Deadline::start(60_000));
        let mut read = Vec::new();
        assert_eq!(reader.read_to_end(&mut read).unwrap(), bytes.len());
        reader.seek(SeekFrom::Start(0)).unwrap();
        assert_eq!(reader.fill_buf().unwrap().len(), PIECE_BYTES);
        // The time is over in the middle of a piece.
        reader.deadline.timeout_ms = 0;
        reader.consume(1);
        assert_eq!(reader.fill_buf().unwrap().len(), PIECE_BYTES);
        reader.consume(PIECE_BYTES - 1);
        assert_eq!(reader.fill_buf().unwrap_err().kind(), io::ErrorKind::TimedOut);
        assert_eq!(reader.read(&mut [0]).unwrap_err().kind(), io::ErrorKind::TimedOut);
    }
}
