//! The columns of both tables, and the conversion of rows to columns and back.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use chrono::{DateTime, Utc};
use deltalake_core::arrow::array::{
    Array, ArrayRef, AsArray, BooleanArray, Float32Array, Int32Array, Int64Array, ListArray,
    MapArray, RecordBatch, StringArray, StructArray, TimestampMicrosecondArray,
};
use deltalake_core::arrow::buffer::OffsetBuffer;
use deltalake_core::arrow::datatypes::{
    DataType as ArrowType, Float32Type, Int32Type, Int64Type, Schema as ArrowSchema,
    TimestampMicrosecondType,
};
use deltalake_core::arrow::error::ArrowError;
use deltalake_core::kernel::{
    ArrayType, DataType, MapType, PrimitiveType, StructField, StructType,
};

use crate::balance::statistics::{ScoreStatistics, StatisticsKey};
use crate::record::{
    Attributes, Decoding, Embedding, ImageId, ImageRow, RowVersion, SequenceKey, StoredImage,
};

/// The column with the position of the message that a row came from: `topic[partition]@offset`.
pub const SOURCE_COLUMN: &str = "source";

/// Returns the columns of the `images` table, in order. Names and types are a promise to every other
/// tool that reads the table.
pub fn images_columns() -> Vec<StructField> {
    let text = DataType::STRING;
    let float = DataType::FLOAT;
    let statistics = StructType::new_unchecked([
        StructField::not_null("n", DataType::INTEGER),
        StructField::not_null("mean", float.clone()),
        StructField::not_null("std", float.clone()),
        StructField::not_null("min", float.clone()),
        StructField::not_null("max", float.clone()),
        StructField::not_null("lse", float.clone()),
        StructField::not_null("topk_mean", float.clone()),
    ]);
    let map = |value: DataType| DataType::from(MapType::new(text.clone(), value, false));
    let timestamp = DataType::Primitive(PrimitiveType::Timestamp);
    vec![
        StructField::not_null("image_id", text.clone()),
        StructField::not_null("sequence", text.clone()),
        StructField::not_null("deleted", DataType::BOOLEAN),
        StructField::nullable("event_time", timestamp.clone()),
        StructField::not_null("embedded_at", timestamp),
        StructField::not_null(SOURCE_COLUMN, text.clone()),
        StructField::nullable("uri", text.clone()),
        StructField::nullable("content_hash", text.clone()),
        StructField::nullable("bytes", DataType::LONG),
        StructField::nullable("width", DataType::INTEGER),
        StructField::nullable("height", DataType::INTEGER),
        StructField::nullable("attributes", map(text.clone())),
        StructField::nullable("embedding", DataType::from(ArrayType::new(float.clone(), false))),
        StructField::nullable("statistics", map(DataType::from(statistics))),
        StructField::nullable("decode_rule", text),
        StructField::nullable("decoded_share", float),
    ]
}

/// The partition column of the `statistics` table: the key of the prompt set.
pub const PROMPT_SET_COLUMN: &str = "prompt_set";

/// Returns the columns of the `statistics` table, in order; their names and types may not change
/// either. `embedded_at` and `embedding_hash` tie a row to one version of one image and to its very
/// embedding.
pub fn statistics_columns() -> Vec<StructField> {
    let (text, float) = (DataType::STRING, DataType::FLOAT);
    let floats = ["mean", "std", "min", "max", "lse", "topk_mean"];
    let mut columns = vec![
        StructField::not_null(PROMPT_SET_COLUMN, text.clone()),
        StructField::not_null("image_id", text.clone()),
        StructField::not_null("sequence", text.clone()),
        StructField::not_null("embedded_at", DataType::Primitive(PrimitiveType::Timestamp)),
        StructField::not_null("embedding_hash", text),
        StructField::not_null("n", DataType::INTEGER),
    ];
    columns.extend(floats.map(|name| StructField::not_null(name, float.clone())));
    columns
}

/// Columns of the `statistics` table whose minimum and maximum the log has for every file.
pub const STATISTICS_INDEXED_COLUMNS: [&str; 3] = ["image_id", "sequence", "embedded_at"];

/// Columns of the `images` table whose minimum and maximum the log has for every file.
pub const IMAGES_INDEXED_COLUMNS: [&str; 4] = ["image_id", "sequence", "event_time", "embedded_at"];

