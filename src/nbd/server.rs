//! Listening, accepting, stopping.
//!
//! Invariant: when [`Server::run`] returns, no connection is left, and every device is flushed.

use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::Duration;

use tokio::runtime::Handle;
use tokio::sync::Semaphore;
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use super::connection::{self, ConnectionError, End};
use super::error::ServeError;
use super::exports::Exports;
use super::handshake::{self, Chosen, HandshakeError};
use super::listener::{Accepted, Listener};

/// Connections at a time, over all exports; more wait to be accepted.
const MAX_CONNECTIONS: usize = 1024;
/// After a failed accept (as a rule for want of descriptors) the next one waits.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);
/// What was written and not flushed is committed after this long, as kernels do.
const COMMIT_EVERY: Duration = Duration::from_secs(5);
/// A connection's stack: its frames are shallow, its buffers on the heap.
const STACK: usize = 512 << 10;

/// How a server behaves.
#[derive(Clone, Copy, Debug)]
pub struct ServerOptions {
    /// After a stop, requests in flight have this long.
    pub grace: Duration,
    /// A client has this long to choose an export.
    pub handshake_limit: Duration,
}

impl Default for ServerOptions {
    fn default() -> ServerOptions {
        ServerOptions { grace: Duration::from_secs(10), handshake_limit: Duration::from_secs(30) }
    }
}

/// Exports and the sockets they are served on.
pub struct Server {
    exports: Arc<Exports>,
    listeners: Vec<Listener>,
    options: ServerOptions,
}

impl Server {
    /// A server of these exports, which may come and go while it runs.
    pub fn new(exports: Arc<Exports>, listeners: Vec<Listener>, options: ServerOptions) -> Server {
        Server { exports, listeners, options }
    }

    /// Serves until `stop` is cancelled; then accepts no more, finishes what is in flight, flushes and returns how many flushes failed.
    pub async fn run(self, stop: CancellationToken) -> usize {
        let connections = TaskTracker::new();
        let places = Arc::new(Semaphore::new(MAX_CONNECTIONS));
        let mut loops = JoinSet::new();
        for listener in self.listeners {
            let accepting = Accepting {
                exports: self.exports.clone(),
                places: places.clone(),
                connections: connections.clone(),
                limit: self.options.handshake_limit,
                stop: stop.clone(),
            };
            loops.spawn(accept(listener, accepting));
        }
        loops.spawn(commit_regularly(self.exports.clone(), stop.clone()));
        while loops.join_next().await.is_some() {}
        connections.close();
        // No connection begins any more that does not see the stop; those that wait for their clients are woken.
        let exports = self.exports.close();
        if tokio::time::timeout(self.options.grace, connections.wait()).await.is_err() {
            tracing::warn!(left = connections.len(), "connections did not end in time");
        }
        let mut failed = 0;
        for export in exports {
            failed += usize::from(export.flush_at_end().await.is_err());
        }
        failed
    }
}

/// What every connection a listener accepts is given.
struct Accepting {
    exports: Arc<Exports>,
    places: Arc<Semaphore>,
    connections: TaskTracker,
    limit: Duration,
    stop: CancellationToken,
}

async fn accept(listener: Listener, accepting: Accepting) {
    let Accepting { exports, places, connections, limit, stop } = accepting;
    loop {
        let accepted = tokio::select! {
            () = stop.cancelled() => return,
            accepted = next(&listener, &places) => accepted,
        };
        let (accepted, place) = match accepted {
            Ok(accepted) => accepted,
            Err(error) => {
                tracing::warn!(%error, "can't accept a connection");
                tokio::time::sleep(ACCEPT_PAUSE).await;
                continue;
            }
        };
        let client =
            Client { exports: exports.clone(), limit, stop: stop.clone(), shared: Handle::current() };
        // The place and the token go with the connection, so that its end is counted.
        let token = connections.token();
        tokio::spawn(client.serve(accepted, (place, token)));
    }
}

async fn next(
    listener: &Listener,
    places: &Arc<Semaphore>,
) -> std::io::Result<(Accepted, tokio::sync::OwnedSemaphorePermit)> {
    let place = places.clone().acquire_owned().await.map_err(std::io::Error::other)?;
    Ok((listener.accept().await?, place))
}

/// What a connection needs of its server.
struct Client {
    exports: Arc<Exports>,
    /// How long the handshake may take.
    limit: Duration,
    stop: CancellationToken,
    shared: Handle,
}

impl Client {
    /// The life of a connection: the handshake here, then a thread of its own, which `kept` goes with.
    async fn serve(self, accepted: Accepted, kept: impl Send + 'static) {
        let client = accepted.describe();
        let begun = async {
            let mut stream = accepted.into_stream()?;
            match handshake::run(&mut stream, &self.exports, self.limit).await? {
                Some(chosen) => Ok(Some((stream.into_blocking()?, chosen))),
                None => Ok(None),
            }
        };
        let chosen = tokio::select! {
            () = self.stop.cancelled() => return,
            chosen = begun => chosen,
        };
        let (socket, chosen) = match chosen {
            Ok(Some(chosen)) => chosen,
            Ok(None) => return,
            Err(HandshakeError::Io(error)) => {
                return tracing::debug!(client, %error, "connection lost in the handshake");
            }
            Err(error) => return tracing::warn!(client, %error, "handshake failed"),
        };
        let thread = std::thread::Builder::new().name("nbd-connection".to_owned()).stack_size(STACK);
        let spawned = thread.spawn(move || {
            serve(&client, socket, chosen, self.shared);
            drop(kept);
        });
        if let Err(error) = spawned {
            tracing::warn!(error = %ServeError::Thread(error), "connection refused");
        }
    }
}

/// A connection's thread.
fn serve(client: &str, socket: OwnedFd, chosen: Chosen, shared: Handle) {
    let export = chosen.export.name().to_owned();
    tracing::info!(client, export, mode = ?chosen.negotiated.mode, "connected");
    match connection::run(socket, chosen, shared) {
        Ok(End::Vanished) => tracing::warn!(client, export, "the client vanished with requests under way"),
        Ok(end) => tracing::info!(client, export, ?end, "connection closed"),
        Err(ConnectionError::Protocol(error)) => {
            tracing::warn!(client, export, %error, "the client broke the protocol, connection closed");
        }
        Err(ConnectionError::Io(error)) => tracing::warn!(client, export, %error, "connection lost"),
    }
}

/// Commits what nobody flushes, so that a crash loses seconds and not hours, and the log in memory stays short.
async fn commit_regularly(exports: Arc<Exports>, stop: CancellationToken) {
    loop {
        tokio::select! {
            () = stop.cancelled() => return,
            () = tokio::time::sleep(COMMIT_EVERY) => {}
        }
        for export in exports.all_open() {
            // One that takes long holds up nobody else's.
            tokio::spawn(async move { export.commit_unflushed().await });
        }
    }
}
