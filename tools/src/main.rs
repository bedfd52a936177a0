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
mod check;
mod copies;
mod gc;
mod image;
mod log;
mod place;
mod prefetch;
mod progress;
mod refs;
mod repository;
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
    /// Copy a repository, or one image of it, to another place: what is missing there
    Sync(sync::Sync),
    /// The versions of an image, newest first
    Log(log::Log),
    /// List, make or delete branches of an image
    Branch(refs::BranchCommand),
    /// List, make, protect or delete tags of an image
    Tag(refs::TagCommand),
    /// Read every object of a version, an image or a repository, and check it
    Verify(check::Verify),
    /// Check that all a repository names is there, without reading the data
    Fsck(check::Fsck),
    /// Delete what no branch or tag leads to
    Gc(gc::Gc),
    /// Leave versions out of a branch's history
    Squash(gc::Squash),
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
        Command::Sync(command) => end(command.run(), sync::Error::hint),
        Command::Log(command) => end(command.run(), repository::Error::hint),
        Command::Branch(command) => end(command.run(), repository::Error::hint),
        Command::Tag(command) => end(command.run(), repository::Error::hint),
        Command::Verify(command) => end(command.run(), repository::Error::hint),
        Command::Fsck(command) => end(command.run(), repository::Error::hint),
        Command::Gc(command) => end(command.run(), repository::Error::hint),
        Command::Squash(command) => end(command.run(), repository::Error::hint),
        Command::Manual { dir } => {
            // `git help horcrux` looks for a page of this name.
            let git = Args::command().name("git-horcrux").bin_name("git horcrux");
            let written = horcrux::manual::write(Args::command(), &dir);
            end(written.and_then(|()| horcrux::manual::write_pages(git, &dir)), |_| None)
        }
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
