//! The image writer: a stream of bytes and holes becomes a commit.
//!
//! Enters: a device's bytes in order, from a plain thread. Leaves: base objects, map nodes, a commit, and the branch moved to it; or an error and
//! the branch where it was. Invariants: memory is bounded whatever the image's size; objects are durable before what names them, the branch moves
//! last; the same image on the same parent gives the same objects, and no commit at all where nothing changed.
//!
//! ```text
//! caller: fill chunk -> workers: zero? hash, known? compress -> assembler: in order, deduplicate, write object, map
//!    ^------------------------- a fixed number of buffers -----------------------------'
//! ```

mod assemble;
mod known;
mod pipeline;

use std::collections::HashSet;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{self, Receiver, Sender};
use std::thread::JoinHandle;
use std::time::Duration;

use futures_util::{StreamExt, stream};
use parking_lot::Mutex;
use tokio::runtime::Handle;

use self::assemble::{Assembled, Assembler, Target};
use self::known::KnownChunks;
use self::pipeline::{Buffers, InOrder, Job, Packer};
use super::meta::MemMetaCache;
use super::{
    BranchName, BranchTip, Hold, HoldOptions, ImageName, MapBase, MapBuilder, MetaCache, NoMetaCache,
    RepoError, Repository, Version, VersionOptions,
};
use crate::format::{BlockSize, ChunkSize, Commit, CommitId, Filesystem, MapRoot, TableId, Timestamp};
use crate::units::{BlockIndex, ByteLen, ChunkIndex, PAGE_SIZE};

/// The zstd level where none is given. On 1.3 GB of /usr/lib, in chunks of 128 KiB, level 3 takes 1.2 times as long as level 1 for 3% fewer
/// bytes, and level -1 is hardly faster for 8% more.
pub const DEFAULT_LEVEL: i32 = 1;
/// Threads that hash and compress, at most.
pub const MAX_THREADS: usize = 64;
/// Tables of the parent that are read at once.
const PARALLEL_TABLES: usize = 8;

/// How an image is written.
#[derive(Clone, Debug)]
pub struct WriterParams {
    /// The branch that moves; its tip, if it has one, is the parent.
    pub branch: BranchName,
    /// The device's size, a multiple of 4096.
    pub size: ByteLen,
    /// How the device is cut into blocks.
    pub block_size: BlockSize,
    /// How a block is cut into chunks.
    pub chunk_size: ChunkSize,
    /// zstd's compression level, -7 to 22.
    pub level: i32,
    /// Threads that hash and compress, 1 to [`MAX_THREADS`].
    pub threads: usize,
    /// Who writes, for whoever finds a `gc` waiting for it.
    pub holder: String,
}

impl WriterParams {
    /// The defaults for a device of `size` bytes.
    pub fn new(size: ByteLen) -> WriterParams {
        WriterParams {
            branch: BranchName::default(),
            size,
            block_size: BlockSize::DEFAULT,
            chunk_size: ChunkSize::DEFAULT,
            level: DEFAULT_LEVEL,
            threads: std::thread::available_parallelism().map_or(1, |threads| threads.get()),
            holder: format!("process {}", std::process::id()),
        }
    }
}

/// What a commit says beside its bytes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CommitMeta {
    /// What the device holds.
    pub filesystem: Filesystem,
    /// Who made it.
    pub author: String,
    /// When.
    pub time: Timestamp,
    /// Why.
    pub message: String,
}

/// Figures of one write.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct WriteStats {
    /// Bytes given as data.
    pub data_bytes: u64,
    /// Bytes of chunks that are zeros, given as data.
    pub zero_bytes: u64,
    /// Bytes of chunks that were known and not stored again.
    pub deduplicated_bytes: u64,
    /// Bytes of chunks that were new, before compression.
    pub new_bytes: u64,
    /// Bytes of base objects written.
    pub stored_bytes: u64,
    /// Chunks looked at.
    pub chunks: u64,
    /// Base objects written.
    pub objects: u64,
    /// Map nodes written.
    pub nodes: u64,
}