/// Columns of the `images` table that say which version of which image a row is.
pub const KEY_COLUMNS: [&str; 4] = ["image_id", "sequence", "deleted", "embedded_at"];

/// Converts rows, each with its source, to a batch of `schema`, the Arrow form of [`images_columns`].
pub fn rows_to_batch(
    rows: &[(String, &ImageRow)],
    schema: &Arc<ArrowSchema>,
) -> Result<RecordBatch, ArrowError> {
    let row = || rows.iter().map(|(_, row)| *row);
    let image = || row().map(|row| row.image.as_ref());
    let micros = |t: DateTime<Utc>| t.timestamp_micros();
    let columns = schema
        .fields()
        .iter()
        .map(|field| -> Result<ArrayRef, ArrowError> {
            Ok(match field.name().as_str() {
                "image_id" => Arc::new(StringArray::from_iter_values(row().map(|r| r.image_id.as_str()))),
                "sequence" => Arc::new(StringArray::from_iter_values(row().map(|r| r.sequence.as_str()))),
                "deleted" => Arc::new(BooleanArray::from_iter(row().map(|r| Some(r.image.is_none())))),
                "event_time" => Arc::new(
                    TimestampMicrosecondArray::from_iter(row().map(|r| r.event_time.map(micros)))
                        .with_timezone("UTC"),
                ),
                "embedded_at" => Arc::new(
                    TimestampMicrosecondArray::from_iter_values(row().map(|r| micros(r.embedded_at)))
                        .with_timezone("UTC"),
                ),
                SOURCE_COLUMN => Arc::new(StringArray::from_iter_values(rows.iter().map(|(s, _)| s))),
                "uri" => Arc::new(StringArray::from_iter(image().map(|i| i?.uri.as_deref()))),
                "content_hash" => Arc::new(StringArray::from_iter(
                    image().map(|i| i.map(|i| i.content_hash.as_str())),
                )),
                "bytes" => Arc::new(Int64Array::from_iter(image().map(|i| i.map(|i| i.byte_size as i64)))),
                "width" => Arc::new(Int32Array::from_iter(image().map(|i| i.map(|i| i.width as i32)))),
                "height" => Arc::new(Int32Array::from_iter(image().map(|i| i.map(|i| i.height as i32)))),
                "attributes" => attributes_column(image(), field.data_type())?,
                "embedding" => embedding_column(image(), field.data_type())?,
                "statistics" => statistics_column(image(), field.data_type())?,
                "decode_rule" => Arc::new(StringArray::from_iter(
                    image().map(|i| Some(&*i?.decoding.as_ref()?.rule)),
                )),
                "decoded_share" => Arc::new(Float32Array::from_iter(
                    image().map(|i| Some(i?.decoding.as_ref()?.share)),
                )),
                other => {
                    return Err(ArrowError::SchemaError(format!(
                        "the table has a column {other} that this version does not know; update bsap"
                    )));
                }
            })
        })
        .collect::<Result<Vec<_>, _>>()?;
    RecordBatch::try_new(schema.clone(), columns)
}

fn attributes_column<'a>(
    images: impl Iterator<Item = Option<&'a StoredImage>> + Clone,
    data_type: &ArrowType,
) -> Result<ArrayRef, ArrowError> {
    let pairs = || images.clone().flatten().flat_map(|i| &i.attributes);
    let keys: ArrayRef = Arc::new(StringArray::from_iter(pairs().map(|(k, _)| Some(k))));
    let values: ArrayRef = Arc::new(StringArray::from_iter(pairs().map(|(_, v)| Some(v))));
    map_column(data_type, keys, values, images.map(|i| i.map(|i| i.attributes.len())))
}

