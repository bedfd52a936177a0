//! Reading ahead: who reads chunk after chunk finds the next ones here.
//!
//! Enters: which chunks reads waited for. Leaves: which chunks to fetch before they are asked for, and *marks*: chunks whose use says that it is time for
//! more. Invariant: pure bookkeeping of a few words a stream; what it asks for ahead of a reader is at most [`Ahead::most`] chunks.
//!
//! As the kernel does it for files: a second read behind a first one makes a stream, its window doubles each time half of it is used, and a read elsewhere
//! begins a stream of its own. Several connections that share one sweep ask out of order, so "behind" has some slack.

use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};

use parking_lot::Mutex;

use crate::units::ChunkIndex;

/// Sweeps told apart.
const STREAMS: usize = 8;
/// Chunks fetched ahead when a stream begins.
const FIRST_WINDOW: u64 = 4;
/// A read may be this many chunks behind or in front of where it is expected.
const BEHIND: u64 = 32;
const IN_FRONT: u64 = 8;
/// No chunk.
const NOWHERE: u64 = u64::MAX;

/// The streams of one device.
#[derive(Debug)]
pub(super) struct Ahead {
    most: u64,
    streams: Mutex<Streams>,
    /// The mark of each stream; read without a lock by every read.
    marks: [AtomicU64; STREAMS],
}

#[derive(Debug, Default)]
struct Streams {
    streams: Vec<Stream>,
    clock: u64,
}

#[derive(Clone, Copy, Debug)]
struct Stream {
    /// One past the last chunk read.
    next: u64,
    /// One past the last chunk asked for ahead.
    end: u64,
    window: u64,
    used: u64,
}

impl Ahead {
    /// At most `most` chunks ahead of a reader; 0 is never ahead.
    pub(super) fn new(most: u64) -> Ahead {
        let marks = std::array::from_fn(|_| AtomicU64::new(NOWHERE));
        Ahead { most, streams: Mutex::default(), marks }
    }

    /// Whether this chunk's use should be told to [`Ahead::used`] though it is here.
    #[inline]
    pub(super) fn is_mark(&self, chunk: ChunkIndex) -> bool {
        self.marks.iter().any(|mark| mark.load(Ordering::Relaxed) == chunk.0)
    }

    /// A read used these chunks: what to fetch now, before `end`, the device's.
    pub(super) fn used(&self, chunks: Range<u64>, end: u64) -> Option<Range<u64>> {
        if self.most == 0 || chunks.is_empty() {
            return None;
        }
        let mut streams = self.streams.lock();
        // A mark has done its work once it is used, whosever it was: else that chunk would be told of for ever.
        for mark in self.marks.iter().filter(|mark| chunks.contains(&mark.load(Ordering::Relaxed))) {
            mark.store(NOWHERE, Ordering::Relaxed);
        }
        streams.clock += 1;
        let clock = streams.clock;
        let known = streams.streams.iter().position(|stream| {
            // A single read is no stream yet: only its very neighbours make it one.
            let (behind, in_front) = if stream.window == 0 { (1, 1) } else { (BEHIND, IN_FRONT) };
            chunks.start + behind >= stream.next && chunks.start <= stream.end.max(stream.next) + in_front
        });
        let Some(at) = known else {
            let at = streams.place();
            let next = chunks.end;
            streams.streams[at] = Stream { next, end: next, window: 0, used: clock };
            self.marks[at].store(NOWHERE, Ordering::Relaxed);
            return None;
        };
        let stream = &mut streams.streams[at];
        stream.used = clock;
        stream.next = stream.next.max(chunks.end);
        stream.end = stream.end.max(stream.next);
        if stream.end - stream.next > stream.window / 2 {
            return None;
        }
        stream.window = (stream.window * 2).clamp(FIRST_WINDOW, self.most);
        let wanted = stream.end..(stream.next + stream.window).min(end);
        if wanted.is_empty() {
            return None;
        }
        stream.end = wanted.end;
        let mark = stream.next + (stream.end - stream.next) / 2;
        self.marks[at].store(mark, Ordering::Relaxed);
        Some(wanted)
    }
}

impl Streams {
    /// Where a new stream goes: in the place of the one that was not used for longest.
    fn place(&mut self) -> usize {
        if self.streams.len() < STREAMS {
            self.streams.push(Stream { next: 0, end: 0, window: 0, used: 0 });
            return self.streams.len() - 1;
        }
        let oldest = self.streams.iter().enumerate().min_by_key(|(_, stream)| stream.used);
        oldest.map_or(0, |(at, _)| at)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const END: u64 = 1 << 20;

    /// Reads chunk after chunk as a device does: what is not here or marked is told.
    fn sweep(ahead: &Ahead, here: &mut Vec<Range<u64>>, chunks: Range<u64>) -> u64 {
        let mut missed = 0;
        for chunk in chunks {
            let found = here.iter().any(|range| range.contains(&chunk));
            missed += u64::from(!found);
            if !found || ahead.is_mark(ChunkIndex(chunk)) {
                here.extend(ahead.used(chunk..chunk + 1, END));
            }
        }
        missed
    }

    #[test]
    fn a_sweep_misses_twice_and_never_again() {
        let (ahead, mut here) = (Ahead::new(64), Vec::new());
        assert_eq!(sweep(&ahead, &mut here, 100..5000), 2);
        assert!(here.last().unwrap().end <= 5000 + 64);
        for pair in here.windows(2) {
            assert_eq!(pair[0].end, pair[1].start, "nothing is asked for twice");
        }
    }

    #[test]
    fn scattered_reads_ask_for_nothing_ahead() {
        let ahead = Ahead::new(64);
        for n in 0..1000u64 {
            let chunk = n * 7919 * 1000 % END;
            assert_eq!(ahead.used(chunk..chunk + 1, END), None, "read {n}");
        }
    }

    #[test]
    fn several_sweeps_at_once_are_told_apart() {
        let (ahead, mut here) = (Ahead::new(64), Vec::new());
        let mut missed = 0;
        for step in 0..400 {
            for sweep_of in 0..4 {
                let at = sweep_of * 100_000 + step;
                missed += sweep(&ahead, &mut here, at..at + 1);
            }
        }
        assert_eq!(missed, 8);
    }

    #[test]
    fn a_sweep_out_of_order_is_one_stream() {
        let (ahead, mut asked) = (Ahead::new(64), 0);
        for group in 0..100u64 {
            for at in [1, 0, 3, 2, 5, 4, 7, 6] {
                let chunk = group * 8 + at;
                asked += ahead.used(chunk..chunk + 1, END).map_or(0, |range| range.end - range.start);
            }
        }
        assert!((790..=900).contains(&asked), "{asked} chunks were asked for ahead of 800");
    }

    #[test]
    fn a_mark_is_told_of_once() {
        let (ahead, mut here) = (Ahead::new(64), Vec::new());
        sweep(&ahead, &mut here, END - 3000..END);
        for _ in 0..2 {
            let marked: Vec<u64> = (END - 3000..END).filter(|at| ahead.is_mark(ChunkIndex(*at))).collect();
            for at in marked {
                ahead.used(at..at + 1, END);
            }
        }
        assert!(
            (END - 3000..END).all(|at| !ahead.is_mark(ChunkIndex(at))),
            "what was swept stays slow to read"
        );
    }

    #[test]
    fn nothing_is_asked_for_past_the_end() {
        let ahead = Ahead::new(64);
        ahead.used(10..11, 14);
        assert_eq!(ahead.used(11..12, 14), Some(12..14));
        assert_eq!(ahead.used(12..13, 14), None);
        assert_eq!(ahead.used(13..14, 14), None);
    }
}
