//! What `bsap demo` and `bsap try` have in common: broker, workers, table and page in one process.

pub mod system;
