//! Sizes, generations and JSON as the commands about the table print them.

use serde_json::Value;

use crate::catalogue::CatalogueState;
use crate::commands::shared::printing::print_line;
use crate::table::Generation;

/// Formats a number of bytes in MiB.
pub fn format_mebibytes(bytes: u64) -> String {
    format!("{:.1} MiB", bytes as f64 / f64::from(1 << 20))
}

/// Adds the fields of one object to another.
pub fn merge_objects(mut object: Value, more: Value) -> Value {
    if let (Value::Object(object), Value::Object(more)) = (&mut object, more) {
        object.extend(more);
    }
    object
}

/// Prints which generation the following output is about, if there are two.
pub fn print_generation(state: &CatalogueState, generation: &Generation) {
    if state.standby.is_some() {
        print_line!("generation {} ({})", generation.id, generation.model_name);
    }
}
