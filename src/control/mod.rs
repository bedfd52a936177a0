//! The control API: HTTP and JSON over a Unix socket, by which the command line and the Docker driver ask for volumes.
//!
//! Enters: requests. Leaves: JSON, and an OpenAPI document that describes all of it. Invariants: what is begun for a client is brought to its end when
//! that client goes away; a client that stalls, floods or sends too much is cut off.

pub mod api;
pub mod client;
mod failure;
mod files;
mod listener;
mod metrics;
mod routes;
mod server;
mod stream;
mod tls;
mod token;

pub use client::{Client, ClientError, Made};
pub use listener::{Listener, bind};
pub use routes::router;
pub use server::serve;
pub use stream::Streamed;
pub use tls::{TlsError, TlsFiles};
pub use token::{Token, TokenError, guarded};

use std::path::{Path, PathBuf};

/// Where the daemon of a state directory listens.
pub fn socket_of(state_dir: &Path) -> PathBuf {
    state_dir.join("run").join("control.sock")
}
