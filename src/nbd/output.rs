//! What waits to be sent on one connection: headers and small payloads gathered in one buffer, large payloads by reference.
//!
//! Enters: reply headers and pieces of reads. Leaves: slices for one vectored write after another. Invariant: bytes leave in the order they entered; a chunk
//! stays pinned until its last byte is handed to the kernel.

use std::collections::VecDeque;
use std::io::IoSlice;

use bytes::Bytes;

use crate::cache::ChunkSlice;
use crate::device::Piece;

/// Payloads up to this many bytes are copied behind their header: cheaper than a slice of their own.
const COPY_MAX: usize = 16 << 10;
/// Slices of one vectored write; the kernel takes up to 1024.
pub const MAX_SLICES: usize = 64;
/// The buffer is given back to the allocator when it grew past this.
const KEEP_CAPACITY: usize = 1 << 20;

/// Zeros to point at.
static ZEROS: [u8; 256 << 10] = [0; 256 << 10];

enum Segment {
    /// The next so many bytes of the buffer.
    Buffered(usize),
    Chunk(ChunkSlice),
    Bytes(Bytes),
    Zero(u64),
}

/// The queue.
#[derive(Default)]
pub struct Output {
    buffer: Vec<u8>,
    /// Bytes of `buffer` that are sent.
    sent: usize,
    /// Bytes at the end of `buffer` that no segment counts yet.
    uncounted: usize,
    segments: VecDeque<Segment>,
    /// Bytes of the first segment that are sent (not for `Buffered`, which shrinks).
    sent_of_first: u64,
    pending: u64,
}

impl Output {
    /// Lets `append` put bytes at the end.
    #[inline]
    pub fn append(&mut self, append: impl FnOnce(&mut Vec<u8>)) {
        let before = self.buffer.len();
        append(&mut self.buffer);
        let added = self.buffer.len() - before;
        self.uncounted += added;
        self.pending += added as u64;
    }

    /// Puts a piece at the end.
    #[inline]
    pub fn push(&mut self, piece: Piece) {
        match piece {
            Piece::Chunk(slice) if slice.len() > COPY_MAX => {
                self.push_segment(slice.len() as u64, Segment::Chunk(slice))
            }
            Piece::Bytes(bytes) if bytes.len() > COPY_MAX => {
                self.push_segment(bytes.len() as u64, Segment::Bytes(bytes))
            }
            Piece::Zero(len) if len.0 > COPY_MAX as u64 => self.push_segment(len.0, Segment::Zero(len.0)),
            Piece::Chunk(slice) => self.append(|buffer| buffer.extend_from_slice(&slice)),
            Piece::Bytes(bytes) => self.append(|buffer| buffer.extend_from_slice(&bytes)),
            Piece::Zero(len) => self.append(|buffer| buffer.resize(buffer.len() + len.0 as usize, 0)),
        }
    }

    fn push_segment(&mut self, len: u64, segment: Segment) {
        self.count_buffered();
        self.segments.push_back(segment);
        self.pending += len;
    }

    fn count_buffered(&mut self) {
        if self.uncounted > 0 {
            self.segments.push_back(Segment::Buffered(self.uncounted));
            self.uncounted = 0;
        }
    }

    /// Bytes that wait.
    pub fn pending(&self) -> u64 {
        self.pending
    }

    /// Puts the next slices to write into `slices`; tells how many.
    pub fn slices<'a>(&'a mut self, slices: &mut [IoSlice<'a>]) -> usize {
        self.count_buffered();
        let mut at = self.sent;
        let mut count = 0;
        for (segment, slice) in self.segments.iter().zip(slices) {
            let skip = if count == 0 { self.sent_of_first as usize } else { 0 };
            count += 1;
            *slice = IoSlice::new(match segment {
                Segment::Buffered(len) => {
                    at += len;
                    &self.buffer[at - len..at]
                }
                Segment::Chunk(slice) => &slice[skip..],
                Segment::Bytes(bytes) => &bytes[skip..],
                Segment::Zero(len) => &ZEROS[..(ZEROS.len() as u64).min(len - skip as u64) as usize],
            });
            // A long run of zeros takes several writes; what follows it must wait.
            if matches!(segment, Segment::Zero(len) if len - skip as u64 > ZEROS.len() as u64) {
                break;
            }
        }
        count
    }

