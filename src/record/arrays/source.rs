//! Finds and reads an array that an argument names.

use std::fs::File;
use std::io::{BufReader, Read};
use std::path::{Path, PathBuf};

use flate2::CrcReader;
use flate2::read::DeflateDecoder;
use zip::{CompressionMethod, ZipArchive};

use super::embeddings::{EmbeddingArray, MAX_VALUES, Values};
use super::error::ArrayError;
use super::npy::NpyHeader;
use super::parquet::{list_names, read_embeddings, read_texts};

/// Largest number of files of one folder.
const MAX_FILES: usize = 100_000;

/// What the rows of an array embed, which decides what is read from a folder.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ArrayRole {
    /// Pictures.
    Images,
    /// Queries or prompts.
    Texts,
}

impl ArrayRole {
    /// Returns the subfolder and the column of the metadata in which clip-retrieval keeps them.
    fn clip_retrieval_names(self) -> (&'static str, &'static str) {
        match self {
            Self::Images => ("img_emb", "image_path"),
            Self::Texts => ("text_emb", "caption"),
        }
    }
}

/// Reads an array: `FILE.npy`, `FILE.npz:NAME`, `FILE.parquet:COLUMN`, or a folder that clip-retrieval
/// wrote. A name or column can be left out if there is only one. Every row must hold an embedding.
pub fn read_array(text: &str, role: ArrayRole) -> Result<EmbeddingArray, ArrayError> {
    read_array_with_faults(text, role)?.require_sound()
}

/// Reads an array as [`read_array`] does. Rows may hold no embedding: [`EmbeddingArray::faults`] has them.
pub fn read_array_with_faults(text: &str, role: ArrayRole) -> Result<EmbeddingArray, ArrayError> {
    if Path::new(text).is_dir() {
        return read_clip_retrieval_folder(text, role);
    }
    let (path, member) = split_member(text);
    let extension = path.extension().and_then(|extension| extension.to_str()).unwrap_or_default();
    match extension.to_ascii_lowercase().as_str() {
        "npy" => {
            let (values, shape) =
                read_npy(&path).map_err(|reason| ArrayError::new(text, reason))?;
            EmbeddingArray::with_faults(text, values, shape, Vec::new())
        }
        "npz" => {
            let (values, shape) =
                read_npz(&path, member).map_err(|reason| ArrayError::new(text, reason))?;
            EmbeddingArray::with_faults(text, values, shape, Vec::new())
        }
        "parquet" => read_embeddings(text, &path, member),
        _ => Err(ArrayError::new(
            text,
            "is neither a folder nor FILE.npy, FILE.npz:NAME or FILE.parquet:COLUMN",
        )),
    }
}

/// Splits `FILE.npz:NAME`, `FILE.parquet:COLUMN`, `FILE.csv:COLUMN` and `FILE.tsv:COLUMN`; a file that has such a
/// name is taken as it is.
pub fn split_member(text: &str) -> (PathBuf, Option<&str>) {
    let separator = [".npz:", ".parquet:", ".csv:", ".tsv:"].into_iter().find_map(|separator| {
        let at = text.to_ascii_lowercase().rfind(separator)?;
        Some(at + separator.len() - 1)
    });
    match separator {
        Some(colon) if !Path::new(text).exists() => {
            (PathBuf::from(&text[..colon]), Some(&text[colon + 1..]))
        }
        _ => (PathBuf::from(text), None),
    }
}

/// Values and shape of an array.
type Contents = (Values, [usize; 2]);

fn read_npy(path: &Path) -> Result<Contents, String> {
    let file = File::open(path).map_err(|error| error.to_string())?;
    let size = file.metadata().map_err(|error| error.to_string())?.len();
    read_npy_contents(&mut BufReader::new(file), size)
}

/// Reads an array from a reader that has `size` bytes in all.
fn read_npy_contents(reader: &mut impl Read, size: u64) -> Result<Contents, String> {
    let header = NpyHeader::read(reader)?;
    let [rows, dimension] = header.shape;
    if rows.checked_mul(dimension).is_none_or(|values| values > MAX_VALUES) {
        return Err(format!(
            "has {rows} × {dimension} values, more than {MAX_VALUES}; take a sample of the rows"
        ));
    }
    // Memory is reserved only for values that are there.
    if header.data_bytes().is_none_or(|bytes| bytes as u64 > size) {
        return Err(format!("has {size} bytes, too few for {rows} × {dimension} values"));
    }
    Ok((header.read_values(reader)?, header.shape))
}

