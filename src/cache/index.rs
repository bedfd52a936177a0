//! Which chunk is where: in a slot, in memory on its way to one, or on its way here.
//!
//! Sharded by the first byte of the id; within a shard the id's own bits are the hash, since ids are uniform already.
//! Invariants, all under the shard's lock: a chunk is in at most one of `table` and `staged`; every place in `table`
//! names a slab of `slabs` and a slot that is FILLED; a slot gets its first pin only through its place here. A
//! shard's lock is never held across I/O or another shard's.
//!
//! Memory: a chunk on the disk costs its 40-byte slot (in the slab) and here a 4-byte place and a control byte, by
//! the table's load 5 to 12 bytes.

use std::collections::{HashMap, HashSet};
use std::hash::{BuildHasherDefault, Hasher};
use std::sync::Arc;
use std::sync::atomic::Ordering;

use bytes::Bytes;
use hashbrown::HashTable;
use parking_lot::{Mutex, MutexGuard};
use tokio::sync::watch;

use super::chunk_ref::ChunkRef;
use super::error::FetchError;
use super::slab::{FILLED, REFERENCED, Slab, VERIFIED};
use crate::format::ChunkId;

/// How many shards there are: a power of two, at most 256.
const SHARDS: usize = 64;

/// A slot of a slab.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Place {
    pub(super) slab: u16,
    pub(super) slot: u16,
}

/// How a flight ended, for all who wait for it; a channel closed without one means: ask again, whoever had it let go
/// of it.
pub(super) type Outcome = Option<Result<ChunkRef, FetchError>>;
/// The waiting end of a flight, kept by its owner and by its shard.
pub(super) type Channel = Arc<watch::Sender<Outcome>>;

/// Takes 8 bytes of an id for its hash.
#[derive(Default)]
pub(super) struct IdHasher(u64);

impl Hasher for IdHasher {
    fn write(&mut self, bytes: &[u8]) {
        // An array's hash is its length, then its bytes: only these count.
        if let Some(word) = bytes.get(8..16).and_then(|word| word.first_chunk()) {
            self.0 = u64::from_ne_bytes(*word);
        }
    }

    fn finish(&self) -> u64 {
        self.0
    }
}

/// A map keyed by chunk ids.
pub(super) type IdMap<V> = HashMap<ChunkId, V, BuildHasherDefault<IdHasher>>;

/// Bytes 8 to 16: others than those that choose the shard.
fn hash(id: &ChunkId) -> u64 {
    let (words, _) = id.as_bytes().as_chunks::<8>();
    u64::from_ne_bytes(words[1])
}

/// One shard. What its fields say about a chunk is true while the lock is held.
#[derive(Default)]
pub(super) struct Shard {
    table: HashTable<Place>,
    /// Every open slab by its number. The same in all shards, so that a lookup takes one lock.
    slabs: Vec<Option<Arc<Slab>>>,
    /// Verified chunks the writer has not written yet.
    pub(super) staged: IdMap<Bytes>,
    /// What is being fetched or verified.
    pub(super) flights: IdMap<Channel>,
    /// For the statistics.
    pub(super) hits: u64,
    pub(super) misses: u64,
    pub(super) joined: u64,
}

/// What a shard knows of a chunk.
pub(super) enum Found {
    /// It may be used.
    Verified(ChunkRef),
    /// Its slot was filled by an earlier process, or has left memory: check it first.
    Unverified(ChunkRef),
    /// It is not here.
    Nothing,
}

impl Shard {
    fn slab(&self, place: Place) -> &Arc<Slab> {
        self.slabs[place.slab as usize].as_ref().expect("a slab leaves the shard after all its places")
    }

    /// The place of a chunk.
    pub(super) fn place(&self, id: &ChunkId) -> Option<Place> {
        self.table.find(hash(id), |place| self.slab(*place).holds(place.slot.into(), id)).copied()
    }

