//! Facets: the declared attributes and how many live images have each of their values.

use std::collections::BTreeMap;

use super::chunk::{AttributeColumn, Chunk};
use crate::record::{AttributeType, AttributeTypes};

/// An attribute with more different values than this is listed without them.
const MAX_FACET_VALUES: usize = 50;

/// A declared attribute and how often it occurs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AttributeFacet {
    /// Name of the attribute.
    pub name: String,
    /// Declared type.
    pub attribute_type: AttributeType,
    /// Number of live images that have the attribute.
    pub image_count: usize,
    /// Values with their number of live images, the most frequent first. `None` for types other than
    /// text and boolean, and if there are more than 50 values.
    pub value_counts: Option<Vec<(String, usize)>>,
}

/// Counts the declared attributes over the live images of all chunks, in the order of `declared`.
pub fn count_facets(declared: &AttributeTypes, chunks: &[Chunk]) -> Vec<AttributeFacet> {
    let count_attribute = |(name, attribute_type): (&String, &AttributeType)| {
        let lists_values = matches!(attribute_type, AttributeType::Text | AttributeType::Boolean);
        let mut values: Option<BTreeMap<&str, usize>> = lists_values.then(BTreeMap::new);
        let mut image_count = 0;
        for chunk in chunks {
            let Some(column) = chunk.data.attribute_columns.get(name) else { continue };
            image_count += live_value_indices(chunk, column).count();
            if column.values.len() > MAX_FACET_VALUES {
                values = None;
            }
            let Some(totals) = &mut values else { continue };
            let mut counts = vec![0; column.values.len()];
            for index in live_value_indices(chunk, column) {
                counts[index] += 1;
            }
            for (i, count) in counts.into_iter().enumerate().filter(|(_, count)| *count > 0) {
                *totals.entry(column.values.get(i)).or_default() += count;
            }
            if totals.len() > MAX_FACET_VALUES {
                values = None;
            }
        }
        let values = values.map(|values| {
            let owned = values.into_iter().map(|(value, count)| (value.to_owned(), count));
            let mut values: Vec<(String, usize)> = owned.collect();
            values.sort_by(|a, b| b.1.cmp(&a.1).then_with(|| a.0.cmp(&b.0)));
            values
        });
        AttributeFacet {
            name: name.clone(),
            attribute_type: *attribute_type,
            image_count,
            value_counts: values,
        }
    };
    declared.iter().map(count_attribute).collect()
}

/// Iterates over the indices into `column.values` of the live rows that have a value.
fn live_value_indices<'a>(
    chunk: &'a Chunk,
    column: &'a AttributeColumn,
) -> impl Iterator<Item = usize> + 'a {
    let indices = chunk.live_rows().map(|row| column.value_indices[row]);
    indices.filter(|index| *index != AttributeColumn::MISSING).map(|index| index as usize)
}