fn read_npz(path: &Path, name: Option<&str>) -> Result<Contents, String> {
    let file = File::open(path).map_err(|error| error.to_string())?;
    let invalid = |error: zip::result::ZipError| format!("cannot be read as .npz: {error}");
    let mut archive = ZipArchive::new(BufReader::new(file)).map_err(invalid)?;
    let members: Vec<String> = archive
        .file_names()
        .filter_map(Result::ok)
        .filter_map(|member| member.strip_suffix(".npy").map(str::to_owned))
        .collect();
    let members: Vec<&str> = members.iter().map(String::as_str).collect();
    let name = match (name, members.as_slice()) {
        (Some(name), _) if members.contains(&name) => name,
        (None, [only]) => only,
        _ => {
            return Err(format!(
                "name one of its arrays as FILE.npz:NAME; it has {}",
                list_names(&members)
            ));
        }
    };
    let index = archive
        .index_for_name(&format!("{name}.npy"))
        .ok_or_else(|| format!("has no array {name:?}"))?;
    // The archive only finds the bytes: it is built without the methods of compression.
    let entry = archive.by_index_raw(index).map_err(invalid)?;
    let (method, size, checksum) = (entry.compression(), entry.size(), entry.crc32());
    let decompressed: Box<dyn Read + '_> = match method {
        CompressionMethod::STORE => Box::new(entry),
        CompressionMethod::DEFLATE => Box::new(DeflateDecoder::new(entry)),
        other => {
            return Err(format!(
                "is compressed by {other}; write it with numpy.savez or numpy.savez_compressed"
            ));
        }
    };
    let mut reader = CrcReader::new(BufReader::new(decompressed));
    let contents = read_npy_contents(&mut reader, size)?;
    if reader.crc().sum() != checksum {
        return Err("its checksum is wrong: the file is damaged".into());
    }
    Ok(contents)
}

/// Reads `img_emb/*.npy` or `text_emb/*.npy` in the order of their numbers, with paths or captions from
/// `metadata/*.parquet` if they are there.
fn read_clip_retrieval_folder(text: &str, role: ArrayRole) -> Result<EmbeddingArray, ArrayError> {
    let folder = Path::new(text);
    let (subfolder, column) = role.clip_retrieval_names();
    let files = list_numbered_files(&folder.join(subfolder), "npy")?;
    let mut all: Option<Contents> = None;
    for path in &files {
        let name = path.display().to_string();
        let (values, shape) =
            read_npy(path).map_err(|reason| ArrayError::new(name.as_str(), reason))?;
        let Some((known, known_shape)) = &mut all else {
            all = Some((values, shape));
            continue;
        };
        if shape[1] != known_shape[1] {
            let reason = format!("has rows of {} values, but {} before", shape[1], known_shape[1]);
            return Err(ArrayError::new(name, reason));
        }
        if known.len() + values.len() > MAX_VALUES {
            let reason = format!("the folder has more than {MAX_VALUES} values; take a sample");
            return Err(ArrayError::new(name, reason));
        }
        if !known.append(values) {
            let reason = "has another type of values than the files before it";
            return Err(ArrayError::new(name, reason));
        }
        known_shape[0] += shape[0];
    }
    let (values, shape) = all.ok_or_else(|| {
        ArrayError::new(
            folder.join(subfolder).display().to_string(),
            "has no .npy files; give a folder that clip-retrieval wrote",
        )
    })?;
    let array = EmbeddingArray::with_faults(text, values, shape, Vec::new())?;
    match read_metadata(&folder.join("metadata"), column, shape[0])? {
        Some(labels) => Ok(array.with_labels(labels)),
        None => Ok(array),
    }
}

/// Reads one text per row from the metadata; `None` if there is none.
fn read_metadata(
    folder: &Path,
    column: &str,
    rows: usize,
) -> Result<Option<Vec<String>>, ArrayError> {
    if !folder.is_dir() {
        return Ok(None);
    }
    let mut labels = Vec::new();
    for path in list_numbered_files(folder, "parquet")? {
        let Some(texts) = read_texts(&path, column)? else { return Ok(None) };
        labels.extend(texts);
    }
    if labels.is_empty() {
        return Ok(None);
    }
    if labels.len() != rows {
        let reason = format!("has {} rows, but there are {rows} embeddings", labels.len());
        return Err(ArrayError::new(folder.display().to_string(), reason));
    }
    Ok(Some(labels))
}

