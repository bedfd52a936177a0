//! Chunks in use: bytes that stay where they are as long as someone holds them.
//!
//! Leaves: [`ChunkRef`] and [`ChunkSlice`], cheap to clone, to keep in an output queue or to turn into `Bytes`.
//! Invariant: a `ChunkRef` in a slab holds a pin on its slot, and a pinned slot is neither evicted nor written.

use std::fmt;
use std::ops::{Deref, Range};
use std::sync::Arc;
use std::sync::atomic::Ordering;

use bytes::Bytes;

use super::slab::Slab;

/// A verified chunk, pinned in the cache or kept in memory.
#[derive(Clone)]
pub struct ChunkRef(Backing);

#[derive(Clone)]
enum Backing {
    Slot(Pin),
    Heap(Bytes),
}

/// One pin on one slot.
struct Pin {
    slab: Arc<Slab>,
    slot: u32,
}

impl Clone for Pin {
    fn clone(&self) -> Pin {
        // Relaxed: self's own pin keeps the slot as it is meanwhile.
        self.slab.slot(self.slot).state.fetch_add(1, Ordering::Relaxed);
        Pin { slab: self.slab.clone(), slot: self.slot }
    }
}

impl Drop for Pin {
    fn drop(&mut self) {
        // Release, for the Acquire with which the writer looks at the pins: our reads come before its writes.
        self.slab.slot(self.slot).state.fetch_sub(1, Ordering::Release);
    }
}

impl ChunkRef {
    /// Pins a slot. The caller holds the lock of the shard that has it in its index.
    #[inline]
    pub(super) fn pin(slab: &Arc<Slab>, slot: u32) -> ChunkRef {
        slab.slot(slot).state.fetch_add(1, Ordering::Relaxed);
        ChunkRef(Backing::Slot(Pin { slab: slab.clone(), slot }))
    }

    /// A chunk that is (or is for now) in memory only.
    pub(super) fn heap(content: Bytes) -> ChunkRef {
        ChunkRef(Backing::Heap(content))
    }

    /// The slot it is in, if it is in one.
    pub(super) fn slot(&self) -> Option<(&Arc<Slab>, u32)> {
        match &self.0 {
            Backing::Slot(pin) => Some((&pin.slab, pin.slot)),
            Backing::Heap(_) => None,
        }
    }

    /// The chunk's bytes. Touching pages that are not in memory blocks: see [`ChunkRef::is_resident`].
    #[inline]
    pub fn as_bytes(&self) -> &[u8] {
        match &self.0 {
            Backing::Slot(pin) => pin.slab.bytes(pin.slot),
            Backing::Heap(content) => content,
        }
    }

    /// Whether the bytes of `range` can be touched without waiting for a disk. At most two system calls (mincore),
    /// and none where the whole chunk was found in memory within the same second or was never anywhere else. Where it
    /// says `false`, `Cache::reload` brings the chunk in and checks it again.
    #[inline]
    pub fn is_resident(&self, range: Range<usize>) -> bool {
        match &self.0 {
            Backing::Slot(pin) => pin.slab.is_resident(pin.slot, range),
            Backing::Heap(_) => true,
        }
    }

    /// Whether it lives in memory only, because it is not written yet or there was no place for it.
    pub fn is_heap(&self) -> bool {
        matches!(self.0, Backing::Heap(_))
    }

    /// A part of the chunk that holds the pin.
    ///
    /// # Panics
    /// Where `range` does not lie in the chunk, as slices do.
    pub fn slice(self, range: Range<usize>) -> ChunkSlice {
        assert!(
            range.start <= range.end && range.end <= self.as_bytes().len(),
            "{range:?} outside the chunk"
        );
        ChunkSlice { chunk: self, start: range.start as u32, end: range.end as u32 }
    }

    /// The chunk as `Bytes`, which hold the pin. No copy.
    pub fn into_bytes(self) -> Bytes {
        match self.0 {
            Backing::Heap(content) => content,
            slot => Bytes::from_owner(ChunkRef(slot)),
        }
    }
}

impl Deref for ChunkRef {
    type Target = [u8];

    #[inline]
    fn deref(&self) -> &[u8] {
        self.as_bytes()
    }
}

impl AsRef<[u8]> for ChunkRef {
    #[inline]
    fn as_ref(&self) -> &[u8] {
        self.as_bytes()
    }
}

impl fmt::Debug for ChunkRef {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let place = if self.is_heap() { "heap" } else { "slab" };
        write!(f, "ChunkRef({place}, {} bytes)", self.as_bytes().len())
    }
}

/// A part of a chunk, for output queues: holds the chunk's pin, derefs to its bytes.
#[derive(Clone, Debug)]
pub struct ChunkSlice {
    chunk: ChunkRef,
    start: u32,
    end: u32,
}

impl ChunkSlice {
    /// Whether it can be touched without waiting for a disk, as [`ChunkRef::is_resident`].
    pub fn is_resident(&self) -> bool {
        self.chunk.is_resident(self.start as usize..self.end as usize)
    }
}

impl Deref for ChunkSlice {
    type Target = [u8];

    #[inline]
    fn deref(&self) -> &[u8] {
        &self.chunk.as_bytes()[self.start as usize..self.end as usize]
    }
}

impl AsRef<[u8]> for ChunkSlice {
    #[inline]
    fn as_ref(&self) -> &[u8] {
        self
    }
}
