//! `horcrux-nbd serve` without a name: every volume of the state directory, and the control socket by which they are made and taken away.

use std::sync::Arc;
use std::time::Duration;

use horcrux::cache::{Cache, CacheOptions};
use horcrux::control;
use horcrux::host::{Host, HostOptions};
use horcrux::nbd::{Endpoint, Listener, Server, ServerOptions};
use horcrux::units::ByteLen;
use horcrux::volume::{StateDir, VolumeError};
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
    let (cache_options, host_options) = (CacheOptions::new(options.cache_size), options.host);
    let stopping = stop.clone();
    let opening = move || {
        let cache = Cache::open(&state.cache_dir(), cache_options)?;
        Ok::<_, Error>(Host::open(state, cache, host_options, stopping)?)
    };
    let host = tokio::task::spawn_blocking(opening).await.map_err(|_| VolumeError::Stopped)??;
    announce(&host, &listeners, &path).map_err(|error| Error::System("tell where it listens", error))?;
    let server_options =
        ServerOptions { handshake_limit: options.handshake_limit, ..ServerOptions::default() };
    let server = Server::new(host.exports().clone(), listeners, server_options, stop.clone());
    host.connect_through(server.connector());
    host.adopt().await;
    let (failed, ()) =
        tokio::join!(server.run(), control::serve(control, control::router(host.clone()), stop.clone()));
    host.stopped().await;
    // If it is gone already, so much the better.
    let _ = std::fs::remove_file(&path);
    ended(host.cache(), failed)
}

fn announce(host: &Arc<Host>, listeners: &[Listener], control: &std::path::Path) -> std::io::Result<()> {
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
    writeln!(out, "  control: {}", control.display())?;
    out.flush()
}
