//! The commands that inspect and maintain the stored table: `bsap status`, `bsap verify`,
//! `bsap compact`, `bsap vacuum`.

pub mod compact;
mod formatting;
mod ingestion;
pub mod status;
pub mod vacuum;
pub mod verify;

pub use compact::CompactArgs;
pub use status::StatusArgs;
pub use vacuum::VacuumArgs;
pub use verify::VerifyArgs;
