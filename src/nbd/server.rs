//! Listening, accepting, stopping.
//!
//! Invariant: when [`Server::run`] returns, no connection is left, and every device is flushed.

use std::future::Future;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use tokio::runtime::Handle;
use tokio::sync::{Semaphore, oneshot};
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use super::budget::Budget;
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
    listeners: Vec<Listener>,
    grace: Duration,
    shared: Arc<Shared>,
}

/// What the connections of a server share.
struct Shared {
    exports: Arc<Exports>,
    connections: TaskTracker,
    budget: Arc<Budget>,
    /// How long a handshake may take.
    limit: Duration,
    stop: CancellationToken,
}

/// Brings a server connections that come from this process itself.
#[derive(Clone)]
pub struct Connector(Arc<Shared>);

impl Connector {
    /// Serves a client at the other end of `socket`. What is returned is ready once that connection has ended. To be called in the server's runtime.
    pub fn serve(&self, socket: UnixStream) -> std::io::Result<Ended> {
        socket.set_nonblocking(true)?;
        let (kept, ended) = oneshot::channel::<()>();
        // These don't wait for a place: a device that others wait for is at their other end.
        self.0.serve(Accepted::Unix(socket), kept);
        Ok(Ended(ended))
    }
}

/// A connection's end.
#[derive(Debug)]
pub struct Ended(oneshot::Receiver<()>);

impl Future for Ended {
    type Output = ();

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<()> {
        // Nothing is sent: the sender goes with its connection.
        Pin::new(&mut self.0).poll(cx).map(drop)
    }
}

impl Server {
    /// A server of these exports, which may come and go while it runs, until `stop` is cancelled.
    pub fn new(
        exports: Arc<Exports>,
        listeners: Vec<Listener>,
        options: ServerOptions,
        stop: CancellationToken,
    ) -> Server {
        let ServerOptions { grace, handshake_limit: limit } = options;
        Server {
            listeners,
            grace,
            shared: Arc::new(Shared {
                exports,
                connections: TaskTracker::new(),
                budget: Arc::default(),
                limit,
                stop,
            }),
        }
    }

    /// For connections that don't come through a listener.
    pub fn connector(&self) -> Connector {
        Connector(self.shared.clone())
    }

    /// Serves until the stop; then accepts no more, finishes what is in flight, flushes and returns how many flushes failed.
    pub async fn run(self) -> usize {
        let Server { listeners, grace, shared } = self;
        let places = Arc::new(Semaphore::new(MAX_CONNECTIONS));
        let mut loops = JoinSet::new();
        for listener in listeners {
            loops.spawn(accept(listener, shared.clone(), places.clone()));
        }
        loops.spawn(commit_regularly(shared.exports.clone(), shared.stop.clone()));
        while loops.join_next().await.is_some() {}
        shared.connections.close();
        // No connection begins any more that does not see the stop; those that wait for their clients are woken.
        let exports = shared.exports.close();
        if tokio::time::timeout(grace, shared.connections.wait()).await.is_err() {
            tracing::warn!(left = shared.connections.len(), "connections did not end in time");
        }
        let mut failed = 0;
        for export in exports {
            failed += usize::from(export.flush_at_end().await.is_err());
        }
        failed
    }
}

async fn accept(listener: Listener, shared: Arc<Shared>, places: Arc<Semaphore>) {
    loop {
        let accepted = tokio::select! {
            () = shared.stop.cancelled() => return,
            accepted = next(&listener, &places) => accepted,
        };
        match accepted {
            // The place goes with the connection.
            Ok((accepted, place)) => shared.serve(accepted, place),
            Err(error) => {
                tracing::warn!(%error, "can't accept a connection");
                tokio::time::sleep(ACCEPT_PAUSE).await;
            }
        }
    }
}

async fn next(
    listener: &Listener,
    places: &Arc<Semaphore>,
) -> std::io::Result<(Accepted, tokio::sync::OwnedSemaphorePermit)> {
    let place = places.clone().acquire_owned().await.map_err(std::io::Error::other)?;
    Ok((listener.accept().await?, place))
}

impl Shared {
    /// Serves a client in a task of its own; `kept` goes with the connection, and so does a token, so that its end is counted.
    fn serve(self: &Arc<Self>, accepted: Accepted, kept: impl Send + 'static) {
        let kept = (kept, self.connections.token());
        tokio::spawn(self.clone().converse(accepted, kept));
    }

    /// The life of a connection: the handshake here, then a thread of its own, which `kept` goes with.
    async fn converse(self: Arc<Self>, accepted: Accepted, kept: impl Send + 'static) {
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
        let runtime = Handle::current();
        let spawned = thread.spawn(move || {
            serve(&client, socket, chosen, runtime, self.budget.clone());
            drop(kept);
        });
        if let Err(error) = spawned {
            tracing::warn!(error = %ServeError::Thread(error), "connection refused");
        }
    }
}

/// A connection's thread.
fn serve(client: &str, socket: OwnedFd, chosen: Chosen, shared: Handle, budget: Arc<Budget>) {
    let export = chosen.export.name().to_owned();
    tracing::info!(client, export, mode = ?chosen.negotiated.mode, "connected");
    match connection::run(socket, chosen, shared, budget) {
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
