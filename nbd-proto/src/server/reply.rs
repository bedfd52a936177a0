//! Replies, appended to the program's own output buffer in the form the handshake agreed on.
//!
//! Enters: what to say, and whom to ([`ReplyTo`]). Leaves: bytes at the end of a `Vec`; the data of a read is put after its
//! header by the program, from wherever it lies. Invariant: the length in a header is the length of what was or will be
//! appended for it; nothing allocates but the growing of the `Vec`.
//!
//! What only exists in chunks (holes, extents, errors at an offset) is reached through [`Replies::chunks`], so a simple
//! connection can't be sent them by mistake.

use crate::bytes::clip;
use crate::command::{ReplyTo, Request};
use crate::errno::Errno;
use crate::flags::CommandFlags;
use crate::mode::HeaderMode;
use crate::status::Extent;
use crate::wire::{self, chunk};

/// The longest length of a compact extent: a multiple of every minimum block size there can be.
const MAX_COMPACT_EXTENT: u64 = (u32::MAX as u64) & !0xffff;

/// Encodes the replies of one connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Replies {
    mode: HeaderMode,
}

impl Replies {
    /// An encoder for the headers agreed on.
    #[inline]
    pub const fn new(mode: HeaderMode) -> Self {
        Replies { mode }
    }

    /// The encoder of what only exists in chunks; `None` on a connection with simple replies.
    #[inline]
    pub const fn chunks(self) -> Option<Chunks> {
        match self.mode {
            HeaderMode::Simple => None,
            HeaderMode::Structured => Some(Chunks { extended: false }),
            HeaderMode::Extended => Some(Chunks { extended: true }),
        }
    }

    /// The request succeeded and there is no (more) data. Not for a simple read, whose data must follow its header.
    #[inline]
    pub fn success(self, out: &mut Vec<u8>, to: ReplyTo) {
        match self.chunks() {
            None => simple(out, to, 0),
            Some(chunks) => chunks.none(out, to),
        }
    }

    /// The request failed; this ends its reply. The message is for people, and lost on a simple connection.
    pub fn error(self, out: &mut Vec<u8>, to: ReplyTo, errno: Errno, message: &str) {
        match self.chunks() {
            None => simple(out, to, errno.wire()),
            Some(chunks) => chunks.error(out, to, errno, message, true),
        }
    }

    /// The header before `len` bytes of data from `offset` of the export, which the program appends next. On a simple connection
    /// it must be the whole of the read, and `last`; on the others `last` says that nothing can fail any more.
    #[inline]
    pub fn data(self, out: &mut Vec<u8>, to: ReplyTo, offset: u64, len: u32, last: bool) {
        match self.chunks() {
            None => simple(out, to, 0),
            Some(chunks) => chunks.data(out, to, offset, len, last),
        }
    }
}

#[inline]
fn simple(out: &mut Vec<u8>, to: ReplyTo, error: u32) {
    let mut h = [0; wire::SIMPLE_REPLY_LEN];
    h[..4].copy_from_slice(&wire::SIMPLE_REPLY_MAGIC.to_be_bytes());
    h[4..8].copy_from_slice(&error.to_be_bytes());
    h[8..].copy_from_slice(&to.cookie.to_be_bytes());
    out.extend_from_slice(&h);
}

/// Encodes reply chunks, structured or extended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Chunks {
    extended: bool,
}

impl Chunks {
    /// `NONE`: the end of a reply.
    #[inline]
    pub fn none(self, out: &mut Vec<u8>, to: ReplyTo) {
        self.header(out, to, chunk::NONE, 0, true);
    }

    /// `OFFSET_DATA`: the header; `len` bytes (at least one, and at most 2^32-9) are appended by the program.
    #[inline]
    pub fn data(self, out: &mut Vec<u8>, to: ReplyTo, offset: u64, len: u32, last: bool) {
        self.header(out, to, chunk::OFFSET_DATA, u64::from(len) + 8, last);
        out.extend_from_slice(&offset.to_be_bytes());
    }

