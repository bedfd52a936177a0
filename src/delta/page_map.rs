//! What a layer says of every page: a three-level radix tree in memory.
//!
//! Enters: runs of pages with their state. Leaves: the state of a page, the run around it, the runs of everything.
//! Invariant: memory and time of a change are by what it touches (whole GiB regions and 2 MiB leaves change in one step), so
//! zeroing terabytes is as cheap as zeroing megabytes. A clone is a snapshot: it shares all leaves until they change.

use std::sync::Arc;

use crate::format::delta::{PageKind, PageState, Record, Slot};
use crate::units::PageIndex;

const LEAF_PAGES: u64 = 512;
const REGION_LEAVES: u64 = 512;
const REGION_PAGES: u64 = LEAF_PAGES * REGION_LEAVES;

/// 2 MiB of the device.
#[derive(Clone)]
enum Leaf {
    Uniform(PageState),
    Dense(Arc<[PageState; LEAF_PAGES as usize]>),
}

/// 1 GiB of the device.
#[derive(Clone)]
enum Region {
    Uniform(PageState),
    Split(Arc<[Leaf; REGION_LEAVES as usize]>),
}

/// The state of every page of a device. Uniform nodes are base or zero, never data: data is in consecutive slots, not in one.
#[derive(Clone)]
pub struct PageMap {
    regions: Vec<Region>,
    pages: u64,
    data_pages: u64,
}

impl PageMap {
    /// A map of `pages` pages that says nothing: all base.
    pub fn new(pages: u64) -> PageMap {
        let regions = pages.div_ceil(REGION_PAGES) as usize;
        PageMap { regions: vec![Region::Uniform(PageState::BASE); regions], pages, data_pages: 0 }
    }

    /// Pages of the device.
    pub fn pages(&self) -> u64 {
        self.pages
    }

    /// Pages that have a slot.
    pub fn data_pages(&self) -> u64 {
        self.data_pages
    }

    /// The state of a page and how many pages from it on, at most `limit` (at least 1), continue the run: the same for base and zero,
    /// consecutive slots for data. Runs may be told in pieces.
    #[inline]
    pub fn run(&self, at: PageIndex, limit: u64) -> (PageState, u64) {
        let (region, in_region) = (at.0 / REGION_PAGES, at.0 % REGION_PAGES);
        let leaves = match &self.regions[region as usize] {
            Region::Uniform(state) => return (*state, limit.min(REGION_PAGES - in_region)),
            Region::Split(leaves) => leaves,
        };
        let in_leaf = (in_region % LEAF_PAGES) as usize;
        match &leaves[(in_region / LEAF_PAGES) as usize] {
            Leaf::Uniform(state) => (*state, limit.min(LEAF_PAGES - in_leaf as u64)),
            Leaf::Dense(states) => {
                let first = states[in_leaf];
                let mut len = 1;
                let most = limit.min(LEAF_PAGES - in_leaf as u64) as usize;
                while len < most && states[in_leaf + len] == first.step(len as u32) {
                    len += 1;
                }
                (first, len as u64)
            }
        }
    }

    /// Applies a record; tells `let_go` the slots its pages had before, by runs.
    pub fn apply(&mut self, record: Record, let_go: &mut dyn FnMut(Slot, u32)) {
        let Record { first, pages, state } = record;
        let end = first.0 + u64::from(pages);
        debug_assert!(end <= self.pages);
        let mut at = first.0;
        while at < end {
            let region = at / REGION_PAGES;
            let region_end = ((region + 1) * REGION_PAGES).min(self.pages);
            let stop = end.min(region_end);
            let whole = at % REGION_PAGES == 0 && stop == region_end;
            let state = state.step((at - first.0) as u32);
            let node = &mut self.regions[region as usize];
            let released = match state.kind() {
                PageKind::Base | PageKind::Zero if whole => {
                    match std::mem::replace(node, Region::Uniform(state)) {
                        Region::Uniform(_) => 0,
                        Region::Split(leaves) => {
                            leaves.iter().map(|leaf| release(leaf, 0, LEAF_PAGES as usize, let_go)).sum()
                        }
                    }
                }
                _ => {
                    if let Region::Uniform(old) = *node {
                        *node = Region::Split(Arc::new(std::array::from_fn(|_| Leaf::Uniform(old))));
                    }
                    let Region::Split(leaves) = node else { unreachable!("split just above") };
                    set_pages(Arc::make_mut(leaves), at % REGION_PAGES, stop - at, state, let_go)
                }
            };
            self.data_pages -= released;
            if let PageKind::Data(_) = state.kind() {
                self.data_pages += stop - at;
            }
            at = stop;
        }
    }

    /// Everything but base, by runs in ascending order, as records that make this map from an empty one.
    pub fn records(&self) -> impl Iterator<Item = Record> + '_ {
        let mut at = 0;
        let next = move || {
            while at < self.pages {
                let first = PageIndex(at);
                let (state, len) = self.run(first, self.pages - at);
                at += len;
                if state == PageState::BASE {
                    continue;
                }
                let mut pages = len;
                // Joins what the levels of the tree cut, as far as the record's field reaches.
                while at < self.pages {
                    let (more, len) = self.run(PageIndex(at), self.pages - at);
                    if more != state.step(pages as u32) || pages + len > u64::from(u32::MAX) {
                        break;
                    }
                    pages += len;
                    at += len;
                }
                return Some(Record { first, pages: pages as u32, state });
            }
            None
        };
        std::iter::from_fn(next)
    }
}

