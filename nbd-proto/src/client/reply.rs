//! Replies as the client half gives them out.

use crate::bytes::Reader;
use crate::client::StreamError;
use crate::errno::Errno;
use crate::status::Extent;
use crate::wire::chunk;

/// What [`crate::client::Transmission::decode`] found.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Decoded {
    /// Not enough: the input must hold this many bytes before another try.
    Need(usize),
    /// A reply, or one chunk of it.
    Reply {
        /// The reply.
        reply: Reply,
        /// Bytes of input it took; `reply.payload` bytes follow them.
        consumed: usize,
    },
}

/// A simple reply or a chunk.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Reply {
    /// The request.
    pub cookie: u64,
    /// What it says.
    pub body: Body,
    /// Bytes that follow, to be moved before the next reply is decoded.
    pub payload: u32,
    /// How the request ended, if this was the last of it. Holds once the payload has been moved.
    pub outcome: Option<Result<(), Errno>>,
}

/// What a reply says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Body {
    /// Nothing but success (or the end).
    None,
    /// Bytes of the export follow as the payload.
    Data {
        /// From here.
        offset: u64,
        /// So many.
        length: u32,
    },
    /// Bytes of the export that are all zero.
    Hole {
        /// From here.
        offset: u64,
        /// So many.
        length: u32,
    },
    /// Extents follow as the payload; [`Status::extents`] reads them.
    Status(Status),
    /// An error.
    Error {
        /// Which.
        errno: Errno,
        /// Where, if the server said.
        offset: Option<u64>,
        /// The server's text; may be empty.
        message: String,
    },
}

/// A status chunk whose descriptors are still to come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Status {
    /// The context.
    pub context: u32,
    /// How many extents.
    pub count: u32,
    pub(super) cookie: u64,
    pub(super) wide: bool,
    pub(super) asked: u64,
    pub(super) one: bool,
}

impl Status {
    /// Reads the payload, and checks it against what was asked: no empty extent, none begins past the asked length, and one no longer than
    /// asked under `REQ_ONE`.
    pub fn extents(&self, payload: &[u8]) -> Result<Vec<Extent>, StreamError> {
        let kind = if self.wide { chunk::BLOCK_STATUS_EXT } else { chunk::BLOCK_STATUS };
        let bad = |why| StreamError::BadChunk { cookie: self.cookie, kind, why };
        let each = if self.wide { 16 } else { 8 };
        if payload.len() != each * self.count as usize {
            return Err(bad("descriptors and payload differ"));
        }
        let mut r = Reader::new(payload);
        let mut extents = Vec::with_capacity(self.count as usize);
        let mut covered: u64 = 0;
        for _ in 0..self.count {
            let extent = match self.wide {
                true => r.u64().zip(r.u64()),
                false => r.u32().zip(r.u32()).map(|(length, flags)| (length.into(), flags.into())),
            };
            let (length, flags) = extent.ok_or(bad("short descriptor"))?;
            if length == 0 {
                return Err(bad("empty extent"));
            }
            if covered >= self.asked || (self.one && length > self.asked) {
                return Err(bad("more than was asked"));
            }
            covered = covered.checked_add(length).ok_or(bad("extents wrap"))?;
            extents.push(Extent { length, flags });
        }
        Ok(extents)
    }
}
