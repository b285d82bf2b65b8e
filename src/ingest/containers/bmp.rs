//! Headers of BMPs.

/// Whether a BMP has not the bytes that its header states: its pixels overlap its palette, or without compression,
/// reach beyond the end of the file.
pub fn is_bmp_damaged(bytes: &[u8]) -> bool {
    bmp_contradicts_header(bytes).unwrap_or(false)
}

fn bmp_contradicts_header(bytes: &[u8]) -> Option<bool> {
    let number = |at: usize| Some(u32::from_le_bytes(bytes.get(at..at + 4)?.try_into().ok()?));
    let short = |at: usize| Some(u16::from_le_bytes(bytes.get(at..at + 2)?.try_into().ok()?));
    let (start, header_size) = (u64::from(number(10)?), number(14)?);
    if header_size < 40 {
        return None;
    }
    let (width, height) = (u64::from(number(18)?), u64::from((number(22)? as i32).unsigned_abs()));
    let (bits, compression) = (u64::from(short(28)?), number(30)?);
    let palette_bytes = if bits <= 8 { 4 * u64::from(number(46)?) } else { 0 };
    if start < 14 + u64::from(header_size) + palette_bytes {
        return Some(true);
    }
    // 0: none, 3 and 6: none with masks.
    if !matches!(compression, 0 | 3 | 6) {
        return None;
    }
    let row_bytes = width.checked_mul(bits)?.div_ceil(32) * 4;
    Some(start.checked_add(row_bytes.checked_mul(height)?)? > bytes.len() as u64)
}
