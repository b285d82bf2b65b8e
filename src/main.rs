//! The program `bsap`: parses arguments, runs a command, and turns its end into an exit code.

#![forbid(unsafe_code)]

use std::process::ExitCode;

use bsap::commands::{self, cli};

/// The C library's own comes to hold more and more of what many threads free: in half an hour of steady load
/// a worker grew by a third (docs/performance.md).
#[global_allocator]
static ALLOCATOR: tikv_jemallocator::Jemalloc = tikv_jemallocator::Jemalloc;

fn main() -> ExitCode {
    match commands::run(&cli::Cli::from_process()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => failure.report(),
    }
}
