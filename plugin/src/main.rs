//! `horcrux-dv`: Docker's volume driver `horcrux-nbd`.
//!
//! Enters: Docker's requests on a Unix socket, or over TLS. Leaves: requests to the daemon (`horcrux-nbd serve`), and where its volumes are mounted. No data passes through it, and
//! volumes go on without it. Exit code 0 after a clean stop, 1 when something failed, 2 for a wrong command line.
#![cfg_attr(not(test), warn(clippy::unwrap_used))]

mod driver;
mod ledger;
mod options;
mod routes;
mod words;

use std::fs::File;
use std::io;
use std::net::SocketAddr;
use std::os::unix::fs::MetadataExt;
use std::os::unix::net::UnixListener as StdUnixListener;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;

use clap::{CommandFactory, Parser};
use horcrux::control::{self, Listener, TlsError, TlsFiles, socket_of};
use horcrux::durable::sync_dir;
use horcrux::kernel::{KernelError, mount};
use horcrux::lock::{FileLock, LockError};
use horcrux::volume::{VolumeName, default_state_dir};
use listenfd::ListenFd;
use sd_notify::NotifyState;
use tokio::net::{TcpListener, UnixListener};
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
    /// Where volumes are mounted [default: mounts in the state directory]
    #[arg(long, value_name = "DIR", env = "HORCRUX_MOUNTS")]
    mounts: Option<PathBuf>,
    #[command(flatten)]
    place: Place,
    /// Write the man page and shell completions to a directory, for packages
    #[arg(long, value_name = "DIR", hide = true)]
    manual: Option<PathBuf>,
}

/// Where Docker's requests come from.
#[derive(clap::Args)]
struct Place {
    /// Where Docker looks for the driver: the file's name is the driver's
    #[arg(long, value_name = "SOCK", default_value = "/run/docker/plugins/horcrux-nbd.sock")]
    socket: PathBuf,
    /// Listen there instead, with TLS, for a Docker that has a certificate (Docker's /etc/docker/plugins/horcrux-nbd.json says where)
    #[arg(long, value_name = "ADDR:PORT", requires_all = ["tls_cert", "tls_key", "tls_client_ca"])]
    listen: Option<SocketAddr>,
    /// The driver's certificate, PEM
    #[arg(long, value_name = "FILE", requires = "listen")]
    tls_cert: Option<PathBuf>,
    /// Its private key, PEM
    #[arg(long, value_name = "FILE", requires = "listen")]
    tls_key: Option<PathBuf>,
    /// The authority that Docker's certificate must be of, PEM
    #[arg(long, value_name = "FILE", requires = "listen")]
    tls_client_ca: Option<PathBuf>,
}

