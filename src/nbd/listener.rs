//! Sockets to listen on and connections to serve: Unix or TCP.
//!
//! Invariant: a socket file another server listens on is never taken away; one that a dead server left behind is.

use std::io;
use std::net::SocketAddr;
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileTypeExt;
use std::path::{Path, PathBuf};
use std::pin::Pin;
use std::task::{Context, Poll};

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{TcpListener, TcpStream, UnixListener, UnixStream};

use super::error::ServeError;

/// Where to listen.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Endpoint {
    /// A Unix socket at this path.
    Unix(PathBuf),
    /// A TCP address.
    Tcp(SocketAddr),
}

impl std::fmt::Display for Endpoint {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Endpoint::Unix(path) => write!(f, "unix:{}", path.display()),
            Endpoint::Tcp(address) => write!(f, "tcp:{address}"),
        }
    }
}

/// A socket that is listened on. A Unix socket's file goes with it.
pub enum Listener {
    /// Unix.
    Unix(UnixListener, PathBuf),
    /// TCP.
    Tcp(TcpListener),
}

/// A connection that was accepted, not yet in a runtime.
pub enum Accepted {
    /// Unix.
    Unix(std::os::unix::net::UnixStream),
    /// TCP.
    Tcp(std::net::TcpStream),
}

impl Listener {
    /// Starts to listen.
    pub fn bind(endpoint: &Endpoint) -> Result<Listener, ServeError> {
        let failed = |source| ServeError::Bind { endpoint: endpoint.clone(), source };
        match endpoint {
            Endpoint::Unix(path) => {
                clear_stale_socket(path)?;
                let listener = UnixListener::bind(path).map_err(failed)?;
                Ok(Listener::Unix(listener, path.clone()))
            }
            Endpoint::Tcp(address) => {
                let listener = std::net::TcpListener::bind(address).map_err(failed)?;
                listener.set_nonblocking(true).map_err(failed)?;
                Ok(Listener::Tcp(TcpListener::from_std(listener).map_err(failed)?))
            }
        }
    }

    /// Where it listens, with the port the system chose.
    pub fn endpoint(&self) -> io::Result<Endpoint> {
        match self {
            Listener::Unix(_, path) => Ok(Endpoint::Unix(path.clone())),
            Listener::Tcp(listener) => listener.local_addr().map(Endpoint::Tcp),
        }
    }

    /// The next connection.
    pub async fn accept(&self) -> io::Result<Accepted> {
        match self {
            Listener::Unix(listener, _) => Ok(Accepted::Unix(listener.accept().await?.0.into_std()?)),
            Listener::Tcp(listener) => {
                let (stream, _) = listener.accept().await?;
                // Replies are written whole; waiting to fill a segment would only delay them.
                stream.set_nodelay(true)?;
                Ok(Accepted::Tcp(stream.into_std()?))
            }
        }
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        if let Listener::Unix(_, path) = self {
            // If it is gone already, so much the better.
            let _ = std::fs::remove_file(path);
        }
    }
}

/// Makes way for a socket at `path` if what is there is a socket nobody listens on.
fn clear_stale_socket(path: &Path) -> Result<(), ServeError> {
    let io = |source| ServeError::Bind { endpoint: Endpoint::Unix(path.to_owned()), source };
    match std::fs::symlink_metadata(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        Err(error) => Err(io(error)),
        Ok(metadata) if !metadata.file_type().is_socket() => {
            Err(ServeError::NotASocket { path: path.to_owned() })
        }
        Ok(_) => match std::os::unix::net::UnixStream::connect(path) {
            Ok(_) => Err(ServeError::SocketInUse { path: path.to_owned() }),
            Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => {
                std::fs::remove_file(path).map_err(io)
            }
            Err(error) => Err(io(error)),
        },
    }
}

impl Accepted {
    /// Enters the current runtime.
    pub fn into_stream(self) -> io::Result<Stream> {
        match self {
            Accepted::Unix(stream) => UnixStream::from_std(stream).map(Stream::Unix),
            Accepted::Tcp(stream) => TcpStream::from_std(stream).map(Stream::Tcp),
        }
    }

    /// Who is at the other end, for logs.
    pub fn describe(&self) -> String {
        match self {
            Accepted::Unix(_) => "unix".to_owned(),
            Accepted::Tcp(stream) => {
                stream.peer_addr().map_or_else(|_| "tcp".to_owned(), |address| address.to_string())
            }
        }
    }
}

/// A connection in a runtime.
pub enum Stream {
    /// Unix.
    Unix(UnixStream),
    /// TCP.
    Tcp(TcpStream),
}

impl Stream {
    /// Leaves the runtime: a descriptor whose calls block.
    pub fn into_blocking(self) -> io::Result<OwnedFd> {
        match self {
            Stream::Unix(stream) => {
                let stream = stream.into_std()?;
                stream.set_nonblocking(false)?;
                Ok(stream.into())
            }
            Stream::Tcp(stream) => {
                let stream = stream.into_std()?;
                stream.set_nonblocking(false)?;
                Ok(stream.into())
            }
        }
    }
}

impl AsyncRead for Stream {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Stream::Unix(stream) => Pin::new(stream).poll_read(cx, buf),
            Stream::Tcp(stream) => Pin::new(stream).poll_read(cx, buf),
        }
    }
}

impl AsyncWrite for Stream {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        match self.get_mut() {
            Stream::Unix(stream) => Pin::new(stream).poll_write(cx, bytes),
            Stream::Tcp(stream) => Pin::new(stream).poll_write(cx, bytes),
        }
    }

    fn poll_flush(self: Pin<&mut Self>, _cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Stream::Unix(stream) => Pin::new(stream).poll_shutdown(cx),
            Stream::Tcp(stream) => Pin::new(stream).poll_shutdown(cx),
        }
    }
}
