//! Dates and times of pictures, as precise as the file has them.

use std::fmt::Write as _;

use chrono::{DateTime, FixedOffset, NaiveDate, NaiveDateTime, Utc};

/// A date whose month, day, time and zone may be unknown.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PhotoDate {
    year: i32,
    month: Option<u32>,
    day: Option<u32>,
    /// Hour, minute and, if known, seconds with their fraction, as text such as `12:30:05.25`.
    time: Option<String>,
    /// Difference to UTC in minutes.
    offset_minutes: Option<i32>,
}

impl PhotoDate {
    /// Reads the form of XMP, a part of ISO 8601 (`2024`, `2024-05`, `2024-05-01T12:30+02:00`), and
    /// that of EXIF (`2024:05:01 12:30:45`). Returns `None` if it is not a date.
    pub fn parse(text: &str) -> Option<Self> {
        let text = text.trim_matches(|c: char| c.is_whitespace() || c == '\0');
        let (date, time) = match text.split_once(['T', ' ']) {
            Some((date, time)) => (date, Some(time.trim())),
            None => (text, None),
        };
        let mut parts = date.split(['-', ':']);
        let year = parse_digits(parts.next()?, 4)? as i32;
        let month = parse_part(parts.next(), 1..=12).ok()?;
        let day = parse_part(parts.next(), 1..=31).ok()?;
        if parts.next().is_some() || year == 0 || (month.is_none() && day.is_some()) {
            return None;
        }
        if let (Some(month), Some(day)) = (month, day) {
            NaiveDate::from_ymd_opt(year, month, day)?;
        }
        let (time, offset_minutes) = match time {
            Some(time) if day.is_some() && !time.is_empty() => parse_time(time),
            _ => (None, None),
        };
        Some(Self { year, month, day, time, offset_minutes })
    }

    /// Reads the three parts that EXIF has: date and time, fraction of the second, and zone.
    pub fn from_exif(date_time: &str, fraction: Option<&str>, zone: Option<&str>) -> Option<Self> {
        let mut date = Self::parse(date_time)?;
        let fraction = fraction.map(str::trim).filter(|digits| is_digits(digits));
        if let (Some(time), Some(fraction)) = (&mut date.time, fraction)
            && time.len() == "00:00:00".len()
        {
            let _ = write!(time, ".{fraction}"); // Writing to a string cannot fail.
        }
        if date.time.is_some() {
            date.offset_minutes = zone.and_then(|zone| parse_offset(zone.trim()));
        }
        Some(date)
    }

    /// Reads the two parts that IPTC has: `20240501` and `123045+0200`. Zeros mark unknown parts.
    pub fn from_iptc(date: &str, time: Option<&str>) -> Option<Self> {
        let date: String = date.chars().filter(char::is_ascii_digit).collect();
        if date.len() != 8 {
            return None;
        }
        let mut text = date[..4].to_owned();
        for part in [&date[4..6], &date[6..]].into_iter().take_while(|part| **part != *"00") {
            let _ = write!(text, "-{part}"); // Writing to a string cannot fail.
        }
        let mut parsed = Self::parse(&text)?;
        let time = time.map(|time| time.replace(':', ""));
        if let Some(time) = time.filter(|time| parsed.day.is_some() && time.is_ascii()) {
            let (clock, zone) = time.split_at(time.find(['+', '-']).unwrap_or(time.len()));
            if clock.len() == 6 && is_digits(clock) {
                let clock = format!("{}:{}:{}", &clock[..2], &clock[2..4], &clock[4..]);
                (parsed.time, parsed.offset_minutes) = parse_time(&format!("{clock}{zone}"));
            }
        }
        Some(parsed)
    }

    /// Returns the date as ISO 8601 writes it, with the parts that are known.
    pub fn to_iso(&self) -> String {
        let mut text = format!("{:04}", self.year);
        // Writing to a string cannot fail.
        for part in [self.month, self.day].into_iter().flatten() {
            let _ = write!(text, "-{part:02}");
        }
        if let Some(time) = &self.time {
            let _ = write!(text, "T{time}");
            match self.offset_minutes {
                Some(0) => text.push('Z'),
                Some(minutes) => {
                    let sign = if minutes < 0 { '-' } else { '+' };
                    let minutes = minutes.abs();
                    let _ = write!(text, "{sign}{:02}:{:02}", minutes / 60, minutes % 60);
                }
                None => {}
            }
        }
        text
    }

    /// Returns the earliest time that the date can be, in UTC if its zone is not known.
    pub fn to_earliest_time(&self) -> Option<DateTime<Utc>> {
        let date =
            NaiveDate::from_ymd_opt(self.year, self.month.unwrap_or(1), self.day.unwrap_or(1))?;
        let time = self.time.as_deref().unwrap_or("00:00:00");
        let format = if time.len() == "00:00".len() { "%F %H:%M" } else { "%F %H:%M:%S%.f" };
        let local = NaiveDateTime::parse_from_str(&format!("{date} {time}"), format).ok()?;
        let zone = FixedOffset::east_opt(self.offset_minutes.unwrap_or(0) * 60)?;
        Some(local.and_local_timezone(zone).single()?.to_utc())
    }
}

/// A month or a day that does not exist.
struct OutOfRange;

/// Reads a month or a day; `None` if it is missing, blank or zero.
fn parse_part(
    text: Option<&str>,
    range: std::ops::RangeInclusive<u32>,
) -> Result<Option<u32>, OutOfRange> {
    let Some(text) = text.map(str::trim).filter(|text| !text.is_empty() && *text != "00") else {
        return Ok(None);
    };
    let number = parse_digits(text, 2).filter(|number| range.contains(number));
    number.map(Some).ok_or(OutOfRange)
}

