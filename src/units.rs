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

/// A size that could not be read.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("'{0}' is not a size: a number, as it is or with K, M, G, T or P (binary), as in 64M or 20G")]
pub struct SizeError(String);

impl std::str::FromStr for ByteLen {
    type Err = SizeError;

    /// Reads `64M`, `20G`, `4096`: binary units, with or without `iB` or `B`.
    fn from_str(text: &str) -> Result<ByteLen, SizeError> {
        let bad = || SizeError(text.chars().take(40).collect());
        let digits = text.bytes().take_while(u8::is_ascii_digit).count();
        let (number, unit) = text.split_at(digits);
        let shift = match unit.strip_suffix("iB").or(unit.strip_suffix('B')).unwrap_or(unit) {
            "" => 0,
            "K" | "k" => 10,
            "M" | "m" => 20,
            "G" | "g" => 30,
            "T" | "t" => 40,
            "P" | "p" => 50,
            _ => return Err(bad()),
        };
        let number: u64 = number.parse().map_err(|_| bad())?;
        number.checked_mul(1 << shift).map(ByteLen).ok_or_else(bad)
    }
}

impl ByteLen {
    /// The length for people: `20.0 GiB`.
    pub fn human(self) -> String {
        const UNITS: [&str; 6] = ["KiB", "MiB", "GiB", "TiB", "PiB", "EiB"];
        if self.0 < 1024 {
            return format!("{} B", self.0);
        }
        let power = (self.0.ilog2() / 10) as usize;
        format!("{:.1} {}", self.0 as f64 / (1u64 << (10 * power)) as f64, UNITS[power - 1])
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
    fn sizes_are_binary_and_nonsense_is_refused() {
        for (text, bytes) in
            [("0", 0), ("4096", 4096), ("64M", 64 << 20), ("20G", 20 << 30), ("1TiB", 1 << 40), ("2KB", 2048)]
        {
            assert_eq!(text.parse(), Ok(ByteLen(bytes)), "{text}");
        }
        for text in ["", "G", "-1", "1.5G", "64X", "99999999999P", "20 G", "18446744073709551616"] {
            assert!(text.parse::<ByteLen>().is_err(), "{text}");
        }
        assert_eq!(ByteLen(20 << 30).human(), "20.0 GiB");
        assert_eq!(ByteLen(u64::MAX).human(), "16.0 EiB");
        assert_eq!(ByteLen(1023).human(), "1023 B");
    }

    #[test]
    fn a_range_past_the_end_of_the_address_space_is_refused() {
        assert_eq!(ByteRange::at(ByteOffset(u64::MAX), ByteLen(1)), None);
    }
}
