//! The server: exports over sockets.
//!
//! Enters: devices under names, endpoints to listen on. Leaves: replies. Invariant: a command that fails keeps its connection, a stream that is broken ends it;
//! after a stop nothing is cut short that was begun.
//!
//! A connection has a thread of its own. What can be done without waiting is done there, in the order it comes, so that a warm read costs
//! one receive and one send; what must wait becomes a task of the shared runtime, and its reply is sent when it is done, out of order. So nothing one client
//! does can hold up another, and one slow request does not hold up the client's others.

mod budget;
mod connection;
mod counts;
mod error;
mod export;
mod exports;
mod handshake;
mod listener;
mod mailbox;
mod output;
mod payload;
mod peers;
mod received;
mod reply;
mod request;
mod server;

pub use counts::{CommandCount, TIMES};
pub use error::ServeError;
pub use export::Export;
pub use exports::{Dormant, Exports};
pub use listener::{Endpoint, Listener};
pub use server::{Connector, Ended, Server, ServerOptions};
