//! `horcrux-cli`: makes and versions images and volumes.
//!
//! Enters: a command line. Leaves: results on standard output, progress and errors on standard error; exit code 0 done, 1 failed, 2 usage.
#![cfg_attr(not(test), warn(clippy::unwrap_used))]

/// Prints a line, or leaves the function with the reason why not: a reader that went away is no panic.
macro_rules! say {
    () => { std::io::Write::write_all(&mut std::io::stdout(), b"\n")? };
    ($($what:tt)*) => { std::io::Write::write_fmt(&mut std::io::stdout(), format_args!("{}\n", format_args!($($what)*)))? };
}

mod cache;
mod changes;
mod compare;
mod copies;
mod files;
mod image;
mod json;
mod listing;
mod place;
mod prefetch;
mod progress;
mod sources;
mod sync;
mod volume;

use std::process::ExitCode;

use clap::{CommandFactory, Parser, Subcommand};

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
    /// What a volume's start reads: list it, show it, keep it with its commit
    Prefetch(prefetch::Prefetch),
    /// Fetch all of a volume, and keep it here: it can be served with the repository away
    Pin(cache::Pin),
    /// Let a pinned volume leave the cache again
    Unpin(cache::Unpin),
    /// Work of the daemon that takes long: how far it is, and to cancel it
    Jobs(cache::Jobs),
    /// What is here of which volume; verify it; free what nobody needs
    Cache(cache::CacheCommand),
    /// Make, list and take away volumes of the daemon ('horcrux-nbd serve')
    Volume(volume::VolumeCommand),
    /// Make a volume a kernel device, /dev/nbdN
    Attach(volume::AttachCommand),
    /// Make a volume a kernel device no more
    Detach(volume::DetachCommand),
    /// Mount a volume on a directory
    Mount(volume::MountCommand),
    /// Unmount a volume, and detach it
    Umount(volume::UmountCommand),
    /// Say how the daemon is
    Status(volume::StatusCommand),
    /// List files of a version or a volume, without mounting it
    Ls(files::LsCommand),
    /// Print a file of a version or a volume
    Cat(files::CatCommand),
    /// Write files of a version or a volume as a tar archive (sockets are left out)
    Export(files::ExportCommand),
    /// Say which files changed, in a volume or between two versions
    Diff(compare::DiffCommand),
    /// Show a commit, and which files it changed
    Show(compare::ShowCommand),
    /// Copy a repository, or one image of it, to another place: what is missing there
    Sync(sync::Sync),
    /// Write man pages and shell completions, for packages
    #[command(hide = true)]
    Manual {
        /// The directory
        dir: std::path::PathBuf,
    },
}

fn main() -> ExitCode {
    start_logging();
    match Args::parse().command {
        Command::ImageFromDir(command) => end(command.run(), image::Error::hint),
        Command::ImageFromFile(command) => end(command.run(), image::Error::hint),
        Command::Prefetch(command) => end(command.run(), prefetch::Error::hint),
        Command::Pin(command) => end(command.run(), cache::Error::hint),
        Command::Unpin(command) => end(command.run(), cache::Error::hint),
        Command::Jobs(command) => end(command.run(), cache::Error::hint),
        Command::Cache(command) => end(command.run(), cache::Error::hint),
        Command::Volume(command) => end(command.run(), volume::Error::hint),
        Command::Attach(command) => end(command.run(), volume::Error::hint),
        Command::Mount(command) => end(command.run(), volume::Error::hint),
        Command::Umount(command) => end(command.run(), volume::Error::hint),
        Command::Detach(command) => end(command.run(), volume::Error::hint),
        Command::Status(command) => end(command.run(), volume::Error::hint),
        Command::Ls(command) => end(command.run(), files::Error::hint),
        Command::Cat(command) => end(command.run(), files::Error::hint),
        Command::Export(command) => end(command.run(), files::Error::hint),
        Command::Diff(command) => end(command.run(), files::Error::hint),
        Command::Show(command) => end(command.run(), files::Error::hint),
        Command::Sync(command) => end(command.run(), sync::Error::hint),
        Command::Manual { dir } => end(horcrux::manual::write(Args::command(), &dir), |_| None),
    }
}

/// Warnings for people, on standard error: a repository that does not answer, something damaged that is read again.
fn start_logging() {
    let filter = tracing_subscriber::EnvFilter::try_from_default_env()
        .unwrap_or_else(|_| "warn,aws_config=error".into());
    let logs = tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr);
    logs.without_time().with_target(false).with_ansi(false).init();
}

/// Says what went wrong and what to do about it.
fn end<E: std::fmt::Display>(result: Result<(), E>, hint: impl Fn(&E) -> Option<String>) -> ExitCode {
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error}");
            if let Some(hint) = hint(&error) {
                eprintln!("hint: {hint}");
            }
            ExitCode::FAILURE
        }
    }
}