fn statistics_column<'a>(
    images: impl Iterator<Item = Option<&'a StoredImage>> + Clone,
    data_type: &ArrowType,
) -> Result<ArrayRef, ArrowError> {
    let pairs = || images.clone().flatten().flat_map(|i| &i.statistics);
    let keys: ArrayRef = Arc::new(StringArray::from_iter(pairs().map(|(k, _)| Some(k.as_str()))));
    let ArrowType::Map(entries, _) = data_type else {
        return Err(unexpected_type_error("statistics", data_type));
    };
    let ArrowType::Struct(entry) = entries.data_type() else {
        return Err(unexpected_type_error("statistics", data_type));
    };
    let ArrowType::Struct(fields) = entry[1].data_type() else {
        return Err(unexpected_type_error("statistics", data_type));
    };
    let float = |value: fn(&ScoreStatistics) -> f32| -> ArrayRef {
        Arc::new(Float32Array::from_iter_values(pairs().map(|(_, s)| value(s))))
    };
    let values = StructArray::try_new(
        fields.clone(),
        vec![
            Arc::new(Int32Array::from_iter_values(pairs().map(|(_, s)| s.n as i32))),
            float(|s| s.mean),
            float(|s| s.std),
            float(|s| s.min),
            float(|s| s.max),
            float(|s| s.lse),
            float(|s| s.topk_mean),
        ],
        None,
    )?;
    map_column(data_type, keys, Arc::new(values), images.map(|i| i.map(|i| i.statistics.len())))
}

fn map_column(
    data_type: &ArrowType,
    keys: ArrayRef,
    values: ArrayRef,
    lengths: impl Iterator<Item = Option<usize>> + Clone,
) -> Result<ArrayRef, ArrowError> {
    let ArrowType::Map(entries, sorted) = data_type else {
        return Err(unexpected_type_error("map", data_type));
    };
    let ArrowType::Struct(fields) = entries.data_type() else {
        return Err(unexpected_type_error("map", data_type));
    };
    let pairs = StructArray::try_new(fields.clone(), vec![keys, values], None)?;
    let offsets = OffsetBuffer::from_lengths(lengths.clone().map(Option::unwrap_or_default));
    let nulls = lengths.map(|l| l.is_some()).collect();
    let map = MapArray::try_new(entries.clone(), offsets, pairs, Some(nulls), *sorted)?;
    Ok(Arc::new(map))
}

fn embedding_column<'a>(
    images: impl Iterator<Item = Option<&'a StoredImage>> + Clone,
    data_type: &ArrowType,
) -> Result<ArrayRef, ArrowError> {
    let ArrowType::List(element) = data_type else {
        return Err(unexpected_type_error("embedding", data_type));
    };
    let values = images.clone().flatten().flat_map(|i| i.embedding.values());
    let values = Float32Array::from_iter_values(values.copied());
    let lengths = images.clone().map(|i| i.map_or(0, |i| i.embedding.values().len()));
    let nulls = images.map(|i| i.is_some()).collect();
    let list = ListArray::try_new(
        element.clone(),
        OffsetBuffer::from_lengths(lengths),
        Arc::new(values),
        Some(nulls),
    )?;
    Ok(Arc::new(list))
}

fn unexpected_type_error(column: &str, data_type: &ArrowType) -> ArrowError {
    ArrowError::SchemaError(format!("column {column} has the unexpected type {data_type}"))
}

/// Converts a batch of the `images` table to rows. The error names the column that is wrong.
pub fn rows_from_batch(batch: &RecordBatch) -> Result<Vec<ImageRow>, String> {
    let column =
        |name: &str| batch.column_by_name(name).ok_or_else(|| format!("column {name} is missing"));
    let text = |name: &str| -> Result<&StringArray, String> {
        column(name)?.as_string_opt::<i32>().ok_or_else(|| format!("column {name} is not text"))
    };
    let time = |name: &str| -> Result<&TimestampMicrosecondArray, String> {
        column(name)?
            .as_primitive_opt::<TimestampMicrosecondType>()
            .ok_or_else(|| format!("column {name} is not a timestamp in microseconds"))
    };
    let small = |name: &str| -> Result<&Int32Array, String> {
        column(name)?
            .as_primitive_opt::<Int32Type>()
            .ok_or_else(|| format!("column {name} is not a 32-bit integer"))
    };
    let (ids, sequences, uris) = (text("image_id")?, text("sequence")?, text("uri")?);
    let (event_times, embedded) = (time("event_time")?, time("embedded_at")?);
    let deleted = column("deleted")?.as_boolean_opt().ok_or("column deleted is not boolean")?;
    let hashes = text("content_hash")?;
    let bytes = column("bytes")?
        .as_primitive_opt::<Int64Type>()
        .ok_or("column bytes is not a 64-bit integer")?;
    let (widths, heights) = (small("width")?, small("height")?);
    let attributes = column("attributes")?.as_map_opt().ok_or("column attributes is not a map")?;
    let embeddings =
        column("embedding")?.as_list_opt::<i32>().ok_or("column embedding is not a list")?;
    let statistics = column("statistics")?.as_map_opt().ok_or("column statistics is not a map")?;
    let mut decoding = DecodingReader::new(batch);

    let mut rows = Vec::with_capacity(batch.num_rows());
    for i in 0..batch.num_rows() {
        let time_at = |times: &TimestampMicrosecondArray| {
            (!times.is_null(i)).then(|| DateTime::from_timestamp_micros(times.value(i))).flatten()
        };
        let image = if deleted.value(i) {
            None
        } else {
            Some(StoredImage {
                uri: (!uris.is_null(i)).then(|| uris.value(i).to_owned()),
                content_hash: hashes.value(i).to_owned(),
                byte_size: bytes.value(i) as u64,
                width: widths.value(i) as u32,
                height: heights.value(i) as u32,
                attributes: attributes_at(attributes, i)?,
                embedding: embedding_at(embeddings, i)?,
                statistics: statistics_at(statistics, i)?,
                decoding: decoding.row(i),
            })
        };
        rows.push(ImageRow {
            image_id: ImageId::new(ids.value(i)).map_err(|e| e.to_string())?,
            sequence: SequenceKey::from_stored(sequences.value(i)),
            event_time: time_at(event_times),
            embedded_at: time_at(embedded).ok_or("embedded_at is null")?,
            image,
        });
    }
    Ok(rows)
}

