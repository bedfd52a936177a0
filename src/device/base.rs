//! What a device stands on: a commit, read through the host's cache.
//!
//! Enters: chunk numbers. Leaves: verified chunks, or that there is nothing but zeros. Invariant: past the commit's end everything is zero; a chunk is fetched
//! once however many ask for it.

use std::sync::Arc;

use crate::cache::{Cache, ChunkRef, Claim, FetchError, Flight, ROOM_SHARE, Settled};
use crate::format::commit::BlockSize;
use crate::format::{ChunkLocation, ChunkTable};
use crate::repo::{RepoError, Version};
use crate::units::{BlockIndex, ByteLen, ByteOffset, ByteRange, ChunkIndex};

/// Chunks asked of the repository at a time when a range is fetched ahead of its use.
const PREFETCH_CHUNKS: usize = 64;

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
        /// The reason.
        source: Arc<RepoError>,
    },
    /// A chunk could not be fetched.
    #[error(transparent)]
    Chunk(#[from] FetchError),
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
}

impl Base {
    /// A commit, read through `cache`.
    pub fn new(version: Version, cache: Arc<Cache>) -> Base {
        let commit = version.commit();
        let (block_size, chunk_len, len) = (commit.block_size, commit.chunk_size.len() as u64, commit.size.0);
        Base { version, cache, block_size, chunk_len, len }
    }

    /// The commit.
    pub fn version(&self) -> &Version {
        &self.version
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
        chunk.0 * self.chunk_len >= self.len
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
        self.version.table(block).await.map_err(|source| BaseError::Map { block, source: Arc::new(source) })
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
        match next.map_err(|source| BaseError::Map { block, source: Arc::new(source) })? {
            None => Ok(NEVER),
            Some((found, _)) if found == block => Ok(at),
            Some((found, _)) => Ok(ByteOffset(found.0 * self.block_size.len().0)),
        }
    }

    /// Brings chunks here and appends them to `fetched`; each is asked of the repository once, whoever else waits for it.
    pub async fn fetch(&self, chunks: &[ChunkIndex], fetched: &mut Fetched) -> Result<(), BaseError> {
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
        self.fly(flights, fetched).await?;
        for (chunk, location, others) in pending {
            match others.settle().await? {
                Settled::Ready(here) => fetched.push((chunk, Some(here))),
                Settled::Missing(flight) => self.fly(vec![(chunk, location, flight)], fetched).await?,
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
            match self.cache.reload(here).await? {
                Settled::Ready(here) => fetched.push((chunk, Some(here))),
                Settled::Missing(flight) => {
                    // Damaged on the disk; its id is the flight's.
                    let table = self.table(self.block_of(chunk)).await?;
                    match self.location(table.as_deref(), chunk) {
                        Some(location) => self.fly(vec![(chunk, location, flight)], fetched).await?,
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
    ) -> Result<(), BaseError> {
        // Each share waits for its own room in the cache; the first to get it need not wait for the last.
        let share = (ROOM_SHARE.0 / self.chunk_len).max(1) as usize;
        let mut tasks = Vec::with_capacity(flights.len().div_ceil(share));
        while !flights.is_empty() {
            let rest = flights.split_off(flights.len().min(share));
            let first = flights[0].1.id;
            let fly = fly_together(self.version.clone(), self.cache.clone(), self.chunk_len, flights);
            // A task of its own: if our client goes away, others still get what they wait for.
            tasks.push((first, tokio::spawn(fly)));
            flights = rest;
        }
        for (first, task) in tasks {
            for chunk in task.await.map_err(|_| FetchError::BrokenOff { id: first })? {
                fetched.push(chunk?);
            }
        }
        Ok(())
    }

    /// Brings everything in a range of the commit here, some chunks at a time.
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
                self.fetch(&std::mem::take(&mut batch), &mut Vec::new()).await?;
            }
        }
        self.fetch(&batch, &mut Vec::new()).await
    }
}

/// Fetches chunks in one request, and lands all of them in the cache.
async fn fly_together(
    version: Version,
    cache: Arc<Cache>,
    chunk_len: u64,
    flights: Vec<(ChunkIndex, ChunkLocation, Flight)>,
) -> Vec<Result<(ChunkIndex, Option<ChunkRef>), FetchError>> {
    // Held until they have landed: chunks under way count like chunks that wait for the disk.
    let mut room = cache.room(ByteLen(flights.len() as u64 * chunk_len)).await;
    let locations: Vec<ChunkLocation> = flights.iter().map(|(_, location, _)| *location).collect();
    let answers = version.fetch(&locations).await;
    let landed = flights.into_iter().zip(answers).map(|((chunk, _, flight), answer)| match answer {
        Ok(content) => flight.fulfil_in(&mut room, content).map(|here| (chunk, Some(here))),
        Err(error) => Err(flight.fail(error)),
    });
    // All of them, before the first error is told: the others' waiters must not wait for ours.
    landed.collect()
}