/// What a write came to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Finished {
    /// The branch's tip: the new commit, or the old one if nothing changed.
    pub commit: CommitId,
    /// The same device as the tip's was given: there is no new commit.
    pub unchanged: bool,
    /// Figures.
    pub stats: WriteStats,
}

/// Versions before the parent whose chunks are known too, and how long reading their tables may take.
const HISTORY: usize = 16;
const HISTORY_PATIENCE: Duration = Duration::from_secs(10);

/// The version that a new one follows.
#[derive(Clone)]
struct Parent {
    version: Version,
    /// Blocks and chunks are cut the same way: tables can be compared and named.
    same_geometry: bool,
    /// The new map can stand on the parent's.
    same_map: bool,
}

/// The running threads, and the ways to them.
struct Pipeline {
    jobs: Sender<Job>,
    pool: Receiver<Buffers>,
    workers: Vec<JoinHandle<()>>,
    assembler: JoinHandle<Result<Assembled, RepoError>>,
    /// Set before the channels close where nothing shall come of it.
    given_up: Arc<AtomicBool>,
}

/// Writes an image. Blocking: for a plain thread, or `spawn_blocking`; never for an async task. The runtime behind its handle is a
/// multi-thread one. Dropped without [`ImageWriter::finish`] it leaves the branch alone, and at most objects that nobody names.
pub struct ImageWriter {
    handle: Handle,
    repo: Repository,
    image: ImageName,
    params: WriterParams,
    tip: Option<BranchTip>,
    parent: Option<Parent>,
    /// Keeps a `gc` from what is written and relied on. `None` when it is let go of.
    hold: Option<Hold>,
    /// `None` after an error; what it was is in `failed`.
    pipeline: Option<Pipeline>,
    failed: Option<RepoError>,
    /// Bytes and holes so far.
    position: u64,
    /// The chunk at `position`, if some of it came as data.
    filling: Option<Buffers>,
    sequence: u64,
    data_bytes: u64,
}

impl ImageWriter {
    /// Reads the branch's tip and what it stores, and starts the threads.
    pub fn new(
        handle: &Handle,
        repo: &Repository,
        image: &ImageName,
        params: WriterParams,
    ) -> Result<ImageWriter, RepoError> {
        check_size(params.size)?;
        // Before anything is looked at.
        let hold = handle.block_on(Hold::push(repo, image, HoldOptions::new(params.holder.clone())))?;
        match ImageWriter::start(handle, repo, image, params) {
            Ok(mut writer) => {
                writer.hold = Some(hold);
                Ok(writer)
            }
            Err(error) => {
                handle.block_on(hold.release());
                Err(error)
            }
        }
    }

    fn start(
        handle: &Handle,
        repo: &Repository,
        image: &ImageName,
        params: WriterParams,
    ) -> Result<ImageWriter, RepoError> {
        let cache: Arc<dyn MetaCache> = Arc::new(NoMetaCache);
        let tip = handle.block_on(repo.branch(image, &params.branch))?;
        let parent = match &tip {
            None => None,
            Some(tip) => {
                let open = Version::open(repo, image, tip.commit, cache.clone(), VersionOptions::default());
                let version = handle.block_on(open)?;
                let commit = version.commit();
                let same_geometry =
                    (commit.block_size, commit.chunk_size) == (params.block_size, params.chunk_size);
                let same_map = same_geometry && commit.size <= params.size;
                Some(Parent { version, same_geometry, same_map })
            }
        };
        let mut known = KnownChunks::new(known::CAPACITY);
        let mut base = MapBase::ZERO;
        if let Some(parent) = &parent {
            if parent.version.commit().chunk_size == params.chunk_size {
                let mut learned = HashSet::new();
                handle.block_on(learn(&parent.version, &mut known, &mut learned))?;
                let learning = learn_history(repo, image, &parent.version, &mut known, &mut learned);
                // What a far repository has not told by then is stored again.
                let _ = handle.block_on(async { tokio::time::timeout(HISTORY_PATIENCE, learning).await });
            }
            if parent.same_map {
                let commit = parent.version.commit();
                base = MapBase { root: commit.map, blocks: commit.blocks() };
            }
        }
        let map = MapBuilder::new(repo, image, &cache, base, params.block_size.blocks(params.size))?;
        let target = Target {
            repo: repo.clone(),
            image: image.clone(),
            block_size: params.block_size,
            chunk_size: params.chunk_size,
        };
        let pipeline = start(handle, target, parent.clone(), known, map, &params)?;
        Ok(ImageWriter {
            handle: handle.clone(),
            repo: repo.clone(),
            image: image.clone(),
            params,
            tip,
            parent,
            hold: None,
            pipeline: Some(pipeline),
            failed: None,
            position: 0,
            filling: None,
            sequence: 0,
            data_bytes: 0,
        })
    }

