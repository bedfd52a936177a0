//! A new version of a version: what was changed, and nothing else, becomes objects.
//!
//! Enters: the parent, which ranges of the device may have changed, and a reader of their bytes. Leaves: base objects for the blocks that differ, new map nodes, and the root of the
//! new map. Invariants: a chunk that is the parent's at its place, or was stored by this patch already, is not stored again; an object is durable before the map names it; memory is a few
//! chunks and one block's table, whatever changed; the same change of the same parent gives the same objects.

use std::collections::{BTreeMap, HashMap};
use std::fmt;
use std::sync::Arc;

use async_trait::async_trait;
use bytes::Bytes;
use futures_util::{StreamExt, stream};

use super::meta::on_blocking_thread;
use super::writer::pack::{Packed, pack_all};
use super::{BlockWriter, MapBase, MapBuilder, RepoError, Version};
use crate::format::{ChunkId, ChunkLocation, ChunkTable, Codec, MapRoot};
use crate::units::{BlockIndex, ByteLen, ByteOffset, ByteRange};

/// Chunks that are read, hashed and packed together.
const TOGETHER: usize = 8;
/// Such shares under way at once.
const SHARES: usize = 2;
/// Chunks this patch stored that are remembered, so that the same again is not stored again.
const REMEMBERED: usize = 1 << 17;

/// A part of the device that is not what the parent has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Change {
    /// Where.
    pub range: ByteRange,
    /// Whether all of it is zeros now.
    pub is_zero: bool,
}

/// A device as it is to be committed, which does not change meanwhile.
#[async_trait]
pub trait PatchSource: Send + Sync {
    /// Why a part of it can't be read.
    type Error: fmt::Display + Send + Sync + 'static;

    /// The first change that reaches past `at`, cut off before it; `None`: there are none any more. Changes that follow one another and are alike are one where they are zeros; others may be told in pieces.
    fn next_change(&self, at: ByteOffset) -> Option<Change>;

    /// The bytes of a range.
    async fn read(&self, range: ByteRange) -> Result<Bytes, Self::Error>;
}

/// Why there is no new version.
#[derive(Debug, thiserror::Error)]
pub enum PatchError<E: fmt::Display> {
    /// What was changed could not be read.
    #[error("{0}")]
    Source(E),
    /// It could not be stored.
    #[error(transparent)]
    Repo(#[from] RepoError),
}

/// What a patch came to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Patched {
    /// The root of the new map; the parent's where nothing differs.
    pub map: MapRoot,
    /// Chunks that were looked at.
    pub looked_at: u64,
    /// Chunks that were stored.
    pub stored: u64,
    /// Bytes of the base objects that were written.
    pub stored_bytes: ByteLen,
}

/// Where this patch put a chunk.
#[derive(Clone, Copy)]
enum Stored {
    /// In the object being written.
    Here { offset: u32, len: u32, codec: Codec },
    /// In a finished one.
    There(ChunkLocation),
}

/// Writes what differs from `parent` in a device of `size` bytes, at least the parent's. `looked` is told the bytes that were looked at so far.
pub async fn patch<S: PatchSource>(
    parent: &Version,
    size: ByteLen,
    level: i32,
    source: &S,
    looked: &(dyn Fn(ByteLen) + Send + Sync),
) -> Result<Patched, PatchError<S::Error>> {
    let commit = parent.commit();
    let blocks = commit.block_size.blocks(size);
    let base = MapBase { root: commit.map, blocks: commit.blocks() };
    let map = MapBuilder::new(parent.repository(), parent.image(), &parent.meta_cache(), base, blocks)?;
    let (looked_at, stored, stored_bytes) = (0, 0, ByteLen(0));
    let patched = Patched { map: commit.map, looked_at, stored, stored_bytes };
    let mut patching =
        Patching { parent, source, size, level, map, known: HashMap::new(), patched, looked, bytes: 0 };
    let mut at = ByteOffset(0);
    while let Some(change) = source.next_change(at).filter(|change| change.range.start.0 < size.0) {
        at = patching.step(change).await?;
    }
    let (root, _) = patching.map.finish().await?;
    Ok(Patched { map: root, ..patching.patched })
}

