//! What a device stands on: a commit, read through the host's cache.
//!
//! Enters: chunk numbers. Leaves: verified chunks, or that there is nothing but zeros. Invariant: past the commit's end everything is zero; a chunk is fetched
//! once however many ask for it; what is fetched before anyone asked leaves most of the room there is to those who ask.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};

use futures_util::{StreamExt, stream};
use tokio::sync::{Notify, Semaphore};

use super::ahead::Ahead;
use super::touched::Touched;
use crate::cache::{Cache, ChunkRef, Claim, FetchError, Flight, ROOM_SHARE, Settled};
use crate::format::commit::BlockSize;
use crate::format::{ChunkLocation, ChunkTable};
use crate::repo::{RepoError, Version};
use crate::units::{BlockIndex, ByteLen, ByteOffset, ByteRange, ChunkIndex};

/// Chunks asked of the repository at a time when a range is fetched ahead of its use.
const PREFETCH_CHUNKS: usize = 64;
/// The most that is read ahead of one reader: half a second of a line of 50 MB/s.
const AHEAD: ByteLen = ByteLen(32 << 20);
/// What is under way ahead of its use, of all readers of a device. Those who wait have the rest of the cache's write queue.
const EARLY: ByteLen = ByteLen(16 << 20);
/// Bytes fetched together ahead of their use: few enough that who comes to want one of them does not wait long for the others.
const EARLY_SHARE: ByteLen = ByteLen(2 << 20);
/// Tables loaded at once.
const PARALLEL_TABLES: usize = 8;

/// Chunks that were waited for, by their number; `None` is a chunk of zeros.
pub type Fetched = Vec<(ChunkIndex, Option<ChunkRef>)>;

/// Why a part of the commit could not be read.
#[derive(Clone, Debug, thiserror::Error)]
#[non_exhaustive]
pub enum BaseError {
    /// The map could not be read.
    #[error("block {block}: {source}")]
    Map {
        /// The block whose table was wanted.
        block: BlockIndex,
        /// Where it starts.
        at: ByteOffset,
        /// The reason.
        source: Arc<RepoError>,
    },
    /// A chunk could not be fetched.
    #[error("{source}")]
    Chunk {
        /// Where it starts.
        at: ByteOffset,
        /// The reason.
        source: FetchError,
    },
}

impl BaseError {
    /// Where what can't be read begins.
    pub fn at(&self) -> ByteOffset {
        match self {
            BaseError::Map { at, .. } | BaseError::Chunk { at, .. } => *at,
        }
    }
}

/// Where a chunk is.
#[derive(Debug)]
pub enum Here {
    /// It is all zeros.
    Zero,
    /// In the cache, verified.
    Chunk(ChunkRef),
    /// In the repository, or not verified yet, or not known yet.
    Away,
}

/// A commit and the cache before it.
pub struct Base {
    version: Version,
    cache: Arc<Cache>,
    block_size: BlockSize,
    chunk_len: u64,
    /// Bytes the commit has; a device may be larger.
    len: u64,
    ahead: Ahead,
    touched: Touched,
    /// Chunks that may be under way ahead of their use.
    early: Arc<Semaphore>,
    brought: Arc<Bringing>,
    /// Reads that wait for the repository now.
    waiting: AtomicUsize,
    /// Rung when nobody waits any more.
    nobody_waits: Notify,
}

/// What was asked of the repository.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Brought {
    /// Chunks that came.
    pub chunks: u64,
    /// Their bytes, unpacked.
    pub bytes: ByteLen,
    /// Chunks that did not come, each time.
    pub failed: u64,
}

#[derive(Debug, Default)]
struct Bringing {
    chunks: AtomicU64,
    failed: AtomicU64,
}

/// Why chunks are fetched.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Purpose {
    /// A read waits for them.
    Read,
    /// Nobody does yet.
    Early,
}

/// Someone waits for the repository, as long as this lives.
struct Waiting<'b>(&'b Base);

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        if self.0.waiting.fetch_sub(1, Ordering::AcqRel) == 1 {
            self.0.nobody_waits.notify_waiters();
        }
    }
}

