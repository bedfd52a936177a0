//! Requests out, replies in.
//!
//! Enters: calls, and a server's bytes. Leaves: request headers (a write's data is appended by the program), and replies whose data
//! the program moves. Invariant: what the server may send is bounded by what is in flight.

use std::collections::HashMap;

use crate::bytes::{Reader, u16_at, u32_at, u64_at};
use crate::client::pending::Pending;
use crate::client::{Body, Decoded, Reply, Status, StreamError, UsageError};
use crate::command::{Command, Request};
use crate::errno::Errno;
use crate::flags::CommandFlags;
use crate::mode::HeaderMode;
use crate::status::StatusQuery;
use crate::wire::{self, chunk};

/// The longest error chunk accepted: a message of 4096 bytes, and room for fields of a later specification.
const MAX_ERROR_CHUNK: u64 = 8192;

/// A request to be sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Call {
    /// The program's name for it, not in flight already.
    pub cookie: u64,
    /// What to do.
    pub command: Command,
    /// Where.
    pub offset: u64,
    /// How much.
    pub length: u64,
    /// How. `PAYLOAD_LEN` is set where it must be.
    pub flags: CommandFlags,
}

/// Appends a request header as it stands, right or wrong. [`Transmission::send`] is the checked way.
pub fn encode_request(out: &mut Vec<u8>, mode: HeaderMode, request: &Request) {
    let extended = mode == HeaderMode::Extended;
    let magic = if extended { wire::EXTENDED_REQUEST_MAGIC } else { wire::REQUEST_MAGIC };
    out.extend_from_slice(&magic.to_be_bytes());
    out.extend_from_slice(&request.flags.bits().to_be_bytes());
    out.extend_from_slice(&request.command.wire().to_be_bytes());
    out.extend_from_slice(&request.cookie.to_be_bytes());
    out.extend_from_slice(&request.offset.to_be_bytes());
    let length = if request.payload != 0 { u64::from(request.payload) } else { request.length };
    if extended {
        out.extend_from_slice(&length.to_be_bytes());
    } else {
        out.extend_from_slice(&(length as u32).to_be_bytes());
    }
}

/// A connection in the transmission phase.
#[derive(Debug)]
pub struct Transmission {
    mode: HeaderMode,
    contexts: Vec<u32>,
    in_flight: HashMap<u64, Pending>,
    payload: u32,
    disconnected: bool,
}

impl Transmission {
    /// A connection with the headers and the context ids agreed on.
    pub fn new(mode: HeaderMode, contexts: Vec<u32>) -> Self {
        Transmission { mode, contexts, in_flight: HashMap::new(), payload: 0, disconnected: false }
    }

    /// How many requests wait for (the rest of) their replies.
    pub fn in_flight(&self) -> usize {
        self.in_flight.len()
    }

    /// Appends the header of a request. After a `WRITE` the program appends the data.
    pub fn send(&mut self, out: &mut Vec<u8>, call: Call) -> Result<(), UsageError> {
        let write = call.command == Command::Write;
        let too_long = (self.mode != HeaderMode::Extended && call.length > u64::from(u32::MAX))
            || (write && call.length > u64::from(wire::MAX_PAYLOAD));
        if too_long {
            return Err(UsageError::TooLong);
        }
        let mut flags = call.flags;
        if write && self.mode == HeaderMode::Extended {
            flags = flags | CommandFlags::PAYLOAD_LEN;
        }
        let Call { cookie, command, offset, length, .. } = call;
        let payload = if write { length as u32 } else { 0 };
        let contexts = if command == Command::BlockStatus { self.contexts.clone() } else { Vec::new() };
        self.track(cookie, Pending::new(command, flags, offset, length, contexts))?;
        encode_request(out, self.mode, &Request { cookie, offset, length, payload, flags, command });
        Ok(())
    }