    /// `OFFSET_HOLE`: `len` bytes (at least one) read as zeroes.
    #[inline]
    pub fn hole(self, out: &mut Vec<u8>, to: ReplyTo, offset: u64, len: u32, last: bool) {
        self.header(out, to, chunk::OFFSET_HOLE, 12, last);
        out.extend_from_slice(&offset.to_be_bytes());
        out.extend_from_slice(&len.to_be_bytes());
    }

    /// `ERROR`: the request failed, and nothing sent for it can be relied on.
    pub fn error(self, out: &mut Vec<u8>, to: ReplyTo, errno: Errno, message: &str, last: bool) {
        let message = clip(message);
        self.header(out, to, chunk::ERROR, 6 + message.len() as u64, last);
        error_body(out, errno, message);
    }

    /// `ERROR_OFFSET`: the request failed at `offset`; chunks sent for other parts of it stand.
    pub fn error_offset(
        self,
        out: &mut Vec<u8>,
        to: ReplyTo,
        errno: Errno,
        offset: u64,
        message: &str,
        last: bool,
    ) {
        let message = clip(message);
        self.header(out, to, chunk::ERROR_OFFSET, 14 + message.len() as u64, last);
        error_body(out, errno, message);
        out.extend_from_slice(&offset.to_be_bytes());
    }

    /// `BLOCK_STATUS` or `BLOCK_STATUS_EXT`: the extents of one context, following each other from the request's offset.
    /// Returns how many were encoded. Where that is none (`extents` was empty), nothing was appended, and the request
    /// must be failed instead: a status chunk describes at least one byte.
    ///
    /// The rules of the reply are kept here: one extent no longer than asked under `REQ_ONE`; none after the asked length is
    /// covered; no empty ones; at most [`wire::MAX_EXTENTS`]; and an extent too long for a compact descriptor is cut and
    /// ends the list, for the client to ask on from there.
    pub fn block_status(
        self,
        out: &mut Vec<u8>,
        request: &Request,
        context: u32,
        extents: impl IntoIterator<Item = Extent>,
        last: bool,
    ) -> usize {
        let start = out.len();
        let one = request.flags.contains(CommandFlags::REQ_ONE);
        let limit = if one { 1 } else { wire::MAX_EXTENTS };
        let (kind, prefix, each) =
            if self.extended { (chunk::BLOCK_STATUS_EXT, 8, 16) } else { (chunk::BLOCK_STATUS, 4, 8) };
        self.header(out, request.reply_to(), kind, 0, last);
        let body = out.len();
        out.extend_from_slice(&context.to_be_bytes());
        if self.extended {
            out.extend_from_slice(&[0; 4]);
        }
        let mut count = 0;
        let mut covered: u64 = 0;
        for extent in extents.into_iter().filter(|e| e.length != 0) {
            let mut length = extent.length;
            if one {
                length = length.min(request.length);
            }
            let mut cut = false;
            if self.extended {
                out.extend_from_slice(&length.to_be_bytes());
                out.extend_from_slice(&extent.flags.to_be_bytes());
            } else {
                cut = length > u64::from(u32::MAX);
                length = if cut { MAX_COMPACT_EXTENT } else { length };
                // Flags of a compact descriptor are 32 bits; our contexts use fewer.
                out.extend_from_slice(&(length as u32).to_be_bytes());
                out.extend_from_slice(&(extent.flags as u32).to_be_bytes());
            }
            count += 1;
            covered = covered.saturating_add(length);
            if cut || count == limit || covered >= request.length {
                break;
            }
        }
        if count == 0 {
            out.truncate(start);
            return 0;
        }
        let len = prefix + each * count;
        if self.extended {
            out[body - 8..body].copy_from_slice(&(len as u64).to_be_bytes());
            out[body + 4..body + 8].copy_from_slice(&(count as u32).to_be_bytes());
        } else {
            out[body - 4..body].copy_from_slice(&(len as u32).to_be_bytes());
        }
        count
    }

