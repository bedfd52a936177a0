//! The superblock and the group descriptors: sizes, features, where the tables are.
//!
//! Enters: the device's first bytes and its size. Leaves: numbers that are consistent with each other. Invariant: a filesystem larger than its device, or with sizes that make
//! arithmetic overflow, is refused here.

use super::bytes::{joined, u16_at, u32_at};
use crate::files::FilesError;
use crate::units::{ByteLen, ByteOffset, ByteRange};

const AT: usize = 1024;
const MAGIC: u16 = 0xef53;
/// The most groups: 256 TiB in those of 128 MiB.
const MAX_GROUPS: u64 = 2 << 20;

/// `s_feature_incompat`.
mod incompat {
    pub(super) const FILETYPE: u32 = 0x2;
    pub(super) const RECOVER: u32 = 0x4;
    pub(super) const META_BG: u32 = 0x10;
    pub(super) const EXTENTS: u32 = 0x40;
    pub(super) const BIT64: u32 = 0x80;
    pub(super) const MMP: u32 = 0x100;
    pub(super) const FLEX_BG: u32 = 0x200;
    pub(super) const EA_INODE: u32 = 0x400;
    pub(super) const CSUM_SEED: u32 = 0x2000;
    pub(super) const LARGEDIR: u32 = 0x4000;
    pub(super) const INLINE_DATA: u32 = 0x8000;
    pub(super) const ENCRYPT: u32 = 0x1_0000;
    pub(super) const CASEFOLD: u32 = 0x2_0000;
    pub(super) const READ_HERE: u32 = FILETYPE
        | RECOVER
        | META_BG
        | EXTENTS
        | BIT64
        | MMP
        | FLEX_BG
        | EA_INODE
        | CSUM_SEED
        | LARGEDIR
        | INLINE_DATA
        | ENCRYPT
        | CASEFOLD;
    pub(super) const NAMES: [(u32, &str); 3] =
        [(0x1, "compression"), (0x8, "a journal device"), (0x1000, "data in directories")];
}

const COMPAT_SPARSE_SUPER2: u32 = 0x200;
const RO_COMPAT_SPARSE_SUPER: u32 = 0x1;
const COMPAT_ORPHAN_FILE: u32 = 0x1000;

/// What is said of a whole filesystem.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Superblock {
    inodes: u32,
    blocks: u64,
    first_data_block: u32,
    block_log2: u32,
    blocks_per_group: u32,
    inodes_per_group: u32,
    inode_len: u16,
    first_inode: u32,
    descriptor_len: u16,
    reserved_descriptor_blocks: u16,
    compat: u32,
    incompat: u32,
    ro_compat: u32,
    first_meta_group: u32,
    backups: [u32; 2],
    uuid: [u8; 16],
    journal_inode: u32,
    orphan_inode: u32,
    mmp_block: u64,
}

impl Superblock {
    /// Reads it from the device's first bytes.
    pub(super) fn parse(start: &[u8], size: ByteLen) -> Result<Superblock, FilesError> {
        let cut = || FilesError::damaged("the superblock", "it is cut short");
        let bytes = start.get(AT..).unwrap_or_default();
        if u16_at(bytes, 0x38) != MAGIC {
            return Err(FilesError::NoFilesystem);
        }
        let incompat = u32_at(bytes, 0x60);
        let unknown = incompat & !incompat::READ_HERE;
        if unknown != 0 {
            let named = incompat::NAMES.iter().find(|(flag, _)| unknown & flag != 0);
            let feature =
                named.map_or_else(|| format!("features {unknown:#x}"), |(_, name)| (*name).to_owned());
            return Err(FilesError::Unsupported { feature });
        }
        let is_64 = incompat & incompat::BIT64 != 0;
        let old = u32_at(bytes, 0x4c) == 0;
        let superblock = Superblock {
            inodes: u32_at(bytes, 0),
            blocks: joined(u32_at(bytes, 4), if is_64 { u32_at(bytes, 0x150) } else { 0 }),
            first_data_block: u32_at(bytes, 0x14),
            block_log2: u32_at(bytes, 0x18).saturating_add(10),
            blocks_per_group: u32_at(bytes, 0x20),
            inodes_per_group: u32_at(bytes, 0x28),
            inode_len: if old { 128 } else { u16_at(bytes, 0x58) },
            first_inode: if old { 11 } else { u32_at(bytes, 0x54) },
            descriptor_len: if is_64 { u16_at(bytes, 0xfe) } else { 32 },
            reserved_descriptor_blocks: u16_at(bytes, 0xce),
            compat: u32_at(bytes, 0x5c),
            incompat,
            ro_compat: u32_at(bytes, 0x64),
            first_meta_group: u32_at(bytes, 0x104),
            backups: [u32_at(bytes, 0x24c), u32_at(bytes, 0x250)],
            uuid: bytes.get(0x68..0x78).and_then(|uuid| uuid.try_into().ok()).ok_or_else(cut)?,
            journal_inode: u32_at(bytes, 0xe0),
            orphan_inode: u32_at(bytes, 0x280),
            mmp_block: joined(u32_at(bytes, 0x168), u32_at(bytes, 0x16c)),
        };
        superblock.check(size)?;
        Ok(superblock)
    }

