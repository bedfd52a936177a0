//! Bytes received and not used yet.
//!
//! Invariant: there is always room to receive into, because what is used makes room and a request header is far smaller than the buffer.

use std::ops::Range;

/// Bytes received at a time: 64 writes of 4 KiB.
const CAPACITY: usize = 256 << 10;
/// With less room than this behind them, bytes move to the front.
const MIN_ROOM: usize = CAPACITY / 4;

/// A buffer with a start and an end.
#[derive(Default)]
pub struct Received {
    buffer: Box<[u8]>,
    start: usize,
    end: usize,
}

impl Received {
    /// A buffer that holds `bytes` already.
    pub fn starting_with(bytes: &[u8]) -> Received {
        let mut buffer = vec![0; CAPACITY.max(bytes.len() + MIN_ROOM)].into_boxed_slice();
        buffer[..bytes.len()].copy_from_slice(bytes);
        Received { buffer, start: 0, end: bytes.len() }
    }

    /// What is here.
    #[inline]
    pub fn bytes(&self) -> &[u8] {
        &self.buffer[self.start..self.end]
    }

    /// Whether nothing is here.
    pub fn is_empty(&self) -> bool {
        self.start == self.end
    }

    /// The first `count` bytes are used.
    #[inline]
    pub fn consume(&mut self, count: usize) {
        self.start += count;
        debug_assert!(self.start <= self.end);
        if self.start == self.end {
            (self.start, self.end) = (0, 0);
        }
    }

    /// As [`Received::consume`]; [`Received::taken`] has those bytes until more is received.
    #[inline]
    pub fn take(&mut self, count: usize) -> Range<usize> {
        let taken = self.start..self.start + count;
        self.consume(count);
        taken
    }

    /// Bytes that were taken.
    #[inline]
    pub fn taken(&self, taken: Range<usize>) -> &[u8] {
        &self.buffer[taken]
    }

    /// Where to receive; never empty.
    #[inline]
    pub fn room(&mut self) -> &mut [u8] {
        if self.buffer.len() - self.end < MIN_ROOM {
            self.buffer.copy_within(self.start..self.end, 0);
            (self.start, self.end) = (0, self.end - self.start);
        }
        &mut self.buffer[self.end..]
    }

    /// `count` bytes were received into [`Received::room`].
    #[inline]
    pub fn add(&mut self, count: usize) {
        self.end += count;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_come_out_as_they_went_in_whatever_the_pieces() {
        let mut received = Received::starting_with(&[0, 1, 2]);
        let (mut next_in, mut next_out) = (3u64, 0u64);
        for round in 0..5000 {
            let room = received.room();
            assert!(!room.is_empty());
            let count = room.len().min(1 + round * 37 % 70_000);
            for byte in &mut room[..count] {
                *byte = next_in as u8;
                next_in += 1;
            }
            received.add(count);
            // A remainder as small as half a header stays, as in life.
            while received.bytes().len() > 20 {
                let take = received.bytes().len().min(1 + round * 13 % 5000);
                for (at, byte) in received.bytes()[..take].iter().enumerate() {
                    assert_eq!(*byte, (next_out + at as u64) as u8);
                }
                next_out += take as u64;
                received.consume(take);
            }
        }
    }
}