/// Why the driver can't run.
#[derive(Debug, thiserror::Error)]
enum Error {
    #[error("no state directory: neither --state-dir, HORCRUX_STATE_DIR, XDG_STATE_HOME nor HOME is set")]
    NoStateDir,
    #[error("another driver runs on {}: {source}", dir.display())]
    InUse { dir: PathBuf, source: LockError },
    #[error("{} is not empty, and no driver has used it: volumes are mounted in a directory of their own", dir.display())]
    NotOurs { dir: PathBuf },
    #[error("can't listen on {}: {source}", path.display())]
    Listen { path: PathBuf, source: io::Error },
    #[error("can't listen on {address}: {source}")]
    ListenTcp { address: SocketAddr, source: io::Error },
    #[error(transparent)]
    Tls(#[from] TlsError),
    #[error("can't {action}{}: {source}", path.as_deref().map(|path| format!(" {}", path.display())).unwrap_or_default())]
    System { action: &'static str, path: Option<PathBuf>, source: io::Error },
    #[error(transparent)]
    Ledger(#[from] LedgerError),
    #[error(transparent)]
    Kernel(#[from] KernelError),
}

impl Error {
    /// What the system refused.
    fn of(action: &'static str, path: Option<&Path>) -> impl FnOnce(io::Error) -> Error {
        let path = path.map(Path::to_owned);
        move |source| Error::System { action, path, source }
    }
}

fn main() -> ExitCode {
    let args = Args::parse();
    let filter = tracing_subscriber::EnvFilter::try_from_default_env().unwrap_or_else(|_| "info".into());
    let logs = tracing_subscriber::fmt().with_env_filter(filter).with_writer(io::stderr);
    logs.with_ansi(false).with_target(false).init();
    let done = match &args.manual {
        Some(dir) => {
            horcrux::manual::write(Args::command(), dir).map_err(Error::of("write the manual to", Some(dir)))
        }
        None => run(args),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error}");
            ExitCode::FAILURE
        }
    }
}

fn run(args: Args) -> Result<(), Error> {
    let state_dir = args.state_dir.or_else(default_state_dir).ok_or(Error::NoStateDir)?;
    let state_dir = std::path::absolute(&state_dir).map_err(Error::of("find", Some(&state_dir)))?;
    // Before there is any other thread: it takes what it found out of the environment.
    let given = ListenFd::from_env()
        .take_unix_listener(0)
        .map_err(Error::of("use the service manager's socket", None))?;
    let runtime = tokio::runtime::Runtime::new().map_err(Error::of("start", None))?;
    let dir = state_dir.join("driver");
    make_private(&dir)?;
    let own = state_dir.join("mounts");
    match &args.mounts {
        Some(mounts) => claim(mounts)?,
        None => make_private(&own)?,
    }
    let mounts = args.mounts.unwrap_or(own);
    // Held to the end: two drivers would count apart from each other.
    let lock = dir.join("lock");
    let _lock = FileLock::take(&lock).map_err(|error| match error {
        LockError::InUse { .. } => Error::InUse { dir: dir.clone(), source: error },
        LockError::Io(source) => Error::of("lock", Some(&lock))(source),
    })?;
    let boot = Path::new("/proc/sys/kernel/random/boot_id");
    let boot = std::fs::read_to_string(boot).map_err(Error::of("read", Some(boot)))?;
    // As the kernel names what is mounted there.
    let mounts = mounts.canonicalize().map_err(Error::of("find", Some(&mounts)))?;
    let mounted = mount::mounted_below(&mounts)?;
    let names = mounted.iter().filter_map(|dir| dir.file_name()?.to_str());
    let names: Vec<String> =
        names.filter(|name| name.parse::<VolumeName>().is_ok()).map(str::to_owned).collect();
    let ledger = Ledger::open(&dir, boot.trim(), &names)?;
    let driver = Driver::new(socket_of(&state_dir), mounts, ledger);
    runtime.block_on(serve(driver, &args.place, given))
}

impl Place {
    /// Where Docker's requests come from, and the socket's inode, where it is ours to take away.
    async fn bind(&self, given: Option<StdUnixListener>) -> Result<(Listener, Option<u64>), Error> {
        if let (Some(address), Some(certificate), Some(key), Some(client_ca)) =
            (self.listen, &self.tls_cert, &self.tls_key, &self.tls_client_ca)
        {
            let files =
                TlsFiles { certificate: certificate.clone(), key: key.clone(), client_ca: client_ca.clone() };
            let failed = |source| Error::ListenTcp { address, source };
            let listener = TcpListener::bind(address).await.map_err(failed)?;
            let address = listener.local_addr().map_err(failed)?;
            let listener = Listener::tls(listener, &files)?;
            tracing::info!(%address, "ready");
            return Ok((listener, None));
        }
        let failed = |source| Error::Listen { path: self.socket.clone(), source };
        // The service manager's, which keeps it while this driver is not there.
        if let Some(listener) = given {
            listener.set_nonblocking(true).map_err(failed)?;
            tracing::info!("ready, on the service manager's socket");
            return Ok((Listener::Unix(UnixListener::from_std(listener).map_err(failed)?), None));
        }
        if let Some(dir) = self.socket.parent() {
            std::fs::create_dir_all(dir).map_err(failed)?;
        }
        // One where another driver answers is left to it.
        let listener = control::bind(&self.socket).map_err(failed)?;
        let ours = std::fs::metadata(&self.socket).map_err(failed)?.ino();
        tracing::info!(socket = %self.socket.display(), "ready");
        Ok((listener, Some(ours)))
    }
}

async fn serve(driver: Driver, place: &Place, given: Option<StdUnixListener>) -> Result<(), Error> {
    let stop = stop_on_signals().map_err(Error::of("listen for signals", None))?;
    let (listener, ours) = place.bind(given).await?;
    let driver = Arc::new(driver);
    // Before the first question, if the daemon is there.
    driver.take_up().await;
    tell_manager(NotifyState::Ready);
    let tidying = tokio::spawn(driver.clone().tidy(stop.clone()));
    control::serve(listener, routes::router(driver), stop).await;
    // Another driver may have put its own there.
    if ours.is_some_and(|ours| std::fs::metadata(&place.socket).is_ok_and(|found| found.ino() == ours)) {
        let _ = std::fs::remove_file(&place.socket);
    }
    tidying.abort();
    Ok(())
}

/// Where there is a service manager that waits to be told.
fn tell_manager(state: NotifyState<'_>) {
    if let Err(error) = sd_notify::notify(&[state]) {
        tracing::debug!(%error, "the service manager was not told");
    }
}

/// Nobody but its owner comes to what is there: a volume may hold programs that run as root.
fn make_private(dir: &Path) -> Result<(), Error> {
    use std::os::unix::fs::{DirBuilderExt, PermissionsExt};
    let made = std::fs::DirBuilder::new().recursive(true).mode(0o711).create(dir);
    made.and_then(|()| std::fs::set_permissions(dir, std::fs::Permissions::from_mode(0o700)))
        .map_err(Error::of("make", Some(dir)))
}

/// Marks a directory that only drivers use.
const OURS: &str = ".horcrux";

/// Takes a directory for mounts, and for nothing else: what a driver finds there and does not know is unmounted and removed.
fn claim(dir: &Path) -> Result<(), Error> {
    let is_new = match std::fs::read_dir(dir) {
        Ok(mut entries) => entries.next().is_none(),
        Err(error) if error.kind() == io::ErrorKind::NotFound => true,
        Err(error) => return Err(Error::of("read", Some(dir))(error)),
    };
    if !is_new && !dir.join(OURS).exists() {
        return Err(Error::NotOurs { dir: dir.to_owned() });
    }
    make_private(dir)?;
    if !is_new {
        return Ok(());
    }
    // Durably, and before anything else is in it: else it would be somebody else's for ever. By its name alone: a temporary file that a crash left would be something else.
    let marked = File::create(dir.join(OURS)).and_then(|mark| mark.sync_all());
    marked.and_then(|()| sync_dir(dir)).map_err(Error::of("mark", Some(dir)))
}

fn stop_on_signals() -> io::Result<CancellationToken> {
    let (mut term, mut int) = (signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?);
    let stop = CancellationToken::new();
    let token = stop.clone();
    tokio::spawn(async move {
        tokio::select! { _ = term.recv() => {}, _ = int.recv() => {} }
        tell_manager(NotifyState::Stopping);
        tracing::info!("stopping; volumes stay as they are");
        token.cancel();
    });
    Ok(stop)
}