impl Base {
    /// A commit, read through `cache`; nothing is read ahead.
    pub fn new(version: Version, cache: Arc<Cache>) -> Base {
        let commit = version.commit();
        let (block_size, chunk_len, len) = (commit.block_size, commit.chunk_size.len() as u64, commit.size.0);
        Base {
            version,
            cache,
            block_size,
            chunk_len,
            len,
            ahead: Ahead::new(0),
            touched: Touched::default(),
            early: Arc::new(Semaphore::new((EARLY.0 / chunk_len).max(1) as usize)),
            brought: Arc::default(),
            waiting: AtomicUsize::new(0),
            nobody_waits: Notify::new(),
        }
    }

    /// The same, reading ahead of those who read in order.
    pub fn reading_ahead(self) -> Base {
        let ahead = Ahead::new(AHEAD.0 / self.chunk_len);
        Base { ahead, ..self }
    }

    /// Another commit, read through the same cache in the same way, and counted on.
    pub fn of_version(&self, version: Version) -> Base {
        let base = Base::new(version, self.cache.clone()).reading_ahead();
        Base { brought: self.brought.clone(), ..base }
    }

    /// The commit.
    pub fn version(&self) -> &Version {
        &self.version
    }

    /// Bytes the commit has.
    pub fn len(&self) -> ByteLen {
        ByteLen(self.len)
    }

    /// What was asked of the repository since it was opened.
    pub fn brought(&self) -> Brought {
        let chunks = self.brought.chunks.load(Ordering::Relaxed);
        let failed = self.brought.failed.load(Ordering::Relaxed);
        Brought { chunks, bytes: ByteLen(chunks * self.chunk_len), failed }
    }

    /// Bytes of a chunk.
    #[inline]
    pub fn chunk_len(&self) -> u64 {
        self.chunk_len
    }

    /// The chunk that holds a byte, and where it starts.
    #[inline]
    pub fn chunk_at(&self, at: ByteOffset) -> (ChunkIndex, ByteOffset) {
        let index = at.0 / self.chunk_len;
        (ChunkIndex(index), ByteOffset(index * self.chunk_len))
    }

    fn chunks_of_a_block(&self) -> u64 {
        self.block_size.len().0 / self.chunk_len
    }

    #[inline]
    fn block_of(&self, chunk: ChunkIndex) -> BlockIndex {
        BlockIndex(chunk.0 / self.chunks_of_a_block())
    }

    /// Whether a chunk lies past the commit's end.
    #[inline]
    fn is_past_the_end(&self, chunk: ChunkIndex) -> bool {
        chunk.0 >= self.len.div_ceil(self.chunk_len)
    }

    /// Where the block of a byte ends.
    pub fn block_end(&self, at: ByteOffset) -> ByteOffset {
        let block_len = self.block_size.len().0;
        ByteOffset((at.0 / block_len + 1) * block_len)
    }

    /// Where a chunk is, as far as that is known without waiting.
    #[inline]
    pub fn here(&self, chunk: ChunkIndex) -> Here {
        if self.is_past_the_end(chunk) {
            return Here::Zero;
        }
        match self.version.table_if_loaded(self.block_of(chunk)) {
            None => Here::Away,
            Some(table) => match self.location(table.as_deref(), chunk) {
                None => Here::Zero,
                Some(location) => self.cache.lookup(&location.id).map_or(Here::Away, Here::Chunk),
            },
        }
    }

    /// Whether a read of this chunk is to go the slow way, through [`Base::fetch`], though the chunk is here: it is time to read ahead.
    #[inline]
    pub fn is_mark(&self, chunk: ChunkIndex) -> bool {
        self.ahead.is_mark(chunk)
    }

    /// Every read says which chunks it uses.
    #[inline]
    pub fn note_use(&self, chunk: ChunkIndex) {
        self.touched.note(chunk);
    }

    /// Begins a list of the chunks that reads use, in order; one that was begun before is dropped.
    pub fn start_list(&self) {
        self.touched.start();
    }

    /// How long the list is.
    pub fn list_len(&self) -> usize {
        self.touched.len()
    }

