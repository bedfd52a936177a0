//! What the cache counted.

use std::sync::atomic::{AtomicU64, Ordering};

use crate::units::ByteLen;

/// The counters at one moment; all but `used`, `blobs`, `allocated` and `limit` since the cache was opened.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct CacheStats {
    /// Chunks that were here when asked for.
    pub hits: u64,
    /// Chunks someone was told to fetch.
    pub misses: u64,
    /// Times someone waited for a chunk that was being fetched or verified already.
    pub joined: u64,
    /// Bytes of verified chunks that came in.
    pub fetched: ByteLen,
    /// Chunks found on the disk and verified at their first use, or again after they had left memory.
    pub verified: u64,
    /// Entries that were not what they said, and were thrown away: slots, small objects, whole slabs.
    pub healed: u64,
    /// Chunks that made room for others.
    pub evicted: u64,
    /// Chunks that were served from memory and not kept: no place on the disk, all of the limit in use, or the write
    /// queue full.
    pub heap_fallbacks: u64,
    /// Bytes of chunks on the disk.
    pub used: ByteLen,
    /// Bytes of small objects on the disk.
    pub blobs: ByteLen,
    /// Bytes of the slab files: what the cache takes of the disk for chunks, used or not.
    pub allocated: ByteLen,
    /// The limit for everything together.
    pub limit: ByteLen,
}

/// The counters themselves. Hits are counted in the shards, under their locks.
#[derive(Default)]
pub(super) struct Counters {
    pub(super) fetched: AtomicU64,
    pub(super) verified: AtomicU64,
    pub(super) healed: AtomicU64,
    pub(super) evicted: AtomicU64,
    pub(super) heap_fallbacks: AtomicU64,
    pub(super) used: AtomicU64,
    pub(super) allocated: AtomicU64,
}

/// Adds to a counter that orders nothing.
pub(super) fn count(counter: &AtomicU64, by: u64) {
    counter.fetch_add(by, Ordering::Relaxed);
}

/// Takes from a counter that orders nothing.
pub(super) fn discount(counter: &AtomicU64, by: u64) {
    counter.fetch_sub(by, Ordering::Relaxed);
}

/// Reads a counter that orders nothing.
pub(super) fn value(counter: &AtomicU64) -> u64 {
    counter.load(Ordering::Relaxed)
}
