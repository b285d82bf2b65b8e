//! A chunk: an immutable part of a snapshot with rows sorted by id, stored by column.

use std::collections::BTreeMap;
use std::sync::Arc;

use chrono::{DateTime, Utc};
use half::f16;
use half::slice::HalfFloatSliceExt;

use super::quantise::QuantisedVectors;
use crate::balance::statistics::{ScoreStatistics, StatisticsKey};
use crate::record::{
    Attributes, Embedding, ImageId, ImageRow, RowVersion, SequenceKey, StoredImage, to_hex,
};

/// Number of rows of a group, whose bits fill one word of a bitmap.
pub const ROWS_PER_GROUP: usize = 64;
/// Maximum number of rows of a chunk. Larger chunks would be slow to merge; with smaller ones a query
/// would be quantised more often.
pub const MAX_CHUNK_ROWS: usize = 1 << 16;

/// Stands for missing statistics: the row keeps its raw score.
pub const NO_STATISTICS: ScoreStatistics =
    ScoreStatistics { n: 0, mean: 0.0, std: 0.0, min: 0.0, max: 0.0, lse: 0.0, topk_mean: 0.0 };

/// Everything stored about one live image except its embedding.
#[derive(Debug, Clone)]
pub struct ImageMetadata {
    /// Id of the image.
    pub image_id: ImageId,
    /// Version of the row.
    pub version: RowVersion,
    /// When the change happened, if the event said so.
    pub event_time: Option<DateTime<Utc>>,
    /// When the image was embedded.
    pub embedded_at: DateTime<Utc>,
    /// Address that the image was fetched from; `None` if its bytes came in the event.
    pub uri: Option<String>,
    /// SHA-256 of the file in hexadecimal; empty if unknown.
    pub content_hash: String,
    /// Size of the file in bytes.
    pub byte_size: u64,
    /// Width in pixels.
    pub width: u32,
    /// Height in pixels.
    pub height: u32,
    /// Declared attributes with their values.
    pub attributes: Attributes,
}

/// Many short texts in one allocation.
#[derive(Debug, Default)]
pub struct PackedStrings {
    joined: Box<str>,
    end_offsets: Box<[u32]>,
}

impl PackedStrings {
    fn from_texts<'a>(texts: impl Iterator<Item = &'a str>) -> Self {
        let (mut joined, mut end_offsets) = (String::new(), Vec::new());
        for text in texts {
            joined.push_str(text);
            end_offsets.push(joined.len() as u32);
        }
        Self { joined: joined.into(), end_offsets: end_offsets.into() }
    }

    /// Returns the text at index `i`.
    pub fn get(&self, i: usize) -> &str {
        let start = i.checked_sub(1).map_or(0, |before| self.end_offsets[before] as usize);
        &self.joined[start..self.end_offsets[i] as usize]
    }

    /// Returns the number of texts.
    pub fn len(&self) -> usize {
        self.end_offsets.len()
    }

    fn memory_bytes(&self) -> usize {
        self.joined.len() + 4 * self.end_offsets.len()
    }
}

/// The values of one attribute, dictionary-encoded: each different value once, and one index per row.
#[derive(Debug)]
pub struct AttributeColumn {
    /// The different values, sorted.
    pub values: PackedStrings,
    /// Index into `values` of each row; [`AttributeColumn::MISSING`] if it has no value.
    pub value_indices: Box<[u32]>,
}

impl AttributeColumn {
    /// Index of a row without the attribute.
    pub const MISSING: u32 = u32::MAX;
}

