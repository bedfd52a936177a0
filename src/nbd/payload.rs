//! A buffer for payloads.
//!
//! Enters: how much it must hold. Leaves: bytes to receive into, and those as they are. Invariant: what a large one took is the system's again as soon as the last who uses it is done, on whichever
//! thread that is; from the allocator it would come back only with what was allocated after it, and a burst of writes that wait would leave the server large.

use memmap2::MmapMut;

use bytes::Bytes;

/// Shorter ones are the allocator's.
const LARGE: usize = 64 << 10;

/// A buffer.
pub enum Payload {
    Small(Vec<u8>),
    Large(MmapMut),
}

impl Default for Payload {
    fn default() -> Payload {
        Payload::Small(Vec::new())
    }
}

impl Payload {
    /// Zeros.
    fn zeros(len: usize) -> Payload {
        if len < LARGE {
            return Payload::Small(vec![0; len]);
        }
        // Where the system gives no pages of their own, others do as well.
        MmapMut::map_anon(len).map_or_else(|_| Payload::Small(vec![0; len]), Payload::Large)
    }

    /// What it can hold.
    #[inline]
    pub fn len(&self) -> usize {
        self.as_ref().len()
    }

    /// Makes it hold `len` bytes at least. What it had is forgotten where it grows.
    pub fn hold(&mut self, len: usize) {
        if self.len() < len {
            *self = Payload::zeros(len);
        }
    }

    /// All it holds.
    #[inline]
    pub fn bytes(&mut self) -> &mut [u8] {
        match self {
            Payload::Small(bytes) => bytes,
            Payload::Large(bytes) => bytes,
        }
    }

    /// Its first `len` bytes, to be kept.
    pub fn into_bytes(self, len: usize) -> Bytes {
        match self {
            Payload::Small(mut bytes) => {
                bytes.truncate(len);
                Bytes::from(bytes)
            }
            large => Bytes::from_owner(large).slice(..len),
        }
    }
}

impl AsRef<[u8]> for Payload {
    #[inline]
    fn as_ref(&self) -> &[u8] {
        match self {
            Payload::Small(bytes) => bytes,
            Payload::Large(bytes) => bytes,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_are_what_was_put_in_whatever_their_number() {
        for len in [0, 1, 4096, LARGE - 1, LARGE, LARGE + 1, 1 << 20] {
            let mut payload = Payload::default();
            payload.hold(1);
            payload.hold(len);
            assert!(payload.len() >= len);
            payload.bytes()[..len].fill(7);
            payload.hold(len);
            assert_eq!(matches!(payload, Payload::Large(_)), len >= LARGE);
            let kept = len.saturating_sub(1);
            assert_eq!(payload.into_bytes(kept), vec![7; kept]);
        }
    }
}
