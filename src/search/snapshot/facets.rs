//! What there is to filter by.

use std::collections::BTreeMap;

use super::chunk::{AttributeColumn, Chunk};
use crate::record::{AttributeType, AttributeTypes};

/// Most different values of an attribute that are told.
const MAX_FACET_VALUES: usize = 50;

/// A declared attribute, and who has it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AttributeFacet {
    /// Its name.
    pub name: String,
    /// Its declared type.
    pub attribute_type: AttributeType,
    /// Live images that have it.
    pub image_count: usize,
    /// Its values with the number of live images, the most frequent first; none for other types than
    /// text and boolean, or where there are more than 50.
    pub value_counts: Option<Vec<(String, usize)>>,
}

/// The declared attributes, over the live images of `snapshot`.
pub fn count_facets(declared: &AttributeTypes, chunks: &[Chunk]) -> Vec<AttributeFacet> {
    let one = |(name, kind): (&String, &AttributeType)| {
        let listed = matches!(kind, AttributeType::Text | AttributeType::Boolean);
        let mut values: Option<BTreeMap<&str, usize>> = listed.then(BTreeMap::new);
        let mut images = 0;
        for chunk in chunks {
            let Some(column) = chunk.data.attributes.get(name) else { continue };
            images += live_value_indices(chunk, column).count();
            if column.values.len() > MAX_FACET_VALUES {
                values = None;
            }
            let Some(all) = &mut values else { continue };
            let mut counts = vec![0; column.values.len()];
            for code in live_value_indices(chunk, column) {
                counts[code] += 1;
            }
            for (i, count) in counts.into_iter().enumerate().filter(|(_, count)| *count > 0) {
                *all.entry(column.values.get(i)).or_default() += count;
            }
            if all.len() > MAX_FACET_VALUES {
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
            attribute_type: *kind,
            image_count: images,
            value_counts: values,
        }
    };
    declared.iter().map(one).collect()
}

fn live_value_indices<'a>(
    chunk: &'a Chunk,
    column: &'a AttributeColumn,
) -> impl Iterator<Item = usize> + 'a {
    let codes = chunk.live_rows().map(|row| column.value_indices[row]);
    codes.filter(|code| *code != AttributeColumn::MISSING).map(|code| code as usize)
}