    /// Looks a chunk up and pins it.
    #[inline]
    pub(super) fn find(&self, id: &ChunkId) -> Found {
        let Some(place) = self.place(id) else {
            return match self.staged.get(id) {
                Some(content) => Found::Verified(ChunkRef::heap(content.clone())),
                None => Found::Nothing,
            };
        };
        let slab = self.slab(place);
        let chunk = ChunkRef::pin(slab, place.slot.into());
        let state = &slab.slot(place.slot.into()).state;
        let now = state.load(Ordering::Relaxed);
        if now & VERIFIED == 0 {
            return Found::Unverified(chunk);
        }
        // Most lookups find it set, and are spared the write.
        if now & REFERENCED == 0 {
            state.fetch_or(REFERENCED, Ordering::Relaxed);
        }
        Found::Verified(chunk)
    }

    /// Enters a slot that holds `id` now. `false` where the chunk is here already: the slot stays free.
    pub(super) fn enter(&mut self, id: &ChunkId, place: Place, verified: bool) -> bool {
        if self.place(id).is_some() {
            return false;
        }
        let flags = if verified { FILLED | VERIFIED } else { FILLED };
        self.slab(place).slot(place.slot.into()).state.store(flags, Ordering::Relaxed);
        let Shard { table, slabs, .. } = self;
        table.insert_unique(hash(id), place, |place| {
            let slab =
                slabs[place.slab as usize].as_ref().expect("a slab leaves the shard after all its places");
            hash(&slab.id(place.slot.into()))
        });
        true
    }

    /// Takes a chunk that is not pinned out of its slot. `false`: it is pinned, or was used since the hand last
    /// passed and `spare_used` is set.
    pub(super) fn evict(&mut self, id: &ChunkId, place: Place, spare_used: bool) -> Evicted {
        let state = &self.slab(place).slot(place.slot.into()).state;
        // Acquire: the reads of those who had it pinned come before what will be written there.
        let now = state.load(Ordering::Acquire);
        if now & super::slab::PINS != 0 {
            return Evicted::No;
        }
        if now & FILLED == 0 {
            return Evicted::WasFree;
        }
        if spare_used && now & REFERENCED != 0 {
            state.fetch_and(!REFERENCED, Ordering::Relaxed);
            return Evicted::No;
        }
        // No pins, and the lock is held: nobody else changes the state now.
        state.store(0, Ordering::Relaxed);
        self.remove(id, place);
        Evicted::Yes
    }

    /// Takes a chunk out of the index, pinned or not: whoever has it keeps it, nobody finds it. `false` where it is
    /// not there any more.
    pub(super) fn forget(&mut self, id: &ChunkId, slab: u16, slot: u32) -> bool {
        let Some(place) = self.place(id).filter(|place| place.slab == slab && u32::from(place.slot) == slot)
        else {
            return false;
        };
        let state = &self.slab(place).slot(slot).state;
        state.fetch_and(!(FILLED | VERIFIED | REFERENCED), Ordering::Relaxed);
        self.remove(id, place);
        true
    }

    fn remove(&mut self, id: &ChunkId, place: Place) {
        if let Ok(entry) = self.table.find_entry(hash(id), |other| *other == place) {
            entry.remove();
        }
    }

    /// Ends the flight `channel`, if it is still the one under way for `id`.
    pub(super) fn end_flight(&mut self, id: &ChunkId, channel: &Channel) {
        if self.flights.get(id).is_some_and(|current| Arc::ptr_eq(current, channel)) {
            self.flights.remove(id);
        }
    }
}

/// What became of an attempt to evict.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Evicted {
    /// The slot was freed.
    Yes,
    /// The slot was free already: its chunk was thrown away.
    WasFree,
    /// It stays.
    No,
}

/// All shards.
pub(super) struct Index {
    shards: Box<[Mutex<Shard>]>,
}

impl Index {
    pub(super) fn new() -> Index {
        Index { shards: (0..SHARDS).map(|_| Mutex::default()).collect() }
    }

