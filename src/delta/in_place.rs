//! Writes in place, and readers who must not see half of one.
//!
//! A slot that no commit names is written again in place. Files promise nothing to a reader who comes across such a write: he may find its first half. So
//! writers count the writes in place they begin and end, and a reader who finds that one was under way reads again.
//! Invariant: what [`InPlace::read`] returns was read while no write in place to those slots was under way.

use std::sync::atomic::{AtomicU64, Ordering};

use smallvec::SmallVec;

use crate::format::delta::Slot;

/// Counters; slots share one by their number.
const COUNTERS: u32 = 64;
const SLOTS_OF_A_COUNTER: u32 = 64;

#[derive(Default)]
struct Counter {
    begun: AtomicU64,
    ended: AtomicU64,
}

/// The counters of one layer. All accesses are sequentially consistent: each must be seen in its order with the reads and writes of the file around it.
pub struct InPlace {
    counters: Box<[Counter]>,
}

impl InPlace {
    /// Nothing was written yet.
    pub fn new() -> InPlace {
        InPlace { counters: (0..COUNTERS).map(|_| Counter::default()).collect() }
    }

    /// The counters of `count` slots (at least 1), each once.
    fn of(&self, first: Slot, count: u32) -> impl Iterator<Item = &Counter> + Clone {
        let from = first.0 / SLOTS_OF_A_COUNTER;
        let last = (first.0 + (count - 1)) / SLOTS_OF_A_COUNTER;
        (0..(last - from + 1).min(COUNTERS))
            .map(move |step| &self.counters[((from + step) % COUNTERS) as usize])
    }

    /// Does `work`, which writes these slots.
    pub fn write<T>(&self, first: Slot, count: u32, work: impl FnOnce() -> T) -> T {
        self.of(first, count).for_each(|counter| {
            counter.begun.fetch_add(1, Ordering::SeqCst);
        });
        let done = work();
        self.of(first, count).for_each(|counter| {
            counter.ended.fetch_add(1, Ordering::SeqCst);
        });
        done
    }

    /// Does `work`, which reads these slots; `None` where it may have come across a write.
    #[inline]
    pub fn read<T>(&self, first: Slot, count: u32, work: impl FnOnce() -> T) -> Option<T> {
        let counters = self.of(first, count);
        let ended: SmallVec<[u64; 8]> =
            counters.clone().map(|counter| counter.ended.load(Ordering::SeqCst)).collect();
        let done = work();
        // As many begun by now as had ended before: none was under way in between.
        let whole = counters.zip(ended).all(|(counter, ended)| counter.begun.load(Ordering::SeqCst) == ended);
        whole.then_some(done)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_read_across_a_write_in_place_is_found_out() {
        let in_place = InPlace::new();
        let slots = (Slot(60), 10);
        assert_eq!(in_place.read(slots.0, slots.1, || 1), Some(1));
        in_place.write(Slot(64), 1, || {
            assert_eq!(in_place.read(slots.0, slots.1, || 1), None, "it is under way");
            assert_eq!(in_place.read(Slot(0), 64, || 1), Some(1), "elsewhere");
        });
        assert_eq!(
            in_place.read(slots.0, slots.1, || in_place.write(Slot(69), 1, || ())),
            None,
            "it came and went"
        );
        assert_eq!(in_place.read(slots.0, slots.1, || 1), Some(1));
        in_place.write(Slot(5), u32::MAX - 10, || {
            assert_eq!(in_place.read(Slot(1000), 1, || 1), None, "a run longer than there are counters");
        });
    }
}