/// The stored rows of a chunk. Statistics and later deletions are kept in [`Chunk`].
#[derive(Debug)]
pub struct ChunkData {
    /// Number of rows.
    pub row_count: usize,
    /// Number of values of an embedding.
    pub dimension: usize,
    /// One-byte codes of the embeddings.
    pub quantised: QuantisedVectors,
    /// The embeddings, `dimension` values per row.
    vectors: Box<[f16]>,
    ids: PackedStrings,
    sequences: PackedStrings,
    /// An empty text stands for no address.
    uris: PackedStrings,
    /// Microseconds since 1970; [`ChunkData::UNKNOWN_TIME`] if unknown.
    pub event_times: Box<[i64]>,
    /// Microseconds since 1970.
    pub embedded_at: Box<[i64]>,
    /// SHA-256 of each file; zeros if unknown.
    content_hashes: Box<[[u8; 32]]>,
    /// Bytes of the file, width and height in pixels.
    byte_sizes_and_dimensions: Box<[(u64, u32, u32)]>,
    /// Columns of the attributes that at least one row has.
    pub attribute_columns: BTreeMap<String, AttributeColumn>,
}

impl ChunkData {
    /// Stands for an unknown time.
    pub const UNKNOWN_TIME: i64 = i64::MIN;

    /// Returns the id of a row.
    pub fn id(&self, row: usize) -> &str {
        self.ids.get(row)
    }

    /// Finds the row of an id, live or not.
    pub fn find_row(&self, id: &str) -> Option<usize> {
        let (mut low, mut high) = (0, self.row_count);
        while low < high {
            let middle = usize::midpoint(low, high);
            match self.id(middle).cmp(id) {
                std::cmp::Ordering::Less => low = middle + 1,
                std::cmp::Ordering::Equal => return Some(middle),
                std::cmp::Ordering::Greater => high = middle,
            }
        }
        None
    }

    /// Returns the version of a row.
    pub fn version(&self, row: usize) -> RowVersion {
        RowVersion {
            sequence: SequenceKey::from_stored(self.sequences.get(row)),
            deleted: false,
            embedded_at: time_from_micros(self.embedded_at[row]),
        }
    }

    /// Returns the embedding of a row as it is stored.
    pub fn stored_vector(&self, row: usize) -> &[f16] {
        &self.vectors[row * self.dimension..(row + 1) * self.dimension]
    }

    /// Returns the embedding of a row in f32, as statistics are computed from it.
    pub fn embedding(&self, row: usize) -> Embedding {
        Embedding::from_stored(&self.stored_vector(row).to_f32_vec())
    }

    /// Returns the metadata of a row; `None` if its stored id is not valid.
    pub fn metadata(&self, row: usize) -> Option<ImageMetadata> {
        let value_in = |column: &AttributeColumn| {
            let index = column.value_indices[row];
            let has_value = index != AttributeColumn::MISSING;
            has_value.then(|| column.values.get(index as usize).to_owned())
        };
        let attributes = self
            .attribute_columns
            .iter()
            .filter_map(|(name, c)| Some((name.clone(), value_in(c)?)));
        let hash = &self.content_hashes[row];
        let (byte_size, width, height) = self.byte_sizes_and_dimensions[row];
        let uri = self.uris.get(row);
        Some(ImageMetadata {
            image_id: ImageId::new(self.id(row)).ok()?,
            version: self.version(row),
            event_time: (self.event_times[row] != Self::UNKNOWN_TIME)
                .then(|| time_from_micros(self.event_times[row])),
            embedded_at: time_from_micros(self.embedded_at[row]),
            uri: (!uri.is_empty()).then(|| uri.to_owned()),
            content_hash: if hash == &[0; 32] { String::new() } else { to_hex(hash) },
            byte_size,
            width,
            height,
            attributes: attributes.collect(),
        })
    }

    /// Restores the row that was applied, with these statistics.
    fn to_row(
        &self,
        row: usize,
        statistics: BTreeMap<StatisticsKey, ScoreStatistics>,
    ) -> Option<ImageRow> {
        let image = self.metadata(row)?;
        Some(ImageRow {
            image_id: image.image_id,
            sequence: image.version.sequence,
            event_time: image.event_time,
            embedded_at: image.embedded_at,
            image: Some(StoredImage {
                uri: image.uri,
                content_hash: image.content_hash,
                byte_size: image.byte_size,
                width: image.width,
                height: image.height,
                attributes: image.attributes,
                embedding: self.embedding(row),
                statistics,
                decoding: None,
            }),
        })
    }