/// Returns the files of metadata that clip-retrieval wrote next to its embeddings, in their order; none if
/// `text` is not such a folder.
pub fn list_metadata_files(text: &str) -> Result<Vec<PathBuf>, ArrayError> {
    let folder = Path::new(text).join("metadata");
    if folder.is_dir() { list_numbered_files(&folder, "parquet") } else { Ok(Vec::new()) }
}

/// Returns the files of a folder with this extension, ordered by the number at the end of their names.
fn list_numbered_files(folder: &Path, extension: &str) -> Result<Vec<PathBuf>, ArrayError> {
    let refuse = |reason: String| ArrayError::new(folder.display().to_string(), reason);
    let entries = folder.read_dir().map_err(|error| {
        refuse(format!("{error}; give a folder that clip-retrieval wrote, or a file"))
    })?;
    let mut files = Vec::new();
    for entry in entries {
        let path = entry.map_err(|error| refuse(error.to_string()))?.path();
        if path.extension().is_some_and(|found| found == extension) {
            files.push(path);
        }
        if files.len() > MAX_FILES {
            return Err(refuse(format!("has more than {MAX_FILES} files")));
        }
    }
    files.sort_by_cached_key(|path| {
        let stem = path.file_stem().unwrap_or_default().to_string_lossy().into_owned();
        let digits = stem.len() - stem.trim_end_matches(|c: char| c.is_ascii_digit()).len();
        let number = stem[stem.len() - digits..].parse::<u64>().ok();
        (number, stem)
    });
    Ok(files)
}

#[cfg(test)]
mod tests {
    use std::io::Write;
    use std::sync::Arc;

    use deltalake_core::arrow::array::{ArrayRef, RecordBatch, StringArray};
    use deltalake_core::parquet::arrow::ArrowWriter;
    use flate2::write::DeflateEncoder;

    use super::*;

    fn npy(rows: &[[f32; 2]]) -> Vec<u8> {
        let header =
            format!("{{'descr': '<f4', 'fortran_order': False, 'shape': ({}, 2), }}\n", rows.len());
        let mut file = b"\x93NUMPY\x01\x00".to_vec();
        file.extend((header.len() as u16).to_le_bytes());
        file.extend(header.as_bytes());
        file.extend(rows.as_flattened().iter().flat_map(|value| value.to_le_bytes()));
        file
    }

    /// A ZIP file of members that are deflated, as numpy.savez_compressed writes it.
    fn npz(members: &[(&str, Vec<u8>)]) -> Vec<u8> {
        let (mut file, mut directory) = (Vec::new(), Vec::new());
        for (name, contents) in members {
            let mut encoder = DeflateEncoder::new(Vec::new(), flate2::Compression::default());
            encoder.write_all(contents).unwrap();
            let compressed = encoder.finish().unwrap();
            let mut crc = flate2::Crc::new();
            crc.update(contents);
            let offset = file.len() as u32;
            // Version, flags, method 8, time, date, checksum, sizes, length of the name and of extras.
            let mut fields = vec![20, 0, 0, 0, 8, 0, 0, 0, 0x21, 0];
            fields.extend(crc.sum().to_le_bytes());
            fields.extend((compressed.len() as u32).to_le_bytes());
            fields.extend((contents.len() as u32).to_le_bytes());
            fields.extend((name.len() as u16).to_le_bytes());
            fields.extend([0, 0]);
            file.extend(b"PK\x03\x04");
            file.extend(&fields);
            file.extend(name.as_bytes());
            file.extend(&compressed);
            directory.extend(b"PK\x01\x02\x14\x00");
            directory.extend(&fields);
            directory.extend([0; 10]);
            directory.extend(offset.to_le_bytes());
            directory.extend(name.as_bytes());
        }
        let start = file.len() as u32;
        file.extend(&directory);
        file.extend(b"PK\x05\x06\0\0\0\0");
        file.extend((members.len() as u16).to_le_bytes());
        file.extend((members.len() as u16).to_le_bytes());
        file.extend((directory.len() as u32).to_le_bytes());
        file.extend(start.to_le_bytes());
        file.extend([0, 0]);
        file
    }

    fn read(path: &Path, member: &str) -> Result<EmbeddingArray, String> {
        read_array(&format!("{}{member}", path.display()), ArrayRole::Images)
            .map_err(|error| error.to_string())
    }