    fn check(&self, size: ByteLen) -> Result<(), FilesError> {
        let damaged = |why| Err(FilesError::damaged("the superblock", why));
        if self.block_log2 > 16 {
            return damaged("blocks of more than 64 KiB");
        }
        let Some(bytes) = self.blocks.checked_mul(self.block_len()) else {
            return damaged("more blocks than there can be");
        };
        if bytes > size.0 {
            return damaged("the filesystem is larger than its device");
        }
        if !self.inode_len.is_power_of_two() || !(128..=4096).contains(&self.inode_len) {
            return damaged("inodes of an impossible size");
        }
        if u64::from(self.inode_len) > self.block_len() {
            return damaged("inodes larger than a block");
        }
        // mke2fs makes none smaller: it bounds the number of groups.
        const FEWEST: u32 = 256;
        if self.blocks_per_group < FEWEST || self.inodes_per_group == 0 || self.inodes == 0 {
            return damaged("groups without blocks or inodes");
        }
        // Their bitmap is one block.
        if u64::from(self.inodes_per_group) > 8 * self.block_len() {
            return damaged("groups with more inodes than their bitmap");
        }
        if u64::from(self.first_data_block) >= self.blocks {
            return damaged("fewer blocks than come before the first");
        }
        if !(32..=1024).contains(&self.descriptor_len) || !self.descriptor_len.is_power_of_two() {
            return damaged("group descriptors of an impossible size");
        }
        let groups = self.groups();
        // As the kernel has it; a list of groups is a walk of known length then.
        if u64::from(self.inodes) != groups.saturating_mul(self.inodes_per_group.into()) {
            return damaged("another number of inodes than its groups hold");
        }
        if groups > MAX_GROUPS {
            return damaged("more groups than can be read");
        }
        if self.incompat & incompat::META_BG == 0 && groups.saturating_mul(self.descriptor_len.into()) > bytes
        {
            return damaged("group descriptors larger than the device");
        }
        Ok(())
    }

    /// Inodes there can be; the highest number.
    pub fn inodes(&self) -> u32 {
        self.inodes
    }

    /// Inodes of a group.
    pub fn inodes_per_group(&self) -> u32 {
        self.inodes_per_group
    }

    /// Bytes of an inode's record.
    pub fn inode_len(&self) -> u16 {
        self.inode_len
    }

    /// Bytes of a group's descriptor.
    pub fn descriptor_len(&self) -> u16 {
        self.descriptor_len
    }

    /// Bytes of a block.
    pub fn block_len(&self) -> u64 {
        1 << self.block_log2
    }

    /// Blocks of the filesystem.
    pub fn blocks(&self) -> u64 {
        self.blocks
    }

    /// How many groups there are.
    pub fn groups(&self) -> u64 {
        (self.blocks - u64::from(self.first_data_block)).div_ceil(self.blocks_per_group.into())
    }

    /// The first inode that users have; those below are the filesystem's own, but for the root.
    pub fn first_inode(&self) -> u32 {
        self.first_inode
    }

    /// Whether its journal is to be played.
    pub fn needs_recovery(&self) -> bool {
        self.incompat & incompat::RECOVER != 0
    }

    /// Whether entries of directories say what they name.
    pub(super) fn entries_have_kinds(&self) -> bool {
        self.incompat & incompat::FILETYPE != 0
    }

    /// The journal's inode.
    pub(super) fn journal_inode(&self) -> u32 {
        self.journal_inode
    }

    /// Inodes of files of the filesystem's own.
    pub fn own_files(&self) -> impl Iterator<Item = u32> {
        let orphans = if self.compat & COMPAT_ORPHAN_FILE != 0 { self.orphan_inode } else { 0 };
        [self.journal_inode, orphans].into_iter().filter(|inode| *inode != 0)
    }

