//! Units are types: byte offsets, lengths and the indexes of pages, chunks and blocks.
//!
//! Enters: bare integers at the edges (wire, disk). Leaves: values that can't be mixed up.
//! Invariant: arithmetic that could wrap is checked; ranges are half open, their end exclusive.

use std::fmt;

/// The page of a delta: 4 KiB, the unit of copy-on-write.
pub const PAGE_SIZE: u64 = 4096;

macro_rules! unit {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub struct $name(pub u64);

        impl $name {
            /// The bare number.
            #[inline]
            pub const fn value(self) -> u64 {
                self.0
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                self.0.fmt(f)
            }
        }
    };
}

unit! {
    /// A position on a device, in bytes from its start.
    ByteOffset
}
unit! {
    /// A length in bytes.
    ByteLen
}
unit! {
    /// The number of a 4 KiB page of a device.
    PageIndex
}
unit! {
    /// The number of a block (64 MiB by default) of a device.
    BlockIndex
}
unit! {
    /// The number of a chunk of a device, counted over the whole device.
    ChunkIndex
}

impl ByteOffset {
    /// The page this byte lies in.
    #[inline]
    pub const fn page(self) -> PageIndex {
        PageIndex(self.0 / PAGE_SIZE)
    }

    /// The offset `len` further on, or `None` past 2^64.
    #[inline]
    pub fn checked_add(self, len: ByteLen) -> Option<ByteOffset> {
        self.0.checked_add(len.0).map(ByteOffset)
    }
}

impl PageIndex {
    /// The first byte of the page.
    #[inline]
    pub const fn offset(self) -> ByteOffset {
        ByteOffset(self.0 * PAGE_SIZE)
    }
}

/// A half-open range of bytes on a device: `start` included, `end` excluded.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct ByteRange {
    /// First byte.
    pub start: ByteOffset,
    /// One past the last byte.
    pub end: ByteOffset,
}

impl ByteRange {
    /// The range of `len` bytes from `at`, or `None` where its end would pass 2^64.
    #[inline]
    pub fn at(at: ByteOffset, len: ByteLen) -> Option<ByteRange> {
        Some(ByteRange { start: at, end: at.checked_add(len)? })
    }

    /// How many bytes the range holds.
    #[inline]
    pub const fn len(self) -> ByteLen {
        ByteLen(self.end.0 - self.start.0)
    }

    /// Whether it holds none.
    #[inline]
    pub const fn is_empty(self) -> bool {
        self.end.0 <= self.start.0
    }

    /// The whole pages inside the range: (first, end), end exclusive; empty when `first >= end`.
    #[inline]
    pub const fn whole_pages(self) -> (PageIndex, PageIndex) {
        (PageIndex(self.start.0.div_ceil(PAGE_SIZE)), PageIndex(self.end.0 / PAGE_SIZE))
    }

    /// The pages the range touches, whole or in part: (first, end), end exclusive.
    #[inline]
    pub const fn touched_pages(self) -> (PageIndex, PageIndex) {
        (PageIndex(self.start.0 / PAGE_SIZE), PageIndex(self.end.0.div_ceil(PAGE_SIZE)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn whole_pages_of_an_unaligned_range_leave_both_edges_out() {
        let range = ByteRange::at(ByteOffset(100), ByteLen(3 * PAGE_SIZE)).unwrap();
        assert_eq!(range.whole_pages(), (PageIndex(1), PageIndex(3)));
        assert_eq!(range.touched_pages(), (PageIndex(0), PageIndex(4)));
    }

    #[test]
    fn a_range_past_the_end_of_the_address_space_is_refused() {
        assert_eq!(ByteRange::at(ByteOffset(u64::MAX), ByteLen(1)), None);
    }
}
