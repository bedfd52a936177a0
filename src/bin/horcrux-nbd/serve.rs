//! `horcrux-nbd serve`: from the command line to a running server.

use std::collections::BTreeSet;
use std::io;
use std::net::SocketAddr;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use clap::ValueEnum;
use horcrux::cache::{Cache, CacheError, CacheOptions};
use horcrux::control::TokenError;
use horcrux::host::HostOptions;
use horcrux::nbd::{Endpoint, Export, Exports, Listener, ServeError, Server, ServerOptions};
use horcrux::repo::{ImageName, Reference, RepoError, Repository};
use horcrux::store::{self, RetryOptions, UrlError};
use horcrux::units::ByteLen;
use horcrux::volume::{Prefetch, Source, StateDir, Volume, VolumeError, VolumeRecord, default_state_dir};
use percent_encoding::{AsciiSet, NON_ALPHANUMERIC, percent_encode};
use tokio::signal::unix::{SignalKind, signal};
use tokio_util::sync::CancellationToken;

use crate::daemon::{self, Remote};

/// What a start reads at once as soon as it knows what to read.
const FIRST_READS: usize = 32;
/// How long the server's end waits for prefetch lists to be kept.
const LAST_ACT: Duration = Duration::from_secs(5);

/// What `serve` takes.
#[derive(clap::Args)]
pub struct Args {
    /// Repository the images are in: a directory, or a URL; may be given more than once, for copies of one repository in several places
    #[arg(long, value_name = "REPO", requires = "names")]
    access: Vec<String>,
    /// Image to serve, and which version of it; may be given more than once [default: every volume of the state directory, as a daemon that 'horcrux-cli volume' speaks to]
    #[arg(long = "name", value_name = "NAME[@REF]", requires = "access", value_parser = parse_name)]
    names: Vec<Name>,
    /// Refuse writes
    #[arg(long, requires = "names")]
    read_only: bool,
    /// Unix socket to listen on [default, where --listen is not given either: run/nbd.sock in the state directory]
    #[arg(long, value_name = "SOCK")]
    unix: Option<PathBuf>,
    /// TCP address to listen on
    #[arg(long, value_name = "ADDR:PORT")]
    listen: Option<SocketAddr>,
    /// TCP address for the control API and /metrics besides its socket; plain HTTP, for who has the token
    #[arg(long, value_name = "ADDR:PORT", requires = "control_token", conflicts_with = "names")]
    control_listen: Option<SocketAddr>,
    /// File with the token for --control-listen, which nobody else may read
    #[arg(long, value_name = "FILE", requires = "control_listen")]
    control_token: Option<PathBuf>,
    /// Where deltas and the cache are kept [default: /var/lib/horcrux for root, else $XDG_STATE_HOME/horcrux]
    #[arg(long, value_name = "DIR", env = "HORCRUX_STATE_DIR")]
    state_dir: Option<PathBuf>,
    /// Bytes of disk the cache may take
    #[arg(long, value_name = "SIZE", default_value = "16G")]
    cache_size: ByteLen,
    /// What to fetch before it is asked for: nothing, what an earlier start read (its own, or a list kept with the commit), or everything
    #[arg(long, value_enum, default_value = "learned", requires = "names")]
    prefetch: PrefetchMode,
    /// Bytes a second that '--prefetch all' may fetch of what nobody asked for
    #[arg(long, value_name = "SIZE")]
    prefetch_rate: Option<ByteLen>,
    /// Seconds a read waits for a repository that does not answer, before it is an I/O error
    #[arg(long, value_name = "SECONDS", default_value = "120", value_parser = clap::value_parser!(u64).range(1..=86400))]
    remote_timeout: u64,
    /// Seconds an attached kernel device waits for a daemon that is gone, before its requests fail
    #[arg(long, value_name = "SECONDS", default_value = "600", conflicts_with = "names", value_parser = clap::value_parser!(u64).range(1..=604_800))]
    dead_timeout: u64,
    /// Seconds a client has to choose an export, after which its connection is closed
    #[arg(long, value_name = "SECONDS", default_value = "30", value_parser = clap::value_parser!(u64).range(1..=3600))]
    handshake_limit: u64,
}

#[derive(Clone, Copy, ValueEnum)]
enum PrefetchMode {
    All,
    None,
    Learned,
}

impl From<PrefetchMode> for Prefetch {
    fn from(mode: PrefetchMode) -> Prefetch {
        match mode {
            PrefetchMode::All => Prefetch::All,
            PrefetchMode::None => Prefetch::None,
            PrefetchMode::Learned => Prefetch::Learned,
        }
    }
}

/// `NAME[@REF]`, where no REF is not the same as `@main`: it goes on with what the volume has.
#[derive(Clone)]
struct Name {
    image: ImageName,
    reference: Option<Reference>,
}

fn parse_name(text: &str) -> Result<Name, RepoError> {
    let (image, reference) = match text.split_once('@') {
        Some((image, reference)) => (image, Some(reference.parse()?)),
        None => (text, None),
    };
    Ok(Name { image: image.parse()?, reference })
}

