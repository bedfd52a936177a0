//! `horcrux-nbd`: serves volumes as NBD exports.
//!
//! Enters: a command line. Leaves: on standard output one line for each export and how to attach it, once it can be; logs on standard error; exit code 0
//! after a clean stop, 1 when something failed, 2 for a wrong command line.
#![cfg_attr(not(test), warn(clippy::unwrap_used))]

mod daemon;
mod hint;
mod serve;

use std::process::ExitCode;

use clap::{CommandFactory, Parser, Subcommand, ValueEnum};

/// Serves Horcrux volumes over NBD.
#[derive(Parser)]
#[command(name = "horcrux-nbd", version)]
struct Args {
    #[command(subcommand)]
    command: Command,
    /// How logs look, on standard error; RUST_LOG sets what is logged
    #[arg(long, global = true, value_enum, default_value = "text")]
    log_format: LogFormat,
}

#[derive(Subcommand)]
enum Command {
    /// Serve versions of images as disks, or be the daemon of all volumes here; their changes stay in the state directory
    Serve(Box<serve::Args>),
    /// What the daemon has done by another process
    #[command(hide = true, name = horcrux::kernel::apart::WORD)]
    Apart {
        /// What to do
        task: String,
    },
    /// Write man pages and shell completions, for packages
    #[command(hide = true)]
    Manual {
        /// The directory
        dir: std::path::PathBuf,
    },
}

#[derive(Clone, Copy, ValueEnum)]
enum LogFormat {
    /// Lines for people
    Text,
    /// One JSON object a line
    Json,
}

fn main() -> ExitCode {
    let args = Args::parse();
    start_logging(args.log_format);
    let serve = match args.command {
        Command::Serve(serve) => serve,
        Command::Apart { task } => return horcrux::kernel::apart::perform(&task),
        Command::Manual { dir } => return written(horcrux::manual::write(Args::command(), &dir)),
    };
    match serve::run(*serve) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error}");
            if let Some(hint) = hint::hint(&error) {
                eprintln!("hint: {hint}");
            }
            ExitCode::FAILURE
        }
    }
}

fn written(result: std::io::Result<()>) -> ExitCode {
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: can't write the manual: {error}");
            ExitCode::FAILURE
        }
    }
}

fn start_logging(format: LogFormat) {
    let filter = tracing_subscriber::EnvFilter::try_from_default_env()
        .unwrap_or_else(|_| "info,aws_config=error".into());
    let logs = tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr);
    match format {
        LogFormat::Text => logs.with_ansi(false).with_target(false).init(),
        LogFormat::Json => logs.json().init(),
    }
}
