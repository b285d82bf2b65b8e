//! Reads which images are right answers to which queries.

use crate::record::arrays::ArrayError;

/// The header of a file of pairs.
const HEADER: [&str; 2] = ["query", "image"];

/// Parses CSV with the header `query,image` and zero-based row numbers. Returns the right images of each
/// of the queries, ascending. `name` is the file, for errors.
pub fn parse_pairs(
    text: &str,
    name: &str,
    queries: usize,
    images: usize,
) -> Result<Vec<Vec<u32>>, ArrayError> {
    let refuse = |reason: String| ArrayError::new(name, reason);
    // The reader counts a line that ends in both characters late.
    let text = text.replace("\r\n", "\n");
    let mut reader = csv::ReaderBuilder::new().flexible(true).from_reader(text.as_bytes());
    let header = reader.headers().map_err(|error| refuse(error.to_string()))?;
    if header.iter().map(str::trim).ne(HEADER) {
        let found: Vec<&str> = header.iter().collect();
        return Err(refuse(format!("line 1: has the header {found:?}; give query,image")));
    }
    let mut right = vec![Vec::new(); queries];
    let mut count = 0usize;
    for record in reader.records() {
        let record = record.map_err(|error| refuse(error.to_string()))?;
        let line = record.position().map_or(0, csv::Position::line);
        let at_line = |reason: String| refuse(format!("line {line}: {reason}"));
        if record.len() != HEADER.len() {
            return Err(at_line(format!("has {} fields, not 2", record.len())));
        }
        let number = |field: usize, rows: usize| {
            let value = record[field].trim();
            let row = value
                .parse::<usize>()
                .map_err(|_| at_line(format!("{} {value:?} is not a row number", HEADER[field])))?;
            if row >= rows {
                let (name, last) = (HEADER[field], rows.saturating_sub(1));
                return Err(at_line(format!("{name} {row} is not from 0 to {last}")));
            }
            Ok(row)
        };
        let (query, image) = (number(0, queries)?, number(1, images)?);
        right[query].push((image as u32, line));
        count += 1;
    }
    if count == 0 {
        return Err(refuse("has no pairs; nothing can be measured".into()));
    }
    let mut sorted = Vec::with_capacity(queries);
    for (query, mut pairs) in right.into_iter().enumerate() {
        pairs.sort_unstable();
        if let Some(pair) = pairs.windows(2).find(|pair| pair[0].0 == pair[1].0) {
            let ((image, first), (_, second)) = (pair[0], pair[1]);
            let reason =
                format!("line {second}: query {query} and image {image} are on line {first} too");
            return Err(refuse(reason));
        }
        sorted.push(pairs.into_iter().map(|(image, _)| image).collect());
    }
    Ok(sorted)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pairs_are_grouped_by_query() {
        let pairs = parse_pairs("query,image\n1,4\n0,2\n1, 0\n", "p", 3, 5).unwrap();
        assert_eq!(pairs, [vec![2], vec![0, 4], vec![]]);
    }

    #[test]
    fn a_wrong_pair_is_refused_by_line_and_value() {
        for (text, reason) in [
            ("", "line 1: has the header []"),
            ("image,query\n0,0\n", "give query,image"),
            ("query,image\n", "has no pairs"),
            ("query,image\n0,1\n3,0\n", "line 3: query 3 is not from 0 to 2"),
            ("query,image\n0,5\n", "line 2: image 5 is not from 0 to 4"),
            ("query,image\n-1,0\n", "line 2: query \"-1\" is not a row number"),
            ("query,image\n0,1.0\n", "line 2: image \"1.0\" is not a row number"),
            ("query,image\r\n0,1\r\n0,9\r\n", "line 3: image 9"),
            ("query,image\n0\n", "line 2: has 1 fields"),
            ("query,image\n0,1,2\n", "line 2: has 3 fields"),
            ("query,image\n0,1\n1,1\n0,1\n", "line 4: query 0 and image 1 are on line 2 too"),
        ] {
            let error = parse_pairs(text, "p.csv", 3, 5).unwrap_err().to_string();
            assert!(error.starts_with("p.csv: ") && error.contains(reason), "{error}");
        }
    }
}
