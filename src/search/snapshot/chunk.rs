//! An immutable piece of a snapshot: rows in the order of their ids, each field a column.

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

/// Rows of a group: one word of a bitmap.
pub const ROWS_PER_GROUP: usize = 64;
/// Most rows of a chunk. Larger ones would make merging them slow, smaller ones a query prepare its
/// numbers more often.
pub const MAX_CHUNK_ROWS: usize = 1 << 16;

/// No statistics: the row keeps its raw score.
pub const NO_STATISTICS: ScoreStatistics =
    ScoreStatistics { n: 0, mean: 0.0, std: 0.0, min: 0.0, max: 0.0, lse: 0.0, topk_mean: 0.0 };

/// What is known of one live image besides its embedding.
#[derive(Debug, Clone)]
pub struct ImageMetadata {
    /// Which image.
    pub image_id: ImageId,
    /// Its version.
    pub version: RowVersion,
    /// When the change happened, where known.
    pub event_time: Option<DateTime<Utc>>,
    /// When it was embedded.
    pub embedded_at: DateTime<Utc>,
    /// Where it was fetched from; none where its bytes came in the event.
    pub uri: Option<String>,
    /// SHA-256 of its bytes in hexadecimal.
    pub content_hash: String,
    /// Size of those bytes.
    pub byte_size: u64,
    /// Width in pixels.
    pub width: u32,
    /// Height in pixels.
    pub height: u32,
    /// Declared attributes.
    pub attributes: Attributes,
}

/// Texts one after the other in one piece of memory.
#[derive(Debug, Default)]
pub struct PackedStrings {
    joined: Box<str>,
    end_offsets: Box<[u32]>,
}

impl PackedStrings {
    fn from_texts<'a>(texts: impl Iterator<Item = &'a str>) -> Self {
        let (mut text, mut ends) = (String::new(), Vec::new());
        for one in texts {
            text.push_str(one);
            ends.push(text.len() as u32);
        }
        Self { joined: text.into(), end_offsets: ends.into() }
    }

    /// The text at `i`.
    pub fn get(&self, i: usize) -> &str {
        let from = i.checked_sub(1).map_or(0, |before| self.end_offsets[before] as usize);
        &self.joined[from..self.end_offsets[i] as usize]
    }

    /// How many texts.
    pub fn len(&self) -> usize {
        self.end_offsets.len()
    }

    fn memory_bytes(&self) -> usize {
        self.joined.len() + 4 * self.end_offsets.len()
    }
}

/// The values of one attribute: each different value once, and which one a row has.
#[derive(Debug)]
pub struct AttributeColumn {
    /// The different values, sorted.
    pub values: PackedStrings,
    /// Index into `values` of each row; [`Column::MISSING`] where it has none.
    pub value_indices: Box<[u32]>,
}

impl AttributeColumn {
    /// A row without the attribute.
    pub const MISSING: u32 = u32::MAX;
}

/// The rows, without statistics and without what is deleted since.
#[derive(Debug)]
pub struct ChunkData {
    /// Rows.
    pub len: usize,
    /// Values of an embedding.
    pub dimension: usize,
    /// Codes of the embeddings.
    pub quantised: QuantisedVectors,
    vectors: Box<[f16]>,
    ids: PackedStrings,
    sequences: PackedStrings,
    /// Empty text: none.
    uris: PackedStrings,
    /// Microseconds since 1970; [`Body::NO_TIME`] where unknown.
    pub event_times: Box<[i64]>,
    /// Microseconds since 1970.
    pub embedded_at: Box<[i64]>,
    content_hashes: Box<[[u8; 32]]>,
    image_sizes: Box<[(u64, u32, u32)]>,
    /// Declared attributes that any row has.
    pub attributes: BTreeMap<String, AttributeColumn>,
}

impl ChunkData {
    /// A time that is not known.
    pub const UNKNOWN_TIME: i64 = i64::MIN;

    /// The id of a row.
    pub fn id(&self, row: usize) -> &str {
        self.ids.get(row)
    }

