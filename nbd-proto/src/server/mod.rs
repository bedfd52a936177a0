//! The server half: [`Handshake`] until an export is chosen, then [`Transmission`] for requests and [`Replies`] for answers.
//!
//! Enters: a client's bytes, and the answers of the program to [`Event`]s. Leaves: bytes to send, events, requests.
//! Invariant: it knows no exports; what it tells a client of one is what the program answered in that session.

mod error;
mod handshake;
mod option;
mod reply;
mod transmission;

pub use error::StreamError;
pub use handshake::{Config, Event, Handshake, Lookup, Negotiated, Purpose, Refusal, Tls};
pub use reply::{Chunks, Replies};
pub use transmission::{Decoded, Transmission};