/// Reads how images were decoded. Tables of earlier versions lack the columns.
struct DecodingReader<'a> {
    columns: Option<(&'a StringArray, &'a Float32Array)>,
    /// Nearly all rows have one rule, which is kept once.
    last_rule: Arc<str>,
}

impl<'a> DecodingReader<'a> {
    fn new(batch: &'a RecordBatch) -> Self {
        let rules = batch.column_by_name("decode_rule").and_then(|c| c.as_string_opt::<i32>());
        let shares = batch.column_by_name("decoded_share");
        let shares = shares.and_then(|c| c.as_primitive_opt::<Float32Type>());
        Self { columns: rules.zip(shares), last_rule: Arc::default() }
    }

    fn row(&mut self, i: usize) -> Option<Decoding> {
        let (rules, shares) = self.columns?;
        if rules.is_null(i) || shares.is_null(i) {
            return None;
        }
        if &*self.last_rule != rules.value(i) {
            self.last_rule = rules.value(i).into();
        }
        Some(Decoding { rule: self.last_rule.clone(), share: shares.value(i) })
    }
}

/// Returns the image id and version of each row of a batch that has at least [`KEY_COLUMNS`].
pub fn keys_from_batch(batch: &RecordBatch) -> Result<Vec<(String, RowVersion)>, String> {
    let column = |name: &str| batch.column_by_name(name);
    let text = |name: &str| {
        column(name)
            .and_then(|c| c.as_string_opt::<i32>())
            .ok_or_else(|| format!("column {name} is not text"))
    };
    let (ids, sequences) = (text("image_id")?, text("sequence")?);
    let deleted = column("deleted")
        .and_then(|c| c.as_boolean_opt())
        .ok_or("column deleted is not boolean")?;
    let embedded = column("embedded_at")
        .and_then(|c| c.as_primitive_opt::<TimestampMicrosecondType>())
        .ok_or("column embedded_at is not a timestamp in microseconds")?;
    (0..batch.num_rows())
        .map(|i| {
            let version = RowVersion {
                sequence: SequenceKey::from_stored(sequences.value(i)),
                deleted: deleted.value(i),
                embedded_at: DateTime::from_timestamp_micros(embedded.value(i))
                    .ok_or("embedded_at is not a time")?,
            };
            Ok((ids.value(i).to_owned(), version))
        })
        .collect()
}

/// Returns the keys of the prompt sets whose statistics every image of a batch carries. Returns `None`
/// if no row has an image, or the batch is not of the `images` table.
pub fn common_statistics_keys(batch: &RecordBatch) -> Option<BTreeSet<String>> {
    let map = batch.column_by_name("statistics")?.as_map_opt()?;
    let deleted = batch.column_by_name("deleted")?.as_boolean_opt()?;
    let keys = map.keys().as_string_opt::<i32>()?;
    let offsets = map.value_offsets();
    let mut common: Option<BTreeSet<&str>> = None;
    for i in (0..batch.num_rows()).filter(|i| !deleted.value(*i)) {
        let (from, to) = (offsets[i] as usize, offsets[i + 1] as usize);
        let entries = if map.is_null(i) { from..from } else { from..to };
        match &mut common {
            None => common = Some(entries.map(|j| keys.value(j)).collect()),
            Some(common) => common.retain(|key| entries.clone().any(|j| keys.value(j) == *key)),
        }
    }
    Some(common?.into_iter().map(str::to_owned).collect())
}

