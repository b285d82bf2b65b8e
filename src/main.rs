//! The program `bsap`: parses the arguments, runs the command and exits with its code.

#![forbid(unsafe_code)]

use std::process::ExitCode;

use bsap::commands::{self, Cli};

/// The allocator of the C library holds ever more of the memory that many threads free: in half an
/// hour of steady load a worker grew by a third (docs/performance.md).
#[global_allocator]
static ALLOCATOR: tikv_jemallocator::Jemalloc = tikv_jemallocator::Jemalloc;

fn main() -> ExitCode {
    match commands::run(&Cli::from_process()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => error.print_and_exit_code(),
    }
}