    #[inline]
    fn header(self, out: &mut Vec<u8>, to: ReplyTo, kind: u16, len: u64, last: bool) {
        let flags = if last { chunk::FLAG_DONE } else { 0 };
        if self.extended {
            let mut h = [0; wire::EXTENDED_REPLY_LEN];
            h[..4].copy_from_slice(&wire::EXTENDED_REPLY_MAGIC.to_be_bytes());
            h[4..6].copy_from_slice(&flags.to_be_bytes());
            h[6..8].copy_from_slice(&kind.to_be_bytes());
            h[8..16].copy_from_slice(&to.cookie.to_be_bytes());
            h[16..24].copy_from_slice(&to.offset.to_be_bytes());
            h[24..].copy_from_slice(&len.to_be_bytes());
            out.extend_from_slice(&h);
        } else {
            let mut h = [0; wire::STRUCTURED_REPLY_LEN];
            h[..4].copy_from_slice(&wire::STRUCTURED_REPLY_MAGIC.to_be_bytes());
            h[4..6].copy_from_slice(&flags.to_be_bytes());
            h[6..8].copy_from_slice(&kind.to_be_bytes());
            h[8..16].copy_from_slice(&to.cookie.to_be_bytes());
            debug_assert!(len <= u64::from(u32::MAX), "a chunk of {len} bytes");
            h[16..].copy_from_slice(&(len as u32).to_be_bytes());
            out.extend_from_slice(&h);
        }
    }
}