    /// Appends a `BLOCK_STATUS` of the payload form, payload and all. Needs extended headers.
    pub fn send_status_query(
        &mut self,
        out: &mut Vec<u8>,
        cookie: u64,
        offset: u64,
        query: &StatusQuery,
    ) -> Result<(), UsageError> {
        if self.mode != HeaderMode::Extended || query.ids.len() > wire::MAX_STATUS_IDS {
            return Err(UsageError::TooLong);
        }
        let flags = CommandFlags::PAYLOAD_LEN;
        let command = Command::BlockStatus;
        self.track(cookie, Pending::new(command, flags, offset, query.length, query.ids.clone()))?;
        // At most 8 + 4 * 256.
        let payload = 8 + 4 * query.ids.len() as u32;
        encode_request(out, self.mode, &Request { cookie, offset, length: 0, payload, flags, command });
        query.encode(out);
        Ok(())
    }

    /// Appends `DISC`; it has no reply, and nothing may follow it.
    pub fn disconnect(&mut self, out: &mut Vec<u8>) {
        self.disconnected = true;
        let (flags, command) = (CommandFlags::NONE, Command::Disc);
        encode_request(
            out,
            self.mode,
            &Request { cookie: 0, offset: 0, length: 0, payload: 0, flags, command },
        );
    }

    fn track(&mut self, cookie: u64, pending: Pending) -> Result<(), UsageError> {
        if self.disconnected {
            return Err(UsageError::Disconnected);
        }
        if self.in_flight.contains_key(&cookie) {
            return Err(UsageError::CookieInUse);
        }
        if self.in_flight.len() == wire::MAX_IN_FLIGHT {
            return Err(UsageError::TooManyInFlight);
        }
        self.in_flight.insert(cookie, pending);
        Ok(())
    }

    /// Decodes the reply at the front of `input`. Data and extents are not part of it: move `reply.payload` bytes, then call
    /// [`Transmission::payload_done`].
    pub fn decode(&mut self, input: &[u8]) -> Result<Decoded, StreamError> {
        if self.payload != 0 {
            return Err(StreamError::PayloadOutstanding { length: self.payload });
        }
        let Some(head) = input.first_chunk::<4>() else {
            return Ok(Decoded::Need(4));
        };
        let decoded = match (u32::from_be_bytes(*head), self.mode) {
            (wire::SIMPLE_REPLY_MAGIC, HeaderMode::Simple | HeaderMode::Structured) => self.simple(input)?,
            (wire::STRUCTURED_REPLY_MAGIC, HeaderMode::Structured) => {
                let Some(h) = input.first_chunk::<{ wire::STRUCTURED_REPLY_LEN }>() else {
                    return Ok(Decoded::Need(wire::STRUCTURED_REPLY_LEN));
                };
                let chunk = Chunk {
                    flags: u16_at(h, 4),
                    kind: u16_at(h, 6),
                    cookie: u64_at(h, 8),
                    length: u64::from(u32_at(h, 16)),
                    header: h.len(),
                    offset: None,
                };
                self.chunk(chunk, input)?
            }
            (wire::EXTENDED_REPLY_MAGIC, HeaderMode::Extended) => {
                let Some(h) = input.first_chunk::<{ wire::EXTENDED_REPLY_LEN }>() else {
                    return Ok(Decoded::Need(wire::EXTENDED_REPLY_LEN));
                };
                let chunk = Chunk {
                    flags: u16_at(h, 4),
                    kind: u16_at(h, 6),
                    cookie: u64_at(h, 8),
                    length: u64_at(h, 24),
                    header: h.len(),
                    offset: Some(u64_at(h, 16)),
                };
                self.chunk(chunk, input)?
            }
            (got, _) => return Err(StreamError::BadReplyMagic { got }),
        };
        if let Decoded::Reply { reply, .. } = &decoded {
            self.payload = reply.payload;
        }
        Ok(decoded)
    }

    /// The payload of the last reply has been moved, all of it.
    pub fn payload_done(&mut self) {
        self.payload = 0;
    }

