//! How the commands about the table print sizes and generations.

use crate::catalogue::CatalogueState;
use crate::commands::shared::printing::print_line;
use crate::table::Generation;

/// A size for people.
pub fn format_mebibytes(bytes: u64) -> String {
    format!("{:.1} MiB", bytes as f64 / f64::from(1 << 20))
}

/// Says which table what follows is about, where there are two.
pub fn print_generation(state: &CatalogueState, generation: &Generation) {
    if state.standby.is_some() {
        print_line!("generation {} ({})", generation.id, generation.model_name);
    }
}
