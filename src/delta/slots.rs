//! Which slots of a layer's `data` are taken, and which of those no commit has seen yet.
//!
//! Enters: how many slots are wanted, which are let go. Leaves: runs of free slots. Invariant: a slot is handed out only while it
//! is free; it is *fresh* from then until [`Slots::seal_fresh`], and only a fresh slot may be written again in place.

use crate::format::delta::{MAX_SLOTS, Slot};

const WORD_BITS: u32 = 64;

/// A bitmap allocator: next fit among free slots while enough are free, else the end of the file.
pub struct Slots {
    used: Vec<u64>,
    fresh: Vec<u64>,
    /// Words of `fresh` that may hold a bit.
    fresh_words: Vec<u32>,
    /// Slots the file has; the next one is its end.
    len: u32,
    free: u32,
    cursor: u32,
    limit: u32,
}

impl Slots {
    /// None taken, in a file with room for none.
    pub fn new() -> Slots {
        Slots {
            used: Vec::new(),
            fresh: Vec::new(),
            fresh_words: Vec::new(),
            len: 0,
            free: 0,
            cursor: 0,
            limit: MAX_SLOTS,
        }
    }

    /// Slots the file must have room for.
    pub fn len(&self) -> u32 {
        self.len
    }

    fn grow_to(&mut self, len: u32) {
        if len > self.len {
            self.free += len - self.len;
            self.len = len;
            let words = len.div_ceil(WORD_BITS) as usize;
            self.used.resize(words, 0);
            self.fresh.resize(words, 0);
        }
    }

    fn bit(words: &[u64], slot: u32) -> bool {
        words[(slot / WORD_BITS) as usize] >> (slot % WORD_BITS) & 1 == 1
    }

    /// Marks slots found in a layer's map as taken; they are not fresh. `false` where one was taken already.
    #[must_use]
    pub fn adopt(&mut self, first: Slot, count: u32) -> bool {
        self.grow_to(first.0 + count);
        for slot in first.0..first.0 + count {
            if Self::bit(&self.used, slot) {
                return false;
            }
            self.used[(slot / WORD_BITS) as usize] |= 1 << (slot % WORD_BITS);
        }
        self.free -= count;
        true
    }

    /// Takes up to `want` consecutive slots, at least one; `None` when the layer has no number left for one more.
    pub fn take(&mut self, want: u32) -> Option<(Slot, u32)> {
        // Filling holes costs a search; it is worth it once a fifth of the file is holes.
        let first = if self.free > 256 && self.free > self.len / 5 || self.len == self.limit {
            self.find_free()?
        } else {
            let first = self.len;
            self.grow_to(first.saturating_add(want).min(self.limit));
            first
        };
        let mut count = 0;
        while count < want && first + count < self.len && !Self::bit(&self.used, first + count) {
            let slot = first + count;
            let word = (slot / WORD_BITS) as usize;
            self.used[word] |= 1 << (slot % WORD_BITS);
            if self.fresh[word] == 0 {
                self.fresh_words.push(word as u32);
            }
            self.fresh[word] |= 1 << (slot % WORD_BITS);
            count += 1;
        }
        self.free -= count;
        self.cursor = first + count;
        Some((Slot(first), count))
    }

    fn find_free(&mut self) -> Option<u32> {
        if self.free == 0 {
            return None;
        }
        let words = self.used.len();
        let start = (self.cursor / WORD_BITS) as usize;
        // The cursor's own word comes twice: first from the cursor on, at last from its start.
        for step in 0..=words {
            let word = (start + step) % words;
            let mut free = !self.used[word];
            if step == 0 {
                free &= u64::MAX << (self.cursor % WORD_BITS);
            }
            let slot = word as u32 * WORD_BITS + free.trailing_zeros();
            if free != 0 && slot < self.len {
                return Some(slot);
            }
        }
        None
    }

    /// Gives slots back.
    pub fn release(&mut self, first: Slot, count: u32) {
        for slot in first.0..first.0 + count {
            debug_assert!(Self::bit(&self.used, slot));
            let mask = !(1 << (slot % WORD_BITS));
            self.used[(slot / WORD_BITS) as usize] &= mask;
            self.fresh[(slot / WORD_BITS) as usize] &= mask;
        }
        self.free += count;
    }

    /// How many slots from `first` on, at most `limit` (at least 1), are alike in being fresh or not, and which.
    pub fn fresh_run(&self, first: Slot, limit: u32) -> (bool, u32) {
        let fresh = Self::bit(&self.fresh, first.0);
        let more = (1..limit).take_while(|step| Self::bit(&self.fresh, first.0 + step) == fresh).count();
        (fresh, 1 + more as u32)
    }

    /// A commit is captured: nothing is fresh any more.
    pub fn seal_fresh(&mut self) {
        for word in self.fresh_words.drain(..) {
            self.fresh[word as usize] = 0;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rand::{Rng, SeedableRng, rngs::StdRng};
    use std::collections::HashSet;

    #[test]
    fn no_slot_is_handed_out_twice() {
        for seed in 0..50 {
            let mut rng = StdRng::seed_from_u64(seed);
            let mut slots = Slots::new();
            let mut taken = HashSet::new();
            for _ in 0..400 {
                if rng.random_bool(0.6) {
                    let want = rng.random_range(1..=200);
                    let (first, count) = slots.take(want).unwrap();
                    assert!((1..=want).contains(&count), "seed {seed}");
                    for slot in first.0..first.0 + count {
                        assert!(taken.insert(slot), "seed {seed}: slot {slot} twice");
                    }
                } else {
                    let gone: Vec<u32> = taken.iter().copied().filter(|_| rng.random_bool(0.3)).collect();
                    for slot in gone {
                        taken.remove(&slot);
                        slots.release(Slot(slot), 1);
                    }
                }
                assert_eq!(slots.free as usize, slots.len() as usize - taken.len(), "seed {seed}");
            }
            let bound = 400 * 200;
            assert!(slots.len() < bound, "seed {seed}: holes are used again");
        }
    }

    #[test]
    fn slots_are_fresh_until_a_commit_is_captured() {
        let mut slots = Slots::new();
        let (first, count) = slots.take(10).unwrap();
        assert_eq!(slots.fresh_run(first, count), (true, 10));
        slots.seal_fresh();
        assert_eq!(slots.fresh_run(first, count), (false, 10));
        let (more, _) = slots.take(5).unwrap();
        assert_eq!(more, Slot(10));
        assert_eq!(slots.fresh_run(Slot(8), 7), (false, 2));
        assert_eq!(slots.fresh_run(Slot(10), 5), (true, 5));
    }

    #[test]
    fn the_last_slot_number_is_the_end() {
        let mut slots = Slots::new();
        slots.limit = 100;
        assert_eq!(slots.take(90).unwrap().1, 90);
        assert_eq!(slots.take(90).unwrap(), (Slot(90), 10));
        assert_eq!(slots.take(1), None);
        slots.release(Slot(42), 1);
        assert_eq!(slots.take(5), Some((Slot(42), 1)));
    }

    #[test]
    fn a_slot_two_records_claim_is_found() {
        let mut slots = Slots::new();
        assert!(slots.adopt(Slot(5), 10));
        assert!(!slots.adopt(Slot(14), 2));
    }
}
