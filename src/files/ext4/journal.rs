//! The journal of a filesystem that was not unmounted, played in memory.
//!
//! Enters: the journal's file. Leaves: for each block whose newest bytes are in the journal, where they are there. Invariant: the same blocks that mounting would write, in the same order:
//! whole transactions from the first to the last that follow without a gap, without what a later one revokes. Work and memory are bounded by the journal's length. Source: "Journal (jbd2)",
//! kernel documentation. Checksums are not looked at: the device shows writes in the order they were made, so a transaction with its commit block is whole.

use std::collections::HashMap;
use std::sync::Arc;

use bytes::{Bytes, BytesMut};

use super::{Ext4, Inode, Layout};
use crate::files::FilesError;
use crate::files::source::{Source, range_at};
use crate::units::ByteLen;

const MAGIC: u32 = 0xc03b_3998;
const DESCRIPTOR: u32 = 1;
const COMMIT: u32 = 2;
const REVOCATIONS: u32 = 5;

const INCOMPAT_64BIT: u32 = 0x2;
const INCOMPAT_CSUM_V2: u32 = 0x8;
const INCOMPAT_CSUM_V3: u32 = 0x10;
const INCOMPAT_FAST_COMMIT: u32 = 0x20;

const ESCAPED: u32 = 1;
const SAME_UUID: u32 = 2;
const LAST: u32 = 8;

/// The longest journal that is played, in blocks.
const MAX_BLOCKS: u32 = 1 << 20;
/// Blocks it may name: a journal of this length full of revocations is no journal.
const MAX_NAMED: usize = 4 << 20;
/// How much of it is kept in memory: what is mounted goes on, and its journal is written over.
const MAX_HELD: usize = 32 << 20;

/// Where the newest bytes of a block are.
#[derive(Clone, Debug)]
pub(super) struct Replayed {
    /// Block of the device, in the journal.
    block: u64,
    /// Its first four bytes were taken for the journal's own mark.
    escaped: bool,
    /// The bytes, where there was room for them.
    held: Option<Bytes>,
}

impl Replayed {
    pub(super) async fn read(&self, source: &Arc<dyn Source>, block_len: u64) -> Result<Bytes, FilesError> {
        if let Some(held) = &self.held {
            return Ok(held.clone());
        }
        let bytes = source.read(range_at(self.block.saturating_mul(block_len), block_len)).await?;
        if !self.escaped {
            return Ok(bytes);
        }
        let mut bytes = BytesMut::from(&bytes[..]);
        bytes[..4].copy_from_slice(&MAGIC.to_be_bytes());
        Ok(bytes.freeze())
    }
}

fn be32(bytes: &[u8], at: usize) -> u32 {
    bytes.get(at..).and_then(|rest| rest.first_chunk()).map_or(0, |bytes| u32::from_be_bytes(*bytes))
}

fn be16(bytes: &[u8], at: usize) -> u16 {
    bytes.get(at..).and_then(|rest| rest.first_chunk()).map_or(0, |bytes| u16::from_be_bytes(*bytes))
}

/// The journal, opened.
struct Journal<'f> {
    filesystem: &'f Ext4,
    inode: Inode,
    layout: Layout,
    first: u32,
    end: u32,
    incompat: u32,
}

/// A block a descriptor names.
struct Tag {
    block: u64,
    flags: u32,
}

/// What the journal holds newer than the filesystem.
pub(super) async fn replay(filesystem: &Ext4) -> Result<HashMap<u64, Replayed>, FilesError> {
    let number = filesystem.superblock.journal_inode();
    let damaged = |why| FilesError::damaged("the journal", why);
    if number == 0 {
        return Err(FilesError::Unsupported {
            feature: "a journal on another device that is to be played".into(),
        });
    }
    let inode = filesystem.inode(number).await?;
    let layout = filesystem.layout(&inode).await?;
    let mut journal = Journal { filesystem, inode, layout, first: 0, end: 0, incompat: 0 };
    let superblock = journal.block(0).await?;
    let version = be32(&superblock, 4);
    if be32(&superblock, 0) != MAGIC || !matches!(version, 3 | 4) {
        return Err(damaged("it has no superblock"));
    }
    if u64::from(be32(&superblock, 12)) != filesystem.block_len() {
        return Err(damaged("its blocks are not the filesystem's"));
    }
    let (len, first) = (be32(&superblock, 16), be32(&superblock, 20));
    let held = journal.inode.size / filesystem.block_len();
    if first == 0 || first >= len || len > MAX_BLOCKS || u64::from(len) > held {
        return Err(damaged("its length can't be"));
    }
    let incompat = if version == 4 { be32(&superblock, 40) } else { 0 };
    if incompat & INCOMPAT_FAST_COMMIT != 0 {
        return Err(FilesError::Unsupported { feature: "fast commits, and was not unmounted".into() });
    }
    (journal.first, journal.end, journal.incompat) = (first, len, incompat);
    let (sequence, start) = (be32(&superblock, 24), be32(&superblock, 28));
    if start == 0 {
        return Ok(HashMap::new());
    }
    if start < first || start >= len {
        return Err(damaged("it begins outside itself"));
    }
    journal.play(sequence, start).await
}