    /// `written` more bytes have gone to the kernel.
    pub fn advance(&mut self, written: usize) {
        self.pending -= written as u64;
        let mut left = written as u64;
        while left > 0 {
            let first = self.segments.front_mut().expect("no more is written than there was");
            let len = match first {
                Segment::Buffered(len) => {
                    let taken = left.min(*len as u64);
                    *len -= taken as usize;
                    self.sent += taken as usize;
                    left -= taken;
                    if *len == 0 {
                        self.segments.pop_front();
                    }
                    continue;
                }
                Segment::Chunk(slice) => slice.len() as u64,
                Segment::Bytes(bytes) => bytes.len() as u64,
                Segment::Zero(len) => *len,
            };
            let taken = left.min(len - self.sent_of_first);
            self.sent_of_first += taken;
            left -= taken;
            if self.sent_of_first == len {
                self.segments.pop_front();
                self.sent_of_first = 0;
            }
        }
        if self.pending == 0 {
            self.buffer.clear();
            self.buffer.shrink_to(KEEP_CAPACITY);
            self.sent = 0;
        } else if self.sent >= KEEP_CAPACITY && self.sent >= self.buffer.len() / 2 {
            // A client that keeps its window full never lets us run dry. No more moves than was sent since the last time.
            self.buffer.drain(..self.sent);
            self.sent = 0;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::units::ByteLen;

    #[test]
    fn a_client_that_never_lets_it_run_dry_costs_no_more_memory_than_what_waits() {
        let mut output = Output::default();
        let (mut put, mut got) = (0u64, 0u64);
        for _ in 0..20_000 {
            while output.pending() <= 64 << 10 {
                output.append(|buffer| buffer.extend_from_slice(&put.to_le_bytes().repeat(512)));
                put += 1;
            }
            let mut slices: [IoSlice<'_>; MAX_SLICES] = std::array::from_fn(|_| IoSlice::new(&[]));
            assert!(output.slices(&mut slices) > 0);
            assert_eq!(slices[0][..8], got.to_le_bytes());
            output.advance(4096);
            got += 1;
        }
        assert!(output.buffer.capacity() <= 8 * KEEP_CAPACITY, "{} bytes", output.buffer.capacity());
    }

    #[test]
    fn bytes_leave_in_order_however_the_kernel_takes_them() {
        for step in [1, 7, 4096, 100_000, usize::MAX] {
            let mut output = Output::default();
            let mut expected = Vec::new();
            for round in 0u8..5 {
                output.append(|buffer| buffer.extend_from_slice(&[round; 28]));
                expected.extend_from_slice(&[round; 28]);
                for len in [100, COPY_MAX + 1, 300_000] {
                    output.push(Piece::Bytes(vec![round + 10; len].into()));
                    expected.extend(std::iter::repeat_n(round + 10, len));
                    output.push(Piece::Zero(ByteLen(2 * len as u64)));
                    expected.extend(std::iter::repeat_n(0, 2 * len));
                }
            }
            let mut got = Vec::new();
            while output.pending() > 0 {
                let mut slices: [IoSlice<'_>; MAX_SLICES] = std::array::from_fn(|_| IoSlice::new(&[]));
                let count = output.slices(&mut slices);
                let mut taken = 0;
                for slice in &slices[..count] {
                    let part = slice.len().min(step - taken);
                    got.extend_from_slice(&slice[..part]);
                    taken += part;
                    if taken == step {
                        break;
                    }
                }
                output.advance(taken);
            }
            assert!(got == expected, "in steps of {step}");
        }
    }
}
