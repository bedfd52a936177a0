//! The host-wide chunk cache: every volume and version in this server shares it.
//!
//! Enters: chunks that were verified, and small objects the caller has checked. Leaves: bytes that this process has
//! verified, from a read-only map of a slab file or, where the disk has no place, from memory.
//! Invariant: no byte leaves that was not hashed by this process after it was last written or read from the disk
//! (FORMAT.md, "Cache", says why a crash can't break that, and names the one second in which it is not checked again).
//! A cache that is full, damaged or on a full disk gets slower, and never wrong.
//!
//! The parts: `slab` (files and maps), `index` (what is where), `flight` (who fetches), `writer` (the one thread that
//! writes and evicts), `blobs` (small objects).
//!
//! One chunk's way: [`Cache::lookup`] finds nothing, [`Cache::claim`] gives one caller the [`Flight`]; it fetches and
//! calls [`Flight::fulfil`], which serves all who wait from memory at once; the writer thread puts the chunk into a
//! slot behind their backs; the next lookup finds it there.
//!
//! What touches the disk, and where: lookups and claims do no I/O. Verification reads with pread on a blocking
//! thread. Touching a chunk's bytes may wait for the disk if they have left memory: [`ChunkRef::is_resident`] tells,
//! [`Cache::reload`] brings them back, verified again.

mod blobs;
pub mod care;
mod chunk_ref;
mod error;
mod flight;
mod index;
mod kept;
mod queue;
mod slab;
mod stats;
mod writer;

use std::collections::HashSet;
use std::fs;
use std::path::Path;
use std::sync::Arc;
use std::sync::mpsc;
use std::thread::JoinHandle;
use std::time::Duration;

use bytes::Bytes;
use tokio::sync::{Semaphore, oneshot};

pub use blobs::MAX_BLOB;
pub use care::Freed;
pub use chunk_ref::{ChunkRef, ChunkSlice};
pub use error::{CacheError, FetchError};
pub use flight::{Claim, Flight, Pending, Settled};
pub use queue::Room;
pub use stats::CacheStats;

use crate::format::cache_index::{MAX_SLAB_LOG2, MIN_SLAB_LOG2};
use crate::format::{ChunkId, ChunkSize, VerifiedChunk};
use crate::lock::{FileLock, LockError};
use crate::repo::MetaCache;
use crate::units::ByteLen;
use blobs::Blobs;
use index::{Found, Index, Place, Shard};
use kept::Kept;
use queue::Queue;
use slab::{Opened, Slab};
use stats::{Counters, count, value};
use writer::{Books, Job, Writer};

/// The smallest limit: room for a few slabs of the smallest size.
pub const MIN_LIMIT: ByteLen = ByteLen(16 << 20);
/// About how many slabs a full cache has: few enough to keep them all open, enough for the limit to be met closely.
const SLABS: u64 = 128;
/// Small objects get 1/32 of the limit, within these bounds. (The map and tables of an image are less than 1/1000 of
/// it.)
const BLOB_SHARE: u64 = 32;
const MIN_BLOB_SHARE: u64 = 1 << 20;
const MAX_BLOB_SHARE: u64 = 1 << 30;
/// Unless told otherwise the cache leaves 1/20 of the filesystem to others, at most this much: deltas may live there,
/// and a full disk hurts them more.
const MAX_KEEP_FREE: u64 = 1 << 30;
const KEEP_FREE: u64 = 20;
/// Chunks in memory on their way to the disk, and those being fetched into room that was asked for.
const QUEUE_BYTES: usize = 64 << 20;
/// The most that should be asked of [`Cache::room`] at a time: several who fetch share the queue.
pub const ROOM_SHARE: ByteLen = ByteLen(QUEUE_BYTES as u64 / 4);
/// Chunks that are being read and checked at one time; each takes a buffer of its size.
const MAX_CHECKS: usize = 16;

/// How a cache is to be.
#[derive(Clone, Copy, Debug)]
pub struct CacheOptions {
    /// Bytes the cache may take of the disk, all told. At least [`MIN_LIMIT`].
    pub limit: ByteLen,
    /// Bytes of the filesystem the cache leaves to others; `None` is 1/20 of it, at most 1 GiB.
    pub keep_free: Option<ByteLen>,
}

