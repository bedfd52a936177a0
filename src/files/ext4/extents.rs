//! Where a file's bytes are: extents, or the block pointers of ext2 and ext3.
//!
//! Enters: an inode. Leaves: a [`Layout`], whose extents ascend and lie inside the filesystem. Invariant: a tree is read once from left to right; levels go down by one and ranges
//! ascend, so a tree that points to itself ends as damage; [`MAX_EXTENTS`] and [`MAX_NODES`] bound what it takes.

use bytes::{Bytes, BytesMut};

use super::bytes::{joined, u16_at, u32_at};
use super::{Ext4, Inode};
use crate::files::FilesError;
use crate::units::ByteRange;

/// The first bytes of a node of an extent tree.
pub(super) const MAGIC: u16 = 0xf30a;
const DEEPEST: u16 = 5;
/// The most extents of one file: a terabyte in pieces of 256 KiB.
const MAX_EXTENTS: usize = 4 << 20;
/// The most blocks of one file's map: of pointers, for a terabyte.
const MAX_NODES: usize = 256 << 10;
/// The longest content in an inode and its attributes.
const MAX_INLINE: usize = 64 << 10;

/// Blocks in a row.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Extent {
    /// First block in the file.
    pub logical: u64,
    /// How many.
    pub blocks: u64,
    /// First block on the device.
    pub physical: u64,
    /// Whether it was written; if not it is zeros, whatever is there.
    pub is_written: bool,
}

/// Where all of a file is.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Layout {
    /// By place in the file.
    pub extents: Vec<Extent>,
    /// Blocks of the device that hold the map itself.
    pub nodes: Vec<u64>,
    /// The content, where it is in the inode.
    pub inline: Option<Bytes>,
}

impl Layout {
    /// Where the byte at `at` is on the device, `None` in a hole; and up to where, at most `end`, that goes on.
    pub(in crate::files) fn piece_at(&self, at: u64, end: u64, block_len: u64) -> (Option<u64>, u64) {
        let block = at / block_len;
        let next = self.extents.partition_point(|extent| extent.logical + extent.blocks <= block);
        let Some(extent) = self.extents.get(next) else { return (None, end) };
        let from = extent.logical * block_len;
        if at < from {
            return (None, from.min(end));
        }
        let until = ((extent.logical + extent.blocks) * block_len).min(end);
        let place = extent.physical * block_len + (at - from);
        (extent.is_written.then_some(place), until)
    }

    /// The ranges of the file that hold data, up to its size; neighbours are joined.
    pub fn data(&self, size: u64, block_len: u64) -> Vec<std::ops::Range<u64>> {
        if self.inline.is_some() {
            return if size > 0 { vec![std::ops::Range { start: 0, end: size }] } else { Vec::new() };
        }
        let mut ranges: Vec<std::ops::Range<u64>> = Vec::new();
        for extent in self.extents.iter().filter(|extent| extent.is_written) {
            let start = extent.logical * block_len;
            let end = ((extent.logical + extent.blocks) * block_len).min(size);
            match ranges.last_mut() {
                Some(last) if last.end == start && start < end => last.end = end,
                _ if start < end => ranges.push(start..end),
                _ => {}
            }
        }
        ranges
    }

    /// How many blocks it has.
    pub(in crate::files) fn blocks(&self) -> u64 {
        self.extents.iter().map(|extent| extent.blocks).sum()
    }

