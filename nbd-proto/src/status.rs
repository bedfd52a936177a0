//! Block status: extents, and the payload form of the request.
//!
//! Source: `NBD_CMD_BLOCK_STATUS`; the payload form is part of the extended headers.

use crate::bytes::Reader;
use crate::command::Request;
use crate::errno::Errno;
use crate::flags::CommandFlags;
use crate::wire;

/// `base:allocation`: the extent is not allocated.
pub const STATE_HOLE: u64 = 1 << 0;
/// `base:allocation`: the extent reads as zeroes.
pub const STATE_ZERO: u64 = 1 << 1;

/// One extent of a status reply; extents follow each other from the request's offset.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Extent {
    /// Bytes, never zero on the wire.
    pub length: u64,
    /// What the context says of them.
    pub flags: u64,
}

/// The payload of a `BLOCK_STATUS` request: a length and the contexts wanted.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StatusQuery {
    /// How many bytes of the export the client asks about.
    pub length: u64,
    /// The contexts it wants; may be none.
    pub ids: Vec<u32>,
}

impl StatusQuery {
    /// Whether a payload of `len` bytes can be a query. Checked before anything is collected.
    pub const fn fits(len: u32) -> bool {
        len >= 8 && (len - 8).is_multiple_of(4) && (len as usize - 8) / 4 <= wire::MAX_STATUS_IDS
    }

    /// Parses the payload. Unknown and repeated ids fail with `EINVAL`, as the specification asks.
    pub fn parse(payload: &[u8], selected: impl Fn(u32) -> bool) -> Result<StatusQuery, Errno> {
        let mut r = Reader::new(payload);
        let length = r.u64().ok_or(Errno::Inval)?;
        let mut ids = Vec::new();
        while !r.is_empty() {
            let id = r.u32().ok_or(Errno::Inval)?;
            if ids.len() == wire::MAX_STATUS_IDS || ids.contains(&id) || !selected(id) {
                return Err(Errno::Inval);
            }
            ids.push(id);
        }
        Ok(StatusQuery { length, ids })
    }

    /// The request with its length filled in and its payload gone, ready for [`crate::validate`].
    pub fn apply(&self, request: &Request) -> Request {
        Request {
            length: self.length,
            payload: 0,
            flags: request.flags.without(CommandFlags::PAYLOAD_LEN),
            ..*request
        }
    }

    /// Appends the payload's bytes.
    pub fn encode(&self, out: &mut Vec<u8>) {
        out.extend_from_slice(&self.length.to_be_bytes());
        for id in &self.ids {
            out.extend_from_slice(&id.to_be_bytes());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_query_with_a_repeated_unknown_or_torn_id_is_einval() {
        let known = |id| id == 1 || id == 2;
        let encode = |ids: &[u32]| {
            let mut out = Vec::new();
            StatusQuery { length: 4096, ids: ids.to_vec() }.encode(&mut out);
            out
        };
        assert_eq!(StatusQuery::parse(&encode(&[2, 1]), known).unwrap().ids, [2, 1]);
        assert_eq!(StatusQuery::parse(&encode(&[]), known).unwrap().length, 4096);
        assert_eq!(StatusQuery::parse(&encode(&[1, 1]), known), Err(Errno::Inval));
        assert_eq!(StatusQuery::parse(&encode(&[3]), known), Err(Errno::Inval));
        assert_eq!(StatusQuery::parse(&encode(&[1])[..11], known), Err(Errno::Inval));
        assert_eq!(StatusQuery::parse(&[0; 7], known), Err(Errno::Inval));
    }

    #[test]
    fn only_lengths_that_can_hold_a_query_fit() {
        assert!(StatusQuery::fits(8));
        assert!(StatusQuery::fits(12));
        assert!(!StatusQuery::fits(0));
        assert!(!StatusQuery::fits(7));
        assert!(!StatusQuery::fits(10));
        assert!(StatusQuery::fits(8 + 4 * 256));
        assert!(!StatusQuery::fits(8 + 4 * 257));
        assert!(!StatusQuery::fits(u32::MAX));
    }
}
