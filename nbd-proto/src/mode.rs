//! Which headers the two sides agreed on.

use crate::wire;

/// The form of requests and replies, fixed by the handshake.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum HeaderMode {
    /// 28-byte requests, 16-byte simple replies.
    #[default]
    Simple,
    /// 28-byte requests, 20-byte reply chunks (`STRUCTURED_REPLY`).
    Structured,
    /// 32-byte requests and reply chunks (`EXTENDED_HEADERS`).
    Extended,
}

impl HeaderMode {
    /// Bytes of a request header.
    #[inline]
    pub const fn request_len(self) -> usize {
        match self {
            HeaderMode::Simple | HeaderMode::Structured => wire::REQUEST_LEN,
            HeaderMode::Extended => wire::EXTENDED_REQUEST_LEN,
        }
    }

    /// Whether replies come in chunks.
    #[inline]
    pub const fn has_chunks(self) -> bool {
        !matches!(self, HeaderMode::Simple)
    }
}