    /// What of the device it takes: contents and map.
    pub fn taken(&self, block_len: u64) -> impl Iterator<Item = ByteRange> + '_ {
        let range = move |first: u64, blocks: u64| {
            crate::files::source::range_at(first * block_len, blocks * block_len)
        };
        let extents = self.extents.iter().map(move |extent| range(extent.physical, extent.blocks));
        extents.chain(self.nodes.iter().map(move |node| range(*node, 1)))
    }

    fn push(&mut self, extent: Extent, blocks: u64) -> Result<(), &'static str> {
        if extent.blocks == 0 {
            return Err("an extent of no blocks");
        }
        let end = extent.physical.checked_add(extent.blocks).filter(|end| *end <= blocks);
        if end.is_none() || extent.physical == 0 {
            return Err("its content is outside the filesystem");
        }
        if self.extents.len() == MAX_EXTENTS {
            return Err("it is in more pieces than can be read");
        }
        match self.extents.last_mut() {
            Some(last) if extent.logical < last.logical + last.blocks => return Err("its extents overlap"),
            Some(last)
                if extent.logical == last.logical + last.blocks
                    && extent.physical == last.physical + last.blocks
                    && extent.is_written == last.is_written =>
            {
                last.blocks += extent.blocks;
            }
            _ => self.extents.push(extent),
        }
        Ok(())
    }
}

/// A node still to be read, as its parent describes it.
struct Below {
    block: u64,
    depth: u16,
    first: u64,
    end: u64,
}

impl Ext4 {
    /// Where a file's bytes are.
    pub async fn layout(&self, inode: &Inode) -> Result<Layout, FilesError> {
        if inode.has_no_map() {
            return Ok(Layout::default());
        }
        if inode.size > self.block_len() << 32 {
            return Err(FilesError::damaged(
                format!("inode {}", inode.number),
                "it is larger than a file can be",
            ));
        }
        if inode.is_inline() {
            return self.inline(inode).await;
        }
        if inode.has_extents() { self.tree(inode).await } else { self.pointers(inode).await }
    }

    async fn inline(&self, inode: &Inode) -> Result<Layout, FilesError> {
        let mut content = BytesMut::from(&inode.map[..]);
        if inode.size > content.len() as u64 {
            let rest = self.xattrs(inode).await?.into_iter().find(|xattr| xattr.name == b"system.data");
            content.extend_from_slice(rest.as_ref().map_or(&[], |xattr| &xattr.value));
        }
        if inode.size > MAX_INLINE as u64 {
            return Err(FilesError::damaged(
                format!("inode {}", inode.number),
                "it is too large to be inline",
            ));
        }
        content.truncate(inode.size as usize);
        Ok(Layout { inline: Some(content.freeze()), ..Layout::default() })
    }

    pub(super) async fn tree(&self, inode: &Inode) -> Result<Layout, FilesError> {
        let damaged = |why| FilesError::damaged(format!("inode {}", inode.number), why);
        let mut layout = Layout::default();
        let mut below: Vec<Below> = Vec::new();
        let depth = u16_at(&inode.map, 6);
        if depth > DEEPEST {
            return Err(damaged("its extent tree is too deep"));
        }
        let top = Below { block: 0, depth, first: 0, end: 1 << 32 };
        self.node(&inode.map, &top, &mut layout, &mut below).map_err(damaged)?;
        while let Some(next) = below.pop() {
            if layout.nodes.len() == MAX_NODES {
                return Err(damaged("its extent tree is too large"));
            }
            layout.nodes.push(next.block);
            let bytes = self.read_blocks(next.block, 1).await?;
            self.node(&bytes, &next, &mut layout, &mut below).map_err(damaged)?;
        }
        Ok(layout)
    }

