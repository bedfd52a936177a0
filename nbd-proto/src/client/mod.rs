//! The client half: [`Handshake`] (one option at a time) or [`Connect`] (the usual sequence of them), then [`Transmission`].
//!
//! Enters: a server's bytes and the program's wishes. Leaves: bytes to send, events, replies.
//! Invariant: the server is not trusted: every length, offset, cookie and order of chunks is checked against what was asked,
//! before anything is allocated for it.

mod connect;
mod error;
mod handshake;
mod pending;
mod reply;
mod transmission;

pub use connect::{Connect, ConnectError, Wish};
pub use error::{StreamError, UsageError};
pub use handshake::{Event, Fact, Handshake, Negotiated, OptionError};
pub use reply::{Body, Decoded, Reply, Status};
pub use transmission::{Call, Transmission, encode_request};
