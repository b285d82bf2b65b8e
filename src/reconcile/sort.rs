//! Sorting more than memory holds: runs in a temporary folder, then one merge.

use std::cmp::Reverse;
use std::collections::BinaryHeap;
use std::fs::File;
use std::io::{self, BufReader, BufWriter, ErrorKind, Read, Seek, Write};
use std::path::{Path, PathBuf};

use serde::Serialize;

/// Runs that are merged at one time: bounds open files and read buffers.
const MAX_RUNS: usize = 128;
/// Read buffer of a run.
const READ_BUFFER_BYTES: usize = 64 << 10;

/// Takes pairs of key and value in any order. Pairs compare byte by byte, the key first.
pub struct ExternalSorter {
    temp_folder: PathBuf,
    memory_limit_bytes: usize,
    /// Keys and values of the run that is collected, one after the other.
    arena: Vec<u8>,
    /// Where in the arena each pair begins, and the lengths of its key and value.
    pairs: Vec<(usize, u32, u32)>,
    runs: Vec<File>,
    max_runs: usize,
}

impl ExternalSorter {
    /// Holds `limit` bytes before a run is written to a file in `folder` that has no name and goes
    /// when it is closed.
    pub fn new(folder: &Path, limit: usize) -> Self {
        Self {
            temp_folder: folder.to_owned(),
            memory_limit_bytes: limit,
            arena: Vec::new(),
            pairs: Vec::new(),
            runs: Vec::new(),
            max_runs: MAX_RUNS,
        }
    }

    /// Takes a pair.
    pub fn push(&mut self, key: &[u8], value: &[u8]) -> io::Result<()> {
        let too_long = |_| io::Error::new(ErrorKind::InvalidInput, "a value of more than 4 GiB");
        let lengths = (
            u32::try_from(key.len()).map_err(too_long)?,
            u32::try_from(value.len()).map_err(too_long)?,
        );
        self.pairs.push((self.arena.len(), lengths.0, lengths.1));
        self.arena.extend_from_slice(key);
        self.arena.extend_from_slice(value);
        if self.arena.len() + self.pairs.len() * size_of::<(usize, u32, u32)>()
            >= self.memory_limit_bytes
        {
            self.spill()?;
        }
        Ok(())
    }

    /// Writes what is held as a run.
    fn spill(&mut self) -> io::Result<()> {
        if self.pairs.is_empty() {
            return Ok(());
        }
        let arena = &self.arena;
        let pair = |&(start, key, value): &(usize, u32, u32)| {
            let middle = start + key as usize;
            (&arena[start..middle], &arena[middle..middle + value as usize])
        };
        self.pairs.sort_unstable_by(|a, b| pair(a).cmp(&pair(b)));
        let mut run = BufWriter::new(tempfile::tempfile_in(&self.temp_folder)?);
        for one in &self.pairs {
            let (key, value) = pair(one);
            write_pair(&mut run, key, value)?;
        }
        self.runs.push(finish_run(run)?);
        self.arena.clear();
        self.pairs.clear();
        if self.runs.len() >= self.max_runs {
            let mut merged = BufWriter::new(tempfile::tempfile_in(&self.temp_folder)?);
            for pair in SortedPairs::from_runs(std::mem::take(&mut self.runs))? {
                let (key, value) = pair?;
                write_pair(&mut merged, &key, &value)?;
            }
            self.runs.push(finish_run(merged)?);
        }
        Ok(())
    }

    /// All pairs in order.
    pub fn finish(mut self) -> io::Result<SortedPairs> {
        self.spill()?;
        SortedPairs::from_runs(self.runs)
    }
}

/// Lengths, then the bytes.
fn write_pair(run: &mut impl Write, key: &[u8], value: &[u8]) -> io::Result<()> {
    run.write_all(&(key.len() as u32).to_le_bytes())?;
    run.write_all(&(value.len() as u32).to_le_bytes())?;
    run.write_all(key)?;
    run.write_all(value)
}

fn finish_run(run: BufWriter<File>) -> io::Result<File> {
    let mut file = run.into_inner().map_err(io::IntoInnerError::into_error)?;
    file.rewind()?;
    Ok(file)
}

