//! A cache bounded in bytes whose hits take a read lock and no allocation: second-chance (clock) eviction, in shards.
//!
//! Invariant: a shard's weights sum up to at most its part of the capacity, or it holds a single entry that is heavier.

use std::collections::HashMap;
use std::hash::{BuildHasher, BuildHasherDefault, Hash, Hasher};
use std::sync::atomic::{AtomicBool, Ordering};

use parking_lot::RwLock;

const SHARDS: usize = 8;
/// What an entry costs beside its value.
const ENTRY_BYTES: usize = 96;

/// Mixes whole words; for keys that are small numbers or hashes themselves, and not chosen by an enemy: an image's own block numbers
/// and verified ids.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct WordHasher(u64);

impl Hasher for WordHasher {
    fn write(&mut self, bytes: &[u8]) {
        for word in bytes.chunks(8) {
            let mut padded = [0; 8];
            padded[..word.len()].copy_from_slice(word);
            self.write_u64(u64::from_le_bytes(padded));
        }
    }

    fn write_u64(&mut self, word: u64) {
        let product = u128::from(self.0 ^ word ^ 0x9e37_79b9_7f4a_7c15) * 0xd6e8_feb8_6659_fd93;
        self.0 = product as u64 ^ (product >> 64) as u64;
    }

    fn finish(&self) -> u64 {
        self.0
    }
}

type Build = BuildHasherDefault<WordHasher>;

struct Slot<K, V> {
    key: K,
    value: V,
    weight: usize,
    used: AtomicBool,
}

struct Shard<K, V> {
    /// Key to index in `slots`.
    map: HashMap<K, usize, Build>,
    slots: Vec<Slot<K, V>>,
    hand: usize,
    weight: usize,
}

/// The cache.
pub(super) struct ClockCache<K, V> {
    shards: [RwLock<Shard<K, V>>; SHARDS],
    shard_capacity: usize,
}

impl<K: Copy + Eq + Hash, V: Clone> ClockCache<K, V> {
    pub(super) fn new(capacity_bytes: usize) -> ClockCache<K, V> {
        let shard = || RwLock::new(Shard { map: HashMap::default(), slots: Vec::new(), hand: 0, weight: 0 });
        ClockCache { shards: std::array::from_fn(|_| shard()), shard_capacity: capacity_bytes / SHARDS }
    }

    fn shard(&self, key: &K) -> &RwLock<Shard<K, V>> {
        // The map uses the low bits of the same hash.
        &self.shards[(Build::default().hash_one(key) >> 40) as usize % SHARDS]
    }

    pub(super) fn get(&self, key: &K) -> Option<V> {
        let shard = self.shard(key).read();
        let slot = &shard.slots[*shard.map.get(key)?];
        slot.used.store(true, Ordering::Relaxed);
        Some(slot.value.clone())
    }

    pub(super) fn insert(&self, key: K, value: V, value_bytes: usize) {
        let weight = value_bytes + ENTRY_BYTES;
        let mut shard = self.shard(&key).write();
        let shard = &mut *shard;
        if let Some(&at) = shard.map.get(&key) {
            shard.remove(at);
        }
        while !shard.slots.is_empty() && shard.weight + weight > self.shard_capacity {
            shard.evict_one();
        }
        shard.weight += weight;
        shard.map.insert(key, shard.slots.len());
        shard.slots.push(Slot { key, value, weight, used: AtomicBool::new(false) });
    }

    #[cfg(test)]
    fn weight(&self) -> usize {
        self.shards.iter().map(|shard| shard.read().weight).sum()
    }
}

impl<K: Copy + Eq + Hash, V> Shard<K, V> {
    fn remove(&mut self, at: usize) {
        let slot = self.slots.swap_remove(at);
        self.map.remove(&slot.key);
        self.weight -= slot.weight;
        if let Some(moved) = self.slots.get(at) {
            self.map.insert(moved.key, at);
        }
    }

    /// Removes the next entry that was not used since the hand last passed. Two turns at most: the first clears every mark.
    fn evict_one(&mut self) {
        loop {
            if self.hand >= self.slots.len() {
                self.hand = 0;
            }
            if self.slots[self.hand].used.swap(false, Ordering::Relaxed) {
                self.hand += 1;
            } else {
                self.remove(self.hand);
                return;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_weight_stays_bounded_and_what_is_used_stays_longer() {
        let cache = ClockCache::new(64 << 10);
        cache.insert(0u64, 0u64, 100);
        for key in 1..10_000 {
            cache.insert(key, key, 100);
            assert_eq!(cache.get(&0), Some(0), "after {key}");
        }
        assert!(cache.weight() <= 64 << 10);
        assert_eq!(cache.get(&1), None);
    }

    #[test]
    fn an_entry_heavier_than_the_cache_is_kept_alone() {
        let cache = ClockCache::new(8);
        cache.insert(1u64, 'a', 1 << 20);
        assert_eq!(cache.get(&1), Some('a'));
        for key in 2..100 {
            cache.insert(key, 'b', 1 << 20);
        }
        assert!(cache.weight() <= SHARDS * ((1 << 20) + ENTRY_BYTES));
    }

    #[test]
    fn an_entry_that_is_set_again_has_its_new_value_and_weight() {
        let cache = ClockCache::new(1 << 20);
        cache.insert(1u64, 'a', 1000);
        cache.insert(1u64, 'b', 10);
        assert_eq!(cache.get(&1), Some('b'));
        assert_eq!(cache.weight(), 10 + ENTRY_BYTES);
    }
}