    /// The shard of a chunk, locked.
    #[inline]
    pub(super) fn shard(&self, id: &ChunkId) -> MutexGuard<'_, Shard> {
        self.shards[id.as_bytes()[0] as usize % SHARDS].lock()
    }

    /// Makes a slab known, before any of its slots is entered.
    pub(super) fn add_slab(&self, slab: &Arc<Slab>) {
        let number = usize::from(slab.number);
        for shard in &self.shards {
            let mut shard = shard.lock();
            if shard.slabs.len() <= number {
                shard.slabs.resize(number + 1, None);
            }
            shard.slabs[number] = Some(slab.clone());
        }
    }

    /// Forgets a slab, after the last of its slots was evicted.
    pub(super) fn remove_slab(&self, number: u16) {
        for shard in &self.shards {
            shard.lock().slabs[usize::from(number)] = None;
        }
    }

    /// Every chunk that is in a slot.
    pub(super) fn chunks(&self) -> HashSet<ChunkId> {
        let mut chunks = HashSet::new();
        for shard in &self.shards {
            let shard = shard.lock();
            chunks.extend(shard.table.iter().map(|place| shard.slab(*place).id(place.slot.into())));
        }
        chunks
    }

    /// Adds up (hits, misses, joined).
    pub(super) fn counts(&self) -> (u64, u64, u64) {
        self.shards.iter().fold((0, 0, 0), |(hits, misses, joined), shard| {
            let shard = shard.lock();
            (hits + shard.hits, misses + shard.misses, joined + shard.joined)
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::format::ChunkSize;
    use crate::format::cache_index::SlabGeometry;
    use crate::lock::FileLock;

    #[test]
    fn a_pinned_chunk_stays_and_a_used_one_gets_one_more_round() {
        let dir = tempfile::tempdir().unwrap();
        let lock = Arc::new(FileLock::take(&dir.path().join("lock")).unwrap());
        let size = ChunkSize::from_log2(20).unwrap();
        let slab = Slab::create(dir.path(), 3, SlabGeometry::new(size, 22).unwrap(), lock).unwrap();
        let content = vec![9; size.len()];
        let (id, place) = (ChunkId::of(&content), Place { slab: 3, slot: 2 });
        slab.fill(2, &id, &content).unwrap();
        let slab = Arc::new(slab);
        let index = Index::new();
        index.add_slab(&slab);
        let mut shard = index.shard(&id);
        assert!(shard.enter(&id, place, true));
        assert!(!shard.enter(&id, Place { slab: 3, slot: 0 }, true), "one chunk, one place");

        let Found::Verified(held) = shard.find(&id) else { panic!("just entered") };
        let second = held.clone();
        assert_eq!(shard.evict(&id, place, false), Evicted::No);
        drop(held);
        assert_eq!(shard.evict(&id, place, false), Evicted::No, "a clone is a pin");
        assert_eq!(*second, *content);
        drop(second);
        assert_eq!(shard.evict(&id, place, true), Evicted::No, "used since the hand passed");
        assert_eq!(shard.evict(&id, place, true), Evicted::Yes);
        assert_eq!(shard.evict(&id, place, true), Evicted::WasFree);
        assert!(matches!(shard.find(&id), Found::Nothing));
    }

    #[test]
    fn a_forgotten_chunk_is_not_found_but_its_slot_is_not_free_while_it_is_held() {
        let dir = tempfile::tempdir().unwrap();
        let lock = Arc::new(FileLock::take(&dir.path().join("lock")).unwrap());
        let size = ChunkSize::from_log2(20).unwrap();
        let slab = Arc::new(Slab::create(dir.path(), 0, SlabGeometry::new(size, 22).unwrap(), lock).unwrap());
        let content = vec![7; size.len()];
        let (id, place) = (ChunkId::of(&content), Place { slab: 0, slot: 1 });
        slab.fill(1, &id, &content).unwrap();
        let index = Index::new();
        index.add_slab(&slab);
        let mut shard = index.shard(&id);
        assert!(shard.enter(&id, place, false));
        let Found::Unverified(held) = shard.find(&id) else { panic!("entered unverified") };
        assert!(!shard.forget(&id, 0, 2), "another slot");
        assert!(shard.forget(&id, 0, 1));
        assert!(!shard.forget(&id, 0, 1));
        assert!(matches!(shard.find(&id), Found::Nothing));
        assert_eq!(shard.evict(&id, place, false), Evicted::No);
        drop(held);
        assert_eq!(shard.evict(&id, place, false), Evicted::WasFree);
    }
}