    /// Bytes and holes given so far.
    pub fn position(&self) -> ByteLen {
        ByteLen(self.position)
    }

    fn chunk_len(&self) -> u64 {
        self.params.chunk_size.len() as u64
    }

    fn check_room(&self, len: u64) -> Result<(), RepoError> {
        if let Some(error) = &self.failed {
            return Err(error.clone());
        }
        match self.position.checked_add(len) {
            Some(end) if end <= self.params.size.0 => Ok(()),
            _ => Err(RepoError::TooMuchData { size: self.params.size }),
        }
    }

    /// The next bytes of the device.
    pub fn data(&mut self, mut bytes: &[u8]) -> Result<(), RepoError> {
        self.check_room(bytes.len() as u64)?;
        self.data_bytes += bytes.len() as u64;
        while !bytes.is_empty() {
            let in_chunk = (self.position % self.chunk_len()) as usize;
            let piece = bytes.len().min(self.params.chunk_size.len() - in_chunk);
            let (now, later) = bytes.split_at(piece);
            let mut buffers = match self.filling.take() {
                Some(buffers) => buffers,
                None => self.take_buffers()?,
            };
            // What came before as a hole.
            buffers.content.resize(in_chunk, 0);
            buffers.content.extend_from_slice(now);
            self.filling = Some(buffers);
            self.position += piece as u64;
            bytes = later;
            self.submit_if_full()?;
        }
        Ok(())
    }

    /// Zeros, as a hole: nothing is read and whole chunks cost nothing, however many.
    pub fn hole(&mut self, len: ByteLen) -> Result<(), RepoError> {
        self.check_room(len.0)?;
        let mut left = len.0;
        if self.filling.is_some() {
            let piece = left.min(self.chunk_len() - self.position % self.chunk_len());
            if let Some(buffers) = &mut self.filling {
                buffers.content.resize(buffers.content.len() + piece as usize, 0);
            }
            self.position += piece;
            left -= piece;
            self.submit_if_full()?;
        }
        self.position += left;
        Ok(())
    }

    fn take_buffers(&mut self) -> Result<Buffers, RepoError> {
        let taken = self.pipeline.as_ref().and_then(|pipeline| pipeline.pool.recv().ok());
        match taken {
            Some(mut buffers) => {
                buffers.content.clear();
                Ok(buffers)
            }
            None => Err(self.fail()),
        }
    }

    /// Sends the chunk being filled if the position is at its end.
    fn submit_if_full(&mut self) -> Result<(), RepoError> {
        if !self.position.is_multiple_of(self.chunk_len()) {
            return Ok(());
        }
        let index = ChunkIndex(self.position / self.chunk_len() - 1);
        self.submit(index)
    }

    fn submit(&mut self, index: ChunkIndex) -> Result<(), RepoError> {
        let Some(buffers) = self.filling.take() else { return Ok(()) };
        let job = Job { sequence: self.sequence, index, buffers };
        self.sequence += 1;
        match self.pipeline.as_ref().map(|pipeline| pipeline.jobs.send(job)) {
            Some(Ok(())) => Ok(()),
            _ => Err(self.fail()),
        }
    }

    /// Ends the threads and finds out why they stopped.
    fn fail(&mut self) -> RepoError {
        if self.failed.is_none() {
            let stopped = RepoError::WriterStopped { why: "its threads ended" };
            let why = self.pipeline.take().and_then(|pipeline| pipeline.join().err());
            self.failed = Some(why.unwrap_or(stopped));
        }
        self.failed.clone().unwrap_or(RepoError::WriterStopped { why: "its threads ended" })
    }

