//! The assembler: decides what is stored, in order, and writes objects and the map.
//!
//! Enters: chunks in order, as the workers found them. Leaves: base objects, map nodes and figures. Every decision depends on the chunks so far
//! alone, never on which thread was faster: the same image on the same parent gives the same objects. Order of writes: an object is durable
//! before the map builder hears of its block, so a node never names what is not there.

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::SyncSender;

use parking_lot::Mutex;
use tokio::runtime::Handle;
use tokio::task::JoinHandle;

use super::known::{Known, KnownChunks, ObjectSlot};
use super::pipeline::{Buffers, Done, Finding, InOrder, Packer, WorkerLost};
use super::{Parent, WriteStats};
use crate::format::map_node::TableRef;
use crate::format::{BlockSize, ChunkId, ChunkSize, ChunkTable, Codec, MapRoot};
use crate::repo::{BlockWriter, ImageName, MapBuilder, RepoError, Repository};
use crate::units::{BlockIndex, ChunkIndex};

/// Objects whose last bytes are being synced while the next one is written.
const MAX_FINISHING: usize = 4;

/// What the writer writes to.
pub(super) struct Target {
    pub(super) repo: Repository,
    pub(super) image: ImageName,
    pub(super) block_size: BlockSize,
    pub(super) chunk_size: ChunkSize,
}

/// The block being assembled.
struct OpenBlock {
    index: BlockIndex,
    /// The parent's version of it.
    parent: Option<(TableRef, Arc<ChunkTable>)>,
    writer: BlockWriter,
    slot: ObjectSlot,
    /// Chunks that are where the parent has them.
    in_place: usize,
}

/// A block that is through: its table is known, its object perhaps still on its way.
struct Finishing {
    index: BlockIndex,
    table: Option<TableRef>,
    object: Option<JoinHandle<Result<TableRef, RepoError>>>,
}

/// Assembles an image.
pub(super) struct Assembler {
    handle: Handle,
    target: Target,
    parent: Option<Parent>,
    known: Arc<Mutex<KnownChunks>>,
    packer: Packer,
    map: MapBuilder,
    open: Option<OpenBlock>,
    finishing: VecDeque<Finishing>,
    /// The next block of the parent that is not compared yet.
    parent_next: BlockIndex,
    stats: WriteStats,
}

/// What came out.
pub(super) struct Assembled {
    pub(super) map: MapRoot,
    pub(super) stats: WriteStats,
}

impl Assembler {
    pub(super) fn new(
        handle: Handle,
        target: Target,
        parent: Option<Parent>,
        known: Arc<Mutex<KnownChunks>>,
        packer: Packer,
        map: MapBuilder,
    ) -> Assembler {
        Assembler {
            handle,
            target,
            parent,
            known,
            packer,
            map,
            open: None,
            finishing: VecDeque::new(),
            parent_next: BlockIndex(0),
            stats: WriteStats::default(),
        }
    }

    /// Runs until all chunks are through. Buffers go back by `pool`; that nobody wants them any more is no error.
    ///
    /// However it ends, nothing of it is being written any more when it returns.
    pub(super) fn run(
        mut self,
        chunks: InOrder,
        pool: &SyncSender<Buffers>,
        given_up: &AtomicBool,
    ) -> Result<Assembled, RepoError> {
        let assembled = self.assemble(chunks, pool, given_up);
        for Finishing { object, .. } in self.finishing.drain(..) {
            // Objects of a write that failed: whether they became visible is the same to everyone.
            let _ = object.map(|object| self.handle.block_on(object));
        }
        assembled?;
        let (map, nodes) = self.handle.block_on(self.map.finish())?;
        self.stats.nodes = nodes;
        Ok(Assembled { map, stats: self.stats })
    }

    /// Takes all chunks and settles all blocks.
    fn assemble(
        &mut self,
        mut chunks: InOrder,
        pool: &SyncSender<Buffers>,
        given_up: &AtomicBool,
    ) -> Result<(), RepoError> {
        let lost = |WorkerLost| RepoError::WriterStopped { why: "a compression thread ended" };
        while let Some(Done { mut job, finding }) = chunks.next().map_err(lost)? {
            if given_up.load(Ordering::Relaxed) {
                break;
            }
            self.chunk(job.index, finding, &mut job.buffers)?;
            let _ = pool.send(job.buffers);
        }
        // The chunks also end where the caller went away without finishing.
        if given_up.load(Ordering::Relaxed) {
            return Err(RepoError::WriterStopped { why: "it was given up" });
        }
        self.close_block()?;
        self.drop_parent_blocks_before(None)?;
        while !self.finishing.is_empty() {
            self.settle_one()?;
        }
        Ok(())
    }

