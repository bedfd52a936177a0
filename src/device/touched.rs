//! Which chunks a device's first minutes read, in order: what a later cold start fetches ahead of demand.
//!
//! Enters: each chunk that is read. Leaves: the list, once. Invariant: a read costs one load when it is off, and as a rule two when it is on; a chunk is in the
//! list once; the list has at most [`MOST`] chunks.

use std::collections::HashSet;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use parking_lot::Mutex;

use crate::units::ChunkIndex;

/// Chunks of a list: 8 GiB of chunks of 128 KiB, far more than a start reads.
pub const MOST: usize = 1 << 16;

/// Listed chunks that are known without the lock.
const RECENT: usize = 4096;
/// No chunk.
const NOWHERE: u64 = u64::MAX;

/// The list as it grows.
#[derive(Debug)]
pub(super) struct Touched {
    is_on: AtomicBool,
    /// Some of what is listed, each chunk in the place its number says. Changed only under the lock.
    recent: Box<[AtomicU64]>,
    inner: Mutex<Option<Inner>>,
}

#[derive(Debug, Default)]
struct Inner {
    seen: HashSet<u64>,
    order: Vec<ChunkIndex>,
}

impl Default for Touched {
    fn default() -> Touched {
        let recent = (0..RECENT).map(|_| AtomicU64::new(NOWHERE)).collect();
        Touched { is_on: AtomicBool::new(false), recent, inner: Mutex::default() }
    }
}

impl Touched {
    /// Begins a list.
    pub(super) fn start(&self) {
        let mut inner = self.inner.lock();
        *inner = Some(Inner::default());
        for place in &self.recent {
            place.store(NOWHERE, Ordering::Relaxed);
        }
        self.is_on.store(true, Ordering::Release);
    }

    /// Ends it. `None` where none was begun.
    pub(super) fn stop(&self) -> Option<Vec<ChunkIndex>> {
        self.is_on.store(false, Ordering::Release);
        self.inner.lock().take().map(|inner| inner.order)
    }

    /// What is in the list so far.
    pub(super) fn so_far(&self) -> Vec<ChunkIndex> {
        self.inner.lock().as_ref().map_or_else(Vec::new, |inner| inner.order.clone())
    }

    /// How long it is so far.
    pub(super) fn len(&self) -> usize {
        self.inner.lock().as_ref().map_or(0, |inner| inner.order.len())
    }

    #[inline]
    pub(super) fn note(&self, chunk: ChunkIndex) {
        if self.is_on.load(Ordering::Relaxed) && self.place(chunk).load(Ordering::Relaxed) != chunk.0 {
            self.note_slowly(chunk);
        }
    }

    #[inline]
    fn place(&self, chunk: ChunkIndex) -> &AtomicU64 {
        &self.recent[chunk.0 as usize % RECENT]
    }

    #[cold]
    fn note_slowly(&self, chunk: ChunkIndex) {
        let mut inner = self.inner.lock();
        let Some(inner) = inner.as_mut() else { return };
        if inner.order.len() < MOST && inner.seen.insert(chunk.0) {
            inner.order.push(chunk);
        }
        self.place(chunk).store(chunk.0, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_chunk_is_listed_once_in_the_order_of_its_first_use() {
        let touched = Touched::default();
        touched.note(ChunkIndex(1));
        assert_eq!(touched.stop(), None, "off until it is started");
        touched.start();
        for chunk in [7, 3, 7, 999, 3, 0] {
            touched.note(ChunkIndex(chunk));
        }
        assert_eq!(touched.stop(), Some([7, 3, 999, 0].map(ChunkIndex).to_vec()));
        touched.note(ChunkIndex(5));
        assert_eq!(touched.stop(), None);
    }

    #[test]
    fn chunks_that_share_a_place_are_told_apart() {
        let touched = Touched::default();
        let others: Vec<ChunkIndex> = (0..3).map(|n| ChunkIndex(5 + n * RECENT as u64)).collect();
        for _ in 0..2 {
            touched.start();
            for chunk in others.iter().chain(&others) {
                touched.note(*chunk);
            }
            assert_eq!(touched.stop(), Some(others.clone()), "a list begun anew forgets the one before");
        }
    }
}
