//! How big an ext4 filesystem is to be, and whether a tree fits one.
//!
//! Enters: what a tree demands and the size asked for. Leaves: sizes and an inode count the streaming writer can lay
//! out. Invariant: pure functions; where [`plan`] says that a tree fits, it does, because every estimate here is an
//! upper bound.
//!
//! The size of a device nobody chose a size for: a quarter more than the least that holds everything, plus 64 MiB; and
//! enough for the inodes. Inodes: one for 16 KiB of device, as mke2fs has it, and at least half as many again as the
//! tree uses plus 8192; on a device whose size was chosen, as many of these as it has room for.

use super::tree::{BLOCK, Entry, EntryId, Kind, Tree};
use super::xattrs::{Ext4Room, Ext4Xattr, ext4_name, for_ext4, room};
use crate::units::ByteLen;

/// Blocks of one group: what one block's bitmap covers.
const GROUP_BLOCKS: u64 = 32768;
/// Groups whose bitmaps and inode tables are kept together.
const FLEX_GROUPS: u64 = 16;
/// Inodes in one block of the inode table.
const INODES_PER_BLOCK: u64 = 16;
/// Bytes of device for one inode.
const INODE_RATIO: u64 = 16384;
/// Inodes free beside the half.
const INODES_SPARE: u64 = 8192;
/// Inodes that a group holds in every filesystem but the very biggest.
const GROUP_INODES_SURE: u64 = 32_000;
/// Inodes the filesystem takes for itself, lost+found included.
const INODES_RESERVED: u64 = 11;
/// Blocks of lost+found.
const LOST_FOUND_BLOCKS: u64 = 4;
/// Extents in a leaf block of an extent tree.
const EXTENTS_PER_LEAF: u64 = 340;
/// Extents in the inode itself.
const EXTENTS_INLINE: u64 = 4;
/// The most extents a tree of two levels below the inode holds.
pub(crate) const EXTENTS_MAX: u64 = EXTENTS_INLINE * EXTENTS_PER_LEAF * EXTENTS_PER_LEAF;
/// The smallest filesystem: a journal needs 1024 blocks, and may take a quarter.
const FS_BLOCKS_MIN: u64 = 4096;
/// Block numbers have 32 bits without the feature 64bit; the last group that fits whole ends here.
const FS_BLOCKS_MAX: u64 = (u32::MAX as u64) / GROUP_BLOCKS * GROUP_BLOCKS;
/// Where the search for a size ends: 1 EiB, what 48-bit block numbers reach.
const DEVICE_BLOCKS_MAX: u64 = 1 << 48;
/// What a last group must have beyond its own metadata to be worth having.
const LAST_GROUP_SPARE: u64 = 64;
/// The biggest device the streaming writer makes a filesystem for; bigger ones take 64-bit block numbers.
pub(crate) const STREAMING_MAX: u64 = 1 << 44;

const MIB: u64 = 1 << 20;
/// Free space in an image nobody chose a size for, beside the quarter.
const FREE_BYTES: u64 = 64 * MIB;

/// What a tree takes up, whatever the size of the filesystem around it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Demand {
    /// Blocks of contents, directories, links, attributes and extent trees. An upper bound.
    pub(crate) blocks: u64,
    /// Inodes, the filesystem's own included.
    pub(crate) inodes: u64,
}

impl Demand {
    /// Adds up what `tree` takes.
    pub(crate) fn of(tree: &Tree) -> Demand {
        // Bytes of directory records by directory.
        let mut records = vec![0u64; tree.entries.len()];
        let mut blocks = LOST_FOUND_BLOCKS;
        let mut inodes = INODES_RESERVED;
        for (id, entry) in tree.iter() {
            records[entry.parent.0 as usize] += record_len(tree.name(id).count_bytes());
            match &entry.kind {
                Kind::HardLink { .. } => continue,
                Kind::Symlink { target } if target.len() > 59 => blocks += 1,
                _ => {}
            }
            inodes += 1;
            blocks += content_blocks(entry) + extent_blocks(extents(entry)) + xattr_blocks(tree, id);
        }
        blocks += tree
            .iter()
            .filter(|(_, entry)| matches!(entry.kind, Kind::Dir))
            .map(|(id, _)| dir_blocks(records[id.0 as usize]))
            .sum::<u64>();
        Demand { blocks, inodes }
    }
}