    /// Waits until all is stored and durable, writes the commit and moves the branch. What was not given up to the size is a hole.
    pub fn finish(mut self, meta: CommitMeta) -> Result<Finished, RepoError> {
        self.check_room(0)?;
        if let Some(buffers) = &mut self.filling {
            // Past the device's end a chunk is filled with zeros.
            buffers.content.resize(self.params.chunk_size.len(), 0);
            self.submit(ChunkIndex(self.position / self.chunk_len()))?;
        }
        let Some(pipeline) = self.pipeline.take() else { return Err(self.fail()) };
        let Assembled { map, mut stats } = pipeline.join()?;
        stats.data_bytes = self.data_bytes;
        if let (Some(parent), Some(tip)) = (&self.parent, &self.tip)
            && same_device(parent.version.commit(), map, &self.params, meta.filesystem)
        {
            return Ok(Finished { commit: tip.commit, unchanged: true, stats });
        }
        let commit = Commit {
            parents: self.tip.iter().map(|tip| tip.commit).collect(),
            map,
            size: self.params.size,
            block_size: self.params.block_size,
            chunk_size: self.params.chunk_size,
            filesystem: meta.filesystem,
            author: meta.author,
            time: meta.time,
            message: meta.message,
        };
        let id = self.handle.block_on(async {
            let id = self.repo.put_commit(&self.image, &commit).await?;
            if let Some(hold) = &self.hold {
                hold.move_branch(&self.params.branch, self.tip.as_ref(), &[id]).await?;
            }
            Ok::<_, RepoError>(id)
        })?;
        Ok(Finished { commit: id, unchanged: false, stats })
    }
}

impl Drop for ImageWriter {
    fn drop(&mut self) {
        // The threads end when their channels do; waited for, so that nothing is written after the caller was told it was given up.
        if let Some(pipeline) = self.pipeline.take() {
            pipeline.abort();
        }
        if let Some(hold) = self.hold.take() {
            self.handle.block_on(hold.release());
        }
    }
}

impl Pipeline {
    /// Lets the threads finish what they have.
    fn join(self) -> Result<Assembled, RepoError> {
        let Pipeline { jobs, pool, workers, assembler, given_up: _ } = self;
        drop(jobs);
        let assembled = assembler.join();
        drop(pool);
        let ended = workers.into_iter().map(JoinHandle::join).all(|ended| ended.is_ok());
        match assembled {
            Ok(result) if ended => result,
            Ok(Err(error)) => Err(error),
            _ => Err(RepoError::WriterStopped { why: "one of its threads panicked" }),
        }
    }

    /// Ends the threads without finishing.
    fn abort(self) {
        self.given_up.store(true, Ordering::Relaxed);
        // The error says that it was given up, which the caller knows.
        let _ = self.join();
    }
}

/// Starts workers and assembler.
fn start(
    handle: &Handle,
    target: Target,
    parent: Option<Parent>,
    known: KnownChunks,
    map: MapBuilder,
    params: &WriterParams,
) -> Result<Pipeline, RepoError> {
    let system = |operation| move |error| RepoError::WriterSystem { operation, source: Arc::new(error) };
    let packer = || Packer::new(params.level).map_err(system("start zstd"));
    let known = Arc::new(Mutex::new(known));
    let buffers = pipeline::buffers_for(params.chunk_size.len());
    // Channels without bounds of their own: the number of buffers bounds them all.
    let (jobs, job_queue) = mpsc::channel::<Job>();
    let (results, result_queue) = mpsc::channel();
    let (pool_return, pool) = mpsc::sync_channel(buffers);
    for _ in 0..buffers {
        let empty = Buffers { content: Vec::with_capacity(params.chunk_size.len()), packed: Vec::new() };
        // The channel has room for all of them.
        let _ = pool_return.send(empty);
    }
    let job_queue = Arc::new(Mutex::new(job_queue));
    let given_up = Arc::new(AtomicBool::new(false));
    let mut workers = Vec::new();
    for number in 0..params.threads.clamp(1, MAX_THREADS) {
        let (job_queue, results, known, packer) =
            (job_queue.clone(), results.clone(), known.clone(), packer()?);
        let worker = std::thread::Builder::new()
            .name(format!("pack-{number}"))
            .spawn(move || pipeline::work(&job_queue, &results, &known, packer));
        workers.push(worker.map_err(system("start a thread"))?);
    }
    let assembler = Assembler::new(handle.clone(), target, parent, known, packer()?, map);
    let assembler = std::thread::Builder::new()
        .name("assemble".into())
        .spawn({
            let given_up = given_up.clone();
            move || assembler.run(InOrder::new(result_queue), &pool_return, &given_up)
        })
        .map_err(system("start a thread"))?;
    Ok(Pipeline { jobs, pool, workers, assembler, given_up })
}

