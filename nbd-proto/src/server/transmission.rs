//! Requests of a connection, decoded one header at a time out of the program's own buffer.
//!
//! Enters: bytes. Leaves: a [`Request`], or how many bytes its header takes. Nothing is copied or allocated.
//! Invariant: headers and payloads alternate as announced; a header is never looked for inside a payload, whether the request
//! was good or not.

use crate::bytes::{u16_at, u32_at, u64_at};
use crate::command::{Command, Request};
use crate::flags::CommandFlags;
use crate::mode::HeaderMode;
use crate::server::{Replies, StreamError};
use crate::wire;

/// What [`Transmission::decode`] found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Decoded {
    /// Not a whole header: the input must hold this many bytes before another try.
    Need(usize),
    /// A request. [`Transmission::header_len`] bytes were its header; `request.payload` bytes follow.
    Request(Request),
}

/// The decoder of one connection's requests.
#[derive(Clone, Debug)]
pub struct Transmission {
    mode: HeaderMode,
    payload: u32,
    closed: bool,
}

impl Transmission {
    /// A decoder for the headers agreed on.
    pub const fn new(mode: HeaderMode) -> Self {
        Transmission { mode, payload: 0, closed: false }
    }

    /// The headers agreed on.
    #[inline]
    pub const fn mode(&self) -> HeaderMode {
        self.mode
    }

    /// Bytes every request header of this connection has.
    #[inline]
    pub const fn header_len(&self) -> usize {
        self.mode.request_len()
    }

    /// The encoder of this connection's replies.
    #[inline]
    pub const fn replies(&self) -> Replies {
        Replies::new(self.mode)
    }

    /// Decodes the header at the front of `input`. After a request, skip [`Transmission::header_len`] bytes of it; if the request has a
    /// payload, move that many bytes and call [`Transmission::payload_done`] before the next header.
    ///
    /// A bad command or flag is not an error here; [`crate::validate`] finds it, and the stream stays in step. An error is one
    /// of the stream, and ends the connection.
    #[inline]
    pub fn decode(&mut self, input: &[u8]) -> Result<Decoded, StreamError> {
        if self.payload != 0 {
            return Err(StreamError::PayloadOutstanding { length: self.payload });
        }
        if self.closed {
            return if input.is_empty() { Ok(Decoded::Need(1)) } else { Err(StreamError::AfterDisconnect) };
        }
        let request = match self.mode {
            HeaderMode::Simple | HeaderMode::Structured => compact(input)?,
            HeaderMode::Extended => extended(input)?,
        };
        let Some(request) = request else {
            return Ok(Decoded::Need(self.header_len()));
        };
        self.payload = request.payload;
        self.closed = request.command == Command::Disc;
        Ok(Decoded::Request(request))
    }

    /// The payload still to be moved; zero where a header comes next.
    #[inline]
    pub const fn payload_left(&self) -> u32 {
        self.payload
    }

    /// The payload of the last request has been moved or drained, all of it.
    #[inline]
    pub fn payload_done(&mut self) {
        self.payload = 0;
    }

    /// Whether the client sent `DISC`: finish what is in flight, then close.
    #[inline]
    pub const fn is_closed(&self) -> bool {
        self.closed
    }
}

#[inline]
fn compact(input: &[u8]) -> Result<Option<Request>, StreamError> {
    let Some(h) = input.first_chunk::<{ wire::REQUEST_LEN }>() else {
        return short(input, wire::REQUEST_MAGIC);
    };
    magic(u32_at(h, 0), wire::REQUEST_MAGIC)?;
    let command = Command::from_wire(u16_at(h, 6));
    let cookie = u64_at(h, 8);
    let length = u32_at(h, 24);
    let payload = if command == Command::Write { bounded(cookie, u64::from(length))? } else { 0 };
    let flags = CommandFlags(u16_at(h, 4));
    let offset = u64_at(h, 16);
    Ok(Some(Request { cookie, offset, length: u64::from(length), payload, flags, command }))
}

#[inline]
fn extended(input: &[u8]) -> Result<Option<Request>, StreamError> {
    let Some(h) = input.first_chunk::<{ wire::EXTENDED_REQUEST_LEN }>() else {
        return short(input, wire::EXTENDED_REQUEST_MAGIC);
    };
    magic(u32_at(h, 0), wire::EXTENDED_REQUEST_MAGIC)?;
    let command = Command::from_wire(u16_at(h, 6));
    let flags = CommandFlags(u16_at(h, 4));
    let cookie = u64_at(h, 8);
    let announced = u64_at(h, 24);
    // A write without PAYLOAD_LEN breaks the rules, but its payload is there all the same: every client that forgets the flag
    // sends the bytes.
    let has_payload = flags.contains(CommandFlags::PAYLOAD_LEN) || command == Command::Write;
    let payload = if has_payload { bounded(cookie, announced)? } else { 0 };
    let length = if has_payload && command != Command::Write { 0 } else { announced };
    Ok(Some(Request { cookie, offset: u64_at(h, 16), length, payload, flags, command }))
}

/// Garbage is refused at its first four bytes, not waited on for a whole header.
#[cold]
fn short(input: &[u8], expected: u32) -> Result<Option<Request>, StreamError> {
    if let Some(head) = input.first_chunk::<4>() {
        magic(u32::from_be_bytes(*head), expected)?;
    }
    Ok(None)
}

#[inline]
fn magic(got: u32, expected: u32) -> Result<(), StreamError> {
    if got == expected { Ok(()) } else { Err(StreamError::BadRequestMagic { got, expected }) }
}