struct Patching<'p, S> {
    parent: &'p Version,
    source: &'p S,
    size: ByteLen,
    level: i32,
    map: MapBuilder,
    known: HashMap<ChunkId, Stored>,
    patched: Patched,
    looked: &'p (dyn Fn(ByteLen) + Send + Sync),
    bytes: u64,
}

impl<S: PatchSource> Patching<'_, S> {
    /// Does the block a change begins in, or all blocks that it makes zeros; where to look for the next.
    async fn step(&mut self, change: Change) -> Result<ByteOffset, PatchError<S::Error>> {
        let block_len = self.parent.commit().block_size.len().0;
        let Change { range, is_zero } = change;
        let block = self.parent.commit().block_size.block_of(range.start);
        let block_end = |block: BlockIndex| ((block.0 + 1) * block_len).min(self.size.0);
        if is_zero && range.start.0 == block.0 * block_len && range.end.0 >= block_end(block) {
            // By blocks the parent has, not by bytes: a disk of terabytes may have been trimmed.
            let end = if range.end.0 >= self.size.0 { self.map_blocks() } else { range.end.0 / block_len };
            let of_parent = BlockIndex(end.min(self.parent.commit().blocks()));
            let mut from = block;
            while let Some((gone, _)) = self.parent.next_block(from, of_parent).await? {
                self.map.set(gone, None).await?;
                from = BlockIndex(gone.0 + 1);
            }
            return Ok(ByteOffset(end * block_len));
        }
        let end = block_end(block);
        self.block(block, ByteOffset(end)).await?;
        Ok(ByteOffset(end))
    }

    fn map_blocks(&self) -> u64 {
        self.parent.commit().block_size.blocks(self.size)
    }

    /// The chunks of a block that a change reaches, ascending; whether all of a chunk is zeros by that alone.
    fn changed(&self, block: BlockIndex, end: ByteOffset) -> BTreeMap<u16, bool> {
        let chunk_len = self.parent.commit().chunk_size.len() as u64;
        let start = block.0 * self.parent.commit().block_size.len().0;
        let mut chunks = BTreeMap::new();
        let mut at = ByteOffset(start);
        while let Some(Change { range, is_zero }) =
            self.source.next_change(at).filter(|change| change.range.start < end)
        {
            let stop = range.end.min(end);
            let (first, last) = ((range.start.0 - start) / chunk_len, (stop.0 - 1 - start) / chunk_len);
            for chunk in first..=last {
                let from = start + chunk * chunk_len;
                let whole = range.start.0 <= from && range.end.0 >= (from + chunk_len).min(self.size.0);
                let all_zero = chunks.entry(chunk as u16).or_insert(true);
                *all_zero &= is_zero && whole;
            }
            at = stop;
        }
        chunks
    }

    async fn block(&mut self, block: BlockIndex, end: ByteOffset) -> Result<(), PatchError<S::Error>> {
        let changed = self.changed(block, end);
        let commit = self.parent.commit().clone();
        let (mut before, mut table_ref) = (None, None);
        if block.0 < commit.blocks() {
            table_ref = self.parent.table_ref(block).await?;
            before = self.parent.table(block).await?;
        }
        let mut writer = BlockWriter::new(
            self.parent.repository(),
            self.parent.image(),
            commit.block_size,
            commit.chunk_size,
        );
        let mut old = Unchanged { table: before.clone(), next: 0 };
        // Of this block alone: what is stored in an object that is given up is stored nowhere.
        let mut here = Vec::new();
        let mut differs = false;
        let shares: Vec<Vec<(u16, bool)>> = {
            let all: Vec<_> = changed.into_iter().collect();
            all.chunks(TOGETHER).map(<[_]>::to_vec).collect()
        };
        let (source, size, level) = (self.source, self.size, self.level);
        let parent = self.parent;
        let start = block.0 * commit.block_size.len().0;
        let shares = shares.into_iter().map(|share| {
            let table = before.clone();
            async move { examine(source, parent, size, level, start, share, table.as_deref()).await }
        });
        let mut shares = stream::iter(shares).buffered(SHARES);
        while let Some(share) = shares.next().await {
            for (index, found) in share? {
                self.patched.looked_at += 1;
                self.bytes += commit.chunk_size.len() as u64;
                old.refer_before(&mut writer, index);
                let was = before
                    .as_ref()
                    .and_then(|table| table.entry(index.into()).map(|entry| table.location(entry)));
                match found {
                    Found::Zero => differs |= was.is_some(),
                    Found::AsBefore => {
                        if let Some(was) = was {
                            writer.refer(index, &was);
                        }
                    }
                    Found::New { id, packed } => {
                        differs = true;
                        match self.known.get(&id) {
                            Some(Stored::There(location)) => writer.refer(index, location),
                            Some(&Stored::Here { offset, len, codec }) => {
                                writer.repeat(index, id, codec, offset, len);
                            }
                            None => {
                                let offset = writer.store(index, id, packed.codec, &packed.bytes).await?;
                                let (len, codec) = (packed.bytes.len() as u32, packed.codec);
                                if self.known.len() >= REMEMBERED {
                                    self.known.retain(|_, stored| matches!(stored, Stored::Here { .. }));
                                }
                                self.known.insert(id, Stored::Here { offset, len, codec });
                                here.push(id);
                                self.patched.stored += 1;
                            }
                        }
                    }
                }
            }
            (self.looked)(ByteLen(self.bytes));
        }
        drop(shares);
        if !differs {
            return Ok(());
        }
        // No block has so many chunks.
        old.refer_before(&mut writer, u16::MAX);
        if writer.chunks() == 0 {
            return match table_ref {
                Some(_) => Ok(self.map.set(block, None).await?),
                None => Ok(()),
            };
        }
        let sealed = writer.seal();
        let object = sealed.table().object;
        for id in here {
            if let Some(&Stored::Here { offset, len, codec }) = self.known.get(&id) {
                let offset = ByteOffset(offset.into());
                let location = ChunkLocation { id, object, offset, stored_len: len, codec };
                self.known.insert(id, Stored::There(location));
            }
        }
        self.patched.stored_bytes.0 += sealed.object_len().0;
        // Durable before the map hears of it.
        let table = sealed.finish().await?;
        Ok(self.map.set(block, Some(table)).await?)
    }
}