    fn simple(&mut self, input: &[u8]) -> Result<Decoded, StreamError> {
        let Some(h) = input.first_chunk::<{ wire::SIMPLE_REPLY_LEN }>() else {
            return Ok(Decoded::Need(wire::SIMPLE_REPLY_LEN));
        };
        let cookie = u64_at(h, 8);
        let errno = Errno::from_wire(u32_at(h, 4));
        let pending = self.in_flight.remove(&cookie).ok_or(StreamError::UnknownCookie { cookie })?;
        let bad = |why| StreamError::BadChunk { cookie, kind: chunk::NONE, why };
        if self.mode == HeaderMode::Structured && pending.command == Command::Read {
            return Err(bad("a simple reply to a read with structured replies"));
        }
        let reply = match (errno, pending.command) {
            (Some(errno), _) => Reply {
                cookie,
                body: Body::Error { errno, offset: None, message: String::new() },
                payload: 0,
                outcome: Some(Err(errno)),
            },
            (None, Command::BlockStatus) => return Err(bad("a status reply without status")),
            (None, Command::Read) => {
                let length = u32::try_from(pending.length).map_err(|_| bad("longer than a simple read"))?;
                let body = Body::Data { offset: pending.offset, length };
                Reply { cookie, body, payload: length, outcome: Some(Ok(())) }
            }
            (None, _) => Reply { cookie, body: Body::None, payload: 0, outcome: Some(Ok(())) },
        };
        Ok(Decoded::Reply { reply, consumed: h.len() })
    }

    fn chunk(&mut self, chunk: Chunk, input: &[u8]) -> Result<Decoded, StreamError> {
        let cookie = chunk.cookie;
        let pending = self.in_flight.get_mut(&cookie).ok_or(StreamError::UnknownCookie { cookie })?;
        if chunk.offset.is_some_and(|offset| offset != pending.offset) {
            return Err(chunk.bad("the offset is not the request's"));
        }
        // What is read out of the payload here, the rest of it being data or descriptors.
        let fixed = match chunk.kind {
            chunk::NONE => 0,
            chunk::OFFSET_DATA => 8,
            chunk::OFFSET_HOLE => 12,
            chunk::BLOCK_STATUS => 4,
            chunk::BLOCK_STATUS_EXT => 8,
            _ if chunk.kind & chunk::ERROR_BIT != 0 => chunk.length,
            _ => return Err(chunk.bad("unknown type")),
        };
        if chunk.length < fixed {
            return Err(chunk.bad("too short"));
        }
        if chunk.kind & chunk::ERROR_BIT != 0 && chunk.length > MAX_ERROR_CHUNK {
            return Err(chunk.bad("error chunk too long"));
        }
        let consumed = chunk.header + fixed as usize;
        let Some(body) = input.get(chunk.header..consumed) else {
            return Ok(Decoded::Need(consumed));
        };
        pending.chunk().map_err(|why| chunk.bad(why))?;
        let body = chunk.body(pending, body, self.mode)?;
        let last = chunk.flags & chunk::FLAG_DONE != 0;
        let outcome = match last {
            true => {
                let pending = self.in_flight.remove(&cookie).expect("found above");
                Some(pending.outcome().map_err(|why| chunk.bad(why))?)
            }
            false => None,
        };
        let payload = match &body {
            Body::Data { length, .. } => *length,
            // Bounded by `MAX_EXTENTS` in `body`.
            Body::Status(_) => (chunk.length - fixed) as u32,
            Body::None | Body::Hole { .. } | Body::Error { .. } => 0,
        };
        Ok(Decoded::Reply { reply: Reply { cookie, body, payload, outcome }, consumed })
    }
}

/// The header of a chunk, of either form.
#[derive(Clone, Copy)]
struct Chunk {
    flags: u16,
    kind: u16,
    cookie: u64,
    length: u64,
    header: usize,
    offset: Option<u64>,
}

impl Chunk {
    fn bad(&self, why: &'static str) -> StreamError {
        StreamError::BadChunk { cookie: self.cookie, kind: self.kind, why }
    }

