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
looked at, those of the generation beside the live one too. Ends with code 1 where something is lost \
or wrong; warnings alone do not fail it.

Whether the table holds what the bucket holds is another question: `bsap reconcile` answers it.")]
pub struct VerifyArgs {
    /// Print a JSON object a generation
    #[arg(long)]
    pub json: bool,
}

/// `bsap compact`.
#[derive(Debug, Args)]
#[command(after_long_help = "\
Workers do this by themselves (maintenance.interval_seconds), one of them at a time. By hand it is safe at any \
time, beside workers, query workers and another compaction. The generation beside the live one is \
compacted too.

With --drop-damaged every file is read, and what is not there or not what was written leaves the table: \
query workers that start, and merging, would stop at it. What it held is then not stored any more, and \
a deleted image may be back in an older version, until `bsap reconcile --repair` has run. A query \
worker that runs serves what it holds until it starts anew.")]
pub struct CompactArgs {
    /// Merge small files only, without reading the keys of all rows
    #[arg(long)]
    pub merge: bool,
    /// Only take out files that are missing or damaged, after `bsap verify` found some
    #[arg(long, conflicts_with = "merge")]
    pub drop_damaged: bool,
}

/// `bsap vacuum`.
#[derive(Debug, Args)]
#[command(after_long_help = "\
Removes data files that have not been part of the table for maintenance.deleted_file_retention_hours, leftovers of \
crashes that are as old, and the log of commits older than maintenance.log_retention_hours. Workers do this by \
themselves (upkeep.every_seconds).

With --generations it removes instead the tables of generations that are neither live nor beside the \
live one, and to which nothing was written for maintenance.deleted_file_retention_hours. `bsap rollback` cannot go back \
to these, and nobody tidies them: embeddings of deleted images stay in them.")]
pub struct VacuumArgs {
    /// Remove the tables of old generations instead
    #[arg(long)]
    pub generations: bool,
    /// Say what would be removed, and remove nothing
    #[arg(long)]
    pub dry_run: bool,
}
