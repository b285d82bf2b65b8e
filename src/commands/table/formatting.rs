//! Sizes and generations as the commands about the table print them.

use crate::catalogue::CatalogueState;
use crate::commands::shared::printing::print_line;
use crate::table::Generation;

/// Formats a number of bytes in MiB.
pub fn format_mebibytes(bytes: u64) -> String {
    format!("{:.1} MiB", bytes as f64 / f64::from(1 << 20))
}

/// Prints which generation the following output is about, if there are two.
pub fn print_generation(state: &CatalogueState, generation: &Generation) {
    if state.standby.is_some() {
        print_line!("generation {} ({})", generation.id, generation.model_name);
    }
}