impl CacheOptions {
    /// A cache of at most `limit` bytes.
    pub fn new(limit: ByteLen) -> CacheOptions {
        CacheOptions { limit, keep_free: None }
    }
}

/// What lookups and the writer thread share.
struct Inner {
    index: Index,
    counters: Counters,
    kept: Kept,
}

/// The cache. Shared as `Arc<Cache>`.
pub struct Cache {
    inner: Arc<Inner>,
    blobs: Blobs,
    limit: ByteLen,
    /// The bound of the write queue: the channel below has none of its own.
    queue: Queue,
    /// The bound of checks at one time.
    checks: Arc<Semaphore>,
    /// `Some` until dropped.
    jobs: Option<mpsc::Sender<Job>>,
    writer: Option<JoinHandle<()>>,
}

impl Cache {
    /// Opens the cache in `dir`, making it if need be. Blocks on files: 64 bytes are read for each slot there is.
    /// What is found damaged is thrown away, and so is what is over the limit.
    pub fn open(dir: &Path, options: CacheOptions) -> Result<Arc<Cache>, CacheError> {
        let CacheOptions { limit, keep_free } = options;
        if limit < MIN_LIMIT {
            return Err(CacheError::Limit { limit, min: MIN_LIMIT });
        }
        let slabs = dir.join("slabs");
        fs::create_dir_all(&slabs).map_err(CacheError::io("make the directory", &slabs))?;
        let lock = Arc::new(lock(dir)?);
        let blob_share = (limit.0 / BLOB_SHARE).clamp(MIN_BLOB_SHARE, MAX_BLOB_SHARE);
        let blobs = Blobs::open(dir.join("meta"), blob_share)?;
        let slab_limit = limit.0 - blob_share;
        let slab_log2 = ((slab_limit / SLABS).ilog2() as u8).clamp(MIN_SLAB_LOG2, MAX_SLAB_LOG2);
        let keep_free = keep_free.map_or_else(|| default_keep_free(dir), |bytes| bytes.0);
        let inner =
            Arc::new(Inner { index: Index::new(), counters: Counters::default(), kept: Kept::default() });
        let mut writer = Writer::new(Books {
            inner: inner.clone(),
            lock: lock.clone(),
            dir: slabs.clone(),
            limit: slab_limit,
            slab_log2,
            keep_free,
        });
        for (number, path) in slab_files(&slabs)? {
            let Opened::Slab(slab, ids) = Slab::open(&path, number, lock.clone())? else {
                tracing::warn!(slab = %path.display(), "not a cache slab this build can use, thrown away");
                count(&inner.counters.healed, 1);
                fs::remove_file(&path).map_err(CacheError::io("delete", &path))?;
                continue;
            };
            if value(&inner.counters.allocated) + slab.geometry.file_len() > slab_limit {
                slab.unlink();
                continue;
            }
            adopt(&inner, &mut writer, slab, &ids);
        }
        let (jobs, receiver) = mpsc::channel();
        let thread = std::thread::Builder::new()
            .name("cache-writer".to_owned())
            .spawn(move || writer.run(receiver))
            .map_err(CacheError::io("start the writer thread of", dir))?;
        Ok(Arc::new(Cache {
            inner,
            blobs,
            limit,
            queue: Queue::new(QUEUE_BYTES),
            checks: Arc::new(Semaphore::new(MAX_CHECKS)),
            jobs: Some(jobs),
            writer: Some(thread),
        }))
    }

    /// The chunk, if it is here and this process has verified it. The hot path: one lock of a shard, no system call,
    /// no allocation.
    #[inline]
    pub fn lookup(&self, id: &ChunkId) -> Option<ChunkRef> {
        let mut shard = self.inner.index.shard(id);
        match shard.find(id) {
            Found::Verified(chunk) => {
                shard.hits += 1;
                Some(chunk)
            }
            Found::Unverified(_) | Found::Nothing => None,
        }
    }

    /// Whether the chunk is here, verified or not: for block status. It does not count as use.
    pub fn contains(&self, id: &ChunkId) -> bool {
        let shard = self.inner.index.shard(id);
        shard.place(id).is_some() || shard.staged.contains_key(id)
    }

