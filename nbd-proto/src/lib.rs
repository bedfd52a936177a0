//! The NBD protocol as a state machine: no sockets, no clock, no runtime, no dependencies.
//!
//! Enters: bytes from a peer, and the answers of the program around it. Leaves: bytes for the peer, and events and
//! requests for that program. [`server`] is the half an export sits behind, [`client`] the half that uses one; each has a
//! `Handshake` and a `Transmission`. What both speak (flags, commands, errors, facts about an export) is at the top.
//!
//! Invariant: no bytes from a peer can panic, hang or over-allocate; and however they are cut, they mean the same.
//! Payloads are announced by their length and moved by the program; the machine never holds one.
//!
//! The specification is `doc/proto.md` of NetworkBlockDevice/nbd; its names are kept, and PROTOCOL.md says which of its
//! parts are here.
#![cfg_attr(not(test), warn(clippy::unwrap_used))]
#![forbid(unsafe_code)]

mod bytes;
pub mod client;
mod command;
mod errno;
mod export;
mod flags;
mod mode;
pub mod server;
mod status;
mod validate;
pub mod wire;

pub use command::{Command, ReplyTo, Request};
pub use errno::Errno;
pub use export::{BlockSizes, Context, ExportFacts, ExportInfo};
pub use flags::{CommandFlags, TransmissionFlags};
pub use mode::HeaderMode;
pub use status::{Extent, STATE_HOLE, STATE_ZERO, StatusQuery};
pub use validate::validate;