#[inline]
fn bounded(cookie: u64, length: u64) -> Result<u32, StreamError> {
    let limit = wire::MAX_DRAIN;
    u32::try_from(length).ok().filter(|&n| n <= limit).ok_or(StreamError::PayloadTooLong {
        cookie,
        length,
        limit,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    // Written out from "Request message" by hand.
    const READ: [u8; 28] =
        [0x25, 0x60, 0x95, 0x13, 0, 0, 0, 0, 1, 2, 3, 4, 5, 6, 7, 8, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0x10, 0];
    const EXTENDED_WRITE: [u8; 32] = [
        0x21, 0xe4, 0x1c, 0x71, 0, 0x21, 0, 1, 0xff, 2, 3, 4, 5, 6, 7, 8, 0, 0, 0, 0, 0, 0, 0x20, 0, 0, 0, 0,
        0, 0, 0, 2, 0,
    ];

    fn with(mut bytes: [u8; 28], at: usize, patch: &[u8]) -> [u8; 28] {
        bytes[at..at + patch.len()].copy_from_slice(patch);
        bytes
    }

    #[test]
    fn a_compact_read_decodes_as_the_specification_lays_it_out() {
        let mut t = Transmission::new(HeaderMode::Simple);
        let expected = Request {
            cookie: 0x0102_0304_0506_0708,
            offset: 1 << 32,
            length: 4096,
            payload: 0,
            flags: CommandFlags::NONE,
            command: Command::Read,
        };
        assert_eq!(t.decode(&READ), Ok(Decoded::Request(expected)));
        assert_eq!(t.header_len(), 28);
    }

    #[test]
    fn an_extended_write_announces_its_payload_and_blocks_until_it_is_moved() {
        let mut t = Transmission::new(HeaderMode::Extended);
        let Ok(Decoded::Request(r)) = t.decode(&EXTENDED_WRITE) else { panic!("no request") };
        assert_eq!((r.command, r.offset, r.length, r.payload), (Command::Write, 0x2000, 512, 512));
        assert_eq!(r.flags, CommandFlags::FUA | CommandFlags::PAYLOAD_LEN);
        assert_eq!(t.decode(&EXTENDED_WRITE), Err(StreamError::PayloadOutstanding { length: 512 }));
        t.payload_done();
        assert!(matches!(t.decode(&EXTENDED_WRITE), Ok(Decoded::Request(_))));
    }

    #[test]
    fn a_header_cut_at_every_byte_asks_for_the_rest() {
        let mut t = Transmission::new(HeaderMode::Structured);
        for cut in 0..28 {
            assert_eq!(t.decode(&READ[..cut]), Ok(Decoded::Need(28)), "cut at {cut}");
        }
        let mut t = Transmission::new(HeaderMode::Extended);
        for cut in 0..32 {
            assert_eq!(t.decode(&EXTENDED_WRITE[..cut]), Ok(Decoded::Need(32)), "cut at {cut}");
        }
    }

    #[test]
    fn garbage_is_refused_at_its_fourth_byte() {
        let mut t = Transmission::new(HeaderMode::Simple);
        assert_eq!(t.decode(b"GET"), Ok(Decoded::Need(28)));
        assert!(matches!(t.decode(b"GET "), Err(StreamError::BadRequestMagic { .. })));
        // The extended magic is garbage to a connection that did not agree on it.
        assert!(matches!(t.decode(&EXTENDED_WRITE), Err(StreamError::BadRequestMagic { .. })));
    }

    #[test]
    fn a_write_of_all_ones_length_ends_the_connection_and_a_read_of_it_does_not() {
        let mut t = Transmission::new(HeaderMode::Simple);
        let huge = with(READ, 24, &[0xff; 4]);
        assert!(matches!(
            t.decode(&huge),
            Ok(Decoded::Request(Request { length: 0xffff_ffff, payload: 0, .. }))
        ));
        let huge = with(huge, 6, &[0, 1]);
        assert!(matches!(t.decode(&huge), Err(StreamError::PayloadTooLong { length: 0xffff_ffff, .. })));
    }

    #[test]
    fn an_unknown_command_keeps_its_payload_in_step_with_extended_headers() {
        let mut bytes = EXTENDED_WRITE;
        bytes[7] = 99;
        let mut t = Transmission::new(HeaderMode::Extended);
        let Ok(Decoded::Request(r)) = t.decode(&bytes) else { panic!("no request") };
        assert_eq!((r.command, r.length, r.payload), (Command::Unknown(99), 0, 512));
        assert_eq!(t.payload_left(), 512);
    }

    #[test]
    fn a_write_without_payload_len_still_has_its_payload() {
        let mut bytes = EXTENDED_WRITE;
        bytes[5] = 0;
        let Ok(Decoded::Request(r)) = Transmission::new(HeaderMode::Extended).decode(&bytes) else {
            panic!("no request")
        };
        assert_eq!(r.payload, 512);
    }

    #[test]
    fn nothing_may_follow_a_disconnect() {
        let mut t = Transmission::new(HeaderMode::Simple);
        assert!(matches!(t.decode(&with(READ, 6, &[0, 2])), Ok(Decoded::Request(_))));
        assert!(t.is_closed());
        assert_eq!(t.decode(&READ), Err(StreamError::AfterDisconnect));
        assert_eq!(t.decode(&[]), Ok(Decoded::Need(1)));
    }
}