    /// The row of an id, live or not.
    pub fn find_row(&self, id: &str) -> Option<usize> {
        let (mut low, mut high) = (0, self.len);
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

    /// The version of a row.
    pub fn version(&self, row: usize) -> RowVersion {
        RowVersion {
            sequence: SequenceKey::from_stored(self.sequences.get(row)),
            deleted: false,
            embedded_at: time_from_micros(self.embedded_at[row]),
        }
    }

    /// The stored embedding of a row.
    pub fn stored_vector(&self, row: usize) -> &[f16] {
        &self.vectors[row * self.dimension..(row + 1) * self.dimension]
    }

    /// The stored embedding of a row, as statistics are computed from it.
    pub fn embedding(&self, row: usize) -> Embedding {
        Embedding::from_stored(&self.stored_vector(row).to_f32_vec())
    }

    /// What is known of a row.
    pub fn metadata(&self, row: usize) -> Option<ImageMetadata> {
        let of = |column: &AttributeColumn| {
            let code = column.value_indices[row];
            (code != AttributeColumn::MISSING).then(|| column.values.get(code as usize).to_owned())
        };
        let attributes = self.attributes.iter();
        let hash = &self.content_hashes[row];
        let (bytes, width, height) = self.image_sizes[row];
        let uri = self.uris.get(row);
        Some(ImageMetadata {
            image_id: ImageId::new(self.id(row)).ok()?,
            version: self.version(row),
            event_time: (self.event_times[row] != Self::UNKNOWN_TIME)
                .then(|| time_from_micros(self.event_times[row])),
            embedded_at: time_from_micros(self.embedded_at[row]),
            uri: (!uri.is_empty()).then(|| uri.to_owned()),
            content_hash: if hash == &[0; 32] { String::new() } else { to_hex(hash) },
            byte_size: bytes,
            width,
            height,
            attributes: attributes.filter_map(|(n, c)| Some((n.clone(), of(c)?))).collect(),
        })
    }

    /// The row as it was before it was taken in, with these statistics.
    fn to_row(
        &self,
        row: usize,
        statistics: BTreeMap<StatisticsKey, ScoreStatistics>,
    ) -> Option<ImageRow> {
        let entry = self.metadata(row)?;
        Some(ImageRow {
            image_id: entry.image_id,
            sequence: entry.version.sequence,
            event_time: entry.event_time,
            embedded_at: entry.embedded_at,
            image: Some(StoredImage {
                uri: entry.uri,
                content_hash: entry.content_hash,
                bytes: entry.byte_size,
                width: entry.width,
                height: entry.height,
                attributes: entry.attributes,
                embedding: self.embedding(row),
                statistics,
            }),
        })
    }

    /// Bytes of ids, addresses and attributes; all others.
    fn memory_bytes(&self) -> (usize, usize) {
        let attributes = self.attributes.values();
        let named = self.ids.memory_bytes()
            + self.uris.memory_bytes()
            + attributes
                .map(|c| c.values.memory_bytes() + 4 * c.value_indices.len())
                .sum::<usize>();
        let rest = self.quantised.memory_bytes()
            + 2 * self.vectors.len()
            + self.sequences.memory_bytes()
            + self.len * (8 + 8 + 32 + 16);
        (named, rest)
    }
}

/// A body, its statistics, and which of its rows are live. Copies share what is large.
#[derive(Debug, Clone)]
pub struct Chunk {
    /// The rows.
    pub data: Arc<ChunkData>,
    /// Statistics of each row by prompt set.
    pub statistics: BTreeMap<StatisticsKey, Arc<[ScoreStatistics]>>,
    /// A bit a row, [`GROUP`] a word.
    pub live_bitmap: Arc<[u64]>,
    /// Rows that are live.
    pub live_count: usize,
}

impl Chunk {
    /// A chunk of rows with images, sorted by id, one row an id, with the statistics of `keys`.
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
                let of = |image: &&StoredImage| {
                    image.statistics.get(key).copied().unwrap_or(NO_STATISTICS)
                };
                (key.clone(), images.iter().map(of).collect())
            })
            .collect();
        let micros = |time: DateTime<Utc>| time.timestamp_micros();
        let body = ChunkData {
            len,
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
            image_sizes: images.iter().map(|i| (i.bytes, i.width, i.height)).collect(),
            attributes: build_attribute_columns(&images),
        };
        let mut live = vec![u64::MAX; len.div_ceil(ROWS_PER_GROUP)];
        if let Some(last) = live.last_mut().filter(|_| !len.is_multiple_of(ROWS_PER_GROUP)) {
            *last = (1 << (len % ROWS_PER_GROUP)) - 1;
        }
        Self { data: body.into(), statistics, live_bitmap: live.into(), live_count: len }
    }

    /// Whether a row is live.
    pub fn is_live(&self, row: usize) -> bool {
        self.live_bitmap[row / ROWS_PER_GROUP] >> (row % ROWS_PER_GROUP) & 1 == 1
    }

    /// The live rows.
    pub fn live_rows(&self) -> impl Iterator<Item = usize> + '_ {
        (0..self.data.len).filter(|row| self.is_live(*row))
    }

    /// The same chunk without `rows`.
    pub fn without_rows(&self, rows: &[usize]) -> Self {
        let mut live = self.live_bitmap.to_vec();
        for row in rows {
            live[row / ROWS_PER_GROUP] &= !(1 << (row % ROWS_PER_GROUP));
        }
        let count = live.iter().map(|word| word.count_ones() as usize).sum();
        Self { live_bitmap: live.into(), live_count: count, ..self.clone() }
    }

    /// The live rows as they were before they were taken in.
    pub fn to_rows(&self) -> Vec<ImageRow> {
        let row = |row| {
            let of =
                |(key, all): (&StatisticsKey, &Arc<[ScoreStatistics]>)| (key.clone(), all[row]);
            let all: BTreeMap<StatisticsKey, ScoreStatistics> =
                self.statistics.iter().map(of).collect();
            self.data.to_row(row, all.into_iter().filter(|(_, s)| s.n > 0).collect())
        };
        self.live_rows().filter_map(row).collect()
    }

    /// What copies share, by its address, with its bytes: the body, and the statistics of each set.
    pub fn shared_parts(&self) -> impl Iterator<Item = (*const (), u64)> + '_ {
        let (named, rest) = self.data.memory_bytes();
        let body = (Arc::as_ptr(&self.data).cast(), (named + rest) as u64);
        let column =
            |all: &Arc<[ScoreStatistics]>| (all.as_ptr().cast(), size_of_val(&**all) as u64);
        std::iter::once(body).chain(self.statistics.values().map(column))
    }

    /// Bytes of ids, addresses and attributes; all others.
    pub fn memory_bytes(&self) -> (usize, usize) {
        let (named, rest) = self.data.memory_bytes();
        let statistics = self.statistics.len() * self.data.len * size_of::<ScoreStatistics>();
        (named, rest + statistics + 8 * self.live_bitmap.len())
    }
}

/// The bytes of a hash in hexadecimal; zeros where it is none.
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

fn build_attribute_columns(images: &[&StoredImage]) -> BTreeMap<String, AttributeColumn> {
    let names: std::collections::BTreeSet<&String> =
        images.iter().flat_map(|image| image.attributes.keys()).collect();
    let column = |name: &String| {
        let all: Vec<Option<&str>> =
            images.iter().map(|i| i.attributes.get(name).map(String::as_str)).collect();
        let mut values: Vec<&str> = all.iter().flatten().copied().collect();
        values.sort_unstable();
        values.dedup();
        let code = |value: Option<&str>| {
            let found = value.and_then(|v| values.binary_search(&v).ok());
            found.map_or(AttributeColumn::MISSING, |i| i as u32)
        };
        let codes = all.iter().copied().map(code).collect();
        AttributeColumn {
            values: PackedStrings::from_texts(values.iter().copied()),
            value_indices: codes,
        }
    };
    names.into_iter().map(|name| (name.clone(), column(name))).collect()
}