    fn chunk(&mut self, index: ChunkIndex, finding: Finding, buffers: &mut Buffers) -> Result<(), RepoError> {
        let chunk_bytes = buffers.content.len() as u64;
        self.stats.chunks += 1;
        let Finding::Chunk { id, packed } = finding else {
            self.stats.zero_bytes += chunk_bytes;
            return Ok(());
        };
        let per_block = self.target.block_size.log2() - self.target.chunk_size.log2();
        let block = BlockIndex(index.0 >> per_block);
        let in_block = (index.0 - (block.0 << per_block)) as u16;
        if self.open.as_ref().is_none_or(|open| open.index != block) {
            self.close_block()?;
            self.open_block(block)?;
        }
        let Some(open) = &mut self.open else {
            return Err(RepoError::WriterStopped { why: "no block is open" });
        };
        // The parent's place first: a block that did not change then has the very table it had.
        if let Some((_, table)) = &open.parent
            && let Some(entry) = table.entry(in_block.into())
            && entry.id == id
        {
            open.writer.refer(in_block, &table.location(entry));
            open.in_place += 1;
            self.stats.deduplicated_bytes += chunk_bytes;
            return Ok(());
        }
        match self.known.lock().locate(&id) {
            Some(Known::Here { offset, stored_len, codec }) => {
                open.writer.repeat(in_block, id, codec, offset, stored_len);
                self.stats.deduplicated_bytes += chunk_bytes;
                return Ok(());
            }
            Some(Known::There(location)) => {
                open.writer.refer(in_block, &location);
                self.stats.deduplicated_bytes += chunk_bytes;
                return Ok(());
            }
            None => {}
        }
        // The worker knew the chunk and did not pack it, but it was pushed out since.
        let codec = packed.unwrap_or_else(|| self.packer.pack(buffers));
        self.store(in_block, id, codec, buffers)
    }

    fn store(&mut self, index: u16, id: ChunkId, codec: Codec, buffers: &Buffers) -> Result<(), RepoError> {
        let Some(open) = &mut self.open else {
            return Err(RepoError::WriterStopped { why: "no block is open" });
        };
        let stored = match codec {
            Codec::Raw => &buffers.content,
            Codec::Zstd => &buffers.packed,
        };
        let offset = self.handle.block_on(open.writer.store(index, id, codec, stored))?;
        self.known.lock().add(id, open.slot, offset, stored.len() as u32, codec);
        self.stats.new_bytes += buffers.content.len() as u64;
        Ok(())
    }

    fn open_block(&mut self, index: BlockIndex) -> Result<(), RepoError> {
        self.drop_parent_blocks_before(Some(index))?;
        let mut parent_block = None;
        if let Some(parent) = &self.parent
            && parent.same_geometry
            && index.0 < parent.version.commit().blocks()
        {
            let version = &parent.version;
            parent_block = self.handle.block_on(async {
                let Some(table_ref) = version.table_ref(index).await? else { return Ok(None) };
                let table = version.table(index).await?;
                Ok::<_, RepoError>(table.map(|table| (table_ref, table)))
            })?;
        }
        let slot = self.known.lock().add_object(None);
        let target = &self.target;
        let writer = BlockWriter::new(&target.repo, &target.image, target.block_size, target.chunk_size);
        self.open = Some(OpenBlock { index, parent: parent_block, writer, slot, in_place: 0 });
        Ok(())
    }

    fn close_block(&mut self) -> Result<(), RepoError> {
        let Some(OpenBlock { index, parent, writer, slot, in_place }) = self.open.take() else {
            return Ok(());
        };
        // Unchanged: the same chunks, all of them, none more. Nothing was stored for it, so the writer is dropped unused.
        if let Some((table_ref, table)) = &parent
            && in_place == writer.chunks()
            && in_place == table.entries().len()
        {
            self.known.lock().seal_object(slot, table_ref.object);
            return self.push(Finishing { index, table: Some(*table_ref), object: None });
        }
        let sealed = writer.seal();
        self.known.lock().seal_object(slot, sealed.table().object);
        self.stats.objects += 1;
        self.stats.stored_bytes += sealed.object_len().0;
        let object = self.handle.spawn(sealed.finish());
        self.push(Finishing { index, table: None, object: Some(object) })
    }

    /// Blocks that the parent has and this version skipped over, before `end` or to the last, are zeros now.
    fn drop_parent_blocks_before(&mut self, end: Option<BlockIndex>) -> Result<(), RepoError> {
        let Some(parent) = self.parent.clone().filter(|parent| parent.same_map) else { return Ok(()) };
        let limit = end.unwrap_or(BlockIndex(parent.version.commit().blocks()));
        while self.parent_next < limit {
            let next = self.handle.block_on(parent.version.next_block(self.parent_next, limit))?;
            let Some((gone, _)) = next else { break };
            self.push(Finishing { index: gone, table: None, object: None })?;
            self.parent_next = BlockIndex(gone.0 + 1);
        }
        if let Some(end) = end {
            self.parent_next = BlockIndex(end.0 + 1);
        }
        Ok(())
    }

    fn push(&mut self, finishing: Finishing) -> Result<(), RepoError> {
        self.finishing.push_back(finishing);
        while self.finishing.len() > MAX_FINISHING {
            self.settle_one()?;
        }
        Ok(())
    }

    /// Waits for the oldest object to be durable, then tells the map.
    fn settle_one(&mut self) -> Result<(), RepoError> {
        let Some(Finishing { index, table, object }) = self.finishing.pop_front() else { return Ok(()) };
        let table = match object {
            None => table,
            Some(object) => {
                let stopped = |_| RepoError::WriterStopped { why: "the runtime is shutting down" };
                Some(self.handle.block_on(object).map_err(stopped)??)
            }
        };
        self.handle.block_on(self.map.set(index, table))
    }
}