impl Demand {
    /// Inodes for the tree and for what its owner will add.
    fn wanted_inodes(&self) -> u64 {
        self.inodes + self.inodes / 2 + INODES_SPARE
    }
}

fn record_len(name: usize) -> u64 {
    (8 + name as u64).next_multiple_of(4)
}

/// A linear directory takes one block or two, an indexed one a root, leaves that lack less than one record of being
/// full, and nodes between them.
fn dir_blocks(records: u64) -> u64 {
    const LEAF: u64 = BLOCK - 12 - 264;
    let records = records + record_len(1) + record_len(2) + record_len(10);
    let leaves = records.div_ceil(LEAF);
    if leaves == 1 { 1 } else { 1 + leaves + leaves.div_ceil(500) + extent_blocks(leaves / 1000 + 2) }
}

fn content_blocks(entry: &Entry) -> u64 {
    entry.segments().map(|segment| segment.len.div_ceil(BLOCK)).sum()
}

/// How many extents a file's data may come to lie in: one a segment, one for every full extent, and one for each
/// time the allocator steps over a group's fixed metadata.
pub(crate) fn extents(entry: &Entry) -> u64 {
    let segments = entry.segments().count() as u64;
    if segments == 0 { 0 } else { segments + 3 * (content_blocks(entry) / GROUP_BLOCKS) + 1 }
}

fn extent_blocks(extents: u64) -> u64 {
    if extents <= EXTENTS_INLINE {
        return 0;
    }
    let leaves = extents.div_ceil(EXTENTS_PER_LEAF);
    leaves + if leaves > EXTENTS_INLINE { leaves.div_ceil(EXTENTS_PER_LEAF) } else { 0 }
}

/// How much room an entry's attributes take in ext4.
pub(crate) fn xattr_room(tree: &Tree, id: EntryId) -> Ext4Room {
    let Some(xattrs) = tree.xattrs.get(&id) else { return Ext4Room::Inode };
    let stored: Vec<(u8, &[u8], usize)> = xattrs
        .iter()
        .filter_map(|xattr| match for_ext4(xattr) {
            Ext4Xattr::Stored(value) => {
                let (index, name) = ext4_name(&xattr.name);
                Some((index, name, value.len()))
            }
            Ext4Xattr::NoPlace => None,
        })
        .collect();
    room(&stored)
}

fn xattr_blocks(tree: &Tree, id: EntryId) -> u64 {
    match xattr_room(tree, id) {
        Ext4Room::Inode => 0,
        Ext4Room::Block => 1,
        // Not for the streaming writer. mke2fs puts each big value into an inode of its own: 64 KiB each at most.
        Ext4Room::TooBig => 1 + 17 * tree.xattrs.get(&id).map_or(0, |xattrs| xattrs.len() as u64),
    }
}

/// A filesystem's size and inodes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Plan {
    /// The device's size, a multiple of 4096.
    pub(crate) device: ByteLen,
    /// The filesystem's; less than the device's where the rest would be of no use to it.
    pub(crate) filesystem: ByteLen,
    /// How many inodes to ask for.
    pub(crate) inodes: u32,
}

/// Why there is no plan.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum NoPlan {
    /// It takes a device of this size, in whole MiB.
    Needs(ByteLen),
    /// No ext4 filesystem we can make holds it.
    TooMuch,
}

/// Plans a filesystem on a device of `size`, or of a size of its own choice.
pub(crate) fn plan(demand: Demand, size: Option<ByteLen>) -> Result<Plan, NoPlan> {
    if let Some(size) = size {
        let device = size.value().checked_next_multiple_of(BLOCK).ok_or(NoPlan::TooMuch)?;
        if let Some(plan) = layout(demand, device) {
            return Ok(plan);
        }
    }
    let least = least(demand).ok_or(NoPlan::TooMuch)?;
    if size.is_some() {
        return Err(NoPlan::Needs(least.device));
    }
    let bytes = least.device.value();
    let mut device = (bytes + bytes / 4 + FREE_BYTES).next_multiple_of(MIB);
    // Of small files, it is inodes that need the room: a group holds one for about 4 KiB.
    let groups = demand.wanted_inodes().div_ceil(GROUP_INODES_SURE);
    if device.div_ceil(GROUP_BLOCKS * BLOCK) < groups {
        device = groups * GROUP_BLOCKS * BLOCK;
    }
    Ok(layout(demand, device).unwrap_or(least))
}