impl Journal<'_> {
    async fn block(&self, index: u32) -> Result<Bytes, FilesError> {
        let block_len = self.filesystem.block_len();
        let at = u64::from(index) * block_len;
        let bytes = self.filesystem.read_file(&self.inode, &self.layout, at, ByteLen(block_len)).await?;
        if bytes.len() as u64 != block_len {
            return Err(FilesError::damaged("the journal", "it is cut short"));
        }
        Ok(bytes)
    }

    /// The device's block of a block of the journal.
    fn place(&self, index: u32) -> Option<u64> {
        let block_len = self.filesystem.block_len();
        let at = u64::from(index) * block_len;
        self.layout.piece_at(at, at + 1, block_len).0.map(|place| place / block_len)
    }

    fn next(&self, index: u32) -> u32 {
        if index + 1 >= self.end { self.first } else { index + 1 }
    }

    async fn play(&self, mut sequence: u32, start: u32) -> Result<HashMap<u64, Replayed>, FilesError> {
        // Of each block, the last transaction that wrote it, and the last that revoked it.
        let mut written: HashMap<u64, (u32, Replayed)> = HashMap::new();
        let mut revoked: HashMap<u64, u32> = HashMap::new();
        let (mut at, mut looked_at) = (start, 0);
        let (mut found, mut revocations) = (Vec::new(), Vec::new());
        // Every block is looked at once, or the journal has bitten its tail.
        while looked_at < self.end {
            let header = self.block(at).await?;
            if be32(&header, 0) != MAGIC || be32(&header, 8) != sequence {
                break;
            }
            (at, looked_at) = (self.next(at), looked_at + 1);
            if found.len() + revocations.len() + revoked.len() > MAX_NAMED {
                return Err(FilesError::damaged("the journal", "it names too many blocks"));
            }
            match be32(&header, 4) {
                DESCRIPTOR => {
                    for tag in self.tags(&header) {
                        if let Some(block) = self.place(at) {
                            let escaped = tag.flags & ESCAPED != 0;
                            found.push((tag.block, Replayed { block, escaped, held: None }));
                        }
                        (at, looked_at) = (self.next(at), looked_at + 1);
                    }
                }
                REVOCATIONS => revocations.extend(self.revocations(&header)),
                COMMIT => {
                    written.extend(found.drain(..).map(|(block, place)| (block, (sequence, place))));
                    for block in revocations.drain(..) {
                        revoked.insert(block, sequence);
                    }
                    sequence = sequence.wrapping_add(1);
                }
                _ => break,
            }
        }
        let blocks = self.filesystem.superblock.blocks();
        let counts = |block: &u64, written: u32| {
            let later = |revoked: &u32| revoked.wrapping_sub(written) < u32::MAX / 2;
            *block < blocks && !revoked.get(block).is_some_and(later)
        };
        let newest = written.into_iter().filter(|(block, (written, _))| counts(block, *written));
        let mut newest: HashMap<u64, Replayed> = newest.map(|(block, (_, place))| (block, place)).collect();
        let mut room = MAX_HELD;
        for place in newest.values_mut() {
            let block_len = self.filesystem.block_len();
            let Some(rest) = room.checked_sub(block_len as usize) else { break };
            room = rest;
            let bytes = place.read(&self.filesystem.source, block_len).await?;
            place.held = Some(Bytes::copy_from_slice(&bytes));
        }
        Ok(newest)
    }

    fn tags(&self, descriptor: &[u8]) -> Vec<Tag> {
        let wide = self.incompat & INCOMPAT_64BIT != 0;
        let (v2, v3) = (self.incompat & INCOMPAT_CSUM_V2 != 0, self.incompat & INCOMPAT_CSUM_V3 != 0);
        // A checksum ends the block.
        let end = descriptor.len() - if v2 || v3 { 4 } else { 0 };
        let len = match (v3, wide, v2) {
            (true, ..) => 16,
            (false, wide, v2) => 8 + if wide { 4 } else { 0 } + if v2 { 2 } else { 0 },
        };
        let mut tags = Vec::new();
        let mut at = 12;
        while at + len <= end {
            let bytes = &descriptor[at..at + len];
            let flags = if v3 { be32(bytes, 4) } else { be16(bytes, 6).into() };
            let high = if wide { be32(bytes, 8) } else { 0 };
            tags.push(Tag { block: super::bytes::joined(be32(bytes, 0), high), flags });
            at += len + if flags & SAME_UUID == 0 { 16 } else { 0 };
            if flags & LAST != 0 {
                break;
            }
        }
        tags
    }

    fn revocations(&self, block: &[u8]) -> Vec<u64> {
        let wide = self.incompat & INCOMPAT_64BIT != 0;
        let end = (be32(block, 12) as usize).min(block.len());
        let step = if wide { 8 } else { 4 };
        let number = |at: usize| match wide {
            true => super::bytes::joined(be32(block, at + 4), be32(block, at)),
            false => be32(block, at).into(),
        };
        (16..end).step_by(step).filter(|at| at + step <= end).map(number).collect()
    }
}
