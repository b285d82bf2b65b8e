//! What the commands have in common: errors and exit codes, printing, running with logging and
//! signals, and opening stores, models, workers and query workers from the configuration.

pub mod attributes;
pub mod catalogue;
pub mod checkpoint_args;
pub mod configuration;
pub mod error;
pub mod evaluation;
pub mod in_process;
pub mod models;
pub mod printing;
pub mod progress;
pub mod prompt_statistics;
pub mod query_files;
pub mod query_worker;
pub mod result_table;
pub mod runtime;
pub mod worker;
