//! External sort: writes sorted runs to a temporary folder, then merges them.

use std::cmp::Reverse;
use std::collections::BinaryHeap;
use std::fs::File;
use std::io::{self, BufReader, BufWriter, ErrorKind, Read, Seek, Write};
use std::path::{Path, PathBuf};

use serde::Serialize;

/// Memory of one sort before it writes a run. At most three sorts run at the same time.
pub const SORT_MEMORY_BYTES: usize = 32 << 20;
/// Runs that are merged at the same time: bounds open files and read buffers.
const MAX_RUNS: usize = 128;
/// Size of the read buffer of each run.
const READ_BUFFER_BYTES: usize = 64 << 10;

/// Sorts pairs of key and value, compared byte by byte, the key first.
pub struct ExternalSorter {
    temp_folder: PathBuf,
    memory_limit_bytes: usize,
    /// Keys and values of the run in memory, concatenated.
    arena: Vec<u8>,
    /// Start of each pair in the arena, and the lengths of its key and value.
    pair_positions: Vec<(usize, u32, u32)>,
    /// Sorted runs on disk.
    runs: Vec<File>,
    max_runs: usize,
}

impl ExternalSorter {
    /// Creates a sorter that keeps up to `memory_limit_bytes` in memory. It writes runs to unnamed files in
    /// `folder`, which the system removes when they are closed.
    pub fn new(folder: &Path, memory_limit_bytes: usize) -> Self {
        Self {
            temp_folder: folder.to_owned(),
            memory_limit_bytes,
            arena: Vec::new(),
            pair_positions: Vec::new(),
            runs: Vec::new(),
            max_runs: MAX_RUNS,
        }
    }

    /// Adds a pair.
    pub fn push(&mut self, key: &[u8], value: &[u8]) -> io::Result<()> {
        let too_long = |_| io::Error::new(ErrorKind::InvalidInput, "a value of more than 4 GiB");
        let lengths = (
            u32::try_from(key.len()).map_err(too_long)?,
            u32::try_from(value.len()).map_err(too_long)?,
        );
        self.pair_positions.push((self.arena.len(), lengths.0, lengths.1));
        self.arena.extend_from_slice(key);
        self.arena.extend_from_slice(value);
        if self.arena.len() + self.pair_positions.len() * size_of::<(usize, u32, u32)>()
            >= self.memory_limit_bytes
        {
            self.spill()?;
        }
        Ok(())
    }

    /// Writes the pairs in memory as a run; merges all runs if there are too many.
    fn spill(&mut self) -> io::Result<()> {
        if self.pair_positions.is_empty() {
            return Ok(());
        }
        let arena = &self.arena;
        let key_and_value = |&(start, key, value): &(usize, u32, u32)| {
            let middle = start + key as usize;
            (&arena[start..middle], &arena[middle..middle + value as usize])
        };
        self.pair_positions.sort_unstable_by(|a, b| key_and_value(a).cmp(&key_and_value(b)));
        let mut run = BufWriter::new(tempfile::tempfile_in(&self.temp_folder)?);
        for pair in &self.pair_positions {
            let (key, value) = key_and_value(pair);
            write_pair(&mut run, key, value)?;
        }
        self.runs.push(finish_run(run)?);
        self.arena.clear();
        self.pair_positions.clear();
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

    /// Returns all pairs in order.
    pub fn finish(mut self) -> io::Result<SortedPairs> {
        self.spill()?;
        SortedPairs::from_runs(self.runs)
    }
}

/// Writes a pair: the lengths of key and value as `u32`, then their bytes.
fn write_pair(run: &mut impl Write, key: &[u8], value: &[u8]) -> io::Result<()> {
    run.write_all(&(key.len() as u32).to_le_bytes())?;
    run.write_all(&(value.len() as u32).to_le_bytes())?;
    run.write_all(key)?;
    run.write_all(value)
}

/// Flushes a run and rewinds it for reading.
fn finish_run(run: BufWriter<File>) -> io::Result<File> {
    let mut file = run.into_inner().map_err(io::IntoInnerError::into_error)?;
    file.rewind()?;
    Ok(file)
}

/// A key and its value.
pub type KeyValue = (Vec<u8>, Vec<u8>);

/// Sorted pairs, merged from runs while they are read.
pub struct SortedPairs {
    runs: Vec<BufReader<File>>,
    /// The next pair of each run that is not exhausted, and the index of the run.
    run_heads: BinaryHeap<Reverse<(KeyValue, usize)>>,
}

impl SortedPairs {
    fn from_runs(files: Vec<File>) -> io::Result<Self> {
        let mut runs: Vec<_> = files
            .into_iter()
            .map(|file| BufReader::with_capacity(READ_BUFFER_BYTES, file))
            .collect();
        let mut run_heads = BinaryHeap::with_capacity(runs.len());
        for (index, run) in runs.iter_mut().enumerate() {
            run_heads.extend(read_pair(run)?.map(|pair| Reverse((pair, index))));
        }
        Ok(Self { runs, run_heads })
    }

    /// Returns the key of the next pair; `None` at the end.
    pub fn peek_key(&self) -> Option<&[u8]> {
        self.run_heads.peek().map(|Reverse(((key, _), _))| key.as_slice())
    }

    /// Reads the values of all next pairs whose key is `key`.
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

/// Reads the next pair of a run; `None` at its end.
fn read_pair(run: &mut impl Read) -> io::Result<Option<KeyValue>> {
    let mut length = [0; 4];
    match run.read_exact(&mut length) {
        Ok(()) => {}
        Err(error) if error.kind() == ErrorKind::UnexpectedEof => return Ok(None),
        Err(error) => return Err(error),
    }
    let key_length = u32::from_le_bytes(length) as usize;
    run.read_exact(&mut length)?;
    let value_length = u32::from_le_bytes(length) as usize;
    let (mut key, mut value) = (vec![0; key_length], vec![0; value_length]);
    run.read_exact(&mut key)?;
    run.read_exact(&mut value)?;
    Ok(Some((key, value)))
}

/// Serialises a value for the sort.
pub fn to_json_bytes(value: &impl Serialize) -> Vec<u8> {
    // Fails only for maps whose keys are not text; no sorted value contains one.
    serde_json::to_vec(value).unwrap_or_default()
}

/// Returns the folder for sorting unless another one is given.
pub fn default_temp_folder() -> PathBuf {
    std::env::temp_dir()
}

/// Deserialises a value of [`to_json_bytes`].
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
        for (count, memory_limit, max_runs) in
            [(0, 100, 4), (1, 100, 4), (500, 1 << 20, 4), (500, 300, 4)]
        {
            let mut sorter =
                ExternalSorter { max_runs, ..ExternalSorter::new(folder.path(), memory_limit) };
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
            assert_eq!(sorted, expected, "{count} pairs, {memory_limit} bytes");
        }
        assert_eq!(
            std::fs::read_dir(folder.path()).unwrap().count(),
            0,
            "no file is left in the folder"
        );
    }
}