/// Why the server did not start, or did not stop well.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error(transparent)]
    Url(#[from] UrlError),
    #[error(transparent)]
    Repo(#[from] RepoError),
    #[error(transparent)]
    Volume(#[from] VolumeError),
    #[error(transparent)]
    Cache(#[from] CacheError),
    #[error(transparent)]
    Serve(#[from] ServeError),
    #[error("can't {0}: {1}")]
    System(&'static str, io::Error),
    #[error("can't listen on {}: {source}", path.display())]
    Control { path: PathBuf, source: io::Error },
    #[error("can't listen on {address}: {source}")]
    ControlTcp { address: SocketAddr, source: io::Error },
    #[error(transparent)]
    Token(#[from] TokenError),
    #[error("no state directory: neither --state-dir, HORCRUX_STATE_DIR, XDG_STATE_HOME nor HOME is set")]
    NoStateDir,
    #[error("{0} volumes could not be flushed; what they acknowledged since their last flush may be lost")]
    NotFlushed(usize),
}

/// Serves until SIGTERM or SIGINT.
pub fn run(args: Args) -> Result<(), Error> {
    if args.names.is_empty() && rustix::process::geteuid().is_root() {
        // Before there is any other thread. Who is not root can attach no device.
        let missing = horcrux::kernel::memory::hold();
        let reasons = [("mlockall", missing.lock), ("PR_SET_IO_FLUSHER", missing.flusher)];
        for (what, error) in reasons.into_iter().filter_map(|(what, error)| Some((what, error?))) {
            tracing::warn!(what, %error, "when memory runs out, an attached device may stand still");
        }
    }
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()
        .map_err(|error| Error::System("start the runtime", error))?;
    let result = runtime.block_on(serve(args));
    // A request that waits for a disk or a repository that never answers must not keep the process.
    runtime.shutdown_background();
    result
}

/// Two volumes of one image would share a name and a delta.
fn refuse_name_twice(names: &[Name]) -> Result<(), ServeError> {
    let mut seen = BTreeSet::new();
    match names.iter().find(|name| !seen.insert(&name.image)) {
        Some(name) => Err(ServeError::NameTwice { name: name.image.to_string() }),
        None => Ok(()),
    }
}

async fn serve(args: Args) -> Result<(), Error> {
    refuse_name_twice(&args.names)?;
    let stop = stop_on_signals()?;
    let state_dir = args.state_dir.or_else(default_state_dir).ok_or(Error::NoStateDir)?;
    let opening = move || StateDir::open(&state_dir);
    let state = tokio::task::spawn_blocking(opening).await.map_err(|_| VolumeError::Stopped)??;
    // The sockets first: if one is taken, nothing else is touched. Clients wait in the queue until the exports are there.
    let mut endpoints: Vec<Endpoint> = args.unix.map(Endpoint::Unix).into_iter().collect();
    endpoints.extend(args.listen.map(Endpoint::Tcp));
    if endpoints.is_empty() {
        endpoints.push(Endpoint::Unix(state.run_dir().join("nbd.sock")));
    }
    let listeners = endpoints.iter().map(Listener::bind).collect::<Result<Vec<_>, _>>()?;
    if args.names.is_empty() {
        let control = args.control_listen.zip(args.control_token);
        let options = daemon::Options {
            control: control.map(|(address, token)| Remote { address, token }),
            cache_size: args.cache_size,
            handshake_limit: Duration::from_secs(args.handshake_limit),
            host: HostOptions {
                remote_timeout: Duration::from_secs(args.remote_timeout),
                prefetch_rate: args.prefetch_rate,
                dead_timeout: Duration::from_secs(args.dead_timeout),
            },
        };
        return daemon::run(state, listeners, options, stop).await;
    }

    let repository =
        open_repository(&args.access, Duration::from_secs(args.remote_timeout), &state, &args.names).await?;
    let (cache_dir, options) = (state.cache_dir(), CacheOptions::new(args.cache_size));
    let opening = move || Cache::open(&cache_dir, options);
    let cache = tokio::task::spawn_blocking(opening).await.map_err(|_| VolumeError::Stopped)??;
    let access: Vec<_> = args.access.iter().map(|url| store::url::lasting(url)).collect::<Result<_, _>>()?;
    let mut volumes = Vec::new();
    for name in args.names {
        let source = Source { access: access.clone(), image: name.image, reference: name.reference };
        let volume = Volume::of_image(&state, &cache, &repository, &source, args.read_only).await?;
        volumes.push(Arc::new(volume));
    }

    let exports = Arc::new(Exports::default());
    volumes.iter().try_for_each(|volume| exports.add(export(volume)))?;
    announce(&volumes, &listeners).map_err(|error| Error::System("tell where it listens", error))?;
    let handshake_limit = Duration::from_secs(args.handshake_limit);
    let options = ServerOptions { handshake_limit, ..ServerOptions::default() };
    let server = Server::new(exports, listeners, options, stop.clone());
    let fetching: Vec<_> = volumes
        .iter()
        .map(|volume| {
            let work = volume.clone().prefetch(args.prefetch.into(), args.prefetch_rate, stop.clone());
            tokio::spawn(work)
        })
        .collect();
    let failed = server.run().await;
    for work in fetching {
        // Its last act is to keep a list; the server's stop has told it.
        let _ = tokio::time::timeout(LAST_ACT, work).await;
    }
    ended(&cache, failed)
}

/// The last words, and what came of it.
pub fn ended(cache: &Cache, failed: usize) -> Result<(), Error> {
    let stats = cache.stats();
    let (hits, misses, fetched, healed) = (stats.hits, stats.misses, stats.fetched.0, stats.healed);
    tracing::info!(hits, misses, fetched_bytes = fetched, healed, cached_bytes = stats.used.0, "stopped");
    if failed > 0 { Err(Error::NotFlushed(failed)) } else { Ok(()) }
}

/// Opens the repository; where it is out of reach, goes on with what is known of it, if all the volumes are here.
async fn open_repository(
    access: &[String],
    deadline: Duration,
    state: &StateDir,
    names: &[Name],
) -> Result<Repository, Error> {
    let options = RetryOptions { deadline, ..RetryOptions::default() };
    let store = store::url::open_all(access, options)?;
    store.expect_reads(FIRST_READS);
    let error = match Repository::open(store).await {
        Ok(repository) => return Ok(repository),
        Err(error) => error,
    };
    let known = if error.is_away() { known_repository(state, names)? } else { None };
    let Some(id) = known else { return Err(error.into()) };
    tracing::warn!(%error, "the repository is out of reach: serving what is here");
    // It has answered on another day.
    let store = store::url::open_all(access, RetryOptions { first_contact: deadline, ..options })?;
    Ok(Repository::opened_before(store, id))
}

/// The id of the repository that all these volumes are of; `None` where one of them was never here.
fn known_repository(state: &StateDir, names: &[Name]) -> Result<Option<[u8; 16]>, VolumeError> {
    let mut known = None;
    for name in names {
        let record = VolumeRecord::load(&state.volume_dir(&name.image.to_string()))?;
        let id = record.and_then(|record| record.repository_id());
        if id.is_none() || known.is_some_and(|known| Some(known) != id) {
            return Ok(None);
        }
        known = id;
    }
    Ok(known)
}

fn export(volume: &Volume) -> Arc<Export> {
    Arc::new(Export::new(volume.name().to_owned(), volume.record().describe(), volume.device().clone()))
}

/// What is encoded in the socket's path in a URI: all but RFC 3986's unreserved characters and the slash.
const IN_URI: &AsciiSet = &NON_ALPHANUMERIC.remove(b'/').remove(b'-').remove(b'.').remove(b'_').remove(b'~');

/// The URI of an export on a Unix socket.
pub fn unix_uri(name: &str, socket: &Path) -> String {
    format!("nbd+unix:///{name}?socket={}", percent_encode(socket.as_os_str().as_bytes(), IN_URI))
}

/// Says where each export is and how to attach it. Standard output is read by people and scripts: one paragraph for each export.
fn announce(volumes: &[Arc<Volume>], listeners: &[Listener]) -> io::Result<()> {
    use std::io::Write;
    let mut out = io::stdout().lock();
    for volume in volumes {
        let record = volume.record();
        let access = if volume.device().is_read_only() { ", read-only" } else { "" };
        let size = volume.device().size().human();
        writeln!(out, "serving {} ({size}{access}, commit {})", volume.name(), record.commit)?;
        if let Some(newer) = volume.newer() {
            writeln!(out, "  its branch has moved on to {newer}; this volume stays where its changes are")?;
        }
        for listener in listeners {
            let name = volume.name();
            match listener.endpoint()? {
                Endpoint::Unix(path) => {
                    let path = std::path::absolute(&path)?;
                    writeln!(out, "  {}", unix_uri(name, &path))?;
                    let path = path.display();
                    writeln!(out, "  attach: nbd-client -unix {path} -N {name} /dev/nbd0 -b 512")?;
                }
                Endpoint::Tcp(address) => {
                    writeln!(out, "  nbd://{address}/{name}")?;
                    let (ip, port) = (address.ip(), address.port());
                    writeln!(out, "  attach: nbd-client {ip} {port} -N {name} /dev/nbd0 -b 512")?;
                }
            }
        }
    }
    out.flush()
}

/// A token that SIGTERM and SIGINT cancel; a second one ends the process at once.
fn stop_on_signals() -> Result<CancellationToken, Error> {
    let failed = |error| Error::System("listen for signals", error);
    let mut term = signal(SignalKind::terminate()).map_err(failed)?;
    let mut int = signal(SignalKind::interrupt()).map_err(failed)?;
    let stop = CancellationToken::new();
    let token = stop.clone();
    tokio::spawn(async move {
        tokio::select! { _ = term.recv() => {}, _ = int.recv() => {} }
        tracing::info!("stopping: requests in flight are finished and flushed; a second signal ends at once");
        token.cancel();
        tokio::select! { _ = term.recv() => {}, _ = int.recv() => {} }
        std::process::exit(1);
    });
    Ok(stop)
}