    /// Waits until those of these that were inserted have been written (not synced), or could not be.
    pub async fn written_of(&self, ids: impl IntoIterator<Item = &ChunkId>) {
        const LOOK: Duration = Duration::from_millis(20);
        let is_staged = |id: &ChunkId| self.inner.index.shard(id).staged.contains_key(id);
        let mut waiting: Vec<ChunkId> = ids.into_iter().copied().filter(is_staged).collect();
        // A writer that panicked leaves what it was to write.
        while !waiting.is_empty() && self.writer.as_ref().is_some_and(|writer| !writer.is_finished()) {
            tokio::time::sleep(LOOK).await;
            waiting.retain(is_staged);
        }
    }

    /// Never evicts these from now on, as long as this cache is open.
    pub fn keep(&self, ids: impl IntoIterator<Item = ChunkId>) {
        self.inner.kept.add(ids);
    }

    /// Keeps these and no others from now on.
    pub fn keep_only(&self, ids: HashSet<ChunkId>) {
        self.inner.kept.replace(ids);
    }

    /// Every chunk that is on the disk here.
    pub fn chunks(&self) -> HashSet<ChunkId> {
        self.inner.index.chunks()
    }

    /// Lets these chunks go and gives their space back, but for what is to be kept and what is being read at the moment. What was freed.
    pub async fn free(&self, chunks: HashSet<ChunkId>) -> Freed {
        let Some(jobs) = &self.jobs else { return Freed::default() };
        let (tell, told) = oneshot::channel();
        // Without its thread, which panicked, there is nobody to free anything, and the other end is dropped.
        let _ = jobs.send(Job::Free { chunks, tell });
        told.await.unwrap_or_default()
    }

    /// What chunks may take of the limit; a little less fits, by what slabs' own records take.
    pub fn chunk_limit(&self) -> ByteLen {
        ByteLen(self.limit.0 - (self.limit.0 / BLOB_SHARE).clamp(MIN_BLOB_SHARE, MAX_BLOB_SHARE))
    }

    /// Waits for room in the write queue. Those who fetch ask for it before they fetch and land in it
    /// ([`Flight::fulfil_in`]): what they bring is kept then, and chunks in memory are bounded however many fetch at
    /// once and however slow the disk is. At most [`ROOM_SHARE`] at a time. Room that is held by others and not given
    /// back for seconds (their store hangs) is not waited for: what was asked for may then not be kept.
    pub async fn room(&self, bytes: ByteLen) -> Room {
        self.queue.reserve(usize::try_from(bytes.0).unwrap_or(usize::MAX)).await
    }

    /// Waits until everything inserted has been written (not synced). Under steady inserts this may be never: it is
    /// for shutting down and for tests.
    pub async fn written(&self) {
        self.queue.empties().await;
    }

    /// The small object (chunk table, map node) of that BLAKE3, if it is here. Blocks on a file.
    pub fn blob(&self, hash: &[u8; 32]) -> Option<Bytes> {
        self.blobs.read(hash, &self.inner.counters)
    }

    /// Keeps a small object of at most [`MAX_BLOB`] bytes; what can't be kept is let go. `content` must be what
    /// `hash` says, else it is thrown away when it is asked for. Blocks on a file; no fsync.
    pub fn put_blob(&self, hash: &[u8; 32], content: &[u8]) {
        self.blobs.write(hash, content);
    }

    /// The counters now.
    pub fn stats(&self) -> CacheStats {
        let (hits, misses, joined) = self.inner.index.counts();
        let counters = &self.inner.counters;
        CacheStats {
            hits,
            misses,
            joined,
            fetched: ByteLen(value(&counters.fetched)),
            verified: value(&counters.verified),
            healed: value(&counters.healed),
            evicted: value(&counters.evicted),
            heap_fallbacks: value(&counters.heap_fallbacks),
            used: ByteLen(value(&counters.used)),
            blobs: ByteLen(self.blobs.used()),
            allocated: ByteLen(value(&counters.allocated)),
            limit: self.limit,
        }
    }

