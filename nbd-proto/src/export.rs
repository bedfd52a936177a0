//! Facts about an export: what the program around the machine answers, and what requests are judged by.

use crate::flags::TransmissionFlags;
use crate::mode::HeaderMode;
use crate::wire;

/// Block size constraints (`NBD_INFO_BLOCK_SIZE`).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct BlockSizes {
    minimum: u32,
    preferred: u32,
    maximum: u32,
}

impl BlockSizes {
    /// The sizes a peer assumes when none are told, with a maximum every peer may rely on.
    pub const DEFAULT: BlockSizes = BlockSizes { minimum: 1, preferred: 4096, maximum: wire::MAX_PAYLOAD };

    /// Sizes that keep the specification's rules ("Block size constraints"), or `None`: the minimum is a power of two up to
    /// 65,536; the preferred a power of two, at least 512 and the minimum; the maximum a multiple of the minimum (or
    /// 2^32-1) and at least the preferred.
    pub const fn new(minimum: u32, preferred: u32, maximum: u32) -> Option<BlockSizes> {
        let minimum_fits = minimum.is_power_of_two() && minimum <= 65_536;
        let preferred_fits = preferred.is_power_of_two() && preferred >= 512 && preferred >= minimum;
        if !minimum_fits || !preferred_fits || maximum < preferred {
            return None;
        }
        // `maximum >= preferred >= 512`, and the minimum is not zero here.
        if maximum != u32::MAX && !maximum.is_multiple_of(minimum) {
            return None;
        }
        Some(BlockSizes { minimum, preferred, maximum })
    }

    /// The alignment of offsets and lengths.
    #[inline]
    pub const fn minimum(self) -> u32 {
        self.minimum
    }

    /// The size (and alignment) at which requests are efficient.
    #[inline]
    pub const fn preferred(self) -> u32 {
        self.preferred
    }

    /// The longest read or write.
    #[inline]
    pub const fn maximum(self) -> u32 {
        self.maximum
    }
}

impl Default for BlockSizes {
    fn default() -> Self {
        BlockSizes::DEFAULT
    }
}

/// What the program answers when an export is looked up.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ExportInfo {
    /// The canonical name (`NBD_INFO_NAME`).
    pub name: String,
    /// A text for people (`NBD_INFO_DESCRIPTION`); empty if there is none.
    pub description: String,
    /// Bytes.
    pub size: u64,
    /// What it can do. The handshake masks what the client's choices forbid (`SEND_DF`, `BLOCK_STAT_PAYLOAD`) and sets
    /// `HAS_FLAGS`.
    pub flags: TransmissionFlags,
    /// Block sizes.
    pub block_sizes: BlockSizes,
    /// The metadata contexts a client may select, by full name (`base:allocation`).
    pub contexts: Vec<String>,
}

/// A metadata context the client selected.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Context {
    /// Its id in status replies.
    pub id: u32,
    /// Its full name.
    pub name: String,
}

/// What [`crate::validate`] judges a request by. Small and `Copy`, so that every connection has its own.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ExportFacts {
    /// Bytes of the export.
    pub size: u64,
    /// The flags the client was told.
    pub flags: TransmissionFlags,
    /// Block sizes.
    pub block_sizes: BlockSizes,
    /// The headers agreed on.
    pub mode: HeaderMode,
    /// Whether a metadata context was selected for this export.
    pub has_contexts: bool,
    /// The longest `DF` read served in one chunk; at least 65,536.
    pub df_limit: u64,
    /// Whether zeroing is faster than writing.
    pub fast_zero: bool,
    /// Whether zeroing with `NO_HOLE` is, too.
    pub fast_zero_no_hole: bool,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn block_sizes_outside_the_specification_are_refused() {
        assert!(BlockSizes::new(1, 4096, 32 << 20).is_some());
        assert!(BlockSizes::new(512, 4096, u32::MAX).is_some());
        assert!(BlockSizes::new(0, 4096, 1 << 20).is_none());
        assert!(BlockSizes::new(3, 4096, 1 << 20).is_none());
        assert!(BlockSizes::new(1 << 17, 1 << 17, 1 << 20).is_none());
        assert!(BlockSizes::new(4096, 512, 1 << 20).is_none());
        assert!(BlockSizes::new(1, 256, 1 << 20).is_none());
        assert!(BlockSizes::new(512, 4096, 5000).is_none());
        assert!(BlockSizes::new(512, 4096, 2048).is_none());
    }
}
