//! Which chunks a device's first minutes read, in order: what a later cold start fetches ahead of demand.
//!
//! Enters: each chunk that is read. Leaves: the list, once. Invariant: when it is off, a read costs one load; a chunk is in the list once; the list has at most
//! [`MOST`] chunks.

use std::collections::HashSet;
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

#[derive(Debug, Default)]
struct Inner {
    seen: HashSet<u64>,
    order: Vec<ChunkIndex>,
}

impl Touched {
    /// Begins a list.
    pub(super) fn start(&self) {
        *self.inner.lock() = Some(Inner::default());
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
        if inner.order.len() < MOST && inner.seen.insert(chunk.0) {
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
        touched.start();
        for chunk in [7, 3, 7, 999, 3, 0] {
            touched.note(ChunkIndex(chunk));
        }
        assert_eq!(touched.stop(), Some([7, 3, 999, 0].map(ChunkIndex).to_vec()));
        touched.note(ChunkIndex(5));
        assert_eq!(touched.stop(), None);
    }
}
