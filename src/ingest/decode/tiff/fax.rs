//! Fax compression (ITU-T T.4 and T.6). The tables of codes are those of the crate `fax`, whose own decoders read
//! neither two-dimensional Group 3 nor data without marks at the ends of rows, and let some damage pass.

use fax::BitReader;
use fax::maps::{Mode, black, mode, white};

use super::super::error::ImageDecodeError;

/// How rows are coded.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Coding {
    /// Each row by itself, beginning with a byte.
    Rle,
    /// With a mark at the end of each row.
    G3 { is_two_dimensional: bool },
    /// Each row relative to the one above.
    G4,
}

/// Decodes `rows` rows to one bit per pixel, 1 for black.
pub fn decode(
    data: &[u8],
    coding: Coding,
    width: u32,
    rows: u32,
) -> Result<Vec<u8>, ImageDecodeError> {
    let mut bits = Bits { data, position: 0 };
    let row_bytes = width.div_ceil(8) as usize;
    let mut image = vec![0; row_bytes * rows as usize];
    let (mut above, mut changes) = (Vec::new(), Vec::new());
    for (y, row) in image.chunks_exact_mut(row_bytes).enumerate() {
        changes.clear();
        let decoded = match coding {
            Coding::Rle => {
                let decoded = decode_row_by_runs(&mut bits, width, &mut changes);
                bits.position = bits.position.next_multiple_of(8);
                decoded
            }
            Coding::G3 { is_two_dimensional } => bits.skip_end_of_row().and_then(|()| {
                if is_two_dimensional && bits.read_bit()? == 0 {
                    decode_row_by_changes(&mut bits, width, &above, &mut changes)
                } else {
                    decode_row_by_runs(&mut bits, width, &mut changes)
                }
            }),
            Coding::G4 => decode_row_by_changes(&mut bits, width, &above, &mut changes),
        };
        if decoded.is_none() || bits.position > data.len() * 8 {
            return Err(ImageDecodeError::damaged(format!(
                "the fax data of row {y} of a strip is invalid"
            )));
        }
        for run in changes.chunks(2) {
            fill_black(row, run[0], run.get(1).copied().unwrap_or(width).min(width));
        }
        std::mem::swap(&mut above, &mut changes);
    }
    Ok(image)
}

/// Decodes a row of alternating runs of white and black. Returns `None` if it is invalid.
fn decode_row_by_runs(bits: &mut Bits<'_>, width: u32, changes: &mut Vec<u32>) -> Option<()> {
    let (mut at, mut is_black) = (0, false);
    while at < width {
        at = at.checked_add(bits.read_run(is_black)?).filter(|at| *at <= width)?;
        changes.push(at);
        is_black = !is_black;
    }
    Some(())
}

/// Decodes a row relative to the changes of colour in the row above. Returns `None` if it is invalid.
fn decode_row_by_changes(
    bits: &mut Bits<'_>,
    width: u32,
    above: &[u32],
    changes: &mut Vec<u32>,
) -> Option<()> {
    // `None`: before the first pixel, where a change at 0 still counts.
    let mut at: Option<u32> = None;
    let mut is_black = false;
    let mut index = 0;
    while at.unwrap_or(0) < width {
        let is_right_of = |change: u32| at.is_none_or(|at| change > at);
        while index > 0 && is_right_of(above[index - 1]) {
            index -= 1;
        }
        while index < above.len() && (!is_right_of(above[index]) || (index % 2 == 1) != is_black) {
            index += 1;
        }
        let change = |i: usize| above.get(i).copied().unwrap_or(width);
        let start = at.unwrap_or(0);
        match mode::decode(bits)? {
            Mode::Pass => at = Some(change(index + 1)),
            Mode::Vertical(delta) => {
                let to = change(index).checked_add_signed(delta.into())?;
                if to < start || to > width {
                    return None;
                }
                changes.push(to);
                at = Some(to);
                is_black = !is_black;
            }
            Mode::Horizontal => {
                let first = start.checked_add(bits.read_run(is_black)?)?;
                let second = first.checked_add(bits.read_run(!is_black)?)?;
                if second > width {
                    return None;
                }
                changes.extend([first, second]);
                at = Some(second);
            }
            Mode::Extension | Mode::EOF => return None,
        }
    }
    Some(())
}

fn fill_black(row: &mut [u8], from: u32, to: u32) {
    for x in from..to {
        row[(x / 8) as usize] |= 0x80 >> (x % 8);
    }
}

/// Bits, the most significant of each byte first; zeros follow the last.
struct Bits<'a> {
    data: &'a [u8],
    position: usize,
}

impl Bits<'_> {
    fn read_bit(&mut self) -> Option<u16> {
        let bit = self.peek(1);
        self.consume(1).ok()?;
        bit
    }

    /// Reads the length of a run: any number of codes for multiples of 64, and one for the rest.
    fn read_run(&mut self, is_black: bool) -> Option<u32> {
        let mut run = 0u32;
        loop {
            let part = if is_black { black::decode(self)? } else { white::decode(self)? };
            run = run.checked_add(part.into())?;
            if part < 64 {
                return Some(run);
            }
        }
    }

    /// Skips fill bits and the mark at the end of a row, if there is one.
    fn skip_end_of_row(&mut self) -> Option<()> {
        if self.peek(11)? != 0 {
            return Some(());
        }
        while self.position < self.data.len() * 8 {
            if self.read_bit()? == 1 {
                return Some(());
            }
        }
        None
    }
}

impl BitReader for Bits<'_> {
    type Error = ();

    fn peek(&self, bits: u8) -> Option<u16> {
        if bits > 16 {
            return None;
        }
        let at = self.position / 8;
        let byte = |i: usize| u32::from(self.data.get(at + i).copied().unwrap_or(0));
        let window = (byte(0) << 16) | (byte(1) << 8) | byte(2);
        let shift = 24 - self.position % 8 - usize::from(bits);
        Some(((window >> shift) & ((1 << bits) - 1)) as u16)
    }

    fn consume(&mut self, bits: u8) -> Result<(), ()> {
        self.position += usize::from(bits);
        if self.position > self.data.len() * 8 + 16 { Err(()) } else { Ok(()) }
    }

    fn bits_to_byte_boundary(&self) -> u8 {
        (self.position.next_multiple_of(8) - self.position) as u8
    }
}
