//! The program `bsap`: parses arguments, runs a command, and turns its end into an exit code.

#![forbid(unsafe_code)]

use std::process::ExitCode;

use bsap::{cli, command};

fn main() -> ExitCode {
    match command::run(&cli::Cli::from_process()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => failure.told(),
    }
}