    /// Returns the bytes of ids, addresses and attributes, and the bytes of everything else.
    fn text_and_other_bytes(&self) -> (usize, usize) {
        let attributes = self.attribute_columns.values();
        let text_bytes = self.ids.memory_bytes()
            + self.uris.memory_bytes()
            + attributes
                .map(|c| c.values.memory_bytes() + 4 * c.value_indices.len())
                .sum::<usize>();
        let other_bytes = self.quantised.memory_bytes()
            + 2 * self.vectors.len()
            + self.sequences.memory_bytes()
            + self.row_count * (8 + 8 + 32 + 16);
        (text_bytes, other_bytes)
    }
}

/// Stored rows, their statistics, and which of them are live. Clones share the large parts.
#[derive(Debug, Clone)]
pub struct Chunk {
    /// The stored rows.
    pub data: Arc<ChunkData>,
    /// One column per prompt set: the statistics of each row, or [`NO_STATISTICS`].
    pub statistics: BTreeMap<StatisticsKey, Arc<[ScoreStatistics]>>,
    /// One bit per row, [`ROWS_PER_GROUP`] bits per word; 1 if the row is live.
    pub live_bitmap: Arc<[u64]>,
    /// Number of live rows.
    pub live_count: usize,
}

impl Chunk {
    /// Builds a chunk with the statistics of `keys`. The rows must have images and be sorted by id,
    /// with one row per id.
    pub fn from_rows(rows: &[ImageRow], keys: &[StatisticsKey]) -> Self {
        let len = rows.len();
        let images: Vec<&StoredImage> = rows.iter().filter_map(|row| row.image.as_ref()).collect();
        debug_assert_eq!(images.len(), len);
        let dimension = images.first().map_or(0, |image| image.embedding.values().len());
        let mut vectors = Vec::with_capacity(len * dimension);
        for image in &images {
            vectors.extend(image.embedding.values().iter().map(|v| f16::from_f32(*v)));
        }
        let statistics = keys
            .iter()
            .map(|key| {
                let statistics_of = |image: &&StoredImage| {
                    image.statistics.get(key).copied().unwrap_or(NO_STATISTICS)
                };
                (key.clone(), images.iter().map(statistics_of).collect())
            })
            .collect();
        let micros = |time: DateTime<Utc>| time.timestamp_micros();
        let data = ChunkData {
            row_count: len,
            dimension,
            quantised: QuantisedVectors::from_vectors(&vectors, dimension),
            vectors: vectors.into(),
            ids: PackedStrings::from_texts(rows.iter().map(|row| row.image_id.as_str())),
            sequences: PackedStrings::from_texts(rows.iter().map(|row| row.sequence.as_str())),
            uris: PackedStrings::from_texts(
                images.iter().map(|i| i.uri.as_deref().unwrap_or_default()),
            ),
            event_times: rows
                .iter()
                .map(|row| row.event_time.map_or(ChunkData::UNKNOWN_TIME, micros))
                .collect(),
            embedded_at: rows.iter().map(|row| micros(row.embedded_at)).collect(),
            content_hashes: images
                .iter()
                .map(|image| parse_hex_hash(&image.content_hash))
                .collect(),
            byte_sizes_and_dimensions: images
                .iter()
                .map(|i| (i.byte_size, i.width, i.height))
                .collect(),
            attribute_columns: build_attribute_columns(&images),
        };
        let mut live = vec![u64::MAX; len.div_ceil(ROWS_PER_GROUP)];
        if let Some(last) = live.last_mut().filter(|_| !len.is_multiple_of(ROWS_PER_GROUP)) {
            *last = (1 << (len % ROWS_PER_GROUP)) - 1;
        }
        Self { data: data.into(), statistics, live_bitmap: live.into(), live_count: len }
    }

