//! Chunks: the one type through which fetched bytes become trusted bytes.
//!
//! Enters: bytes from a store or a disk, with the id they should have. Leaves: a [`VerifiedChunk`], or an error that names the id.
//! Invariant: a `VerifiedChunk` holds exactly `chunk-size` bytes whose BLAKE3 is its id; there is no other way to make one.

use bytes::Bytes;

use super::{ChunkId, FormatError};
use crate::units::ByteLen;

/// The size of every chunk of an image: a power of two from 64 KiB to 1 MiB.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ChunkSize(u8);

impl ChunkSize {
    /// Smallest log2.
    pub const MIN_LOG2: u8 = 16;
    /// Largest log2.
    pub const MAX_LOG2: u8 = 20;
    /// 128 KiB.
    pub const DEFAULT: ChunkSize = ChunkSize(17);

    /// The chunk size of 2^`log2` bytes, where that is allowed.
    pub const fn from_log2(log2: u8) -> Option<ChunkSize> {
        if log2 < Self::MIN_LOG2 || log2 > Self::MAX_LOG2 { None } else { Some(ChunkSize(log2)) }
    }

    /// The chunk size of `len` bytes, where that is allowed.
    pub const fn from_len(len: ByteLen) -> Option<ChunkSize> {
        if len.0.is_power_of_two() { Self::from_log2(len.0.trailing_zeros() as u8) } else { None }
    }

    /// log2 of the size in bytes.
    pub const fn log2(self) -> u8 {
        self.0
    }

    /// The size in bytes.
    #[expect(clippy::len_without_is_empty, reason = "a size, and never zero")]
    pub const fn len(self) -> usize {
        1 << self.0
    }
}

/// A chunk's content, checked against its id.
#[derive(Clone, Debug)]
pub struct VerifiedChunk {
    id: ChunkId,
    content: Bytes,
}

impl VerifiedChunk {
    /// Checks length and hash of `content`.
    pub fn verify(id: ChunkId, size: ChunkSize, content: Bytes) -> Result<VerifiedChunk, FormatError> {
        if content.len() != size.len() {
            return Err(FormatError::Length {
                what: ChunkId::WHAT,
                expected: size.len() as u64,
                actual: content.len() as u64,
            });
        }
        id.check(&content)?;
        Ok(VerifiedChunk { id, content })
    }

    /// The id the content hashes to.
    pub fn id(&self) -> ChunkId {
        self.id
    }

    /// The content: `chunk-size` bytes.
    pub fn content(&self) -> &Bytes {
        &self.content
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn short_zeroed_and_flipped_content_is_refused() {
        let size = ChunkSize::from_log2(16).unwrap();
        let good: Vec<u8> = (0..size.len()).map(|i| (i % 251) as u8).collect();
        let id = ChunkId::of(&good);
        assert!(VerifiedChunk::verify(id, size, good.clone().into()).is_ok());
        assert!(VerifiedChunk::verify(id, size, good[1..].to_vec().into()).is_err());
        assert!(VerifiedChunk::verify(id, size, vec![0; size.len()].into()).is_err());
        let mut flipped = good;
        flipped[777] ^= 1;
        assert!(VerifiedChunk::verify(id, size, flipped.into()).is_err());
    }
}
