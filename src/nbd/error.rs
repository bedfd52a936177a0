//! What can go wrong with serving.

use std::io;
use std::path::PathBuf;

use super::listener::Endpoint;

/// A server that can't start.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ServeError {
    /// The address can't be listened on.
    #[error("can't listen on {endpoint}: {source}")]
    Bind {
        /// Where.
        endpoint: Endpoint,
        /// The reason.
        source: io::Error,
    },
    /// A server listens there already.
    #[error("the socket {path} is in use by a running server")]
    SocketInUse {
        /// The socket.
        path: PathBuf,
    },
    /// Something else has the socket's name.
    #[error("{path} is there and is not a socket")]
    NotASocket {
        /// The path.
        path: PathBuf,
    },
    /// Two exports of one name.
    #[error("{name} is to be served twice")]
    NameTwice {
        /// The name.
        name: String,
    },
    /// Something is to be served that comes too late.
    #[error("the server is stopping")]
    Stopping,
    /// A thread could not be started.
    #[error("can't start a thread: {0}")]
    Thread(io::Error),
}
