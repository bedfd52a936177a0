//! Order among writes that touch the same page.
//!
//! A write of part of a page reads the page, changes it and writes it back; a write of another part, or of all of it, in between would be lost. So every
//! write, zero and trim holds the stripes of the pages it touches. A stripe stands for 256 KiB of the device and everything that falls on the same number.
//! Invariant: whoever waits takes stripes in ascending order, so nobody waits in a circle.

use smallvec::SmallVec;
use tokio::sync::{Mutex, MutexGuard};

use crate::units::{ByteOffset, ByteRange, PAGE_SIZE};

use super::TOGETHER;

const STRIPES: u64 = 1024;
const STRIPE_BYTES: u64 = 64 * PAGE_SIZE;

/// The stripes of one device.
pub struct Stripes {
    stripes: Box<[Mutex<()>]>,
}

/// Stripes held.
pub type Held<'a> = SmallVec<[MutexGuard<'a, ()>; 2]>;

impl Stripes {
    /// All free.
    pub fn new() -> Stripes {
        Stripes { stripes: (0..STRIPES).map(|_| Mutex::new(())).collect() }
    }

    /// The numbers of the stripes of a range that is not empty, ascending.
    fn numbers(range: ByteRange) -> SmallVec<[usize; 8]> {
        let first = range.start.0 / STRIPE_BYTES;
        let last = (range.end.0 - 1) / STRIPE_BYTES;
        if last - first + 1 >= STRIPES {
            return (0..STRIPES as usize).collect();
        }
        let mut numbers: SmallVec<[usize; 8]> = (first..=last).map(|n| (n % STRIPES) as usize).collect();
        numbers.sort_unstable();
        numbers
    }

    /// Takes the stripes of a range if all are free.
    #[inline]
    pub fn try_hold(&self, range: ByteRange) -> Option<Held<'_>> {
        let first = range.start.0 / STRIPE_BYTES;
        if (range.end.0 - 1) / STRIPE_BYTES == first {
            let stripe = &self.stripes[(first % STRIPES) as usize];
            return stripe.try_lock().ok().map(|guard| SmallVec::from_iter([guard]));
        }
        Self::numbers(range).into_iter().map(|number| self.stripes[number].try_lock().ok()).collect()
    }

    /// Whether a range, which is not empty, lies in one stripe.
    pub fn is_one(range: ByteRange) -> bool {
        range.start.0 / STRIPE_BYTES == (range.end.0 - 1) / STRIPE_BYTES
    }

    /// For each of these places whether its stripe is held now: it was free, or it is one's before it.
    pub fn try_hold_each(
        &self,
        places: impl Iterator<Item = ByteOffset>,
    ) -> (Held<'_>, SmallVec<[bool; TOGETHER]>) {
        let mut held = Held::new();
        let mut seen: SmallVec<[(u64, bool); TOGETHER]> = SmallVec::new();
        let each = places.map(|at| {
            let number = at.0 / STRIPE_BYTES % STRIPES;
            if let Some((_, is_held)) = seen.iter().find(|(tried, _)| *tried == number) {
                return *is_held;
            }
            let guard = self.stripes[number as usize].try_lock().ok();
            let is_held = guard.is_some();
            held.extend(guard);
            seen.push((number, is_held));
            is_held
        });
        let each = each.collect();
        (held, each)
    }

    /// Waits for the stripes of a range.
    pub async fn hold(&self, range: ByteRange) -> Held<'_> {
        let mut held = Held::new();
        for number in Self::numbers(range) {
            held.push(self.stripes[number].lock().await);
        }
        held
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::units::ByteLen;

    fn range(at: u64, len: u64) -> ByteRange {
        ByteRange::at(ByteOffset(at), ByteLen(len)).unwrap()
    }

    #[test]
    fn two_parts_of_one_page_exclude_each_other_and_distant_pages_do_not() {
        let stripes = Stripes::new();
        let held = stripes.try_hold(range(512, 512)).unwrap();
        assert!(stripes.try_hold(range(0, 512)).is_none());
        assert!(stripes.try_hold(range(STRIPE_BYTES, 4096)).is_some());
        drop(held);
        assert!(stripes.try_hold(range(0, 512)).is_some());
    }

    #[test]
    fn a_range_of_terabytes_takes_every_stripe_once() {
        let stripes = Stripes::new();
        assert_eq!(stripes.try_hold(range(4096, 2 << 40)).unwrap().len(), STRIPES as usize);
        assert_eq!(stripes.try_hold(range(0, STRIPES * STRIPE_BYTES)).unwrap().len(), STRIPES as usize);
        assert_eq!(
            stripes.try_hold(range(100, (STRIPES - 1) * STRIPE_BYTES)).unwrap().len(),
            STRIPES as usize
        );
    }

    #[test]
    fn of_many_places_those_are_held_that_nobody_else_has() {
        let stripes = Stripes::new();
        let elsewhere = stripes.try_hold(range(5 * STRIPE_BYTES, 1)).unwrap();
        let places =
            [0, 3 * STRIPE_BYTES, 8192, 5 * STRIPE_BYTES + 4096, 5 * STRIPE_BYTES, 0].map(ByteOffset);
        let (held, each) = stripes.try_hold_each(places.into_iter());
        assert_eq!(each[..], [true, true, true, false, false, true]);
        assert_eq!(held.len(), 2);
        assert!(stripes.try_hold(range(4096, 1)).is_none());
        drop((held, elsewhere));
        assert!(stripes.try_hold(range(0, 8 * STRIPE_BYTES)).is_some());
    }

    #[test]
    fn a_failed_try_leaves_nothing_held() {
        let stripes = Stripes::new();
        let held = stripes.try_hold(range(3 * STRIPE_BYTES, 1)).unwrap();
        assert!(stripes.try_hold(range(0, 5 * STRIPE_BYTES)).is_none());
        drop(held);
        assert!(stripes.try_hold(range(0, 5 * STRIPE_BYTES)).is_some());
    }
}