/// The smallest filesystem that holds `demand`: whole MiB.
fn least(demand: Demand) -> Option<Plan> {
    let mib = MIB / BLOCK;
    let at = |blocks: u64| layout(demand, blocks * BLOCK);
    // The filesystem's own part is a few hundredths of it and some MiB, so this ends soon; then by halves. Between two
    // sizes that fit there can be one that does not (its last group is dropped): any that fits is good.
    let mut low = FS_BLOCKS_MIN.max(demand.blocks).next_multiple_of(mib) - mib;
    let mut step = mib;
    let mut best = loop {
        if low + step > DEVICE_BLOCKS_MAX {
            return None;
        }
        match at(low + step) {
            Some(plan) => break plan,
            None => step *= 2,
        }
    };
    let mut high = low + step;
    while high - low > mib {
        let middle = low + ((high - low) / 2).next_multiple_of(mib);
        if middle >= high {
            break;
        }
        match at(middle) {
            Some(plan) => (high, best) = (middle, plan),
            None => low = middle,
        }
    }
    Some(best)
}

/// The filesystem for a device, or `None` where `demand` does not fit it.
fn layout(demand: Demand, device: u64) -> Option<Plan> {
    let mut blocks = device / BLOCK;
    if blocks > FS_BLOCKS_MAX && device <= STREAMING_MAX {
        blocks = FS_BLOCKS_MAX;
    }
    if !(FS_BLOCKS_MIN..=DEVICE_BLOCKS_MAX).contains(&blocks) {
        return None;
    }
    let mut shape = Shape::of(blocks, demand)?;
    let last = shape.groups - 1;
    if shape.groups > 1 && blocks - last * GROUP_BLOCKS < shape.own_blocks(last) + LAST_GROUP_SPARE {
        blocks = last * GROUP_BLOCKS;
        shape = Shape::of(blocks, demand)?;
    }
    let fits = shape.overhead() + demand.blocks <= blocks;
    fits.then_some(Plan {
        device: ByteLen(device),
        filesystem: ByteLen(blocks * BLOCK),
        inodes: u32::try_from(shape.inode_blocks * INODES_PER_BLOCK * shape.groups).ok()?,
    })
}

/// The fixed parts of a filesystem.
struct Shape {
    blocks: u64,
    groups: u64,
    /// Blocks of inode table in each group.
    inode_blocks: u64,
    /// Blocks of group descriptors after each copy of the superblock.
    descriptor_blocks: u64,
}

impl Shape {
    /// `None` where no group could hold inode tables for so many inodes.
    fn of(blocks: u64, demand: Demand) -> Option<Shape> {
        let groups = blocks.div_ceil(GROUP_BLOCKS);
        let descriptor = if blocks > FS_BLOCKS_MAX { 64 } else { 32 };
        let descriptor_blocks = (groups * descriptor).div_ceil(BLOCK);
        // The tables of a whole flex group must fit its first group: they are one run there, and the backup
        // superblocks of the groups after it must not cut through them.
        let room = (GROUP_BLOCKS - 1).checked_sub(descriptor_blocks)? / FLEX_GROUPS;
        let inode_blocks_max = room.saturating_sub(2).min(u64::from(u32::MAX) / INODES_PER_BLOCK / groups);
        let per_group = |inodes: u64| inodes.div_ceil(groups).div_ceil(INODES_PER_BLOCK);
        let wanted = per_group((blocks * BLOCK / INODE_RATIO).max(demand.wanted_inodes()));
        let inode_blocks = wanted.min(inode_blocks_max);
        (inode_blocks >= per_group(demand.inodes)).then_some(Shape {
            blocks,
            groups,
            inode_blocks,
            descriptor_blocks,
        })
    }

    /// Whether a group has a copy of the superblock (sparse_super): 0, 1 and the powers of 3, 5 and 7.
    fn has_superblock(group: u64) -> bool {
        let power_of = |base: u64| {
            let mut power = base;
            while power < group {
                power *= base;
            }
            power == group
        };
        group <= 1 || power_of(3) || power_of(5) || power_of(7)
    }