    /// The list as it is now.
    pub fn list_so_far(&self) -> Vec<ChunkIndex> {
        self.touched.so_far()
    }

    /// Ends the list; `None` where there is none.
    pub fn end_list(&self) -> Option<Vec<ChunkIndex>> {
        self.touched.stop()
    }

    /// Where a chunk is stored, by its block's table; `None` where it is zeros.
    #[inline]
    pub fn location(&self, table: Option<&ChunkTable>, chunk: ChunkIndex) -> Option<ChunkLocation> {
        let table = table?;
        table.entry((chunk.0 % self.chunks_of_a_block()) as u32).map(|entry| table.location(entry))
    }

    /// Whether a chunk can be had without the repository.
    pub fn is_cached(&self, location: &ChunkLocation) -> bool {
        self.cache.contains(&location.id)
    }

    async fn table(&self, block: BlockIndex) -> Result<Option<Arc<ChunkTable>>, BaseError> {
        self.version.table(block).await.map_err(self.no_map(block))
    }

    fn no_map(&self, block: BlockIndex) -> impl FnOnce(RepoError) -> BaseError + '_ {
        let at = ByteOffset(block.0 * self.block_size.len().0);
        move |source| BaseError::Map { block, at, source: Arc::new(source) }
    }

    fn no_chunk(&self, chunk: ChunkIndex) -> impl FnOnce(FetchError) -> BaseError + '_ {
        let at = ByteOffset(chunk.0 * self.chunk_len);
        move |source| BaseError::Chunk { at, source }
    }

    /// The table of the block a byte is in; the byte must be inside the commit.
    pub async fn table_at(&self, at: ByteOffset) -> Result<Option<Arc<ChunkTable>>, BaseError> {
        self.table(self.block_size.block_of(at)).await
    }

    /// Where the run of absent blocks that starts at `at` ends; `at` itself where its block holds something. Absent subtrees cost nothing.
    pub async fn hole_end(&self, at: ByteOffset) -> Result<ByteOffset, BaseError> {
        const NEVER: ByteOffset = ByteOffset(u64::MAX);
        if at.0 >= self.len {
            return Ok(NEVER);
        }
        let block = self.block_size.block_of(at);
        let next = self.version.next_block(block, BlockIndex(u64::MAX)).await;
        match next.map_err(self.no_map(block))? {
            None => Ok(NEVER),
            Some((found, _)) if found == block => Ok(at),
            Some((found, _)) => Ok(ByteOffset(found.0 * self.block_size.len().0)),
        }
    }

    /// Brings chunks that someone waits for here and appends them to `fetched`; each is asked of the repository once, whoever else waits for it.
    pub async fn fetch(
        self: &Arc<Self>,
        chunks: &[ChunkIndex],
        fetched: &mut Fetched,
    ) -> Result<(), BaseError> {
        if let (Some(first), Some(last)) = (chunks.first(), chunks.last()) {
            let end = self.len.div_ceil(self.chunk_len);
            if let Some(soon) = self.ahead.used(first.0..last.0 + 1, end) {
                let base = self.clone();
                // Nobody waits for it: an error comes again when someone does.
                tokio::spawn(async move { base.fetch_early(soon.map(ChunkIndex)).await });
            }
        }
        self.waiting.fetch_add(1, Ordering::AcqRel);
        let _waiting = Waiting(self);
        self.bring(chunks, fetched, Purpose::Read).await
    }

    /// Waits until no read waits for the repository.
    pub async fn quiet(&self) {
        loop {
            let quiet = self.nobody_waits.notified();
            if self.waiting.load(Ordering::Acquire) == 0 {
                return;
            }
            quiet.await;
        }
    }

    /// Loads the tables of blocks that are not in memory yet, several at once.
    async fn load_tables(&self, chunks: &[ChunkIndex]) -> Result<(), BaseError> {
        let blocks: BTreeSet<BlockIndex> = chunks
            .iter()
            .filter(|chunk| !self.is_past_the_end(**chunk))
            .map(|chunk| self.block_of(*chunk))
            .filter(|block| self.version.table_if_loaded(*block).is_none())
            .collect();
        if blocks.len() < 2 {
            // The one who wants it loads it.
            return Ok(());
        }
        let mut loads = stream::iter(blocks).map(|block| self.table(block)).buffer_unordered(PARALLEL_TABLES);
        while let Some(loaded) = loads.next().await {
            loaded?;
        }
        Ok(())
    }

    async fn bring(
        &self,
        chunks: &[ChunkIndex],
        fetched: &mut Fetched,
        purpose: Purpose,
    ) -> Result<(), BaseError> {
        self.load_tables(chunks).await?;
        let mut wanted = Vec::with_capacity(chunks.len());
        for &chunk in chunks {
            let table =
                if self.is_past_the_end(chunk) { None } else { self.table(self.block_of(chunk)).await? };
            match self.location(table.as_deref(), chunk) {
                None => fetched.push((chunk, None)),
                Some(location) => wanted.push((chunk, location)),
            }
        }
        let (mut flights, mut pending) = (Vec::new(), Vec::new());
        for (chunk, location) in wanted {
            match self.cache.claim_one(&location.id) {
                Claim::Ready(here) => fetched.push((chunk, Some(here))),
                Claim::Pending(others) => pending.push((chunk, location, others)),
                Claim::Missing(flight) => flights.push((chunk, location, flight)),
            }
        }
        // Our own first: someone whose flight we wait for may be waiting for one of ours.
        self.fly(flights, fetched, purpose).await?;
        for (chunk, location, others) in pending {
            match others.settle().await.map_err(self.no_chunk(chunk))? {
                Settled::Ready(here) => fetched.push((chunk, Some(here))),
                Settled::Missing(flight) => {
                    self.fly(vec![(chunk, location, flight)], fetched, purpose).await?;
                }
            }
        }
        Ok(())
    }

    /// Brings chunks that were in the cache's memory back into it, checked again, and appends them to `fetched`.
    pub async fn wake(
        &self,
        asleep: Vec<(ChunkIndex, ChunkRef)>,
        fetched: &mut Fetched,
    ) -> Result<(), BaseError> {
        for (chunk, here) in asleep {
            match self.cache.reload(here).await.map_err(self.no_chunk(chunk))? {
                Settled::Ready(here) => fetched.push((chunk, Some(here))),
                Settled::Missing(flight) => {
                    // Damaged on the disk; its id is the flight's.
                    let table = self.table(self.block_of(chunk)).await?;
                    match self.location(table.as_deref(), chunk) {
                        Some(location) => {
                            self.fly(vec![(chunk, location, flight)], fetched, Purpose::Read).await?;
                        }
                        None => fetched.push((chunk, None)),
                    }
                }
            }
        }
        Ok(())
    }

    /// Fetches chunks that are ours to fetch.
    async fn fly(
        &self,
        mut flights: Vec<(ChunkIndex, ChunkLocation, Flight)>,
        fetched: &mut Fetched,
        purpose: Purpose,
    ) -> Result<(), BaseError> {
        // Each share waits for its own room in the cache; the first to get it need not wait for the last.
        let share = (ROOM_SHARE.0 / self.chunk_len).max(1) as usize;
        let mut tasks = Vec::with_capacity(flights.len().div_ceil(share));
        while !flights.is_empty() {
            let rest = flights.split_off(flights.len().min(share));
            let first = (flights[0].0, flights[0].1.id);
            let (version, cache, brought) = (self.version.clone(), self.cache.clone(), self.brought.clone());
            let fly = fly_together(version, cache, brought, self.chunk_len, flights, purpose);
            // A task of its own: if our client goes away, others still get what they wait for.
            tasks.push((first, tokio::spawn(fly)));
            flights = rest;
        }
        for ((first, id), task) in tasks {
            let broken_off = |_| self.no_chunk(first)(FetchError::BrokenOff { id });
            for (chunk, here) in task.await.map_err(broken_off)? {
                fetched.push((chunk, Some(here.map_err(self.no_chunk(chunk))?)));
            }
        }
        Ok(())
    }

    /// Brings everything in a range of the commit here, some chunks at a time; a client waits for that.
    pub async fn prefetch(&self, range: ByteRange) -> Result<(), BaseError> {
        let mut at = range.start;
        let mut batch = Vec::with_capacity(PREFETCH_CHUNKS);
        while at < range.end {
            let hole_end = self.hole_end(at).await?;
            if hole_end > at {
                at = hole_end;
                continue;
            }
            let (chunk, start) = self.chunk_at(at);
            at = ByteOffset(start.0 + self.chunk_len);
            batch.push(chunk);
            if batch.len() == PREFETCH_CHUNKS {
                self.bring(&std::mem::take(&mut batch), &mut Vec::new(), Purpose::Read).await?;
            }
        }
        self.bring(&batch, &mut Vec::new(), Purpose::Read).await
    }

    /// Brings chunks here before anyone asks for them, in about their order, some of them at once. How many bytes of chunks were not here before.
    pub async fn fetch_early(
        self: &Arc<Self>,
        chunks: impl IntoIterator<Item = ChunkIndex, IntoIter: Send>,
    ) -> Result<ByteLen, BaseError> {
        let share = (EARLY_SHARE.0 / self.chunk_len).max(1) as usize;
        let mut chunks = chunks.into_iter();
        let shares = std::iter::from_fn(move || {
            let share: Vec<ChunkIndex> = chunks.by_ref().take(share).collect();
            (!share.is_empty()).then_some(share)
        });
        let at_once = (EARLY.0 / EARLY_SHARE.0) as usize;
        let mut shares = stream::iter(shares).map(|share| self.fetch_share(share)).buffer_unordered(at_once);
        let mut brought = 0;
        while let Some(share) = shares.next().await {
            brought += share?.0;
        }
        Ok(ByteLen(brought))
    }

    async fn fetch_share(self: &Arc<Self>, chunks: Vec<ChunkIndex>) -> Result<ByteLen, BaseError> {
        let permits = self.early.clone().acquire_many_owned(chunks.len() as u32).await;
        let _permits = permits.expect("the semaphore is never closed");
        self.load_tables(&chunks).await?;
        let mut away = Vec::with_capacity(chunks.len());
        for chunk in chunks {
            let table =
                if self.is_past_the_end(chunk) { None } else { self.table(self.block_of(chunk)).await? };
            if self.location(table.as_deref(), chunk).is_some_and(|location| !self.is_cached(&location)) {
                away.push(chunk);
            }
        }
        let bytes = ByteLen(away.len() as u64 * self.chunk_len);
        let mut fetched = Fetched::new();
        self.bring(&away, &mut fetched, Purpose::Early).await?;
        Ok(bytes)
    }
}