/// Sets `len` pages of a region from page `at` on; returns how many of them had a slot.
fn set_pages(
    leaves: &mut [Leaf; REGION_LEAVES as usize],
    at: u64,
    len: u64,
    state: PageState,
    let_go: &mut dyn FnMut(Slot, u32),
) -> u64 {
    let mut released = 0;
    let mut done = 0;
    while done < len {
        let leaf = &mut leaves[((at + done) / LEAF_PAGES) as usize];
        let from = ((at + done) % LEAF_PAGES) as usize;
        let to = (LEAF_PAGES as usize).min(from + (len - done) as usize);
        released += release(leaf, from, to, let_go);
        let state = state.step(done as u32);
        match state.kind() {
            PageKind::Base | PageKind::Zero if to - from == LEAF_PAGES as usize => {
                *leaf = Leaf::Uniform(state);
            }
            _ => {
                if let Leaf::Uniform(old) = *leaf {
                    *leaf = Leaf::Dense(Arc::new([old; LEAF_PAGES as usize]));
                }
                let Leaf::Dense(states) = leaf else { unreachable!("dense just above") };
                for (step, page) in Arc::make_mut(states)[from..to].iter_mut().enumerate() {
                    *page = state.step(step as u32);
                }
            }
        }
        done += (to - from) as u64;
    }
    released
}

/// Tells `let_go` the slots of pages `from..to` of a leaf; returns how many there are.
fn release(leaf: &Leaf, from: usize, to: usize, let_go: &mut dyn FnMut(Slot, u32)) -> u64 {
    let Leaf::Dense(states) = leaf else { return 0 };
    let mut released = 0;
    let mut at = from;
    while at < to {
        let first = states[at];
        let start = at;
        at += 1;
        if let PageKind::Data(slot) = first.kind() {
            while at < to && states[at] == first.step((at - start) as u32) {
                at += 1;
            }
            let_go(slot, (at - start) as u32);
            released += (at - start) as u64;
        }
    }
    released
}

#[cfg(test)]
mod tests {
    use super::*;
    use rand::{Rng, SeedableRng, rngs::StdRng};

    fn collect(map: &PageMap) -> Vec<PageState> {
        let mut all = Vec::new();
        while (all.len() as u64) < map.pages() {
            let (state, len) = map.run(PageIndex(all.len() as u64), u64::MAX);
            let len = len.min(map.pages() - all.len() as u64);
            all.extend((0..len).map(|i| state.step(i as u32)));
        }
        all
    }

    #[test]
    fn random_changes_match_a_flat_array() {
        for seed in 0..20 {
            let mut rng = StdRng::seed_from_u64(seed);
            let pages = REGION_PAGES + 5_000;
            let mut map = PageMap::new(pages);
            let mut flat = vec![PageState::BASE; pages as usize];
            let mut next_slot = 0;
            for _ in 0..60 {
                let len = match rng.random_range(0..4) {
                    0 => rng.random_range(1..=pages),
                    1 => rng.random_range(1..=2_000),
                    _ => rng.random_range(1..=8),
                };
                let first = if rng.random_bool(0.3) { 0 } else { rng.random_range(0..=pages - len) };
                let state = match rng.random_range(0..3) {
                    0 => PageState::BASE,
                    1 => PageState::ZERO,
                    _ => {
                        next_slot += len as u32;
                        PageState::data(Slot(next_slot - len as u32))
                    }
                };
                let mut freed = Vec::new();
                map.apply(
                    Record { first: PageIndex(first), pages: len as u32, state },
                    &mut |slot, count| freed.extend((0..count).map(|i| Slot(slot.0 + i))),
                );
                let range = first as usize..(first + len) as usize;
                let expected: Vec<Slot> = flat[range.clone()]
                    .iter()
                    .filter_map(|old| match old.kind() {
                        PageKind::Data(slot) => Some(slot),
                        _ => None,
                    })
                    .collect();
                assert_eq!(freed, expected, "seed {seed}");
                for (step, page) in flat[range].iter_mut().enumerate() {
                    *page = state.step(step as u32);
                }
            }
            assert!(collect(&map) == flat, "seed {seed}");
            let data = flat.iter().filter(|state| matches!(state.kind(), PageKind::Data(_))).count();
            assert_eq!(map.data_pages(), data as u64, "seed {seed}");

            let mut copy = PageMap::new(pages);
            for record in map.records() {
                copy.apply(record, &mut |_, _| panic!("records never overlap"));
            }
            assert!(collect(&copy) == flat, "seed {seed}");
        }
    }

    #[test]
    fn zeroing_16_tib_takes_no_time_and_no_memory_to_speak_of() {
        let mut map = PageMap::new(1 << 32);
        let start = std::time::Instant::now();
        let zero = Record { first: PageIndex(0), pages: u32::MAX, state: PageState::ZERO };
        map.apply(zero, &mut |_, _| {});
        assert!(start.elapsed().as_millis() < 500);
        assert_eq!(map.records().collect::<Vec<_>>(), [zero]);
    }

    #[test]
    fn a_clone_is_a_snapshot() {
        let mut map = PageMap::new(10_000);
        let write = Record { first: PageIndex(10), pages: 4, state: PageState::data(Slot(0)) };
        map.apply(write, &mut |_, _| {});
        let snapshot = map.clone();
        map.apply(Record { state: PageState::ZERO, ..write }, &mut |_, _| {});
        assert_eq!(snapshot.records().collect::<Vec<_>>(), [write]);
    }
}
