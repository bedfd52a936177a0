//! Sets of byte ranges: where two devices differ.
//!
//! Enters: ranges in any order. Leaves: sets. Invariant: the ranges of a set ascend and neither touch nor overlap.

use crate::device::{Device, DeviceError, Dirty};
use crate::repo::Version;
use crate::repo::compare::differing;
use crate::units::{ByteOffset, ByteRange};

use super::FilesError;

/// Extents of a delta asked for at once.
const EXTENTS: usize = 4096;

/// A set of ranges of a device.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Ranges(Vec<ByteRange>);

impl Ranges {
    /// All of these together.
    pub fn new(mut ranges: Vec<ByteRange>) -> Ranges {
        ranges.retain(|range| !range.is_empty());
        ranges.sort_unstable_by_key(|range| range.start);
        let mut joined: Vec<ByteRange> = Vec::with_capacity(ranges.len());
        for range in ranges {
            match joined.last_mut() {
                Some(last) if range.start <= last.end => last.end = last.end.max(range.end),
                _ => joined.push(range),
            }
        }
        Ranges(joined)
    }

    /// Where two commits differ, in whole chunks.
    pub async fn between(old: &Version, new: &Version) -> Result<Ranges, FilesError> {
        Ok(Ranges::new(differing(old, new).await?))
    }

    /// What was written to a volume, in pages.
    pub fn written(device: &Device) -> Result<Ranges, DeviceError> {
        let mut ranges = Vec::new();
        let end = ByteOffset(device.size().0);
        let mut at = ByteOffset(0);
        while at < end {
            for extent in device.dirty(ByteRange { start: at, end }, EXTENTS)? {
                let range = ByteRange { start: at, end: ByteOffset(at.0 + extent.len.0) };
                if extent.state != Dirty::Clean {
                    ranges.push(range);
                }
                at = range.end;
            }
        }
        Ok(Ranges::new(ranges))
    }

    /// The ranges, ascending.
    pub fn iter(&self) -> impl Iterator<Item = ByteRange> + '_ {
        self.0.iter().copied()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Bytes in them.
    pub fn bytes(&self) -> u64 {
        self.0.iter().map(|range| range.len().0).sum()
    }

    /// What of `range` is in the set.
    pub fn within(&self, range: ByteRange) -> impl Iterator<Item = ByteRange> + '_ {
        let first = self.0.partition_point(|there| there.end <= range.start);
        let there = self.0[first..].iter().take_while(move |there| there.start < range.end);
        there.map(move |there| ByteRange {
            start: there.start.max(range.start),
            end: there.end.min(range.end),
        })
    }

    /// Whether any of `range` is in the set.
    pub fn touches(&self, range: ByteRange) -> bool {
        self.within(range).next().is_some()
    }

    /// This and another set together.
    pub fn with(self, other: Ranges) -> Ranges {
        Ranges::new([self.0, other.0].concat())
    }

    /// What is not in another set.
    pub fn without(&self, other: &Ranges) -> Ranges {
        let mut rest = Vec::new();
        for range in self.iter() {
            let mut at = range.start;
            for taken in other.within(range) {
                rest.push(ByteRange { start: at, end: taken.start });
                at = taken.end;
            }
            rest.push(ByteRange { start: at, end: range.end });
        }
        Ranges::new(rest)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn ranges(list: &[(u64, u64)]) -> Ranges {
        let range =
            |(start, end): &(u64, u64)| ByteRange { start: ByteOffset(*start), end: ByteOffset(*end) };
        Ranges::new(list.iter().map(range).collect())
    }

    fn bits(set: &Ranges) -> Vec<bool> {
        (0..100).map(|at| set.touches(ByteRange { start: ByteOffset(at), end: ByteOffset(at + 1) })).collect()
    }

    proptest! {
        #[test]
        fn sets_do_what_bits_do(
            one in proptest::collection::vec((0u64..100, 0u64..100), 0..8),
            other in proptest::collection::vec((0u64..100, 0u64..100), 0..8),
        ) {
            let (one, other) = (ranges(&one), ranges(&other));
            let (a, b) = (bits(&one), bits(&other));
            let both: Vec<bool> = a.iter().zip(&b).map(|(a, b)| *a || *b).collect();
            let rest: Vec<bool> = a.iter().zip(&b).map(|(a, b)| *a && !*b).collect();
            prop_assert_eq!(bits(&one.clone().with(other.clone())), both);
            prop_assert_eq!(bits(&one.without(&other)), rest);
            prop_assert_eq!(one.bytes(), a.iter().filter(|bit| **bit).count() as u64);
        }
    }
}