/// Chunks of the parent's table that nothing was changed of.
struct Unchanged {
    table: Option<Arc<ChunkTable>>,
    next: usize,
}

impl Unchanged {
    /// Names those that come before `index` again, and passes over the one that has it.
    fn refer_before(&mut self, writer: &mut BlockWriter, index: u16) {
        let Some(table) = &self.table else { return };
        while let Some(entry) = table.entries().get(self.next) {
            if entry.index >= index {
                if entry.index == index {
                    self.next += 1;
                }
                return;
            }
            writer.refer(entry.index, &table.location(entry));
            self.next += 1;
        }
    }
}

/// What a chunk is found to be.
enum Found {
    Zero,
    /// The parent's at this place.
    AsBefore,
    New {
        id: ChunkId,
        packed: Packed,
    },
}

/// Reads some chunks of the block that begins at `start`, and tells what they are.
async fn examine<S: PatchSource>(
    source: &S,
    parent: &Version,
    size: ByteLen,
    level: i32,
    start: u64,
    share: Vec<(u16, bool)>,
    table: Option<&ChunkTable>,
) -> Result<Vec<(u16, Found)>, PatchError<S::Error>> {
    let chunk_len = parent.commit().chunk_size.len() as u64;
    let mut read = Vec::with_capacity(share.len());
    for (index, is_zero) in share {
        if is_zero {
            read.push((index, None, None));
            continue;
        }
        let from = start + u64::from(index) * chunk_len;
        let range = ByteRange { start: ByteOffset(from), end: ByteOffset((from + chunk_len).min(size.0)) };
        let bytes = source.read(range).await.map_err(PatchError::Source)?;
        let was = table.and_then(|table| table.entry(index.into())).map(|entry| entry.id);
        read.push((index, Some(bytes), was));
    }
    let packing = move || pack_all(read, chunk_len as usize, level);
    let packed =
        on_blocking_thread(&**parent.repository().store(), packing).await.map_err(RepoError::from)??;
    let found = packed.into_iter().map(|(index, packed)| {
        let found = match packed {
            None => Found::Zero,
            Some((_, None)) => Found::AsBefore,
            Some((id, Some(packed))) => Found::New { id, packed },
        };
        (index, found)
    });
    Ok(found.collect())
}