    /// Blocks that lie in a group's own place, whoever they describe.
    fn own_blocks(&self, group: u64) -> u64 {
        let superblock = if Shape::has_superblock(group) { 1 + self.descriptor_blocks } else { 0 };
        let tables = if group.is_multiple_of(FLEX_GROUPS) {
            (self.groups - group).min(FLEX_GROUPS) * (2 + self.inode_blocks)
        } else {
            0
        };
        superblock + tables
    }

    /// Blocks no file or directory can have.
    fn overhead(&self) -> u64 {
        (0..self.groups).map(|group| self.own_blocks(group)).sum::<u64>() + self.journal() + extent_blocks(16)
    }

    /// The journal mke2fs gives a filesystem of this size.
    fn journal(&self) -> u64 {
        match self.blocks {
            0..32768 => 1024,
            32768..262_144 => 4096,
            262_144..524_288 => 8192,
            524_288..4_194_304 => 16384,
            4_194_304..8_388_608 => 32768,
            8_388_608..16_777_216 => 65536,
            16_777_216..33_554_432 => 131_072,
            _ => 262_144,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const GIB: u64 = 1 << 30;

    #[test]
    fn an_empty_directory_gets_a_small_device_with_spare_inodes() {
        let plan = plan(Demand { blocks: 10, inodes: 12 }, None).unwrap();
        assert!(plan.device.value() < 128 * MIB, "{plan:?}");
        assert!(plan.inodes >= 8192, "{plan:?}");
    }

    #[test]
    fn the_least_size_named_by_a_refusal_is_enough() {
        for demand in [
            Demand { blocks: 10, inodes: 12 },
            Demand { blocks: 32768 * 17, inodes: 60_000 },
            Demand { blocks: 5_000, inodes: 900_000 },
            Demand { blocks: 40_000_000, inodes: 100 },
        ] {
            let Err(NoPlan::Needs(needed)) = plan(demand, Some(ByteLen(8 * MIB))) else {
                panic!("{demand:?}")
            };
            let planned = plan(demand, Some(needed)).unwrap();
            assert!(u64::from(planned.inodes) >= demand.inodes);
            assert!(plan(demand, Some(ByteLen(needed.value() / 2))).is_err());
        }
    }

    #[test]
    fn a_last_group_too_small_for_its_own_metadata_is_left_out() {
        let demand = Demand { blocks: 10, inodes: 12 };
        // Group 16 leads a flex group and would have one block.
        let size = (16 * GROUP_BLOCKS + 1) * BLOCK;
        let planned = plan(demand, Some(ByteLen(size))).unwrap();
        assert_eq!(planned.filesystem.value(), 16 * GROUP_BLOCKS * BLOCK);
        assert_eq!(planned.device.value(), size);
    }

    #[test]
    fn sixteen_tib_hold_a_filesystem_of_32_bit_block_numbers() {
        let planned = plan(Demand { blocks: 10, inodes: 12 }, Some(ByteLen(STREAMING_MAX))).unwrap();
        assert_eq!(planned.filesystem.value() / BLOCK, FS_BLOCKS_MAX);
        assert_eq!(u64::from(planned.inodes), FS_BLOCKS_MAX / 4, "one for 16 KiB");
    }

    #[test]
    fn a_demand_beyond_every_filesystem_is_refused() {
        for demand in [Demand { blocks: 1 << 47, inodes: 100 }, Demand { blocks: 100, inodes: 1 << 33 }] {
            assert_eq!(plan(demand, None), Err(NoPlan::TooMuch));
            assert_eq!(plan(demand, Some(ByteLen(GIB))), Err(NoPlan::TooMuch));
        }
        assert_eq!(plan(Demand { blocks: 1, inodes: 12 }, Some(ByteLen(u64::MAX))), Err(NoPlan::TooMuch));
    }

    #[test]
    fn half_as_many_inodes_again_are_free_where_the_ratio_gives_fewer() {
        let planned = plan(Demand { blocks: GIB / BLOCK / 4, inodes: 100_000 }, None).unwrap();
        assert!(planned.inodes >= 150_000);
    }
}