/// Returns for each row of a batch whether it carries the statistics of the prompt set `key`.
pub fn has_statistics_by_row(batch: &RecordBatch, key: &str) -> Result<Vec<bool>, String> {
    let map = batch.column_by_name("statistics").and_then(|c| c.as_map_opt());
    let map = map.ok_or("column statistics is not a map")?;
    let keys = map.keys().as_string_opt::<i32>();
    let keys = keys.ok_or("the keys of column statistics are not text")?;
    let offsets = map.value_offsets();
    let has = |i: usize| {
        !map.is_null(i) && (offsets[i]..offsets[i + 1]).any(|j| keys.value(j as usize) == key)
    };
    Ok((0..batch.num_rows()).map(has).collect())
}

/// Returns the statistics of the prompt set `key` that each row of a batch carries.
pub fn statistics_by_row(
    batch: &RecordBatch,
    key: &StatisticsKey,
) -> Result<Vec<Option<ScoreStatistics>>, String> {
    let map = batch.column_by_name("statistics").and_then(|c| c.as_map_opt());
    let map = map.ok_or("column statistics is not a map")?;
    (0..batch.num_rows()).map(|i| Ok(statistics_at(map, i)?.remove(key))).collect()
}

/// Returns the attributes in row `i` of the column `attributes`.
pub fn attributes_at(map: &MapArray, i: usize) -> Result<Attributes, String> {
    if map.is_null(i) {
        return Ok(Attributes::new());
    }
    let pairs = map.value(i);
    let side = |c: usize| {
        pairs
            .column(c)
            .as_string_opt::<i32>()
            .ok_or("column attributes is not a map of text to text")
    };
    let (keys, values) = (side(0)?, side(1)?);
    Ok((0..pairs.len()).map(|j| (keys.value(j).to_owned(), values.value(j).to_owned())).collect())
}

fn embedding_at(list: &ListArray, i: usize) -> Result<Embedding, String> {
    if list.is_null(i) {
        return Err("embedding is null in a row that is not deleted".into());
    }
    let values = list.value(i);
    let values = values
        .as_primitive_opt::<Float32Type>()
        .ok_or("column embedding is not a list of 32-bit floats")?;
    Ok(Embedding::from_stored(values.values()))
}

fn statistics_at(
    map: &MapArray,
    i: usize,
) -> Result<BTreeMap<StatisticsKey, ScoreStatistics>, String> {
    if map.is_null(i) {
        return Ok(BTreeMap::new());
    }
    let pairs = map.value(i);
    let keys = pairs
        .column(0)
        .as_string_opt::<i32>()
        .ok_or("the keys of column statistics are not text")?;
    let values =
        pairs.column(1).as_struct_opt().ok_or("the values of column statistics are not structs")?;
    let field =
        |name: &str| values.column_by_name(name).ok_or(format!("statistics.{name} is missing"));
    let float = |name: &str| -> Result<&Float32Array, String> {
        field(name)?
            .as_primitive_opt::<Float32Type>()
            .ok_or_else(|| format!("statistics.{name} is not a 32-bit float"))
    };
    let n = field("n")?
        .as_primitive_opt::<Int32Type>()
        .ok_or("statistics.n is not a 32-bit integer")?;
    let (mean, std, min) = (float("mean")?, float("std")?, float("min")?);
    let (max, lse, topk) = (float("max")?, float("lse")?, float("topk_mean")?);
    Ok((0..pairs.len())
        .map(|j| {
            let statistics = ScoreStatistics {
                n: n.value(j) as u32,
                mean: mean.value(j),
                std: std.value(j),
                min: min.value(j),
                max: max.value(j),
                lse: lse.value(j),
                topk_mean: topk.value(j),
            };
            (StatisticsKey::from_stored(keys.value(j)), statistics)
        })
        .collect())
}