    /// Whether the tables of both filesystems are in the same places: then an inode's record can be compared with the same record of the other.
    pub fn is_laid_out_like(&self, other: &Superblock) -> bool {
        let facts = |of: &Superblock| {
            (
                of.first_data_block,
                of.block_log2,
                of.blocks_per_group,
                of.inodes_per_group,
                of.inode_len,
                of.descriptor_len,
                of.incompat & incompat::META_BG,
            )
        };
        self.uuid == other.uuid && facts(self) == facts(other)
    }

    fn group_start(&self, group: u64) -> u64 {
        u64::from(self.first_data_block).saturating_add(group.saturating_mul(self.blocks_per_group.into()))
    }

    /// The block the superblock is in; not always the first one, though one block is 1,024 bytes.
    fn superblock_block(&self) -> u64 {
        AT as u64 / self.block_len()
    }

    fn has_superblock(&self, group: u64) -> bool {
        let is_power = |of: u64| {
            let mut power = of;
            while power < group {
                power = power.saturating_mul(of);
            }
            power == group
        };
        if group == 0 {
            true
        } else if self.compat & COMPAT_SPARSE_SUPER2 != 0 {
            self.backups.map(u64::from).contains(&group)
        } else if self.ro_compat & RO_COMPAT_SPARSE_SUPER != 0 {
            group == 1 || is_power(3) || is_power(5) || is_power(7)
        } else {
            true
        }
    }

    /// Where a group's descriptor is.
    pub(super) fn descriptor_at(&self, group: u32) -> u64 {
        let per_block = self.block_len() / u64::from(self.descriptor_len);
        let (block, within) = (u64::from(group) / per_block, u64::from(group) % per_block);
        let is_meta = self.incompat & incompat::META_BG != 0 && block >= u64::from(self.first_meta_group);
        let block = if is_meta {
            let first = block * per_block;
            let start = if first == 0 { self.superblock_block() } else { self.group_start(first) };
            start + u64::from(self.has_superblock(first))
        } else {
            self.superblock_block() + 1 + block
        };
        block.saturating_mul(self.block_len()) + within * u64::from(self.descriptor_len)
    }

    /// What of a group is copies of superblock and descriptors: no file's.
    pub(in crate::files) fn copies_in(&self, group: u64) -> Option<ByteRange> {
        if !self.has_superblock(group) || self.incompat & incompat::META_BG != 0 {
            return None;
        }
        let per_block = self.block_len() / u64::from(self.descriptor_len);
        let descriptors = self.groups().div_ceil(per_block) + u64::from(self.reserved_descriptor_blocks);
        // Also what comes before the first block.
        let first = if group == 0 { self.superblock_block() } else { self.group_start(group) };
        let start = if group == 0 { 0 } else { first };
        let end = first + 1 + descriptors;
        Some(self.blocks_range(start, end - start))
    }

    /// The block by which hosts keep off each other, where there is one.
    pub(in crate::files) fn mmp(&self) -> Option<ByteRange> {
        (self.incompat & incompat::MMP != 0).then(|| self.blocks_range(self.mmp_block, 1))
    }

    /// The bytes of some blocks.
    pub fn blocks_range(&self, first: u64, blocks: u64) -> ByteRange {
        let start = first.saturating_mul(self.block_len());
        let end = first.saturating_add(blocks).saturating_mul(self.block_len());
        ByteRange { start: ByteOffset(start), end: ByteOffset(end) }
    }

    /// Blocks that an inode table takes.
    pub fn inode_table_blocks(&self) -> u64 {
        (u64::from(self.inodes_per_group) * u64::from(self.inode_len)).div_ceil(self.block_len())
    }
}

/// Where a group keeps its things, by block.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Group {
    /// Which blocks are taken.
    pub block_bitmap: u64,
    /// Which inodes are.
    pub inode_bitmap: u64,
    /// The inodes.
    pub inode_table: u64,
    /// Whether the inode table was never written to.
    pub is_unused: bool,
}

impl Group {
    pub(super) fn parse(bytes: &[u8]) -> Group {
        const INODE_UNINIT: u16 = 1;
        // The upper halves are there in long descriptors only.
        let high = |at| if bytes.len() >= 64 { u32_at(bytes, at) } else { 0 };
        Group {
            block_bitmap: joined(u32_at(bytes, 0), high(0x20)),
            inode_bitmap: joined(u32_at(bytes, 4), high(0x24)),
            inode_table: joined(u32_at(bytes, 8), high(0x28)),
            is_unused: u16_at(bytes, 0x12) & INODE_UNINIT != 0,
        }
    }
}
