//! Chunks the writer knows to be stored, by id: the most recent 2^20 of this version, of the parent's and of those before.
//!
//! Invariant: memory is bounded by the capacity, at 60 MiB for 2^20 chunks, whatever the image holds. An id is found with the full 32 bytes,
//! never by a part of them.

use crate::format::{ChunkId, ChunkLocation, Codec, ObjectId};
use crate::units::ByteOffset;

/// How many chunks are known at most: 128 GiB of different chunks of 128 KiB.
pub const CAPACITY: usize = 1 << 20;

/// An object, by its place in a list that counts how many entries name it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct ObjectSlot(u32);

#[derive(Debug)]
struct ObjectRow {
    /// `None` while the object is being written.
    id: Option<ObjectId>,
    entries: u32,
}

#[derive(Clone, Copy, Debug)]
struct Entry {
    id: ChunkId,
    /// The entry before this one with the same bucket; counted from 1, 0 for none.
    previous: u64,
    object: ObjectSlot,
    offset: u32,
    stored_len: u32,
    codec: Codec,
}

/// Where a known chunk is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Known {
    /// In the object being written.
    Here { offset: u32, stored_len: u32, codec: Codec },
    /// In a finished object.
    There(ChunkLocation),
}

/// The chunks known.
#[derive(Debug)]
pub(super) struct KnownChunks {
    capacity: usize,
    /// The last entry of each bucket, counted from 1, 0 for none.
    heads: Vec<u64>,
    /// A ring: entry n (from 1) is at (n - 1) % capacity and dies when n + capacity is written. Chains run from young to old, so the first dead
    /// entry ends a chain, and nothing is ever unlinked.
    ring: Vec<Entry>,
    /// Entries made so far.
    made: u64,
    objects: Vec<ObjectRow>,
    free: Vec<u32>,
}

impl KnownChunks {
    /// For up to `capacity` chunks, a power of two.
    pub(super) fn new(capacity: usize) -> KnownChunks {
        debug_assert!(capacity.is_power_of_two());
        KnownChunks {
            capacity,
            heads: vec![0; capacity],
            ring: Vec::new(),
            made: 0,
            objects: Vec::new(),
            free: Vec::new(),
        }
    }

    /// Whether another entry would push out an old one.
    pub(super) fn is_full(&self) -> bool {
        self.ring.len() == self.capacity
    }

    fn bucket(&self, id: &ChunkId) -> usize {
        let [a, b, c, d, e, f, g, h, ..] = id.0;
        u64::from_le_bytes([a, b, c, d, e, f, g, h]) as usize & (self.capacity - 1)
    }

    fn find(&self, id: &ChunkId) -> Option<&Entry> {
        let mut number = self.heads[self.bucket(id)];
        while number != 0 && number + self.capacity as u64 > self.made {
            let entry = &self.ring[(number - 1) as usize & (self.capacity - 1)];
            if entry.id == *id {
                return Some(entry);
            }
            number = entry.previous;
        }
        None
    }

    pub(super) fn contains(&self, id: &ChunkId) -> bool {
        self.find(id).is_some()
    }

    pub(super) fn locate(&self, id: &ChunkId) -> Option<Known> {
        let &Entry { id, object, offset, stored_len, codec, .. } = self.find(id)?;
        Some(match self.objects[object.0 as usize].id {
            None => Known::Here { offset, stored_len, codec },
            Some(object) => Known::There(ChunkLocation {
                id,
                object,
                offset: ByteOffset(offset.into()),
                stored_len,
                codec,
            }),
        })
    }

    /// A new object: finished where it has an id, being written where it has none. One at most is being written.
    pub(super) fn add_object(&mut self, id: Option<ObjectId>) -> ObjectSlot {
        let row = ObjectRow { id, entries: 0 };
        match self.free.pop() {
            Some(at) => {
                self.objects[at as usize] = row;
                ObjectSlot(at)
            }
            None => {
                self.objects.push(row);
                ObjectSlot(self.objects.len() as u32 - 1)
            }
        }
    }

    /// The object is complete and has this id. No more chunks are added to it.
    pub(super) fn seal_object(&mut self, slot: ObjectSlot, id: ObjectId) {
        self.objects[slot.0 as usize].id = Some(id);
        self.release_if_unused(slot);
    }

    /// No more chunks are added to a finished object, said once: forget it if none is left.
    pub(super) fn release_if_unused(&mut self, slot: ObjectSlot) {
        let row = &self.objects[slot.0 as usize];
        if row.entries == 0 && row.id.is_some() {
            self.free.push(slot.0);
        }
    }

    /// Adds a chunk that is not known yet; pushes out the oldest where there are too many.
    pub(super) fn add(
        &mut self,
        id: ChunkId,
        object: ObjectSlot,
        offset: u32,
        stored_len: u32,
        codec: Codec,
    ) {
        let bucket = self.bucket(&id);
        let entry = Entry { id, previous: self.heads[bucket], object, offset, stored_len, codec };
        self.objects[object.0 as usize].entries += 1;
        let at = self.made as usize & (self.capacity - 1);
        self.made += 1;
        self.heads[bucket] = self.made;
        if at == self.ring.len() {
            self.ring.push(entry);
            return;
        }
        let old = std::mem::replace(&mut self.ring[at], entry);
        let row = &mut self.objects[old.object.0 as usize];
        row.entries -= 1;
        if row.entries == 0 && row.id.is_some() && old.object != object {
            self.free.push(old.object.0);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn id(n: u64) -> ChunkId {
        let mut id = [0; 32];
        id[..8].copy_from_slice(&n.to_le_bytes());
        ChunkId(id)
    }

    #[test]
    fn the_most_recent_are_found_and_the_older_are_forgotten() {
        let mut known = KnownChunks::new(64);
        for object in 0..100u64 {
            let slot = known.add_object(None);
            for n in object * 5..object * 5 + 5 {
                known.add(id(n), slot, n as u32, 1, Codec::Raw);
                assert_eq!(
                    known.locate(&id(n)),
                    Some(Known::Here { offset: n as u32, stored_len: 1, codec: Codec::Raw })
                );
            }
            known.seal_object(slot, ObjectId([object as u8; 32]));
        }
        for n in 0..500 {
            assert_eq!(known.contains(&id(n)), n >= 500 - 64, "{n}");
            if let Some(Known::There(location)) = known.locate(&id(n)) {
                assert_eq!(location.object, ObjectId([(n / 5) as u8; 32]));
            }
        }
        assert!(known.objects.len() <= 64 / 5 + 3, "{} objects kept", known.objects.len());
    }

    #[test]
    fn ids_of_one_bucket_are_told_apart_by_all_their_bytes() {
        let mut known = KnownChunks::new(2);
        let slot = known.add_object(Some(ObjectId([1; 32])));
        let (mut a, b) = (id(2), id(4));
        known.add(a, slot, 1, 1, Codec::Raw);
        known.add(b, slot, 2, 1, Codec::Raw);
        assert!(known.contains(&a) && known.contains(&b));
        a.0[31] = 1;
        assert!(!known.contains(&a));
    }
}
