//! The server half: [`Handshake`] until an export is chosen, then [`Transmission`] for requests and [`Replies`] for answers.
//!
//! Enters: a client's bytes, and the answers of the program to [`Event`]s. Leaves: bytes to send, events, requests.
//! Invariant: it knows no exports; what it tells a client of one is what the program answered in that session.
//!
//! A connection's life, with the sockets left out:
//!
//! ```
//! use nbd_proto::server::{Config, Decoded, Event, Handshake, Refusal};
//! use nbd_proto::{BlockSizes, Command, ExportInfo, TransmissionFlags, validate};
//!
//! let export = ExportInfo {
//!     name: "vol".to_owned(),
//!     description: String::new(),
//!     size: 1 << 20,
//!     flags: TransmissionFlags::SEND_FLUSH | TransmissionFlags::SEND_DF,
//!     block_sizes: BlockSizes::DEFAULT,
//!     contexts: vec!["base:allocation".to_owned()],
//! };
//! let mut handshake = Handshake::new(Config::default());
//! # let mut from_client = vec![0, 0, 0, 3];
//! # from_client.extend_from_slice(b"IHAVEOPT\0\0\0\x01\0\0\0\x03vol");
//! # from_client.extend_from_slice(b"\x25\x60\x95\x13\0\0\0\x01COOKIE\0\0\0\0\0\0\0\0\x10\0\0\0\0\x04data");
//! let mut input: Vec<u8> = from_client; // what was read and not consumed yet
//! let negotiated = 'handshake: loop {
//!     let used = handshake.handle_input(&input)?;
//!     input.drain(..used);
//!     while let Some(event) = handshake.poll_event() {
//!         match event {
//!             Event::Lookup(lookup) if lookup.name == export.name => handshake.accept(&export),
//!             Event::Lookup(_) => handshake.refuse(Refusal::Unknown, "no such volume")?,
//!             Event::List => handshake.list([("vol", "")]),
//!             Event::StartTls | Event::Aborted => return Ok(()),
//!             Event::Done(negotiated) => break 'handshake negotiated,
//!         }
//!     }
//!     // Send and clear `handshake.output()`, then read more into `input`.
//! };
//! // Send the rest of `handshake.output()`.
//! let (mut transmission, facts) = (negotiated.transmission(), negotiated.facts());
//! let replies = transmission.replies();
//! let mut output = Vec::new();
//! if let Decoded::Request(request) = transmission.decode(&input)? {
//!     let payload = transmission.header_len()..transmission.header_len() + request.payload as usize;
//!     match validate(&request, &facts) {
//!         Ok(()) if request.command == Command::Write => {
//!             assert_eq!(&input[payload], b"data"); // move it to where it belongs
//!             replies.success(&mut output, request.reply_to());
//!         }
//!         Ok(()) => unreachable!("the example only writes"),
//!         // The payload is skipped.
//!         Err(errno) => replies.error(&mut output, request.reply_to(), errno, ""),
//!     }
//!     transmission.payload_done();
//! }
//! # assert_eq!(output, b"\x67\x44\x66\x98\0\0\0\0COOKIE\0\0");
//! # Ok::<(), nbd_proto::server::StreamError>(())
//! ```

mod error;
mod event;
mod handshake;
mod option;
mod reply;
mod transmission;

pub use error::StreamError;
pub use event::{Config, Event, Lookup, Negotiated, Purpose, Refusal, Tls};
pub use handshake::Handshake;
pub use reply::{Chunks, Replies};
pub use transmission::{Decoded, Transmission};