    fn body(&self, pending: &mut Pending, body: &[u8], mode: HeaderMode) -> Result<Body, StreamError> {
        let short = || self.bad("too short");
        let mut r = Reader::new(body);
        match self.kind {
            chunk::NONE => {
                if self.length != 0 || self.flags & chunk::FLAG_DONE == 0 {
                    return Err(self.bad("NONE must be empty and last"));
                }
                Ok(Body::None)
            }
            chunk::OFFSET_DATA => {
                let offset = r.u64().ok_or_else(short)?;
                let length = u32::try_from(self.length - 8).map_err(|_| self.bad("too long"))?;
                if length == 0 {
                    return Err(self.bad("no data"));
                }
                pending.cover(offset, length.into()).map_err(|why| self.bad(why))?;
                Ok(Body::Data { offset, length })
            }
            chunk::OFFSET_HOLE => {
                let (offset, length) = r.u64().zip(r.u32()).ok_or_else(short)?;
                if self.length != 12 || length == 0 {
                    return Err(self.bad("malformed hole"));
                }
                pending.cover(offset, length.into()).map_err(|why| self.bad(why))?;
                Ok(Body::Hole { offset, length })
            }
            chunk::BLOCK_STATUS | chunk::BLOCK_STATUS_EXT => self.status(pending, r, mode),
            _ => self.error(pending, r),
        }
    }

    fn status(
        &self,
        pending: &mut Pending,
        mut r: Reader<'_>,
        mode: HeaderMode,
    ) -> Result<Body, StreamError> {
        let wide = self.kind == chunk::BLOCK_STATUS_EXT;
        if wide && mode != HeaderMode::Extended {
            return Err(self.bad("wide extents without extended headers"));
        }
        let (prefix, each) = if wide { (8, 16) } else { (4, 8) };
        let bytes = self.length - prefix;
        let count = bytes / each;
        if bytes == 0 || !bytes.is_multiple_of(each) {
            return Err(self.bad("not a whole number of extents"));
        }
        if count > wire::MAX_EXTENTS as u64 {
            return Err(self.bad("too many extents"));
        }
        let one = pending.flags.contains(CommandFlags::REQ_ONE);
        if one && count != 1 {
            return Err(self.bad("more than one extent under REQ_ONE"));
        }
        let context = r.u32().ok_or_else(|| self.bad("too short"))?;
        if wide {
            let told = r.u32().ok_or_else(|| self.bad("too short"))?;
            if told != 0 && u64::from(told) != count {
                return Err(self.bad("the count of extents is not theirs"));
            }
        }
        pending.context(context).map_err(|why| self.bad(why))?;
        let (asked, cookie) = (pending.length, self.cookie);
        Ok(Body::Status(Status { context, count: count as u32, cookie, wide, asked, one }))
    }

