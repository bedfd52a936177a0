//! ext4, and the ext2 and ext3 it grew from, read without the kernel.
//!
//! Enters: a [`Source`]. Leaves: inodes, directories, the ranges of the device that hold a file. Invariant: nothing the filesystem says is believed further than the device and its own
//! sizes allow. A journal that was not played is played in memory ([`journal`]): what is read is what a mount would show. Source: "ext4 Data Structures and Algorithms", kernel
//! documentation. Why not a crate: ARCHITECTURE.md.

mod bytes;
mod dir;
mod extents;
mod inode;
mod journal;
mod superblock;
mod xattr;

use std::collections::HashMap;
use std::sync::Arc;

use ::bytes::{Bytes, BytesMut};

pub use dir::{DirEntry, MAX_DIR_BYTES};
pub use extents::{Extent, Layout};
pub use inode::{Inode, Kind, Time};
pub use superblock::{Group, Superblock};
pub use xattr::Xattr;

use super::FilesError;
use super::source::{MAX_READ, Source, range_at};
use crate::units::{ByteLen, ByteRange};

/// The root directory's inode.
pub const ROOT: u32 = 2;
/// How much of a device's start tells what is on it.
const PROBE_BYTES: u64 = 4096;

/// An ext4 filesystem.
#[derive(Clone, Debug)]
pub struct Ext4 {
    source: Arc<dyn Source>,
    superblock: Superblock,
    /// Blocks whose newest bytes are in the journal, and where there.
    replay: Arc<HashMap<u64, journal::Replayed>>,
}

impl Ext4 {
    /// Opens what is on a device.
    pub async fn open(source: Arc<dyn Source>) -> Result<Ext4, FilesError> {
        let len = source.size().0.min(PROBE_BYTES);
        let start = source.read(range_at(0, len)).await?;
        if start.get(..4) == Some(b"XFSB") {
            return Err(FilesError::Xfs);
        }
        let superblock = Superblock::parse(&start, source.size())?;
        let mut filesystem = Ext4 { source, superblock, replay: Arc::default() };
        if filesystem.superblock.needs_recovery() {
            filesystem.replay = Arc::new(journal::replay(&filesystem).await?);
            // The superblock may be in the journal too.
            if !filesystem.replay.is_empty() {
                let start = filesystem.read(range_at(0, len)).await?;
                let newest = Superblock::parse(&start, filesystem.source.size())?;
                if newest.block_len() != filesystem.block_len() {
                    return Err(FilesError::damaged("the journal", "it has a superblock of other blocks"));
                }
                filesystem.superblock = newest;
            }
        }
        Ok(filesystem)
    }

    /// What is said of all of it.
    pub fn superblock(&self) -> &Superblock {
        &self.superblock
    }

    /// Bytes of a block.
    pub fn block_len(&self) -> u64 {
        self.superblock.block_len()
    }

    /// Blocks whose newest bytes are in the journal.
    pub fn replayed_blocks(&self) -> impl Iterator<Item = u64> + '_ {
        self.replay.keys().copied()
    }

    /// A range of the device, as it is once the journal is played.
    pub async fn read(&self, range: ByteRange) -> Result<Bytes, FilesError> {
        // What is in memory needs no waiting: a long walk must let others have the thread, and be stopped.
        tokio::task::coop::consume_budget().await;
        if self.replay.is_empty() {
            return self.source.read(range).await;
        }
        let block_len = self.block_len();
        let blocks = range.start.0 / block_len..range.end.0.div_ceil(block_len);
        if blocks.clone().all(|block| !self.replay.contains_key(&block)) {
            return self.source.read(range).await;
        }
        let mut all = BytesMut::with_capacity(range.len().0 as usize);
        for block in blocks {
            let start = range.start.0.max(block * block_len);
            let end = range.end.0.min((block + 1) * block_len);
            let part = (start - block * block_len) as usize..(end - block * block_len) as usize;
            match self.replay.get(&block) {
                Some(newest) => {
                    let bytes = newest.read(&self.source, block_len).await?;
                    all.extend_from_slice(&bytes[part]);
                }
                None => all.extend_from_slice(&self.source.read(range_at(start, end - start)).await?),
            }
        }
        Ok(all.freeze())
    }

    /// Some blocks; at most [`MAX_READ`].
    async fn read_blocks(&self, first: u64, blocks: u64) -> Result<Bytes, FilesError> {
        let (at, len) = (first.saturating_mul(self.block_len()), blocks.saturating_mul(self.block_len()));
        self.read(range_at(at, len)).await
    }

    /// Where a group keeps its things.
    pub async fn group(&self, group: u32) -> Result<Group, FilesError> {
        let at = self.superblock.descriptor_at(group);
        let len = u64::from(self.superblock.descriptor_len());
        Ok(Group::parse(&self.read(range_at(at, len)).await?))
    }

    /// Where the record of an inode is.
    pub async fn inode_range(&self, number: u32) -> Result<ByteRange, FilesError> {
        let damaged = |why| FilesError::damaged(format!("inode {number}"), why);
        if number == 0 || number > self.superblock.inodes() {
            return Err(damaged("there is no inode of this number"));
        }
        let per_group = self.superblock.inodes_per_group();
        let group = self.group((number - 1) / per_group).await?;
        let within = u64::from((number - 1) % per_group) * u64::from(self.superblock.inode_len());
        let at = group.inode_table.saturating_mul(self.block_len()).saturating_add(within);
        Ok(range_at(at, self.superblock.inode_len().into()))
    }

    /// An inode.
    pub async fn inode(&self, number: u32) -> Result<Inode, FilesError> {
        let range = self.inode_range(number).await?;
        Inode::parse(number, &self.read(range).await?)
    }

    /// Bytes of a file by its layout, from `at` on: at most `len`, fewer at its end. Holes are zeros.
    pub async fn read_file(
        &self,
        inode: &Inode,
        layout: &Layout,
        at: u64,
        len: ByteLen,
    ) -> Result<Bytes, FilesError> {
        let end = inode.size.min(at.saturating_add(len.0.min(MAX_READ.0)));
        if at >= end {
            return Ok(Bytes::new());
        }
        if let Some(inline) = &layout.inline {
            let mut bytes = BytesMut::zeroed((end - at) as usize);
            let there = inline.get(at as usize..inline.len().min(end as usize)).unwrap_or_default();
            bytes[..there.len()].copy_from_slice(there);
            return Ok(bytes.freeze());
        }
        let mut bytes = BytesMut::with_capacity((end - at) as usize);
        let mut at = at;
        while at < end {
            match layout.piece_at(at, end, self.block_len()) {
                (None, until) => bytes.resize(bytes.len() + (until - at) as usize, 0),
                (Some(place), until) => {
                    let part = self.read(range_at(place, until - at)).await?;
                    if bytes.is_empty() && until == end {
                        return Ok(part);
                    }
                    bytes.extend_from_slice(&part);
                }
            }
            at = layout.piece_at(at, end, self.block_len()).1;
        }
        Ok(bytes.freeze())
    }

    /// Where a symbolic link leads.
    pub async fn link_target(&self, inode: &Inode) -> Result<Bytes, FilesError> {
        const LONGEST: u64 = 4096;
        let damaged = |why| FilesError::damaged(format!("inode {}", inode.number), why);
        if inode.size > LONGEST {
            return Err(damaged("a symbolic link is longer than 4,096 bytes"));
        }
        if let Some(target) = inode.fast_link() {
            return Ok(target);
        }
        let layout = self.layout(inode).await?;
        let target = self.read_file(inode, &layout, 0, ByteLen(LONGEST)).await?;
        Ok(target)
    }
}
