//! Arguments of the commands that tidy and inspect the table.

use clap::Args;

/// `bsap status`.
#[derive(Debug, Args)]
pub struct StatusArgs {
    /// Print one JSON object
    #[arg(long)]
    pub json: bool,
}

/// `bsap verify`.
#[derive(Debug, Args)]
#[command(after_long_help = "\
Every file is read and compared with its checksum and with what the log says of it; every row is \
looked at. Ends with code 1 where something is lost or wrong; warnings alone do not fail it.

Whether the table holds what the bucket holds is another question: `bsap reconcile` answers it.")]
pub struct VerifyArgs {
    /// Print one JSON object
    #[arg(long)]
    pub json: bool,
}

/// `bsap compact`.
#[derive(Debug, Args)]
#[command(after_long_help = "\
Workers do this by themselves (upkeep.every_seconds), one of them at a time. By hand it is safe at any \
time, beside workers, query workers and another compaction.")]
pub struct CompactArgs {
    /// Merge small files only, without reading the keys of all rows
    #[arg(long)]
    pub merge: bool,
}

/// `bsap vacuum`.
#[derive(Debug, Args)]
#[command(after_long_help = "\
Removes data files that have not been part of the table for upkeep.retention_hours, leftovers of \
crashes that are as old, and the log of commits older than upkeep.log_hours. Workers do this by \
themselves (upkeep.every_seconds).

With --generations it removes instead the tables of generations that are neither live nor beside the \
live one, and to which nothing was written for upkeep.retention_hours. `bsap rollback` cannot go back \
to these, and nobody tidies them: embeddings of deleted images stay in them.")]
pub struct VacuumArgs {
    /// Remove the tables of old generations instead
    #[arg(long)]
    pub generations: bool,
    /// Say what would be removed, and remove nothing
    #[arg(long)]
    pub dry_run: bool,
}
