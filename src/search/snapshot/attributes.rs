//! What there is to filter by.

use std::collections::BTreeMap;

use super::Snapshot;
use super::chunk::{Chunk, Column};
use crate::record::{AttributeType, AttributeTypes};

/// Most different values of an attribute that are told.
const MAX_VALUES: usize = 50;

/// A declared attribute, and who has it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Attribute {
    /// Its name.
    pub name: String,
    /// Its declared type.
    pub kind: AttributeType,
    /// Live images that have it.
    pub images: usize,
    /// Its values with the number of live images, the most frequent first; none for other types than
    /// text and boolean, or where there are more than 50.
    pub values: Option<Vec<(String, usize)>>,
}

/// The declared attributes, over the live images of `snapshot`.
pub fn attributes(declared: &AttributeTypes, snapshot: &Snapshot) -> Vec<Attribute> {
    let one = |(name, kind): (&String, &AttributeType)| {
        let listed = matches!(kind, AttributeType::Text | AttributeType::Boolean);
        let mut values: Option<BTreeMap<&str, usize>> = listed.then(BTreeMap::new);
        let mut images = 0;
        for chunk in &snapshot.chunks {
            let Some(column) = chunk.body.attributes.get(name) else { continue };
            images += live_codes(chunk, column).count();
            if column.values.len() > MAX_VALUES {
                values = None;
            }
            let Some(all) = &mut values else { continue };
            let mut counts = vec![0; column.values.len()];
            for code in live_codes(chunk, column) {
                counts[code] += 1;
            }
            for (i, count) in counts.into_iter().enumerate().filter(|(_, count)| *count > 0) {
                *all.entry(column.values.get(i)).or_default() += count;
            }
            if all.len() > MAX_VALUES {
                values = None;
            }
        }
        let values = values.map(|values| {
            let owned = values.into_iter().map(|(value, count)| (value.to_owned(), count));
            let mut values: Vec<(String, usize)> = owned.collect();
            values.sort_by(|a, b| b.1.cmp(&a.1).then_with(|| a.0.cmp(&b.0)));
            values
        });
        Attribute { name: name.clone(), kind: *kind, images, values }
    };
    declared.iter().map(one).collect()
}

fn live_codes<'a>(chunk: &'a Chunk, column: &'a Column) -> impl Iterator<Item = usize> + 'a {
    let codes = chunk.rows().map(|row| column.codes[row]);
    codes.filter(|code| *code != Column::MISSING).map(|code| code as usize)
}
