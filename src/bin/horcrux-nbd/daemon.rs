//! `horcrux-nbd serve` without a name: every volume of the state directory, and the control socket by which they are made and taken away.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use horcrux::cache::{Cache, CacheOptions};
use horcrux::control::{self, Token};
use horcrux::host::{Host, HostOptions};
use horcrux::nbd::{Endpoint, Listener, Server, ServerOptions};
use horcrux::units::ByteLen;
use horcrux::volume::{StateDir, VolumeError};
use sd_notify::NotifyState;
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;

use crate::serve::{Error, ended, unix_uri};

/// How the daemon is to be.
pub struct Options {
    /// Bytes of disk the cache may take.
    pub cache_size: ByteLen,
    /// A client has this long to choose an export.
    pub handshake_limit: Duration,
    /// How its volumes behave.
    pub host: HostOptions,
    /// Where else it may be controlled from; `None` is nowhere.
    pub control: Option<Remote>,
}

/// The control API over TCP.
pub struct Remote {
    /// Where it listens.
    pub address: SocketAddr,
    /// The file with the token.
    pub token: PathBuf,
}

impl Remote {
    async fn bind(&self) -> Result<(TcpListener, Token), Error> {
        let token = Token::load(&self.token)?;
        let failed = |source| Error::ControlTcp { address: self.address, source };
        let listener = TcpListener::bind(self.address).await.map_err(failed)?;
        if !self.address.ip().is_loopback() {
            tracing::warn!(address = %self.address, "the control API is plain HTTP: who sees the network sees the token");
        }
        Ok((listener, token))
    }
}

/// Runs until `stop` is cancelled.
pub async fn run(
    state: StateDir,
    listeners: Vec<Listener>,
    options: Options,
    stop: CancellationToken,
) -> Result<(), Error> {
    let path = control::socket_of(state.root());
    // The state directory is ours, so a socket that is there is a dead daemon's.
    let control = control::bind(&path).map_err(|source| Error::Control { path: path.clone(), source })?;
    let remote = match &options.control {
        Some(remote) => Some(remote.bind().await?),
        None => None,
    };
    let (cache_options, host_options) = (CacheOptions::new(options.cache_size), options.host);
    let stopping = stop.clone();
    let opening = move || {
        let cache = Cache::open(&state.cache_dir(), cache_options)?;
        Ok::<_, Error>(Host::open(state, cache, host_options, stopping)?)
    };
    let host = tokio::task::spawn_blocking(opening).await.map_err(|_| VolumeError::Stopped)??;
    let address = remote.as_ref().map(|(listener, _)| listener.local_addr()).transpose();
    let told = address.and_then(|address| announce(&host, &listeners, &path, address));
    told.map_err(|error| Error::System("tell where it listens", error))?;
    // Clients that come before the devices are adopted wait in the queues.
    if let Err(error) = sd_notify::notify(&[NotifyState::Ready]) {
        tracing::debug!(%error, "the service manager was not told");
    }
    let server_options =
        ServerOptions { handshake_limit: options.handshake_limit, ..ServerOptions::default() };
    let server = Server::new(host.exports().clone(), listeners, server_options, stop.clone());
    host.connect_through(server.connector());
    host.adopt().await;
    host.resume_commits().await;
    let router = control::router(host.clone());
    let from_afar = async {
        if let Some((listener, token)) = remote {
            let router = control::guarded(router.clone(), token);
            control::serve(control::Listener::Tcp(listener), router, stop.clone()).await;
        }
    };
    let (failed, (), ()) =
        tokio::join!(server.run(), control::serve(control, router.clone(), stop.clone()), from_afar);
    host.stopped().await;
    // If it is gone already, so much the better.
    let _ = std::fs::remove_file(&path);
    ended(host.cache(), failed)
}

fn announce(
    host: &Arc<Host>,
    listeners: &[Listener],
    control: &Path,
    from_afar: Option<SocketAddr>,
) -> std::io::Result<()> {
    use std::io::Write;
    let mut out = std::io::stdout().lock();
    let count = host.list().len();
    writeln!(
        out,
        "serving {count} volume{} of {}",
        if count == 1 { "" } else { "s" },
        host.state_dir().display()
    )?;
    for listener in listeners {
        match listener.endpoint()? {
            Endpoint::Unix(path) => writeln!(out, "  {}", unix_uri("VOLUME", &std::path::absolute(&path)?))?,
            Endpoint::Tcp(address) => writeln!(out, "  nbd://{address}/VOLUME")?,
        }
    }
    if let Some(address) = from_afar {
        writeln!(out, "  control over TCP: http://{address}")?;
    }
    writeln!(out, "  control: {}", control.display())?;
    out.flush()
}
