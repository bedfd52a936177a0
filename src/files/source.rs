//! Where the bytes of a filesystem come from: a commit in a repository, or a volume with its writes.
//!
//! Enters: byte ranges. Leaves: exactly those bytes, verified. Invariant: memory for chunks that are kept is bounded by [`ChunkMemory`], which the versions of one comparison share:
//! a chunk both have is fetched once.

use std::collections::{HashMap, VecDeque};
use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use async_trait::async_trait;
use bytes::{Bytes, BytesMut};
use parking_lot::Mutex;

use super::FilesError;
use crate::device::{Device, Piece};
use crate::format::{ChunkId, ChunkLocation};
use crate::repo::Version;
use crate::units::{BlockIndex, ByteLen, ByteOffset, ByteRange};

/// The longest read at once.
pub const MAX_READ: ByteLen = ByteLen(4 << 20);

/// Bytes at an offset.
#[async_trait]
pub trait Source: Send + Sync + fmt::Debug {
    /// Bytes of the device.
    fn size(&self) -> ByteLen;

    /// The bytes of a range inside the device, at most [`MAX_READ`] of them. Exactly as many as asked for.
    async fn read(&self, range: ByteRange) -> Result<Bytes, FilesError>;
}

fn check(range: ByteRange, size: ByteLen) -> Result<(), FilesError> {
    if range.end.0 > size.0 || range.start > range.end || range.len() > MAX_READ {
        return Err(FilesError::OutOfRange { end: range.end, size });
    }
    Ok(())
}

/// Chunks in memory, the latest ones.
#[derive(Debug)]
pub struct ChunkMemory {
    limit: usize,
    /// Chunks by id, and the order they came in.
    held: Mutex<(HashMap<ChunkId, Bytes>, VecDeque<ChunkId>, usize)>,
    fetched: AtomicU64,
}

impl ChunkMemory {
    /// Keeps up to `limit` bytes.
    pub fn new(limit: ByteLen) -> Arc<ChunkMemory> {
        Arc::new(ChunkMemory { limit: limit.0 as usize, held: Mutex::default(), fetched: AtomicU64::new(0) })
    }

    /// Bytes of chunks that were fetched so far.
    pub fn fetched(&self) -> ByteLen {
        ByteLen(self.fetched.load(Ordering::Relaxed))
    }

    fn find(&self, id: &ChunkId) -> Option<Bytes> {
        self.held.lock().0.get(id).cloned()
    }

    fn put(&self, id: ChunkId, content: Bytes) {
        self.fetched.fetch_add(content.len() as u64, Ordering::Relaxed);
        let mut held = self.held.lock();
        let (chunks, order, bytes) = &mut *held;
        let len = content.len();
        if chunks.insert(id, content).is_none() {
            order.push_back(id);
            *bytes += len;
        }
        while *bytes > self.limit
            && let Some(oldest) = order.pop_front()
        {
            *bytes -= chunks.remove(&oldest).map_or(0, |chunk| chunk.len());
        }
    }
}

/// A commit in a repository.
#[derive(Clone, Debug)]
pub struct VersionSource {
    version: Version,
    memory: Arc<ChunkMemory>,
}

impl VersionSource {
    /// A commit, whose chunks are kept in `memory`.
    pub fn new(version: Version, memory: Arc<ChunkMemory>) -> VersionSource {
        VersionSource { version, memory }
    }

    /// The commit.
    pub fn version(&self) -> &Version {
        &self.version
    }
}

#[async_trait]
impl Source for VersionSource {
    fn size(&self) -> ByteLen {
        self.version.commit().size
    }

    async fn read(&self, range: ByteRange) -> Result<Bytes, FilesError> {
        check(range, self.size())?;
        let commit = self.version.commit();
        let chunk_len = commit.chunk_size.len() as u64;
        let chunks_of_a_block = u64::from(commit.block_size.chunks(commit.chunk_size));
        let (first, end) = (range.start.0 / chunk_len, range.end.0.div_ceil(chunk_len));
        let mut found: Vec<Option<Bytes>> = Vec::with_capacity((end - first) as usize);
        let (mut lacking, mut places): (Vec<ChunkLocation>, Vec<usize>) = (Vec::new(), Vec::new());
        for chunk in first..end {
            let table = self.version.table(BlockIndex(chunk / chunks_of_a_block)).await?;
            let entry = table.as_ref().and_then(|table| {
                table.entry((chunk % chunks_of_a_block) as u32).map(|entry| table.location(entry))
            });
            let here = entry.and_then(|location| self.memory.find(&location.id));
            if let (Some(location), None) = (entry, &here) {
                lacking.push(location);
                places.push(found.len());
            }
            found.push(here);
        }
        for (place, fetched) in places.into_iter().zip(self.version.fetch(&lacking).await) {
            let chunk = fetched?;
            self.memory.put(chunk.id(), chunk.content().clone());
            found[place] = Some(chunk.content().clone());
        }
        let part = |index: u64| {
            let start = index * chunk_len;
            let from = range.start.0.max(start) - start;
            let to = range.end.0.min(start + chunk_len) - start;
            from as usize..to as usize
        };
        if let [Some(only)] = found.as_slice() {
            return Ok(only.slice(part(first)));
        }
        let mut bytes = BytesMut::with_capacity(range.len().0 as usize);
        for (index, chunk) in (first..end).zip(found) {
            let part = part(index);
            match chunk {
                Some(chunk) => bytes.extend_from_slice(&chunk[part]),
                None => bytes.resize(bytes.len() + part.len(), 0),
            }
        }
        Ok(bytes.freeze())
    }
}

/// A volume, or a commit that is read through the host's cache.
#[derive(Clone)]
pub struct DeviceSource {
    device: Arc<Device>,
}

impl DeviceSource {
    /// A device, as it is at each read.
    pub fn new(device: Arc<Device>) -> DeviceSource {
        DeviceSource { device }
    }

    /// The device.
    pub fn device(&self) -> &Arc<Device> {
        &self.device
    }
}

impl fmt::Debug for DeviceSource {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "DeviceSource({:?})", self.device.base().version())
    }
}

#[async_trait]
impl Source for DeviceSource {
    fn size(&self) -> ByteLen {
        self.device.size()
    }

    async fn read(&self, range: ByteRange) -> Result<Bytes, FilesError> {
        check(range, self.size())?;
        if range.is_empty() {
            return Ok(Bytes::new());
        }
        let pieces = self.device.read(range).await?;
        if let [Piece::Bytes(only)] = pieces.as_slice() {
            return Ok(only.clone());
        }
        let mut bytes = BytesMut::with_capacity(range.len().0 as usize);
        for piece in pieces {
            match piece {
                Piece::Zero(len) => bytes.resize(bytes.len() + len.0 as usize, 0),
                Piece::Chunk(slice) => bytes.extend_from_slice(&slice),
                Piece::Bytes(piece) => bytes.extend_from_slice(&piece),
            }
        }
        Ok(bytes.freeze())
    }
}

/// A range of `len` bytes from `at`; past 2^64 it reaches nothing that exists.
pub(super) fn range_at(at: u64, len: u64) -> ByteRange {
    ByteRange { start: ByteOffset(at), end: ByteOffset(at.saturating_add(len)) }
}