    fn node(
        &self,
        bytes: &[u8],
        node: &Below,
        layout: &mut Layout,
        below: &mut Vec<Below>,
    ) -> Result<(), &'static str> {
        if u16_at(bytes, 0) != MAGIC {
            // A file that was never given a block may have no tree.
            return if node.block == 0 && bytes.iter().all(|byte| *byte == 0) {
                Ok(())
            } else {
                Err("a node of its extent tree is none")
            };
        }
        let entries = usize::from(u16_at(bytes, 2));
        if u16_at(bytes, 6) != node.depth {
            return Err("its extent tree has a node of the wrong level");
        }
        if 12 + entries * 12 > bytes.len() {
            return Err("a node of its extent tree is too full");
        }
        let entry = |at: usize| &bytes[12 + at * 12..24 + at * 12];
        if node.depth == 0 {
            for at in 0..entries {
                let bytes = entry(at);
                let (logical, len) = (u64::from(u32_at(bytes, 0)), u16_at(bytes, 4));
                // Longer ones were allocated and not written.
                const LONGEST: u16 = 32768;
                let (blocks, is_written) = if len <= LONGEST { (len, true) } else { (len - LONGEST, false) };
                if logical < node.first || logical + u64::from(blocks) > node.end {
                    return Err("an extent is outside its place in the tree");
                }
                let physical = joined(u32_at(bytes, 8), u16_at(bytes, 6).into());
                let extent = Extent { logical, blocks: blocks.into(), physical, is_written };
                layout.push(extent, self.superblock.blocks())?;
            }
            return Ok(());
        }
        let from = below.len();
        let mut end = node.end;
        // From the right, so that the leftmost is taken first.
        for at in (0..entries).rev() {
            let bytes = entry(at);
            let first = u64::from(u32_at(bytes, 0));
            if first < node.first || first >= end {
                return Err("the nodes of its extent tree do not ascend");
            }
            let block = joined(u32_at(bytes, 4), u16_at(bytes, 8).into());
            if block == 0 || block >= self.superblock.blocks() {
                return Err("its extent tree is outside the filesystem");
            }
            below.push(Below { block, depth: node.depth - 1, first, end });
            end = first;
        }
        debug_assert!(below.len() - from == entries);
        Ok(())
    }

    /// The pointers of ext2 and ext3: twelve to blocks, then to blocks of pointers, of pointers to these, and once more.
    pub(super) async fn pointers(&self, inode: &Inode) -> Result<Layout, FilesError> {
        let damaged = |why| FilesError::damaged(format!("inode {}", inode.number), why);
        const DIRECT: usize = 12;
        let mut layout = Layout::default();
        let end = inode.size.div_ceil(self.block_len());
        let per_block = self.block_len() / 4;
        for at in 0..DIRECT {
            self.pointed(&mut layout, at as u64, u32_at(&inode.map, at * 4)).map_err(damaged)?;
        }
        let mut logical = DIRECT as u64;
        for level in 1..=3u32 {
            let covers = per_block.pow(level);
            if logical >= end {
                break;
            }
            let block = u32_at(&inode.map, (DIRECT + level as usize - 1) * 4);
            // Where a block of pointers is, its level, and the first block of the file it is for.
            let mut below = vec![(block, level, logical)];
            while let Some((block, level, first)) = below.pop() {
                if block == 0 || first >= end {
                    continue;
                }
                if u64::from(block) >= self.superblock.blocks() {
                    return Err(damaged("its map is outside the filesystem"));
                }
                if layout.nodes.len() == MAX_NODES {
                    return Err(damaged("its map is too large"));
                }
                layout.nodes.push(block.into());
                let bytes = self.read_blocks(block.into(), 1).await?;
                let step = per_block.pow(level - 1);
                for at in 0..per_block {
                    // From the right where they are for later.
                    let at = if level > 1 { per_block - 1 - at } else { at };
                    let block = u32_at(&bytes, at as usize * 4);
                    let logical = first + at * step;
                    if level > 1 {
                        below.push((block, level - 1, logical));
                    } else {
                        self.pointed(&mut layout, logical, block).map_err(damaged)?;
                    }
                }
            }
            logical += covers;
        }
        Ok(layout)
    }

    fn pointed(&self, layout: &mut Layout, logical: u64, block: u32) -> Result<(), &'static str> {
        if block == 0 {
            return Ok(());
        }
        let extent = Extent { logical, blocks: 1, physical: block.into(), is_written: true };
        layout.push(extent, self.superblock.blocks())
    }
}