fn error_body(out: &mut Vec<u8>, errno: Errno, message: &str) {
    out.extend_from_slice(&errno.wire().to_be_bytes());
    // `clip` keeps it within 4096 bytes.
    out.extend_from_slice(&(message.len() as u16).to_be_bytes());
    out.extend_from_slice(message.as_bytes());
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::command::Command;

    const TO: ReplyTo = ReplyTo { cookie: 0x0102_0304_0506_0708, offset: 0x1000 };
    const SIMPLE: Replies = Replies::new(HeaderMode::Simple);
    const STRUCTURED: Replies = Replies::new(HeaderMode::Structured);
    const EXTENDED: Replies = Replies::new(HeaderMode::Extended);

    fn bytes(f: impl FnOnce(&mut Vec<u8>)) -> Vec<u8> {
        let mut out = Vec::new();
        f(&mut out);
        out
    }

    fn hex(text: &str) -> Vec<u8> {
        let digits: Vec<u8> = text.bytes().filter(u8::is_ascii_hexdigit).collect();
        digits.chunks(2).map(|d| u8::from_str_radix(std::str::from_utf8(d).unwrap(), 16).unwrap()).collect()
    }

    fn status_request(length: u64, flags: CommandFlags) -> Request {
        Request {
            cookie: TO.cookie,
            offset: TO.offset,
            length,
            payload: 0,
            flags,
            command: Command::BlockStatus,
        }
    }

    #[test]
    fn simple_replies_are_sixteen_bytes() {
        assert_eq!(bytes(|o| SIMPLE.success(o, TO)), hex("67446698 00000000 0102030405060708"));
        assert_eq!(
            bytes(|o| SIMPLE.error(o, TO, Errno::NoSpc, "x")),
            hex("67446698 0000001c 0102030405060708")
        );
        assert_eq!(
            bytes(|o| SIMPLE.data(o, TO, 0x1000, 512, true)),
            hex("67446698 00000000 0102030405060708")
        );
        assert!(SIMPLE.chunks().is_none());
    }

    #[test]
    fn structured_chunks_match_the_specification() {
        let c = STRUCTURED.chunks().unwrap();
        assert_eq!(bytes(|o| STRUCTURED.success(o, TO)), hex("668e33ef 0001 0000 0102030405060708 00000000"));
        assert_eq!(
            bytes(|o| STRUCTURED.data(o, TO, 0x1000, 512, false)),
            hex("668e33ef 0000 0001 0102030405060708 00000208 0000000000001000")
        );
        assert_eq!(
            bytes(|o| c.hole(o, TO, 0x1200, 512, true)),
            hex("668e33ef 0001 0002 0102030405060708 0000000c 0000000000001200 00000200")
        );
        assert_eq!(
            bytes(|o| STRUCTURED.error(o, TO, Errno::Inval, "no")),
            hex("668e33ef 0001 8001 0102030405060708 00000008 00000016 0002 6e6f")
        );
        assert_eq!(
            bytes(|o| c.error_offset(o, TO, Errno::Io, 0x1200, "no", false)),
            hex("668e33ef 0000 8002 0102030405060708 00000010 00000005 0002 6e6f 0000000000001200")
        );
    }

    #[test]
    fn extended_chunks_repeat_the_requests_offset() {
        let c = EXTENDED.chunks().unwrap();
        assert_eq!(
            bytes(|o| EXTENDED.success(o, TO)),
            hex("6e8a278c 0001 0000 0102030405060708 0000000000001000 0000000000000000")
        );
        assert_eq!(
            bytes(|o| c.data(o, TO, 0x1200, 512, true)),
            hex("6e8a278c 0001 0001 0102030405060708 0000000000001000 0000000000000208 0000000000001200")
        );
    }

    #[test]
    fn block_status_is_compact_or_wide_by_what_was_agreed() {
        let extents = [Extent { length: 512, flags: 3 }, Extent { length: 512, flags: 0 }];
        let r = status_request(1024, CommandFlags::NONE);
        let c = STRUCTURED.chunks().unwrap();
        assert_eq!(
            bytes(|o| assert_eq!(c.block_status(o, &r, 7, extents, true), 2)),
            hex("668e33ef 0001 0005 0102030405060708 00000014 00000007 00000200 00000003 00000200 00000000")
        );
        let c = EXTENDED.chunks().unwrap();
        assert_eq!(
            bytes(|o| assert_eq!(c.block_status(o, &r, 7, extents, false), 2)),
            hex("6e8a278c 0000 0006 0102030405060708 0000000000001000 0000000000000028 00000007 00000002
                 0000000000000200 0000000000000003 0000000000000200 0000000000000000")
        );
    }

    #[test]
    fn req_one_gets_one_extent_no_longer_than_asked() {
        let r = status_request(1024, CommandFlags::REQ_ONE);
        let extents = [Extent { length: 1 << 40, flags: 3 }, Extent { length: 512, flags: 0 }];
        let out = bytes(|o| assert_eq!(EXTENDED.chunks().unwrap().block_status(o, &r, 1, extents, true), 1));
        assert_eq!(out[out.len() - 16..out.len() - 8], 1024u64.to_be_bytes());
    }

    #[test]
    fn extents_stop_where_the_request_is_covered_or_a_compact_length_ends() {
        let c = STRUCTURED.chunks().unwrap();
        let many = (0..100).map(|_| Extent { length: 512, flags: 0 });
        let r = status_request(1024, CommandFlags::NONE);
        assert_eq!(c.block_status(&mut Vec::new(), &r, 1, many, true), 2);
        let r = status_request(1 << 40, CommandFlags::NONE);
        let wide = [Extent { length: 1 << 33, flags: 0 }, Extent { length: 512, flags: 1 }];
        let out = bytes(|o| assert_eq!(c.block_status(o, &r, 1, wide, true), 1));
        assert_eq!(out[out.len() - 8..], hex("ffff0000 00000000"));
    }

    #[test]
    fn a_status_of_nothing_appends_nothing() {
        let r = status_request(1024, CommandFlags::NONE);
        let mut out = vec![9];
        let empty = [Extent { length: 0, flags: 0 }];
        assert_eq!(STRUCTURED.chunks().unwrap().block_status(&mut out, &r, 1, empty, true), 0);
        assert_eq!(out, [9]);
    }

    #[test]
    fn an_endless_list_of_extents_is_cut_at_the_limit() {
        let r = status_request(u64::MAX, CommandFlags::NONE);
        let endless = std::iter::repeat(Extent { length: 1, flags: 0 });
        let mut out = Vec::new();
        assert_eq!(
            EXTENDED.chunks().unwrap().block_status(&mut out, &r, 1, endless, true),
            wire::MAX_EXTENTS
        );
        assert_eq!(out.len(), 32 + 8 + 16 * wire::MAX_EXTENTS);
    }

    #[test]
    fn replies_into_a_buffer_with_room_do_not_move_it() {
        let mut out = Vec::with_capacity(256);
        let place = out.as_ptr();
        EXTENDED.data(&mut out, TO, 0, 1, true);
        EXTENDED.error(&mut out, TO, Errno::Io, "disk");
        STRUCTURED.success(&mut out, TO);
        assert_eq!(out.as_ptr(), place);
    }
}
