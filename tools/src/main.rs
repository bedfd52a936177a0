//! `horcrux-cli`: makes and versions images and volumes.
//!
//! Enters: a command line. Leaves: results on standard output, progress and errors on standard error; exit code 0 done, 1 failed, 2 usage.
#![cfg_attr(not(test), warn(clippy::unwrap_used))]

mod image;
mod progress;

use std::process::ExitCode;

use clap::{Parser, Subcommand};

/// Git for data volumes: images of directories, in a repository.
#[derive(Parser)]
#[command(name = "horcrux-cli", version)]
struct Args {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Make an image of a directory: the next version of NAME in REPO
    #[command(visible_alias = "generate")]
    ImageFromDir(image::FromDir),
    /// Make an image of an existing raw image or block device
    ImageFromFile(image::FromFile),
}

fn main() -> ExitCode {
    let result = match Args::parse().command {
        Command::ImageFromDir(command) => command.run(),
        Command::ImageFromFile(command) => command.run(),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error}");
            if let Some(hint) = error.hint() {
                eprintln!("hint: {hint}");
            }
            ExitCode::FAILURE
        }
    }
}