/// A pair of key and value.
pub type KeyValue = (Vec<u8>, Vec<u8>);

/// Pairs in order.
pub struct SortedPairs {
    runs: Vec<BufReader<File>>,
    run_heads: BinaryHeap<Reverse<(KeyValue, usize)>>,
}

impl SortedPairs {
    fn from_runs(files: Vec<File>) -> io::Result<Self> {
        let mut runs: Vec<_> = files
            .into_iter()
            .map(|file| BufReader::with_capacity(READ_BUFFER_BYTES, file))
            .collect();
        let mut heads = BinaryHeap::with_capacity(runs.len());
        for (index, run) in runs.iter_mut().enumerate() {
            heads.extend(read_pair(run)?.map(|pair| Reverse((pair, index))));
        }
        Ok(Self { runs, run_heads: heads })
    }

    /// The key of the next pair.
    pub fn peek_key(&self) -> Option<&[u8]> {
        self.run_heads.peek().map(|Reverse(((key, _), _))| key.as_slice())
    }

    /// The values of `key`, where the next pairs are its own.
    pub fn next_values(&mut self, key: &[u8]) -> io::Result<Vec<Vec<u8>>> {
        let mut values = Vec::new();
        while self.peek_key() == Some(key) {
            values.extend(self.next().transpose()?.map(|(_, value)| value));
        }
        Ok(values)
    }
}

impl Iterator for SortedPairs {
    type Item = io::Result<KeyValue>;

    fn next(&mut self) -> Option<Self::Item> {
        let Reverse((pair, index)) = self.run_heads.pop()?;
        match read_pair(&mut self.runs[index]) {
            Ok(next) => self.run_heads.extend(next.map(|next| Reverse((next, index)))),
            Err(error) => return Some(Err(error)),
        }
        Some(Ok(pair))
    }
}

/// The next pair of a run; none at its end.
fn read_pair(run: &mut impl Read) -> io::Result<Option<KeyValue>> {
    let mut length = [0; 4];
    match run.read_exact(&mut length) {
        Ok(()) => {}
        Err(error) if error.kind() == ErrorKind::UnexpectedEof => return Ok(None),
        Err(error) => return Err(error),
    }
    let key = u32::from_le_bytes(length) as usize;
    run.read_exact(&mut length)?;
    let (mut key, mut value) = (vec![0; key], vec![0; u32::from_le_bytes(length) as usize]);
    run.read_exact(&mut key)?;
    run.read_exact(&mut value)?;
    Ok(Some((key, value)))
}

/// A value of the sort.
pub fn to_json_bytes(value: &impl Serialize) -> Vec<u8> {
    // Only maps with keys that are not text fail, and nothing here has any.
    serde_json::to_vec(value).unwrap_or_default()
}

/// Reads what [`json`] wrote.
pub fn from_json_bytes<T: serde::de::DeserializeOwned>(value: &[u8]) -> io::Result<T> {
    serde_json::from_slice(value).map_err(io::Error::from)
}

#[cfg(test)]
mod tests {
    use rand::RngExt as _;

    use super::*;

    #[test]
    fn any_number_of_runs_is_merged_in_order() {
        let folder = tempfile::tempdir().unwrap();
        let mut rng = rand::rng();
        for (count, limit, max_runs) in [(0, 100, 4), (1, 100, 4), (500, 1 << 20, 4), (500, 300, 4)]
        {
            let mut sorter =
                ExternalSorter { max_runs, ..ExternalSorter::new(folder.path(), limit) };
            let mut expected = Vec::new();
            for i in 0..count {
                let key = format!("k{}", rng.random_range(0..200));
                let value = i.to_string();
                sorter.push(key.as_bytes(), value.as_bytes()).unwrap();
                expected.push((key.into_bytes(), value.into_bytes()));
            }
            expected.sort();
            assert!(sorter.runs.len() < max_runs);
            let sorted: Vec<KeyValue> = sorter.finish().unwrap().map(Result::unwrap).collect();
            assert_eq!(sorted, expected, "{count} pairs, {limit} bytes");
        }
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 0, "nothing is left behind");
    }
}