/// Reads `12:30`, `12:30:45` or `12:30:45.678`, with or without a zone. What is invalid is unknown.
fn parse_time(text: &str) -> (Option<String>, Option<i32>) {
    let (clock, zone) = text.split_at(text.find(['Z', '+', '-']).unwrap_or(text.len()));
    let clock = clock.trim();
    let mut parts = clock.split(':');
    let is_below = |part: Option<&str>, end: u32| {
        part.and_then(|part| parse_digits(part, 2)).is_some_and(|number| number < end)
    };
    let is_hour_and_minute = is_below(parts.next(), 24) && is_below(parts.next(), 60);
    let is_second = match parts.next() {
        None => true,
        Some(second) => match second.split_once('.') {
            None => is_below(Some(second), 60),
            Some((whole, fraction)) => is_below(Some(whole), 60) && is_digits(fraction),
        },
    };
    if !is_hour_and_minute || !is_second || parts.next().is_some() {
        return (None, None);
    }
    (Some(clock.to_owned()), parse_offset(zone.trim()))
}

/// Reads `Z`, `+02:00`, `-0530` or `+2`, in minutes.
fn parse_offset(zone: &str) -> Option<i32> {
    if zone == "Z" {
        return Some(0);
    }
    let sign = match zone.chars().next()? {
        '+' => 1,
        '-' => -1,
        _ => return None,
    };
    let digits: String = zone[1..].chars().filter(|c| *c != ':').collect();
    if !is_digits(&digits) || digits.len() > 4 {
        return None;
    }
    let (hours, minutes) = digits.split_at(digits.len().min(2));
    let minutes: i32 = hours.parse::<i32>().ok()? * 60 + minutes.parse::<i32>().unwrap_or(0);
    (minutes <= 14 * 60).then_some(sign * minutes)
}

fn parse_digits(text: &str, max_length: usize) -> Option<u32> {
    (is_digits(text) && text.len() <= max_length).then(|| text.parse().ok())?
}

/// Whether a text is 1 to 9 decimal digits.
fn is_digits(text: &str) -> bool {
    (1..=9).contains(&text.len()) && text.bytes().all(|b| b.is_ascii_digit())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dates_are_as_precise_as_they_are_written() {
        for (text, iso, time) in [
            ("1998", "1998", "1998-01-01T00:00:00Z"),
            ("1998-07", "1998-07", "1998-07-01T00:00:00Z"),
            ("1998-07-09", "1998-07-09", "1998-07-09T00:00:00Z"),
            ("1998:07:09", "1998-07-09", "1998-07-09T00:00:00Z"),
            ("1998:07:09 08:05:07", "1998-07-09T08:05:07", "1998-07-09T08:05:07Z"),
            ("1998-07-09T08:05+02:00", "1998-07-09T08:05+02:00", "1998-07-09T06:05:00Z"),
            (
                "1998-07-09T08:05:07.25-0530",
                "1998-07-09T08:05:07.25-05:30",
                "1998-07-09T13:35:07.250Z",
            ),
            ("1998-07-09T08:05:07Z", "1998-07-09T08:05:07Z", "1998-07-09T08:05:07Z"),
            ("1998-07-09T99:00:00", "1998-07-09", "1998-07-09T00:00:00Z"),
            ("1998:00:00 00:00:00", "1998", "1998-01-01T00:00:00Z"),
            ("1998:07:  ", "1998-07", "1998-07-01T00:00:00Z"),
        ] {
            let date = PhotoDate::parse(text).unwrap();
            assert_eq!(date.to_iso(), iso, "{text}");
            let expected: DateTime<Utc> = time.parse().unwrap();
            assert_eq!(date.to_earliest_time(), Some(expected), "{text}");
        }
        for text in [
            "",
            "    :  :     :  :  ",
            "0000:00:00 00:00:00",
            "yesterday",
            "1998-13-01",
            "1998-02-30",
            "1998-07-09-1",
            "9.7.1998",
            "１９９８",
        ] {
            assert_eq!(PhotoDate::parse(text), None, "{text}");
        }
    }

    #[test]
    fn the_parts_of_exif_and_iptc_are_joined() {
        let exif = |fraction, zone| {
            PhotoDate::from_exif("2024:05:01 12:30:45", fraction, zone).unwrap().to_iso()
        };
        assert_eq!(exif(Some("25"), Some("+02:00")), "2024-05-01T12:30:45.25+02:00");
        assert_eq!(exif(Some("  "), Some("   :  ")), "2024-05-01T12:30:45");
        let iptc = |date, time| PhotoDate::from_iptc(date, time).map(|date| date.to_iso());
        assert_eq!(iptc("20240501", Some("123045+0200")).unwrap(), "2024-05-01T12:30:45+02:00");
        assert_eq!(iptc("20240501", Some("12:30:45+02:00")).unwrap(), "2024-05-01T12:30:45+02:00");
        assert_eq!(iptc("20240501", None).unwrap(), "2024-05-01");
        assert_eq!(iptc("19980000", Some("123045")).unwrap(), "1998");
        assert_eq!(iptc("19980700", None).unwrap(), "1998-07");
        assert_eq!(iptc("20240501", Some("noon")).unwrap(), "2024-05-01");
        assert_eq!(iptc("1 May", None), None);
    }
}
