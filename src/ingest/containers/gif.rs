//! Blocks of GIFs.

/// Returns where the first frame of a GIF ends, from the left and from the top.
pub fn gif_frame_end(bytes: &[u8]) -> Option<(u16, u16)> {
    let table_bytes = |flags: u8| if flags & 0x80 == 0 { 0 } else { 3 << ((flags & 7) + 1) };
    let mut at = 13 + table_bytes(*bytes.get(10)?);
    loop {
        match bytes.get(at)? {
            // An extension: its kind, then blocks of a stated size up to an empty one.
            0x21 => {
                at += 2;
                while let size @ 1.. = usize::from(*bytes.get(at)?) {
                    at += size + 1;
                }
                at += 1;
            }
            0x2C => {
                let number = |i: usize| {
                    Some(u16::from_le_bytes([*bytes.get(at + i)?, *bytes.get(at + i + 1)?]))
                };
                let (left, top, width, height) = (number(1)?, number(3)?, number(5)?, number(7)?);
                return Some((left.checked_add(width)?, top.checked_add(height)?));
            }
            _ => return None,
        }
    }
}
