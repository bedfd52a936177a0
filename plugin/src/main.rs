//! `horcrux-dv`: Docker's volume driver `horcrux-nbd`.
//!
//! Enters: Docker's requests on a Unix socket. Leaves: requests to the daemon (`horcrux-nbd serve`), and where its volumes are mounted. No data passes through it, and
//! volumes go on without it. Exit code 0 after a clean stop, 1 when something failed, 2 for a wrong command line.
#![cfg_attr(not(test), warn(clippy::unwrap_used))]

mod driver;
mod ledger;
mod options;
mod routes;
mod words;

use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;

use clap::Parser;
use horcrux::control::{self, socket_of};
use horcrux::lock::{FileLock, LockError};
use horcrux::volume::default_state_dir;
use tokio::signal::unix::{SignalKind, signal};
use tokio_util::sync::CancellationToken;

use driver::Driver;
use ledger::{Ledger, LedgerError};

/// Brings Horcrux volumes to Docker, as the volume driver 'horcrux-nbd'.
#[derive(Parser)]
#[command(name = "horcrux-dv", version)]
struct Args {
    /// Where the daemon keeps volumes and cache [default: /var/lib/horcrux for root, else $XDG_STATE_HOME/horcrux]
    #[arg(long, value_name = "DIR", env = "HORCRUX_STATE_DIR")]
    state_dir: Option<PathBuf>,
    /// Where Docker looks for the driver: the file's name is the driver's
    #[arg(long, value_name = "SOCK", default_value = "/run/docker/plugins/horcrux-nbd.sock")]
    socket: PathBuf,
}

/// Why the driver can't run.
#[derive(Debug, thiserror::Error)]
enum Error {
    #[error("no state directory: neither --state-dir, HORCRUX_STATE_DIR, XDG_STATE_HOME nor HOME is set")]
    NoStateDir,
    #[error("another driver runs on {}: {source}", dir.display())]
    InUse { dir: PathBuf, source: LockError },
    #[error("can't listen on {}: {source}", path.display())]
    Listen { path: PathBuf, source: io::Error },
    #[error("can't {action}{}: {source}", path.as_deref().map(|path| format!(" {}", path.display())).unwrap_or_default())]
    System { action: &'static str, path: Option<PathBuf>, source: io::Error },
    #[error(transparent)]
    Ledger(#[from] LedgerError),
}

fn main() -> ExitCode {
    let args = Args::parse();
    let filter = tracing_subscriber::EnvFilter::try_from_default_env().unwrap_or_else(|_| "info".into());
    let logs = tracing_subscriber::fmt().with_env_filter(filter).with_writer(io::stderr);
    logs.with_ansi(false).with_target(false).init();
    match run(args) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error}");
            ExitCode::FAILURE
        }
    }
}

fn run(args: Args) -> Result<(), Error> {
    let state_dir = args.state_dir.or_else(default_state_dir).ok_or(Error::NoStateDir)?;
    let state_dir = std::path::absolute(&state_dir).map_err(|source| Error::System {
        action: "find",
        path: Some(state_dir),
        source,
    })?;
    let runtime = tokio::runtime::Runtime::new().map_err(|source| Error::System {
        action: "start",
        path: None,
        source,
    })?;
    let dir = state_dir.join("driver");
    let mounts = state_dir.join("mounts");
    for dir in [&dir, &mounts] {
        make_private(dir).map_err(|source| Error::System {
            action: "make",
            path: Some(dir.clone()),
            source,
        })?;
    }
    // Held to the end: two drivers would count apart from each other.
    let lock = dir.join("lock");
    let _lock = FileLock::take(&lock).map_err(|error| match error {
        LockError::InUse { .. } => Error::InUse { dir: dir.clone(), source: error },
        LockError::Io(source) => Error::System { action: "lock", path: Some(lock.clone()), source },
    })?;
    let boot = Path::new("/proc/sys/kernel/random/boot_id");
    let boot = std::fs::read_to_string(boot).map_err(|source| Error::System {
        action: "read",
        path: Some(boot.to_owned()),
        source,
    })?;
    let ledger = Ledger::open(&dir, boot.trim())?;
    // As the kernel names what is mounted there.
    let mounts = mounts.canonicalize().map_err(|source| Error::System {
        action: "find",
        path: Some(mounts.clone()),
        source,
    })?;
    runtime.block_on(serve(Driver::new(socket_of(&state_dir), mounts, ledger), &args.socket))
}

async fn serve(driver: Driver, socket: &Path) -> Result<(), Error> {
    let failed = |source| Error::Listen { path: socket.to_owned(), source };
    if let Some(dir) = socket.parent() {
        std::fs::create_dir_all(dir).map_err(failed)?;
    }
    let stop = stop_on_signals().map_err(|source| Error::System {
        action: "listen for signals",
        path: None,
        source,
    })?;
    // One where another driver answers is left to it.
    let listener = control::bind(socket).map_err(failed)?;
    let ours = std::fs::metadata(socket).map_err(failed)?.ino();
    tracing::info!(socket = %socket.display(), "ready");
    let driver = Arc::new(driver);
    let tidying = tokio::spawn(driver.clone().tidy(stop.clone()));
    control::serve(listener, routes::router(driver), stop).await;
    // Another driver may have put its own there.
    if std::fs::metadata(socket).is_ok_and(|found| found.ino() == ours) {
        let _ = std::fs::remove_file(socket);
    }
    tidying.abort();
    Ok(())
}

/// Nobody but its owner lists what is there.
fn make_private(dir: &Path) -> io::Result<()> {
    use std::os::unix::fs::{DirBuilderExt, PermissionsExt};
    std::fs::DirBuilder::new().recursive(true).mode(0o711).create(dir)?;
    std::fs::set_permissions(dir, std::fs::Permissions::from_mode(0o711))
}

fn stop_on_signals() -> io::Result<CancellationToken> {
    let (mut term, mut int) = (signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?);
    let stop = CancellationToken::new();
    let token = stop.clone();
    tokio::spawn(async move {
        tokio::select! { _ = term.recv() => {}, _ = int.recv() => {} }
        tracing::info!("stopping; volumes stay as they are");
        token.cancel();
    });
    Ok(stop)
}
