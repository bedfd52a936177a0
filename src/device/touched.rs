//! Which chunks a device's first minutes read, in order: what a later cold start fetches ahead of demand.
//!
//! Enters: each chunk that is read. Leaves: the list, once. Invariant: when it is off, a read costs one load; a chunk is in the list once; the list has at most
//! [`MOST`] chunks.

use std::sync::atomic::{AtomicBool, Ordering};

use parking_lot::Mutex;

use crate::units::ChunkIndex;

/// Chunks of a list: 8 GiB of chunks of 128 KiB, far more than a start reads.
pub const MOST: usize = 1 << 16;

/// The list as it grows.
#[derive(Debug, Default)]
pub(super) struct Touched {
    is_on: AtomicBool,
    inner: Mutex<Option<Inner>>,
}

#[derive(Debug)]
struct Inner {
    /// A bit a chunk.
    seen: Vec<u64>,
    order: Vec<ChunkIndex>,
}

impl Touched {
    /// Begins a list for a device of so many chunks.
    pub(super) fn start(&self, chunks: u64) {
        let words = usize::try_from(chunks.div_ceil(64)).unwrap_or(0);
        *self.inner.lock() = Some(Inner { seen: vec![0; words], order: Vec::new() });
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
        if self.is_on.load(Ordering::Relaxed) {
            self.note_slowly(chunk);
        }
    }

    #[cold]
    fn note_slowly(&self, chunk: ChunkIndex) {
        let mut inner = self.inner.lock();
        let Some(inner) = inner.as_mut() else { return };
        let Some(word) = inner.seen.get_mut((chunk.0 / 64) as usize) else { return };
        let bit = 1 << (chunk.0 % 64);
        if *word & bit == 0 && inner.order.len() < MOST {
            *word |= bit;
            inner.order.push(chunk);
        }
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
        touched.start(1000);
        for chunk in [7, 3, 7, 999, 3, 0, 1024, u64::MAX] {
            touched.note(ChunkIndex(chunk));
        }
        assert_eq!(touched.stop(), Some([7, 3, 999, 0].map(ChunkIndex).to_vec()));
        touched.note(ChunkIndex(5));
        assert_eq!(touched.stop(), None);
    }
}