fn check_size(size: ByteLen) -> Result<(), RepoError> {
    if !size.0.is_multiple_of(PAGE_SIZE) || size > crate::format::commit::MAX_DEVICE_SIZE {
        return Err(RepoError::Unwritable {
            source: crate::format::FormatError::Field {
                what: CommitId::WHAT,
                field: "size",
                value: size.to_string(),
            },
        });
    }
    Ok(())
}

/// Whether the parent is this very device.
fn same_device(parent: &Commit, map: MapRoot, params: &WriterParams, filesystem: Filesystem) -> bool {
    (parent.map, parent.size, parent.filesystem) == (map, params.size, filesystem)
        && (parent.block_size, parent.chunk_size) == (params.block_size, params.chunk_size)
}

/// Fills the known chunks with those of the versions before the parent, the latest first, until they are full: what comes back is stored already.
/// Best effort: a version that can't be read (any more) ends it.
async fn learn_history(
    repo: &Repository,
    image: &ImageName,
    parent: &Version,
    known: &mut KnownChunks,
    learned: &mut HashSet<TableId>,
) {
    // What the versions share of their maps is fetched once, and forgotten when they are learned.
    let cache: Arc<dyn MetaCache> = Arc::new(MemMetaCache::default());
    let mut commit = parent.commit().clone();
    for _ in 0..HISTORY {
        let Some(before) = commit.parents.first().filter(|_| !known.is_full()) else { return };
        let open = Version::open(repo, image, *before, cache.clone(), VersionOptions::default());
        let learning = async {
            let version = open.await?;
            if version.commit().chunk_size == parent.commit().chunk_size {
                learn(&version, known, learned).await?;
            }
            Ok::<_, RepoError>(version.commit().clone())
        };
        match learning.await {
            Ok(found) => commit = found,
            Err(error) => {
                tracing::debug!(%error, "an older version can't be read: what it has in common is stored again");
                return;
            }
        }
    }
}

/// Fills the known chunks with a version's, from its first block on, until they are full. While the image streams by, its own chunks push
/// out the first ones, which lie behind it by then. Tables of blocks that were `learned` are not read again.
async fn learn(
    version: &Version,
    known: &mut KnownChunks,
    learned: &mut HashSet<TableId>,
) -> Result<(), RepoError> {
    let end = BlockIndex(version.commit().blocks());
    let refs = stream::unfold(Some(BlockIndex(0)), |from| async move {
        match version.next_block(from?, end).await {
            Ok(None) => None,
            Ok(Some((block, table))) => Some((Ok((block, table.id)), Some(BlockIndex(block.0 + 1)))),
            Err(error) => Some((Err(error), None)),
        }
    });
    let new = refs.filter(|found| {
        let is_new = found.as_ref().map_or(true, |(_, table)| learned.insert(*table));
        std::future::ready(is_new)
    });
    let tables = new.map(|found| async move { version.table(found?.0).await }).buffered(PARALLEL_TABLES);
    let mut tables = std::pin::pin!(tables);
    while let Some(table) = tables.next().await {
        let Some(table) = table? else { continue };
        let slots: Vec<_> = table.objects().map(|object| known.add_object(Some(object))).collect();
        for entry in table.entries() {
            if !known.is_full() && !known.contains(&entry.id) {
                let slot = slots[usize::from(entry.object)];
                known.add(entry.id, slot, entry.offset, entry.stored_len, entry.codec);
            }
        }
        for slot in slots {
            known.release_if_unused(slot);
        }
        if known.is_full() {
            break;
        }
    }
    Ok(())
}
