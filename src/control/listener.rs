//! Where the API listens.

use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileTypeExt;
use std::path::Path;

use rustix::net::{
    AddressFamily, SocketAddrUnix, SocketFlags, SocketType, bind as bind_to, connect, listen, socket_with,
};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpListener, TcpStream, UnixListener};
use tokio_rustls::TlsAcceptor;

use super::tls::{self, TlsError, TlsFiles};

/// Clients that wait to be accepted.
const BACKLOG: i32 = 128;

/// Where clients come from.
pub enum Listener {
    /// This host, as far as the socket's permissions let them.
    Unix(UnixListener),
    /// A network.
    Tcp(TcpListener),
    /// A network, and who has a certificate there.
    Tls(TcpListener, TlsAcceptor),
}

/// A client.
pub(super) trait Stream: AsyncRead + AsyncWrite + Send + Unpin {}
impl<T: AsyncRead + AsyncWrite + Send + Unpin> Stream for T {}

/// A client that has connected, and may still have to say who it is.
pub(super) enum Accepted {
    Stream(Box<dyn Stream>),
    Tls(Box<tokio_rustls::Accept<TcpStream>>),
}

impl Accepted {
    /// The client, once it has said who it is.
    pub(super) async fn greeted(self) -> io::Result<Box<dyn Stream>> {
        Ok(match self {
            Accepted::Stream(stream) => stream,
            Accepted::Tls(handshake) => Box::new(handshake.await?),
        })
    }
}

impl Listener {
    /// A port with TLS, for who has a certificate.
    pub fn tls(listener: TcpListener, files: &TlsFiles) -> Result<Listener, TlsError> {
        Ok(Listener::Tls(listener, TlsAcceptor::from(tls::load(files)?)))
    }

    pub(super) async fn accept(&self) -> io::Result<Accepted> {
        Ok(match self {
            Listener::Unix(listener) => Accepted::Stream(Box::new(listener.accept().await?.0)),
            Listener::Tcp(listener) => Accepted::Stream(Box::new(from_network(listener).await?)),
            Listener::Tls(listener, acceptor) => {
                Accepted::Tls(Box::new(acceptor.accept(from_network(listener).await?)))
            }
        })
    }
}

async fn from_network(listener: &TcpListener) -> io::Result<TcpStream> {
    let (stream, _) = listener.accept().await?;
    // An answer is one write: waiting for more of it gains nothing.
    stream.set_nodelay(true)?;
    Ok(stream)
}

/// Listens on a Unix socket that is its owner's alone from its first moment on: who may ask for volumes may read them. A dead one's socket that is
/// there is replaced; one where somebody answers, or a file that is no socket, is refused. To be called in a runtime.
pub fn bind(path: &Path) -> io::Result<Listener> {
    match std::fs::symlink_metadata(path) {
        Ok(found) if !found.file_type().is_socket() => {
            return Err(io::Error::new(io::ErrorKind::AlreadyExists, "something that is no socket is there"));
        }
        Ok(_) if is_answered(path) => return Err(io::ErrorKind::AddrInUse.into()),
        Ok(_) => std::fs::remove_file(path)?,
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        Err(error) => return Err(error),
    }
    Ok(Listener::Unix(UnixListener::from_std(for_owner(path)?.into())?))
}

/// Whether a process listens there; does not wait for one that is too busy to accept.
fn is_answered(path: &Path) -> bool {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let connected = socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)
        .and_then(|socket| connect(&socket, &SocketAddrUnix::new(path)?));
    matches!(connected, Ok(()) | Err(rustix::io::Errno::AGAIN))
}

fn for_owner(path: &Path) -> rustix::io::Result<OwnedFd> {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let socket = socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
    // Before it has a name: the name is made with these permissions (unix(7), less the umask).
    rustix::fs::fchmod(&socket, rustix::fs::Mode::RUSR | rustix::fs::Mode::WUSR)?;
    bind_to(&socket, &SocketAddrUnix::new(path)?)?;
    listen(&socket, BACKLOG)?;
    Ok(socket)
}