    /// Takes a chunk that is not here into memory and into the write queue: into `room`, or what room there is.
    fn stage(&self, shard: &mut Shard, chunk: VerifiedChunk, room: Option<&mut Room>) -> ChunkRef {
        let content = chunk.content().clone();
        let size = ChunkSize::from_len(ByteLen(content.len() as u64));
        let room = match room {
            Some(room) => room.take(content.len()),
            None => self.queue.enter(content.len()),
        };
        if let (Some(size), Some(room), Some(jobs)) = (size, room, &self.jobs) {
            shard.staged.insert(chunk.id(), content.clone());
            let id = chunk.id();
            if jobs.send(Job::Store { chunk, size, room }).is_err() {
                // The writer thread is gone: it panicked. The cache serves what it has.
                shard.staged.remove(&id);
                count(&self.inner.counters.heap_fallbacks, 1);
            }
        } else {
            count(&self.inner.counters.heap_fallbacks, 1);
        }
        ChunkRef::heap(content)
    }
}

/// Opened versions keep their map nodes and chunk tables here, so that they open again with the repository away.
/// A cache's metadata, for who goes through all of it: reading it so is no use of it.
#[derive(Debug)]
pub struct Looking<'c>(pub &'c Cache);

impl MetaCache for Looking<'_> {
    fn get(&self, hash: &[u8; 32]) -> Option<Bytes> {
        self.0.blobs.look(hash, &self.0.inner.counters).map(|(content, _)| content)
    }

    fn put(&self, _hash: &[u8; 32], _bytes: &[u8]) {}
}

impl MetaCache for Cache {
    fn get(&self, hash: &[u8; 32]) -> Option<Bytes> {
        self.blob(hash)
    }

    fn put(&self, hash: &[u8; 32], bytes: &[u8]) {
        self.put_blob(hash, bytes);
    }
}

impl Drop for Cache {
    /// Writes what is queued (blocking for that long) and gives up the directory, but for chunks still held: the lock
    /// goes with the last of them.
    fn drop(&mut self) {
        drop(self.jobs.take());
        if let Some(writer) = self.writer.take()
            && writer.join().is_err()
        {
            tracing::error!("the cache's writer thread had panicked");
        }
    }
}

impl std::fmt::Debug for Cache {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Cache").field("stats", &self.stats()).finish_non_exhaustive()
    }
}

/// Locks a cache directory: one server at a time.
fn lock(dir: &Path) -> Result<FileLock, CacheError> {
    let path = dir.join("lock");
    FileLock::take(&path).map_err(|error| match error {
        LockError::InUse { holder } => CacheError::InUse { dir: dir.to_owned(), holder },
        LockError::Io(source) => CacheError::Io { action: "lock", path, source },
    })
}

/// Lists the slab files by number, and deletes those a crash left unfinished.
fn slab_files(dir: &Path) -> Result<Vec<(u16, std::path::PathBuf)>, CacheError> {
    let mut files = Vec::new();
    for entry in fs::read_dir(dir).map_err(CacheError::io("list", dir))? {
        let entry = entry.map_err(CacheError::io("list", dir))?;
        let name = entry.file_name();
        let Some(name) = name.to_str() else { continue };
        if let Some(number) = Slab::number_of(name) {
            files.push((number, entry.path()));
        } else if name.starts_with(".tmp-") {
            // It is ours, we hold the lock. If it can't be deleted it is overwritten when its number comes up.
            let _ = fs::remove_file(entry.path());
        }
    }
    files.sort_unstable();
    Ok(files)
}

/// Enters what a slab says it holds, unverified. Of two slots that name one chunk the first counts.
fn adopt(inner: &Inner, writer: &mut Writer, slab: Slab, ids: &[Option<ChunkId>]) {
    let slab = Arc::new(slab);
    inner.index.add_slab(&slab);
    let mut free = Vec::new();
    for (slot, id) in ids.iter().enumerate() {
        let place = Place { slab: slab.number, slot: slot as u16 };
        match id {
            Some(id) if inner.index.shard(id).enter(id, place, false) => {
                count(&inner.counters.used, slab.geometry.chunk().len() as u64);
            }
            _ => free.push(slot as u32),
        }
    }
    writer.adopt(slab, free.into_iter());
}

/// What the cache leaves of the filesystem unless told.
fn default_keep_free(dir: &Path) -> u64 {
    rustix::fs::statvfs(dir)
        .map_or(MAX_KEEP_FREE, |fs| (fs.f_blocks.saturating_mul(fs.f_frsize) / KEEP_FREE).min(MAX_KEEP_FREE))
}
