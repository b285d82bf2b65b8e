//! What the demo stands on: a drawn catalogue, a broker in this process, a shop that changes.

pub mod broker;
pub mod catalogue;
pub mod draw;
pub mod judge;
pub mod queries;
pub mod shop;

use std::path::Path;

/// The demo's CLIP checkpoint, part of the program.
const MODEL_FILES: [(&str, &[u8]); 4] = [
    ("config.json", include_bytes!("../../models/demo/config.json")),
    ("model.safetensors", include_bytes!("../../models/demo/model.safetensors")),
    ("preprocessor_config.json", include_bytes!("../../models/demo/preprocessor_config.json")),
    ("tokenizer.json", include_bytes!("../../models/demo/tokenizer.json")),
];

/// Queries that the page offers and `--once` asks: easy and hard ones.
pub const EXAMPLE_QUERIES: [&str; 8] = [
    "a red mug",
    "something striped",
    "a yellow umbrella",
    "a blue dotted backpack",
    "two green chairs",
    "a black zigzag cushion",
    "a lamp next to a book",
    "three white candles",
];

/// Writes the demo's checkpoint into `folder`, in the Hugging Face layout.
pub fn write_checkpoint(folder: &Path) -> std::io::Result<()> {
    std::fs::create_dir_all(folder)?;
    MODEL_FILES.iter().try_for_each(|(name, bytes)| std::fs::write(folder.join(name), bytes))
}