    fn error(&self, pending: &mut Pending, mut r: Reader<'_>) -> Result<Body, StreamError> {
        let bad = || self.bad("malformed error");
        let errno = r.u32().and_then(Errno::from_wire).ok_or_else(bad)?;
        let len = usize::from(r.u16().ok_or_else(bad)?);
        let message = String::from_utf8_lossy(r.bytes(len).ok_or_else(bad)?).into_owned();
        let offset = match self.kind {
            chunk::ERROR if r.is_empty() => None,
            chunk::ERROR_OFFSET => {
                let offset = r.u64().ok_or_else(bad)?;
                let inside = offset.checked_sub(pending.offset).is_some_and(|at| at < pending.length);
                if !r.is_empty() || !inside {
                    return Err(bad());
                }
                Some(offset)
            }
            chunk::ERROR => return Err(bad()),
            // An unknown error type: "the client MUST consider the current reply as errored".
            _ => None,
        };
        pending.failed.get_or_insert(errno);
        Ok(Body::Error { errno, offset, message })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn hex(text: &str) -> Vec<u8> {
        let digits: Vec<u8> = text.bytes().filter(u8::is_ascii_hexdigit).collect();
        digits.chunks(2).map(|d| u8::from_str_radix(std::str::from_utf8(d).unwrap(), 16).unwrap()).collect()
    }

    fn reading(mode: HeaderMode) -> Transmission {
        let mut t = Transmission::new(mode, vec![1]);
        let call = Call {
            cookie: 1,
            command: Command::Read,
            offset: 0x1000,
            length: 0x400,
            flags: CommandFlags::NONE,
        };
        t.send(&mut Vec::new(), call).unwrap();
        t.send(&mut Vec::new(), Call { cookie: 2, command: Command::BlockStatus, ..call }).unwrap();
        t
    }

    fn refused(mode: HeaderMode, bytes: &str) -> StreamError {
        reading(mode).decode(&hex(bytes)).expect_err(bytes)
    }

    #[test]
    fn requests_match_the_specification() {
        let mut t = Transmission::new(HeaderMode::Structured, vec![]);
        let mut call = Call {
            cookie: 0x0102_0304_0506_0708,
            command: Command::Write,
            offset: 0x1000,
            length: 512,
            flags: CommandFlags::FUA,
        };
        let mut out = Vec::new();
        t.send(&mut out, call).unwrap();
        assert_eq!(out, hex("25609513 0001 0001 0102030405060708 0000000000001000 00000200"));
        assert_eq!(t.send(&mut out, call), Err(UsageError::CookieInUse));
        call.cookie = 2;
        call.length = 1 << 32;
        assert_eq!(t.send(&mut out, call), Err(UsageError::TooLong));

        let mut t = Transmission::new(HeaderMode::Extended, vec![]);
        let mut out = Vec::new();
        t.send(&mut out, Call { cookie: 3, length: 512, ..call }).unwrap();
        assert_eq!(out, hex("21e41c71 0021 0001 0000000000000003 0000000000001000 0000000000000200"));
        out.clear();
        t.send_status_query(&mut out, 4, 0x1000, &StatusQuery { length: 1 << 40, ids: vec![7] }).unwrap();
        assert_eq!(
            out,
            hex(
                "21e41c71 0020 0007 0000000000000004 0000000000001000 000000000000000c 0000010000000000 00000007"
            )
        );
    }

    #[test]
    fn a_reply_to_nothing_in_flight_or_after_its_end_is_refused() {
        let none = "668e33ef 0001 0000 0000000000000009 00000000";
        assert_eq!(refused(HeaderMode::Structured, none), StreamError::UnknownCookie { cookie: 9 });
        let mut t = reading(HeaderMode::Structured);
        let end = hex("668e33ef 0001 8001 0000000000000001 00000006 00000005 0000");
        let Ok(Decoded::Reply { reply, consumed }) = t.decode(&end) else { panic!("no reply") };
        assert_eq!((reply.outcome, consumed), (Some(Err(Errno::Io)), end.len()));
        assert_eq!(t.decode(&end), Err(StreamError::UnknownCookie { cookie: 1 }));
    }

    #[test]
    fn chunks_that_lie_about_their_length_are_refused() {
        for bytes in [
            // NONE with a payload, NONE that is not last.
            "668e33ef 0001 0000 0000000000000001 00000001",
            "668e33ef 0000 0000 0000000000000001 00000000",
            // OFFSET_DATA without data, shorter than its offset, past the request.
            "668e33ef 0000 0001 0000000000000001 00000008 0000000000001000",
            "668e33ef 0000 0001 0000000000000001 00000007 0000000000001000",
            "668e33ef 0000 0001 0000000000000001 00000409 0000000000001000",
            "668e33ef 0000 0001 0000000000000001 ffffffff 0000000000001000",
            "668e33ef 0000 0001 0000000000000001 00000009 0000000000000fff",
            // OFFSET_HOLE of 13 bytes, of no size, past the request.
            "668e33ef 0000 0002 0000000000000001 0000000d 0000000000001000 00000200",
            "668e33ef 0000 0002 0000000000000001 0000000c 0000000000001000 00000000",
            "668e33ef 0000 0002 0000000000000001 0000000c 0000000000001000 00000401",
            // Errors: a message longer than the chunk, no error at all, a chunk of 2^32-1, an offset outside.
            "668e33ef 0001 8001 0000000000000001 00000006 00000005 0001",
            "668e33ef 0001 8001 0000000000000001 00000006 00000000 0000",
            "668e33ef 0001 8001 0000000000000001 ffffffff 00000005 0000",
            "668e33ef 0001 8002 0000000000000001 0000000e 00000005 0000 0000000000001400",
            // Status: no extents, a torn one, wide ones, 2^20+1 of them, an unknown context, for a read.
            "668e33ef 0000 0005 0000000000000002 00000004 00000001",
            "668e33ef 0000 0005 0000000000000002 00000005 00000001",
            "668e33ef 0000 0006 0000000000000002 00000018 00000001 00000001",
            "668e33ef 0000 0005 0000000000000002 0080000c 00000001",
            "668e33ef 0000 0005 0000000000000002 0000000c 00000009",
            "668e33ef 0000 0005 0000000000000001 0000000c 00000001",
            // Data for a status request, an unknown type, the end without data or status.
            "668e33ef 0000 0001 0000000000000002 00000009 0000000000001000",
            "668e33ef 0000 0003 0000000000000001 00000000",
            "668e33ef 0001 0000 0000000000000001 00000000",
            "668e33ef 0001 0000 0000000000000002 00000000",
            // A simple reply to a read or status.
            "67446698 00000000 0000000000000001",
            "67446698 00000000 0000000000000002",
        ] {
            assert!(
                matches!(refused(HeaderMode::Structured, bytes), StreamError::BadChunk { .. }),
                "{bytes}"
            );
        }
    }

    #[test]
    fn extended_replies_must_repeat_the_offset_and_never_be_simple() {
        let wrong = "6e8a278c 0001 0000 0000000000000001 0000000000001001 0000000000000000";
        assert!(matches!(refused(HeaderMode::Extended, wrong), StreamError::BadChunk { .. }));
        let huge = "6e8a278c 0000 0001 0000000000000001 0000000000001000 ffffffffffffffff 0000000000001000";
        assert!(matches!(refused(HeaderMode::Extended, huge), StreamError::BadChunk { .. }));
        let simple = "67446698 00000005 0000000000000001";
        assert_eq!(refused(HeaderMode::Extended, simple), StreamError::BadReplyMagic { got: 0x6744_6698 });
        let structured = "668e33ef 0001 8001 0000000000000001 00000006 00000005 0000";
        assert!(matches!(refused(HeaderMode::Simple, structured), StreamError::BadReplyMagic { .. }));
        let count = "6e8a278c 0000 0006 0000000000000002 0000000000001000 0000000000000018 00000001 00000002";
        assert!(matches!(refused(HeaderMode::Extended, count), StreamError::BadChunk { .. }));
    }

    #[test]
    fn extents_are_checked_against_what_was_asked() {
        let status = Status { context: 1, count: 2, cookie: 2, wide: false, asked: 0x400, one: false };
        let good = status.extents(&hex("00000200 00000003 00000400 00000000")).unwrap();
        assert_eq!(good.iter().map(|e| e.length).collect::<Vec<_>>(), [0x200, 0x400]);
        assert!(status.extents(&hex("00000000 00000003 00000400 00000000")).is_err(), "empty");
        assert!(status.extents(&hex("00000400 00000003 00000400 00000000")).is_err(), "past the end");
        assert!(status.extents(&hex("00000400 00000003")).is_err(), "short");
        let one = Status { count: 1, one: true, ..status };
        assert!(one.extents(&hex("00000401 00000000")).is_err(), "too long for REQ_ONE");
        let wide = Status { count: 2, wide: true, asked: u64::MAX, ..status };
        let wraps = "ffffffffffffff00 0000000000000000 0000000000000200 0000000000000000";
        assert!(wide.extents(&hex(wraps)).is_err(), "wraps");
    }
}