    /// Returns whether a row is live.
    pub fn is_live(&self, row: usize) -> bool {
        self.live_bitmap[row / ROWS_PER_GROUP] >> (row % ROWS_PER_GROUP) & 1 == 1
    }

    /// Iterates over the indices of the live rows.
    pub fn live_rows(&self) -> impl Iterator<Item = usize> + '_ {
        (0..self.data.row_count).filter(|row| self.is_live(*row))
    }

    /// Returns the same chunk with `rows` marked as not live.
    pub fn without_rows(&self, rows: &[usize]) -> Self {
        let mut live = self.live_bitmap.to_vec();
        for row in rows {
            live[row / ROWS_PER_GROUP] &= !(1 << (row % ROWS_PER_GROUP));
        }
        let live_count = live.iter().map(|word| word.count_ones() as usize).sum();
        Self { live_bitmap: live.into(), live_count, ..self.clone() }
    }

    /// Restores the live rows as they were applied.
    pub fn to_rows(&self) -> Vec<ImageRow> {
        let restore = |row| {
            let columns = self.statistics.iter();
            let statistics = columns.map(|(key, column)| (key.clone(), column[row]));
            self.data.to_row(row, statistics.filter(|(_, s)| s.n > 0).collect())
        };
        self.live_rows().filter_map(restore).collect()
    }

    /// Returns the parts that clones share, each with its address and its bytes: the stored rows, and
    /// the statistics of each prompt set.
    pub fn shared_parts(&self) -> impl Iterator<Item = (*const (), u64)> + '_ {
        let (text_bytes, other_bytes) = self.data.text_and_other_bytes();
        let data = (Arc::as_ptr(&self.data).cast(), (text_bytes + other_bytes) as u64);
        let column_part = |column: &Arc<[ScoreStatistics]>| {
            (column.as_ptr().cast(), size_of_val(&**column) as u64)
        };
        std::iter::once(data).chain(self.statistics.values().map(column_part))
    }

    /// Returns the bytes of ids, addresses and attributes, and the bytes of everything else.
    pub fn text_and_other_bytes(&self) -> (usize, usize) {
        let (text_bytes, other_bytes) = self.data.text_and_other_bytes();
        let statistics = self.statistics.len() * self.data.row_count * size_of::<ScoreStatistics>();
        (text_bytes, other_bytes + statistics + 8 * self.live_bitmap.len())
    }
}

/// Returns the bytes of a hexadecimal hash; zeros if `text` is not one.
fn parse_hex_hash(text: &str) -> [u8; 32] {
    let mut digest = [0; 32];
    if text.len() == 64 && text.is_ascii() {
        for (byte, i) in digest.iter_mut().zip((0..64).step_by(2)) {
            *byte = u8::from_str_radix(&text[i..i + 2], 16).unwrap_or(0);
        }
    }
    digest
}

fn time_from_micros(micros: i64) -> DateTime<Utc> {
    DateTime::from_timestamp_micros(micros).unwrap_or_default()
}

/// Builds one column for each attribute that any image has.
fn build_attribute_columns(images: &[&StoredImage]) -> BTreeMap<String, AttributeColumn> {
    let names: std::collections::BTreeSet<&String> =
        images.iter().flat_map(|image| image.attributes.keys()).collect();
    let column = |name: &String| {
        let value_of_each: Vec<Option<&str>> =
            images.iter().map(|i| i.attributes.get(name).map(String::as_str)).collect();
        let mut values: Vec<&str> = value_of_each.iter().flatten().copied().collect();
        values.sort_unstable();
        values.dedup();
        let index_of = |value: Option<&str>| {
            let index = value.and_then(|v| values.binary_search(&v).ok());
            index.map_or(AttributeColumn::MISSING, |i| i as u32)
        };
        let value_indices = value_of_each.iter().copied().map(index_of).collect();
        AttributeColumn { values: PackedStrings::from_texts(values.iter().copied()), value_indices }
    };
    names.into_iter().map(|name| (name.clone(), column(name))).collect()
}