    #[test]
    fn an_array_of_an_archive_is_named_unless_it_is_the_only_one() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.npz");
        let (images, texts) = (npy(&[[1.0, 0.0], [0.0, 2.0]]), npy(&[[0.5, 0.0]]));
        let archive = npz(&[("images.npy", images), ("texts.npy", texts.clone())]);
        std::fs::write(&path, &archive).unwrap();
        let array = read(&path, ":images").unwrap();
        assert_eq!((array.rows(), array.unit_row(1)), (2, vec![0.0, 1.0]));
        for member in ["", ":captions"] {
            let error = read(&path, member).unwrap_err();
            assert!(error.contains("it has images, texts"), "{error}");
        }
        let mut damaged = archive;
        let at = damaged.windows(4).position(|bytes| bytes == b"PK\x01\x02").unwrap() + 16;
        damaged[at] ^= 1;
        std::fs::write(&path, &damaged).unwrap();
        assert!(read(&path, ":images").unwrap_err().contains("checksum"), "{}", path.display());
        std::fs::write(&path, npz(&[("texts.npy", texts)])).unwrap();
        assert_eq!(read(&path, "").unwrap().rows(), 1);
        std::fs::write(&path, "text").unwrap();
        assert!(read(&path, ":images").unwrap_err().contains(".npz"));
    }

    #[test]
    fn a_header_that_promises_more_than_the_file_has_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.npy");
        let full = npy(&[[1.0, 0.0], [0.0, 2.0]]);
        std::fs::write(&path, &full[..full.len() - 4]).unwrap();
        assert!(read(&path, "").unwrap_err().contains("ends after"));
        let text = String::from_utf8_lossy(&full[10..]).into_owned();
        let header = text.split('\n').next().unwrap().replace("(2, 2)", "(9000000, 99)");
        let mut lying = full[..8].to_vec();
        lying.extend((header.len() as u16).to_le_bytes());
        lying.extend(header.as_bytes());
        std::fs::write(&path, &lying).unwrap();
        let error = read(&path, "").unwrap_err();
        assert!(error.contains("too few for 9000000 × 99"), "{error}");
        let huge = String::from_utf8_lossy(&lying).replace("9000000, 99", "99999999, 99");
        let mut lying = lying[..8].to_vec();
        let header = huge.split_once('{').unwrap().1;
        lying.extend(((header.len() + 1) as u16).to_le_bytes());
        lying.extend(format!("{{{header}").as_bytes());
        std::fs::write(&path, &lying).unwrap();
        assert!(read(&path, "").unwrap_err().contains("take a sample"));
        assert!(read(&folder.path().join("b.npy"), "").unwrap_err().contains("No such file"));
        assert!(read(&folder.path().join("b.csv"), "").unwrap_err().contains("FILE.npy"));
    }

    #[test]
    fn the_folder_of_clip_retrieval_is_read_in_the_order_of_its_numbers() {
        let folder = tempfile::tempdir().unwrap();
        let emb = folder.path().join("img_emb");
        std::fs::create_dir(&emb).unwrap();
        assert!(read(folder.path(), "").unwrap_err().contains("no .npy files"));
        std::fs::write(emb.join("img_emb_10.npy"), npy(&[[0.0, 1.0]])).unwrap();
        std::fs::write(emb.join("img_emb_9.npy"), npy(&[[1.0, 0.0], [3.0, 4.0]])).unwrap();
        let array = read(folder.path(), "").unwrap();
        assert_eq!((array.rows(), array.unit_row(2)), (3, vec![0.0, 1.0]));
        assert_eq!(array.label(0), None);
        let metadata = folder.path().join("metadata");
        std::fs::create_dir(&metadata).unwrap();
        for (number, paths) in [(10, vec!["c"]), (9, vec!["a", "b"])] {
            let column: ArrayRef = Arc::new(StringArray::from(paths));
            let batch = RecordBatch::try_from_iter([("image_path", column)]).unwrap();
            let file = File::create(metadata.join(format!("metadata_{number}.parquet"))).unwrap();
            let mut writer = ArrowWriter::try_new(file, batch.schema(), None).unwrap();
            writer.write(&batch).unwrap();
            writer.close().unwrap();
        }
        let array = read(folder.path(), "").unwrap();
        assert_eq!((array.label(0), array.label(2)), (Some("a"), Some("c")));
        std::fs::write(emb.join("img_emb_11.npy"), npy(&[[1.0, 1.0]])).unwrap();
        assert!(read(folder.path(), "").unwrap_err().contains("3 rows, but there are 4"));
        let texts = read_array(&folder.path().display().to_string(), ArrayRole::Texts);
        assert!(texts.unwrap_err().to_string().contains("text_emb"));
    }
}