/// Fetches chunks in one request, and lands all of them in the cache.
async fn fly_together(
    version: Version,
    cache: Arc<Cache>,
    brought: Arc<Bringing>,
    chunk_len: u64,
    flights: Vec<(ChunkIndex, ChunkLocation, Flight)>,
    purpose: Purpose,
) -> Vec<(ChunkIndex, Result<ChunkRef, FetchError>)> {
    // Held until they have landed: chunks under way count like chunks that wait for the disk.
    let mut room = cache.room(ByteLen(flights.len() as u64 * chunk_len)).await;
    let locations: Vec<ChunkLocation> = flights.iter().map(|(_, location, _)| *location).collect();
    let answers = version.fetch(&locations).await;
    let came = answers.iter().filter(|answer| answer.is_ok()).count();
    brought.chunks.fetch_add(came as u64, Ordering::Relaxed);
    brought.failed.fetch_add((answers.len() - came) as u64, Ordering::Relaxed);
    let landed = flights.into_iter().zip(answers).map(|((chunk, location, flight), answer)| {
        let here = match answer {
            Ok(content) => flight.fulfil_in(&mut room, content),
            // The flight is let go, not failed: whoever waits for it fetches it again, with all the time a read has.
            Err(error) if purpose == Purpose::Early => {
                Err(FetchError::Fetch { id: location.id, source: Arc::new(error) })
            }
            Err(error) => Err(flight.fail(error)),
        };
        (chunk, here)
    });
    // All of them, before the first error is told: the others' waiters must not wait for ours.
    landed.collect()
}
