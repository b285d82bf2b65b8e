//! What the demo is made of: a synthetic catalogue of drawn pictures (`catalogue`, `draw`), queries
//! with known answers (`queries`) and how well a model answers them (`judge`), which results of a
//! running demo are right (`truth`), a Kafka broker in this process (`broker`) and a shop that publishes
//! pictures and changes (`shop`).

pub mod broker;
pub mod catalogue;
pub mod draw;
pub mod judge;
pub mod queries;
pub mod shop;
pub mod truth;

use std::path::Path;

use crate::balance::statistics::StatisticsSettings;

/// How the demo computes its statistics: its weight was chosen with these (docs/balancing.md).
pub const DEMO_STATISTICS: StatisticsSettings = StatisticsSettings { top_k: 8, temperature: 1.0 };

/// Folder of the demo's CLIP checkpoint, and so the name of the model.
pub const DEMO_MODEL_FOLDER: &str = "demo-clip";

/// Files of the demo's CLIP checkpoint, compiled into the program.
const DEMO_CHECKPOINT_FILES: [(&str, &[u8]); 4] = [
    ("config.json", include_bytes!("../../models/demo/config.json")),
    ("model.safetensors", include_bytes!("../../models/demo/model.safetensors")),
    ("preprocessor_config.json", include_bytes!("../../models/demo/preprocessor_config.json")),
    ("tokenizer.json", include_bytes!("../../models/demo/tokenizer.json")),
];

/// Queries that the page offers and `bsap demo --once` runs: easy and hard ones.
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
pub fn write_demo_checkpoint(folder: &Path) -> std::io::Result<()> {
    std::fs::create_dir_all(folder)?;
    DEMO_CHECKPOINT_FILES
        .iter()
        .try_for_each(|(name, bytes)| std::fs::write(folder.join(name), bytes))
}
